"""A process that is killed, wherever that may be, leaves a database from which another one goes on.

One small flow is killed at each of its statements, commits and task bodies in turn, at some hundred places.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import text

from ebbs_and_flows import (
    Failure,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    TaskExecution,
    TaskStatus,
    TransitionError,
    Worker,
)
from tests.acceptance.killed_worker import PLAIN_TASKS, TASKS, Outside, flow, key_of
from tests.integration.invariants import Expected, check_invariants
from tests.waiting import wait_until

PROCESS = Path(__file__).with_name("killed_worker.py")

WRITES = (
    "INSERT INTO ebbs_flow_executions",
    "INSERT INTO ebbs_flow_transitions",
    "INSERT INTO ebbs_task_executions",
    "INSERT INTO effects",
    "UPDATE ebbs_flow_executions",
    "UPDATE ebbs_task_executions",
)
PLACES = {f"{when} {write}" for when in ("before", "after") for write in WRITES}
PLACES |= {"before COMMIT", "after the transaction", *(f"in {name}" for name in TASKS)}
"""At all of these somebody was killed, or the test has not tested what it says."""

ONE_STATEMENT = {
    f"{when} {write} ebbs_task_executions" for when in ("before", "after") for write in ("INSERT INTO", "UPDATE")
}
"""On PostgreSQL these are parts of statements that write another table first: there is nothing between them."""


@dataclass
class Death:
    """What is known of one process that was to be killed, and of what it left behind."""

    point: int
    """Its number, from 1; 0 is the one that lived."""
    place: str | None = None
    """Where it was to die,"""
    time: int = 1
    """at the n-th time that it came there."""
    scheduled: int | None = None
    """The id that its `schedule_flow` returned, if it got that far."""
    ended: int | None = None
    """How the process ended: minus a signal, or 0 where it did not come to that place."""
    status: FlowStatus | None = None
    """Of its execution, as it left it; `None` where there is none."""
    cut_off: list[str] = field(default_factory=list)
    """The task whose attempt it left open, if any."""


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    folder = tmp_path / "outside"
    folder.mkdir()
    return Outside(folder)


@pytest.fixture
def everywhere_killed(
    service: FlowService, database_url: str, how: str, tmp_path: Path, outside: Outside
) -> list[Death]:
    """One death for each place that the flow has."""
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (point INTEGER)"))
    # "This process is multi-threaded" is a warning of Python 3.12 at a fork, and would be the test's own mistake.
    command = [sys.executable, "-W", "error:This process:DeprecationWarning", str(PROCESS), database_url, how]
    told = subprocess.run(
        [*command, str(tmp_path / "outside")],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=PROCESS.parents[2],
    )
    assert told.returncode == 0, told.stderr
    deaths: dict[int, Death] = {}
    for line in told.stdout.splitlines():
        facts = json.loads(line)
        death = deaths.setdefault(facts["point"], Death(facts["point"]))
        for name, value in facts.items():
            setattr(death, name, value)
    for death in deaths.values():
        # What a worker's other threads send beside the flow differs a little from run to run.
        assert death.ended in (-signal.SIGKILL, 0), f"{death}\n{told.stderr}"
        for execution in service.find_flow_executions(FlowFilter(idempotency_key=key_of(death.point))):
            death.status = execution.status
            death.cut_off = [
                each.name
                for each in service.get_task_executions(execution.execution_id)
                if each.status is TaskStatus.RUNNING
            ]
    return list(deaths.values())


@pytest.fixture
def survivor(service: FlowService, everywhere_killed: list[Death], outside: Outside) -> FlowRunner:
    """Another process, as far as the database can tell, which knows all the templates."""
    runner = FlowRunner(service)
    for death in everywhere_killed:
        runner.register_flow_template(flow(death.point, outside, lambda _place: None))
    return runner


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("how", ["worker"])
def test_wherever_a_worker_is_killed_another_one_finishes_its_flow_once_its_lease_has_expired(
    service: FlowService, survivor: FlowRunner, everywhere_killed: list[Death], outside: Outside
) -> None:
    ids = ask_again(survivor, everywhere_killed)
    worker = Worker(survivor, concurrency=16, poll_seconds=0.05)
    with worker.running():
        wait_until(lambda: is_all_at_rest(service), "the end of all")
    check_each(service, everywhere_killed, ids, outside)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("how", ["runner"])
def test_wherever_a_runner_is_killed_another_one_finishes_its_flow_once_it_is_told_of_the_death(
    service: FlowService, survivor: FlowRunner, everywhere_killed: list[Death], outside: Outside
) -> None:
    ids = ask_again(survivor, everywhere_killed)
    survivor.run_until_idle()
    for death in everywhere_killed:
        execution_id = ids[death.point]
        if death.status is FlowStatus.RUNNING:
            assert service.get_flow_execution(execution_id).status is FlowStatus.RUNNING, "its lease holds"
            survivor.recover(execution_id)
            survivor.run_until_idle()
        else:
            with pytest.raises(TransitionError):
                survivor.recover(execution_id)
    check_each(service, everywhere_killed, ids, outside)


def ask_again(runner: FlowRunner, deaths: list[Death]) -> dict[int, int]:
    """Schedule each flow again under its key, as a caller does who got no answer: the execution's id by its point."""
    ids = {
        each.point: runner.schedule_flow(
            key_of(each.point), {"order_id": each.point}, idempotency_key=key_of(each.point)
        )
        for each in deaths
    }
    for each in deaths:
        assert each.scheduled in (ids[each.point], None), "what was acknowledged is there"
        assert each.scheduled is None or each.status is not None, "it was there before it was asked for again"
    return ids


