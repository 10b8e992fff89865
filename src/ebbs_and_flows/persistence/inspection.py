"""Inspection: what a diagnosis asks the database, in statements that write nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Select, false, func, literal_column, select, text, update
from sqlalchemy.sql import ColumnElement

from ebbs_and_flows.executions import FlowStatus
from ebbs_and_flows.persistence.expressions import database_now, seconds_from_now, statement_now
from ebbs_and_flows.persistence.tables import Tables


@dataclass(frozen=True)
class Left:
    """Executions of one template and queue that nobody has taken care of."""

    template_name: str
    queue: str
    number: int
    seconds: float
    """For how long the oldest of them, by the database's clock."""


@dataclass(frozen=True)
class OpenTransaction:
    """A transaction of somebody's that has been open for long."""

    pid: int
    user: str | None
    application: str | None
    seconds: float


class Inspection:
    """Questions about one database, asked on one connection.

    The second half of them is PostgreSQL's or SQLite's alone: ask those of `dialect` only.
    """

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._connection = connection
        self._tables = tables
        self._executions = tables.executions

    # --- executions ---------------------------------------------------------------------------------------------------

    def expired(self) -> list[Left]:
        """RUNNING executions whose lease has expired, the oldest first."""
        columns = self._executions.c
        since = func.min(columns.lease_expires_at)
        return self._left(
            select(columns.template_name, columns.queue, func.count(), since).where(
                _status_is(self._executions.c.status, FlowStatus.RUNNING), columns.lease_expires_at < statement_now()
            ),
            since,
        )

    def due(self) -> list[Left]:
        """Executions that are due and that no worker has taken, the oldest first."""
        columns = self._executions.c
        since = func.min(columns.run_at)
        return self._left(
            select(columns.template_name, columns.queue, func.count(), since).where(
                _status_is(columns.status, FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED),
                columns.run_at <= statement_now(),
            ),
            since,
        )

    def queues_at_work(self) -> set[str]:
        """The queues of which a worker holds an execution now."""
        columns = self._executions.c
        held = select(columns.queue).where(
            _status_is(columns.status, FlowStatus.RUNNING), columns.lease_expires_at >= statement_now()
        )
        return set(self._connection.scalars(held.distinct()))

    def failed(self, seconds: float) -> dict[str, int]:
        """By template, how many executions have come to rest as FAILED within the last so many seconds; most first."""
        columns = self._executions.c
        number = func.count()
        failed = (
            select(columns.template_name, number)
            .where(_status_is(columns.status, FlowStatus.FAILED), columns.finished_at >= seconds_from_now(-seconds))
            .group_by(columns.template_name)
            .order_by(number.desc(), columns.template_name)
        )
        return {name: found for name, found in self._connection.execute(failed)}  # noqa: C416  # dict() would be of Row

    def retries(self) -> tuple[int, float | None]:
        """How many RESCHEDULED executions wait for their time, and in how many seconds the first of them is due."""
        columns = self._executions.c
        waiting = select(func.count(), func.min(columns.run_at), statement_now()).where(
            _status_is(columns.status, FlowStatus.RESCHEDULED), columns.run_at > statement_now()
        )
        number, first, now = self._connection.execute(waiting).one()
        return number, None if first is None else (first - now).total_seconds()

    def _left(self, grouped: Select[Any], since: Any) -> list[Left]:
        columns = self._executions.c
        rows = self._connection.execute(
            grouped.add_columns(statement_now()).group_by(columns.template_name, columns.queue).order_by(since)
        )
        return [
            Left(template_name, queue, number, (now - oldest).total_seconds())
            for template_name, queue, number, oldest, now in rows
        ]

    # --- the database -------------------------------------------------------------------------------------------------

    @property
    def dialect(self) -> str:
        """`"postgresql"` or `"sqlite"`."""
        return self._connection.dialect.name

    def now(self) -> datetime:
        """The database's clock."""
        return self._connection.execute(select(database_now())).scalar_one()

    # --- PostgreSQL ---------------------------------------------------------------------------------------------------

    def sees_all_sessions(self) -> bool:
        """Whether this role is shown what the sessions of other roles are doing."""
        return bool(self._connection.scalar(text("SELECT pg_has_role('pg_read_all_stats', 'USAGE')")))

    def server_connections(self) -> tuple[int, int]:
        """How many connections the server has now, and how many it takes from roles without privileges."""
        used, most = self._connection.execute(_SERVER_CONNECTIONS).one()
        return used, most

    def idle_in_transaction(self, seconds: float) -> list[OpenTransaction]:
        """Sessions that have done nothing for so long within a transaction that holds locks on our tables; the
        oldest first.
        """
        names = self._connection.dialect.identifier_preparer
        tables = [names.format_table(table) for table in self._tables.metadata.sorted_tables]
        return self._transactions(_IDLE_IN_TRANSACTION, tables=tables, seconds=seconds)

    def long_transactions(self, seconds: float) -> list[OpenTransaction]:
        """Transactions of this database that have been open for so long; the oldest first."""
        return self._transactions(_LONG_TRANSACTIONS, seconds=seconds)

    def _transactions(self, statement: Any, **parameters: Any) -> list[OpenTransaction]:
        rows: Sequence[Any] = self._connection.execute(statement, parameters).all()
        return [OpenTransaction(row.pid, row.usename, row.application_name, float(row.seconds)) for row in rows]

    # --- SQLite -------------------------------------------------------------------------------------------------------

    def pragma(self, name: str) -> Any:
        """The value of one of SQLite's settings."""
        return self._connection.exec_driver_sql(f"PRAGMA {name}").scalar()

    def file(self) -> str:
        """The database's file; empty for one in memory."""
        rows = self._connection.exec_driver_sql("PRAGMA database_list").all()
        return next((row[2] or "" for row in rows if row[1] == "main"), "")

    def damage(self, limit: int = 3) -> list[str]:
        """What SQLite's own quick check finds wrong with the file; nothing as a rule. Reads all of it."""
        rows = self._connection.exec_driver_sql(f"PRAGMA quick_check({limit})").all()
        return [row[0] for row in rows if row[0] != "ok"]

    def take_write_lock(self) -> None:
        """Begin to write, and leave it at that: raises what a writer would meet."""
        self._connection.exec_driver_sql("BEGIN IMMEDIATE")
        # On a database that is read-only this has begun to read: it takes a statement that writes, here no row.
        self._connection.execute(update(self._executions).values(priority=0).where(false()))
        self._connection.rollback()


