"""What differs on PostgreSQL: row locks that let others pass, its clock, its engine."""

from __future__ import annotations

import hashlib
import math
import time
from functools import partial
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Dialect,
    Engine,
    Select,
    Table,
    TextClause,
    Update,
    create_engine,
    event,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import ConnectionPoolEntry

from ebbs_and_flows.errors import DatabaseUrlError
from ebbs_and_flows.persistence.expressions import database_now, latest, seconds_from_now, statement_now
from ebbs_and_flows.persistence.isolation import isolated
from ebbs_and_flows.persistence.postgresql_batches import PostgreSQLBatches


class PostgreSQL:
    """The PostgreSQL side of what the repositories need."""

    name = "postgresql"

    def isolate(self, engine: Engine) -> Engine:
        """The same engine and pool with READ COMMITTED for this library's own transactions.

        The claim and the fence are reasoned for it; a host's engine may stand at AUTOCOMMIT or SERIALIZABLE.
        """
        return isolated(engine, "READ COMMITTED")

    def without_transactions(self, engine: Engine) -> Engine:
        return isolated(engine, "AUTOCOMMIT")

    def plan_anew(self, connection: Connection) -> None:
        connection.execute(_DISCARD_PLANS)

    def select_ids(self) -> TextClause:
        return text("SELECT CAST(id AS BIGINT) FROM json_array_elements_text(CAST(:the_ids AS JSON)) AS given(id)")

    def batches(self, schema: str | None) -> PostgreSQLBatches:
        return PostgreSQLBatches(schema)

    def begin_write(self, connection: Connection) -> None:
        if not connection.in_transaction():
            connection.begin()

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def claim(self, table: Table, due: Select[Any]) -> Update:
        """An UPDATE of the rows that `due` selects, locked one by one past those that another worker is claiming.

        MATERIALIZED, because a planner that inlines the subquery may run it again and lock more rows than its LIMIT.
        """
        chosen = due.with_for_update(skip_locked=True, key_share=True).cte("due").prefix_with("MATERIALIZED")
        return update(table).where(table.c.execution_id == chosen.c.execution_id)

    def lock_free(self, rows: Select[Any]) -> Select[Any]:
        return rows.with_for_update(skip_locked=True, key_share=True)

    def try_lock(self, connection: Connection, name: str, table: Table) -> bool:
        # Advisory locks are numbers, shared with the host: 64 bits of a digest are unlikely to be one of its own. The
        # table's own number tells two installations apart, whether a schema is named or found by the search_path.
        number = int.from_bytes(hashlib.sha256(f"ebbs {name}".encode()).digest()[:8], "big", signed=True)
        table_name = connection.dialect.identifier_preparer.format_table(table)
        return bool(connection.scalar(_TRY_LOCK, {"number": number, "table_name": table_name}))

    def announce(self, connection: Connection, channel: str) -> None:
        connection.execute(NOTIFY, {"channel": channel})

    def lives_in_memory(self, engine: Engine) -> bool:
        return False

    def can_listen(self, engine: Engine) -> bool:
        return engine.dialect.driver == "psycopg"


UNTRIED_SECONDS = 1.0
"""For how long after its last use a connection is taken to be alive."""

_USED_AT = "ebbs_used_at"

_TRY_LOCK = text(
    "SELECT pg_try_advisory_xact_lock("
    "CAST(:number AS BIGINT) # CAST(CAST(CAST(:table_name AS REGCLASS) AS OID) AS BIGINT))"
)
_DISCARD_PLANS = text("DISCARD PLANS")
NOTIFY = text("SELECT pg_notify(CAST(:channel AS TEXT), '')")


def create_postgresql_engine(url: URL) -> Engine:
    """An engine with the psycopg driver and SQLAlchemy's default pool (5 connections and 10 more at need).

    A connection that was not used for some time is tried first: one that the server has dropped meanwhile is replaced,
    not an error.

    Raises:
        DatabaseUrlError: its driver is missing, or `prepare_threshold` in it is neither a number nor `none`.
    """
    url, options = _with_prepare_threshold(url)
    try:
        engine = create_engine(url, hide_parameters=True, connect_args=options)
    except ModuleNotFoundError as error:
        raise DatabaseUrlError(
            f"the PostgreSQL driver {error.name!r} is not installed: pip install 'ebbs-and-flows[postgres]'"
        ) from error
    event.listen(engine, "checkin", _note_use)
    event.listen(engine, "checkout", partial(_try_it, engine.dialect))
    return engine


def _with_prepare_threshold(url: URL) -> tuple[URL, dict[str, Any]]:
    """The URL, and what psycopg takes as a number or None only: after how many runs it prepares a statement.

    A pooler in transaction mode may need `?prepare_threshold=none`
    (https://www.psycopg.org/psycopg3/docs/advanced/prepare.html#using-prepared-statements-with-pgbouncer).
    """
    given = url.query.get("prepare_threshold")
    if given is None or url.get_driver_name() != "psycopg":
        return url, {}
    if not isinstance(given, str) or not (given.lower() == "none" or given.isdecimal()):
        raise DatabaseUrlError(f"prepare_threshold={given!r} in the URL cannot be used: expected none, or a number")
    threshold = None if given.lower() == "none" else int(given)
    return url.difference_update_query(["prepare_threshold"]), {"prepare_threshold": threshold}


def _note_use(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_USED_AT] = time.monotonic()


def _try_it(dialect: Dialect, connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
    """What `pool_pre_ping` does at every use: another round trip, and for a step, which is one, that is much."""
    if time.monotonic() - record.info.get(_USED_AT, -math.inf) < UNTRIED_SECONDS:
        return
    try:
        is_alive = dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        if not dialect.is_disconnect(error, connection, None):
            raise
        is_alive = False
    if not is_alive:
        raise DisconnectionError  # the pool makes another one, and tries that


@compiles(database_now, "postgresql")
def _database_now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "clock_timestamp()"


@compiles(statement_now, "postgresql")
def _statement_now(_element: Any, _compiler: Any, **_: Any) -> str:
    return "statement_timestamp()"


@compiles(seconds_from_now, "postgresql")
def _seconds_from_now(element: Any, compiler: Any, **kwargs: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kwargs)}))"


@compiles(latest, "postgresql")
def _latest(element: Any, compiler: Any, **kwargs: Any) -> str:
    return f"GREATEST({compiler.process(element.clauses, **kwargs)})"
