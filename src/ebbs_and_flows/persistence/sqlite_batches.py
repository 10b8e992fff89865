"""Batches on SQLite: a few statements each, under the write lock of their transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, text
from sqlalchemy.exc import IntegrityError

from ebbs_and_flows.persistence.rows import (
    BEGIN_FIELDS,
    CHECKPOINT_FIELDS,
    CONTEXT_FIELDS,
    NAME,
    Field,
    Moved,
    Rows,
)
from ebbs_and_flows.persistence.tables import UtcDateTime

_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"

# The fence, and with it the times that the statements after it take from the row. Those that go on and those that leave
# RUNNING in a statement each: SQLite writes every index anew whose columns are set, also to what they were.
_HELD = """
FROM given
WHERE ebbs_flow_executions.execution_id = given.execution_id
    AND ebbs_flow_executions.status = 'RUNNING'
    AND ebbs_flow_executions.epoch = given.epoch
    AND ebbs_flow_executions.execution_step = given.step
    AND given.name IS {absent} NULL
RETURNING execution_id, updated_at, run_at
"""
_ADVANCED = f"""
    execution_step = execution_step + 1,
    current_task_index = given.task_index,
    updated_at = max({_NOW}, updated_at),
    lease_expires_at = strftime('%Y-%m-%d %H:%M:%f', 'now', given.lease_seconds || ' seconds') || '000'
"""
_LEFT = f"""
    status = given.status,
    execution_step = execution_step + 1,
    current_task_index = given.task_index,
    updated_at = max({_NOW}, updated_at),
    lease_owner = NULL,
    lease_expires_at = NULL,
    run_at = CASE WHEN given.wait_seconds IS NULL THEN run_at
        ELSE strftime('%Y-%m-%d %H:%M:%f', 'now', given.wait_seconds || ' seconds') || '000' END,
    finished_at = CASE WHEN given.status IN ('SUCCEEDED', 'FAILED', 'CANCELLED') THEN max({_NOW}, updated_at) END
"""
_ADVANCE = f"{{given}} UPDATE ebbs_flow_executions SET {_ADVANCED} {_HELD.replace('{absent}', 'NOT')}"
_LEAVE = f"{{given}} UPDATE ebbs_flow_executions SET {_LEFT} {_HELD.replace('{absent}', '')}"
_END = """
{given}
UPDATE ebbs_task_executions SET
    status = given.end_status,
    failure = given.failure,
    error_type = given.error_type,
    output = given.output,
    entries = given.entries,
    entry_types = given.entry_types,
    dropped = given.dropped,
    finished_at = (
        SELECT updated_at FROM ebbs_flow_executions AS execution WHERE execution.execution_id = given.execution_id
    )
FROM given
WHERE flow_execution_id = given.execution_id AND flow_execution_step = given.step
    AND ebbs_task_executions.status = 'RUNNING'
"""
_BEGIN_NEXT = """
INSERT INTO ebbs_task_executions (
    flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
)
{given}
SELECT
    given.execution_id, given.step + 1, given.task_index, given.name, given.attempt, given.epoch, 'RUNNING',
    execution.updated_at, given.worker
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.name IS NOT NULL
"""
_REST = """
INSERT INTO ebbs_flow_transitions (
    flow_execution_id, flow_execution_step, from_status, to_status, at, worker, reason, task_index
)
{given}
SELECT
    given.execution_id, given.step + 1, 'RUNNING', given.status, execution.updated_at, given.worker, given.reason,
    given.task_index
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.status IS NOT NULL
"""

# All that a checkpoint writes, said once more as what the insertion of its row into a view does. So a batch is one
# statement, which is also its transaction: while SQLite works at it, other threads have the interpreter, and between
# two statements they would keep it. As temporary objects they are there for one connection, and leave no trace.
_VIEW = f"""
CREATE TEMP VIEW IF NOT EXISTS ebbs_checkpoints AS
SELECT {", ".join(f"NULL AS {field.name}" for field in CHECKPOINT_FIELDS)}
"""
_REFUSED = "ebbs: refused"
_HELD_BY_ROW = f"""
WHERE execution_id = NEW.execution_id AND status = 'RUNNING' AND epoch = NEW.epoch AND execution_step = NEW.step;
SELECT RAISE(ABORT, '{_REFUSED}') WHERE changes() = 0
"""
_END_BY_ROW = """
UPDATE ebbs_task_executions SET
    status = NEW.end_status,
    failure = NEW.failure,
    error_type = NEW.error_type,
    output = NEW.output,
    entries = NEW.entries,
    entry_types = NEW.entry_types,
    dropped = NEW.dropped,
    finished_at = (SELECT updated_at FROM ebbs_flow_executions WHERE execution_id = NEW.execution_id)
