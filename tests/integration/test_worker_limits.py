"""A task, a flow and a worker are ended in good order: at their limit, cancelled, stopped."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session
from tenacity import wait_fixed, wait_none

from ebbs_and_flows import (
    Failure,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    TaskStatus,
    Worker,
    WorkerStateError,
    raise_if_stop_requested,
    stop_requested,
    task,
    wait_for_stop,
)
from tests.integration.flows import Gate, Outside, abc, statuses
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("sound_history")


def test_a_task_past_its_limit_is_ended_and_its_neighbours_are_not(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside
) -> None:
    released = threading.Event()
    noticed: list[str] = []

    @task(timeout_seconds=0.2)
    def in_a_thread() -> None:
        noticed.extend(["thread"] if wait_for_stop(PATIENCE_SECONDS) else [])
        released.wait(PATIENCE_SECONDS)

    @task(timeout_seconds=0.2)
    async def on_the_loop() -> None:
        try:
            await asyncio.sleep(PATIENCE_SECONDS)
        finally:
            noticed.append("loop")

    @task(timeout_seconds=0.2)
    def in_a_transaction(session: Session) -> None:
        session.execute(text("CREATE TABLE left_behind (number INTEGER)"))
        noticed.extend(["transaction"] if wait_for_stop(1.0) else [])

    runner.register_flow_template(abc(outside))
    bodies = (in_a_thread, on_the_loop, in_a_transaction)
    for body in bodies:
        runner.register_flow_template(FlowTemplate(body.name, [body]))
    ids = [runner.schedule_flow(body.name) for body in bodies]
    well = runner.schedule_flow("abc")
    began = time.monotonic()
    worker.run(until_idle=True)
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    released.set()

    assert service.get_flow_execution(well).status is FlowStatus.SUCCEEDED
    for execution_id in ids:
        assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
        (attempt,) = service.get_task_executions(execution_id)
        assert (attempt.failure, attempt.error_type) == (Failure.TIMEOUT, "TaskTimeoutError")
    wait_until(lambda: sorted(noticed) == ["loop", "thread", "transaction"])
    with service.engine.connect() as connection, pytest.raises(Exception, match="left_behind"):
        connection.execute(text("SELECT * FROM left_behind"))


def test_a_whole_flow_has_a_limit_over_its_tasks_and_waits(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside
) -> None:
    @task(retry=RetryPolicy(max_attempts=1000, wait=wait_fixed(0.2)))
    def fail() -> None:
        outside.call("fail")
        if len(outside.calls) < 1000:
            raise ConnectionError("no answer")

    runner.register_flow_template(FlowTemplate("limited", [fail], timeout_seconds=2))
    execution_id = runner.schedule_flow("limited")
    worker.run(until_idle=True)
    execution = service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    reason = service.get_flow_status_history(execution_id)[-1].reason or ""
    assert reason.startswith("FlowTimeoutError: the flow ran past the limit of 2 seconds that template 'limited' sets")
    assert 2 <= len(outside.calls) <= 11

    outside.calls = ["fail"] * 1000
    runner.reschedule_flow_execution(execution_id)
    worker.run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED


def test_the_flows_limit_ends_the_task_that_is_running(
    service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    @task(timeout_seconds=PATIENCE_SECONDS, retry=RetryPolicy(max_attempts=5, wait=wait_none()))
    def long() -> None:
        wait_for_stop(PATIENCE_SECONDS)

    runner.register_flow_template(FlowTemplate("limited", [long], timeout_seconds=0.2))
    ids = [runner.schedule_flow("limited") for _ in range(2)]
    worker.run(until_idle=True)
    runner.run_until_idle()
    for execution_id in ids:
        (attempt,) = service.get_task_executions(execution_id)
        assert (attempt.failure, attempt.error_type) == (Failure.TIMEOUT, "FlowTimeoutError")
        assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED


def test_no_task_starts_after_the_flows_limit(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    @task
    def slow() -> None:
        wait_for_stop(0.3)

    @task
    def never() -> None:
        outside.call("never")

    runner.register_flow_template(FlowTemplate("limited", [slow, never], timeout_seconds=0.25))
    execution_id = runner.schedule_flow("limited")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    assert outside.calls == []


def test_an_async_task_that_blocks_its_loop_is_ended_at_its_limit_too(
    service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    released = threading.Event()

    @task(timeout_seconds=0.2)
    async def block() -> None:
        released.wait(PATIENCE_SECONDS)

    @task
    async def well() -> None:
        await asyncio.sleep(0)

    runner.register_flow_template(FlowTemplate("block", [block]))
    runner.register_flow_template(FlowTemplate("well", [well]))
    blocked = runner.schedule_flow("block", priority=1)
    with worker.running():
        wait_until(lambda: service.get_flow_execution(blocked).status is FlowStatus.FAILED)
        later = runner.schedule_flow("well")
        wait_until(lambda: service.get_flow_execution(later).status is FlowStatus.SUCCEEDED)
        released.set()


@pytest.mark.parametrize("kind", ["thread", "loop", "transaction"])
def test_a_running_task_is_asked_to_stop_when_its_execution_is_cancelled(
    database: str, service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside, kind: str
) -> None:
    if (database, kind) == ("sqlite", "transaction"):
        kind = "thread"  # nobody can write beside a transaction there, so nobody can cancel
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        outside.call("asked" if wait_for_stop(PATIENCE_SECONDS) else "not asked")

    @task
    def plain() -> None:
        wait()

    @task
    async def coroutine() -> None:
        entered.set()
        try:
            await asyncio.sleep(PATIENCE_SECONDS)
        finally:
            outside.call("asked" if stop_requested() else "not asked")

    @task
    def transactional(session: Session) -> None:
        session.execute(text("CREATE TABLE left_behind (number INTEGER)"))
        wait()

    @task
    def never() -> None:
        outside.call("never")

    body = {"thread": plain, "loop": coroutine, "transaction": transactional}[kind]
    runner.register_flow_template(FlowTemplate("long", [body, never]))
    execution_id = runner.schedule_flow("long")
    with worker.running():
        assert entered.wait(PATIENCE_SECONDS)
        runner.cancel_flow_execution(execution_id, reason="not wanted any more")
        wait_until(lambda: outside.calls)
        wait_until(lambda: worker.health().in_flight == 0)
    assert outside.calls == ["asked"]
    assert service.get_flow_execution(execution_id).status is FlowStatus.CANCELLED
    assert [each.failure for each in service.get_task_executions(execution_id)] == [Failure.CANCELLED]
    with service.engine.connect() as connection, pytest.raises(Exception, match="left_behind"):
        connection.execute(text("SELECT * FROM left_behind"))


def test_outside_of_a_task_nothing_is_asked_to_stop() -> None:
    assert not stop_requested()
    raise_if_stop_requested()
    assert not wait_for_stop(0.001)


def test_a_stopped_worker_lets_a_task_end_and_hands_the_rest_of_its_flow_back(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside
) -> None:
    entered, opened = threading.Event(), threading.Event()

    @task(outputs="begun")
    def begin() -> bool:
        entered.set()
        return opened.wait(PATIENCE_SECONDS)

    @task
    def end(begun: bool) -> None:
        outside.call("end")

    runner.register_flow_template(FlowTemplate("flow", [begin, end]))
    execution_id = runner.schedule_flow("flow")
    with worker.running():
        assert entered.wait(PATIENCE_SECONDS)
        worker.stop()
        opened.set()
    execution = service.get_flow_execution(execution_id)
    assert (execution.status, execution.current_task_index) == (FlowStatus.RESCHEDULED, 1)
    assert execution.execution_context["begun"] is True
    assert outside.calls == []
    assert [each.status for each in service.get_task_executions(execution_id)] == [TaskStatus.SUCCEEDED]

    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert outside.calls == ["end"]


def test_what_has_not_ended_within_the_grace_is_handed_back_without_blame(
    service: FlowService, runner: FlowRunner
) -> None:
    entered, released = threading.Event(), threading.Event()

    @task(outputs="done")
    def deaf() -> bool:
        entered.set()
        return released.wait(PATIENCE_SECONDS)

    runner.register_flow_template(FlowTemplate("deaf", [deaf]))
    execution_id = runner.schedule_flow("deaf")
    with Worker(runner, grace_seconds=0.1).running():
        assert entered.wait(PATIENCE_SECONDS)
    (attempt,) = service.get_task_executions(execution_id)
    assert (attempt.failure, attempt.error_type) == (Failure.STOPPED, "WorkerStopped")
    execution = service.get_flow_execution(execution_id)
    assert (execution.status, execution.lease_owner) == (FlowStatus.RESCHEDULED, None)
    released.set()

    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert [each.attempt for each in service.get_task_executions(execution_id)] == [1, 2]


def test_a_task_that_stops_when_asked_to_is_stopped_and_not_failed(
    service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    gate = Gate()
    runner.register_flow_template(FlowTemplate("gate", [gate]))
    execution_id = runner.schedule_flow("gate")
    with worker.running():
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
    assert gate.asked == ["asked"]
    (attempt,) = service.get_task_executions(execution_id)
    assert (attempt.failure, attempt.error_type) == (Failure.STOPPED, "WorkerStopped")
    assert service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED


def test_a_transactional_task_that_stops_when_asked_to_is_stopped_and_not_failed(
    service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    entered = threading.Event()

    @task
    def stop_when_asked(session: Session) -> None:
        session.execute(text("CREATE TABLE left_behind (number INTEGER)"))
        entered.set()
        wait_for_stop(PATIENCE_SECONDS)
        raise_if_stop_requested()

    runner.register_flow_template(FlowTemplate("stop", [stop_when_asked]))
    execution_id = runner.schedule_flow("stop")
    with worker.running():
        assert entered.wait(PATIENCE_SECONDS)
    (attempt,) = service.get_task_executions(execution_id)
    assert (attempt.failure, attempt.error_type) == (Failure.STOPPED, "WorkerStopped")
    assert service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED


def test_a_stop_without_grace_hands_back_also_what_is_committing(service: FlowService, runner: FlowRunner) -> None:
    @task
    def short(session: Session) -> None:
        session.execute(text("SELECT 1"))

    template = FlowTemplate("chain")
    for number in range(200):
        template.add_task(short, name=f"short-{number}")
    runner.register_flow_template(template)
    for _ in range(5):
        for _ in range(8):
            runner.schedule_flow("chain")
        with Worker(runner, grace_seconds=0, poll_seconds=0.05).running() as worker:
            wait_until(lambda worker=worker: worker.health().attempts > 20)  # type: ignore[misc]
        assert FlowStatus.RUNNING not in statuses(service)


@pytest.mark.parametrize("how", ["SystemExit in a task beside it", "loop.stop()", "loop.close()"])
def test_no_coroutine_ends_the_event_loop_for_the_others(
    service: FlowService, runner: FlowRunner, worker: Worker, how: str
) -> None:
    @task
    async def bad() -> None:
        async def leave() -> None:
            raise SystemExit(1)

        loop = asyncio.get_running_loop()
        if how == "SystemExit in a task beside it":
            beside = asyncio.create_task(leave())
            await asyncio.sleep(0.05)
            beside.cancelled()
        elif how == "loop.stop()":
            loop.stop()
            await asyncio.sleep(0.01)
        else:
            loop.close()

    @task
    async def good() -> None:
        await asyncio.sleep(0.01)

    runner.register_flow_template(FlowTemplate("bad", [bad]))
    runner.register_flow_template(FlowTemplate("good", [good]))
    with worker.running():
        ids = [runner.schedule_flow("bad")]
        wait_until(lambda: service.get_flow_execution(ids[0]).status.is_final or worker.health().failed)
        ids.append(runner.schedule_flow("good"))
        wait_until(lambda: service.get_flow_execution(ids[1]).status is FlowStatus.SUCCEEDED)
    assert not worker.is_running


def test_a_coroutine_is_cancelled_after_the_grace(service: FlowService, runner: FlowRunner) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    @task
    async def long() -> None:
        entered.set()
        try:
            await asyncio.sleep(PATIENCE_SECONDS)
        finally:
            cancelled.set()

    runner.register_flow_template(FlowTemplate("long", [long]))
    execution_id = runner.schedule_flow("long")
    with Worker(runner, grace_seconds=0.05).running():
        assert entered.wait(PATIENCE_SECONDS)
    assert cancelled.wait(PATIENCE_SECONDS)
    assert service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED


def test_a_worker_runs_once_at_a_time_and_again_after_that(runner: FlowRunner, worker: Worker) -> None:
    with worker.running():
        assert worker.is_running
        assert worker.health().is_healthy
        with pytest.raises(WorkerStateError, match="is running already"):
            worker.run()
        with pytest.raises(WorkerStateError, match="is running already"), worker.running():
            pass
    assert not worker.is_running
    assert not worker.health().is_healthy
    worker.stop()  # of one that does not run: nothing
    worker.run(until_idle=True)