def is_all_at_rest(service: FlowService) -> bool:
    """Whether every execution is final, or has failed."""
    at_rest = {FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.CANCELLED}
    left = FlowFilter(statuses=frozenset(FlowStatus) - at_rest, limit=1)
    return not service.find_flow_executions(left, with_contexts=False)


def is_postgresql(service: FlowService) -> bool:
    """Whether this service is on PostgreSQL."""
    return service.engine.dialect.name == "postgresql"


def check_each(service: FlowService, deaths: list[Death], ids: dict[int, int], outside: Outside) -> None:
    """Every flow has succeeded, each effect is there once, and each start is explained."""
    killed = [each for each in deaths if each.ended == -signal.SIGKILL]
    assert {each.place for each in killed} >= PLACES - (ONE_STATEMENT if is_postgresql(service) else set())
    assert len(killed) > 0.8 * len(deaths)
    assert {each.status for each in deaths} == {
        None,
        FlowStatus.SCHEDULED,
        FlowStatus.RUNNING,
        FlowStatus.RESCHEDULED,
        FlowStatus.SUCCEEDED,
    }
    assert {name for each in deaths for name in each.cut_off} == set(TASKS)
    for death in deaths:
        execution = service.get_flow_execution(ids[death.point])
        assert execution.status is FlowStatus.SUCCEEDED, death
        assert dict(execution.execution_context) == {
            "order_id": death.point,
            "prepared": {"order": death.point},
            "fetched": (death.point,),
            "charged": ["fetched", "order_id", "prepared"],
            "sold": "fetched order_id prepared",
        }
        check_attempts(death, service.get_task_executions(execution.execution_id), outside.starts(death.point))
    with service.engine.connect() as connection:
        effects = sorted(connection.scalars(text("SELECT point FROM effects")))
        executions = connection.scalar(text("SELECT count(*) FROM ebbs_flow_executions"))
    assert effects == sorted(ids), "one for each flow"
    assert executions == len(ids)
    bounds = {"charge": 2}
    assert check_invariants(service.engine, Expected(max_attempts=bounds, no_lease_has_expired=True)) == []


def check_attempts(death: Death, attempts: list[TaskExecution], starts: list[str]) -> None:
    """What was cut off is recorded as lost, and nothing else is; no plain task started without an attempt."""
    assert [each.name for each in attempts if each.status is TaskStatus.SUCCEEDED] == list(TASKS), death
    assert [each.name for each in attempts if each.failure is Failure.LOST] == death.cut_off, death
    others = [each for each in attempts if each.failure not in (None, Failure.LOST)]
    assert [each.name for each in others] in ([], ["charge"]), death
    assert [each.error_type for each in others] in ([], ["ConnectionError"]), death
    started, recorded = Counter(starts), Counter(each.name for each in attempts)
    for name in PLAIN_TASKS:
        cut_off = death.cut_off.count(name)
        assert recorded[name] - cut_off <= started[name] <= recorded[name], (death, starts)
