"""The flow that bad input is tried on, what is asked of it, and objects that are hostile in many ways."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any, TypeAlias

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from tenacity.wait import wait_none

from ebbs_and_flows import (
    EbbsError,
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Task,
    TaskExecution,
    TaskStatus,
    TransactionalTask,
    task,
)

MAX_OUTPUT_LENGTH = 16_000
THREE_ATTEMPTS = RetryPolicy(max_attempts=3, wait=wait_none())
EARLIER = {"order": 17, "earlier": [1, 2]}
"""The context as the task under test receives it."""


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


UTC = timezone.utc

Effects: TypeAlias = Callable[[], list[int]]


def nothing() -> None:
    """A task that does nothing."""


class Base(DeclarativeBase):
    pass


class Effect(Base):
    __tablename__ = "effects"
    n: Mapped[int] = mapped_column(primary_key=True)


def add(session: Session | Connection, n: int) -> None:
    session.execute(text("INSERT INTO effects VALUES (:n)"), {"n": n})
