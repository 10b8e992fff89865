"""What differs on SQLite: one writer at a time, its clock, its engine."""

from __future__ import annotations

import sqlite3
from typing import Any

from sqlalchemy import URL, Connection, Engine, Select, Table, TextClause, Update, create_engine, event, text, update
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.pool import QueuePool, SingletonThreadPool, StaticPool

from ebbs_and_flows.errors import DatabaseUrlError
from ebbs_and_flows.persistence.expressions import database_now, latest, seconds_from_now, statement_now
from ebbs_and_flows.persistence.sqlite_batches import SQLiteBatches, begin_write, is_in_transaction

BUSY_TIMEOUT_SECONDS = 30.0
"""How long a writer waits for another one before `database is locked`."""

MINIMUM_VERSION = (3, 35, 0)
"""The first with RETURNING (https://sqlite.org/lang_returning.html)."""


class SQLite:
    """The SQLite side of what the repositories need."""

    name = "sqlite"

    def isolate(self, engine: Engine) -> Engine:
        return engine

    def without_transactions(self, engine: Engine) -> None:
        return None

    def plan_anew(self, connection: Connection) -> None:
        """Plans are made by rules here, and do not depend on sizes."""

    def select_ids(self) -> TextClause:
        return text("SELECT value FROM json_each(:the_ids)")

    def batches(self, schema: str | None) -> SQLiteBatches:
        return SQLiteBatches()

    def begin_write(self, connection: Connection) -> None:
        # https://docs.python.org/3/library/sqlite3.html#transaction-control-via-the-autocommit-attribute
        if getattr(connection.connection.driver_connection, "autocommit", None) is True:
            raise DatabaseUrlError(
                "with autocommit=True the commit() of SQLite's driver does nothing: leave it out of connect_args, "
                "or take autocommit=False"
            )
        begin_write(connection)

    def insert(self, table: Table) -> Insert:
        return insert(table)

    def claim(self, table: Table, due: Select[Any]) -> Update:
        """An UPDATE of the rows that `due` selects; the write lock keeps others away."""
        return update(table).where(table.c.execution_id.in_(due))

    def lock_free(self, rows: Select[Any]) -> Select[Any]:
        return rows

    def try_lock(self, connection: Connection, name: str, table: Table) -> bool:
        """The write lock of the transaction is the lock."""
        return True

    def announce(self, connection: Connection, channel: str) -> None:
        """Nobody can listen: workers poll."""

    def lives_in_memory(self, engine: Engine) -> bool:
        return is_in_memory(engine.url)

    def can_listen(self, engine: Engine) -> bool:
        return False


def create_sqlite_engine(url: URL) -> Engine:
    """An engine for an embedded database: WAL, synchronous=FULL, foreign keys, 30 s of patience with other writers."""
    if sqlite3.sqlite_version_info < MINIMUM_VERSION:
        found = sqlite3.sqlite_version
        raise DatabaseUrlError(
            f"this Python has SQLite {found}, at least {'.'.join(map(str, MINIMUM_VERSION))} is needed"
        )
    options: dict[str, Any] = {
        # A batch of each size is another statement.
        "connect_args": {"timeout": BUSY_TIMEOUT_SECONDS, "cached_statements": 512},
        "hide_parameters": True,
    }
    if is_in_memory(url):
        # One connection is the database: it is lent to one thread at a time, and never closed.
        options["connect_args"]["check_same_thread"] = False
        options.update(poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=BUSY_TIMEOUT_SECONDS)
    engine = create_engine(url, **options)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "savepoint", _begin_before)
    return engine


def is_in_memory(url: URL) -> bool:
    """Whether this URL names no file."""
    return url.database in (None, "", ":memory:") or ":memory:" in url.database or url.query.get("mode") == "memory"


def check_memory_is_shared(engine: Engine) -> None:
    """Raise `DatabaseUrlError` where each connection of a given engine would have a database in memory of its own."""
    pool = engine.pool
    if not is_in_memory(engine.url) or "cache=shared" in (engine.url.database or ""):
        return
    if engine.url.query.get("cache") == "shared" or isinstance(pool, (SingletonThreadPool, StaticPool)):
        return
    if isinstance(pool, QueuePool) and pool.size() == 1 and getattr(pool, "_max_overflow", 0) == 0:
        return
    raise DatabaseUrlError(
        f"each connection of this engine's {type(pool).__name__} has a database in memory of its own: use a file, "
        "poolclass=StaticPool, or FlowService('sqlite://')"
    )


def _set_pragmas(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    # synchronous before WAL: the switch itself is a write. https://sqlite.org/pragma.html#pragma_synchronous
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    if cursor.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
        _switch_to_wal(cursor)
    cursor.close()


def _begin_before(connection: Connection, _savepoint: str | None) -> None:
    """A caller's transaction may begin with a savepoint. The driver would send that alone, and its release would commit
    what the caller may still roll back (https://docs.python.org/3/library/sqlite3.html#transaction-control).
    """
    if not is_in_transaction(connection):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
    except sqlite3.OperationalError:
        # A read-only database, or another connection that is using it just now: both modes are as durable, and WAL is
        # remembered in the file, so the next one to open it alone makes the switch.
        return


_NOW = "strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"


@compiles(database_now, "sqlite")
@compiles(statement_now, "sqlite")
def _now(_element: Any, _compiler: Any, **_: Any) -> str:
    return f"({_NOW})"


@compiles(seconds_from_now, "sqlite")
def _seconds_from_now(element: Any, compiler: Any, **kwargs: Any) -> str:
    seconds = compiler.process(element.clauses, **kwargs)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {seconds} || ' seconds') || '000')"


@compiles(latest, "sqlite")
def _latest(element: Any, compiler: Any, **kwargs: Any) -> str:
    return f"max({compiler.process(element.clauses, **kwargs)})"
