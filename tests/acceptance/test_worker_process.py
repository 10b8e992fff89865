"""Workers in processes of their own: stopped, thawed after their lease, told to end, forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from ebbs_and_flows import Failure, FlowService, FlowStatus, TaskStatus, Worker
from tests.acceptance.worker_process import register
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("worker_process.py")


class WorkerProcess:
    """A running `worker_process.py` and what it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.name = self.next_line()

    def next_line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)


@contextmanager
def started(url: str, *, lease_seconds: float = 30, grace_seconds: float = 10) -> Iterator[WorkerProcess]:
    """Start one, and make sure that it ends."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), url, str(lease_seconds), str(grace_seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process:
        try:
            yield WorkerProcess(process)
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@pytest.fixture(autouse=True)
def _history_is_sound(service: FlowService) -> Iterator[None]:
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (process INTEGER)"))
    yield
    assert check_invariants(service.engine) == []


@pytest.mark.parametrize("flow", ["hold", "sell"])
def test_a_zombie_that_wakes_after_its_lease_changes_nothing(
    service: FlowService, database_url: str, database: str, tmp_path: Path, flow: str
) -> None:
    if database == "sqlite":
        flow = "hold"  # a zombie within a transaction holds the write lock there: nobody could take over
    gate = tmp_path / "gate"
    runner = register(service)
    with started(database_url, lease_seconds=0.5) as zombie:
        execution_id = runner.schedule_flow(flow, {"gate": str(gate)})
        assert zombie.next_line() == f"entered {flow}"
        zombie.send(signal.SIGSTOP)
        gate.touch()
        with Worker(runner, lease_seconds=10, poll_seconds=0.05).running():
            wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
        zombie.send(signal.SIGCONT)
        said = [zombie.next_line()]
        while said[-1] != f"left {flow}":
            said.append(zombie.next_line())
        zombie.send(signal.SIGTERM)
        assert zombie.process.wait(20) == 0
    lost, done = service.get_task_executions(execution_id)
    assert (lost.worker, lost.failure, lost.error_type) == (zombie.name, Failure.LOST, "WorkerLost")
    assert done.status is TaskStatus.SUCCEEDED
    context = service.get_flow_execution(execution_id).execution_context
    assert context["held" if flow == "hold" else "sold"] == os.getpid()
    with service.engine.connect() as connection:
        effects = connection.scalars(text("SELECT process FROM effects")).all()
    assert effects == ([] if flow == "hold" else [os.getpid()])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_end_and_claims_nothing_more(
    service: FlowService, database_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    gate = tmp_path / "gate"
    runner = register(service)
    with started(database_url) as worker:
        running = runner.schedule_flow("hold", {"gate": str(gate)})
        assert worker.next_line() == "entered hold"
        worker.send(number)
        assert worker.next_line() == "asked to stop"
        waiting = runner.schedule_flow("hold", {"gate": str(gate)})
        gate.touch()
        assert worker.process.wait(20) == 0
    assert service.get_flow_execution(running).status is FlowStatus.SUCCEEDED
    assert service.get_flow_execution(waiting).status is FlowStatus.SCHEDULED


def test_a_second_signal_hands_back_at_once(service: FlowService, database_url: str, tmp_path: Path) -> None:
    runner = register(service)
    with started(database_url, grace_seconds=600) as worker:
        execution_id = runner.schedule_flow("be_deaf", {"gate": str(tmp_path / "never")})
        assert worker.next_line() == "entered be_deaf"
        worker.send(signal.SIGTERM)
        worker.send(signal.SIGINT)
        assert worker.process.wait(20) == 0
    (attempt,) = service.get_task_executions(execution_id)
    assert (attempt.failure, attempt.error_type) == (Failure.STOPPED, "WorkerStopped")
    assert service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED


def test_a_killed_workers_flow_goes_on_within_lease_and_poll_and_a_second(
    service: FlowService, database_url: str, tmp_path: Path
) -> None:
    lease_seconds, poll_seconds = 1.0, 0.1
    gate = tmp_path / "gate"
    runner = register(service)
    with started(database_url, lease_seconds=lease_seconds) as worker:
        execution_id = runner.schedule_flow("hold", {"gate": str(gate)})
        assert worker.next_line() == "entered hold"
        worker.send(signal.SIGKILL)
        worker.process.wait(20)
        lease_ends_at = service.get_flow_execution(execution_id).lease_expires_at
    assert lease_ends_at is not None
    gate.touch()
    with Worker(runner, lease_seconds=lease_seconds, poll_seconds=poll_seconds).running():
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
    lost, done = service.get_task_executions(execution_id)
    assert lost.finished_at is not None
    assert (done.started_at - lease_ends_at).total_seconds() < poll_seconds + 1


def test_a_forked_child_leaves_its_parents_connections_alone(database_url: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("forked.py")), database_url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == ["child", "parent 0 2"]
