"""Batches on PostgreSQL: one statement each, a chain of WITH clauses that begins with what is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from sqlalchemy import Connection, text

from ebbs_and_flows.persistence.rows import (
    BEGIN_FIELDS,
    CHECKPOINT_FIELDS,
    CONTEXT_FIELDS,
    NAME,
    Field,
    Moved,
    Row,
    Rows,
)

# All of it is one statement, so it is one transaction also where no other is open. Rows are locked before they are
# updated, because UPDATE cannot pass over those that somebody else has locked. A WITH clause sees the tables as they
# were before the statement: what one of them has to know of another it takes from its RETURNING.
_WRITE_CHECKPOINTS = """
WITH given AS MATERIALIZED (
    {given}
), held AS MATERIALIZED (
    SELECT given.*, clock_timestamp() AS now
    FROM given JOIN {executions} AS execution ON execution.execution_id = given.execution_id
    WHERE execution.status = 'RUNNING'
        AND execution.epoch = given.epoch
        AND execution.execution_step = given.step
    FOR NO KEY UPDATE OF execution {skip_locked}
), moved AS (
    UPDATE {executions} AS execution SET
        status = coalesce(held.status, 'RUNNING'),
        execution_step = execution.execution_step + 1,
        current_task_index = held.task_index,
        updated_at = greatest(held.now, execution.updated_at),
        lease_owner = CASE WHEN held.status IS NULL THEN execution.lease_owner END,
        lease_expires_at = CASE WHEN held.status IS NULL
            THEN held.now + make_interval(secs => held.lease_seconds) END,
        run_at = coalesce(held.now + make_interval(secs => held.wait_seconds), execution.run_at),
        finished_at = CASE WHEN held.status IN ('SUCCEEDED', 'FAILED', 'CANCELLED')
            THEN greatest(held.now, execution.updated_at) END
    FROM held
    WHERE execution.execution_id = held.execution_id
    RETURNING held.*, execution.updated_at, execution.run_at
), ended AS (
    UPDATE {attempts} AS attempt SET
        status = moved.end_status,
        failure = moved.failure,
        error_type = moved.error_type,
        output = moved.output,
        entries = CAST(moved.entries AS JSON),
        entry_types = CAST(moved.entry_types AS JSON),
        dropped = CAST(moved.dropped AS JSON),
        finished_at = moved.updated_at
    FROM moved
    WHERE attempt.flow_execution_id = moved.execution_id
        AND attempt.flow_execution_step = moved.step
        AND attempt.status = 'RUNNING'
), begun AS (
    INSERT INTO {attempts} (
        flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
    )
    SELECT execution_id, step + 1, task_index, name, attempt, epoch, 'RUNNING', updated_at, worker
    FROM moved WHERE name IS NOT NULL
), rested AS (
    INSERT INTO {transitions} (
        flow_execution_id, flow_execution_step, from_status, to_status, at, worker, reason, task_index
    )
    SELECT execution_id, step + 1, 'RUNNING', status, updated_at, worker, reason, task_index
    FROM moved WHERE status IS NOT NULL
)
SELECT
    execution_id,
    CASE WHEN status IS NOT NULL THEN updated_at END,
    CASE WHEN status IS NOT NULL THEN run_at END
