"""A worker that is killed leaves a database from which another process goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from ebbs_and_flows import Failure, FlowRunner, FlowService, FlowStatus, TaskStatus, TransitionError
from tests.acceptance.killed_worker import POINTS, flow
from tests.integration.invariants import check_invariants

WORKER = Path(__file__).with_name("killed_worker.py")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
@pytest.mark.parametrize("point", POINTS)
def test_another_process_goes_on_where_a_killed_one_was(service: FlowService, database_url: str, point: str) -> None:
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (effect VARCHAR(20))"))
    killed = subprocess.run(
        [sys.executable, str(WORKER), database_url, point],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=None,
        cwd=WORKER.parents[2],
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    execution_id = int(killed.stdout)
    left = service.get_flow_execution(execution_id)

    runner = FlowRunner(service)
    runner.register_flow_template(flow("nowhere"))
    assert runner.run_flow() is None
    if point == "after the transactional task committed":
        assert left.status is FlowStatus.SUCCEEDED
        with pytest.raises(TransitionError):
            runner.recover(execution_id)
        done = left
    else:
        assert left.status is FlowStatus.RUNNING
        done = runner.recover(execution_id)

    assert done.status is FlowStatus.SUCCEEDED
    assert dict(done.execution_context) == {
        "order_id": 17,
        "prepared": {"order": 17},
        "charged": ["order_id", "prepared"],
        "sold": "order_id prepared",
    }
    with service.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM effects")).scalar_one() == 1
    attempts = service.get_task_executions(execution_id)
    assert [each.name for each in attempts if each.status is TaskStatus.SUCCEEDED] == ["prepare", "charge", "sell"]
    lost = [(each.name, each.failure) for each in attempts if each.status is TaskStatus.FAILED]
    cut_off = {0: "charge", 1: "charge", 2: "sell", 3: "sell", 4: "sell"}.get(POINTS.index(point))
    assert lost == ([(cut_off, Failure.LOST)] if cut_off else [])
    assert check_invariants(service.engine) == []
