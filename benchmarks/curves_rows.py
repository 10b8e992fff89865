"""Tables of any size for `curves.py`: the rows that the library writes, a million of them in seconds."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

EARLIER = "earlier"
"""The template of executions that have finished."""

FINISHED_TASKS = 3
"""Of an execution that has finished, each with one attempt."""

BATCH = 250_000
"""Executions that are inserted in one transaction."""


class Rows:
    """Inserts executions with all that belongs to them, by plain SQL.

    Args:
        engine: of a database with the library's schema.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_sqlite = engine.dialect.name == "sqlite"

    def add_waiting(
        self,
        count: int,
        template: str,
        *,
        queue: str = "default",
        priority: int = 0,
        due_in_seconds: float = -3600.0,
    ) -> int:
        """Insert executions that are SCHEDULED, each due a millisecond after the one before; the id before theirs."""
        for _, size in _batches(count):
            with self._engine.begin() as connection:
                before = self._begin(connection)
                self._add_executions(
                    connection,
                    size,
                    "template_name, status, execution_step, current_task_index, priority, queue",
                    f"'{template}', 'SCHEDULED', 2, 0, {priority}, '{queue}'",
                    due_in_seconds,
                )
                self._add_transition(connection, before, 1, "NULL, 'CREATED'", "created_at", 0, context='{"n":1}')
                self._add_transition(connection, before, 2, "'CREATED', 'SCHEDULED'", "created_at", 0)
        with self._engine.connect() as connection:
            return _last_id(connection) - count

    def add_finished(self, count: int) -> None:
        """Insert executions that have SUCCEEDED an hour ago, of three tasks with an attempt each."""
        for _, size in _batches(count):
            with self._engine.begin() as connection:
                before = self._begin(connection)
                self._add_executions(
                    connection,
                    size,
                    "template_name, status, execution_step, current_task_index, priority, queue",
                    f"'{EARLIER}', 'SUCCEEDED', {4 + FINISHED_TASKS}, {FINISHED_TASKS}, 0, 'default'",
                    -7200.0,
                    is_finished=True,
                )
                self._add_transition(connection, before, 1, "NULL, 'CREATED'", "created_at", 0, context='{"n":1}')
                self._add_transition(connection, before, 2, "'CREATED', 'SCHEDULED'", "created_at", 0)
                self._add_transition(connection, before, 3, "'SCHEDULED', 'RUNNING'", "started_at", 0, "'earlier:1'")
                for index in range(FINISHED_TASKS):
                    self._add_attempt(connection, before, index)
                last = 4 + FINISHED_TASKS
                ends = "'RUNNING', 'SUCCEEDED'"
                self._add_transition(connection, before, last, ends, "finished_at", FINISHED_TASKS, "'earlier:1'")

    def settle(self) -> None:
        """Bring the tables into the state that they have after some time: counted, vacuumed, and written out."""
        if self._is_sqlite:
            with self._engine.connect() as connection:
                connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            return
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in ("ebbs_flow_executions", "ebbs_task_executions", "ebbs_flow_transitions"):
                connection.execute(text(f"VACUUM (ANALYZE) {table}"))
            with suppress(DBAPIError):  # a checkpoint is a superuser's to ask for
                connection.execute(text("CHECKPOINT"))

    def tasks_per_second(self, before: int) -> float:
        """At what rate all executions after this id were run, by the database's clock.

        Raises:
            RuntimeError: one of them has not succeeded.
        """
        of_these = f"FROM ebbs_flow_executions WHERE execution_id > {before}"
        with self._engine.connect() as connection:
            count, succeeded, tasks, first, last = connection.execute(
                text(
                    "SELECT count(*), sum(CASE status WHEN 'SUCCEEDED' THEN 1 ELSE 0 END), sum(current_task_index), "
                    f"min(started_at), max(finished_at) {of_these}"
                )
            ).one()
        if not count or count != succeeded:
            raise RuntimeError(f"{succeeded} of {count} executions have succeeded")
        return float(tasks / (_as_time(last) - _as_time(first)).total_seconds())

    def latencies(self, before: int) -> list[float]:
        """From the creation of each execution after this id to the start of its first attempt, in milliseconds."""
        with self._engine.connect() as connection:
            pairs = connection.execute(
                text(
                    "SELECT e.created_at, min(t.started_at) FROM ebbs_flow_executions e "
                    "JOIN ebbs_task_executions t ON t.flow_execution_id = e.execution_id "
                    f"WHERE e.execution_id > {before} GROUP BY e.execution_id"
                )
            ).all()
        return sorted((_as_time(started) - _as_time(created)).total_seconds() * 1000 for created, started in pairs)

    def has_unfinished(self) -> bool:
        """Whether any execution waits or runs. In this order: what ceases to wait in between is found running."""
        with self._engine.connect() as connection:
            return any(
                connection.scalar(text(f"SELECT 1 FROM ebbs_flow_executions WHERE {condition} LIMIT 1"))
                for condition in ("status IN ('SCHEDULED', 'RESCHEDULED')", "status = 'RUNNING'")
            )

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, connection: Connection) -> int:
        """Spare PostgreSQL the check of each foreign key where the role may do so; the last id that there is."""
        if not self._is_sqlite:
            with suppress(DBAPIError), connection.begin_nested():
                connection.execute(text("SET LOCAL session_replication_role = replica"))
        return _last_id(connection)

    def _add_executions(
        self,
        connection: Connection,
        count: int,
        columns: str,
        values: str,
        first_due_in_seconds: float,
        *,
        is_finished: bool = False,
    ) -> None:
        at = self._now(f"{first_due_in_seconds} + i * 0.001")
        created = at if first_due_in_seconds <= 0 else self._now("0")
        ran = (self._now(f"{first_due_in_seconds + 1} + i * 0.001"),) * 2 if is_finished else ("NULL", "NULL")
        epoch = 1 if is_finished else 0
        connection.exec_driver_sql(
            f"INSERT INTO ebbs_flow_executions "
            f"({columns}, epoch, run_at, created_at, updated_at, started_at, finished_at) "
            f"WITH RECURSIVE series(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM series WHERE i < {count}) "
            f"SELECT {values}, {epoch}, {at}, {created}, {created}, {', '.join(ran)} FROM series"
        )

    def _add_transition(
        self,
        connection: Connection,
        before: int,
        step: int,
        statuses: str,
        at: str,
        task_index: int,
        worker: str = "NULL",
        *,
        context: str | None = None,
    ) -> None:
        entries = f"'{context}', '{{\"n\":\"int\"}}'" if context else "NULL, NULL"
        connection.exec_driver_sql(
            "INSERT INTO ebbs_flow_transitions (flow_execution_id, flow_execution_step, from_status, to_status, at, "
            "task_index, worker, entries, entry_types) "
            f"SELECT execution_id, {step}, {statuses}, {at}, {task_index}, {worker}, {entries} "
            f"FROM ebbs_flow_executions WHERE execution_id > {before}"
        )

    def _add_attempt(self, connection: Connection, before: int, index: int) -> None:
        connection.exec_driver_sql(
            "INSERT INTO ebbs_task_executions (flow_execution_id, flow_execution_step, task_index, name, attempt, "
            "epoch, status, entries, entry_types, started_at, finished_at, worker) "
            f"SELECT execution_id, {4 + index}, {index}, 'task-{index}', 1, 1, 'SUCCEEDED', "
            f"'{{\"added-{index}\":{index}}}', '{{\"added-{index}\":\"int\"}}', started_at, finished_at, 'earlier:1' "
            f"FROM ebbs_flow_executions WHERE execution_id > {before}"
        )

    def _now(self, seconds: str) -> str:
        """The SQL of the database's now and so many seconds, as the library stores it."""
        if self._is_sqlite:
            return f"strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds') || '000'"
        return f"now() + ({seconds}) * interval '1 second'"


def _batches(count: int) -> list[tuple[int, int]]:
    return [(first, min(BATCH, count - first)) for first in range(0, count, BATCH)]


def _last_id(connection: Connection) -> int:
    return int(connection.scalar(text("SELECT max(execution_id) FROM ebbs_flow_executions")) or 0)


def _as_time(value: datetime | str) -> datetime:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
