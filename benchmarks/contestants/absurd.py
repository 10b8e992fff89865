"""Absurd: a task of ten steps, taken from its queue."""

from __future__ import annotations

import threading

import psycopg
from absurd_sdk import Absurd, TaskContext
from absurdctl import BUNDLED_SCHEMA_SQL
from sqlalchemy import make_url

from benchmarks.contestants.durability import postgresql_settings
from benchmarks.contestants.work import TASKS, Entries, Progress, Recorded, entry, first_context, task_name

CONFIGURATION = """\
Up to 32 in flight, as many workers in threads as flows in flight, each with a connection of its own; with more, 8
workers that share the flows in flight, as 16 and 32 were slower. (One worker, which has one connection for all, was
slower from 8 in flight on; asyncio was no faster.) A lone worker claims ten tasks at a time, the others as many as they
have room for; they look for tasks every 10 ms when there are none. The clock starts when the first task does."""

FLOW = "ten-steps"
MOST_WORKERS_OF_ONE = 32
WORKERS_OF_MANY = 8
LONE_BATCH = 10
POLL_SECONDS = 0.01

RECORDED = """
    SELECT (SELECT count(*) FROM absurd.t_default WHERE state = 'completed'),
           (SELECT count(*) FROM absurd.c_default WHERE status = 'committed')"""


class AbsurdWorkers:
    """Absurd's own workers, in threads, on its default queue."""

    def __init__(self, url: str, in_flight: int) -> None:
        self._url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._in_flight = in_flight
        self._progress = Progress()
        self._flows = 0
        self._connection = psycopg.connect(self._url, autocommit=True)
        self._connection.execute(BUNDLED_SCHEMA_SQL)
        self._workers: list[Absurd] = []
        self._threads: list[threading.Thread] = []

    def prepare(self, flows: int) -> None:
        self._flows = flows
        self._progress.expect(flows)
        absurd = self._client(self._connection)
        absurd.create_queue()
        with self._connection.transaction():
            for flow in range(flows):
                absurd.spawn(FLOW, first_context(flow))

    def drain(self) -> float:
        lone = self._in_flight == 1
        count = self._in_flight if self._in_flight <= MOST_WORKERS_OF_ONE else WORKERS_OF_MANY
        options = {
            "concurrency": self._in_flight // count,
            "batch_size": LONE_BATCH if lone else None,
            "poll_interval": POLL_SECONDS,
        }
        self._workers = [self._client(self._url) for _ in range(count)]
        self._threads = [
            threading.Thread(target=worker.start_worker, kwargs={"worker_id": f"worker-{number}", **options})
            for number, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()
        return self._progress.seconds(lambda: self.recorded().flows == self._flows)

    def recorded(self) -> Recorded:
        row = self._connection.execute(RECORDED).fetchone()
        assert row is not None
        return Recorded(*row)

    def durability(self) -> dict[str, str]:
        return postgresql_settings(lambda statement: self._connection.execute(statement).fetchone()[0])

    def close(self) -> None:
        for worker in self._workers:
            worker.stop_worker()
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()
        self._connection.close()

    def _client(self, where: psycopg.Connection | str) -> Absurd:
        client = Absurd(where)
        client.register_task(FLOW)(self._ten_steps)
        return client

    def _ten_steps(self, context: Entries, steps: TaskContext) -> Entries:
        self._progress.flow_begins()
        for step in range(TASKS):
            context |= steps.step(task_name(step), lambda step=step: entry(step))
        self._progress.flow_ends()
        return context
