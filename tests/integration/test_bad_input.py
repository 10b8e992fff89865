"""Bad input has three answers only: refused at the call, a failed attempt with a record, or kept exactly.

(A) *Refused*: the call raises an `EbbsError` that is also the built-in error a caller expects, and writes nothing.
(B) *Failed*: the attempt ends with a record that says what was found, what went before it is intact, and a re-run with
    a mended task succeeds. What cannot be recorded is not tried again; what a task raises is, as its policy says.
(C) *Kept*: what comes back is what was put in, type and value.

After each of them nothing is left RUNNING, and the invariants hold.
"""

from __future__ import annotations

import asyncio
import builtins
import copy
import math
import signal
import sqlite3
import struct
import sys
import threading
import types
import unicodedata
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity.wait import wait_none

from ebbs_and_flows import (
    EbbsError,
    ExecutionContext,
    Failure,
    FlowExecution,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    FunctionTask,
    LeaseLostError,
    RetryPolicy,
    Task,
    TaskDataItem,
    TaskExecution,
    TaskResultError,
    TaskStatus,
    TransactionalTask,
    task,
)
from ebbs_and_flows.codec import MAX_DEPTH
from tests.integration.invariants import check_invariants

MAX_OUTPUT_LENGTH = 16_000
THREE_ATTEMPTS = RetryPolicy(max_attempts=3, wait=wait_none())
EARLIER = {"order": 17, "earlier": [1, 2]}
"""The context as the task under test receives it."""


@pytest.fixture(autouse=True)
def _nothing_is_left_running(database_url: str, service: FlowService) -> Iterator[None]:
    yield
    with service.engine.connect() as connection:
        running = connection.execute(
            text("SELECT count(*) FROM ebbs_flow_executions WHERE status = 'RUNNING'")
        ).scalar()
    assert running == 0
    assert check_invariants(database_url) == []


@pytest.fixture(autouse=True)
def _interrupts_work_as_before() -> Iterator[None]:
    """A task that spoils the handler of the process fails its own test, not all those after it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    try:
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        with suppress(Exception):  # the handler that was there, where it cannot even be shown
            signal.signal(signal.SIGINT, handler)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a value has open, after the test."""
    with ExitStack() as stack:
        yield stack


# --- the flow under test -------------------------------------------------------------------------------------------


Body: TypeAlias = Callable[..., Any]


@task(outputs="earlier")
def begin(order: int) -> list[int]:
    return [1, 2]


@task(outputs="receipt")
def finish(order: int) -> str:
    return f"r-{order}"


class Suspect(Task):
    """A task of which each test says what it does."""

    def __init__(self, body: Body, retry: RetryPolicy = THREE_ATTEMPTS, timeout_seconds: float | None = None) -> None:
        self.name = "suspect"
        self.body = body
        self.retry = retry
        self.timeout_seconds = timeout_seconds

    def run(self, context: ExecutionContext) -> Any:
        return self.body(context)


class AsyncSuspect(Suspect):
    async def run(self, context: ExecutionContext) -> Any:
        result = self.body(context)
        return await result if asyncio.isfuture(result) else result


class TransactionalSuspect(Suspect, TransactionalTask):
    def run(self, context: ExecutionContext, session: Session) -> Any:
        return self.body(context, session)


class AsyncTransactionalSuspect(TransactionalSuspect):
    async def run(self, context: ExecutionContext, session: Session) -> Any:
        return self.body(context, session)


KINDS = [Suspect, AsyncSuspect, TransactionalSuspect, AsyncTransactionalSuspect]


def schedule(runner: FlowRunner, suspect: Task) -> int:
    """Schedule a flow of three tasks, the middle one of which is the suspect."""
    runner.register_flow_template(FlowTemplate("flow", [begin, suspect, finish]))
    return runner.schedule_flow("flow", {"order": 17})


def attempts_at(runner: FlowRunner, execution_id: int, name: str = "suspect") -> list[TaskExecution]:
    return [each for each in runner.service.get_task_executions(execution_id) if each.name == name]


def counts(service: FlowService) -> list[int]:
    """The number of rows in each of the three tables."""
    tables = ("ebbs_flow_executions", "ebbs_task_executions", "ebbs_flow_transitions")
    with service.engine.connect() as connection:
        return [connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables]


def refused(service: FlowService, kind: type[Exception], call: Callable[[], object]) -> EbbsError:
    """Answer A; the error."""
    before = counts(service)
    with pytest.raises(EbbsError) as caught:
        call()
    assert isinstance(caught.value, kind)
    assert counts(service) == before
    assert str(caught.value)
    return caught.value


def all_refused(service: FlowService, kind: type[Exception], calls: dict[str, Callable[[], object]]) -> None:
    """Answer A from each of several calls; where one gives another, its name is in the message."""
    answers: dict[str, str] = {}
    before = counts(service)
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            if not (isinstance(error, EbbsError) and isinstance(error, kind)):
                answers[name] = f"raised {type(error).__name__}"
        else:
            answers[name] = "was accepted"
        if counts(service) != before:
            answers[name] = f"{answers.get(name, 'was refused')}, but has written"
            before = counts(service)
    assert answers == {}


def failed(runner: FlowRunner, execution_id: int, *, attempts: int, error_type: str, says: str) -> list[TaskExecution]:
    """Answer B, less the re-run; the attempts."""
    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    assert execution.execution_context == EARLIER
    found = attempts_at(runner, execution_id)
    assert [each.status for each in found] == [TaskStatus.FAILED] * attempts
    for each in found:
        assert each.error_type == error_type
        assert each.output is not None
        assert says in each.output
        assert len(each.output) <= MAX_OUTPUT_LENGTH
    assert runner.service.get_flow_status_history(execution_id)[-1].reason
    return found


def succeeds_once_mended(runner: FlowRunner, execution_id: int, suspect: Suspect) -> None:
    """The rest of answer B."""
    suspect.body = lambda context, *_: context.copy(mended=True)
    runner.reschedule_flow_execution(execution_id)
    runner.run_until_idle()
    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    assert execution.execution_context == {**EARLIER, "mended": True, "receipt": "r-17"}


def cases(listed: list[Any]) -> list[Any]:
    return [pytest.param(each, id=each.id) for each in listed]


# --- hostile objects -----------------------------------------------------------------------------------------------


class NoRepr:
    def __repr__(self) -> str:
        raise RuntimeError("not shown")


class NoReduce:
    def __reduce__(self) -> Any:
        raise RuntimeError("not copied")


class NoEquality:
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not compared")


class Impostor:
    """Says that it is a dict."""

    @property
    def __class__(self) -> type:
        return dict


class OddMeta(type):
    """A metaclass whose classes cannot be named."""

    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__qualname__"):
            raise RuntimeError("no name")
        return super().__getattribute__(name)


class OddlyMade(metaclass=OddMeta):
    pass


@dataclass
class Guarded:
    amount: int
    guard: Any


@dataclass
class Moody:
    amount: int

    def __getattribute__(self, name: str) -> Any:
        if name == "amount":
            raise RuntimeError("not now")
        return super().__getattribute__(name)


@dataclass
class Ring:
    next: Any = None


class OwnInt(int):
    pass


