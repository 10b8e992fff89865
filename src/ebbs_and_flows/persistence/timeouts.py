"""How long a migration may wait for a lock and work at a statement: set for its time, and then as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from ebbs_and_flows.errors import MigrationTimeoutError
from ebbs_and_flows.persistence.databases import said

LOCK_TIMEOUT_SECONDS = 10.0
"""Whoever asks for a table that a migration waits for has to wait behind it: so less than the lease of a worker."""

STATEMENT_TIMEOUT_SECONDS = 300.0

MAX_TIMEOUT_SECONDS = 2**31 // 1000
"""PostgreSQL counts milliseconds in 32 bits (https://www.postgresql.org/docs/current/runtime-config-client.html)."""

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_LOCK_NOT_AVAILABLE = "55P03"
_QUERY_CANCELED = "57014"

_CURRENT = text("SELECT current_setting(:name)")
_SET_LOCAL = text("SELECT set_config(:name, :setting, true)")


@dataclass(frozen=True)
class TimeOuts:
    """The bounds of one migration, in seconds; `None` leaves what the session has."""

    lock_seconds: float | None
    statement_seconds: float | None

    def in_sql(self) -> list[str]:
        """The statements that set them for one transaction on PostgreSQL."""
        settings = {"lock_timeout": self.lock_seconds, "statement_timeout": self.statement_seconds}
        return [
            f"SET LOCAL {name} = '{_milliseconds(seconds)}ms'"
            for name, seconds in settings.items()
            if seconds is not None
        ]

    @contextmanager
    def for_the_write_lock(self, connection: Connection) -> Iterator[None]:
        """On SQLite: how long to wait for another writer. No effect elsewhere."""
        if connection.dialect.name != "sqlite" or self.lock_seconds is None:
            yield
            return
        before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {_milliseconds(self.lock_seconds)}")
        try:
            yield
        except DBAPIError as error:
            if "locked" in str(error.orig):  # the driver's error codes are of Python 3.11
                raise MigrationTimeoutError(
                    "lock_timeout_seconds",
                    self.lock_seconds,
                    "another connection is writing to this database, and did not end",
                    "let it end",
                ) from error
            raise
        finally:
            connection.exec_driver_sql(f"PRAGMA busy_timeout = {before}")

    @contextmanager
    def for_a_turn(self, connection: Connection) -> Iterator[None]:
        """On PostgreSQL: how long to wait for another upgrade. That takes what its statements take, and nobody has to
        wait behind those who wait for it: so it is bounded as a statement, not as a lock. No effect elsewhere.
        """
        with (
            _explained(
                _QUERY_CANCELED,
                ("statement_timeout_seconds", self.statement_seconds),
                "another upgrade of this library's schema is going on, and did not end",
                "see whether it is at work or was left open",
            ),
            _set_local(connection, "statement_timeout", self.statement_seconds),
            _set_local(connection, "lock_timeout", 0),
        ):
            yield

    @contextmanager
    def for_the_work(self, connection: Connection) -> Iterator[None]:
        """On PostgreSQL: how long to wait for each lock and to work at each statement. No effect elsewhere."""
        with (
            _explained(
                _LOCK_NOT_AVAILABLE,
                ("lock_timeout_seconds", self.lock_seconds),
                "another transaction holds a lock on a table that is to be changed, and did not end",
                'let it end ("ebbs doctor" shows long transactions)',
            ),
            _explained(
                _QUERY_CANCELED,
                ("statement_timeout_seconds", self.statement_seconds),
                "a statement was cut off before it was done",
                "look for what slowed it down",
            ),
            _set_local(connection, "statement_timeout", self.statement_seconds),
            _set_local(connection, "lock_timeout", self.lock_seconds),
        ):
            yield


@contextmanager
def _set_local(connection: Connection, name: str, seconds: float | None) -> Iterator[None]:
    """A setting of PostgreSQL for this transaction. What goes wrong in between takes it back by its rollback."""
    if seconds is None or connection.dialect.name != "postgresql":
        yield
        return
    before = connection.scalar(_CURRENT, {"name": name})
    connection.execute(_SET_LOCAL, {"name": name, "setting": f"{_milliseconds(seconds)}ms"})
    yield
    connection.execute(_SET_LOCAL, {"name": name, "setting": before})


@contextmanager
def _explained(sqlstate: str, limit: tuple[str, float | None], found: str, next_step: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if sqlstate not in (getattr(error.orig, "sqlstate", None), getattr(error.orig, "pgcode", None)):
            raise
        raise MigrationTimeoutError(*limit, f"{found} ({said(error)})", next_step) from error


def _milliseconds(seconds: float) -> int:
    return 0 if seconds == 0 else max(1, round(seconds * 1000))
