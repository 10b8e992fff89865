"""Batches on SQLite: a few statements each, under the write lock of their transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Connection

from ebbs_and_flows.persistence.rows import BEGIN_FIELDS, CHECKPOINT_FIELDS, Field, Moved, Rows

_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"

# The fence, and with it the times that the statements after it take from the row.
_MOVE = f"""
UPDATE ebbs_flow_executions SET
    status = coalesce(given.status, 'RUNNING'),
    execution_step = execution_step + 1,
    current_task_index = given.task_index,
    updated_at = max({_NOW}, updated_at),
    lease_owner = CASE WHEN given.status IS NULL THEN lease_owner END,
    lease_expires_at = CASE WHEN given.status IS NULL
        THEN strftime('%Y-%m-%d %H:%M:%f', 'now', given.lease_seconds || ' seconds') || '000' END,
    run_at = CASE WHEN given.wait_seconds IS NULL THEN run_at
        ELSE strftime('%Y-%m-%d %H:%M:%f', 'now', given.wait_seconds || ' seconds') || '000' END,
    finished_at = CASE WHEN given.status IN ('SUCCEEDED', 'FAILED', 'CANCELLED') THEN max({_NOW}, updated_at) END
FROM ({{given}}) AS given
WHERE ebbs_flow_executions.execution_id = given.execution_id
    AND ebbs_flow_executions.status = 'RUNNING'
    AND ebbs_flow_executions.epoch = given.epoch
    AND ebbs_flow_executions.execution_step = given.step
RETURNING execution_id, updated_at, run_at
"""
_END = """
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
FROM ({given}) AS given
WHERE flow_execution_id = given.execution_id AND flow_execution_step = given.step
    AND ebbs_task_executions.status = 'RUNNING'
"""
_BEGIN_NEXT = """
INSERT INTO ebbs_task_executions (
    flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
)
SELECT
    given.execution_id, given.step + 1, given.task_index, given.name, given.attempt, given.epoch, 'RUNNING',
    execution.updated_at, given.worker
FROM ({given}) AS given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.name IS NOT NULL
"""
_REST = """
INSERT INTO ebbs_flow_transitions (
    flow_execution_id, flow_execution_step, from_status, to_status, at, worker, reason, task_index
)
SELECT
    given.execution_id, given.step + 1, 'RUNNING', given.status, execution.updated_at, given.worker, given.reason,
    given.task_index
FROM ({given}) AS given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.status IS NOT NULL
"""

# The first claim is from SCHEDULED, every later one from RESCHEDULED: there is no other way to RUNNING. A claim takes
# two step numbers: one for the transition, one for the attempt.
_CLAIM = """
INSERT INTO ebbs_flow_transitions (
    flow_execution_id, flow_execution_step, from_status, to_status, at, worker, task_index
)
SELECT
    execution.execution_id, execution.execution_step - 1,
    CASE WHEN execution.epoch = 1 THEN 'SCHEDULED' ELSE 'RESCHEDULED' END, 'RUNNING', execution.updated_at,
    execution.lease_owner, execution.current_task_index
FROM ({given}) AS given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id
"""
_BEGIN_FIRST = """
INSERT INTO ebbs_task_executions (
    flow_execution_id, flow_execution_step, task_index, name, attempt, epoch, status, started_at, worker
)
SELECT
    execution.execution_id, execution.execution_step, execution.current_task_index, given.name, given.attempt,
    execution.epoch, 'RUNNING', execution.updated_at, execution.lease_owner
FROM ({given}) AS given CROSS JOIN ebbs_flow_executions AS execution
WHERE execution.execution_id = given.execution_id AND given.name IS NOT NULL
"""


class _Statement:
    """One statement, with as many rows of parameters as are given."""

    def __init__(self, template: str, fields: Sequence[Field]) -> None:
        self._text = template.format(given="SELECT * FROM given")
        self._names = ", ".join(field.name for field in fields)
        self._row = f"({', '.join('?' * len(fields))})"
        self._texts: dict[int, str] = {}

    def run(self, connection: Connection, rows: Rows) -> Any:
        count = len(rows)
        text = self._texts.get(count)
        if text is None:
            given = ", ".join([self._row] * count)
            text = self._texts[count] = f"WITH given ({self._names}) AS (VALUES {given}) {self._text}"
        # Straight to the driver: nothing here differs between SQLite's drivers, and a step takes several of them.
        return connection.exec_driver_sql(text, rows.values)


class SQLiteBatches:
    """The statements."""

    def __init__(self) -> None:
        self._move = _Statement(_MOVE, CHECKPOINT_FIELDS)
        self._end = _Statement(_END, CHECKPOINT_FIELDS)
        self._begin_next = _Statement(_BEGIN_NEXT, CHECKPOINT_FIELDS)
        self._rest = _Statement(_REST, CHECKPOINT_FIELDS)
        self._claim = _Statement(_CLAIM, BEGIN_FIELDS)
        self._begin_first = _Statement(_BEGIN_FIRST, BEGIN_FIELDS)

    def prepare(self, rows: Rows) -> None:
        rows.values  # noqa: B018  # it is kept

    def write_checkpoints(self, connection: Connection, rows: Rows, *, wait: bool) -> list[Moved]:
        moved = [
            Moved(execution_id, _time(updated_at), _time(run_at))
            for execution_id, updated_at, run_at in self._move.run(connection, rows)
        ]
        if len(moved) < len(rows):
            ids = {each.execution_id for each in moved}
            rows = Rows([row for row in rows.rows if row["execution_id"] in ids])
            if not rows.rows:
                return []
        self._end.run(connection, rows)
        if any(row["name"] is not None for row in rows.rows):
            self._begin_next.run(connection, rows)
        if any(row["status"] is not None for row in rows.rows):
            self._rest.run(connection, rows)
        return moved

    def begin(self, connection: Connection, rows: Rows) -> None:
        self._claim.run(connection, rows)
        self._begin_first.run(connection, rows)


def _time(stored: str) -> datetime:
    return datetime.fromisoformat(stored).replace(tzinfo=timezone.utc)