class OwnStr(str):
    __slots__ = ()


class OwnZone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def circle(value: Any, add: Callable[[Any], object]) -> Any:
    add(value)
    return value


# --- names: refused everywhere, or kept exactly --------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    id: str
    name: Any


BAD_NAMES = [
    Name("empty", ""),
    Name("a space", " "),
    Name("tabs", "\t\t"),
    Name("a no-break space", "\u00a0"),
    Name("256 characters", "n" * 256),
    Name("more than 255 characters once it is normalised", "\u0958" * 128),
    Name("NUL", "a\x00b"),
    Name("a control character", "a\x1bb"),
    Name("a C1 control character", "a\x85b"),
    Name("a line feed at the end", "name\n"),
    Name("a lone surrogate", "a\udc80b"),
    Name("an int", 17),
    Name("an int of 5001 digits", 10**5000),
    Name("a bool", True),
    Name("None", None),
    Name("bytes", b"name"),
    Name("a tuple", ("name",)),
    Name("an object without repr", NoRepr()),
]


@pytest.mark.parametrize("case", cases(BAD_NAMES))
def test_a_bad_name_is_refused_wherever_one_is_given(case: Name, runner: FlowRunner) -> None:
    service, bad = runner.service, case.name
    execution_id = schedule(runner, Suspect(lambda context: None))
    runner.run_until_idle()
    nameless = Suspect(lambda context: context)
    nameless.name = bad
    calls: dict[str, Callable[[], object]] = {
        "entry": lambda: runner.schedule_flow("flow", {"order": 17, bad: 1}),
        "entry, set": lambda: ExecutionContext().set(bad, 1),
        "entry, copy": lambda: ExecutionContext().copy({bad: 1}),
        "entry, create": lambda: service.create_flow_execution("flow", {bad: 1}),
        "entry, update": lambda: service.update_flow_status(execution_id, FlowStatus.RESCHEDULED, {bad: 1}),
        "data item": lambda: TaskDataItem(bad),
        "task": lambda: FlowTemplate("other", [nameless]),
        "template": lambda: FlowTemplate(bad, [begin]),
        "template, schedule": lambda: runner.schedule_flow(bad, {"order": 17}),
        "template, get": lambda: runner.get_flow_template(bad),
        "template, service": lambda: service.schedule(bad, {"order": 17}),
        "template, create": lambda: service.create_flow_execution(bad, {"order": 17}),
        "queue": lambda: runner.schedule_flow("flow", {"order": 17}, queue=bad),
    }
    if bad is not None:  # which means that there is no key, that a function's own name is taken, and so on
        calls |= {
            "idempotency key": lambda: runner.schedule_flow("flow", {"order": 17}, idempotency_key=bad),
            "task, add": lambda: FlowTemplate("other").add_task(begin, name=bad),
            "task, function": lambda: task(name=bad)(begin.function),
            "from_task": lambda: runner.reschedule_flow_execution(execution_id, from_task=bad),
        }
    if isinstance(bad, str):
        calls["output"] = lambda: task(outputs=bad)(begin.function)
    all_refused(service, ValueError, calls)


GOOD_NAMES = [
    Name("quotes", 'it\'s "quoted" `so` \\ and so'),
    Name("dots and slashes", "../shop.orders/[0].price"),
    Name("emoji", "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea"),
    Name("right to left", "\u0637\u0644\u0628 \u202e17\u202c \u05d4\u05d6\u05de\u05e0\u05d4"),
    Name("the tag of the codec", "$type"),
    Name("a percent format", "%s %(name)s 100%"),
    Name("a bound parameter", ":x :new_name ::json $1 ?"),
    Name("a brace format", "{} {0} {name}"),
    Name("SQL", "'; DROP TABLE ebbs_flow_executions; --"),
    Name("JSON", '{"$type": "int", "value": 1}'),
    Name("null", "null"),
    Name("spaces around", "  name  "),
    Name("255 characters", "n" * 255),
    Name("255 characters outside the BMP", "\U0001f30a" * 255),
    Name("255 characters once it is normalised", "e\u0301" * 255),
    Name("ligatures and full-width letters", "\ufb01\uff21"),
]


@pytest.mark.parametrize("case", cases(GOOD_NAMES))
def test_an_odd_name_is_kept_exactly(case: Name, runner: FlowRunner) -> None:
    name, stored = case.name, unicodedata.normalize("NFC", case.name)
    template = FlowTemplate(name)
    template.add_task(Suspect(lambda context: context.copy(copied=context[name])), name=name)
    runner.register_flow_template(template)

    execution_id = runner.schedule_flow(name, {name: 17}, queue=name, idempotency_key=name)
    assert runner.schedule_flow(name, {name: 17}, queue=name, idempotency_key=name) == execution_id
    execution = runner.run_flow()

    assert execution is not None
    assert execution.status is FlowStatus.SUCCEEDED
    assert (execution.template_name, execution.queue, execution.idempotency_key) == (stored, stored, stored)
    assert list(execution.execution_context.items()) == [(stored, 17), ("copied", 17)]
    assert [each.name for each in runner.service.get_task_executions(execution_id)] == [stored]
    wanted = FlowFilter(template_name=name, queue=name, idempotency_key=name)
    assert [each.execution_id for each in runner.service.find_flow_executions(wanted)] == [execution_id]


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_two_forms_of_one_name_clash(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate(COMPOSED, [begin]))
    all_refused(
        runner.service,
        ValueError,
        {
            "entry": lambda: runner.schedule_flow(COMPOSED, {"order": 17, COMPOSED: 1, DECOMPOSED: 2}),
            "entry, set": lambda: ExecutionContext({COMPOSED: 1}).set(DECOMPOSED, 2),
            "task": lambda: FlowTemplate(
                "other", [FunctionTask(_nothing, name=each) for each in (COMPOSED, DECOMPOSED)]
            ),
            "template": lambda: runner.register_flow_template(FlowTemplate(DECOMPOSED, [begin])),
            "output": lambda: task(outputs=(COMPOSED, DECOMPOSED))(_nothing),
            "input": lambda: FlowTemplate("other", inputs=[TaskDataItem(COMPOSED), TaskDataItem(DECOMPOSED)]),
        },
    )


def test_one_name_is_found_under_both_its_forms(runner: FlowRunner) -> None:
    template = FlowTemplate(DECOMPOSED)
    template.add_task(begin, name=DECOMPOSED)
    runner.register_flow_template(template)

    execution_id = runner.schedule_flow(DECOMPOSED, {"order": 17}, idempotency_key=DECOMPOSED)
    assert runner.schedule_flow(COMPOSED, {"order": 17}, idempotency_key=COMPOSED) == execution_id
    assert runner.get_flow_template(DECOMPOSED) is template
    assert template.index_of(DECOMPOSED) == 0
    wanted = FlowFilter(template_name=DECOMPOSED, idempotency_key=DECOMPOSED)
    assert [each.execution_id for each in runner.service.find_flow_executions(wanted)] == [execution_id]


def _nothing() -> None:
    """A task that does nothing."""


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


UTC = timezone.utc
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
    return lambda runner: FlowTemplate("other", [Suspect(_nothing, timeout_seconds=seconds)])


