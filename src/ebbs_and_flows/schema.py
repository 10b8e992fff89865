"""The database schema: bring it up to this release, see where it is, write its SQL, be a guest in another history. The
only module that uses Alembic.
"""

from __future__ import annotations

import importlib.resources
import io
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.engine import URL
from sqlalchemy.engine.mock import MockConnection

from ebbs_and_flows.arguments import valid_seconds
from ebbs_and_flows.errors import InvalidArgumentError, MigrationError, SchemaError
from ebbs_and_flows.persistence.databases import (
    Database,
    check_schema_name,
    check_untranslated,
    create_engine_for,
    database_of,
)
from ebbs_and_flows.persistence.isolation import connect
from ebbs_and_flows.persistence.postgresql import PostgreSQL
from ebbs_and_flows.persistence.sqlite import SQLite
from ebbs_and_flows.persistence.sqlite_batches import forget_view
from ebbs_and_flows.persistence.tables import build_tables
from ebbs_and_flows.persistence.timeouts import (
    LOCK_TIMEOUT_SECONDS,
    MAX_TIMEOUT_SECONDS,
    STATEMENT_TIMEOUT_SECONDS,
    TimeOuts,
)

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "ebbs_0001"
"""The revision that this release needs (a test holds it against the migrations)."""

VERSION_TABLE = "ebbs_alembic_version"
"""Where the revision of the database is kept, whichever Alembic history brings it there."""

SCHEMA_OPTION = "ebbs_schema"
"""In alembic.ini, beside `version_locations`: the named schema, where this library's revisions run within a host's
history.
"""

_UPGRADE_LOCK = 0x65626273  # "ebbs" in ASCII: any number that other users of advisory locks are unlikely to take

_ALEMBIC = threading.RLock()
"""Held while Alembic runs: it keeps what it is doing in its modules, so it does one thing at a time."""

_CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS {}"


def upgrade(
    target: Engine | Connection | MockConnection | str | URL,
    revision: str = "head",
    *,
    schema: str | None = None,
    lock_timeout_seconds: float | None = LOCK_TIMEOUT_SECONDS,
    statement_timeout_seconds: float | None = STATEMENT_TIMEOUT_SECONDS,
) -> str | None:
    """Bring the schema up to a revision. Safe to run from many processes at once: one does the work, all succeed.

    It is done as a whole or not at all. A database that a newer release has been at is left alone. The time-outs are
    set for the upgrade only: a caller's transaction has its own settings again afterwards.

    Args:
        target: an Engine or a database URL, on which it commits; or a Connection, whose transaction it joins and leaves
            for the caller to commit, for example `op.get_bind()` in a migration of one's own. Where that one is run
            with `--sql`, the SQL goes into its script.
        revision: where to; default the newest. `"from:to"` says for `--sql` where a script begins.
        schema: a named schema (PostgreSQL only), created if it is not there; default the connection's own.
        lock_timeout_seconds: how long to wait for each lock, 0.001 s or more; default 10 s. On SQLite: for the write
            lock. `None` leaves what the session has.
        statement_timeout_seconds: how long each statement may take, and the wait for another upgrade; default 300 s.
            `None` leaves what the session has. Without effect on SQLite.

    Returns:
        The revision that the database is at now.

    Raises:
        DatabaseUrlError: neither PostgreSQL nor SQLite, or a schema name that cannot be used.
        InvalidArgumentError: a bound that is none, or a Connection at AUTOCOMMIT.
        MigrationError: there is no such revision.
        MigrationTimeoutError: a lock was not free, or a statement was not done in time. Nothing was changed, and the
            caller's transaction goes on as if it had not been tried.
    """
    time_outs = _time_outs(lock_timeout_seconds, statement_timeout_seconds)
    if isinstance(target, MockConnection):
        return _write_into_hosts_script("upgrade", revision, schema)
    goal = revision.rpartition(":")[2]
    with _locked(target, schema, time_outs) as connection:
        _create_schema(connection, schema)
        found = _revision(connection, schema)
        if found is not None and _number(found) >= _number(REVISION if goal == "head" else goal) > 0:
            return found
        _run("upgrade", _config(schema, connection=connection), goal)
        return _revision(connection, schema)


def downgrade(
    target: Engine | Connection | MockConnection | str | URL,
    revision: str,
    *,
    schema: str | None = None,
    lock_timeout_seconds: float | None = LOCK_TIMEOUT_SECONDS,
    statement_timeout_seconds: float | None = STATEMENT_TIMEOUT_SECONDS,
) -> str | None:
    """Take the schema back to an earlier revision, `"base"` to remove it. What does not fit there is lost.

    Arguments, result and errors as for `upgrade`.
    """
    time_outs = _time_outs(lock_timeout_seconds, statement_timeout_seconds)
    if isinstance(target, MockConnection):
        return _write_into_hosts_script("downgrade", revision, schema)
    with _locked(target, schema, time_outs) as connection:
        _run("downgrade", _config(schema, connection=connection), revision.rpartition(":")[2])
        return _revision(connection, schema)