FROM moved
"""

# The same for one execution that goes on, which is all that a lone flow sends. With a parameter for each value its plan
# is made once, and there is no JSON to read.
_ADVANCE_ONE = """
WITH held AS MATERIALIZED (
    SELECT execution_id, clock_timestamp() AS now
    FROM {executions} AS execution
    WHERE execution_id = %(execution_id)s AND status = 'RUNNING' AND epoch = %(epoch)s AND execution_step = %(step)s
    FOR NO KEY UPDATE {skip_locked}
), moved AS (
    UPDATE {executions} AS execution SET
        execution_step = execution_step + 1,
        current_task_index = %(task_index)s,
        updated_at = greatest(held.now, execution.updated_at),
        lease_expires_at = held.now + make_interval(secs => %(lease_seconds)s)
    FROM held
    WHERE execution.execution_id = held.execution_id
    RETURNING execution.execution_id, execution.updated_at
), ended AS (
    UPDATE {attempts} AS attempt SET
        status = %(end_status)s,
        failure = %(failure)s,
        error_type = %(error_type)s,
        output = %(output)s,
        entries = CAST(%(entries)s AS JSON),
        entry_types = CAST(%(entry_types)s AS JSON),
        dropped = CAST(%(dropped)s AS JSON),
        finished_at = moved.updated_at
    FROM moved
    WHERE attempt.flow_execution_id = %(execution_id)s
        AND attempt.flow_execution_step = %(step)s
        AND attempt.status = 'RUNNING'
), begun AS (
    INSERT INTO {attempts} (
        flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
    )
    SELECT
        execution_id, %(step)s + 1, %(task_index)s, %(name)s, %(attempt)s, %(epoch)s, 'RUNNING', updated_at, %(worker)s
    FROM moved
)
SELECT execution_id FROM moved
"""
_CHECKPOINT_NAMES = tuple(field.name for field in CHECKPOINT_FIELDS)

# The first claim is from SCHEDULED, every later one from RESCHEDULED: there is no other way to RUNNING. A claim takes
# two step numbers: one for the transition, one for the attempt.
_BEGIN = """
WITH given AS MATERIALIZED (
    {given}
), claimed AS (
    INSERT INTO {transitions} (
        flow_execution_id, flow_execution_step, from_status, to_status, at, worker, task_index
    )
    SELECT
        execution.execution_id, execution.execution_step - 1,
        CASE WHEN execution.epoch = 1 THEN 'SCHEDULED' ELSE 'RESCHEDULED' END, 'RUNNING',
        execution.updated_at, execution.lease_owner, execution.current_task_index
    FROM given JOIN {executions} AS execution ON execution.execution_id = given.execution_id
)
INSERT INTO {attempts} (
    flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
)
SELECT
    execution.execution_id, execution.execution_step, execution.current_task_index, given.name, given.attempt,
    execution.epoch, 'RUNNING', execution.updated_at, execution.lease_owner
FROM given JOIN {executions} AS execution ON execution.execution_id = given.execution_id
WHERE given.name IS NOT NULL
"""

_ADD_SCHEDULED = """
INSERT INTO {executions} (
    template_name, status, execution_step, current_task_index, epoch, priority, queue, run_at, created_at, updated_at
)
SELECT
    :template_name, 'SCHEDULED', 2, 0, 0, :priority, :queue,
    coalesce(CAST(:run_at AS TIMESTAMP WITH TIME ZONE), clock.now + make_interval(secs => :delay_seconds)),
    clock.now, clock.now
FROM (SELECT clock_timestamp() AS now) AS clock CROSS JOIN generate_series(1, :count)
RETURNING execution_id
"""
_ADD_CONTEXTS = """
WITH given AS MATERIALIZED (
    {given}
)
INSERT INTO {transitions} (
    flow_execution_id, flow_execution_step, from_status, to_status, at, task_index, entries, entry_types
)
SELECT
    given.execution_id, 1, NULL, 'CREATED', execution.created_at, 0,
    CAST(given.entries AS JSON), CAST(given.entry_types AS JSON)