@dataclass
class NotATask:
    name: str = "not a task"

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context


BAD_DECLARATIONS = [
    Call("a class for a task", lambda runner: FlowTemplate("other", [Suspect])),
    Call("a bare function for a task", lambda runner: FlowTemplate("other", [_nothing])),
    Call("something like a task", lambda runner: FlowTemplate("other", [NotATask()])),
    Call("None for a task", lambda runner: FlowTemplate("other", [None])),
    Call("a task for the tasks", lambda runner: FlowTemplate("other", begin)),
    Call("one task twice", lambda runner: FlowTemplate("other", [begin, begin])),
    Call("outputs twice", lambda runner: task(outputs=("a", "a"))(_nothing)),
    Call(
        "an output that is there",
        lambda runner: FlowTemplate("other", [begin, task(name="b", outputs="order")(_nothing)]),
    ),
    Call("an input that is not there", lambda runner: FlowTemplate("other", [task(_nothing), finish])),
    Call("outputs: an int", lambda runner: task(outputs=17)(_nothing)),
    Call("outputs: None", lambda runner: task(outputs=None)(_nothing)),
    Call("outputs: bytes", lambda runner: task(outputs=b"total")(_nothing)),
    Call("a retry that is no policy", lambda runner: FlowTemplate("other", [Suspect(_nothing, retry=3)])),
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


# --- values: refused at the call, or the attempt fails -------------------------------------------------------------


@dataclass(frozen=True)
class BadValue:
    """A value that cannot be stored, and the path to what cannot be in it."""

    id: str
    make: Callable[[ExitStack], Any]
    path: str = "bad cannot be stored"


def _open_file(stack: ExitStack) -> Any:
    return stack.enter_context(Path(__file__).open(encoding="utf-8"))


def _coroutine(stack: ExitStack) -> Any:
    made = asyncio.sleep(0)
    stack.callback(made.close)
    return made


def _connection(stack: ExitStack) -> Any:
    made = sqlite3.connect(":memory:")
    stack.callback(made.close)
    return made


BAD_VALUES = [
    BadValue("a lambda", lambda _: lambda: 1),
    BadValue("a function", lambda _: _nothing),
    BadValue("a task", lambda _: begin),
    BadValue("a lock", lambda _: threading.Lock()),
    BadValue("an open file", _open_file),
    BadValue("a database connection", _connection),
    BadValue("a generator", lambda _: (each for each in (1, 2))),
    BadValue("a coroutine", _coroutine),
    BadValue("a module", lambda _: types),
    BadValue("a class", lambda _: Guarded),
    BadValue("a plain object", lambda _: object()),
    BadValue("an exception", lambda _: ValueError("no")),
    BadValue("a complex number", lambda _: 1j),
    BadValue("a bytearray", lambda _: bytearray(b"1")),
    BadValue("a range", lambda _: range(3)),
    BadValue("NotImplemented", lambda _: NotImplemented),
    BadValue("a circular list", lambda _: circle([], lambda made: made.append(made)), "bad[0] cannot be stored"),
    BadValue("a circular dict", lambda _: circle({}, lambda made: made.update(me=made)), "bad['me'] cannot be stored"),
    BadValue(
        "a circular dataclass",
        lambda _: circle(Ring(), lambda made: setattr(made, "next", [made])),
        "bad.next[0] cannot",
    ),
    BadValue(
        "one level too deep", lambda _: nested(MAX_DEPTH), "[0][0][0][0] cannot be stored: it is nested too deeply"
    ),
    BadValue("far too deep", lambda _: nested(100_000), "it is nested too deeply"),
    BadValue("a foreign time zone", lambda _: [datetime(2030, 1, 1, tzinfo=OwnZone())], "bad[0] cannot be stored"),
    BadValue("a time with a foreign zone", lambda _: time(12, tzinfo=OwnZone())),
    BadValue("a subclass of int", lambda _: OwnInt(1)),
    BadValue("a subclass of str", lambda _: OwnStr("1")),
    BadValue("a subclass of str as a key", lambda _: {OwnStr("1"): 1}, "(the key) cannot be stored"),
    BadValue("a subclass of dict", lambda _: OrderedDict(a=1)),
    BadValue("another subclass of dict", lambda _: {"count": Counter("abc")}, "bad['count'] cannot be stored"),
    BadValue("a mapping that is no dict", lambda _: UserDict(a=1)),
    BadValue("an object whose __reduce__ raises", lambda _: NoReduce()),
    BadValue("an object whose __eq__ raises", lambda _: [NoEquality()], "bad[0] cannot be stored"),
    BadValue("an object whose __repr__ raises", lambda _: NoRepr()),
    BadValue("an object that says it is a dict", lambda _: Impostor()),
    BadValue("an object whose class cannot be named", lambda _: OddlyMade()),
    BadValue("a dataclass whose field raises", lambda _: Moody(1)),
    BadValue("a dataclass that holds a lock", lambda _: Guarded(1, threading.Lock()), "bad.guard cannot be stored"),
    BadValue(
        "a lock deep within",
        lambda _: {"lines": [Guarded(1, None), Guarded(1, (0, threading.Lock()))]},
        "bad['lines'][1].guard[1] cannot be stored",
    ),
    BadValue("a lambda in a set", lambda _: {len}, "bad{...} cannot be stored"),
    BadValue("a lambda as a key", lambda _: {(1, len): 2}, "(the key)[1] cannot be stored"),
    BadValue("a context", lambda _: ExecutionContext(a=1)),
    BadValue("a context in a list", lambda _: [ExecutionContext(a=1)], "bad[0] cannot be stored"),
]


@pytest.mark.parametrize("case", cases(BAD_VALUES))
def test_a_value_that_cannot_be_stored_is_refused_at_the_call(
    case: BadValue, runner: FlowRunner, stack: ExitStack
) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    value = case.make(stack)
    calls: list[Callable[[], object]] = [
        lambda: runner.schedule_flow("flow", {"order": 17, "bad": value}),
        lambda: runner.schedule_flow("flow", ExecutionContext(order=17, bad=value)),
        lambda: runner.service.create_flow_execution("flow", {"bad": value}),
    ]
    for call in calls:
        error = refused(runner.service, ValueError, call)
        assert isinstance(error, TypeError)
        assert case.path in str(error)


@pytest.mark.parametrize("case", cases(BAD_VALUES))
def test_a_value_that_cannot_be_stored_fails_the_attempt_that_returns_it(
    case: BadValue, runner: FlowRunner, stack: ExitStack
) -> None:
    suspect = Suspect(lambda context: context.copy(bad=case.make(stack)))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="UnserializableValueError", says=case.path)
    succeeds_once_mended(runner, execution_id, suspect)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cannot_be_stored_fails_every_kind_of_task(kind: type[Suspect], runner: FlowRunner) -> None:
    suspect = kind(lambda context, *_: context.copy(bad={"lock": threading.Lock()}))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="UnserializableValueError", says="bad['lock'] cannot be stored")
    succeeds_once_mended(runner, execution_id, suspect)


# --- values: kept exactly ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoodValue:
    id: str
    value: Any


BERLIN, NEW_YORK = ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York")

