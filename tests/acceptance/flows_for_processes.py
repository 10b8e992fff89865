"""Tasks that other processes import: plain ones that do what they should, and some that do the worst."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import wait_none

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowTemplate,
    RetryPolicy,
    Task,
    TaskDataItem,
    Worker,
    raise_if_stop_requested,
    task,
    wait_for_stop,
)

AT_ONCE = wait_none()


# --- a flow that goes well --------------------------------------------------------------------------------------------


class Address(BaseModel):
    street: str
    floors: set[int]


@dataclass(frozen=True)
class Parcel:
    sender: Address
    weight: Decimal
    sent_at: datetime
    stickers: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    """Declared by the task that prints it alone; the one after it finds it in the context."""

    text: str
    codes: frozenset[bytes]


PARCEL = Parcel(
    Address(street="Nørregade \U0001f4e6", floors={3, 1}),
    Decimal("12.50"),
    datetime(2026, 3, 29, 2, 30, tzinfo=timezone.utc),
    ("fragile", "top up"),
)


@task(outputs=("weighed", "weighed_in"))
def weigh(parcel: Parcel) -> tuple[Decimal, int]:
    return parcel.weight * 2, os.getpid()


@task(outputs="greeting")
async def greet(parcel: Parcel) -> str:
    await asyncio.sleep(0)
    return f"to {parcel.sender.street}"


@task(outputs="label")
def print_label(parcel: Parcel, greeting: str) -> Label:
    return Label(greeting, frozenset({b"\x00\xff", parcel.stickers[0].encode()}))


@task(outputs="booked_in")
def book(weighed: Decimal, session: Session) -> int:
    session.execute(text("INSERT INTO bookings VALUES (:weighed)"), {"weighed": str(weighed)})
    return os.getpid()


class Seal(Task):
    """A class, with an attribute that travels, and no types declared."""

    def __init__(self, wax: str) -> None:
        self.wax = wax

    def run(self, context: ExecutionContext) -> ExecutionContext:
        label = context["label"]
        return context.without("greeting").copy(seal=(label, self.wax, label.codes), sealed_in=os.getpid())


def fulfil() -> FlowTemplate:
    """Plain, async and transactional tasks, functions and a class."""
    return FlowTemplate("fulfil", [weigh, greet, print_label, book, Seal("red")])


# --- failures ---------------------------------------------------------------------------------------------------------


class SlipperyError(Exception):
    """Neither this nor what it holds can be pickled."""

    def __init__(self, attempt: int, *, lock: threading.Lock) -> None:
        super().__init__(f"slipped at attempt {attempt}")
        self.lock = lock


class Count(Task):
    """Counts in a file, one character a call, as the world outside would."""

    retry = RetryPolicy(max_attempts=3, wait=AT_ONCE)

    def inputs(self) -> list[TaskDataItem]:
        return [TaskDataItem("file", Path)]

    def call(self, context: ExecutionContext) -> int:
        file: Path = context["file"]
        with file.open("a") as calls:
            calls.write(".")
        return file.stat().st_size

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context.copy(calls=self.call(context))


class SlipTwice(Count):
    def run(self, context: ExecutionContext) -> ExecutionContext:
        calls = self.call(context)
        if calls < 3:
            raise SlipperyError(calls, lock=threading.Lock())
        return context.copy(calls=calls)


class Quit(Count):
    retry = RetryPolicy()

    def run(self, context: ExecutionContext) -> ExecutionContext:
        sys.exit(f"quit at call {self.call(context)}")


class Interrupt(Count):
    retry = RetryPolicy()

    def run(self, context: ExecutionContext) -> ExecutionContext:
        raise KeyboardInterrupt(f"at call {self.call(context)}")


class Unstorable(Count):
    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context.copy(calls=self.call(context), lock=threading.Lock())


@task(outputs="much")
def produce(megabytes: int) -> str:
    return "x" * (megabytes << 20)


# --- neighbours, who do no harm ---------------------------------------------------------------------------------------


@task(outputs="first")
def begin(seconds: float) -> int:
    return os.getpid()


@task(outputs="second")
def nap(seconds: float, first: int) -> float:
    time.sleep(seconds)
    return seconds


@task(outputs="third")
def finish(second: float) -> str:
    return "done"


def steady() -> FlowTemplate:
    """Three tasks, of which the second takes its time."""
    return FlowTemplate("steady", [begin, nap, finish])


# --- poison -----------------------------------------------------------------------------------------------------------


def segfault() -> None:
    ctypes.string_at(0)


def exit_at_once() -> None:
    os._exit(3)


def loop_for_ever() -> None:
    while True:
        pass


def sleep_with_the_interpreter_locked() -> None:
    # Through PyDLL a call keeps the interpreter's lock: no other thread of the process runs meanwhile.
    ctypes.PyDLL(None).sleep(1000)


def take_all_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    bytearray(8 << 30)


def be_killed() -> None:
    """As the kernel does when the machine's memory is used up."""
    os.kill(os.getpid(), signal.SIGKILL)