def current(target: Engine | Connection | str | URL, *, schema: str | None = None) -> str | None:
    """The revision that the database is at, `None` where the schema was never made. Writes nothing."""
    with _connected(target, schema) as connection:
        return _revision(connection, schema)


def check(target: Engine | Connection | str | URL, *, schema: str | None = None) -> None:
    """Raise `SchemaError` unless the schema is the one this release needs, or a newer one. Writes nothing.

    A newer one is accepted, because migrations run before the new release does: they only add what the release before
    does not mind.
    """
    found = current(target, schema=schema)
    if _number(found) < _number(REVISION):
        raise SchemaError(found, REVISION)


def sql(
    dialect: str,
    revision: str = "head",
    *,
    schema: str | None = None,
    downgrade: bool = False,
    lock_timeout_seconds: float | None = LOCK_TIMEOUT_SECONDS,
    statement_timeout_seconds: float | None = STATEMENT_TIMEOUT_SECONDS,
) -> str:
    """The SQL that an upgrade (or a downgrade) would run, for a DBA to read and run. Needs no database.

    On PostgreSQL it is one transaction, with the time-outs set for it.

    Args:
        dialect: `"postgresql"` or `"sqlite"`.
        revision: where to, from an empty database, or `"from:to"`; a downgrade is from this release's revision.
        schema: a named schema (PostgreSQL only).
        downgrade: whether it goes back instead.
        lock_timeout_seconds: as for `upgrade`; without effect on SQLite.
        statement_timeout_seconds: as for `upgrade`.

    Raises:
        DatabaseUrlError: a schema name that cannot be used.
        InvalidArgumentError: a bound that is none.
        MigrationError: there is no such revision.
    """
    time_outs = _time_outs(lock_timeout_seconds, statement_timeout_seconds)
    check_schema_name(schema, dialect)
    buffer = io.StringIO()
    first = time_outs.in_sql() if dialect == "postgresql" else []
    _write_script("downgrade" if downgrade else "upgrade", revision, schema, buffer, dialect=dialect, first=first)
    return buffer.getvalue()


def differences(target: Engine | Connection | str | URL, *, schema: str | None = None) -> list[Any]:
    """What differs between the database and the tables in this release's code, as Alembic's autogenerate sees it."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    tables = build_tables(schema)

    def is_ours(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name == schema
        return kind != "table" or (_is_ours(name) and name != VERSION_TABLE)

    with _connected(target, schema) as connection:
        migration = MigrationContext.configure(
            connection,
            opts={"include_name": is_ours, "include_schemas": schema is not None, "version_table": VERSION_TABLE},
        )
        found = list(compare_metadata(migration, tables.metadata))
    # Alembic before 1.18 takes the identity of a column, which SQLite does not have, for a default that is missing.
    return [each for each in found if not (isinstance(each, list) and each[0][0] == "modify_default")]


# --- for the env.py of a host -------------------------------------------------------------------------------------


def include_name(name: str | None, type_: str, parent_names: Mapping[str, str | None]) -> bool:
    """A hook of Alembic for a host's env.py, `context.configure(include_name=...)`: False for what is this library's.

    So autogenerate does not see the tables whose names begin with `ebbs_`, in whichever schema they are, nor what
    belongs to them. A host that has a hook of its own calls this one in it.
    """
    return not _is_ours(name if type_ == "table" else parent_names.get("table_name"))


def include_object(object_: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """A hook of Alembic for a host's env.py, `context.configure(include_object=...)`: as `include_name`, and also for
    a host whose own metadata has tables of this library, for a foreign key say.
    """
    return not _is_ours(name if type_ == "table" else getattr(getattr(object_, "table", None), "name", None))


def version_locations() -> str:
    """The folder of this library's revisions, for `version_locations` of a host that runs them within its own history,
    as a branch with the label `ebbs`.

    In alembic.ini `ebbs_and_flows:migrations/versions` names the same folder of an installed wheel.
    """
    return str(_migrations() / "versions")


# --- for the migrations -------------------------------------------------------------------------------------------


def named_schema() -> str | None:
    """In a migration: the named schema that it is for; in a host's history, `ebbs_schema` in its alembic.ini."""
    from alembic import op

    migration = op.get_context()
    schema = migration.config.get_alembic_option(SCHEMA_OPTION) if migration.config is not None else None
    check_schema_name(schema, migration.dialect.name)
    return schema


