"""Run one task's body and make an outcome of whatever comes of it: nothing that a task does can go unrecorded."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from sqlalchemy.orm import Session

from ebbs_and_flows.checkpoints import AttemptEnd
from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.errors import TaskResultError, TaskTimeoutError
from ebbs_and_flows.executions import Failure, TaskStatus
from ebbs_and_flows.names import MAX_NAME_LENGTH
from ebbs_and_flows.tasks import Task

MAX_OUTPUT_LENGTH = 16_000
"""Characters kept of a traceback. Of a longer one the beginning and, mostly, the end: that is where the error
stands.
"""

_KEPT_FROM_THE_BEGINNING = 2_000

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Success:
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
        return printable(type(self.exception).__name__)[:MAX_NAME_LENGTH]

    @property
    def summary(self) -> str:
        """The exception in one line, for the reason of a transition."""
        try:
            text = str(self.exception)
        except BaseException:
            text = "<its message cannot be printed>"
        line = printable(" ".join(text[:500].split()))
        shown = line if len(line) <= 200 else f"{line[:197]}..."
        return f"{self.error_type}: {shown}" if shown else self.error_type

    def attempt_end(self) -> AttemptEnd:
        """What to record of the attempt."""
        output = f"{self.note}\n\n{format_failure(self.exception)}" if self.note else format_failure(self.exception)
        return AttemptEnd(TaskStatus.FAILED, failure=self.failure, error_type=self.error_type, output=bounded(output))


Outcome = Success | Failed


def run_body(task: Task, name: str, context: ExecutionContext, session: Session | None = None) -> Outcome:
    """Run one task and return what came of it. Raises nothing but `KeyboardInterrupt`.

    Args:
        task: runs in this thread; with `timeout_seconds` a plain function runs in a thread of its own, which is left to
            itself at the limit, because nothing can stop it. A transactional task past its limit is rolled back once it
            returns, an `async def` task is cancelled at its next await.
        name: the task's name in its template, for messages.
        context: what the task receives, read-only.
        session: for a transactional task.
    """
    try:
        result = _call(task, name, context, session)
    except KeyboardInterrupt:
        raise
    except TaskResultError as error:
        return Failed(error, may_retry=False)
    except _LimitReachedError:
        assert task.timeout_seconds is not None, "only a limit can be reached"
        return Failed(TaskTimeoutError(name, task.timeout_seconds), Failure.TIMEOUT)
    except BaseException as error:  # SystemExit and the like end the attempt, not the worker
        return Failed(error)
    try:
        return Success(_next_context(name, result).delta_from(context))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Failed(error, may_retry=False)


def format_failure(exception: BaseException) -> str:
    """The traceback as Python prints it, however hostile the exception is; from the task's own code on."""
    try:
        frames = _from_the_task_on(exception.__traceback__)
        return "".join(traceback.format_exception(type(exception), exception, frames))
    except BaseException as error:
        return f"{type(exception).__name__} (its traceback cannot be printed: {type(error).__name__})"


def _from_the_task_on(frames: TracebackType | None) -> TracebackType | None:
    task_frames = frames
    while task_frames is not None and Path(task_frames.tb_frame.f_code.co_filename).parent == _PACKAGE:
        task_frames = task_frames.tb_next
    return task_frames or frames


def printable(text: str) -> str:
    """The text without what a database cannot store: NUL and lone surrogates become their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def bounded(text: str) -> str:
    """The text as it is stored: printable, and at most `MAX_OUTPUT_LENGTH` characters."""
    text = printable(text)
    if len(text) <= MAX_OUTPUT_LENGTH:
        return text
    beginning = text[:_KEPT_FROM_THE_BEGINNING]
    cut = f"\n... {len(text) - MAX_OUTPUT_LENGTH:,} characters left out ...\n"
    return beginning + cut + text[len(beginning) + len(cut) - MAX_OUTPUT_LENGTH :]


class _LimitReachedError(Exception):
    """The limit of `timeout_seconds`, told apart from a TimeoutError that the task itself may raise."""


def _call(task: Task, name: str, context: ExecutionContext, session: Session | None) -> Any:
    arguments = (context, session) if task.is_transactional else (context,)
    limit = task.timeout_seconds
    if task.is_async:
        return _in_event_loop(_limited(cast("Awaitable[Any]", task.run(*arguments)), limit))
    if limit is None:
        return task.run(*arguments)
    if task.is_transactional:
        began = time.monotonic()
        result = task.run(*arguments)
        if time.monotonic() - began > limit:
            raise _LimitReachedError
        return result
    return _in_thread(lambda: task.run(*arguments), name, limit)


def _next_context(name: str, result: Any) -> ExecutionContext:
    if isinstance(result, ExecutionContext):
        return result
    if inspect.iscoroutine(result):
        result.close()
        raise TaskResultError(name, "returned a coroutine that nobody awaits: declare run with async def")
    raise TaskResultError(
        name,
        f"returned {'None' if result is None else 'a ' + type(result).__name__}: a task returns the next task's input, "
        "either context or context.copy(name=value)",
    )


async def _limited(body: Awaitable[Any], limit: float | None) -> Any:
    if limit is None:
        return await body
    running = asyncio.ensure_future(body)
    done, _ = await asyncio.wait({running}, timeout=limit)
    if not done:
        running.cancel()
        await asyncio.wait({running})
        if running.cancelled() or running.exception() is not None:
            raise _LimitReachedError
    return running.result()


def _in_event_loop(body: Any) -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(body)
    # The caller's own loop runs in this thread, and one loop cannot run within another.
    return _in_thread(lambda: asyncio.run(body), "asyncio", None)


def _in_thread(body: Callable[[], Any], name: str, limit: float | None) -> Any:
    answer: list[tuple[bool, Any]] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            answer.append((True, context.run(body)))
        except BaseException as error:
            answer.append((False, error))

    thread = threading.Thread(target=run, name=f"ebbs task {name}", daemon=True)
    thread.start()
    thread.join(limit)
    if not answer:
        raise _LimitReachedError
    succeeded, value = answer[0]
    if succeeded:
        return value
    raise value
