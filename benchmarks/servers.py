"""Where benchmarks run: fresh databases on a PostgreSQL server, found or started, and SQLite files in a folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.engine import URL

from ebbs_and_flows import schema
from tests.postgres import crashing_server

DURABILITY = {
    "PostgreSQL": ("fsync", "synchronous_commit", "full_page_writes", "wal_sync_method", "shared_buffers"),
    "SQLite": ("journal_mode", "synchronous"),
}
"""The settings that say what a commit is worth, and so what it costs."""


class Databases(Protocol):
    """Makes databases of one kind. It travels to other processes."""

    name: str

    def create(self, *, with_schema: bool = True) -> str:
        """Make an empty database, with the library's schema unless told otherwise, and return its URL."""

    def clear(self) -> None:
        """Drop all that were made here and in other processes."""


@dataclass(frozen=True)
class PostgresDatabases:
    """Databases on a server whose URL names a role that may create them."""

    server: str
    prefix: str
    name: str = "PostgreSQL"

    def create(self, *, with_schema: bool = True) -> str:
        url = make_url(self.server).set(database=f"{self.prefix}{uuid.uuid4().hex[:12]}")
        self._execute(f'CREATE DATABASE "{url.database}" TEMPLATE template0')
        given = url.render_as_string(hide_password=False)
        if with_schema:
            schema.upgrade(given)
        return given

    def clear(self) -> None:
        ours = self._execute(f"SELECT datname FROM pg_database WHERE starts_with(datname, '{self.prefix}')")
        for name in ours:
            self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> list[str]:
        engine = create_engine(self.server, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                result = connection.execute(text(statement))
                return [str(each) for each in result.scalars()] if result.returns_rows else []
        finally:
            engine.dispose()


@dataclass(frozen=True)
class SqliteDatabases:
    """Files in a folder of their own."""

    folder: str
    name: str = "SQLite"

    def create(self, *, with_schema: bool = True) -> str:
        url = f"sqlite:///{Path(self.folder) / uuid.uuid4().hex[:12]}.db"
        if with_schema:
            schema.upgrade(url)
        return url

    def clear(self) -> None:
        for each in Path(self.folder).iterdir():
            each.unlink()


@contextmanager
def postgres_databases(url: str | None = None) -> Iterator[PostgresDatabases]:
    """Give databases on this server, or on one of our own, as durable as PostgreSQL is by default.

    Raises:
        NoServerError: no URL was given, and there is no embedded PostgreSQL for this platform.
    """
    prefix = f"ebbs_bench_{uuid.uuid4().hex[:8]}_"
    if url is None:
        with crashing_server() as server:
            yield PostgresDatabases(server.url.render_as_string(hide_password=False), prefix)
        return
    databases = PostgresDatabases(with_psycopg(url).render_as_string(hide_password=False), prefix)
    try:
        yield databases
    finally:
        databases.clear()


def with_psycopg(url: str) -> URL:
    """The URL with psycopg 3 as its driver where it names none."""
    made = make_url(url)
    return made.set(drivername="postgresql+psycopg") if made.drivername in ("postgres", "postgresql") else made


def describe(engine: Engine) -> dict[str, str]:
    """What the database is: its version, and the settings on which the cost of a commit depends."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            found = {"version": str(connection.scalar(text("SELECT sqlite_version()")))}
            shows = {name: f"PRAGMA {name}" for name in DURABILITY["SQLite"]}
        else:
            found = {"version": str(connection.scalar(text("SHOW server_version")))}
            shows = {name: f"SHOW {name}" for name in DURABILITY["PostgreSQL"]}
        for name, statement in shows.items():
            found[name] = str(connection.scalar(text(statement)))
    if found.get("synchronous") == "2":  # https://sqlite.org/pragma.html#pragma_synchronous
        found["synchronous"] = "FULL"
    return found
