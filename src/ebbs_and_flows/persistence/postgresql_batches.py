"""Batches on PostgreSQL: one statement each, a chain of WITH clauses that begins with what is given."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, TextClause, text

from ebbs_and_flows.persistence.rows import BEGIN_FIELDS, CHECKPOINT_FIELDS, Field, Moved, Row, Rows

# All of it is one statement, so it is one transaction also where no other is open. Rows are locked before they are
# updated, because UPDATE cannot pass over those that somebody else has locked. A WITH clause sees the tables as they
# were before the statement: what one of them has to know of another it takes from its RETURNING.
_WRITE_CHECKPOINTS = """
WITH given AS MATERIALIZED (
    {given}
), held AS MATERIALIZED (
    SELECT given.*
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
        updated_at = greatest(clock_timestamp(), execution.updated_at),
        lease_owner = CASE WHEN held.status IS NULL THEN execution.lease_owner END,
        lease_expires_at = CASE WHEN held.status IS NULL
            THEN clock_timestamp() + make_interval(secs => held.lease_seconds) END,
        run_at = coalesce(clock_timestamp() + make_interval(secs => held.wait_seconds), execution.run_at),
        finished_at = CASE WHEN held.status IN ('SUCCEEDED', 'FAILED', 'CANCELLED')
            THEN greatest(clock_timestamp(), execution.updated_at) END
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
SELECT {answer} FROM moved
"""

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


class PostgreSQLBatches:
    """The statements for one schema."""

    def __init__(self, schema: str | None) -> None:
        names = _table_names(schema)
        one, many = _one(CHECKPOINT_FIELDS), _many(CHECKPOINT_FIELDS)
        answer = "execution_id, updated_at, run_at"
        write = _WRITE_CHECKPOINTS
        self._write_one = {
            wait: text(write.format(given=one, answer=answer, skip_locked=_skip(wait), **names))
            for wait in (True, False)
        }
        self._write_many = {
            wait: text(write.format(given=many, answer="execution_id", skip_locked=_skip(wait), **names))
            for wait in (True, False)
        }
        self._begin_one = text(_BEGIN.format(given=_one(BEGIN_FIELDS), **names))
        self._begin_many = text(_BEGIN.format(given=_many(BEGIN_FIELDS), **names))

    def prepare(self, rows: Rows) -> None:
        _parameters(rows)

    def write_checkpoints(self, connection: Connection, rows: Rows, *, wait: bool) -> list[Moved]:
        statement = (self._write_one if len(rows) == 1 else self._write_many)[wait]
        return [Moved(*row) for row in connection.execute(statement, _parameters(rows))]

    def begin(self, connection: Connection, rows: Rows) -> None:
        statement: TextClause = self._begin_one if len(rows) == 1 else self._begin_many
        connection.execute(statement, _parameters(rows))


def _table_names(schema: str | None) -> dict[str, str]:
    prefix = f'"{schema}".' if schema else ""
    return {
        "executions": f"{prefix}ebbs_flow_executions",
        "attempts": f"{prefix}ebbs_task_executions",
        "transitions": f"{prefix}ebbs_flow_transitions",
    }


def _parameters(rows: Rows) -> Row:
    return rows.rows[0] if len(rows) == 1 else {"given": rows.text}


def _one(fields: Sequence[Field]) -> str:
    columns = ", ".join(f"CAST(:{field.name} AS {field.type_name}) AS {field.name}" for field in fields)
    return f"SELECT {columns}"


def _many(fields: Sequence[Field]) -> str:
    columns = ", ".join(f"{field.name} {field.type_name}" for field in fields)
    return f"SELECT * FROM json_to_recordset(CAST(:given AS JSON)) AS given({columns})"


def _skip(wait: bool) -> str:
    return "" if wait else "SKIP LOCKED"
