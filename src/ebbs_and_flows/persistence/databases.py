"""From a URL or an engine to a database that this library can work with."""

from __future__ import annotations

import re
from typing import Any, Protocol

from sqlalchemy import URL, Connection, Engine, Select, Table, TextClause, Update, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError, ProgrammingError
from sqlalchemy.pool import AssertionPool, QueuePool, SingletonThreadPool, StaticPool

from ebbs_and_flows.errors import DatabaseUrlError
from ebbs_and_flows.persistence.postgresql import PostgreSQL, create_postgresql_engine
from ebbs_and_flows.persistence.rows import BatchStatements
from ebbs_and_flows.persistence.sqlite import SQLite, check_memory_is_shared, create_sqlite_engine

_LOST_STATEMENTS = ("26000", "42P05")
"""invalid_sql_statement_name and duplicate_prepared_statement: what was prepared on another of a pooler's connections;
https://www.postgresql.org/docs/current/errcodes-appendix.html
"""


class Database(Protocol):
    """What differs between databases."""

    name: str

    def isolate(self, engine: Engine) -> Engine:
        """The engine, with the isolation level that this library's own transactions need."""

    def without_transactions(self, engine: Engine) -> Engine | None:
        """The engine, so that each statement commits by itself; `None` where a checkpoint takes several."""

    def plan_anew(self, connection: Connection) -> None:
        """Forget the plans of statements that this connection has run: the tables have grown since."""

    def begin_write(self, connection: Connection) -> None:
        """Begin a transaction that is going to write."""

    def insert(self, table: Table) -> Any:
        """An INSERT that knows ON CONFLICT DO NOTHING."""

    def claim(self, table: Table, due: Select[Any]) -> Update:
        """An UPDATE of the rows that `due` selects, which no other worker can update as well."""

    def lock_free(self, rows: Select[Any]) -> Select[Any]:
        """The same SELECT, which locks its rows and passes over those that somebody else has locked."""

    def try_lock(self, connection: Connection, name: str, table: Table) -> bool:
        """Take a lock of this name on a table until the transaction ends; False where another transaction has it."""

    def select_ids(self) -> TextClause:
        """A SELECT of the ids in the parameter `the_ids`, a JSON array."""

    def batches(self, schema: str | None) -> BatchStatements:
        """The statements that write many rows at once."""

    def announce(self, connection: Connection, channel: str) -> None:
        """Tell those who listen on a channel, once the transaction commits."""

    def lives_in_memory(self, engine: Engine) -> bool:
        """Whether the connections of this process are all there is of the database."""

    def can_listen(self, engine: Engine) -> bool:
        """Whether `announce` reaches anybody, and this engine's driver can wait for it."""


def database_of(engine: Engine) -> Database:
    """The database behind an engine.

    Raises:
        DatabaseUrlError: neither SQLite nor PostgreSQL, an engine for asyncio, or one whose connections do not share
            their database in memory.
    """
    if not isinstance(engine, Engine):
        hint = ": pass its sync_engine" if hasattr(engine, "sync_engine") else ""
        raise DatabaseUrlError(f"expected a database URL or a SQLAlchemy Engine, not {type(engine).__name__}{hint}")
    _check_is_sync(engine.dialect)
    if engine.dialect.name == "sqlite":
        check_memory_is_shared(engine)
        return SQLite()
    if engine.dialect.name == "postgresql":
        return PostgreSQL()
    raise DatabaseUrlError(f"flows are kept in PostgreSQL or SQLite, not in {engine.dialect.name}")


