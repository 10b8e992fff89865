"""The checker of the invariants can fail: each row that is corrupted here is one that it names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from sqlalchemy import text
from tenacity.wait import wait_none

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowStatus, FlowTemplate, RetryPolicy, Task, task
from tests.integration.invariants import check_invariants


@task(outputs="total")
def add_up(order: int) -> int:
    return order + 1


class Charge(Task):
    """Fails as often as it was told to."""

    retry = RetryPolicy(max_attempts=2, wait=wait_none())

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def run(self, context: ExecutionContext) -> ExecutionContext:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no answer")
        return context.copy(receipt="r-17")


def run_flow(runner: FlowRunner, failures: int) -> int:
    """Run a flow of two tasks: the steps 1 to 8 where the second one fails once."""
    runner.register_flow_template(FlowTemplate("order", [add_up, Charge(failures)]))
    execution_id = runner.schedule_flow("order", {"order": 16})
    runner.run_until_idle()
    return execution_id


@dataclass(frozen=True)
class Corruption:
    """What is done to the rows of a flow that succeeded after one retry, and the violation that it is."""

    id: str
    sql: tuple[str, ...]
    violation: str


ATTEMPT = "UPDATE ebbs_task_executions SET"
TRANSITION = "UPDATE ebbs_flow_transitions SET"
EXECUTION = "UPDATE ebbs_flow_executions SET"
NEW_TRANSITION = (
    "INSERT INTO ebbs_flow_transitions (flow_execution_id, flow_execution_step, from_status, to_status, at, task_index)"
)

# Its steps: 1 CREATED, 2 SCHEDULED, 3 RUNNING, 4 add_up, 5 Charge (FAILED), 6 RESCHEDULED, 7 RUNNING, 8 Charge,
# 9 SUCCEEDED.
CORRUPTIONS = [
    Corruption(
        "a gap in the steps", (f"{ATTEMPT} flow_execution_step = 50 WHERE flow_execution_step = 8",), "steps: they are"
    ),
    Corruption(
        "a transition is missing",
        ("DELETE FROM ebbs_flow_transitions WHERE flow_execution_step = 2",),
        "steps: they are",
    ),
    Corruption(
        "one step is taken twice",
        (f"{NEW_TRANSITION} SELECT 1, 4, 'CREATED', 'SCHEDULED', created_at, 0 FROM ebbs_flow_executions",),
        "steps: they are",
    ),
    Corruption(
        "the execution is at another step", (f"{EXECUTION} execution_step = 8",), "steps: the execution is at 8"
    ),
    Corruption(
        "a history without any row",
        ("DELETE FROM ebbs_flow_transitions", "DELETE FROM ebbs_task_executions"),
        "steps: the execution is at 9",
    ),
    Corruption(
        "a broken chain", (f"{TRANSITION} from_status = 'FAILED' WHERE flow_execution_step = 7",), "follows RESCHEDULED"
    ),
    Corruption(
        "an edge that is not declared",
        (
            f"{TRANSITION} to_status = 'FAILED' WHERE flow_execution_step = 6",
            f"{TRANSITION} from_status = 'FAILED' WHERE flow_execution_step = 7",
        ),
        "FAILED -> RUNNING at step 7 is no declared edge",
    ),
    Corruption(
        "a final status has a successor",
        (
            f"{NEW_TRANSITION} SELECT 1, 10, 'SUCCEEDED', 'RESCHEDULED', updated_at, 2 FROM ebbs_flow_executions",
            f"{EXECUTION} execution_step = 10, status = 'RESCHEDULED'",
        ),
        "follows the final SUCCEEDED",
    ),
    Corruption(
        "a status without its transition", (f"{EXECUTION} status = 'CANCELLED'",), "chain: the execution is CANCELLED"
    ),
    Corruption(
        "a task begins before the one before it succeeded",
        (
            f"{ATTEMPT} status = 'FAILED', failure = 'EXCEPTION', entries = NULL WHERE flow_execution_step = 4",
            f"{ATTEMPT} error_type = 'ValueError' WHERE flow_execution_step = 4",
        ),
        "the next one due is task 0",
    ),
    Corruption("a task is left out", (f"{ATTEMPT} task_index = 3 WHERE flow_execution_step = 8",), "begins at task 3"),
    Corruption(
        "a task succeeds twice", (f"{ATTEMPT} task_index = 0 WHERE flow_execution_step = 5",), "begins at task 0"
    ),
    Corruption(
        "the execution stands elsewhere",
        (f"{EXECUTION} current_task_index = 1",),
        "order: the execution stands at task 1",
    ),
    Corruption("a number is given twice", (f"{ATTEMPT} attempt = 1 WHERE flow_execution_step = 8",), "numbered [1, 1]"),
    Corruption("a number is left out", (f"{ATTEMPT} attempt = 3 WHERE flow_execution_step = 8",), "numbered [1, 3]"),
    Corruption(
        "an end without a time", (f"{ATTEMPT} finished_at = NULL WHERE flow_execution_step = 8",), "finished at None"
    ),
    Corruption(
        "a failure without its kind", (f"{ATTEMPT} failure = NULL WHERE flow_execution_step = 5",), "with failure None"
    ),
    Corruption(
        "a failed attempt adds to the context",
        (f"{ATTEMPT} entries = '{{}}' WHERE flow_execution_step = 5",),
        "has added to the context",
    ),
    Corruption(
        "an attempt runs in an execution at rest",
        (f"{ATTEMPT} status = 'RUNNING', finished_at = NULL WHERE flow_execution_step = 8",),
        "RUNNING in an execution that is SUCCEEDED",
    ),
    Corruption("two attempts run at once", (f"{ATTEMPT} status = 'RUNNING'",), "3 attempts are RUNNING at once"),
    Corruption(
        "an attempt still runs after the next has begun",
        (f"{ATTEMPT} status = 'RUNNING' WHERE flow_execution_step = 4",),
        "came after it",
    ),
    Corruption(
        "a step back in time",
        (f"{TRANSITION} at = '2001-01-01 00:00:00.000000' WHERE flow_execution_step = 7",),
        "time: step 7",
    ),
    Corruption(
        "an attempt ends before it begins",
        (f"{ATTEMPT} finished_at = '2001-01-01 00:00:00.000000' WHERE flow_execution_step = 8",),
        "and finished at 2001",
    ),
    Corruption(
        "an attempt ends after the next has begun",
        (f"{ATTEMPT} finished_at = '2099-01-01 00:00:00.000000' WHERE flow_execution_step = 4",),
        "has been before it",
    ),
    Corruption(
        "an update before the last step", (f"{EXECUTION} updated_at = created_at",), "time: the execution was updated"
    ),
    Corruption(
        "an execution ends before it begins",
        (f"{EXECUTION} finished_at = '2001-01-01 00:00:00.000000'",),
        "time: the execution began",
    ),
]


@pytest.mark.parametrize("corruption", [pytest.param(each, id=each.id) for each in CORRUPTIONS])
def test_a_corrupted_history_is_found(corruption: Corruption, runner: FlowRunner, database_url: str) -> None:
    run_flow(runner, failures=1)
    assert check_invariants(database_url) == []

    with runner.service.engine.begin() as connection:
        for statement in corruption.sql:
            connection.execute(text(statement))

    violations = check_invariants(database_url)
    assert any(corruption.violation in violation for violation in violations), violations


def test_a_database_without_executions_has_no_violations(database_url: str) -> None:
    assert check_invariants(database_url) == []


def test_an_engine_is_taken_as_well_as_a_url(service: FlowService, runner: FlowRunner) -> None:
    run_flow(runner, failures=0)
    assert check_invariants(service.engine) == []


def test_a_flow_that_is_under_way_has_no_violations(runner: FlowRunner, database_url: str) -> None:
    execution_id = run_flow(runner, failures=2)
    runner.reschedule_flow_execution(execution_id, from_task="add_up")
    assert check_invariants(database_url) == []

    execution = runner.service.update_flow_status(execution_id, FlowStatus.RUNNING)
    runner.service.create_task_execution(execution)
    assert check_invariants(database_url) == []

    assert runner.recover(execution_id).status is FlowStatus.SUCCEEDED
    assert check_invariants(database_url) == []


def test_a_re_run_from_an_earlier_task_is_no_violation(runner: FlowRunner, database_url: str) -> None:
    execution_id = run_flow(runner, failures=2)
    runner.reschedule_flow_execution(execution_id, from_task="add_up")
    runner.run_until_idle()

    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert check_invariants(database_url) == []


def test_a_cancelled_flow_has_no_violations(runner: FlowRunner, database_url: str) -> None:
    execution_id = run_flow(runner, failures=2)
    runner.cancel_flow_execution(execution_id)
    assert check_invariants(database_url) == []