WHERE flow_execution_id = NEW.execution_id AND flow_execution_step = NEW.step AND status = 'RUNNING'
"""
_ADVANCE_BY_ROW = f"""
CREATE TEMP TRIGGER IF NOT EXISTS ebbs_advance INSTEAD OF INSERT ON ebbs_checkpoints WHEN NEW.name IS NOT NULL BEGIN
    UPDATE ebbs_flow_executions SET {_ADVANCED.replace("given.", "NEW.")} {_HELD_BY_ROW};
    {_END_BY_ROW};
    INSERT INTO ebbs_task_executions (
        flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
    )
    SELECT
        execution_id, NEW.step + 1, NEW.task_index, NEW.name, NEW.attempt, NEW.epoch, 'RUNNING', updated_at, NEW.worker
    FROM ebbs_flow_executions WHERE execution_id = NEW.execution_id;
END
"""
_LEAVE_BY_ROW = f"""
CREATE TEMP TRIGGER IF NOT EXISTS ebbs_leave INSTEAD OF INSERT ON ebbs_checkpoints WHEN NEW.name IS NULL BEGIN
    UPDATE ebbs_flow_executions SET {_LEFT.replace("given.", "NEW.")} {_HELD_BY_ROW};
    {_END_BY_ROW};
    INSERT INTO ebbs_flow_transitions (
        flow_execution_id, flow_execution_step, from_status, to_status, at, worker, reason, task_index
    )
    SELECT execution_id, NEW.step + 1, 'RUNNING', NEW.status, updated_at, NEW.worker, NEW.reason, NEW.task_index
    FROM ebbs_flow_executions WHERE execution_id = NEW.execution_id;
END
"""
_WRITE_ALL = """
{given}
INSERT INTO ebbs_checkpoints SELECT * FROM given
"""

# The first claim is from SCHEDULED, every later one from RESCHEDULED: there is no other way to RUNNING. A claim takes
# two step numbers: one for the transition, one for the attempt.
_CLAIM = """
INSERT INTO ebbs_flow_transitions (
    flow_execution_id, flow_execution_step, from_status, to_status, at, worker, task_index
)
{given}
SELECT
    execution.execution_id, execution.execution_step - 1,
    CASE WHEN execution.epoch = 1 THEN 'SCHEDULED' ELSE 'RESCHEDULED' END, 'RUNNING', execution.updated_at,
    execution.lease_owner, execution.current_task_index
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id
"""
_BEGIN_FIRST = """
INSERT INTO ebbs_task_executions (
    flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
)
{given}
SELECT
    execution.execution_id, execution.execution_step, execution.current_task_index, given.name, given.attempt,
    execution.epoch, 'RUNNING', execution.updated_at, execution.lease_owner
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.name IS NOT NULL
"""

# INSERT comes before WITH: by its first word sqlite3 tells whether to begin a transaction, which a caller's may need.
_ADD_SCHEDULED = f"""
INSERT INTO ebbs_flow_executions (
    template_name, status, execution_step, current_task_index, epoch, priority, queue, run_at, created_at, updated_at
)
WITH RECURSIVE numbers (number) AS (VALUES (1) UNION ALL SELECT number + 1 FROM numbers WHERE number < :count)
SELECT
    :template_name, 'SCHEDULED', 2, 0, 0, :priority, :queue,
    coalesce(:run_at, strftime('%Y-%m-%d %H:%M:%f', 'now', :delay_seconds || ' seconds') || '000'), {_NOW}, {_NOW}