def in_step(revision: str, down_revision: str | None) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorates `upgrade` and `downgrade` of a migration, so that it may also run within the history of a host.

    There Alembic keeps the host's version table; this keeps `ebbs_alembic_version`, by which workers, `ebbs db` and
    other histories go. What was done already is not done again, and the host's ways of naming constraints are not ours.

    Raises:
        MigrationError: the database is at neither of the two revisions.
    """

    def decorate(migrate: Callable[[], None]) -> Callable[[], None]:
        is_upgrade = migrate.__name__ == "upgrade"

        @wraps(migrate)
        def run() -> None:
            from alembic import op

            migration = op.get_context()
            if migration.version_table == VERSION_TABLE:
                migrate()
                return
            schema = named_schema()
            if not migration.as_sql:
                connection = op.get_bind()
                _begin(connection, schema)
                _wait_for_turn(connection)
                if not _is_due(_revision(connection, schema), revision, down_revision, is_upgrade=is_upgrade):
                    return
                if is_upgrade:
                    _create_schema(connection, schema)
            elif is_upgrade and schema is not None and down_revision is None:
                op.execute(_CREATE_SCHEMA.format(migration.dialect.identifier_preparer.quote_identifier(schema)))
            hosts_metadata = migration.opts.pop("target_metadata", None)
            try:
                migrate()
            finally:
                migration.opts["target_metadata"] = hosts_metadata
            _write_revision(revision if is_upgrade else down_revision, schema, is_first=down_revision is None)

        return run

    return decorate


def _is_due(found: str | None, revision: str, down_revision: str | None, *, is_upgrade: bool) -> bool:
    """Whether a step is to be taken; False where it was taken already, in another history."""
    at, above, below = _number(found), _number(revision), _number(down_revision)
    if at >= above if is_upgrade else at <= below:
        return False
    if at == (below if is_upgrade else above):
        return True
    begin = down_revision if is_upgrade else revision
    raise MigrationError(
        revision if is_upgrade else down_revision,
        f"the database is at {found}, and this step begins at {begin}. It was taken elsewhere since, with "
        f'"ebbs db": bring both to the same revision first, with "ebbs db upgrade" and "alembic upgrade heads"',
    )


def _write_revision(revision: str | None, schema: str | None, *, is_first: bool) -> None:
    """Write the version table, as Alembic would if this were a run of this library's own."""
    from alembic import op

    quote = op.get_context().dialect.identifier_preparer.quote_identifier
    table = VERSION_TABLE if schema is None else f"{quote(schema)}.{VERSION_TABLE}"
    if is_first:
        op.execute(
            f"CREATE TABLE IF NOT EXISTS {table} "
            f"(version_num VARCHAR(32) NOT NULL, CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
        )
    op.execute(f"DELETE FROM {table}")
    if revision is not None:
        op.execute(f"INSERT INTO {table} (version_num) VALUES ('{revision}')")


# --- how it is done -----------------------------------------------------------------------------------------------


def _time_outs(lock_timeout_seconds: float | None, statement_timeout_seconds: float | None) -> TimeOuts:
    given = {"lock_timeout_seconds": lock_timeout_seconds, "statement_timeout_seconds": statement_timeout_seconds}
    for name, seconds in given.items():
        if seconds is not None:
            valid_seconds(name, seconds)
            if seconds > MAX_TIMEOUT_SECONDS:
                raise InvalidArgumentError(name, seconds, f"at most {MAX_TIMEOUT_SECONDS} seconds, or None")
    return TimeOuts(lock_timeout_seconds, statement_timeout_seconds)


def _write_script(
    direction: str,
    revision: str,
    schema: str | None,
    script: Any,
    *,
    dialect: str,
    first: Sequence[str] = (),
    is_part: bool = False,
) -> None:
    if direction == "downgrade" and ":" not in revision:
        revision = f"{REVISION}:{revision}"
    begins_at = revision.partition(":")[0] if ":" in revision else "base"
    if schema is not None and direction == "upgrade" and begins_at == "base":
        first = [*first, _CREATE_SCHEMA.format(f'"{schema}"')]
    config = _config(schema, dialect=dialect, first=first, is_part=is_part)
    config.output_buffer = script
    _run(direction, config, revision, sql=True)


def _write_into_hosts_script(direction: str, revision: str, schema: str | None) -> str | None:
    from alembic import op

    host = op.get_context()
    dialect = host.dialect.name
    check_schema_name(schema, dialect)
    _write_script(direction, revision, schema, host.output_buffer, dialect=dialect, is_part=True)
    goal = revision.rpartition(":")[2]
    return {"head": REVISION, "base": None}.get(goal, goal)