def _status_is(column: Any, *statuses: FlowStatus) -> Any:
    """The condition as the partial indexes have it: with literals, which a parameter cannot be matched with."""
    literals: list[ColumnElement[str]] = [literal_column(f"'{status.value}'") for status in statuses]
    return column == literals[0] if len(literals) == 1 else column.in_(literals)


_SERVER_CONNECTIONS = text(
    """
    SELECT count(*) FILTER (WHERE backend_type = 'client backend'),
           CAST(current_setting('max_connections') AS INTEGER)
           - CAST(current_setting('superuser_reserved_connections') AS INTEGER)
           - CAST(coalesce(current_setting('reserved_connections', true), '0') AS INTEGER)
      FROM pg_stat_activity
    """
)

_IDLE_IN_TRANSACTION = text(
    """
    SELECT pid, usename, application_name, extract(epoch FROM clock_timestamp() - state_change) AS seconds
      FROM pg_stat_activity
     WHERE datname = current_database()
       AND state LIKE 'idle in transaction%'
       AND state_change < clock_timestamp() - make_interval(secs => :seconds)
       AND pid IN (SELECT pid FROM pg_locks
                    WHERE locktype = 'relation'
                      AND relation IN (SELECT CAST(to_regclass(name) AS OID)
                                         FROM unnest(CAST(:tables AS TEXT[])) AS name)
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))
     ORDER BY state_change
    """
)

_LONG_TRANSACTIONS = text(
    """
    SELECT pid, usename, application_name, extract(epoch FROM clock_timestamp() - xact_start) AS seconds
      FROM pg_stat_activity
     WHERE datname = current_database()
       AND backend_type = 'client backend'
       AND pid <> pg_backend_pid()
       AND xact_start < clock_timestamp() - make_interval(secs => :seconds)
     ORDER BY xact_start
    """
)