FROM numbers
RETURNING execution_id
"""
_ADD_CONTEXTS = """
INSERT INTO ebbs_flow_transitions (
    flow_execution_id, flow_execution_step, from_status, to_status, at, task_index, entries, entry_types
)
{given}
SELECT given.execution_id, 1, NULL, 'CREATED', execution.created_at, 0, given.entries, given.entry_types
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id
UNION ALL
SELECT given.execution_id, 2, 'CREATED', 'SCHEDULED', execution.created_at, 0, NULL, NULL
FROM given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id
"""


class _Statement:
    """One statement, with as many rows of parameters as are given."""

    def __init__(self, template: str, fields: Sequence[Field]) -> None:
        self._template = template
        self._names = ", ".join(field.name for field in fields)
        self._row = f"({', '.join('?' * len(fields))})"
        self._texts: dict[int, str] = {}

    def run(self, connection: Connection, rows: Rows) -> Any:
        count = len(rows)
        text = self._texts.get(count)
        if text is None:
            given = f"WITH given ({self._names}) AS (VALUES {', '.join([self._row] * count)})"
            text = self._texts[count] = self._template.format(given=given)
        # Straight to the driver: nothing here differs between SQLite's drivers, and a step takes several of them.
        return connection.exec_driver_sql(text, rows.values)


class SQLiteBatches:
    """The statements."""

    def __init__(self) -> None:
        self._advance = _Statement(_ADVANCE, CHECKPOINT_FIELDS)
        self._leave = _Statement(_LEAVE, CHECKPOINT_FIELDS)
        self._end = _Statement(_END, CHECKPOINT_FIELDS)
        self._begin_next = _Statement(_BEGIN_NEXT, CHECKPOINT_FIELDS)
        self._rest = _Statement(_REST, CHECKPOINT_FIELDS)
        self._write_all = _Statement(_WRITE_ALL, CHECKPOINT_FIELDS)
        self._add_scheduled = text(_ADD_SCHEDULED.replace("%H:%M:%f", r"%H\:%M\:%f")).bindparams(
            bindparam("run_at", type_=UtcDateTime())
        )
        self._add_contexts = _Statement(_ADD_CONTEXTS, CONTEXT_FIELDS)
        self._claim = _Statement(_CLAIM, BEGIN_FIELDS)
        self._begin_first = _Statement(_BEGIN_FIRST, BEGIN_FIELDS)

    def prepare(self, rows: Rows) -> None:
        rows.values  # noqa: B018  # it is kept

    def write_checkpoints(self, connection: Connection, rows: Rows, *, wait: bool) -> list[Moved]:
        goes_on = any(row[NAME] is not None for row in rows.rows)
        rests = any(row[NAME] is None for row in rows.rows)
        if not (wait and rests) and _has_view(connection):
            try:
                self._write_all.run(connection, rows)
                return [Moved(row[0], None, None) for row in rows.rows]
            except IntegrityError as error:
                if _REFUSED not in str(error.orig):
                    raise
        begin_write(connection)
        moved = self._move(connection, self._advance, rows) if goes_on else []
        moved += self._move(connection, self._leave, rows) if rests else []
        if len(moved) < len(rows):
            ids = {each.execution_id for each in moved}
            rows = Rows([row for row in rows.rows if row[0] in ids])
            if not rows.rows:
                return []
        self._end.run(connection, rows)
        if goes_on:
            self._begin_next.run(connection, rows)
        if rests:
            self._rest.run(connection, rows)
        return moved

    def _move(self, connection: Connection, statement: _Statement, rows: Rows) -> list[Moved]:
        return [Moved(*row) for row in statement.run(connection, rows)]

    def add_scheduled(self, connection: Connection, count: int, new: Mapping[str, Any]) -> list[int]:
        return sorted(connection.scalars(self._add_scheduled, {**new, "count": count}))

    def add_contexts(self, connection: Connection, rows: Rows) -> None:
        self._add_contexts.run(connection, rows)

    def begin(self, connection: Connection, rows: Rows) -> None:
        self._claim.run(connection, rows)
        self._begin_first.run(connection, rows)


def _has_view(connection: Connection) -> bool:
    """Whether a batch can be written as rows of a view: it is made when a connection is used for that first."""
    if connection.info.get(_VIEW_KEY):
        return True
    if is_in_transaction(connection):
        return False  # whose rollback would take the view with it
    for statement in (_VIEW, _ADVANCE_BY_ROW, _LEAVE_BY_ROW):
        connection.exec_driver_sql(statement)
    connection.info[_VIEW_KEY] = not is_in_transaction(connection)
    return bool(connection.info[_VIEW_KEY])


def forget_view(connection: Connection) -> None:
    """Take the view away again: with it, SQLite refuses to rename tables while one of those it names is not there
    (https://sqlite.org/lang_altertable.html).
    """
    connection.exec_driver_sql("DROP VIEW IF EXISTS temp.ebbs_checkpoints")  # and its triggers
    connection.info.pop(_VIEW_KEY, None)


def begin_write(connection: Connection) -> None:
    """Take the write lock at once: a transaction that read first and writes later could be refused without waiting."""
    if not connection.in_transaction():
        connection.begin()
    # An engine of the host may begin transactions itself; then it is begun already, in the host's way.
    if not is_in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def is_in_transaction(connection: Connection) -> bool:
    """Whether SQLite itself has a transaction open, whatever SQLAlchemy thinks."""
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


_VIEW_KEY = "ebbs_checkpoints"
