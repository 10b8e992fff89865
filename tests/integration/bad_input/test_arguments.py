"""Arguments and declarations: refused before anything is written."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    EbbsError,
    ExecutionContext,
    FlowExecution,
    FlowFilter,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    TaskStatus,
    task,
)
from tests.integration.bad_input.suspects import (
    UTC,
    NoRepr,
    Suspect,
    all_refused,
    attempts_at,
    begin,
    cases,
    finish,
    nothing,
    refused,
    schedule,
)

# --- arguments: refused --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    id: str
    call: Callable[[FlowRunner], object]
    kind: type[Exception] = ValueError


class AsyncSessionLookalike:
    """What can be seen of a `sqlalchemy.ext.asyncio.AsyncSession`, which needs greenlet to be there."""

    async def run_sync(self, function: Callable[..., Any]) -> Any:
        raise NotImplementedError


class BrokenZone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        raise RuntimeError("no offset today")


def scheduled_with(**arguments: Any) -> Callable[[FlowRunner], object]:
    return lambda runner: runner.schedule_flow("flow", {"order": 17}, **arguments)


def _on_autocommit(runner: FlowRunner) -> None:
    with runner.service.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        runner.schedule_flow("flow", {"order": 17}, session=connection)


def _on_a_closed_connection(runner: FlowRunner) -> None:
    connection = runner.service.engine.connect()
    connection.close()
    runner.schedule_flow("flow", {"order": 17}, session=connection)


NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)

BAD_SCHEDULES = [
    Call("an unknown template", lambda runner: runner.schedule_flow("nowhere")),
    Call("a template without tasks", lambda runner: runner.schedule_flow("empty")),
    Call("a template instead of its name", lambda runner: runner.schedule_flow(runner.get_flow_template("flow"))),
    Call("missing inputs", lambda runner: runner.schedule_flow("flow", {"ordre": 17})),
    Call("no context where inputs are needed", lambda runner: runner.schedule_flow("flow")),
    Call("context: a list", lambda runner: runner.schedule_flow("flow", ["order"]), TypeError),
    Call("context: a str", lambda runner: runner.schedule_flow("flow", "order"), TypeError),
    Call("context: a list of pairs", lambda runner: runner.schedule_flow("flow", [("order", 17)]), TypeError),
    Call("context: an int", lambda runner: runner.schedule_flow("flow", 17), TypeError),
    Call("context: a list, to the service", lambda runner: runner.service.schedule("flow", ["order"]), TypeError),
    Call("context: a list, to create", lambda runner: runner.service.create_flow_execution("flow", []), TypeError),
    Call("run_at: naive", scheduled_with(run_at=datetime(2030, 1, 1))),
    Call("run_at: year 9999", scheduled_with(run_at=datetime.max.replace(tzinfo=UTC))),
    Call("run_at: year 1", scheduled_with(run_at=datetime.min.replace(tzinfo=UTC))),
    Call(
        "run_at: year 1, east of UTC", scheduled_with(run_at=datetime.min.replace(tzinfo=timezone(timedelta(hours=9))))
    ),
    Call("run_at: a date", scheduled_with(run_at=date(2030, 1, 1)), TypeError),
    Call("run_at: a str", scheduled_with(run_at="2030-01-01T12:00:00Z"), TypeError),
    Call("run_at: a timestamp", scheduled_with(run_at=1_900_000_000), TypeError),
    Call("run_at: a zone that raises", scheduled_with(run_at=datetime(2030, 1, 1, tzinfo=BrokenZone()))),
    Call("delay: negative", scheduled_with(delay=-1)),
    Call("delay: a negative timedelta", scheduled_with(delay=timedelta(seconds=-1))),
    Call("delay: NaN", scheduled_with(delay=math.nan)),
    Call("delay: infinite", scheduled_with(delay=math.inf)),
    Call("delay: huge", scheduled_with(delay=1e300)),
    Call("delay: an int that is no float", scheduled_with(delay=10**400)),
    Call("delay: an int that cannot be shown", scheduled_with(delay=10**5000)),
    Call("delay: the longest timedelta", scheduled_with(delay=timedelta.max)),
    Call("delay: a str", scheduled_with(delay="5"), TypeError),
    Call("delay: a bool", scheduled_with(delay=True), TypeError),
    Call("delay: a Decimal", scheduled_with(delay=Decimal(5)), TypeError),
    Call("both run_at and delay", scheduled_with(run_at=NOON, delay=5)),
    Call("both run_at and a delay of 0", scheduled_with(run_at=NOON, delay=0)),
    Call("priority: a float", scheduled_with(priority=1.0), TypeError),
    Call("priority: a bool", scheduled_with(priority=True), TypeError),
    Call("priority: a str", scheduled_with(priority="high"), TypeError),
    Call("priority: None", scheduled_with(priority=None), TypeError),
    Call("priority: too high", scheduled_with(priority=2**31)),
    Call("priority: too high by one more", scheduled_with(priority=2**31 + 1)),
    Call("priority: too low", scheduled_with(priority=-(2**31) - 1)),
    Call("priority: not to be shown", scheduled_with(priority=10**5000)),
    Call("session: an object", scheduled_with(session=object()), TypeError),
    Call("session: a URL", scheduled_with(session="sqlite://"), TypeError),
    Call("session: an engine", lambda runner: scheduled_with(session=runner.service.engine)(runner), TypeError),
    Call("session: an asynchronous one", scheduled_with(session=AsyncSessionLookalike()), TypeError),
    Call("session: bound to no database", scheduled_with(session=Session())),
    Call("session: a connection without transactions", _on_autocommit),
    Call("session: a closed connection", _on_a_closed_connection),
]


@pytest.mark.parametrize("case", cases(BAD_SCHEDULES))
def test_a_bad_schedule_is_refused(case: Call, runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    runner.register_flow_template(FlowTemplate("empty"))
    refused(runner.service, case.kind, lambda: case.call(runner))
    assert runner.run_flow() is None


def test_a_refusal_leaves_the_callers_transaction_usable(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    with runner.service.engine.begin() as connection:
        first = runner.schedule_flow("flow", {"order": 17}, session=connection)
        for bad in (scheduled_with(session=connection, priority=0.5), scheduled_with(session=connection, queue="")):
            with pytest.raises(EbbsError):
                bad(runner)
        with pytest.raises(EbbsError):
            runner.schedule_flow("flow", {"order": threading.Lock()}, session=connection)
        second = runner.schedule_flow("flow", {"order": 18}, session=connection)
    assert runner.run_until_idle() == 2
    found = runner.service.find_flow_executions()
    assert {each.execution_id: each.status for each in found} == dict.fromkeys((first, second), FlowStatus.SUCCEEDED)


BAD_IDS = [0, -1, "1", 2**63, 2**70, -(2**70), 10**5000, True, None, 1.0, 1.5, math.nan, b"1", [1], NoRepr()]


@pytest.mark.parametrize(
    "bad_id", [pytest.param(each, id=f"{type(each).__name__} {n}") for n, each in enumerate(BAD_IDS)]
)
def test_an_id_that_is_none_is_refused_by_every_method(bad_id: Any, runner: FlowRunner) -> None:
    service = runner.service
    assert schedule(runner, Suspect(lambda context: None)) == 1, "so that what passes for 1 would find one"
    runner.run_until_idle()
    attempt = attempts_at(runner, 1)[0]
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: service.get_flow_execution(bad_id),
        "attempts": lambda: service.get_task_executions(bad_id),
        "history": lambda: service.get_flow_task_execution_history(bad_id),
        "statuses": lambda: service.get_flow_status_history(bad_id),
        "update": lambda: service.update_flow_status(bad_id, FlowStatus.CANCELLED),
        "update attempt": lambda: service.update_task_execution(
            bad_id, attempt.model_copy(update={"flow_execution_id": bad_id})
        ),
        "cancel": lambda: runner.cancel_flow_execution(bad_id),
        "reschedule": lambda: runner.reschedule_flow_execution(bad_id),
        "recover": lambda: runner.recover(bad_id),
    }
    all_refused(service, ValueError, calls)
    assert service.get_flow_execution(1).status is FlowStatus.FAILED


OTHER_CALLS = [
    Call("run_flow: no status", lambda runner: runner.run_flow("NOWHERE")),
    Call("run_flow: a status that nothing runs from", lambda runner: runner.run_flow(FlowStatus.FAILED)),
    Call("run_flow: None", lambda runner: runner.run_flow(None)),
    Call("update: no status", lambda runner: runner.service.update_flow_status(1, "NOWHERE")),
    Call("update: a list for a status", lambda runner: runner.service.update_flow_status(1, [])),
    Call(
        "update: an edge that is not declared",
        lambda runner: runner.service.update_flow_status(1, FlowStatus.SUCCEEDED),
    ),
    Call(
        "update: a context that is a list",
        lambda runner: runner.service.update_flow_status(1, FlowStatus.RESCHEDULED, ["order"]),
        TypeError,
    ),
    Call(
        "update: a value that cannot be stored",
        lambda runner: runner.service.update_flow_status(1, FlowStatus.RESCHEDULED, {"order": threading.Lock()}),
    ),
    Call("cancel: a reason with NUL", lambda runner: runner.cancel_flow_execution(1, "no\x00reason")),
    Call("cancel: a reason with a lone surrogate", lambda runner: runner.cancel_flow_execution(1, "no\udc80reason")),
    Call("cancel: a reason that is no str", lambda runner: runner.cancel_flow_execution(1, {"why": 1})),
    Call("cancel: a reason that is bytes", lambda runner: runner.cancel_flow_execution(1, b"why")),
    Call("reschedule: a reason with NUL", lambda runner: runner.reschedule_flow_execution(1, reason="no\x00reason")),
    Call(
        "reschedule: from a task that it has not reached", lambda runner: runner.reschedule_flow_execution(1, "finish")
    ),
    Call("reschedule: from a task by its index", lambda runner: runner.reschedule_flow_execution(1, 0)),
    Call("recover: not RUNNING", lambda runner: runner.recover(1)),
    Call("find: a limit of 0", lambda runner: runner.service.find_flow_executions(FlowFilter(limit=0))),
    Call("find: a huge limit", lambda runner: runner.service.find_flow_executions(FlowFilter(limit=2**70))),
    Call("find: a huge id", lambda runner: runner.service.find_flow_executions(FlowFilter(before_id=2**70))),
    Call(
        "find: a template with NUL",
        lambda runner: runner.service.find_flow_executions(FlowFilter(template_name="\x00")),
    ),
    Call(
        "find: a key with a lone surrogate",
        lambda runner: runner.service.find_flow_executions(FlowFilter(idempotency_key="\ud800")),
    ),
    Call(
        "find: a naive time",
        lambda runner: runner.service.find_flow_executions(FlowFilter(created_after=datetime(2030, 1, 1))),
    ),
    Call("find: a dict", lambda runner: runner.service.find_flow_executions({"limit": 1})),
    Call("register: no template", lambda runner: runner.register_flow_template(begin), TypeError),
    Call("register: one name twice", lambda runner: runner.register_flow_template(FlowTemplate("flow", [begin]))),
    Call("runner: no service", lambda runner: FlowRunner("sqlite://"), TypeError),
    Call("runner: a lease of NaN", lambda runner: FlowRunner(runner.service, lease_seconds=math.nan)),
    Call("runner: a lease of 0", lambda runner: FlowRunner(runner.service, lease_seconds=0)),
    Call("runner: an endless lease", lambda runner: FlowRunner(runner.service, lease_seconds=math.inf)),
    Call("runner: a lease that is a str", lambda runner: FlowRunner(runner.service, lease_seconds="30"), TypeError),
]


@pytest.mark.parametrize("case", cases(OTHER_CALLS))
def test_a_bad_argument_is_refused(case: Call, runner: FlowRunner) -> None:
    schedule(runner, Suspect(lambda context: None))
    runner.run_until_idle()
    refused(runner.service, case.kind, lambda: case.call(runner))
    assert runner.service.get_flow_execution(1).status is FlowStatus.FAILED


RUNNING_BY_HAND = [
    Call("a worker with NUL", lambda runner: _run_by_hand(runner, worker="a\x00b")),
    Call("a worker of 256 characters", lambda runner: _run_by_hand(runner, worker="w" * 256)),
    Call("a worker that is no str", lambda runner: _run_by_hand(runner, worker=17)),
    Call("a lease of NaN", lambda runner: _run_by_hand(runner, lease_seconds=math.nan)),
    Call("an endless lease", lambda runner: _run_by_hand(runner, lease_seconds=math.inf)),
    Call("a negative lease", lambda runner: _run_by_hand(runner, lease_seconds=-1)),
    Call("a lease that is a str", lambda runner: _run_by_hand(runner, lease_seconds="30")),
    Call("a reason with NUL", lambda runner: _run_by_hand(runner, reason="no\x00reason")),
]


def _run_by_hand(runner: FlowRunner, **arguments: Any) -> FlowExecution:
    return runner.service.update_flow_status(1, FlowStatus.RUNNING, **arguments)


@pytest.mark.parametrize("case", cases(RUNNING_BY_HAND))
def test_a_bad_claim_by_hand_is_refused(case: Call, runner: FlowRunner) -> None:
    schedule(runner, Suspect(lambda context: context))
    try:
        refused(runner.service, case.kind, lambda: case.call(runner))
        assert runner.service.get_flow_execution(1).status is FlowStatus.SCHEDULED
    finally:
        runner.cancel_flow_execution(1)


@pytest.mark.parametrize(
    "bad_end",
    [
        pytest.param({"output": "no\x00output"}, id="an output with NUL"),
        pytest.param({"output": "no\udc80output"}, id="an output with a lone surrogate"),
        pytest.param({"error_type": "E" * 256}, id="an error type of 256 characters"),
        pytest.param({"error_type": "E\x00"}, id="an error type with NUL"),
    ],
)
def test_an_end_by_hand_that_cannot_be_stored_is_made_storable(bad_end: dict[str, str], runner: FlowRunner) -> None:
    execution_id = schedule(runner, Suspect(lambda context: context))
    execution = _run_by_hand(runner)
    attempt = runner.service.create_task_execution(execution)

    try:
        ended = runner.service.update_task_execution(
            execution_id, attempt.model_copy(update={"status": TaskStatus.FAILED, "error_type": "Oops", **bad_end})
        )
        assert ended.status is TaskStatus.FAILED
    finally:
        runner.cancel_flow_execution(execution_id)


# --- declarations: refused -----------------------------------------------------------------------------------------


def with_limit(seconds: Any) -> Callable[[FlowRunner], object]:
    return lambda runner: FlowTemplate("other", [Suspect(nothing, timeout_seconds=seconds)])


@dataclass
class NotATask:
    name: str = "not a task"

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context


BAD_DECLARATIONS = [
    Call("a class for a task", lambda runner: FlowTemplate("other", [Suspect])),
    Call("a bare function for a task", lambda runner: FlowTemplate("other", [nothing])),
    Call("something like a task", lambda runner: FlowTemplate("other", [NotATask()])),
    Call("None for a task", lambda runner: FlowTemplate("other", [None])),
    Call("a task for the tasks", lambda runner: FlowTemplate("other", begin)),
    Call("one task twice", lambda runner: FlowTemplate("other", [begin, begin])),
    Call("outputs twice", lambda runner: task(outputs=("a", "a"))(nothing)),
    Call(
        "an output that is there",
        lambda runner: FlowTemplate("other", [begin, task(name="b", outputs="order")(nothing)]),
    ),
    Call("an input that is not there", lambda runner: FlowTemplate("other", [task(nothing), finish])),
    Call("outputs: an int", lambda runner: task(outputs=17)(nothing)),
    Call("outputs: None", lambda runner: task(outputs=None)(nothing)),
    Call("outputs: bytes", lambda runner: task(outputs=b"total")(nothing)),
    Call("a retry that is no policy", lambda runner: FlowTemplate("other", [Suspect(nothing, retry=3)])),
    *(Call(f"timeout_seconds: {each!r}", with_limit(each)) for each in (0, -1, math.nan, math.inf, "1", True)),
    *(
        Call(f"max_attempts: {each!r}", lambda runner, n=each: RetryPolicy(max_attempts=n))
        for each in (0, -1, 1.5, "3", True, None)
    ),
    *(Call(f"max_crashes: {each!r}", lambda runner, n=each: RetryPolicy(max_crashes=n)) for each in (-1, 1.5, None)),
    Call("wait: a number", lambda runner: RetryPolicy(wait=10), TypeError),
    Call("retry_on: a str", lambda runner: RetryPolicy(retry_on="ValueError"), TypeError),
    Call("retry_on: an instance", lambda runner: RetryPolicy(retry_on=(ValueError(),)), TypeError),
    Call("give_up_on: None", lambda runner: RetryPolicy(give_up_on=None), TypeError),
]


@pytest.mark.parametrize("case", cases(BAD_DECLARATIONS))
def test_a_bad_declaration_is_refused(case: Call, runner: FlowRunner) -> None:
    refused(runner.service, case.kind, lambda: case.call(runner))