GOOD_VALUES = [
    GoodValue("a str with NUL", "a\x00b\x00"),
    GoodValue("a str with surrogates", "a\udc80b\ud83d"),
    GoodValue("a str with surrogates that would make a pair", "\ud83d\ude00"),
    GoodValue("backslashes that look like escapes", "\\u0000 \\x00 \\\\u0000 \\"),
    GoodValue("NUL and backslashes", "\\u0000\x00\\"),
    GoodValue("every control character", "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff\uffff"),
    GoodValue("decomposed text", "cafe\u0301"),
    GoodValue("NaN", math.nan),
    GoodValue("a NaN with a payload", struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]),
    GoodValue("infinities", [math.inf, -math.inf, {"at": math.inf}]),
    GoodValue("minus zero", [-0.0, 0.0]),
    GoodValue("the least and the greatest float", [5e-324, sys.float_info.max, 0.1 + 0.2, 1e22]),
    GoodValue("a huge int", 10**5000),
    GoodValue("ints beyond 64 bits", [2**63, -(2**63) - 1, 2**64, -(10**5000)]),
    GoodValue("ints as keys, not strs", {1: "a", "1": "b"}),
    GoodValue("True beside 1 and 1.0", [True, 1, 1.0]),
    GoodValue("a str of a megabyte", "\u6f6e\U0001f30a~" * 330_000),
    GoodValue("bytes of a megabyte", bytes(range(256)) * 4096),
    GoodValue("a list of 10,000 elements", [{"n": n, "price": Decimal(n) / 7} for n in range(10_000)]),
    GoodValue("as deep as it may be", nested(MAX_DEPTH - 4)),
    GoodValue("empty containers", [[], (), set(), frozenset(), {}, "", b"", [[]], ((),)]),
    GoodValue("None in all places", [None, {"none": None}, (None,)]),
    GoodValue("a dict with tuples for keys", {(1, "a"): 1, (): 2, ("a", (None, 1.5)): [3]}),
    GoodValue("a dict with keys of many types", {None: 1, 1.5: 2, b"k": 3, frozenset({1}): 4, date(2030, 1, 1): 5}),
    GoodValue("a dict with odd keys", {"": 1, "$type": "int", "value": 2, "a\x00": 3, "\udc80": 4, "%s": 5}),
    GoodValue("a dict that looks like a tag", {"$type": "int", "value": "17"}),
    GoodValue("a dict that is out of order", {"b": 1, "a": 2, "C": 3, "10": 4, "9": 5}),
    GoodValue("a signalling NaN", Decimal("sNaN")),
    GoodValue(
        "odd decimals", [Decimal("-NaN123"), Decimal("-0"), Decimal("1.00"), Decimal("1E+400"), Decimal("-Infinity")]
    ),
    GoodValue("the greatest datetime", datetime.max),
    GoodValue("the least datetime", datetime.min),
    GoodValue("the greatest datetime in UTC", datetime.max.replace(tzinfo=UTC)),
    GoodValue("the least datetime in UTC", datetime.min.replace(tzinfo=UTC)),
    GoodValue(
        "the greatest datetime west of UTC", datetime.max.replace(tzinfo=timezone(timedelta(hours=-23, minutes=-59)))
    ),
    GoodValue("the least datetime east of UTC", datetime.min.replace(tzinfo=timezone(timedelta(hours=23, minutes=59)))),
    GoodValue("the greatest datetime in New York", datetime.max.replace(tzinfo=NEW_YORK)),
    GoodValue("the least datetime in Berlin", datetime.min.replace(tzinfo=BERLIN)),
    GoodValue("an hour that comes twice", datetime(2030, 10, 27, 2, 30, fold=1, tzinfo=BERLIN)),
    GoodValue("an hour that never comes", datetime(2030, 3, 31, 2, 30, tzinfo=BERLIN)),
    GoodValue("a zone of seconds", datetime(2030, 1, 1, tzinfo=timezone(timedelta(seconds=1), "one [second]"))),
    GoodValue("the ends of time", [date.min, date.max, time.max, timedelta.min, timedelta.max, timedelta.resolution]),
    GoodValue("text that looks like JSON", '{"$type": "set", "value": [1]}'),
    GoodValue("text that looks like null", ["null", "true", "NaN", "Infinity", "0x1f", "1e400"]),
    GoodValue("text that looks like SQL", "'; DELETE FROM ebbs_flow_executions; --"),
    GoodValue("text that looks like parameters", ":x %s %(x)s ? $1 {} {0!r}"),
    GoodValue("other values", [UUID(int=0), UUID(int=2**128 - 1), Path("a\udcff/../b"), Path()]),
    GoodValue("sets of mixed values", [{1, "1", None, (1,)}, frozenset({frozenset(), b""})]),
]


