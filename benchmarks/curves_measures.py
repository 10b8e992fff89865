"""The measurements of `curves.py`: one function a curve, which returns what it saw, round by round.

Sizes take turns within each round, call by call where a call is short, in an order that changes, so that the machine's
moods hit all alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.curves_flows import FLOW, TASKS, Flow, call_in_process, memory_in_flight, worker_processes
from benchmarks.curves_rows import Rows
from benchmarks.servers import Databases
from ebbs_and_flows import FlowStatus

Size = TypeVar("Size")

RUNNABLE = (FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED)
UNTIMED_CALLS = 3
"""Of each size, at the beginning."""

OWN = 1000
"""Executions that are there to be claimed, behind the others."""

CONCURRENCY = 32
"""Of a worker, where it is not what is measured."""

POLL_SECONDS = 1.0
"""How often a worker looks when nothing tells it: the default."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """That a worker is to take each time, by the rate that it had before."""
    calls: int
    """Claims of each size in a round."""
    flows: int
    """Flows of each size in a round, where they run one by one."""
    in_flight: tuple[int, ...]
    waiting: tuple[int, ...]
    finished: tuple[int, ...]
    carried: tuple[int, ...]
    """Bytes."""
    tasks: tuple[int, ...]
    latencies: int
    held: tuple[int, ...]
    processes: tuple[int, ...]


FULL = Plan(
    rounds=7,
    seconds=1.0,
    calls=20,
    flows=10,
    in_flight=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    waiting=(100, 1_000, 10_000, 100_000, 1_000_000),
    finished=(0, 1_000, 10_000, 100_000, 1_000_000),
    carried=(1_000, 10_000, 100_000, 1_000_000, 10_000_000),
    tasks=(10, 100, 1_000, 10_000),
    latencies=120,
    held=(10, 100, 1_000, 10_000),
    processes=(1, 2, 4),
)
QUICK = Plan(
    rounds=1,
    seconds=0.3,
    calls=5,
    flows=2,
    in_flight=(1, 8, 64),
    waiting=(100, 1_000, 10_000),
    finished=(0, 1_000, 10_000),
    carried=(1_000, 100_000, 1_000_000),
    tasks=(10, 100, 300),
    latencies=15,
    held=(10, 100, 1_000),
    processes=(1, 2),
)


@dataclass
class Line:
    """One line of a plot: by size, what each round has seen."""

    database: str
    panel: str = ""
    variant: str = ""
    points: dict[int, list[float]] = field(default_factory=dict)

    def add(self, size: int, value: float) -> None:
        """Note what was seen in a round."""
        self.points.setdefault(size, []).append(value)


def in_flight(databases: Databases, plan: Plan) -> list[Line]:
    """Tasks a second against executions in flight, in a fresh database each round."""
    line = Line(databases.name)
    flows = {size: max(20, 2 * size) for size in plan.in_flight}
    for number in range(plan.rounds + 1):
        flow = Flow(databases.create())
        rows = Rows(flow.service.engine)
        for size in shuffled(plan.in_flight):
            before = rows.add_waiting(flows[size], FLOW)
            flow.work_off_waiting(concurrency=size)
            rate = rows.tasks_per_second(before)
            if number > 0:  # the first round finds out how many flows the others need
                line.add(size, rate)
            flows[size] = int(max(4 * size, 20, rate * plan.seconds / TASKS))
        flow.close()
        databases.clear()
    return [line]


def claim(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds a claim against executions that wait and are due; as many are added at the end as were claimed."""
    flows = {size: Flow(databases.create()) for size in plan.waiting}
    for size, flow in flows.items():
        rows = Rows(flow.service.engine)
        rows.add_waiting(size, FLOW)
        rows.settle()
    return time_claims(databases, plan, flows, rounds=plan.rounds)


