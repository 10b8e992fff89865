"""Which database a command is for: from the options and the environment, checked before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import unquote

import typer
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError

from ebbs_and_flows import schema as database_schema
from ebbs_and_flows.errors import DatabaseUrlError, EbbsError
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.service import FlowService

DATABASE_URL_VARIABLE = "EBBS_DATABASE_URL"
SCHEMA_VARIABLE = "EBBS_SCHEMA"

CONNECT_TIMEOUT_SECONDS = 10
"""How long to wait for a PostgreSQL server, unless the URL or PGCONNECT_TIMEOUT says otherwise; libpq would wait for
minutes."""

# The environment variables are read before the subcommand only: an option in either place comes before them.
DatabaseUrlOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--database-url", metavar="URL", help=f"The database. [env var: {DATABASE_URL_VARIABLE}]", show_default=False
    ),
]
SchemaOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--schema",
        metavar="NAME",
        help=f"Its named schema (PostgreSQL). [env var: {SCHEMA_VARIABLE}]",
        show_default=False,
    ),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.", show_default=False)]


class NoSuchFileError(EbbsError, FileNotFoundError):
    """The SQLite file that the URL names is not there; only an upgrade makes one.

    Attributes:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f'no such file {path!r}: check the URL, or run "ebbs db upgrade" to make it')


@dataclass
class Settings:
    """What stands before the subcommand, and the target that came of it."""

    database_url: str | None = None
    schema: str | None = None
    target: Target | None = None


@dataclass(frozen=True)
class Target:
    """One database, and the named schema in it."""

    url: URL
    schema: str | None

    @property
    def shown_url(self) -> str:
        """The URL without its secrets."""
        secrets = [key for key in self.url.query if "password" in key.lower() or "secret" in key.lower()]
        return self.url.difference_update_query(secrets).render_as_string(hide_password=True)

    @property
    def engine_url(self) -> URL:
        """The URL to connect with: one that does not wait for minutes, unless it is told to."""
        uses_libpq = self.url.drivername in ("postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2")
        if not uses_libpq or "connect_timeout" in self.url.query or "PGCONNECT_TIMEOUT" in os.environ:
            return self.url
        return self.url.update_query_dict({"connect_timeout": str(CONNECT_TIMEOUT_SECONDS)})

    def require_file(self) -> None:
        """Raise `NoSuchFileError` for a SQLite file that is not there, which opening it would make."""
        path = _sqlite_file(self.url)
        if path is not None and not Path(path).exists():
            raise NoSuchFileError(path)

    def current(self) -> str | None:
        """The revision of its schema. Writes nothing."""
        self.require_file()
        with self.untouched() as engine:
            return database_schema.current(engine, schema=self.schema)

    def check(self) -> None:
        """Raise `SchemaError` unless this release can work on it. Writes nothing."""
        self.require_file()
        with self.untouched() as engine:
            database_schema.check(engine, schema=self.schema)

    def differences(self) -> list[str]:
        """What differs between its tables and those of this release, one line each. Writes nothing."""
        with self.untouched() as engine:
            return [_as_line(each) for each in database_schema.differences(engine, schema=self.schema)]

    @contextmanager
    def service(self) -> Iterator[FlowService]:
        """A service on it. No schema is made, not even on SQLite, where the library does: the URL may be mistyped."""
        self.check()
        with FlowService(self.engine_url, schema=self.schema) as service:
            yield service

    @contextmanager
    def untouched(self) -> Iterator[Engine]:
        """An engine for reading. The library's own would switch a SQLite file to WAL, maybe another program's."""
        if self.url.get_backend_name() == "sqlite":
            engine = create_engine(self.url, hide_parameters=True)
        else:
            engine = create_engine_for(self.engine_url)
        try:
            yield engine
        finally:
            engine.dispose()


def find_target(ctx: typer.Context, database_url: str | None, schema: str | None) -> Target:
    """The database of this command: its own options, then those before the subcommand, then the environment.

    Raises:
        DatabaseUrlError: none is given, or it cannot be used.
    """
    settings = _settings(ctx)
    given = database_url or settings.database_url
    if given is None:
        raise DatabaseUrlError(f"no database is given: set {DATABASE_URL_VARIABLE} or add --database-url URL")
    url = _parsed(given)
    if url.get_backend_name() == "sqlite" and _sqlite_file(url) is None:
        raise DatabaseUrlError("this SQLite database is in memory, so it ends with the command: give a file")
    create_engine_for(url).dispose()  # connects to nothing; says what is wrong with the URL
    settings.target = Target(url, schema or settings.schema)
    return settings.target


def find_dialect(ctx: typer.Context, database_url: str | None, schema: str | None) -> tuple[str, str | None]:
    """The kind of database that SQL is to be written for, PostgreSQL unless a URL says otherwise, and the schema."""
    settings = _settings(ctx)
    given = database_url or settings.database_url
    dialect = "postgresql" if given is None else _parsed(given).get_backend_name()
    if dialect not in ("postgresql", "postgres", "sqlite"):
        raise DatabaseUrlError(f"flows are kept in PostgreSQL or SQLite, not in {dialect}")
    return "sqlite" if dialect == "sqlite" else "postgresql", schema or settings.schema


def _settings(ctx: typer.Context) -> Settings:
    settings = ctx.find_object(Settings)
    assert settings is not None, "the callback before the subcommand sets it"
    return settings


def _parsed(given: str) -> URL:
    try:
        url = make_url(given)
    except (ArgumentError, ValueError) as error:
        raise DatabaseUrlError(
            "this is not a database URL: expected sqlite:///flows.db or postgresql://user@host/database"
        ) from error
    if url.host is not None and "@" in url.host:
        # A part of the password has been read as the host, and messages would show it.
        raise DatabaseUrlError("the URL has more than one @: write an @ in the password as %40, a / as %2F")
    return url


def _sqlite_file(url: URL) -> str | None:
    """The file that this URL opens, `None` where it opens none."""
    if url.get_backend_name() != "sqlite":
        return None
    path = url.database or ":memory:"
    if path.startswith("file:") and str(url.query.get("uri", "")).lower() in ("true", "1", "yes", "on"):
        if url.query.get("mode") == "memory":
            return None
        path = unquote(path.removeprefix("file:").partition("?")[0])
        if path.startswith("//"):
            path = "/" + path[2:].partition("/")[2]
    return None if path in ("", ":memory:") else path


def _as_line(difference: object) -> str:
    """One of Alembic's differences: a tuple of what to do and to what, or a list of such."""
    if isinstance(difference, list):
        return "; ".join(_as_line(each) for each in difference)
    if isinstance(difference, tuple):
        return " ".join(str(each) for each in difference if each is not None)
    return str(difference)
