"""Listener: wakes a worker when something is due, by PostgreSQL's NOTIFY. Without it, or if it fails, workers poll."""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, text

from ebbs_and_flows.persistence.isolation import connect, isolated
from ebbs_and_flows.persistence.postgresql import NOTIFY

POLL_SECONDS = 0.5
"""How long it waits for its socket before it asks the driver, which may have read ahead."""

RECONNECT_SECONDS = 5.0
"""How long it waits after an error; meanwhile the worker polls."""

HEARING_SECONDS = 2.0
"""How long what is said may take through a pooler; after that it is not heard at all."""


class CannotListenError(Exception):
    """A pooler stands before the server and gives each transaction another connection, so that nothing is heard.

    Args:
        prepares: whether the driver prepares statements, which most such poolers lose as well.
    """

    def __init__(self, *, prepares: bool) -> None:
        loses = ". Unless it keeps prepared statements, add ?prepare_threshold=none to the URL" if prepares else ""
        super().__init__(
            f"a pooler in transaction mode stands before the server{loses}. To poll from the beginning: "
            "Worker(..., listen=False), ebbs worker --no-listen"
        )


class Listener:
    """Keeps one connection of the pool, outside of transactions, in a thread of its own.

    Args:
        engine: of PostgreSQL with the psycopg driver.
        channel: what to listen on.
        notice: called in the listener's thread when something was said, and once when it begins to listen.
        report: called with the error when it cannot listen. It tries again, unless that is a `CannotListenError`.
    """

    def __init__(
        self, engine: Engine, channel: str, notice: Callable[[], None], report: Callable[[Exception], None]
    ) -> None:
        self._engine = isolated(engine, "AUTOCOMMIT")
        self._channel = channel
        self._notice = notice
        self._report = report
        self._stopped = threading.Event()
        self._bell, self._ring = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="ebbs listener", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """End, and give the connection back."""
        self._stopped.set()
        self._ring.close()
        self._thread.join(2 * POLL_SECONDS + 1)

    def _serve(self) -> None:
        with self._bell:
            while not self._stopped.is_set():
                try:
                    self._listen()
                except CannotListenError as error:
                    self._report(error)
                    return
                except Exception as error:  # the driver's own errors come unwrapped
                    self._report(error)
                    self._stopped.wait(RECONNECT_SECONDS)

    def _listen(self) -> None:
        with connect(self._engine) as connection:
            driver: Any = connection.connection.driver_connection
            try:
                with selectors.DefaultSelector() as selector:
                    selector.register(driver.fileno(), selectors.EVENT_READ)
                    selector.register(self._bell, selectors.EVENT_READ)
                    if driver.info.backend_pid != connection.scalar(text("SELECT pg_backend_pid()")):
                        self._try_pooler(connection, selector)
                    connection.exec_driver_sql(f'LISTEN "{self._channel}"')
                    self._notice()  # what was said before was not heard
                    while not self._stopped.is_set():
                        if self._hears(driver, selector, POLL_SECONDS):
                            self._notice()
                connection.exec_driver_sql("UNLISTEN *")
            except BaseException:
                connection.invalidate()  # who gets it next from the pool is not to listen
                raise

    def _try_pooler(self, connection: Connection, selector: selectors.BaseSelector) -> None:
        """See whether what is said on another connection is heard on this one: whoever answers is not the server."""
        driver: Any = connection.connection.driver_connection
        channel = f"ebbs_trial_{secrets.token_hex(8)}"
        connection.exec_driver_sql(f'LISTEN "{channel}"')
        with connect(self._engine) as other:
            other.execute(NOTIFY, {"channel": channel})
        deadline = time.monotonic() + HEARING_SECONDS
        while not self._stopped.is_set():
            if self._hears(driver, selector, max(0.0, min(POLL_SECONDS, deadline - time.monotonic()))):
                break
            if time.monotonic() > deadline:
                # The pooler may hand the one that listens to anybody. Should another one hear this, nothing is lost:
                # nobody ever says that name again.
                connection.exec_driver_sql(f'UNLISTEN "{channel}"')
                raise CannotListenError(prepares=driver.prepare_threshold is not None)
        connection.exec_driver_sql(f'UNLISTEN "{channel}"')

    def _hears(self, driver: Any, selector: selectors.BaseSelector, seconds: float) -> bool:
        selector.select(seconds)
        return bool(list(driver.notifies(timeout=0)))
