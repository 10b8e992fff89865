"""The worker processes of `chaos.py`: a worker that runs the flow of five tasks until it is told to stop, or killed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from tenacity.wait import wait_random

sys.path.insert(0, str(Path(__file__).parents[1]))
from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowTemplate,
    RetryPolicy,
    Task,
    TransactionalTask,
    Worker,
)
from tests.integration.invariants import digest

FLOW = "chaos"
PLAIN_TASKS = ("reserve", "quote", "charge")
TRANSACTIONAL_TASKS = ("record", "close")
MAX_ATTEMPTS = MAX_CRASHES = 100
"""More than any task will need: an execution that reaches them is parked, and is found as one that did not finish."""

POLICY = RetryPolicy(max_attempts=MAX_ATTEMPTS, max_crashes=MAX_CRASHES, wait=wait_random(0.0, 0.3))
CHARGE_FAILS = 0.2
"""How often the charge is refused."""

LONG = 0.02
"""How many of the tasks take longer than a lease."""


class Pace:
    """How long tasks take, at random.

    Args:
        task_seconds: a task on average.
        transaction_seconds: a transactional task on average, in its transaction.
        lease_seconds: which some tasks exceed.
        seed: of the random numbers.
    """

    def __init__(self, task_seconds: float, transaction_seconds: float, lease_seconds: float, seed: int) -> None:
        self._task_seconds = task_seconds
        self._transaction_seconds = transaction_seconds
        self._lease_seconds = lease_seconds
        self.random = random.Random(seed)

    def of_task(self) -> float:
        """The seconds that a plain task takes."""
        if self.random.random() < LONG:
            return 1.2 * self._lease_seconds
        return self.random.uniform(0.0, 2 * self._task_seconds)

    def of_transaction(self) -> float:
        """The seconds that a transactional task takes."""
        return self.random.uniform(0.0, 2 * self._transaction_seconds)


class Notes:
    """The world outside of the flow: plain tasks note their starts there, in transactions of their own.

    A note that cannot be made is an exception, and so a failed attempt: a start is noted, or it has done nothing.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(self, flow_key: str, task: str) -> str:
        """Note a start; what it was noted as."""
        start = uuid.uuid4().hex
        with self._engine.begin() as connection:
            connection.execute(
                text("INSERT INTO starts (flow_key, task, start, process) VALUES (:flow_key, :task, :start, :process)"),
                {"flow_key": flow_key, "task": task, "start": start, "process": os.getpid()},
            )
        return start


class Plain(Task):
    """Notes its start, and takes some time."""

    retry = POLICY

    def __init__(self, notes: Notes, pace: Pace) -> None:
        self.notes = notes
        self.pace = pace

    def run(self, context: ExecutionContext) -> ExecutionContext:
        start = self.notes.start(context["key"], "reserve")
        time.sleep(self.pace.of_task())
        return after(context, "reserve", start)


class Flaky(Plain):
    """Fails at random after its start was noted."""

    def run(self, context: ExecutionContext) -> ExecutionContext:
        start = self.notes.start(context["key"], "charge")
        time.sleep(self.pace.of_task())
        if self.pace.random.random() < CHARGE_FAILS:
            raise ConnectionError("the bank does not answer")
        return after(context, "charge", start)


class Waiting(Plain):
    """Waits on the event loop."""

    async def run(self, context: ExecutionContext) -> ExecutionContext:
        start = await asyncio.to_thread(self.notes.start, context["key"], "quote")
        await asyncio.sleep(self.pace.of_task())
        return after(context, "quote", start)


class Writing(TransactionalTask):
    """Leaves its effect early or late in its transaction."""

    retry = POLICY

    def __init__(self, name: str, pace: Pace) -> None:
        self.name = name
        self.pace = pace

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        effect = uuid.uuid4().hex
        before, later = self.pace.of_transaction() / 2, self.pace.of_transaction() / 2
        time.sleep(before)
        session.execute(
            text("INSERT INTO effects (flow_key, task, effect) VALUES (:flow_key, :task, :effect)"),
            {"flow_key": context["key"], "task": self.name, "effect": effect},
        )
        time.sleep(later)
        return after(context, self.name, effect)


def after(context: ExecutionContext, task: str, done: str) -> ExecutionContext:
    """The next task's context: what this one did, and a digest of what it received."""
    return context.without("received").copy({task: done, "received": digest(context)})


def flow(notes: Notes, pace: Pace) -> FlowTemplate:
    """The flow of five tasks."""
    template = FlowTemplate(FLOW)
    for name, each in (
        ("reserve", Plain(notes, pace)),
        ("quote", Waiting(notes, pace)),
        ("record", Writing("record", pace)),
        ("charge", Flaky(notes, pace)),
        ("close", Writing("close", pace)),
    ):
        template.add_task(each, name=name)
    return template


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("ready", type=Path, help="a file that is made once it works")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--lease-seconds", type=float, required=True)
    parser.add_argument("--poll-seconds", type=float, required=True)
    parser.add_argument("--task-seconds", type=float, required=True)
    parser.add_argument("--transaction-seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until the worker takes it over: there is nothing to end yet

    service = opened(named(options.url, f"chaos worker {os.getpid()}"))
    pace = Pace(options.task_seconds, options.transaction_seconds, options.lease_seconds, options.seed)
    notes = create_engine(named(options.url, "chaos notes"), pool_pre_ping=True)
    runner = FlowRunner(service)
    runner.register_flow_template(flow(Notes(notes), pace))
    worker = Worker(
        runner,
        options.concurrency,
        lease_seconds=options.lease_seconds,
        poll_seconds=options.poll_seconds,
    )
    options.ready.touch()
    worker.run()


def named(url: str, application: str) -> str:
    """The URL under which connections are told apart in `pg_stat_activity`."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.update_query_dict({"application_name": application})
    return parsed.render_as_string(hide_password=False)


def opened(url: str) -> FlowService:
    """The service, also where the server is down just now."""
    while True:
        try:
            return FlowService(url)
        except DBAPIError as error:
            logging.getLogger(__name__).warning("no database yet: %s", error.orig)
            time.sleep(0.1)


def end_with_parent() -> None:
    """End when the parent has ended, whatever it died of: it holds the other end of stdin."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
