"""Processes that schedule one small flow, run it, and are killed with SIGKILL, each at another place.

`killed_worker.py URL HOW FOLDER` lets one of them live, to see which places there are: before and after each statement,
before and after each commit, and in the body of each task. Then it kills one at each. It imports everything once and
forks before there is an engine or a thread, so that a place costs a fork and not the start of an interpreter. What
happens it tells on stdout, one JSON object a line: `{"point": 17, ...}`, with the fields of `Death` in the test.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session
from tenacity import wait_none

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTemplate, RetryPolicy, Worker, task

PLAIN_TASKS = ("prepare", "fetch", "charge")
TASKS = ("prepare", "fetch", "charge", "sell")

LEASE_SECONDS = {"worker": 2.0, "runner": 3600.0}
"""By how the flow is run: a worker's lease is waited for; a runner's never expires, somebody has to say it is dead."""

WRITE = re.compile(r"(INSERT INTO|UPDATE) (ebbs_\w+|effects)")

AT_ONCE = 2
"""How many of them run at once: one of them is as a rule waiting for the database."""

LONGEST_SECONDS = 30
"""How long one of them may take before it counts as hanging."""


class Outside:
    """The world outside the flow, which remembers over all processes what was started for each point.

    Args:
        folder: holds a file for each point, with a line for each start of a plain task.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note_start(self, point: int, name: str) -> None:
        """Note that a plain task has started."""
        with (self._folder / str(point)).open("a") as notes:
            notes.write(f"{name}\n")

    def starts(self, point: int) -> list[str]:
        """Which plain tasks have been started for a point, oldest first."""
        notes = self._folder / str(point)
        return notes.read_text().splitlines() if notes.exists() else []


def key_of(point: int) -> str:
    """The template's name and the idempotency key of the flow for a point: none of them touches another one's."""
    return f"order-{point}"


def flow(point: int, outside: Outside, reach: Callable[[str], None]) -> FlowTemplate:
    """A plain task, a coroutine, a task that fails when it is started for the first time, and a transactional one.

    Args:
        reach: called with the place that was reached.
    """

    @task(outputs="prepared")
    def prepare(order_id: int) -> dict[str, int]:
        outside.note_start(point, "prepare")
        reach("in prepare")
        return {"order": order_id}

    @task(outputs="fetched")
    async def fetch(prepared: dict[str, int]) -> tuple[int, ...]:
        outside.note_start(point, "fetch")
        await asyncio.sleep(0)
        reach("in fetch")
        return tuple(prepared.values())

    @task(outputs="charged", retry=RetryPolicy(max_attempts=2, wait=wait_none()))
    def charge(fetched: tuple[int, ...], context: ExecutionContext) -> list[str]:
        outside.note_start(point, "charge")
        reach("in charge")
        if outside.starts(point).count("charge") == 1:
            raise ConnectionError("the bank does not answer")
        return sorted(context)

    @task(outputs="sold")
    def sell(charged: list[str], session: Session) -> str:
        session.execute(text("INSERT INTO effects (point) VALUES (:point)"), {"point": point})
        session.flush()
        reach("in sell")
        return " ".join(charged)

    return FlowTemplate(key_of(point), [prepare, fetch, charge, sell])


class Killer:
    """Kills this process with SIGKILL when it has reached a place a number of times, from whatever thread.

    Args:
        place: where; `None` kills nobody.
        time: the n-th time, from 1.
    """

    def __init__(self, place: str | None, time: int) -> None:
        self.reached: list[str] = []
        self._target = (place, time)
        self._lock = threading.Lock()

    def reach(self, place: str) -> None:
        """Note a place; die there if it is the one."""
        with self._lock:
            self.reached.append(place)
            if self._target == (place, self.reached.count(place)):
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, engine: Engine) -> None:
        """Notice each statement, before it and, where it writes, after it; each commit, before it and once it has given
        its connection back.
        """

        @event.listens_for(engine, "before_cursor_execute")
        def before(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            self.reach(f"before {gist(statement)}")

        @event.listens_for(engine, "after_cursor_execute")
        def after(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if WRITE.search(statement):
                self.reach(f"after {gist(statement)}")

        @event.listens_for(engine, "commit")
        def commit(_connection: object) -> None:
            self.reach("before COMMIT")

        @event.listens_for(engine, "checkin")
        def checkin(*_: object) -> None:
            self.reach("after the transaction")


def gist(statement: str) -> str:
    """What a statement writes to; of another one, its first word."""
    write = WRITE.search(statement)
    return write.group() if write else statement.split()[0]


def tell(**facts: Any) -> None:
    """Say something of a point. Nothing is buffered: it has been said when the next line of this process runs."""
    os.write(1, f"{json.dumps(facts)}\n".encode())


def live(point: int, killer: Killer, url: str, how: str, outside: Outside) -> None:
    """Schedule the flow for a point and run it, until the killer strikes."""
    service = FlowService(url)
    killer.watch(service.engine)
    runner = FlowRunner(service, lease_seconds=LEASE_SECONDS["runner"])
    runner.register_flow_template(flow(point, outside, killer.reach))
    key = key_of(point)
    tell(point=point, scheduled=runner.schedule_flow(key, ExecutionContext(order_id=point), idempotency_key=key))
    if how == "worker":
        worker = Worker(runner, concurrency=2, lease_seconds=LEASE_SECONDS["worker"], poll_seconds=0.05)
        worker.run(until_idle=True)
    else:
        runner.run_until_idle()


class Children:
    """Processes that each do one thing, a few at once. What became of each is told.

    Args:
        most: how many at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._points: dict[int, int] = {}

    def start(self, point: int, life: Callable[[], object]) -> None:
        """Start one, once there is room for it."""
        self.wait(self._most - 1)
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST_SECONDS)
            life()
            os._exit(0)
        self._points[child] = point

    def wait(self, left: int = 0) -> None:
        """Wait until no more than so many are left."""
        while len(self._points) > left:
            child, status = os.wait()
            tell(point=self._points.pop(child), ended=os.waitstatus_to_exitcode(status))


def main(url: str, how: str, folder: str) -> None:
    """Let one process live, to see which places there are; then kill one at each."""
    outside = Outside(Path(folder))
    places = Path(folder, "places")

    def live_and_note() -> None:
        killer = Killer(None, 0)
        live(0, killer, url, how, outside)
        places.write_text("\n".join(killer.reached))

    children = Children(AT_ONCE)
    children.start(0, live_and_note)
    children.wait()
    reached: Counter[str] = Counter()
    for point, place in enumerate(places.read_text().splitlines(), start=1):
        reached[place] += 1
        tell(point=point, place=place, time=reached[place])
        children.start(point, partial(live, point, Killer(place, reached[place]), url, how, outside))
    children.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