def exactly(value: Any) -> Any:
    """What tells a value from every other one: equal only for the same type and the same value, all the way down."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [exactly(each) for each in value]
    if kind in (set, frozenset):
        return kind, sorted((exactly(each) for each in value), key=repr)
    if kind is dict:
        return kind, [(exactly(key), exactly(each)) for key, each in value.items()]
    if kind is int:
        return kind, hex(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is datetime:
        return kind, repr(value), exactly(value.tzname()) if value.tzinfo is not None else None
    return kind, value if kind is str else repr(value)


@pytest.mark.parametrize("case", cases(GOOD_VALUES))
def test_a_value_is_kept_exactly(case: GoodValue, runner: FlowRunner) -> None:
    received: list[Any] = []

    def receive(context: ExecutionContext) -> ExecutionContext:
        received.append(context["given"])
        return context.copy(returned=copy.deepcopy(case.value))

    def receive_again(context: ExecutionContext) -> ExecutionContext:
        received.extend((context["given"], context["returned"]))
        return context

    runner.register_flow_template(
        FlowTemplate("flow", [Suspect(receive), FunctionTask(receive_again, name="receive again")])
    )
    execution_id = runner.schedule_flow("flow", {"given": case.value})
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    received.extend((execution.execution_context["given"], execution.execution_context["returned"]))
    wanted = exactly(case.value)
    assert [exactly(each) == wanted for each in received] == [True] * 5


def test_what_the_caller_does_with_a_value_afterwards_changes_nothing(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    lines = [1, 2]
    context = ExecutionContext(order=17, lines=lines)
    execution_id = runner.schedule_flow("flow", context)
    lines.append(3)
    context["lines"].append(4)
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context["lines"] == [1, 2]


# --- results that are none: the attempt fails and is not retried ---------------------------------------------------


@dataclass(frozen=True)
class Result:
    id: str
    body: Body
    says: str


async def _later() -> None:
    """What nobody awaits."""


async def _many() -> Any:
    yield 1


BAD_RESULTS = [
    Result("None", lambda context, *_: None, "returned None"),
    Result("a coroutine", lambda context, *_: _later(), "returned a coroutine that nobody awaits"),
    Result("a generator", lambda context, *_: (each for each in ()), "returned a generator"),
    Result("an asynchronous generator", lambda context, *_: _many(), "returned a async_generator"),
    Result("a dict", lambda context, *_: dict(context), "returned a dict"),
    Result("True", lambda context, *_: True, "returned a bool"),
    Result("a str", lambda context, *_: "done", "returned a str"),
    Result("a tuple", lambda context, *_: (context, 1), "returned a tuple"),
    Result("an exception", lambda context, *_: ValueError("returned"), "returned a ValueError"),
    Result("the class of contexts", lambda context, *_: ExecutionContext, "returned a"),
    Result("an object whose class cannot be named", lambda context, *_: OddlyMade(), "returned a OddlyMade"),
    Result("an object that says it is a dict", lambda context, *_: Impostor(), "returned a Impostor"),
]


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("case", cases(BAD_RESULTS))
def test_a_result_that_is_no_context_fails_the_attempt(case: Result, kind: type[Suspect], runner: FlowRunner) -> None:
    suspect = kind(case.body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says=case.says)
    succeeds_once_mended(runner, execution_id, suspect)


@dataclass(frozen=True)
class FunctionResult:
    id: str
    outputs: Any
    result: Any
    says: str


BAD_FUNCTION_RESULTS = [
    FunctionResult("a tuple that is too short", ("a", "b"), (1,), "returned a tuple of 1; its outputs ['a', 'b']"),
    FunctionResult("a tuple that is too long", ("a", "b"), (1, 2, 3), "returned a tuple of 3; its outputs ['a', 'b']"),
    FunctionResult("an empty tuple", ("a",), (), "returned a tuple of 0"),
    FunctionResult("a list for a tuple", ("a", "b"), [1, 2], "returned list; its outputs ['a', 'b']"),
    FunctionResult("None for a tuple", ("a", "b"), None, "returned NoneType; its outputs ['a', 'b']"),
    FunctionResult("a value without a name", (), 17, "returned a int but names no outputs"),
    FunctionResult("a dict without a name", (), {"a": 1}, "returned a dict but names no outputs"),
    FunctionResult("a generator without a name", (), iter(()), "but names no outputs"),
]


@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
@pytest.mark.parametrize("case", cases(BAD_FUNCTION_RESULTS))
def test_a_result_that_does_not_fit_the_outputs_fails_the_attempt(
    case: FunctionResult, is_async: bool, runner: FlowRunner
) -> None:
    def plain() -> Any:
        return case.result

    async def asynchronous() -> Any:
        return case.result

    function: Body = asynchronous if is_async else plain
    suspect = FunctionTask(function, name="suspect", outputs=case.outputs, retry=THREE_ATTEMPTS)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says=case.says)


def test_a_function_that_returns_a_coroutine_fails_the_attempt(runner: FlowRunner) -> None:
    def forgetful() -> Any:
        return _later()

    execution_id = schedule(runner, FunctionTask(forgetful, name="suspect", outputs="a", retry=THREE_ATTEMPTS))
    runner.run_until_idle()
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="returned a coroutine")


# --- what a task raises: a failed attempt with a record ------------------------------------------------------------


class NoMessageError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class ExitingMessageError(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NoRepresentationError(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("no representation")


class OddMessageError(Exception):
    def __str__(self) -> str:
        return Unsliceable("odd")


class Unsliceable(str):
    __slots__ = ()

    def __getitem__(self, key: Any) -> str:
        raise RuntimeError("not sliced")


class NoPickleError(Exception):
    def __init__(self) -> None:
        super().__init__(threading.Lock())

    def __reduce__(self) -> Any:
        raise RuntimeError("not pickled")


class NoComparisonError(Exception):
    __hash__ = None

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not compared")


class NoCheckMeta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        raise RuntimeError("not checked")


class NoCheckError(Exception, metaclass=NoCheckMeta):
    pass


class NamelessMeta(type):
    @property
    def __name__(cls) -> str:
        raise RuntimeError("no name")


class NamelessError(Exception, metaclass=NamelessMeta):
    pass


class NumberedMeta(type):
    @property
    def __name__(cls) -> Any:
        return 17


class NumberedError(Exception, metaclass=NumberedMeta):
    pass


class NoModuleError(Exception):
    __module__ = 17


Cyrillic = type("\u041e\u0448\u0438\u0431\u043a\u0430\u6f6e", (Exception,), {})
LongNamed = type("Long" * 100, (Exception,), {})


def in_a_circle() -> Exception:
    first, second = ValueError("first of a circle"), ValueError("second of a circle")
    first.__cause__, second.__cause__ = second, first
    first.__context__ = first
    return first


def with_notes(notes: Any) -> Exception:
    error = ValueError("with notes")
    error.__notes__ = notes
    return error


def chained(length: int) -> Exception:
    error = ValueError("end of the chain")
    for _ in range(length):
        above = ValueError("link of the chain")
        above.__cause__, error = error, above
    return error


def group(levels: int) -> BaseException:
    error: BaseException = ValueError("innermost of the group")
    for level in range(levels):
        error = builtins.ExceptionGroup(f"group {level}", [error, OSError("beside it")])
    return error


def endless() -> None:
    endless()


@dataclass(frozen=True)
class Raised:
    """What a task raises, and what is recorded: the error's type, a part of the output, the number of attempts."""

    id: str
    make: Callable[[], BaseException]
    error_type: str
    says: str = ""
    attempts: int = field(default=3, kw_only=True)


RAISED = [
    Raised("a plain exception", lambda: ValueError("plain"), "ValueError", "plain"),
    Raised("without a message", ValueError, "ValueError"),
    Raised("a message that raises", NoMessageError, "NoMessageError"),
    Raised("a message that exits", ExitingMessageError, "ExitingMessageError"),
    Raised("a message that cannot be sliced", OddMessageError, "OddMessageError"),
    Raised("a representation that raises", lambda: NoRepresentationError("shown"), "NoRepresentationError", "shown"),
    Raised("an argument without representation", lambda: ValueError(NoRepr(), 1), "ValueError"),
    Raised("NUL in its message", lambda: ValueError("a\x00b"), "ValueError", "a\\x00b"),
    Raised("lone surrogates in its message", lambda: ValueError("a\udc80b\ud83d"), "ValueError", "a\\udc80b\\ud83d"),
    Raised("a megabyte of text", lambda: ValueError("begin " + "x" * 2**20 + " end"), "ValueError", " end"),
    Raised("a megabyte of NUL", lambda: ValueError("\x00" * 2**20), "ValueError", "\\x00"),
    Raised("a megabyte of emoji", lambda: ValueError("\U0001f30a" * 2**20), "ValueError", "\U0001f30a"),
    Raised("a message of line feeds and formats", lambda: ValueError("\r\n%s {} :x\r\n"), "ValueError", "%s {} :x"),
    Raised("SystemExit", lambda: SystemExit(3), "SystemExit", attempts=1),
    Raised("GeneratorExit", GeneratorExit, "GeneratorExit", attempts=1),
    Raised("CancelledError", asyncio.CancelledError, "CancelledError", attempts=1),
    Raised("a bare BaseException", lambda: BaseException("base"), "BaseException", "base", attempts=1),
    Raised("StopIteration", lambda: StopIteration(3), "StopIteration"),
    Raised("StopAsyncIteration", StopAsyncIteration, "StopAsyncIteration"),
    Raised("MemoryError", MemoryError, "MemoryError"),
    Raised("TimeoutError, which is no limit of ours", lambda: TimeoutError("theirs"), "TimeoutError", "theirs"),
    Raised("one of this library's errors", lambda: LeaseLostError(1, 1), "LeaseLostError"),
    Raised("the error for results", lambda: TaskResultError("suspect", "by hand"), "TaskResultError", attempts=1),
    Raised("a name that is not ASCII", lambda: Cyrillic("no"), Cyrillic.__name__, Cyrillic.__name__),
    Raised("a name of 400 characters", lambda: LongNamed("no"), LongNamed.__name__[:255], "no"),
    Raised("a name that raises", lambda: NamelessError("no"), "NamelessError"),
    Raised("a name that is no str", lambda: NumberedError("no"), "NumberedError"),
    Raised("a module that is no str", lambda: NoModuleError("no"), "NoModuleError"),
    Raised("one that cannot be pickled", NoPickleError, "NoPickleError"),
    Raised("one that cannot be compared", lambda: NoComparisonError("no"), "NoComparisonError", "no"),
    Raised("a class that refuses to be asked", lambda: NoCheckError("no"), "NoCheckError", "no"),
    Raised("causes in a circle", in_a_circle, "ValueError", "first of a circle"),
    Raised("a long chain of causes", lambda: chained(2_000), "ValueError", "of the chain"),
    Raised("notes that are no strings", lambda: with_notes([NoRepr(), 17, "n\x00"]), "ValueError", "with notes"),
    Raised("notes that are no list", lambda: with_notes(NoRepr()), "ValueError", "with notes"),
    Raised(
        "an error of syntax in a file with NUL", lambda: SyntaxError("no", ("f\x00", 1, 1, "a\x00b")), "SyntaxError"
    ),
]
if sys.version_info >= (3, 11):
    RAISED += [
        Raised("a group", lambda: group(1), "ExceptionGroup", "innermost of the group"),
        Raised("a group in a group, deep", lambda: group(200), "ExceptionGroup", "group 199"),
        Raised(
            "a group of exits",
            lambda: builtins.BaseExceptionGroup("exits", [SystemExit(3), KeyboardInterrupt()]),
            "BaseExceptionGroup",
            attempts=1,
        ),
    ]