def check_schema_name(schema: str | None, dialect: str) -> None:
    """Raise `DatabaseUrlError` unless a named schema can be used: PostgreSQL's, with a name that needs no thought."""
    if schema is None:
        return
    if dialect != "postgresql":
        raise DatabaseUrlError(f"schema={schema!r} is for PostgreSQL: {dialect} has no named schemas")
    if not isinstance(schema, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", schema):
        raise DatabaseUrlError(
            f"schema={schema!r} cannot be used: letters, digits, _ and $, not beginning with a digit, "
            "at most 63 characters"
        )


def check_untranslated(engine: Engine | Connection, schema: str | None) -> None:
    """Raise `DatabaseUrlError` where a `schema_translate_map` would move this library's tables to another schema.

    Some of its statements are text, which SQLAlchemy does not translate: half of them would go elsewhere.
    """
    translations = engine.get_execution_options().get("schema_translate_map") or {}
    if translations.get(schema, schema) == schema:
        return
    tables = "tables without a schema" if schema is None else f"those in the schema {schema!r}"
    way_out = "use an engine or a connection without it"
    if engine.dialect.name == "postgresql":
        way_out = f"name the schema that holds them, for example FlowService(engine, schema={translations[schema]!r})"
    raise DatabaseUrlError(
        f"schema_translate_map sends {tables} to {translations[schema]!r}, which this library's tables do not follow: "
        f"{way_out}"
    )


def capacity_of(engine: Engine) -> int | None:
    """How many connections the engine's pool gives out at once; `None` where it has no bound.

    Raises:
        DatabaseUrlError: its pool lets threads share a connection, and with it a transaction, or has but one for all.
    """
    pool = engine.pool
    if isinstance(pool, (AssertionPool, StaticPool, SingletonThreadPool)):
        raise DatabaseUrlError(
            f"a worker's threads need connections of their own, and this engine's {type(pool).__name__} gives none: "
            "use a QueuePool, or FlowService('sqlite://') for a database in memory"
        )
    if not isinstance(pool, QueuePool):
        return None
    overflow = int(getattr(pool, "_max_overflow", 0))
    return None if overflow < 0 or pool.size() == 0 else pool.size() + overflow


def is_refusal(error: DBAPIError) -> bool:
    """Whether the database will never store this: the value, not the moment, is wrong.

    By SQLSTATE on PostgreSQL (classes 22 data exception, 23 integrity constraint violation, 54 program limit exceeded;
    https://www.postgresql.org/docs/current/errcodes-appendix.html), by the class of the error on SQLite. Anything else
    (busy, a lock or statement time-out, a deadlock, a lost connection) may go well the next time.
    """
    if error.connection_invalidated:
        return False
    sqlstate = getattr(error.orig, "sqlstate", None)
    if sqlstate is not None:
        return str(sqlstate)[:2] in ("22", "23", "54")
    return isinstance(error, (DataError, IntegrityError, ProgrammingError))


def said(error: Exception) -> str:
    """What the database said, on one line, without SQLAlchemy's own explanations; for logs."""
    words = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
    if getattr(getattr(error, "orig", error), "sqlstate", None) in _LOST_STATEMENTS:
        words += " (behind a pooler in transaction mode add ?prepare_threshold=none to the URL, see docs/databases.md)"
    return words


def is_lost_savepoint(error: BaseException) -> bool:
    """Whether the database says that a savepoint is gone: the transaction around it was ended in plain SQL."""
    if not isinstance(error, DBAPIError):
        return False
    # https://www.postgresql.org/docs/current/errcodes-appendix.html: invalid_savepoint_specification,
    # no_active_sql_transaction. SQLite has no code of its own for it.
    return getattr(error.orig, "sqlstate", None) in ("3B001", "25P01") or "no such savepoint" in str(error.orig)


def create_engine_for(url: str | URL) -> Engine:
    """An engine made by this library: it hides parameters in errors, and sets SQLite up to be durable.

    `postgresql://` without a driver means psycopg, on every version of SQLAlchemy.

    Raises:
        DatabaseUrlError: not a URL of PostgreSQL or SQLite, or its driver is missing. It never shows a password.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise DatabaseUrlError(
            "this is not a database URL: expected sqlite:///flows.db or postgresql://user@host/database"
        ) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    backend = parsed.drivername.split("+")[0]
    if backend not in ("postgresql", "sqlite"):
        raise DatabaseUrlError(f"flows are kept in PostgreSQL or SQLite, not in {backend}")
    try:
        _check_is_sync(parsed.get_dialect())
    except NoSuchModuleError as error:
        raise DatabaseUrlError(f"SQLAlchemy knows no driver {parsed.drivername!r}") from error
    return create_postgresql_engine(parsed) if backend == "postgresql" else create_sqlite_engine(parsed)


def _check_is_sync(dialect: Any) -> None:
    if dialect.is_async:
        raise DatabaseUrlError(
            f"the driver {dialect.driver!r} is for asyncio: use postgresql+psycopg:// or sqlite:/// here, and call the "
            "library from asyncio with asyncio.to_thread"
        )
