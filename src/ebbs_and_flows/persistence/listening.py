"""Listener: wakes a worker when something is due, by PostgreSQL's NOTIFY. Without it, or if it fails, workers poll."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable

from sqlalchemy import Engine

POLL_SECONDS = 0.5
"""How long it waits for its socket before it asks the driver, which may have read ahead."""

RECONNECT_SECONDS = 5.0
"""How long it waits after an error; meanwhile the worker polls."""


class Listener:
    """Keeps one connection of the pool, outside of transactions, in a thread of its own.

    Args:
        engine: of PostgreSQL with the psycopg driver.
        channel: what to listen on.
        notice: called in the listener's thread when something was said, and once when it begins to listen.
        report: called with the error when it cannot listen.
    """

    def __init__(
        self, engine: Engine, channel: str, notice: Callable[[], None], report: Callable[[Exception], None]
    ) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
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
                except Exception as error:  # the driver's own errors come unwrapped
                    self._report(error)
                    self._stopped.wait(RECONNECT_SECONDS)

    def _listen(self) -> None:
        with self._engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None, "it has just been connected"
            try:
                connection.exec_driver_sql(f'LISTEN "{self._channel}"')
                self._notice()  # what was said before was not heard
                with selectors.DefaultSelector() as selector:
                    selector.register(driver.fileno(), selectors.EVENT_READ)
                    selector.register(self._bell, selectors.EVENT_READ)
                    while not self._stopped.is_set():
                        selector.select(POLL_SECONDS)
                        if list(driver.notifies(timeout=0)):
                            self._notice()
                connection.exec_driver_sql("UNLISTEN *")
            except BaseException:
                connection.invalidate()  # who gets it next from the pool is not to listen
                raise
