"""Run one task's body and make an outcome of whatever comes of it: nothing that a task does can go unrecorded."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import CoroutineType, TracebackType
from typing import Any, NamedTuple, cast

from sqlalchemy.orm import Session

from ebbs_and_flows.checkpoints import AttemptEnd
from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.errors import FlowTimeoutError, TaskResultError, TaskTimeoutError
from ebbs_and_flows.executions import Failure, TaskStatus
from ebbs_and_flows.names import MAX_NAME_LENGTH
from ebbs_and_flows.stopping import PAST_LIMIT, SIGNAL, StopSignal
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.texts import bounded, class_name, one_line, printable

_PACKAGE = Path(__file__).parent


class Success(NamedTuple):
    """The task returned a context that can be stored."""

    delta: ContextDelta

    def attempt_end(self) -> AttemptEnd:
        """What to record of the attempt."""
        return AttemptEnd(TaskStatus.SUCCEEDED, self.delta)


@dataclass(frozen=True)
class Failed:
    """The task raised, ran past its limit, or returned what cannot be stored.

    Attributes:
        exception: what was raised.
        failure: the kind of end.
        may_retry: whether its retry policy is to be asked; a result that cannot be recorded is not worth another try.
        note: put before the traceback, where there is more to say.
    """

    exception: BaseException
    failure: Failure = Failure.EXCEPTION
    may_retry: bool = True
    note: str = ""

    @property
    def error_type(self) -> str:
        """The exception's class name."""
        return class_name(type(self.exception))[:MAX_NAME_LENGTH]

    @property
    def summary(self) -> str:
        """The exception in one line, for the reason of a transition."""
        try:
            shown = one_line(str(self.exception), 200)
        except BaseException:  # its message is code of its class
            shown = "<its message cannot be printed>"
        return f"{self.error_type}: {shown}" if shown else self.error_type

    def attempt_end(self) -> AttemptEnd:
        """What to record of the attempt."""
        output = f"{self.note}\n\n{format_failure(self.exception)}" if self.note else format_failure(self.exception)
        return AttemptEnd(TaskStatus.FAILED, failure=self.failure, error_type=self.error_type, output=bounded(output))


Outcome = Success | Failed


@dataclass(frozen=True)
class Limit:
    """How long an attempt may take, in seconds, and what is recorded of one that takes longer."""

    seconds: float | None = None
    error: TaskTimeoutError | FlowTimeoutError | None = None

    def reached(self) -> Failed:
        """The outcome of an attempt that has reached it."""
        assert self.error is not None, "only a limit can be reached"
        return Failed(self.error, Failure.TIMEOUT, may_retry=isinstance(self.error, TaskTimeoutError))


UNLIMITED = Limit()


def run_body(
    task: Task,
    name: str,
    context: ExecutionContext,
    session: Session | None = None,
    *,
    limit: Limit | None = None,
) -> Outcome:
    """Run one task and return what came of it. Raises nothing but `KeyboardInterrupt`.

    Args:
        task: runs in this thread; with a limit a plain function runs in a thread of its own, which is asked to stop and
            left to itself at the limit, because nothing can stop it. A transactional task past its limit is rolled back
            once it returns, an `async def` task is cancelled at its next await.
        name: the task's name in its template, for messages.
        context: what the task receives, read-only.
        session: for a transactional task.
        limit: how long it may take; default without limit, for those who keep the time themselves.
    """
    try:
        result = _call(task, name, context, session, None if limit is None else limit.seconds)
    except KeyboardInterrupt:
        raise
    except _LimitReachedError:
        assert limit is not None, "only a limit can be reached"
        return limit.reached()
    except BaseException as error:  # SystemExit and the like end the attempt, not the worker
        return _failed(error)
    return _returned(name, result, context)


async def run_async_body(task: Task, name: str, context: ExecutionContext) -> Outcome:
    """Run one `async def` task in the running event loop and return what came of it. Raises nothing at all: what a
    coroutine raises must not reach the loop, which would end with a SystemExit.
    """
    try:
        result = await cast("Awaitable[Any]", task.run(context))
    except BaseException as error:
        return _failed(error)
    return _returned(name, result, context)


def _failed(error: BaseException) -> Failed:
    return Failed(error, may_retry=not isinstance(error, TaskResultError))


def _returned(name: str, result: Any, context: ExecutionContext) -> Outcome:
    try:
        return Success(_next_context(name, result).delta_from(context))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Failed(error, may_retry=False)