def raising(case: Raised) -> Body:
    def body(context: ExecutionContext, *_: Any) -> Any:
        raise case.make()

    return body


@pytest.mark.parametrize("case", cases(RAISED))
def test_whatever_a_task_raises_is_recorded(case: Raised, runner: FlowRunner) -> None:
    suspect = Suspect(raising(case))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    found = failed(runner, execution_id, attempts=case.attempts, error_type=case.error_type, says=case.says)
    assert {each.failure for each in found} == {Failure.EXCEPTION}
    succeeds_once_mended(runner, execution_id, suspect)


HOSTILE_TO_LOOPS = (
    "SystemExit",
    "CancelledError",
    "GeneratorExit",
    "a name that raises",
    "a representation that raises",
)


@pytest.mark.parametrize("limit", [None, 30.0], ids=["without limit", "with a limit"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", cases([case for case in RAISED if case.id in HOSTILE_TO_LOOPS]))
def test_what_leaves_other_loops_is_recorded_from_every_kind_of_task(
    case: Raised, kind: type[Suspect], limit: float | None, runner: FlowRunner
) -> None:
    suspect = kind(raising(case), timeout_seconds=limit)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=case.attempts, error_type=case.error_type, says=case.says)
    succeeds_once_mended(runner, execution_id, suspect)


@pytest.mark.parametrize(
    "case", cases([case for case in RAISED if case.id in ("a representation that raises", "a name that raises")])
)
def test_what_an_async_task_raises_spoils_no_later_one(case: Raised, runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("hostile", [AsyncSuspect(raising(case), RetryPolicy())]))
    runner.register_flow_template(FlowTemplate("sound", [AsyncSuspect(lambda context: context)]))
    runner.schedule_flow("hostile")
    sound = runner.schedule_flow("sound")
    runner.run_until_idle()
    assert runner.service.get_flow_execution(sound).status is FlowStatus.SUCCEEDED


def test_endless_recursion_is_recorded(runner: FlowRunner) -> None:
    suspect = Suspect(lambda context: endless())
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="RecursionError", says="maximum recursion depth exceeded")
    succeeds_once_mended(runner, execution_id, suspect)


def test_an_exception_whose_policy_cannot_be_asked_is_recorded(runner: FlowRunner) -> None:
    suspect = Suspect(raising(RAISED[0]), RetryPolicy(max_attempts=3, wait=wait_none(), retry_on=(NoCheckError,)))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(
        runner, execution_id, attempts=1, error_type="ValueError", says="No retry: the retry policy raised RuntimeError"
    )
    succeeds_once_mended(runner, execution_id, suspect)