def claim_behind(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds a claim against executions that are in front of those to be claimed, and are not for this worker."""
    lines = []
    others = {
        "another queue": {"template": FLOW, "queue": "others"},
        "another template": {"template": "others"},
        "not yet due": {"template": FLOW, "due_in_seconds": 86_400.0},
    }
    for panel, which in others.items():
        flows = {size: Flow(databases.create()) for size in plan.waiting}
        for size, flow in flows.items():
            rows = Rows(flow.service.engine)
            rows.add_waiting(size, priority=1, **which)  # type: ignore[arg-type]  # it does not tell the values apart
            rows.add_waiting(OWN, FLOW)
            rows.settle()
        lines += time_claims(databases, plan, flows, panel, rounds=min(plan.rounds, 3))
        databases.clear()
    return lines


def time_claims(
    databases: Databases, plan: Plan, flows: dict[int, Flow], panel: str = "", *, rounds: int
) -> list[Line]:
    """Claim 1 and 100 from each of these, in turns."""
    lines = {limit: Line(databases.name, panel, f"{limit} at once") for limit in (1, 100)}
    for number, calls in enumerate([UNTIMED_CALLS, *[plan.calls] * rounds]):
        times: dict[tuple[int, int], list[float]] = {(size, limit): [] for size in flows for limit in lines}
        for _ in range(calls):
            for size, limit in shuffled(times):
                times[size, limit].append(claim_once(flows[size], limit))
                Rows(flows[size].service.engine).add_waiting(limit, FLOW, due_in_seconds=-1.0)
        if number > 0:
            for (size, limit), seen in times.items():
                lines[limit].add(size, statistics.median(seen))
    for flow in flows.values():
        flow.close()
    return list(lines.values())


def claim_once(flow: Flow, limit: int) -> float:
    """Claim as a worker does; the milliseconds that it took."""
    began = time.perf_counter()
    claims = flow.service.claim(
        flow.runner.templates, RUNNABLE, "curves", lease_seconds=3600, limit=limit, queues=("default",)
    )
    seconds = time.perf_counter() - began
    if len(claims) != limit:
        raise RuntimeError(f"{len(claims)} were claimed, not {limit}")
    return seconds * 1000


def finished(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds a step against executions that have finished."""
    one = Line(databases.name, "run_flow", "")
    many = Line(databases.name, f"Worker, {CONCURRENCY} in flight", "")
    flows = {size: Flow(databases.create()) for size in plan.finished}
    for size, flow in flows.items():
        if size:
            Rows(flow.service.engine).add_finished(size)
        Rows(flow.service.engine).settle()
    waiting = 4 * CONCURRENCY
    for number in range(plan.rounds + 1):  # the first round warms all up
        steps: dict[int, list[float]] = {size: [] for size in flows}
        for _ in range(plan.flows):
            for size in shuffled(flows):
                steps[size].append(flows[size].run_flow()[0] / TASKS)
        for size in shuffled(flows):
            rows = Rows(flows[size].service.engine)
            before = rows.add_waiting(waiting, FLOW)
            flows[size].work_off_waiting(concurrency=CONCURRENCY)
            rate = rows.tasks_per_second(before)
            if number > 0:
                one.add(size, statistics.median(steps[size]))
                many.add(size, 1000 / rate)
        waiting = int(max(4 * CONCURRENCY, rate * plan.seconds / TASKS))
    for flow in flows.values():
        flow.close()
    return [one, many]


def context(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds a step against the bytes that the flow carries: from the start of a task to that of the next one.

    And, once a flow, those until its first task has begun, in which the context is read.
    """
    flow = Flow(databases.create(), TASKS + 1)  # one more, whose start is the end of the last one
    shapes: dict[str, Callable[[int], dict[str, str]]] = {"10 entries": ten_entries, "entries of 1 kB": small_entries}
    step, worked, begin = (
        {shape: Line(databases.name, panel, shape) for shape in shapes}
        for panel in ("run_flow, a step", "Worker, a step", "taking a flow up")
    )
    contexts = {(shape, size): make(size) for shape, make in shapes.items() for size in plan.carried}
    for number in range(plan.rounds + 1):  # the first round warms all up
        runs: dict[tuple[str, int], list[tuple[float, float, float]]] = {each: [] for each in contexts}
        for _ in range(max(1, plan.flows // 2)):
            for each in shuffled(contexts):
                runs[each].append(flow.run_flow(contexts[each]))
        for shape, size in shuffled(contexts):
            steps = flow.work_off(max(1, plan.flows // 2), contexts[shape, size])
            if number > 0:
                begin[shape].add(size, statistics.median(run[1] for run in runs[shape, size]))
                step[shape].add(size, statistics.median(run[2] for run in runs[shape, size]))
                worked[shape].add(size, statistics.median(steps))
    flow.close()
    return [*step.values(), *worked.values(), *begin.values()]


def ten_entries(size: int) -> dict[str, str]:
    """A context of so many bytes in ten entries."""
    return {f"entry-{index}": "x" * (size // 10) for index in range(10)}


def small_entries(size: int) -> dict[str, str]:
    """A context of so many bytes in entries of 1,000 each."""
    return {f"entry-{index}": "x" * 1000 for index in range(size // 1000)}


def tasks(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds a step against the tasks that the flow has: from the start of a task to that of the next one."""
    one, worked = Line(databases.name, "run_flow"), Line(databases.name, "Worker, one flow at a time")
    flows = {size: Flow(databases.create(), size) for size in plan.tasks}
    for _ in range(min(plan.rounds, 3)):
        for size in shuffled(flows):
            times = max(1, 50 // size)
            one.add(size, statistics.median(flows[size].run_flow()[2] for _ in range(times)))
            worked.add(size, statistics.median(flows[size].work_off(times)))
    for flow in flows.values():
        flow.close()
    return [one, worked]


def latency(databases: Databases, plan: Plan) -> list[Line]:
    """Milliseconds from an execution's creation to its first attempt's start, by the database's clock.

    The worker is in another process, and idle: the next one is scheduled after the one before has run, at any moment of
    the second from one look to the next.
    """
    how = "told by NOTIFY" if databases.name == "PostgreSQL" else "looks every second"
    line = Line(databases.name, "", how)
    url = databases.create()
    flow = Flow(url)
    with worker_processes(1, url, poll_seconds=POLL_SECONDS):
        rows = Rows(flow.service.engine)
        before = rows.add_waiting(1, FLOW) + 1  # to warm it up
        wait_until_finished(rows)
        for _ in range(plan.latencies):
            scheduled = flow.runner.schedule_flow(FLOW, {"n": 1})
            deadline = time.monotonic() + 30
            while flow.service.get_flow_execution(scheduled).finished_at is None:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"execution {scheduled} has not finished after 30 s")
                time.sleep(0.02)
            time.sleep(random.uniform(0.0, POLL_SECONDS))
        for each in rows.latencies(before):
            line.add(0, each)
    flow.close()
    return [line]


def memory(databases: Databases, plan: Plan) -> list[Line]:
    """Megabytes of a process whose worker has so many executions in flight, and how long it took to take them up."""
    held, taken = Line(databases.name, "memory"), Line(databases.name, "time to take all up")
    for _ in range(min(plan.rounds, 3)):
        for size in shuffled(plan.held):
            url = databases.create()
            flow = Flow(url, 1)
            Rows(flow.service.engine).add_waiting(size, FLOW)
            flow.close()
            megabytes, seconds = call_in_process(memory_in_flight, url, size, 180.0, seconds=240.0)
            held.add(size, megabytes)
            taken.add(size, seconds)
            databases.clear()
    return [held, taken]


def processes(databases: Databases, plan: Plan) -> list[Line]:
    """Tasks a second of some worker processes that take from one queue, in a fresh database each."""
    line = Line(databases.name, "", f"{CONCURRENCY} in flight each")
    flows = 100
    for number in range(plan.rounds + 1):
        for size in shuffled(plan.processes):
            url = databases.create()
            flow = Flow(url)
            rows = Rows(flow.service.engine)
            with worker_processes(size, url, concurrency=CONCURRENCY, poll_seconds=0.05):
                rows.add_waiting(4 * CONCURRENCY, FLOW)  # to warm them up
                wait_until_finished(rows)
                before = rows.add_waiting(flows, FLOW)
                wait_until_finished(rows)
            rate = rows.tasks_per_second(before)
            if number > 0:
                line.add(size, rate)
            flows = int(max(4 * CONCURRENCY * max(plan.processes), rate * plan.seconds / TASKS))
            flow.close()
            databases.clear()
    return [line]


def wait_until_finished(rows: Rows) -> None:
    """Wait until nothing waits and nothing runs."""
    deadline = time.monotonic() + 120
    while rows.has_unfinished():
        if time.monotonic() > deadline:
            raise RuntimeError("not all executions have finished after 120 s")
        time.sleep(0.1)


def shuffled(sizes: Iterable[Size]) -> list[Size]:
    """The sizes in an order of chance."""
    found = list(sizes)
    random.shuffle(found)
    return found
