"""Poison: tasks that crash their process, never end, or take all memory: parked, while their neighbours finish."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import loky
import pytest

from ebbs_and_flows import Failure, FlowFilter, FlowRunner, FlowService, FlowStatus, FlowTemplate, Worker, task
from ebbs_and_flows.executions import RUNNABLE_STATUSES
from tests.acceptance.flows_for_processes import poison, steady
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]

NEIGHBOURS = 6


@pytest.fixture
def flows(sqlite_template: Path, tmp_path: Path) -> Iterator[FlowService]:
    """A service on SQLite, for what does not depend on the kind of database."""
    with FlowService(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'flows.db')}") as service:
        yield service


def standard_pool() -> ProcessPoolExecutor:
    """Two processes that start at once: forked from one without threads, which has imported the tasks already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.acceptance.flows_for_processes"])
    return ProcessPoolExecutor(2, mp_context=context)


def loky_pool() -> Executor:
    """Two processes of loky's, which do not end when they have been idle for a while."""
    pool: Executor = loky.ProcessPoolExecutor(2, timeout=None)
    return pool


POOLS: dict[str, Callable[[], Executor]] = {"standard library": standard_pool, "loky": loky_pool}


class Ward:
    """A culprit or several among innocent neighbours, all of them due."""

    def __init__(self, service: FlowService, *deeds: str, limited: bool = False) -> None:
        self.service = service
        self.runner = FlowRunner(service)
        self.runner.register_flow_template(poison(limited))
        self.runner.register_flow_template(steady())
        self.culprits = [self.runner.schedule_flow("poison", {"deed": deed}) for deed in deeds]
        self.neighbours = [
            # The long ones are there when the culprit strikes, the short ones have tasks before and after.
            self.runner.schedule_flow("steady", {"seconds": 0.5 if number % 2 else 0.05})
            for number in range(NEIGHBOURS)
        ]

    def failures(self, execution_id: int) -> list[Failure | None]:
        """How the attempts of an execution ended; `None` for a success."""
        return [each.failure for each in self.service.get_task_executions(execution_id)]

    def check(self, expected: list[Failure], *, spared: set[Failure | None]) -> None:
        """The culprits are parked after these failures, less the attempts that were stopped without blame; and the
        neighbours have succeeded, with no other failures than those they could not be spared.
        """
        for culprit in self.culprits:
            blamed = [each for each in self.failures(culprit) if each is not Failure.STOPPED]
            assert blamed == expected
            assert self.service.get_flow_execution(culprit).status is FlowStatus.FAILED
        for neighbour in self.neighbours:
            assert self.service.get_flow_execution(neighbour).status is FlowStatus.SUCCEEDED
            assert set(self.failures(neighbour)) <= {None, *spared}
        assert check_invariants(self.service.engine) == []


# --- in a pool of processes -------------------------------------------------------------------------------------------


ENDS = {"segfault": "was ended by SIGSEGV", "exit_at_once": "exited with code 3", "be_killed": "was ended by SIGKILL"}


@pytest.mark.parametrize(
    ("kind", "deeds"), [("standard library", ["segfault", "exit_at_once", "be_killed"]), ("loky", ["exit_at_once"])]
)
def test_who_crashes_a_pool_is_parked_and_nobody_else_loses_an_attempt(
    flows: FlowService, kind: str, deeds: list[str]
) -> None:
    ward = Ward(flows, *deeds)
    with POOLS[kind]() as pool:
        Worker(ward.runner, concurrency=8, executor=pool, poll_seconds=0.1).run(until_idle=True)
    ward.check([Failure.LOST] * 3, spared={Failure.STOPPED})
    for culprit, deed in zip(ward.culprits, deeds, strict=True):
        last = flows.get_task_executions(culprit)[-1]
        assert last.error_type == "WorkerLost"
        assert last.output == f"The process that ran this attempt {ENDS[deed]}."
    reason = flows.get_flow_status_history(ward.culprits[0])[-1].reason
    assert reason == "task 'misbehave' lost its worker 3 times, max_crashes is 3"


def test_who_may_have_been_told_to_end_is_parked_only_once_it_was_alone(flows: FlowService) -> None:
    ward = Ward(flows, "be_told_to_end")
    with standard_pool() as pool:
        Worker(ward.runner, concurrency=8, executor=pool, poll_seconds=0.1).run(until_idle=True)
    ward.check([Failure.LOST] * 3, spared={Failure.STOPPED})


@pytest.mark.parametrize(
    ("kind", "deed"),
    [
        ("standard library", "loop_for_ever"),
        ("standard library", "sleep_with_the_interpreter_locked"),
        ("loky", "sleep_with_the_interpreter_locked"),
    ],
)
def test_what_never_ends_in_a_pool_is_killed_at_its_limit(flows: FlowService, kind: str, deed: str) -> None:
    ward = Ward(flows, deed, limited=True)
    with POOLS[kind]() as pool:
        Worker(ward.runner, concurrency=8, executor=pool, poll_seconds=0.1).run(until_idle=True)
    ward.check([Failure.TIMEOUT] * 2, spared={Failure.STOPPED})
    attempt = flows.get_task_executions(ward.culprits[0])[-1]
    assert attempt.error_type == "TaskTimeoutError"
    assert attempt.finished_at is not None
    assert (attempt.finished_at - attempt.started_at).total_seconds() < 10.0