def _run(direction: str, config: Config, revision: str, **how: Any) -> None:
    from alembic import command
    from alembic.util import CommandError

    try:
        with _ALEMBIC, _hosts_run_restored():
            getattr(command, direction)(config, revision, **how)
    except CommandError as error:
        raise MigrationError(revision, str(error)) from error


@contextmanager
def _hosts_run_restored() -> Iterator[None]:
    """`alembic.op` and `alembic.context` speak for one run, the last begun, and for none when that has ended: let them
    speak for the host's again, which may have called this from one of its migrations.
    """
    from alembic import context, op

    proxies = [proxy for module in (context, op) if (proxy := getattr(module, "_proxy", None)) is not None]
    try:
        yield
    finally:
        for proxy in proxies:
            proxy._install_proxy()


def _config(schema: str | None, **attributes: Any) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    if schema is not None:
        config.set_main_option(SCHEMA_OPTION, schema)
    config.attributes.update(attributes)
    return config


def _migrations() -> Path:
    """The migrations: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(str(importlib.resources.files("ebbs_and_flows")))
    for candidate in (package / "migrations", package.parent.parent / "migrations"):
        if (candidate / "env.py").is_file():
            return candidate
    raise FileNotFoundError(f"the migrations are neither in {package} nor beside it: install the package again")


@contextmanager
def _connected(target: Engine | Connection | str | URL, schema: str | None) -> Iterator[Connection]:
    if isinstance(target, Connection):
        _database(target)
        check_schema_name(schema, target.dialect.name)
        check_untranslated(target, schema)
        yield target
        return
    engine = create_engine_for(target) if isinstance(target, (str, URL)) else target
    database = database_of(engine)
    check_schema_name(schema, database.name)
    check_untranslated(engine, schema)
    try:
        with connect(database.isolate(engine)) as connection:
            yield connection
    finally:
        if engine is not target:
            engine.dispose()


@contextmanager
def _locked(target: Engine | Connection | str | URL, schema: str | None, time_outs: TimeOuts) -> Iterator[Connection]:
    """A connection in a transaction that no other upgrade can be in at the same time; in the caller's, a savepoint, so
    that what fails leaves nothing there.
    """
    with _connected(target, schema) as connection:
        with time_outs.for_the_write_lock(connection):
            _begin(connection, schema)
        with connection.begin_nested() if connection is target else nullcontext():
            with time_outs.for_a_turn(connection):
                _wait_for_turn(connection)
            with time_outs.for_the_work(connection):
                yield connection
        if connection is not target:
            connection.commit()


def _begin(connection: Connection, schema: str | None) -> None:
    """Begin a transaction that is going to write, unless there is one."""
    check_untranslated(connection, schema)
    if connection.dialect.name == "postgresql" and connection.dialect.detect_autocommit_setting(
        connection.connection.dbapi_connection  # type: ignore[arg-type]  # it is one that is open
    ):
        raise InvalidArgumentError(
            "target", connection, "a Connection with transactions, not at AUTOCOMMIT, so that all is done or nothing"
        )
    _database(connection).begin_write(connection)
    if connection.dialect.name == "sqlite":
        forget_view(connection)


def _wait_for_turn(connection: Connection) -> None:
    """Wait until no other upgrade is going on. On SQLite the transaction has the write lock."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})


def _database(connection: Connection) -> Database:
    """What this connection is of. Within `run_sync` one of asyncio's is used like any other."""
    if connection.dialect.name == "postgresql":
        return PostgreSQL()
    return SQLite() if connection.dialect.name == "sqlite" else database_of(connection.engine)


def _create_schema(connection: Connection, schema: str | None) -> None:
    # To say IF NOT EXISTS takes the right to create schemas, even where it is there.
    if schema is not None and not inspect(connection).has_schema(schema):
        connection.execute(text(f"CREATE SCHEMA {_quoted(connection, schema)}"))


def _revision(connection: Connection, schema: str | None) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema):
        return None
    qualified = VERSION_TABLE if schema is None else f"{_quoted(connection, schema)}.{VERSION_TABLE}"
    return connection.execute(text(f"SELECT version_num FROM {qualified}")).scalar_one_or_none()


def _number(revision: str | None) -> int:
    """The place of a revision in the history: 7 for ebbs_0007, 0 for whatever is not one of this library's.

    Its ids are not plain numbers, so that they can stand in one history with those of a host that counts, too.
    """
    found = re.fullmatch(r"ebbs_([0-9]{4,})", revision or "")
    return int(found.group(1)) if found else 0


def _is_ours(table: str | None) -> bool:
    return table is not None and table.startswith("ebbs_")


def _quoted(connection: Connection, schema: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(schema)
