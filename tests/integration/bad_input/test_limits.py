"""Time limits: what passes them fails the attempt."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowRunner,
    FunctionTask,
    RetryPolicy,
)
from tests.integration.bad_input.suspects import (
    AsyncSuspect,
    AsyncTransactionalSuspect,
    Effects,
    Suspect,
    TransactionalSuspect,
    add,
    failed,
    schedule,
    succeeds_once_mended,
)

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