@pytest.mark.parametrize("limit", [None, 30.0], ids=["without limit", "with a limit"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_hands_the_execution_back_and_is_raised_on(
    kind: type[Suspect], limit: float | None, runner: FlowRunner
) -> None:
    interrupts = [KeyboardInterrupt()]

    def body(context: ExecutionContext, *_: Any) -> ExecutionContext:
        if interrupts:
            raise interrupts.pop()
        return context

    execution_id = schedule(runner, kind(body, RetryPolicy(max_attempts=1), limit))
    with pytest.raises(KeyboardInterrupt):
        runner.run_flow()

    execution = runner.service.get_flow_execution(execution_id)
    assert (execution.status, execution.lease_owner) == (FlowStatus.RESCHEDULED, None)
    assert execution.execution_context == EARLIER
    (stopped,) = attempts_at(runner, execution_id)
    assert (stopped.status, stopped.failure) == (TaskStatus.FAILED, Failure.STOPPED)
    assert stopped.error_type == "WorkerStopped"

    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert [each.status for each in attempts_at(runner, execution_id)] == [TaskStatus.FAILED, TaskStatus.SUCCEEDED]


@pytest.mark.parametrize("limit", [None, 30.0], ids=["without limit", "with a limit"])
def test_a_signal_interrupts_a_task_that_awaits(limit: float | None, runner: FlowRunner) -> None:
    class Awaiting(AsyncSuspect):
        async def run(self, context: ExecutionContext) -> Any:
            if self.body(context):
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(10)
            return context

    suspect = Awaiting(lambda context: True, RetryPolicy(), limit)
    execution_id = schedule(runner, suspect)
    with pytest.raises(KeyboardInterrupt):
        runner.run_flow()
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    assert [each.failure for each in attempts_at(runner, execution_id)] == [Failure.STOPPED]

    suspect.body = lambda context: False
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED


def test_an_interrupt_uses_up_no_attempt(runner: FlowRunner) -> None:
    raised = [ValueError("third"), KeyboardInterrupt(), ValueError("second"), KeyboardInterrupt(), ValueError("first")]

    def body(context: ExecutionContext) -> ExecutionContext:
        raise raised.pop()

    execution_id = schedule(runner, Suspect(body))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.run_until_idle()
    runner.run_until_idle()

    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    assert [each.failure for each in attempts_at(runner, execution_id)] == [
        Failure.EXCEPTION,
        Failure.STOPPED,
        Failure.EXCEPTION,
        Failure.STOPPED,
        Failure.EXCEPTION,
    ]


# --- policies that fail themselves ---------------------------------------------------------------------------------


class UnshownError(RuntimeError):
    def __str__(self) -> str:
        raise RuntimeError("no message")


def waiting(answer: Any) -> Callable[[Any], Any]:
    def wait(state: Any) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return wait


@dataclass(frozen=True)
class Wait:
    id: str
    wait: Callable[[Any], Any]
    says: str = "No retry: the retry policy raised"


BAD_WAITS = [
    Wait("raises", waiting(RuntimeError("no wait")), "No retry: the retry policy raised RuntimeError: no wait"),
    Wait("raises what cannot be shown", waiting(UnshownError()), "No retry: the retry policy raised UnshownError"),
    Wait("raises what has no name", waiting(NamelessError())),
    Wait(
        "raises a megabyte with NUL",
        waiting(RuntimeError("\x00" * 2**20)),
        "No retry: the retry policy raised RuntimeError",
    ),
    Wait("exits", waiting(SystemExit(3)), "No retry: the retry policy raised SystemExit"),
    Wait("is cancelled", waiting(asyncio.CancelledError()), "No retry: the retry policy raised CancelledError"),
    Wait("NaN", waiting(math.nan)),
    Wait("infinite", waiting(math.inf)),
    Wait("too long", waiting(1e12)),
    Wait("an int that is no float", waiting(10**400)),
    Wait("a str", waiting("soon")),
    Wait("None", waiting(None)),
    Wait("takes no arguments", lambda: 0),
]


@pytest.mark.parametrize("case", cases(BAD_WAITS))
def test_a_wait_that_is_none_ends_the_retries(case: Wait, runner: FlowRunner) -> None:
    suspect = Suspect(raising(RAISED[0]), RetryPolicy(max_attempts=3, wait=case.wait))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    (only,) = failed(runner, execution_id, attempts=1, error_type="ValueError", says=case.says)
    assert "plain" in (only.output or "")
    succeeds_once_mended(runner, execution_id, suspect)


@pytest.mark.parametrize("wait", [-1, -1e300, -0.0, 1e-9], ids=str)
def test_a_wait_below_what_can_be_waited_means_at_once(wait: float, runner: FlowRunner) -> None:
    suspect = Suspect(raising(RAISED[0]), RetryPolicy(max_attempts=3, wait=waiting(wait)))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="ValueError", says="plain")
    succeeds_once_mended(runner, execution_id, suspect)


# --- what a task does to its context -------------------------------------------------------------------------------


def test_what_a_task_does_to_its_values_changes_nothing_stored(runner: FlowRunner) -> None:
    seen: list[list[int]] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        values = context["earlier"]
        seen.append(list(values))
        values.append(3)
        context["earlier"].clear()
        if len(seen) < 3:
            raise ValueError("after it has changed them")
        return context

    execution_id = schedule(runner, Suspect(body))
    runner.run_until_idle()
    assert seen == [[1, 2]] * 3
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}


@dataclass(frozen=True)
class Change:
    id: str
    body: Body
    error_type: str
    says: str


BAD_CHANGES = [
    Change("sets an entry", lambda context: context.set("new", 1), "FrozenContextError", "'new' cannot be set"),
    Change("replaces an entry", lambda context: context.copy(order=18), "DuplicateEntryError", "'order'"),
    Change("assigns to an entry", lambda context: exec("context['order'] = 18"), "TypeError", "item assignment"),
    Change("deletes an entry", lambda context: exec("del context['order']"), "TypeError", "item deletion"),
    Change("drops what is not there", lambda context: context.without("ordre"), "MissingEntryError", "'ordre'"),
    Change("reads what is not there", lambda context: context["ordre"], "MissingEntryError", "'ordre'"),
    Change(
        "reads an entry as another type",
        lambda context: context.get_as("order", list[int]),
        "InvalidEntryError",
        "order",
    ),
    Change(
        "names an entry badly", lambda context: context.copy({"a\x00b": 1}), "InvalidNameError", "control character"
    ),
    Change("names an entry by a number", lambda context: context.copy({17: 1}), "InvalidNameError", "must be a str"),
    Change("takes no context", lambda: None, "TypeError", "positional argument"),
]


@pytest.mark.parametrize("case", cases(BAD_CHANGES))
def test_a_change_that_is_not_allowed_fails_the_attempt(case: Change, runner: FlowRunner) -> None:
    suspect = Suspect(case.body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type=case.error_type, says=case.says)
    succeeds_once_mended(runner, execution_id, suspect)


def test_an_output_that_is_there_already_fails_the_attempt(runner: FlowRunner) -> None:
    # An undeclared entry, so that no template could have known.
    suspect = Suspect(lambda context: context.copy(receipt="r-0"))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    assert execution.execution_context == {**EARLIER, "receipt": "r-0"}
    (clash,) = attempts_at(runner, execution_id, "finish")
    assert clash.error_type == "DuplicateEntryError"
    assert "'receipt'" in (clash.output or "")

    suspect.body = lambda context: context
    runner.reschedule_flow_execution(execution_id, from_task="suspect")
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}


def test_an_entry_that_a_later_task_needs_is_missed_there(runner: FlowRunner) -> None:
    suspect = Suspect(lambda context: context.without("order"))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    assert execution.execution_context == {"earlier": [1, 2]}
    (missed,) = attempts_at(runner, execution_id, "finish")
    assert missed.error_type == "MissingEntryError"
    assert "'order'" in (missed.output or "")

    suspect.body = lambda context: context
    runner.reschedule_flow_execution(execution_id, from_task="suspect")
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}


def test_a_fault_of_one_flow_does_not_stop_another(runner: FlowRunner) -> None:
    for n, case in enumerate(RAISED):
        runner.register_flow_template(FlowTemplate(f"flow {n}", [Suspect(raising(case), RetryPolicy())]))
        runner.schedule_flow(f"flow {n}")
    runner.register_flow_template(FlowTemplate("sound", [begin, finish]))
    sound = runner.schedule_flow("sound", {"order": 17}, priority=-1)

    assert runner.run_until_idle() == len(RAISED) + 1
    assert runner.service.get_flow_execution(sound).status is FlowStatus.SUCCEEDED


# --- what a transactional task does to its session -----------------------------------------------------------------


@pytest.fixture
def effects(service: FlowService) -> Callable[[], list[int]]:
    """A table beside the library's own; called, it gives what is in it."""
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (n INTEGER PRIMARY KEY)"))

    def read() -> list[int]:
        with service.engine.connect() as connection:
            return list(connection.execute(text("SELECT n FROM effects ORDER BY n")).scalars())

    return read


Effects: TypeAlias = Callable[[], list[int]]


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effects"
    n: Mapped[int] = mapped_column(primary_key=True)


def add(session: Session | Connection, n: int) -> None:
    session.execute(text("INSERT INTO effects VALUES (:n)"), {"n": n})


@dataclass(frozen=True)
class InSession:
    """What a task does between its effect, the number 1, and its end; and which effects are there once it succeeded."""

    id: str
    act: Callable[[Session], object]
    kept: list[int]


def _rolled_back(session: Session) -> None:
    session.rollback()
    add(session, 2)


def _nested(session: Session) -> None:
    with pytest.raises(DBAPIError), session.begin_nested():
        add(session, 1)
    add(session, 2)


