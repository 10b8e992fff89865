"""Fixtures: each test that asks for a database runs on SQLite and on PostgreSQL, on a fresh one each time."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import URL

from tests import pgbouncer
from tests.postgres import PostgresServer, running_server

if TYPE_CHECKING:
    # The library is imported in the fixtures that use it: a unit test runs without the parts it does not test.
    from ebbs_and_flows import FlowRunner, FlowService


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server for all tests of this process."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> Iterator[URL]:
    """A database with the current schema, to be copied."""
    from ebbs_and_flows import schema

    url = postgres_server.create_database()
    schema.upgrade(_text(url))
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def postgres_database(postgres_server: PostgresServer, postgres_template: URL) -> Iterator[URL]:
    """A copy of it that the tests of this process use one after the other."""
    url = postgres_server.create_database(template=postgres_template)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file with the current schema, to be copied."""
    from ebbs_and_flows import schema

    path = tmp_path_factory.mktemp("template") / "template.db"
    schema.upgrade(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all is in this one file now
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """The kind of database that this run of the test is on: "sqlite" or "postgresql"."""
    return str(request.param)


@pytest.fixture
def database_url(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database with the current schema and no rows."""
    if database == "sqlite":
        template_file = request.getfixturevalue("sqlite_template")
        yield f"sqlite:///{shutil.copy(template_file, tmp_path / 'flows.db')}"
    else:
        url = request.getfixturevalue("postgres_database")
        yield _text(url)
        request.getfixturevalue("postgres_server").reset_database(url, request.getfixturevalue("postgres_template"))


@pytest.fixture
def empty_database_url(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table. On SQLite its file is not there yet."""
    if database == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
    else:
        server = request.getfixturevalue("postgres_server")
        url = server.create_database()
        yield _text(url)
        server.drop_database(url)


@pytest.fixture
def service(database_url: str) -> Iterator[FlowService]:
    """A service on a fresh database, closed after the test."""
    from ebbs_and_flows import FlowService

    with ExitStack() as stack:
        service = FlowService(database_url)
        stack.callback(service.close)
        yield service


@pytest.fixture
def runner(service: FlowService) -> FlowRunner:
    """A runner on that service, without templates."""
    from ebbs_and_flows import FlowRunner

    return FlowRunner(service)


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# --- no silent skips: `pytest --no-skips` ------------------------------------------------------------------------


def pytest_report_header() -> str | None:
    return (
        None
        if pgbouncer.PROGRAM
        else "left out: tests/acceptance/test_pgbouncer.py, because PgBouncer is not installed"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if any test was skipped, for whatever reason")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--no-skips") and _skips(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    verdict = " (a failure: --no-skips)" if config.getoption("--no-skips") and _skips(config) else ""
    terminalreporter.write_line(f"tests skipped: {_skips(config)}{verdict}")


def _skips(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", [])) if reporter else 0
