"""The flows that `curves.py` runs, and the processes in which it runs workers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowStatus, FlowTemplate, Task, Worker

FLOW = "curve"
TASKS = 10
START_SECONDS = 60.0
"""How long a process may take to say that it has started."""

IDLE_SECONDS = 1.0
"""After which a worker that has nothing to do has connected, listens, and waits."""


class Add(Task):
    """Adds one entry, and notes when it began."""

    def __init__(self, index: int, starts: list[float]) -> None:
        self.index = index
        self.starts = starts

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.starts.append(time.perf_counter())
        return context.copy({f"added-{self.index}": self.index})


class Wait(Task):
    """Stays in flight until its process is killed."""

    def __init__(self) -> None:
        self.started = 0

    async def run(self, context: ExecutionContext) -> ExecutionContext:
        self.started += 1
        await asyncio.sleep(3600)
        return context


class Flow:
    """A template of tasks that do next to nothing, on a service of its own.

    Args:
        url: of the database.
        tasks: how many.
    """

    def __init__(self, url: str, tasks: int = TASKS) -> None:
        self.service = FlowService(url)
        self.runner = FlowRunner(self.service)
        self.tasks = tasks
        self._starts: list[float] = []
        template = FlowTemplate(FLOW)
        for index in range(tasks):
            template.add_task(Add(index, self._starts), name=f"task-{index}")
        self.runner.register_flow_template(template)

    def run_flow(self, entries: dict[str, Any] | None = None) -> tuple[float, float, float]:
        """Schedule one and run it in this thread: milliseconds for all of it, until its first task began, and from
        there a task, to the start of the next one.
        """
        self._starts.clear()
        self.runner.schedule_flow(FLOW, entries or {"n": 1})
        began = time.perf_counter()
        execution = self.runner.run_flow()
        ended = time.perf_counter()
        if execution is None or execution.status is not FlowStatus.SUCCEEDED:
            raise RuntimeError(f"this has not succeeded: {execution}")
        return (ended - began) * 1000, (self._starts[0] - began) * 1000, self._milliseconds_a_task(self._starts)

    def work_off(self, flows: int, entries: dict[str, Any] | None = None) -> list[float]:
        """Schedule some and let a worker run them, one at a time: milliseconds a task in each of them."""
        self._starts.clear()
        for _ in range(flows):
            self.runner.schedule_flow(FLOW, entries or {"n": 1})
        Worker(self.runner, concurrency=1).run(until_idle=True)
        if len(self._starts) != flows * self.tasks:
            raise RuntimeError(f"{len(self._starts)} tasks have started, not {flows * self.tasks}")
        first = range(0, len(self._starts), self.tasks)
        return [self._milliseconds_a_task(self._starts[each : each + self.tasks]) for each in first]

    def work_off_waiting(self, *, concurrency: int) -> None:
        """Let a worker run all that is due."""
        Worker(self.runner, concurrency=concurrency).run(until_idle=True)

    def close(self) -> None:
        """Close the connections."""
        self.service.close()

    def _milliseconds_a_task(self, starts: list[float]) -> float:
        return (starts[-1] - starts[0]) * 1000 / (len(starts) - 1)


# --- processes --------------------------------------------------------------------------------------------------------


def call_in_process(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Call a function in a process of its own, which is ended after so many seconds, and return what it returns.

    Raises:
        RuntimeError: it raised something, died, or took too long.
    """
    with started(_answer, function, *arguments) as (process, answers):
        if not answers.poll(seconds):
            raise RuntimeError(f"{function.__name__} has not ended after {seconds:.0f} s")
        try:
            is_good, answer = answers.recv()
        except EOFError:
            process.join(5)
            raise RuntimeError(f"the process of {function.__name__} died: {process.exitcode}") from None
    if not is_good:
        raise RuntimeError(answer)
    return answer


@contextmanager
def started(function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[Any, Connection]]:
    """Start a process that calls a function with a pipe and these arguments; in the end it is no more."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=function, args=(there, *arguments))
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        here.close()
        process.terminate()
        process.join(10)
        process.kill()
        process.join()


def _answer(pipe: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no process of this one is left
    try:
        answer = (True, function(*arguments))
    except Exception:
        answer = (False, traceback.format_exc())
    with suppress(OSError):  # it took too long, and nobody waits for it any more
        pipe.send(answer)
    sys.stdout.flush()
    os._exit(0)  # whatever a worker's threads may be doing


def serve(pipe: Connection, url: str, concurrency: int, poll_seconds: float) -> None:
    """Run a worker in this process until it gets SIGTERM, and say so when it has started and is idle."""
    worker = Worker(Flow(url).runner, concurrency=concurrency, poll_seconds=poll_seconds)

    def say_idle() -> None:
        with suppress(OSError):  # nobody wants to know it any more
            pipe.send("idle")

    threading.Timer(IDLE_SECONDS, say_idle).start()
    worker.run()


@contextmanager
def worker_processes(count: int, url: str, *, concurrency: int = 32, poll_seconds: float = 1.0) -> Iterator[None]:
    """Have some worker processes while the block lasts, from when all of them are idle."""
    if count == 0:
        yield
        return
    with (
        started(serve, url, concurrency, poll_seconds) as (_, pipe),
        worker_processes(count - 1, url, concurrency=concurrency, poll_seconds=poll_seconds),
    ):
        if not pipe.poll(START_SECONDS):
            raise RuntimeError("a worker has not started")
        pipe.recv()
        yield


def memory_in_flight(url: str, count: int, patience_seconds: float) -> tuple[float, float]:
    """Have so many executions, which wait already, in flight in this process: its megabytes then, and how many seconds
    it took to take them all up.
    """
    import psutil

    service = FlowService(url)
    runner = FlowRunner(service)
    task = Wait()
    runner.register_flow_template(FlowTemplate(FLOW, [task]))
    worker = Worker(runner, concurrency=count)
    threading.Thread(target=worker.run, daemon=True).start()
    began = time.monotonic()
    while task.started < count:
        if time.monotonic() > began + patience_seconds:
            raise RuntimeError(f"after {patience_seconds:.0f} s {task.started} of {count} are in flight")
        time.sleep(0.02)
    seconds = time.monotonic() - began
    time.sleep(1.0)
    return psutil.Process().memory_info().rss / 1e6, seconds
