"""Whatever a task or its retry policy raises: a failed attempt with a record."""

from __future__ import annotations

import asyncio
import builtins
import math
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tenacity.wait import wait_none

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    LeaseLostError,
    RetryPolicy,
    TaskResultError,
    TaskStatus,
)
from tests.integration.bad_input.suspects import (
    EARLIER,
    KINDS,
    AsyncSuspect,
    Body,
    NoRepr,
    Suspect,
    attempts_at,
    begin,
    cases,
    failed,
    finish,
    schedule,
    succeeds_once_mended,
)

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
@pytest.mark.usefixtures("default_interrupts")
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


def test_a_fault_of_one_flow_does_not_stop_another(runner: FlowRunner) -> None:
    for n, case in enumerate(RAISED):
        runner.register_flow_template(FlowTemplate(f"flow {n}", [Suspect(raising(case), RetryPolicy())]))
        runner.schedule_flow(f"flow {n}")
    runner.register_flow_template(FlowTemplate("sound", [begin, finish]))
    sound = runner.schedule_flow("sound", {"order": 17}, priority=-1)

    assert runner.run_until_idle() == len(RAISED) + 1
    assert runner.service.get_flow_execution(sound).status is FlowStatus.SUCCEEDED
