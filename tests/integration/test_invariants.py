"""The checker of the invariants can fail: each row that is corrupted here is one that it names."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity.wait import wait_none

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Task,
    TransactionalTask,
    schema,
    task,
)
from tests.integration.invariants import (
    NOW,
    Expected,
    check_effects,
    check_invariants,
    check_schedules,
    check_starts,
    digest,
)


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
    Corruption(
        "a task succeeds twice under other numbers",
        (
            f"{ATTEMPT} name = 'add_up' WHERE flow_execution_step IN (5, 8)",
            f"{ATTEMPT} attempt = attempt + 1 WHERE flow_execution_step IN (5, 8)",
        ),
        "that task has succeeded as task 0",
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
        "an attempt under an epoch that is over",
        (f"{ATTEMPT} epoch = 1 WHERE flow_execution_step = 8",),
        "written under epoch 1, it began after claim 2",
    ),
    Corruption(
        "an attempt under an epoch to come",
        (f"{ATTEMPT} epoch = 2 WHERE flow_execution_step = 5",),
        "written under epoch 2, it began after claim 1",
    ),
    Corruption("a claim that did not raise the epoch", (f"{EXECUTION} epoch = 1",), "the execution is at epoch 1"),
    Corruption(
        "an attempt of another worker than the claim's",
        (f"{ATTEMPT} worker = 'somebody' WHERE flow_execution_step = 8",),
        "is somebody's, the claim was",
    ),
    Corruption(
        "an end that another worker than the claim's has written",
        (f"{TRANSITION} worker = 'somebody' WHERE flow_execution_step = 6",),
        "somebody wrote step 6, the claim was",
    ),
    Corruption(
        "an attempt begins before the claim",
        (
            f"{TRANSITION} flow_execution_step = 4 WHERE flow_execution_step = 3",
            f"{ATTEMPT} flow_execution_step = 3 WHERE flow_execution_step = 4",
        ),
        "began while the execution was SCHEDULED",
    ),
    Corruption("a lease at rest", (f"{EXECUTION} lease_owner = 'somebody'",), "SUCCEEDED under the lease"),
    Corruption("a claim without a lease", (f"{EXECUTION} status = 'RUNNING'",), "RUNNING under the lease"),
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


# --- what is checked only where the caller says what to expect ------------------------------------------------------


def test_more_failures_than_the_policy_allows_are_found(runner: FlowRunner, database_url: str) -> None:
    run_flow(runner, failures=2)  # parked after two attempts, which is what the policy says
    assert check_invariants(database_url, Expected(max_attempts={"Charge": 2})) == []
    (violation,) = check_invariants(database_url, Expected(max_attempts={"Charge": 1}))
    assert "2 attempts at 'Charge' ended with EXCEPTION or TIMEOUT, not 1 at most" in violation


def test_a_re_run_by_hand_grants_one_attempt_more(runner: FlowRunner, database_url: str) -> None:
    execution_id = run_flow(runner, failures=3)
    runner.reschedule_flow_execution(execution_id)
    runner.run_until_idle()
    assert check_invariants(database_url, Expected(max_attempts={"Charge": 2})) == []


def test_more_lost_workers_than_the_policy_allows_are_found(runner: FlowRunner, database_url: str) -> None:
    run_flow(runner, failures=2)
    change(runner, f"{ATTEMPT} failure = 'LOST' WHERE name = 'Charge'")
    assert check_invariants(database_url, Expected(max_crashes={"Charge": 2})) == []
    (violation,) = check_invariants(database_url, Expected(max_crashes={"Charge": 0}))
    assert "2 attempts at 'Charge' ended with LOST, not 0 at most" in violation


def test_a_lease_that_has_expired_is_found(runner: FlowRunner, database_url: str) -> None:
    expected = Expected(no_lease_has_expired=True)
    run_flow(runner, failures=2)
    execution_id = runner.schedule_flow("order", {"order": 17})
    runner.service.update_flow_status(execution_id, FlowStatus.RUNNING, lease_seconds=600)
    assert check_invariants(database_url, expected) == []

    change(runner, f"{EXECUTION} lease_expires_at = created_at WHERE execution_id = {execution_id}")
    (violation,) = check_invariants(database_url, expected)
    assert violation.startswith("lease: it expired at")


# --- what tasks did outside, and what callers were told -------------------------------------------------------------


class Noting(Task):
    """A plain task that notes its start outside, and what it received in its own context."""

    retry = RetryPolicy(max_attempts=3, wait=wait_none())

    def __init__(self, service: FlowService, failures: int = 0) -> None:
        self.service = service
        self.failures = failures

    def run(self, context: ExecutionContext) -> ExecutionContext:
        start = f"start-{self.failures}"
        with self.service.engine.begin() as connection:
            connection.execute(
                text("INSERT INTO starts (flow_key, task, start, process) VALUES (:key, 'Noting', :start, :process)"),
                {"key": context["key"], "start": start, "process": os.getpid()},
            )
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no answer")
        return noted(context, "Noting", start)


class Selling(TransactionalTask):
    """A transactional task that leaves its effect."""

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        session.execute(text("INSERT INTO effects VALUES (:key, 'Selling', 'sold')"), {"key": context["key"]})
        return noted(context, "Selling", "sold")


def noted(context: ExecutionContext, name: str, value: str) -> ExecutionContext:
    return context.without("received").copy({name: value, "received": digest(context)})


NOTED = Expected(received="received")
STARTED, SOLD = ("Noting",), ("Selling",)


@pytest.fixture
def noted_flow(runner: FlowRunner) -> FlowRunner:
    """A flow that succeeded after one retry: the steps are those of the one above, with its failure at the first."""
    with runner.service.engine.begin() as connection:
        now = "clock_timestamp()" if connection.dialect.name == "postgresql" else f"({NOW['sqlite'][7:]})"
        kind = "TIMESTAMP WITH TIME ZONE" if connection.dialect.name == "postgresql" else "TEXT"
        connection.execute(text("CREATE TABLE effects (flow_key TEXT, task TEXT, effect TEXT)"))
        connection.execute(
            text(
                f"CREATE TABLE starts (flow_key TEXT, task TEXT, start TEXT, process INTEGER, at {kind} DEFAULT {now})"
            )
        )
    tasks = [Noting(runner.service, failures=1), Selling()]
    runner.register_flow_template(FlowTemplate("noted", tasks))
    runner.schedule_flow("noted", {"key": "k-1", "received": ""}, idempotency_key="k-1")
    runner.run_until_idle()
    return runner


def change(runner: FlowRunner, sql: str) -> None:
    """Corrupt a row."""
    with runner.service.engine.begin() as connection:
        connection.execute(text(sql))


def test_what_tasks_have_noted_is_explained_by_the_history(noted_flow: FlowRunner, database_url: str) -> None:
    assert check_invariants(database_url, NOTED) == []
    assert check_effects(database_url, SOLD) == []
    assert check_starts(database_url, STARTED) == []


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param(f'{TRANSITION} entries = \'{{"key": "k-2"}}\' WHERE flow_execution_step = 1', id="another value"),
        pytest.param(f"{TRANSITION} entries = '{{}}' WHERE flow_execution_step = 1", id="a lost entry"),
        pytest.param(f"{ATTEMPT} dropped = '[\"key\"]' WHERE flow_execution_step = 7", id="a dropped entry"),
        pytest.param(f"{ATTEMPT} entries = NULL WHERE flow_execution_step = 7", id="a success that was not stored"),
    ],
)
def test_a_context_other_than_the_one_received_is_found(noted_flow: FlowRunner, database_url: str, sql: str) -> None:
    change(noted_flow, sql)
    violations = check_invariants(database_url, NOTED)
    assert any(violation.startswith("context: ") for violation in violations), violations


@pytest.mark.parametrize(
    ("sql", "violation"),
    [
        ("DELETE FROM effects", "'sold' of 'Selling' is there 0 times, 1 attempts succeeded"),
        ("INSERT INTO effects VALUES ('k-1', 'Selling', 'sold')", "is there 2 times, 1 attempts succeeded"),
        ("INSERT INTO effects VALUES ('k-1', 'Selling', 'again')", "'again' of 'Selling' is there 1 times, 0 attempts"),
        (
            f"{ATTEMPT} status = 'FAILED', failure = 'LOST', entries = NULL WHERE name = 'Selling'",
            "is there 1 times, 0 attempts succeeded",
        ),
    ],
)
def test_an_effect_that_is_missing_or_too_many_is_found(
    noted_flow: FlowRunner, database_url: str, sql: str, violation: str
) -> None:
    change(noted_flow, sql)
    assert any(violation in each for each in check_effects(database_url, SOLD))


@pytest.mark.parametrize(
    ("sql", "violation"),
    [
        (
            "INSERT INTO starts (flow_key, task, start, process) SELECT flow_key, task, 'more', process FROM starts",
            "'Noting' started 4 times in process",
        ),
        (
            "INSERT INTO starts (flow_key, task, start, process) VALUES ('k-1', 'Noting', 'more', 1)",
            "'Noting' started 1 times in process 1, which has 0 attempts",
        ),
        ("UPDATE starts SET at = '2001-01-01 00:00:00.000000'", "before its attempt was recorded"),
        ("DELETE FROM starts", "'Noting' succeeded, and its start was not noted"),
    ],
)
def test_a_start_that_nothing_explains_is_found(
    noted_flow: FlowRunner, database_url: str, sql: str, violation: str
) -> None:
    change(noted_flow, sql)
    assert any(violation in each for each in check_starts(database_url, STARTED))


def test_a_schedule_that_was_acknowledged_and_is_not_there_is_found(runner: FlowRunner, database_url: str) -> None:
    runner.register_flow_template(FlowTemplate("order", [add_up]))
    told = {key: runner.schedule_flow("order", {"order": 1}, idempotency_key=key) for key in ("k-1", "k-2")}
    assert check_schedules(database_url, told) == []

    assert "'k-2' was acknowledged as execution 1" in check_schedules(database_url, {**told, "k-2": 1})[0]
    change(runner, f"UPDATE ebbs_flow_executions SET idempotency_key = 'k-3' WHERE execution_id = {told['k-2']}")
    (violation,) = check_schedules(database_url, told)
    assert violation.endswith("the database has []")


def test_two_executions_of_one_idempotency_key_are_found(empty_database_url: str) -> None:
    schema.upgrade(empty_database_url)
    with FlowService(empty_database_url) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("order", [add_up]))
        told = {"k-1": runner.schedule_flow("order", {"order": 1}, idempotency_key="k-1")}
        runner.schedule_flow("order", {"order": 2})
        change(runner, "DROP INDEX uq_ebbs_flow_executions_idempotency_key")
        change(runner, f"{EXECUTION} idempotency_key = 'k-1'")

        (violation,) = check_schedules(service.engine, told)
    assert violation.endswith("the database has [1, 2]")