def be_told_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


DEEDS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        segfault,
        exit_at_once,
        loop_for_ever,
        sleep_with_the_interpreter_locked,
        take_all_memory,
        be_killed,
        be_told_to_end,
    )
}


@task(retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
def misbehave(deed: str) -> None:
    DEEDS[deed]()


@task(name="misbehave", retry=RetryPolicy(max_attempts=2, wait=AT_ONCE), timeout_seconds=0.3)
def misbehave_for_a_while(deed: str) -> None:
    DEEDS[deed]()


def poison(timeout: bool = False) -> FlowTemplate:
    """One task that does the deed that its context names, with a short limit or without."""
    return FlowTemplate("poison", [misbehave_for_a_while if timeout else misbehave])


# --- long ones, and quick ones ----------------------------------------------------------------------------------------


@task(outputs="waited")
def wait_until_told(file: Path) -> str:
    """Say in a file that it has begun, and by whom, then wait for a stop that is told."""
    file.write_text(f"{os.getpid()}")
    wait_for_stop(30.0)
    raise_if_stop_requested()
    return "nobody told it"


@task(outputs="waited")
def wait_for_file(file: Path) -> str:
    """Say in a file that it has begun, and by whom, then wait until that file is gone."""
    file.write_text(f"{os.getpid()}")
    deadline = time.monotonic() + 30.0
    while file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the file is still there")
        time.sleep(0.01)
    return "it is gone"


@task(outputs="waited", timeout_seconds=1.0)
def wait_a_second_for_file(file: Path) -> str:
    """As `wait_for_file`, with a limit."""
    return wait_for_file(file)


@task(outputs="ran_in", timeout_seconds=0.2)
def be_quick() -> int:
    """Say which process this is, well within a limit that is shorter than that process takes to start."""
    return os.getpid()


@dataclass(frozen=True)
class Stamp:
    """Declared by no task; a process knows it under the name that the worker's process has registered."""

    cents: int


@task
def frank(context: ExecutionContext) -> ExecutionContext:
    stamp: Stamp = context["stamp"]
    return context.copy(franked=[stamp, Stamp(stamp.cents + 1)])


def refuse_to_start() -> None:
    """An initializer with which no process of a pool comes up."""
    raise OSError("no licence for this machine")


# --- a worker in a process of its own ---------------------------------------------------------------------------------


def register(service: FlowService) -> FlowRunner:
    """A runner that knows the flows."""
    runner = FlowRunner(service)
    waiting = FlowTemplate("wait-for-file", [wait_for_file])
    for template in (steady(), poison(), waiting):
        runner.register_flow_template(template)
    return runner


def work(url: str, start_method: str | None = None, **options: Any) -> None:
    """Run a worker, with two processes of a pool or without, until it is stopped by a signal."""
    executor = None
    if start_method is not None:
        executor = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(start_method))
    with FlowService(url) as service:
        runner = register(service)
        Worker(runner, concurrency=8, lease_seconds=0.5, poll_seconds=0.1, executor=executor, **options).run()