def test_a_task_that_takes_all_memory_fails_by_itself(flows: FlowService) -> None:
    ward = Ward(flows, "take_all_memory")
    with standard_pool() as pool:
        Worker(ward.runner, concurrency=8, executor=pool, poll_seconds=0.1).run(until_idle=True)
    ward.check([Failure.EXCEPTION] * 2, spared=set())
    assert flows.get_task_executions(ward.culprits[0])[-1].error_type == "MemoryError"


def test_a_pool_that_a_function_makes_is_made_anew_and_ended_by_the_worker(flows: FlowService) -> None:
    ward = Ward(flows, "exit_at_once")
    made: list[ProcessPoolExecutor] = []

    def make() -> ProcessPoolExecutor:
        made.append(standard_pool())
        return made[-1]

    Worker(ward.runner, concurrency=8, executor=make, poll_seconds=0.1).run(until_idle=True)
    ward.check([Failure.LOST] * 3, spared={Failure.STOPPED})
    assert len(made) == 4
    for pool in made:
        with pytest.raises(RuntimeError):
            pool.submit(int)


# --- in the worker's own process --------------------------------------------------------------------------------------


def supervise(service: FlowService, is_done: Callable[[], bool], crashes: set[int]) -> list[int]:
    """Keep a worker running as a supervisor does, with a new process for each that crashes; how each of them ended."""
    url = service.engine.url.render_as_string(hide_password=False)
    code = f"from tests.acceptance.flows_for_processes import work; work({url!r})"
    ends: list[int] = []
    while not is_done():
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
            try:
                wait_until(lambda process=process: process.poll() is not None or is_done(), "the end", 60.0)
                process.terminate()
                ends.append(process.wait(20))
            finally:
                process.kill()
        assert ends[-1] in {*crashes, 0}
    return ends


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSEGV on Windows")
def test_who_crashes_its_worker_is_parked_and_its_neighbours_finish(service: FlowService) -> None:
    ward = Ward(service, "segfault", "exit_at_once")

    def is_done() -> bool:
        left = service.find_flow_executions(with_contexts=False)
        return all(each.status in (FlowStatus.SUCCEEDED, FlowStatus.FAILED) for each in left)

    ends = supervise(service, is_done, {-signal.SIGSEGV, 3})
    assert len(ends) <= 3 * len(ward.culprits) + 1
    # What a process holds when it dies is lost, so neighbours lose attempts as well; but never the last that they have.
    ward.check([Failure.LOST] * 3, spared={Failure.LOST, Failure.STOPPED})
    for neighbour in ward.neighbours:
        lost = [each.name for each in service.get_task_executions(neighbour) if each.failure is Failure.LOST]
        assert max(map(lost.count, lost), default=0) < 3


@pytest.mark.parametrize("is_patient", [True, False], ids=["they end in time", "one goes on"])
def test_an_execution_on_its_last_chance_is_held_once_the_others_have_ended(
    service: FlowService, is_patient: bool
) -> None:
    gate = threading.Event()

    @task(outputs="beside")
    def look_around() -> int:
        running = service.find_flow_executions(FlowFilter(statuses=[FlowStatus.RUNNING]))
        gate.set()
        return len(running) - 1

    @task(outputs="waited")
    def wait() -> float:
        gate.wait(0.2 if is_patient else 20.0)
        return 0.2

    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("look", [look_around]))
    last_chance = runner.schedule_flow("look")
    for _ in range(2):
        service.claim(runner.templates, RUNNABLE_STATUSES, "a worker that is dead", lease_seconds=0.01)
        wait_until(lambda: service.recover_expired(runner.templates), "the end of the lease")
    runner.register_flow_template(FlowTemplate("wait", [wait]))
    for _ in range(3):
        runner.schedule_flow("wait")
    Worker(runner, concurrency=4, lease_seconds=1.0, poll_seconds=0.1).run(until_idle=True)
    attempts = service.get_task_executions(last_chance)
    assert [each.failure for each in attempts] == [Failure.LOST, Failure.LOST, Failure.STOPPED, None]
    assert str(attempts[2].output).startswith("Not started: one more lost worker would park task 'look_around'")
    beside = service.get_flow_execution(last_chance).execution_context["beside"]
    assert (beside == 0) is is_patient
    assert check_invariants(service.engine) == []


def test_what_never_ends_in_a_thread_is_left_at_its_limit(flows: FlowService) -> None:
    ward = Ward(flows, "loop_for_ever", limited=True)
    url = flows.engine.url.render_as_string(hide_password=False)
    code = (
        "from tests.acceptance.flows_for_processes import *\n"
        f"with FlowService({url!r}) as service:\n"
        "    runner = FlowRunner(service)\n"
        "    for template in (poison(timeout=True), steady()):\n"
        "        runner.register_flow_template(template)\n"
        "    Worker(runner, concurrency=2, poll_seconds=0.1).run(until_idle=True)\n"
    )
    # Two threads go on for ever: as many as there are places.
    worker = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert worker.returncode == 0
    ward.check([Failure.TIMEOUT] * 2, spared=set())