def _committed_twice(session: Session) -> None:
    session.commit()
    add(session, 2)
    session.commit()
    session.commit()


SAFE_SESSIONS = [
    InSession("commits", lambda session: session.commit(), [1]),
    InSession("commits twice", _committed_twice, [1, 2]),
    InSession("rolls back", lambda session: session.rollback(), []),
    InSession("rolls back and goes on", _rolled_back, [2]),
    InSession("fails within a savepoint of its own", _nested, [1, 2]),
    InSession("commits and closes", lambda session: (session.commit(), session.close()), [1]),
    InSession("expunges all", lambda session: session.expunge_all(), [1]),
]


@pytest.mark.parametrize("case", cases(SAFE_SESSIONS))
def test_what_a_session_allows_ends_no_transaction(case: InSession, runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        case.act(session)
        return context.copy(seen=runner_sees())

    def runner_sees() -> int:
        # Nothing of it is there for others before the checkpoint is.
        return len(effects()) if runner.service.engine.dialect.name == "postgresql" else 0

    execution_id = schedule(runner, TransactionalSuspect(body))
    runner.run_until_idle()
    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    assert execution.execution_context["seen"] == 0
    assert effects() == case.kept


@pytest.mark.parametrize("case", cases(SAFE_SESSIONS))
def test_what_a_session_has_done_is_undone_with_a_failed_attempt(
    case: InSession, runner: FlowRunner, effects: Effects
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        case.act(session)
        raise ValueError("after all that")

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="ValueError", says="after all that")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_session_that_is_closed_undoes_what_it_did_not_commit(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.close()
        return context

    execution_id = schedule(runner, TransactionalSuspect(body))
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert effects() == []


def _ends_the_transaction(session: Session) -> None:
    session.connection().commit()


def _rolls_the_transaction_back(session: Session) -> None:
    session.connection().rollback()


def _closes_the_connection(session: Session) -> None:
    session.connection().close()


def _commits_in_sql(session: Session) -> None:
    session.execute(text("COMMIT"))


def _rolls_back_in_sql(session: Session) -> None:
    session.execute(text("ROLLBACK"))


@pytest.mark.parametrize(
    "act",
    [
        _ends_the_transaction,
        _rolls_the_transaction_back,
        _closes_the_connection,
        _commits_in_sql,
        _rolls_back_in_sql,
    ],
)
def test_a_task_that_ends_its_transaction_fails_and_is_not_retried(
    act: Callable[[Session], None], runner: FlowRunner, effects: Effects
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        act(session)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    # Once its effects may be there without its checkpoint, another attempt could have them twice.
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="ended the transaction")
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_task_that_loses_its_connection_has_no_effects(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.connection().invalidate()
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="PendingRollbackError", says="")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_database_error_fails_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        add(session, 1)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="IntegrityError", says="effects")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_database_error_that_the_task_swallows_never_loses_its_effects(
    runner: FlowRunner, effects: Effects, database: str
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        with pytest.raises(DBAPIError):
            add(session, 1)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    if database == "sqlite":  # where a statement that fails leaves the transaction as it was
        assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
        assert effects() == [1]
    else:  # where the transaction is lost with it
        failed(runner, execution_id, attempts=3, error_type="InternalError", says="transaction is aborted")
        assert effects() == []
        succeeds_once_mended(runner, execution_id, suspect)


def test_a_flush_that_failed_fails_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.add(Effect(n=1))
        with pytest.raises(DBAPIError):
            session.flush()
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(
        runner,
        execution_id,
        attempts=3,
        error_type="PendingRollbackError",
        says="rolled back due to a previous exception",
    )
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_what_a_session_has_not_flushed_is_flushed_within_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.add(Effect(n=1))
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="IntegrityError", says="effects")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_commit_that_the_database_refuses_fails_the_attempt(
    runner: FlowRunner, effects: Effects, database: str
) -> None:
    with runner.service.engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE details (n INTEGER REFERENCES effects (n) DEFERRABLE INITIALLY DEFERRED)")
        )

    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.execute(text("INSERT INTO details VALUES (2)"))
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(
        runner,
        execution_id,
        attempts=3,
        error_type="IntegrityError",
        says="violates foreign key" if database == "postgresql" else "FOREIGN KEY",
    )
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_result_that_cannot_be_recorded_takes_the_effects_with_it(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> Any:
        add(session, 1)
        session.commit()

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="returned None")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set once the test is over, so that what was left to itself ends; then it is waited for."""
    event = threading.Event()
    yield event
    event.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ebbs task"):
            thread.join(10)
            assert not thread.is_alive()


class AsyncSleeper(AsyncSuspect):
    async def run(self, context: ExecutionContext) -> Any:
        result = self.body(context)
        await asyncio.sleep(10 if result is None else 0)
        return result


class AsyncTransactionalSleeper(AsyncTransactionalSuspect):
    async def run(self, context: ExecutionContext, session: Session) -> Any:
        result = self.body(context, session)
        await asyncio.sleep(10 if result is None else 0)
        return result


@pytest.mark.parametrize("kind", [Suspect, AsyncSleeper, TransactionalSuspect, AsyncTransactionalSleeper])
def test_a_limit_that_passes_fails_the_attempt(
    kind: type[Suspect], runner: FlowRunner, effects: Effects, released: threading.Event
) -> None:
    def body(context: ExecutionContext, session: Session | None = None) -> Any:
        if session is not None:
            add(session, 1)
        if kind in (AsyncSleeper, AsyncTransactionalSleeper):
            return None
        released.wait(0.1 if kind is TransactionalSuspect else 10)
        return context

    suspect = kind(body, RetryPolicy(), timeout_seconds=0.05)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    (only,) = failed(
        runner, execution_id, attempts=1, error_type="TaskTimeoutError", says="ran past its limit of 0.05 seconds"
    )
    assert only.failure is Failure.TIMEOUT
    assert effects() == []
    suspect.timeout_seconds = None
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_function_has_its_limit_as_well(runner: FlowRunner, released: threading.Event) -> None:
    suspect = FunctionTask(lambda: released.wait(10), name="suspect", outputs="a", timeout_seconds=0.05)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    (only,) = failed(
        runner, execution_id, attempts=1, error_type="TaskTimeoutError", says="'suspect' ran past its limit"
    )
    assert only.failure is Failure.TIMEOUT


def test_a_limit_counts_towards_the_attempts(runner: FlowRunner, released: threading.Event) -> None:
    suspect = Suspect(lambda context: released.wait(10), timeout_seconds=0.05)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    found = failed(runner, execution_id, attempts=3, error_type="TaskTimeoutError", says="ran past its limit")
    assert {each.failure for each in found} == {Failure.TIMEOUT}


def test_what_a_task_returns_after_its_limit_is_not_taken(runner: FlowRunner, released: threading.Event) -> None:
    suspect = Suspect(
        lambda context: released.wait(10) and context.copy(late=True), RetryPolicy(), timeout_seconds=0.05
    )
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    suspect.timeout_seconds = None
    succeeds_once_mended(runner, execution_id, suspect)
    released.set()
    assert "late" not in runner.service.get_flow_execution(execution_id).execution_context