def format_failure(exception: BaseException) -> str:
    """The traceback as Python prints it, however hostile the exception is; from the task's own code on."""
    frames = _from_the_task_on(exception.__traceback__)
    try:
        return printable("".join(traceback.format_exception(type(exception), exception, frames)))
    except BaseException as error:
        # Code of the exception's class; or CPython 3.11, which after a RecursionError may fail to parse the lines that
        # it underlines (https://github.com/python/cpython/issues/106905).
        reason = class_name(type(error))
    return f"{_plain_frames(frames)}{class_name(type(exception))} (it cannot be printed: {reason})"


def _plain_frames(frames: TracebackType | None) -> str:
    places = "".join(
        f'  File "{each.filename}", line {each.lineno}, in {each.name}\n' for each in traceback.extract_tb(frames)[-50:]
    )
    return printable(f"Traceback (most recent call last):\n{places}")


def _from_the_task_on(frames: TracebackType | None) -> TracebackType | None:
    task_frames = frames
    while task_frames is not None and Path(task_frames.tb_frame.f_code.co_filename).parent == _PACKAGE:
        task_frames = task_frames.tb_next
    return task_frames or frames


class _LimitReachedError(Exception):
    """The limit of `timeout_seconds`, told apart from a TimeoutError that the task itself may raise."""


def _call(task: Task, name: str, context: ExecutionContext, session: Session | None, limit: float | None) -> Any:
    arguments = (context, session) if task.is_transactional else (context,)
    if task.is_async:
        return _in_event_loop(cast("Awaitable[Any]", task.run(*arguments)), limit)
    if limit is None:
        return task.run(*arguments)
    if task.is_transactional:
        began = time.monotonic()
        result = task.run(*arguments)
        signal = SIGNAL.get()
        if time.monotonic() - began > limit or (signal is not None and signal.why == PAST_LIMIT):
            raise _LimitReachedError
        return result
    return _in_thread(lambda: task.run(*arguments), name, limit)


def _next_context(name: str, result: Any) -> ExecutionContext:
    # By its type: what isinstance asks an object about its class may be code of that class.
    if issubclass(type(result), ExecutionContext):
        return cast("ExecutionContext", result)
    if issubclass(type(result), CoroutineType):
        result.close()
        raise TaskResultError(name, "returned a coroutine that nobody awaits: declare run with async def")
    raise TaskResultError(
        name,
        f"returned {'None' if result is None else 'a ' + class_name(type(result))}: a task returns the next task's "
        "input, either context or context.copy(name=value)",
    )


class _Answer:
    """What a coroutine returned or raised.

    It is put here, not passed through the event loop: a loop that ends shows its main task's result and exception, and
    what showing them raises would leave its signal handler behind, for every later loop of the process.
    """

    def __init__(self) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

    async def of(self, body: Awaitable[Any], limit: float | None) -> None:
        """Await the body, for at most `limit` seconds."""
        if limit is None:
            await self._await(body)
            return
        running = asyncio.ensure_future(self._await(body))
        done, _ = await asyncio.wait({running}, timeout=limit)
        if not done:
            running.cancel()
            await asyncio.wait({running})
            self._error = _LimitReachedError()

    async def _await(self, body: Awaitable[Any]) -> None:
        try:
            self._value = await body
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and _is_being_cancelled():
                raise
            self._error = error

    def get(self) -> Any:
        """What it returned; or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._value


def _is_being_cancelled() -> bool:
    """Whether somebody cancels this coroutine from outside (a signal, a limit); Python 3.10 cannot tell."""
    current = asyncio.current_task()
    return current is not None and sys.version_info >= (3, 11) and current.cancelling() > 0


def _in_event_loop(body: Awaitable[Any], limit: float | None) -> Any:
    answer = _Answer()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(answer.of(body, limit))
    else:
        # The caller's own loop runs in this thread, and one loop cannot run within another.
        _in_thread(lambda: asyncio.run(answer.of(body, limit)), "asyncio", None)
    return answer.get()


def _in_thread(body: Callable[[], Any], name: str, limit: float | None) -> Any:
    answer: list[tuple[bool, Any]] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            answer.append((True, context.run(body)))
        except BaseException as error:
            answer.append((False, error))

    signal = SIGNAL.get()
    if signal is None:
        signal = StopSignal()
        context.run(SIGNAL.set, signal)
    thread = threading.Thread(target=run, name=f"ebbs task {name}", daemon=True)
    thread.start()
    thread.join(limit)
    if not answer:
        signal.set(PAST_LIMIT)
        raise _LimitReachedError
    succeeded, value = answer[0]
    if succeeded:
        return value
    raise value