FROM given JOIN {executions} AS execution ON execution.execution_id = given.execution_id
UNION ALL
SELECT given.execution_id, 2, 'CREATED', 'SCHEDULED', execution.created_at, 0, NULL, NULL
FROM given JOIN {executions} AS execution ON execution.execution_id = given.execution_id
"""


class _Statement:
    """One statement over rows that are given as JSON. A batch of one says so, because it is planned in another way."""

    def __init__(
        self,
        template: str,
        fields: Sequence[Field],
        parts: Mapping[str, str],
        encode: Callable[[Row], str] | None = None,
    ) -> None:
        columns = ", ".join(f"{field.name} {field.type_name}" for field in fields)
        given = f"SELECT * FROM json_to_recordset(CAST(:given AS JSON)) AS given({columns})"
        self._many = text(template.format(given=given, **parts))
        self._one = text(template.format(given=f"{given} LIMIT 1", **parts))
        # As psycopg takes it: then a statement that was built once need not pass through SQLAlchemy's compiler.
        self._encode = encode or partial(_to_object, _keys(fields))
        self._many_pyformat = self._many.text.replace(":given", "%(given)s")
        self._one_pyformat = self._one.text.replace(":given", "%(given)s")

    def prepare(self, rows: Rows) -> str:
        """A JSON array of objects, kept with the rows."""
        if rows.text is None:
            rows.text = f"[{','.join([self._encode(row) for row in rows.rows])}]"
        return rows.text

    def run(self, connection: Connection, rows: Rows) -> Any:
        is_one, given = len(rows) == 1, {"given": self.prepare(rows)}
        if connection.dialect.paramstyle == "pyformat":
            return connection.exec_driver_sql(self._one_pyformat if is_one else self._many_pyformat, given)
        return connection.execute(self._one if is_one else self._many, given)


def _to_object(keys: Sequence[str], row: Row) -> str:
    """A JSON object of all that is not NULL: what is missing is NULL to the database."""
    given = zip(keys, row, strict=True)
    return f"{{{','.join([key + _to_json(value) for key, value in given if value is not None])}}}"


def _to_json(value: str | float) -> str:
    return quote(value) if isinstance(value, str) else repr(value)


def _keys(fields: Sequence[Field]) -> tuple[str, ...]:
    return tuple(f"{quote(field.name)}:" for field in fields)


def _checkpoint_to_object(row: Row, keys: Sequence[str] = _keys(CHECKPOINT_FIELDS)) -> str:
    """The same for a checkpoint. What nearly all are is written out, because that is by far the fastest: a task has
    succeeded and changed something, and another one follows.
    """
    (
        execution_id,
        epoch,
        step,
        status,
        _,
        _,
        output,
        entries,
        types,
        dropped,
        index,
        name,
        attempt,
        *_,
        lease,
        worker,
    ) = row
    if output is not None or entries is None or dropped is not None or name is None:
        return _to_object(keys, row)
    return (
        f'{{"execution_id":{execution_id},"epoch":{epoch},"step":{step},"end_status":"{status}",'
        f'"entries":{quote(entries)},"entry_types":{quote(types)},"task_index":{index},"name":{quote(name)},'
        f'"attempt":{attempt},"lease_seconds":{lease},"worker":{quote(worker)}}}'
    )


class PostgreSQLBatches:
    """The statements for one schema."""

    def __init__(self, schema: str | None) -> None:
        prefix = f'"{schema}".' if schema else ""
        names = {
            "executions": f"{prefix}ebbs_flow_executions",
            "attempts": f"{prefix}ebbs_task_executions",
            "transitions": f"{prefix}ebbs_flow_transitions",
        }
        self._write = {
            wait: _Statement(
                _WRITE_CHECKPOINTS,
                CHECKPOINT_FIELDS,
                {**names, "skip_locked": "" if wait else "SKIP LOCKED"},
                _checkpoint_to_object,
            )
            for wait in (True, False)
        }
        self._advance_one = {
            wait: _ADVANCE_ONE.format(**names, skip_locked="" if wait else "SKIP LOCKED") for wait in (True, False)
        }
        self._add_scheduled = text(_ADD_SCHEDULED.format(**names))
        self._add_contexts = _Statement(_ADD_CONTEXTS, CONTEXT_FIELDS, names)
        self._begin = _Statement(_BEGIN, BEGIN_FIELDS, names)

    def prepare(self, rows: Rows) -> None:
        if not self._is_one_that_goes_on(rows):
            self._write[False].prepare(rows)

    def _is_one_that_goes_on(self, rows: Rows) -> bool:
        return len(rows) == 1 and rows.rows[0][NAME] is not None

    def write_checkpoints(self, connection: Connection, rows: Rows, *, wait: bool) -> list[Moved]:
        if self._is_one_that_goes_on(rows) and connection.dialect.paramstyle == "pyformat":
            values = dict(zip(_CHECKPOINT_NAMES, rows.rows[0], strict=True))
            found = connection.exec_driver_sql(self._advance_one[wait], values)
            return [Moved(execution_id, None, None) for (execution_id,) in found]
        return [Moved._make(row) for row in self._write[wait].run(connection, rows)]

    def add_scheduled(self, connection: Connection, count: int, new: Mapping[str, Any]) -> list[int]:
        return sorted(connection.scalars(self._add_scheduled, {**new, "count": count}))

    def add_contexts(self, connection: Connection, rows: Rows) -> None:
        self._add_contexts.run(connection, rows)

    def begin(self, connection: Connection, rows: Rows) -> None:
        self._begin.run(connection, rows)
