"""What a flow does from its schedule to its rest, on both databases."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import OperationalError

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    LeaseLostError,
    MissingInputError,
    RetryPolicy,
    TaskStatus,
    TemplateError,
    TransitionError,
    UnknownExecutionError,
    UnknownTemplateError,
    task,
)
from tests.integration.flows import AT_ONCE, Outside, Step, abc


def names_and_ends(service: FlowService, execution_id: int) -> list[tuple[str, int, str]]:
    return [(each.name, each.attempt, str(each.status)) for each in service.get_task_executions(execution_id)]


def statuses(service: FlowService, execution_id: int) -> list[str]:
    return [str(each.to_status) for each in service.get_flow_status_history(execution_id)]


# --- from schedule to success -------------------------------------------------------------------------------------


def test_a_scheduled_flow_runs_its_tasks_in_order(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc", ExecutionContext(order_id=17))
    execution = runner.run_flow()
    assert execution is not None
    assert outside.calls == ["a", "b", "c"]
    assert execution.status is FlowStatus.SUCCEEDED
    assert execution.current_task_index == 3
    assert dict(execution.execution_context) == {"order_id": 17, "a": "a done", "b": "b done", "c": "c done"}
    assert execution == service.get_flow_execution(execution_id)
    assert statuses(service, execution_id) == ["CREATED", "SCHEDULED", "RUNNING", "SUCCEEDED"]


def test_steps_are_numbered_over_transitions_and_attempts_without_a_gap(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    execution = runner.run_flow()
    taken = [each.flow_execution_step for each in service.get_flow_status_history(execution_id)]
    taken += [each.flow_execution_step for each in service.get_task_executions(execution_id)]
    assert execution is not None
    assert sorted(taken) == list(range(1, execution.execution_step + 1))


def test_the_history_has_two_records_an_attempt(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    outside.failures = [ConnectionError("down")]
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    runner.run_flow()
    runner.reschedule_flow_execution(execution_id)
    runner.re_run_flow()
    attempts = service.get_task_executions(execution_id)
    history = service.get_flow_task_execution_history(execution_id)
    assert len(attempts) == 4
    assert len(history) == 2 * len(attempts)
    assert [str(each.status) for each in history[:4]] == ["RUNNING", "FAILED", "RUNNING", "SUCCEEDED"]
    assert all(each.finished_at is None and each.output is None for each in history[::2])


def test_three_scheduled_flows_run_once_each_by_priority_then_due_time_then_id(
    service: FlowService, runner: FlowRunner
) -> None:
    ran = []

    @task
    def note(number: int) -> None:
        ran.append(number)

    runner.register_flow_template(FlowTemplate("note", [note]))
    past = datetime.now(timezone.utc) - timedelta(hours=1)
    runner.schedule_flow("note", {"number": 4}, run_at=past)
    runner.schedule_flow("note", {"number": 3}, run_at=past - timedelta(hours=1))
    runner.schedule_flow("note", {"number": 5}, run_at=past)
    runner.schedule_flow("note", {"number": 1}, priority=7)
    runner.schedule_flow("note", {"number": 2}, priority=5)
    runner.schedule_flow("note", {"number": 6}, priority=-1, run_at=past)
    while runner.run_flow() is not None:
        pass
    assert ran == [1, 2, 3, 4, 5, 6]


def test_a_flow_is_not_run_before_its_time(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc", delay=timedelta(hours=1))
    other_id = runner.schedule_flow("abc", run_at=datetime.now(timezone.utc) + timedelta(days=2))
    assert runner.run_flow() is None
    assert service.get_runnable_flow() is None
    execution, other = service.get_flow_execution(execution_id), service.get_flow_execution(other_id)
    assert timedelta(minutes=59) < execution.run_at - execution.created_at < timedelta(minutes=61)
    assert timedelta(hours=47) < other.run_at - other.created_at < timedelta(hours=49)


def test_the_next_due_execution_is_shown_without_being_claimed(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc", {"n": 1})
    for _ in range(2):
        found = service.get_runnable_flow(FlowStatus.SCHEDULED)
        assert found is not None
        assert (found.execution_id, found.status, found.execution_context["n"]) == (execution_id, "SCHEDULED", 1)
    assert service.get_runnable_flow(FlowStatus.RESCHEDULED) is None
    with pytest.raises(InvalidArgumentError):
        service.get_runnable_flow(FlowStatus.FAILED)


def test_a_runner_leaves_templates_that_it_does_not_know_to_others(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    other = FlowRunner(service)
    other.register_flow_template(FlowTemplate("other", [Step(outside, "x")]))
    assert other.run_flow() is None
    assert FlowRunner(service).run_flow() is None
    assert service.get_flow_execution(execution_id).status is FlowStatus.SCHEDULED


def test_async_tasks_and_functions_run_also_within_a_running_event_loop(runner: FlowRunner) -> None:
    import asyncio

    @task(outputs="doubled")
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    runner.register_flow_template(FlowTemplate("async", [double]))
    runner.schedule_flow("async", {"number": 2})
    runner.schedule_flow("async", {"number": 3})

    async def host() -> object:
        return runner.run_flow()

    first, second = runner.run_flow(), asyncio.run(host())
    assert first is not None
    assert first.execution_context["doubled"] == 4
    assert second.execution_context["doubled"] == 6  # type: ignore[attr-defined]  # an execution


def test_steps_by_hand_go_the_same_way(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    template = abc(outside)
    runner.register_flow_template(template)
    execution_id = runner.schedule_flow("abc")
    execution = service.update_flow_status(execution_id, FlowStatus.RUNNING)
    assert runner.get_current_task(execution) is template.tasks[0]
    assert runner.get_next_task(execution) is template.tasks[1]
    while (current := runner.get_current_task(execution)) is not None:
        execution = runner.run_task(execution, current)
    assert execution.status is FlowStatus.SUCCEEDED
    assert runner.get_next_task(execution) is None
    assert names_and_ends(service, execution_id) == [(name, 1, "SUCCEEDED") for name in "abc"]


def test_attempts_can_be_recorded_by_hand(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    created = service.create_flow_execution("abc", ExecutionContext(n=1))
    assert created.status is FlowStatus.CREATED
    service.update_flow_status(created.execution_id, FlowStatus.SCHEDULED)
    execution = service.update_flow_status(created.execution_id, FlowStatus.RUNNING)
    attempt = service.create_task_execution(execution)
    assert (attempt.name, attempt.attempt, attempt.status) == ("a", 1, TaskStatus.RUNNING)
    ended = service.update_task_execution(
        created.execution_id,
        attempt.model_copy(update={"status": TaskStatus.SUCCEEDED}),
        execution.execution_context.copy(m=2),
    )
    assert ended.finished_at is not None
    now = service.get_flow_execution(created.execution_id)
    assert (now.current_task_index, dict(now.execution_context)) == (1, {"n": 1, "m": 2})
    with pytest.raises(LeaseLostError):
        service.create_task_execution(execution)  # as it was read before
    with pytest.raises(TransitionError):
        service.update_task_execution(created.execution_id, attempt.model_copy(update={"status": TaskStatus.FAILED}))
    after = service.update_flow_status(created.execution_id, FlowStatus.SUCCEEDED, ExecutionContext(result="r"))
    assert dict(after.execution_context) == {"result": "r"}


# --- failure, retry, re-run ---------------------------------------------------------------------------------------


def test_a_failed_flow_resumes_at_the_failed_task(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    outside.failures = []
    template = FlowTemplate("abc", [Step(outside, "a"), Step(outside, "b"), Step(outside, "c")])
    runner.register_flow_template(template)
    execution_id = runner.schedule_flow("abc")
    original = outside.call

    def down_at_b(name: str) -> None:
        original(name)
        if name == "b" and outside.calls.count("b") == 1:
            raise ConnectionError("the bank is down")

    outside.call = down_at_b  # type: ignore[method-assign]  # the outside changes its mind
    failed = runner.run_flow()
    assert failed is not None
    assert (failed.status, failed.current_task_index) == (FlowStatus.FAILED, 1)
    assert dict(failed.execution_context) == {"a": "a done"}
    (attempt,) = [each for each in service.get_task_executions(execution_id) if each.name == "b"]
    assert attempt.error_type == "ConnectionError"
    assert attempt.failure is Failure.EXCEPTION
    assert attempt.output is not None
    assert attempt.output.splitlines()[-1] == "ConnectionError: the bank is down"
    assert "ebbs_and_flows/outcomes.py" not in attempt.output  # from the task's own code on
    assert runner.re_run_flow() is None  # nothing is re-run before somebody says so

    assert runner.reschedule_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    done = runner.re_run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "b", "c"]
    assert done.finished_at is not None


def test_a_flow_can_be_re_run_from_an_earlier_task_with_the_context_as_it_was_then(
    service: FlowService, runner: FlowRunner
) -> None:
    seen: list[tuple[str, ...]] = []
    down = [True]

    @task(outputs="first")
    def first(context: ExecutionContext) -> int:
        seen.append(("first", *context))
        return len(seen)

    @task(outputs="second")
    def second(context: ExecutionContext) -> int:
        seen.append(("second", *context))
        return len(seen)

    @task
    def third(context: ExecutionContext) -> None:
        seen.append(("third", *context))
        if down:
            down.pop()
            raise OSError("no")

    runner.register_flow_template(FlowTemplate("t", [first, second, third]))
    execution_id = runner.schedule_flow("t", {"start": 0})
    runner.run_flow()
    with pytest.raises(TemplateError, match="fourth"):
        runner.reschedule_flow_execution(execution_id, from_task="fourth")
    execution = runner.reschedule_flow_execution(execution_id, from_task="second")
    assert dict(execution.execution_context) == {"start": 0, "first": 1}
    done = runner.re_run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED
    assert dict(done.execution_context) == {"start": 0, "first": 1, "second": 4}
    assert seen == [
        ("first", "start"),
        ("second", "start", "first"),
        ("third", "start", "first", "second"),
        ("second", "start", "first"),
        ("third", "start", "first", "second"),
    ]
    assert names_and_ends(service, execution_id)[3:] == [("second", 2, "SUCCEEDED"), ("third", 2, "SUCCEEDED")]


def test_a_value_can_be_mended_by_hand_before_a_re_run(service: FlowService, runner: FlowRunner) -> None:
    @task(outputs="halved")
    def halve(number: int) -> int:
        return number // 2

    runner.register_flow_template(FlowTemplate("halve", [halve]))
    execution_id = runner.schedule_flow("halve", {"number": "four", "kept": 1})
    failed = runner.run_flow()
    assert failed is not None
    assert failed.status is FlowStatus.FAILED
    mended = failed.execution_context.without("number").copy(number=4)
    service.update_flow_status(execution_id, FlowStatus.RESCHEDULED, mended, reason="number was a word")
    done = runner.re_run_flow()
    assert done is not None
    assert dict(done.execution_context) == {"kept": 1, "number": 4, "halved": 2}


def test_a_retry_policy_retries_with_attempts_counted_in_the_database(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    outside.failures = [ConnectionError("1"), ConnectionError("2")]
    policy = RetryPolicy(max_attempts=3, wait=AT_ONCE)
    runner.register_flow_template(FlowTemplate("one", [Step(outside, "a", policy)]))
    execution_id = runner.schedule_flow("one")
    first = runner.run_flow()
    assert first is not None
    assert first.status is FlowStatus.RESCHEDULED
    restarted = FlowRunner(service)  # another process would count the same
    restarted.register_flow_template(FlowTemplate("one", [Step(outside, "a", policy)]))
    assert restarted.run_until_idle() == 2
    assert names_and_ends(service, execution_id) == [("a", 1, "FAILED"), ("a", 2, "FAILED"), ("a", 3, "SUCCEEDED")]


def test_a_retry_policy_gives_up_after_max_attempts(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    outside.failures = [ConnectionError(str(number)) for number in range(9)]
    runner.register_flow_template(FlowTemplate("one", [Step(outside, "a", RetryPolicy(max_attempts=3, wait=AT_ONCE))]))
    execution_id = runner.schedule_flow("one")
    assert runner.run_until_idle() == 3
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    runner.reschedule_flow_execution(execution_id)  # a re-run by hand grants one attempt more
    assert runner.run_until_idle() == 1
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    assert len(service.get_task_executions(execution_id)) == 4


@pytest.mark.parametrize(
    ("policy", "raised", "attempts"),
    [
        (RetryPolicy(max_attempts=3, wait=AT_ONCE, retry_on=(OSError,)), ValueError("no"), 1),
        (RetryPolicy(max_attempts=3, wait=AT_ONCE, retry_on=(OSError,)), ConnectionError("yes"), 3),
        (RetryPolicy(max_attempts=3, wait=AT_ONCE, give_up_on=(ConnectionError,)), ConnectionError("no"), 1),
        (RetryPolicy(max_attempts=3, wait=AT_ONCE), SystemExit(3), 1),
    ],
)
def test_only_what_the_policy_names_is_retried(
    service: FlowService,
    runner: FlowRunner,
    outside: Outside,
    policy: RetryPolicy,
    raised: BaseException,
    attempts: int,
) -> None:
    outside.failures = [raised] * 5
    runner.register_flow_template(FlowTemplate("one", [Step(outside, "a", policy)]))
    execution_id = runner.schedule_flow("one")
    runner.run_until_idle()
    assert len(service.get_task_executions(execution_id)) == attempts
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED


def test_a_wait_is_spent_in_the_database(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    outside.failures = [ConnectionError("down")]
    policy = RetryPolicy(max_attempts=2, wait=lambda state: 100.0 * state.attempt_number)
    runner.register_flow_template(FlowTemplate("one", [Step(outside, "a", policy)]))
    execution_id = runner.schedule_flow("one")
    runner.run_flow()
    assert runner.re_run_flow() is None
    execution = service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.RESCHEDULED
    assert timedelta(seconds=99) < execution.run_at - execution.updated_at < timedelta(seconds=101)
    reason = service.get_flow_status_history(execution_id)[-1].reason
    assert reason == "ConnectionError: down; 1 of 2 attempts, next in 100.0 s"


def test_run_until_idle_waits_for_retries_and_not_for_what_is_scheduled_later(
    service: FlowService, outside: Outside
) -> None:
    outside.failures = [ConnectionError("down")]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        with service.engine.begin() as connection:  # time passes
            connection.execute(text("UPDATE ebbs_flow_executions SET run_at = created_at WHERE status='RESCHEDULED'"))

    runner = FlowRunner(service, sleep=sleep)
    policy = RetryPolicy(max_attempts=2, wait=lambda state: 5.0)
    runner.register_flow_template(FlowTemplate("one", [Step(outside, "a", policy)]))
    execution_id = runner.schedule_flow("one")
    later_id = runner.schedule_flow("one", delay=3600)
    assert runner.run_until_idle() == 2
    assert slept == [1.0]  # at most a second at a time
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert service.get_flow_execution(later_id).status is FlowStatus.SCHEDULED


# --- the context --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal


def test_a_task_cannot_change_what_is_stored_by_changing_what_it_was_given(
    service: FlowService, runner: FlowRunner
) -> None:
    seen = []

    @task(outputs="noted")
    def grab(items: list[int], context: ExecutionContext) -> int:
        items.append(99)
        context["items"].append(98)
        seen.append(list(context["items"]))
        if len(seen) == 1:
            raise OSError("once more")
        return 1

    runner.register_flow_template(FlowTemplate("grab", [grab]))
    execution_id = runner.schedule_flow("grab", {"items": [1]})
    runner.run_flow()
    runner.reschedule_flow_execution(execution_id)
    done = runner.re_run_flow()
    assert done is not None
    assert seen == [[1], [1]]
    assert done.execution_context["items"] == [1]


def test_the_caller_may_change_its_objects_after_scheduling(service: FlowService, runner: FlowRunner) -> None:
    items = [1]
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    execution_id = runner.schedule_flow("t", ExecutionContext(items=items))
    items.append(2)
    assert service.get_flow_execution(execution_id).execution_context["items"] == [1]


def test_entries_are_natural_json_beside_their_types(service: FlowService, runner: FlowRunner) -> None:
    @task(outputs="line")
    def make(order_id: int) -> Line:
        return Line("x", Decimal("12.50"))

    runner.register_flow_template(FlowTemplate("t", [make]))
    execution_id = runner.schedule_flow("t", {"order_id": 17})
    runner.run_flow()
    with service.engine.connect() as connection:
        order_id = connection.execute(
            text("SELECT entries ->> 'order_id' FROM ebbs_flow_transitions WHERE flow_execution_step = 1")
        ).scalar_one()
        price, line_type = connection.execute(
            text("SELECT entries -> 'line' ->> 'price', entry_types ->> 'line' FROM ebbs_task_executions")
        ).one()
    assert int(order_id) == 17
    assert price == "12.50"
    assert line_type.endswith("Line")
    assert service.get_flow_execution(execution_id).execution_context["line"] == Line("x", Decimal("12.50"))


def test_an_attempt_stores_only_what_its_task_added_or_dropped(service: FlowService, runner: FlowRunner) -> None:
    @task
    def swap(context: ExecutionContext) -> ExecutionContext:
        return context.without("old").copy(new=1)

    runner.register_flow_template(FlowTemplate("t", [swap]))
    runner.schedule_flow("t", {"old": 1, "kept": "k" * 100})
    done = runner.run_flow()
    assert done is not None
    assert dict(done.execution_context) == {"kept": "k" * 100, "new": 1}
    with service.engine.connect() as connection:
        row = connection.execute(
            text("SELECT CAST(entries AS TEXT), CAST(dropped AS TEXT) FROM ebbs_task_executions")
        ).one()
    assert tuple(row) == ('{"new":1}', '["old"]')


# --- schedule -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_scheduled_is_refused_before_anything_is_written(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    @task
    def needs(order: int) -> None: ...

    runner.register_flow_template(FlowTemplate("needs", [needs]))
    runner.register_flow_template(FlowTemplate("empty"))
    with pytest.raises(UnknownTemplateError):
        runner.schedule_flow("nobody")
    with pytest.raises(TemplateError):
        runner.schedule_flow("empty")
    with pytest.raises(MissingInputError, match="order"):
        runner.schedule_flow("needs", ExecutionContext(other=1))
    assert service.find_flow_executions() == []


def test_a_known_idempotency_key_returns_the_execution_that_has_it(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    first = runner.schedule_flow("abc", idempotency_key="order-17")
    assert runner.schedule_flow("abc", idempotency_key="order-17") == first
    assert runner.schedule_flow("abc", idempotency_key="order-18") != first
    runner.run_flow()
    assert runner.schedule_flow("abc", idempotency_key="order-17") == first
    assert len(service.find_flow_executions()) == 2


def test_scheduling_joins_the_callers_transaction(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    from sqlalchemy.orm import Session

    runner.register_flow_template(abc(outside))
    with Session(service.engine) as session:
        runner.schedule_flow("abc", session=session)
        session.rollback()
    assert service.find_flow_executions() == []
    with service.engine.begin() as connection:
        execution_id = runner.schedule_flow("abc", session=connection)
    assert [each.execution_id for each in service.find_flow_executions()] == [execution_id]
    assert runner.run_flow() is not None


# --- status -------------------------------------------------------------------------------------------------------


def test_a_cancelled_flow_never_starts(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    cancelled = runner.cancel_flow_execution(execution_id, "the customer changed their mind")
    assert cancelled.status is FlowStatus.CANCELLED
    assert runner.run_flow() is None
    with pytest.raises(TransitionError, match="final"):
        runner.cancel_flow_execution(execution_id)
    assert service.get_flow_status_history(execution_id)[-1].reason == "the customer changed their mind"


def test_a_flow_that_is_cancelled_while_a_task_runs_ends_there(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    execution_ids: list[int] = []

    @task(outputs="result")
    def is_cancelled() -> str:
        runner.cancel_flow_execution(execution_ids[0])
        return "too late"

    runner.register_flow_template(FlowTemplate("t", [is_cancelled, Step(outside, "next")]))
    execution_ids.append(runner.schedule_flow("t"))
    execution = runner.run_flow()
    assert execution is not None
    assert execution.status is FlowStatus.CANCELLED
    assert outside.calls == []
    (attempt,) = service.get_task_executions(execution_ids[0])
    assert (attempt.status, attempt.error_type) == (TaskStatus.FAILED, "FlowCancelled")
    assert "result" not in execution.execution_context


ALL = list(FlowStatus)


@pytest.mark.parametrize("start", ALL, ids=str)
@pytest.mark.parametrize("target", ALL, ids=str)
def test_every_edge_is_allowed_or_refused_as_the_table_says(
    service: FlowService, start: FlowStatus, target: FlowStatus
) -> None:
    ways = {
        FlowStatus.CREATED: [],
        FlowStatus.SCHEDULED: ["SCHEDULED"],
        FlowStatus.RUNNING: ["SCHEDULED", "RUNNING"],
        FlowStatus.SUCCEEDED: ["SCHEDULED", "RUNNING", "SUCCEEDED"],
        FlowStatus.FAILED: ["SCHEDULED", "RUNNING", "FAILED"],
        FlowStatus.RESCHEDULED: ["SCHEDULED", "RUNNING", "RESCHEDULED"],
        FlowStatus.CANCELLED: ["CANCELLED"],
    }
    edges = {
        ("CREATED", "SCHEDULED"),
        ("SCHEDULED", "RUNNING"),
        ("RUNNING", "SUCCEEDED"),
        ("RUNNING", "FAILED"),
        ("RUNNING", "RESCHEDULED"),
        ("FAILED", "RESCHEDULED"),
        ("RESCHEDULED", "RUNNING"),
        *((status, "CANCELLED") for status in ("CREATED", "SCHEDULED", "RESCHEDULED", "RUNNING", "FAILED")),
    }
    execution_id = service.create_flow_execution("t", ExecutionContext()).execution_id
    for status in ways[start]:
        service.update_flow_status(execution_id, FlowStatus(status))
    before = service.get_flow_execution(execution_id)
    if (str(start), str(target)) in edges:
        assert service.update_flow_status(execution_id, target).status is target
    else:
        with pytest.raises(TransitionError):
            service.update_flow_status(execution_id, target)
        assert service.get_flow_execution(execution_id) == before


def test_an_execution_that_is_not_there_is_a_value_error(service: FlowService, runner: FlowRunner) -> None:
    for call in (
        service.get_flow_execution,
        service.get_task_executions,
        service.get_flow_task_execution_history,
        service.get_flow_status_history,
        runner.reschedule_flow_execution,
        runner.cancel_flow_execution,
        runner.recover,
    ):
        with pytest.raises(UnknownExecutionError):
            call(4711)


# --- deploys ------------------------------------------------------------------------------------------------------


def fail_at_c(service: FlowService, outside: Outside) -> int:
    """An execution of a, b, c that has failed at c."""

    class Down(Step):
        def run(self, context: ExecutionContext) -> ExecutionContext:
            raise OSError("down")

    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("abc", [Step(outside, "a"), Step(outside, "b"), Down(outside, "c")]))
    execution_id = runner.schedule_flow("abc")
    runner.run_flow()
    runner.reschedule_flow_execution(execution_id)
    return execution_id


@pytest.mark.parametrize(
    ("now", "calls"),
    [
        (["a", "b", "c"], ["c"]),
        (["a", "b", "c", "d"], ["c", "d"]),
        (["a", "b", "x", "c"], ["x", "c"]),
        (["a", "b", "renamed"], ["renamed"]),
        (["a", "b"], []),
    ],
)
def test_a_deploy_that_keeps_what_is_completed_goes_on_with_the_new_template(
    service: FlowService, runner: FlowRunner, outside: Outside, now: list[str], calls: list[str]
) -> None:
    execution_id = fail_at_c(service, outside)
    outside.calls.clear()
    runner.register_flow_template(FlowTemplate("abc", [Step(outside, name) for name in now]))
    done = runner.re_run_flow()
    assert done is not None
    assert (done.status, done.current_task_index) == (FlowStatus.SUCCEEDED, len(now))
    assert outside.calls == calls
    assert done.execution_step == service.get_flow_status_history(execution_id)[-1].flow_execution_step


@pytest.mark.parametrize("now", [["b", "a", "c"], ["a", "c"], ["x", "a", "b", "c"], ["a", "renamed", "c"], ["a"]])
def test_a_deploy_that_changes_what_is_completed_parks_the_execution_with_both_lists(
    service: FlowService, runner: FlowRunner, outside: Outside, now: list[str]
) -> None:
    execution_id = fail_at_c(service, outside)
    outside.calls.clear()
    runner.register_flow_template(FlowTemplate("abc", [Step(outside, name) for name in now]))
    parked = runner.re_run_flow()
    assert parked is not None
    assert parked.status is FlowStatus.FAILED
    assert outside.calls == []
    last = service.get_flow_status_history(execution_id)[-1]
    assert last.reason is not None
    assert "TemplateMismatchError" in last.reason
    assert str(["a", "b"]) in last.reason
    assert str(now) in last.reason
    # The way out that it names leads on, from what stands there now.
    differs = next(name for index, name in enumerate(["a", "b"]) if now[index : index + 1] != [name])
    assert last.reason.endswith(f"from_task={differs!r}")
    runner.reschedule_flow_execution(execution_id, from_task=differs)
    done = runner.re_run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED


def test_an_interrupt_just_after_a_checkpoint_hands_back_what_follows_it(
    service: FlowService, runner: FlowRunner, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    record = service.checkpoint

    def interrupted(checkpoints: Any) -> Any:
        monkeypatch.undo()
        record(checkpoints)
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_flow()
    left = service.get_flow_execution(execution_id)
    assert (left.status, left.current_task_index) == (FlowStatus.RESCHEDULED, 1)
    assert runner.run_until_idle() == 1
    assert outside.calls == ["a", "b", "c"]
    assert names_and_ends(service, execution_id) == [
        ("a", 1, "SUCCEEDED"),
        ("b", 1, "FAILED"),
        ("b", 2, "SUCCEEDED"),
        ("c", 1, "SUCCEEDED"),
    ]


def test_an_interrupt_just_after_a_claim_hands_the_execution_back(
    service: FlowService, runner: FlowRunner, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    claim = service.claim

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        claim(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "claim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run_flow()
    assert service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    assert runner.run_until_idle() == 1
    assert outside.calls == ["a", "b", "c"]


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_is_lost_is_read_back_and_written_once(
    service: FlowService, outside: Outside, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    waits: list[float] = []
    runner = FlowRunner(service, sleep=waits.append)
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    record = service.checkpoint

    def cut_off(checkpoints: Any) -> Any:
        monkeypatch.undo()
        if committed:
            record(checkpoints)
        raise OperationalError("COMMIT", {}, Exception("server closed the connection"), connection_invalidated=True)

    monkeypatch.setattr(service, "checkpoint", cut_off)
    done = runner.run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert len(waits) == 1
    assert names_and_ends(service, execution_id) == [(name, 1, "SUCCEEDED") for name in "abc"]


def test_a_checkpoint_outlasts_connections_that_the_server_drops(
    service: FlowService, runner: FlowRunner, outside: Outside, database: str
) -> None:
    @task
    def drop_connections() -> None:
        if database == "postgresql":
            admin = create_engine(service.engine.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
            with admin.connect() as connection:
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
        else:
            service.engine.dispose()

    runner.register_flow_template(FlowTemplate("t", [drop_connections, Step(outside, "next")]))
    runner.schedule_flow("t")
    done = runner.run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_checkpoint_waits_for_another_writer(service: FlowService, database_url: str, outside: Outside) -> None:
    impatient = create_engine(database_url, connect_args={"timeout": 0.05})
    other_writer = service.engine.connect()

    def release(_: float) -> None:
        other_writer.rollback()

    runner = FlowRunner(FlowService(impatient), sleep=release)

    @task(outputs="result")
    def lock() -> str:
        other_writer.exec_driver_sql("BEGIN IMMEDIATE")
        return "done while another one writes"

    runner.register_flow_template(FlowTemplate("t", [lock]))
    runner.schedule_flow("t")
    done = runner.run_flow()
    other_writer.close()
    impatient.dispose()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED
    assert done.execution_context["result"] == "done while another one writes"


def test_a_task_that_another_worker_is_running_is_not_run_by_hand(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    other = FlowRunner(service)
    refused: list[LeaseLostError] = []

    @task
    def only_once() -> None:
        outside.call("only_once")
        execution = service.find_flow_executions()[0]
        with pytest.raises(LeaseLostError) as caught:
            other.run_task(execution, only_once)
        refused.append(caught.value)

    for each in (runner, other):
        each.register_flow_template(FlowTemplate("t", [only_once]))
    runner.schedule_flow("t")
    done = runner.run_flow()
    assert done is not None
    assert done.status is FlowStatus.SUCCEEDED
    assert outside.calls == ["only_once"]
    assert len(refused) == 1


def test_only_one_attempt_is_open_at_a_time(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    service.update_flow_status(execution_id, FlowStatus.RUNNING)
    service.create_task_execution(service.get_flow_execution(execution_id))
    with pytest.raises(TransitionError, match="one is open"):
        service.create_task_execution(service.get_flow_execution(execution_id))


# --- recovery -----------------------------------------------------------------------------------------------------


def leave_running(service: FlowService, outside: Outside, policy: RetryPolicy | None = None) -> int:
    """An execution whose worker was lost at b: as a crash leaves it."""
    runner = FlowRunner(service)
    runner.register_flow_template(abc(outside, retry_b=policy))
    execution_id = runner.schedule_flow("abc")
    claims = service.claim(runner.templates, {FlowStatus.SCHEDULED}, runner.worker, lease_seconds=1000)
    execution = runner.run_task(claims[0].execution, runner.get_flow_template("abc").tasks[0])
    assert execution.status is FlowStatus.RUNNING
    return execution_id


def test_recovery_goes_on_at_the_task_that_was_running(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    execution_id = leave_running(service, outside)
    runner.register_flow_template(abc(outside))
    done = runner.recover(execution_id)
    assert done.status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert names_and_ends(service, execution_id) == [
        ("a", 1, "SUCCEEDED"),
        ("b", 1, "FAILED"),
        ("b", 2, "SUCCEEDED"),
        ("c", 1, "SUCCEEDED"),
    ]
    lost = service.get_task_executions(execution_id)[1]
    assert (lost.error_type, lost.failure) == ("WorkerLost", Failure.LOST)
    with pytest.raises(TransitionError):
        runner.recover(execution_id)


@pytest.mark.parametrize("max_crashes", [0, 1])
def test_a_task_that_loses_its_worker_too_often_is_parked(
    service: FlowService, runner: FlowRunner, outside: Outside, max_crashes: int
) -> None:
    policy = RetryPolicy(max_crashes=max_crashes)
    execution_id = leave_running(service, outside, policy)
    runner.register_flow_template(abc(outside, retry_b=policy))
    parked = runner.recover(execution_id)
    assert parked.status is FlowStatus.FAILED
    assert outside.calls == ["a"]
    reason = service.get_flow_status_history(execution_id)[-1].reason
    assert reason is not None
    assert "max_crashes" in reason


def test_a_worker_that_was_declared_dead_can_write_nothing_more(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    zombie = FlowRunner(service)
    ran = []

    @task(outputs="a")
    def a() -> str:
        if not ran:
            ran.append("zombie")
            runner.recover(execution_id)  # another worker takes over while this one is at it
        return "from the zombie"

    zombie.register_flow_template(FlowTemplate("abc", [a, Step(outside, "b"), Step(outside, "c")]))
    seen_by_zombie = zombie.run_flow()
    assert outside.calls == ["a", "b", "c"]
    assert seen_by_zombie is not None
    assert seen_by_zombie.execution_context["a"] == "a done"
    assert [each.status for each in service.get_task_executions(execution_id)].count(TaskStatus.SUCCEEDED) == 3
