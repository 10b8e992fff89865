"""The real PgBouncer before a test's PostgreSQL server, where the program is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import URL, NullPool, create_engine
from sqlalchemy.exc import OperationalError

from tests.waiting import wait_until

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
PORT = 6432  # a part of the socket's name only: it listens on no network
SERVERS = 2
"""How many connections to the server its clients share."""


class Pooler:
    """A running PgBouncer."""

    def __init__(self, folder: Path, server: URL, pool_mode: str) -> None:
        self._folder = folder
        self._server = server
        self._pool_mode = pool_mode
        # It refuses to run as root, and the server's socket may be in a folder of its owner's alone.
        self._user = _owner_of_socket(server) if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user, -1)
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: URL, **query: str) -> URL:
        """Where a database of the server is reached through it."""
        where = {"host": str(self._folder), "port": str(PORT), **query}
        return database.set(host=None, port=None, username="app", password="s3cret", query=where)

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self._folder / "log").read_text()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        query = self._server.query
        place = {
            "host": self._server.host or query.get("host"),
            "port": self._server.port or query.get("port"),
            "user": self._server.username,
            "password": self._server.password,
        }
        given = " ".join(f"{key}='{value}'" for key, value in place.items() if value)
        configuration = self._folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = {given}\n"
            f"[pgbouncer]\npool_mode = {self._pool_mode}\nunix_socket_dir = {self._folder}\nlisten_port = {PORT}\n"
            f"auth_type = any\ndefault_pool_size = {SERVERS if self._pool_mode == 'transaction' else 20}\n"
            f"logfile = {self._folder / 'log'}\nlog_connections = 0\nlog_disconnections = 0\n"
        )
        assert PROGRAM is not None, "tests that need it are left out where it is not installed"
        self._process = subprocess.Popen(
            [PROGRAM, "--quiet", str(configuration)], user=self._user, extra_groups=[] if self._user else None
        )
        wait_until(self._answers, "PgBouncer's answer")

    def stop(self) -> None:
        """Stop it at once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"PgBouncer has ended: {self.log}"
        engine = create_engine(self.url(self._server), poolclass=NullPool, connect_args={"prepare_threshold": None})
        try:
            engine.connect().close()
        except OperationalError:
            return False
        return True


@contextmanager
def pooler_before(server: URL, pool_mode: str = "transaction") -> Iterator[Pooler]:
    """Start a PgBouncer before a server, and stop it afterwards."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="ebbs-pooler-", dir="/tmp"))  # a socket's path has to be short
        stack.callback(shutil.rmtree, folder)
        pooler = Pooler(folder, server, pool_mode)
        stack.callback(pooler.stop)
        pooler.start()
        yield pooler


def _owner_of_socket(server: URL) -> int:
    place = server.host or server.query.get("host")
    if isinstance(place, str) and place.startswith("/"):
        return Path(place).stat().st_uid
    return pwd.getpwnam("nobody").pw_uid
