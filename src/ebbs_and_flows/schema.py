"""The database schema: bring it up to this release, see where it is, write its SQL. The only module that uses
Alembic.
"""

from __future__ import annotations

import importlib.resources
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.engine import URL

from ebbs_and_flows.errors import DatabaseUrlError, MigrationError, SchemaError
from ebbs_and_flows.persistence.databases import create_engine_for, database_of
from ebbs_and_flows.persistence.tables import build_tables

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "0001"
"""The revision that this release needs (a test holds it against the migrations)."""

VERSION_TABLE = "ebbs_alembic_version"

_UPGRADE_LOCK = 0x65626273  # "ebbs" in ASCII: any number that other users of advisory locks are unlikely to take


def upgrade(
    target: Engine | Connection | str | URL, revision: str = "head", *, schema: str | None = None
) -> str | None:
    """Bring the schema up to a revision. Safe to run from many processes at once: one does the work, all succeed.

    Args:
        target: an Engine or a database URL, on which it commits; or a Connection, whose transaction it joins and leaves
            for the caller to commit.
        revision: where to; default the newest.
        schema: a named schema (PostgreSQL only), created if it is not there; default the connection's own.

    Returns:
        The revision that the database is at now.

    Raises:
        DatabaseUrlError: neither PostgreSQL nor SQLite, or a schema name that cannot be used.
        MigrationError: there is no such revision.
    """
    with _locked(target, schema) as connection:
        if schema is not None:
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {_quoted(connection, schema)}"))
        found = _revision(connection, schema)
        if revision == "head" and found is not None and (found == REVISION or _is_newer(found)):
            return found  # a newer release has been here; its schema is one that this release can work with
        _run("upgrade", _config(schema, connection=connection), revision)
        return _revision(connection, schema)


def downgrade(target: Engine | Connection | str | URL, revision: str, *, schema: str | None = None) -> str | None:
    """Take the schema back to an earlier revision, `"base"` to remove it. What does not fit there is lost.

    Arguments, result and errors as for `upgrade`.
    """
    with _locked(target, schema) as connection:
        _run("downgrade", _config(schema, connection=connection), revision)
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
    if found is None or (found != REVISION and not _is_newer(found)):
        raise SchemaError(found, REVISION)


def sql(dialect: str, revision: str = "head", *, schema: str | None = None, downgrade: bool = False) -> str:
    """The SQL that an upgrade (or a downgrade) would run, for a DBA to read and run. Needs no database.

    Args:
        dialect: `"postgresql"` or `"sqlite"`.
        revision: where to, from an empty database, or `"from:to"`; a downgrade is from this release's revision.
        schema: a named schema (PostgreSQL only).
        downgrade: whether it goes back instead.

    Raises:
        MigrationError: there is no such revision.
    """
    _check_schema_name(schema, dialect)
    buffer = io.StringIO()
    config = _config(schema, dialect=dialect)
    config.output_buffer = buffer
    if downgrade:
        _run("downgrade", config, revision if ":" in revision else f"{REVISION}:{revision}", sql=True)
        return buffer.getvalue()
    _run("upgrade", config, revision, sql=True)
    prologue = f'CREATE SCHEMA IF NOT EXISTS "{schema}";\n\n' if schema is not None else ""
    return prologue + buffer.getvalue()


def differences(target: Engine | Connection | str | URL, *, schema: str | None = None) -> list[Any]:
    """What differs between the database and the tables in this release's code, as Alembic's autogenerate sees it."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    tables = build_tables(schema)

    def is_ours(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name == schema
        if kind == "table":
            return name is not None and name.startswith("ebbs_") and name != VERSION_TABLE
        return True

    with _connected(target, schema) as connection:
        migration = MigrationContext.configure(
            connection,
            opts={"include_name": is_ours, "include_schemas": schema is not None, "version_table": VERSION_TABLE},
        )
        found = list(compare_metadata(migration, tables.metadata))
    # Alembic before 1.18 takes the identity of a column, which SQLite does not have, for a default that is missing.
    return [each for each in found if not (isinstance(each, list) and each[0][0] == "modify_default")]


def _run(direction: str, config: Config, revision: str, **how: Any) -> None:
    from alembic import command
    from alembic.util import CommandError

    try:
        getattr(command, direction)(config, revision, **how)
    except CommandError as error:
        raise MigrationError(revision, str(error)) from error


def _config(schema: str | None, **attributes: Any) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_migrations()).replace("%", "%%"))
    config.attributes.update(attributes, schema=schema)
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
        database_of(target.engine)
        _check_schema_name(schema, target.dialect.name)
        yield target
        return
    engine = create_engine_for(target) if isinstance(target, (str, URL)) else target
    database = database_of(engine)
    _check_schema_name(schema, database.name)
    try:
        with database.isolate(engine).connect() as connection:
            yield connection
    finally:
        if engine is not target:
            engine.dispose()


@contextmanager
def _locked(target: Engine | Connection | str | URL, schema: str | None) -> Iterator[Connection]:
    """A connection in a transaction that no other upgrade can be in at the same time."""
    with _connected(target, schema) as connection:
        database_of(connection.engine).begin_write(connection)
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK})
        yield connection
        if connection is not target:
            connection.commit()


def _revision(connection: Connection, schema: str | None) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema):
        return None
    qualified = VERSION_TABLE if schema is None else f"{_quoted(connection, schema)}.{VERSION_TABLE}"
    return connection.execute(text(f"SELECT version_num FROM {qualified}")).scalar_one_or_none()


def _is_newer(found: str) -> bool:
    return found.isdigit() and int(found) > int(REVISION)


def _quoted(connection: Connection, schema: str) -> str:
    return connection.dialect.identifier_preparer.quote_identifier(schema)


def _check_schema_name(schema: str | None, dialect: str) -> None:
    if schema is None:
        return
    if dialect != "postgresql":
        raise DatabaseUrlError(f"schema={schema!r} is for PostgreSQL: {dialect} has no named schemas")
    if not isinstance(schema, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", schema):
        raise DatabaseUrlError(
            f"schema={schema!r} cannot be used: letters, digits, _ and $, not beginning with a digit, "
            "at most 63 characters"
        )
