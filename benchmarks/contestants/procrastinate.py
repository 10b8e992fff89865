"""Procrastinate: it has no flows, so each of the ten jobs of a chain defers the next one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import make_url

from benchmarks.contestants.durability import postgresql_settings
from benchmarks.contestants.work import PATIENCE_SECONDS, POLL_SECONDS, TASKS, Entries, Recorded, entry, first_context

CONFIGURATION = """\
`async def` tasks; up to 4 workers in one process, on one event loop, which share the flows in flight (one worker, which
fetches its jobs one by one, was slower from 8 in flight on, 8 workers were no faster); a pool of 10 connections that
are not checked before each use; LISTEN and NOTIFY on, as it comes; finished jobs are kept. All chains are deferred
before, in one statement. It stores no results: what a task adds is in the arguments of the next one."""

MOST_WORKERS = 4
POOL_SIZE = 10

RECORDED = """
    SELECT count(*) FILTER (WHERE (args ->> 'step')::int = %s), count(*)
      FROM procrastinate_jobs WHERE status = 'succeeded'"""


class Procrastinate:
    """Chains of jobs, run by Procrastinate's own workers."""

    def __init__(self, url: str, in_flight: int) -> None:
        self._url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._in_flight = in_flight
        self._flows = 0
        self._left = 0
        self._connection = psycopg.connect(self._url, autocommit=True)
        self._app = App(connector=PsycopgConnector(conninfo=self._url))
        self._step = self._app.task(name="step")(self._run_step)
        with self._app.open():
            self._app.schema_manager.apply_schema()

    async def _run_step(self, context: Entries, step: int) -> None:
        context |= entry(step)
        if step + 1 < TASKS:
            await self._step.defer_async(context=context, step=step + 1)
        else:
            self._left -= 1

    def prepare(self, flows: int) -> None:
        self._flows = self._left = flows
        with self._app.open():
            self._step.batch_defer(*({"context": first_context(flow), "step": 0} for flow in range(flows)))

    def drain(self) -> float:
        return asyncio.run(self._drain())

    async def _drain(self) -> float:
        count = min(MOST_WORKERS, self._in_flight)
        options: dict[str, Any] = {"concurrency": self._in_flight // count, "install_signal_handlers": False}
        async with AsyncConnectionPool(self._url, min_size=POOL_SIZE, max_size=POOL_SIZE, open=False) as pool:
            await self._app.open_async(pool)
            began = time.perf_counter()
            workers = [asyncio.create_task(self._app.run_worker_async(name=f"w{n}", **options)) for n in range(count)]
            await asyncio.wait_for(self._all_recorded(), PATIENCE_SECONDS)
            seconds = time.perf_counter() - began
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return seconds

    async def _all_recorded(self) -> None:
        while self._left or self.recorded().flows < self._flows:  # noqa: ASYNC110  (the database wakes nobody)
            await asyncio.sleep(POLL_SECONDS)

    def recorded(self) -> Recorded:
        row = self._connection.execute(RECORDED, (TASKS - 1,)).fetchone()
        assert row is not None
        return Recorded(*row)

    def durability(self) -> dict[str, str]:
        return postgresql_settings(lambda statement: self._connection.execute(statement).fetchone()[0])

    def close(self) -> None:
        self._connection.close()
