"""Writer: the connection on which a worker writes, its own as long as the worker runs, and a thread to wait for it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from ebbs_and_flows.checkpoints import Checkpoint, Claim, Recorded
from ebbs_and_flows.persistence.batches import CheckpointBatch
from ebbs_and_flows.rooms import Wanted
from ebbs_and_flows.service import FlowService

OWN_CONNECTIONS = 2
"""Connections of the pool that a worker needs besides those of transactional tasks: to write, and to renew leases; one
more to listen."""

PLAN_SECONDS = 1.0
"""How long PostgreSQL may go on with plans that were made when the tables were smaller."""


class Writer:
    """Writes a worker's turns, on PostgreSQL on a connection that it keeps: nothing has to be asked or reset between
    two of them, and a host that uses up its pool does not hold up the worker.

    Where the pool has none to spare, and on SQLite, where a connection costs nothing, each turn takes one of the pool.
    """

    def __init__(self, service: FlowService) -> None:
        self._service = service
        most = service.connections
        self._keeps = not service.has_one_writer and (most is None or most > OWN_CONNECTIONS)
        self._connection: Connection | None = None
        self._planned_at = 0.0
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], bool] | None] = queue.SimpleQueue()
        self._has_begun = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def write(
        self, checkpoints: Sequence[Checkpoint] | CheckpointBatch, wanted: Wanted | None = None
    ) -> tuple[dict[int, Recorded | None], list[Claim]]:
        """A turn; see `FlowService.turn`. Commits."""
        if not self._keeps:
            return self._service.turn(checkpoints, wanted)
        try:
            return self._service.turn(checkpoints, wanted, connection=self._connected())
        except BaseException:
            self._give_back()  # whatever it was, the next turn begins on a connection that the pool has looked at
            raise

    def hand_over(self, job: Callable[[], None], *, after_another: bool) -> None:
        """Do a job, which writes and raises nothing, in the writer's own thread, while the caller goes on.

        Args:
            after_another: whether one that was handed over before may still be under way. The caller itself writes
                nothing before it is told, by the jobs, that they are done.

        Raises:
            RuntimeError: there is no thread for it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="ebbs writer", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
                raise
        self._jobs.put((job, after_another))
        if not after_another:
            # Until the job waits for the database, it has the interpreter's lock. Else the caller would keep that for
            # as long as it has something to do, and the database would be idle meanwhile.
            self._has_begun.acquire()

    def close(self, patience_seconds: float) -> None:
        """Give the connection back, once the last job is done.

        Args:
            patience_seconds: how long to wait for that; later it happens by itself.
        """
        if self._thread is None:
            self._give_back()
        else:
            self._jobs.put(None)
            self._thread.join(patience_seconds)

    def _serve(self) -> None:
        while (handed_over := self._jobs.get()) is not None:
            job, after_another = handed_over
            if not after_another:
                self._has_begun.release()
            job()
            del job, handed_over
        self._give_back()

    def _give_back(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):  # it was lost, and cannot be reset
                connection.close()

    def _connected(self) -> Connection:
        now = time.monotonic()
        if self._connection is None:
            self._connection = self._service.engine.connect()
        elif now - self._planned_at > PLAN_SECONDS:
            self._service.plan_anew(self._connection)
        else:
            return self._connection
        self._planned_at = now
        return self._connection
