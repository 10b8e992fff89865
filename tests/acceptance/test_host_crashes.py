"""A host is killed while it schedules a flow with its own rows, and while a task works on them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ebbs_and_flows import Failure, FlowService, FlowStatus, Worker
from tests.acceptance.host_process import PLACES, Base, Order, Sale, register
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("host_process.py")


def kill_at(place: str, url: str, folder: Path) -> None:
    """Start a host, and kill it once it says that it is there."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), url, place, str(folder / "never")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == f"{place}\n"
        finally:
            process.kill()


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_host_leaves_the_order_and_its_flow_or_neither(
    service: FlowService, database_url: str, tmp_path: Path, place: str
) -> None:
    Base.metadata.create_all(service.engine)
    kill_at(place, database_url, tmp_path)

    def rows() -> tuple[int, int]:
        with Session(service.engine) as session:
            count = select(func.count())
            return session.scalars(count.select_from(Order)).one(), session.scalars(count.select_from(Sale)).one()

    executions = service.find_flow_executions()
    if place == "before the commit":
        assert (rows(), executions) == ((0, 0), [])
        return
    assert rows() == (1, 0)
    (execution,) = executions
    expected = FlowStatus.RUNNING if place == "within the task" else FlowStatus.SCHEDULED
    assert execution.status is expected

    with Worker(register(service, "nowhere", tmp_path), poll_seconds=0.05).running() as worker:
        wait_until(lambda: worker.health().succeeded == 1, "the end of the flow")
    assert rows() == (1, 1)
    attempts = service.get_task_executions(execution.execution_id)
    lost = [Failure.LOST] if place == "within the task" else []
    assert [each.failure for each in attempts] == [*lost, None]
    assert service.get_flow_execution(execution.execution_id).execution_context["is_sold"] is True
    assert check_invariants(service.engine) == []
