"""DBOS Transact: a workflow of ten steps, called directly or taken from its queue."""

from __future__ import annotations

import threading
import time

from dbos import DBOS, DBOSConfig
from sqlalchemy import Engine, create_engine, make_url, text

from benchmarks.contestants.durability import postgresql_settings, sqlite_settings
from benchmarks.contestants.work import TASKS, Entries, Progress, Recorded, entry, first_context

CONFIGURATION = """\
`direct`: with one flow in flight the workflow is called in one thread, with N `DBOS.start_workflow` keeps N in flight
(N threads that call it, and asyncio, were slower). `queue`: `worker_concurrency=N`, polled every 10 ms; the clock
starts when the first workflow does. Both: errors only in the log, no tracing, no ping before a connection is used, a
pool of 5 connections (2, 20 and 40 were slower). On SQLite its file is in WAL mode like all others, with
synchronous=FULL: faster for it than the rollback journal that it would have made."""

QUEUE = "ten-steps"
QUEUE_POLL_SECONDS = 0.01
POOL_SIZE = 5

progress = Progress()
"""Of the one measurement that this process makes: a workflow is a function of its module."""


@DBOS.step()
def add_entry(context: Entries, step: int) -> Entries:
    """Do one task."""
    return entry(step)


@DBOS.workflow()
def ten_steps(context: Entries) -> Entries:
    """Do the ten tasks, each with what the ones before it have added."""
    progress.flow_begins()
    for step in range(TASKS):
        context |= add_entry(context, step)
    progress.flow_ends()
    return context


class Dbos:
    """DBOS with the URL as its system database."""

    def __init__(self, url: str, in_flight: int) -> None:
        self._in_flight = in_flight
        self._contexts: list[Entries] = []
        self._on_postgresql = make_url(url).get_backend_name() == "postgresql"
        if not self._on_postgresql:
            _set_write_ahead_log(url)
        config: DBOSConfig = {
            "name": "ten-steps",
            "system_database_url": url,
            "sys_db_pool_size": POOL_SIZE,
            "db_engine_kwargs": {"pool_pre_ping": False},
            "log_level": "ERROR",
            "enable_otlp": False,
        }
        self._dbos = DBOS(config=config)
        DBOS.launch()

    @property
    def _engine(self) -> Engine:
        return self._dbos._sys_db.engine  # there is no public way to what its connections have been set to

    def prepare(self, flows: int) -> None:
        progress.expect(flows)
        self._contexts = [first_context(flow) for flow in range(flows)]

    def recorded(self) -> Recorded:
        tables = "dbos." if self._on_postgresql else ""
        statement = f"""
            SELECT (SELECT count(*) FROM {tables}workflow_status WHERE status = 'SUCCESS'),
                   (SELECT count(*) FROM {tables}operation_outputs WHERE error IS NULL)"""
        with self._engine.connect() as connection:
            return Recorded(*connection.execute(text(statement)).one())

    def durability(self) -> dict[str, str]:
        read = postgresql_settings if self._on_postgresql else sqlite_settings
        with self._engine.connect() as connection:
            return read(lambda statement: connection.scalar(text(statement)))

    def close(self) -> None:
        DBOS.destroy()


class DbosDirect(Dbos):
    """Workflows that are called, or started where more than one is to be in flight."""

    def drain(self) -> float:
        began = time.perf_counter()
        if self._in_flight == 1:
            for context in self._contexts:
                ten_steps(context)
        else:
            self._start_all()
        return time.perf_counter() - began

    def _start_all(self) -> None:
        room = threading.Semaphore(self._in_flight)
        for context in self._contexts:
            room.acquire()
            handle = DBOS.start_workflow(ten_steps, context)
            handle.future.add_done_callback(lambda _: room.release())
        for _ in range(self._in_flight):
            room.acquire()


class DbosQueue(Dbos):
    """Workflows that wait in its queue, which is then made known to the process, so that it begins to take them."""

    def prepare(self, flows: int) -> None:
        super().prepare(flows)
        for context in self._contexts:
            DBOS.enqueue_workflow(QUEUE, ten_steps, context)

    def drain(self) -> float:
        DBOS.register_queue(QUEUE, worker_concurrency=self._in_flight, polling_interval_sec=QUEUE_POLL_SECONDS)
        return progress.seconds(lambda: self.recorded().flows == len(self._contexts))


def _set_write_ahead_log(url: str) -> None:
    """Set it in the file, which keeps it."""
    engine = create_engine(url)
    with engine.connect() as connection:
        connection.execute(text("PRAGMA journal_mode = WAL"))
    engine.dispose()
