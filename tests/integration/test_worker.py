"""A worker runs many executions at once, retries, keeps to limits, and stops in good order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from tenacity import wait_fixed, wait_none

from ebbs_and_flows import (
    AttemptLogFilter,
    DatabaseUrlError,
    ExecutionContext,
    Failure,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    InvalidNameError,
    RetryPolicy,
    Task,
    TaskStatus,
    TransactionalTask,
    Worker,
    WorkerStateError,
    raise_if_stop_requested,
    stop_requested,
    task,
    wait_for_stop,
)
from tests.integration.flows import AT_ONCE, Outside, abc, one
from tests.integration.invariants import check_invariants
from tests.waiting import PATIENCE_SECONDS, wait_until


class Gate(Task):
    """Waits within its task until it is opened, or asked to stop."""

    def __init__(self, name: str = "gate") -> None:
        self.name = name
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.asked: list[str] = []

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.entered.release()
        while not self.opened.wait(0.005):
            if stop_requested():
                self.asked.append("asked")
                raise_if_stop_requested()
        return context.copy({self.name: "passed"})


@pytest.fixture
def worker(runner: FlowRunner) -> Worker:
    return Worker(runner, concurrency=8, poll_seconds=0.05, grace_seconds=5)


@pytest.fixture(autouse=True)
def _history_is_sound(service: FlowService) -> Iterator[None]:
    """Whatever a test has done: the invariants hold afterwards."""
    yield
    assert check_invariants(service.engine) == []


def statuses(service: FlowService) -> set[FlowStatus]:
    """Those of all executions."""
    return {each.status for each in service.find_flow_executions(FlowFilter(limit=1000))}


# --- running -------------------------------------------------------------------------------------------------------


def test_a_worker_runs_all_that_is_due_at_once(service: FlowService, runner: FlowRunner, worker: Worker) -> None:
    together = threading.Barrier(8, timeout=PATIENCE_SECONDS)

    @task(outputs="met")
    def meet(number: int) -> int:
        return together.wait() * 0 + number

    @task(outputs="twice")
    async def double(met: int) -> int:
        await asyncio.sleep(0)
        return 2 * met

    @task(outputs="stored")
    def store(twice: int, session: Session) -> int:
        return session.execute(text("SELECT :number"), {"number": twice}).scalar_one()

    runner.register_flow_template(FlowTemplate("meet", [meet, double, store]))
    ids = [runner.schedule_flow("meet", {"number": number}) for number in range(8)]
    worker.run(until_idle=True)

    for number, execution_id in enumerate(ids):
        execution = service.get_flow_execution(execution_id)
        assert execution.status is FlowStatus.SUCCEEDED
        assert dict(execution.execution_context) == {
            "number": number,
            "met": number,
            "twice": 2 * number,
            "stored": 2 * number,
        }
        assert {each.worker for each in service.get_task_executions(execution_id)} == {worker.name}
    health = worker.health()
    assert (health.claimed, health.succeeded, health.attempts, health.in_flight) == (8, 8, 24, 0)


def test_a_worker_has_no_more_in_flight_than_it_may(runner: FlowRunner) -> None:
    gate = Gate()
    runner.register_flow_template(FlowTemplate("gate", [gate]))
    for _ in range(5):
        runner.schedule_flow("gate")
    with Worker(runner, concurrency=2, poll_seconds=0.02).running() as worker:
        for _ in range(2):
            assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
        assert not gate.entered.acquire(timeout=0.2)
        assert worker.health().in_flight == 2
        assert [each.task for each in worker.in_flight()] == ["gate", "gate"]
        gate.opened.set()
        wait_until(lambda: worker.health().succeeded == 5)


def test_executions_are_taken_by_priority_then_due_time_then_id(runner: FlowRunner, outside: Outside) -> None:
    @task
    def note(name: str) -> None:
        outside.call(name)

    runner.register_flow_template(FlowTemplate("note", [note]))
    for name, priority in (("second", 0), ("third", 0), ("first", 5), ("last", -1)):
        runner.schedule_flow("note", {"name": name}, priority=priority)
    Worker(runner, concurrency=1).run(until_idle=True)
    assert outside.calls == ["first", "second", "third", "last"]


def test_only_its_queues_are_served(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    mails = runner.schedule_flow("abc", queue="mails")
    other = runner.schedule_flow("abc")
    Worker(runner, queues=["mails"]).run(until_idle=True)
    assert service.get_flow_execution(mails).status is FlowStatus.SUCCEEDED
    assert service.get_flow_execution(other).status is FlowStatus.SCHEDULED
    Worker(runner, queues=["mails", "default"]).run(until_idle=True)
    assert service.get_flow_execution(other).status is FlowStatus.SUCCEEDED


def test_a_waiting_worker_is_told_at_once_of_what_is_due(
    database: str, service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    """It polls every ten minutes: on PostgreSQL it is woken, on SQLite the first poll must find it."""
    runner.register_flow_template(abc(outside))
    failed = runner.schedule_flow("abc")
    outside.failures = [ValueError("once")]
    Worker(runner).run(until_idle=True)
    if database == "sqlite":
        runner.schedule_flow("abc")
        runner.reschedule_flow_execution(failed)
    with Worker(runner, poll_seconds=600).running() as worker:
        if database == "postgresql":
            wait_until(lambda: worker.health().seconds_since_turn is not None)
            listening = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
            wait_until(lambda: _scalar(service, listening))
            runner.schedule_flow("abc")
            wait_until(lambda: worker.health().succeeded == 1)
            runner.reschedule_flow_execution(failed)
        wait_until(lambda: worker.health().succeeded == 2)


def _scalar(service: FlowService, statement: object) -> object:
    with service.engine.connect() as connection:
        return connection.execute(statement).scalar_one()  # type: ignore[call-overload]


def test_a_worker_that_does_not_listen_polls(runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(abc(outside))
    with Worker(runner, poll_seconds=0.02, listen=False).running() as worker:
        runner.schedule_flow("abc")
        wait_until(lambda: worker.health().succeeded == 1)


def test_a_thousand_coroutines_need_no_thread_each(service: FlowService, runner: FlowRunner) -> None:
    threads: set[int] = set()

    @task
    async def sleep() -> None:
        await asyncio.sleep(0.2)
        threads.add(threading.get_ident())

    runner.register_flow_template(FlowTemplate("sleep", [sleep]))
    with Session(service.engine) as session:
        for _ in range(300):
            runner.schedule_flow("sleep", session=session)
        session.commit()
    before = threading.active_count()
    with Worker(runner, concurrency=300, poll_seconds=0.05).running() as worker:
        wait_until(lambda: worker.health().in_flight > 200)
        assert threading.active_count() - before < 10
        wait_until(lambda: worker.health().succeeded == 300)
    assert len(threads) == 1


# --- retries -------------------------------------------------------------------------------------------------------


def test_retries_wait_in_the_database_and_not_in_the_worker(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside
) -> None:
    policy = RetryPolicy(max_attempts=3, wait=wait_fixed(0.2))
    runner.register_flow_template(abc(outside, retry_b=policy))
    execution_id = runner.schedule_flow("abc")
    outside.failures = [ValueError("first")]
    calls = outside.call

    def fail_b(name: str) -> None:
        if name != "b":
            outside.calls.append(name)
        else:
            calls(name)

    outside.call = fail_b  # type: ignore[method-assign]
    worker.run(until_idle=True)
    assert outside.calls == ["a", "b", "b", "c"]
    history = service.get_flow_status_history(execution_id)
    waited = [each.at for each in history if each.from_status is not None and each.from_status.value == "RESCHEDULED"]
    rested = [each.at for each in history if each.to_status is FlowStatus.RESCHEDULED]
    assert waited[0] - rested[0] >= timedelta(seconds=0.2)


def test_attempts_that_failed_never_exceed_the_policy(service: FlowService, runner: FlowRunner, worker: Worker) -> None:
    @task(retry=RetryPolicy(max_attempts=3, wait=AT_ONCE))
    def fail() -> None:
        raise ConnectionError("no answer")

    runner.register_flow_template(FlowTemplate("fail", [fail]))
    execution_id = runner.schedule_flow("fail")
    worker.run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    attempts = service.get_task_executions(execution_id)
    assert [each.failure for each in attempts] == [Failure.EXCEPTION] * 3
    assert worker.health().failed == 1


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_whatever_a_task_raises_ends_its_attempt_and_no_worker(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside, raised: BaseException
) -> None:
    @task
    def plain() -> None:
        raise raised

    @task
    async def coroutine() -> None:
        raise raised

    @task
    def transactional(session: Session) -> None:
        raise raised

    runner.register_flow_template(abc(outside))
    for body in (plain, coroutine, transactional):
        runner.register_flow_template(FlowTemplate(body.name, [body]))
        runner.schedule_flow(body.name)
    well = runner.schedule_flow("abc")
    worker.run(until_idle=True)
    assert service.get_flow_execution(well).status is FlowStatus.SUCCEEDED
    failed = service.find_flow_executions(FlowFilter(statuses=frozenset({FlowStatus.FAILED})))
    assert len(failed) == 3
    for execution in failed:
        (attempt,) = service.get_task_executions(execution.execution_id)
        assert attempt.error_type == type(raised).__name__


# --- limits --------------------------------------------------------------------------------------------------------


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
    @task(retry=RetryPolicy(max_attempts=1000, wait=wait_fixed(0.1)))
    def fail() -> None:
        outside.call("fail")
        if len(outside.calls) < 1000:
            raise ConnectionError("no answer")

    runner.register_flow_template(FlowTemplate("limited", [fail], timeout_seconds=0.5))
    execution_id = runner.schedule_flow("limited")
    worker.run(until_idle=True)
    execution = service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    reason = service.get_flow_status_history(execution_id)[-1].reason or ""
    assert reason.startswith(
        "FlowTimeoutError: the flow ran past the limit of 0.5 seconds that template 'limited' sets"
    )
    assert 2 <= len(outside.calls) <= 6

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


# --- cancelling ----------------------------------------------------------------------------------------------------


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


# --- stopping ------------------------------------------------------------------------------------------------------


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


# --- what was lost -------------------------------------------------------------------------------------------------


def lost_execution(service: FlowService, runner: FlowRunner, template: str, lease_seconds: float = 0.01) -> int:
    """An execution whose worker is gone: claimed by somebody who has done nothing since."""
    execution_id = runner.schedule_flow(template)
    claims = service.claim(runner.templates, {FlowStatus.SCHEDULED}, "gone", lease_seconds=lease_seconds)
    assert [each.execution.execution_id for each in claims] == [execution_id]
    return execution_id


def test_any_worker_takes_over_what_a_lost_one_has_left(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = lost_execution(service, runner, "abc")
    with Worker(runner, queues=["another"], poll_seconds=0.02).running():
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED)
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    attempts = service.get_task_executions(execution_id)
    assert [(each.name, each.failure, each.error_type) for each in attempts] == [
        ("a", Failure.LOST, "WorkerLost"),
        ("a", None, None),
        ("b", None, None),
        ("c", None, None),
    ]
    assert outside.calls == ["a", "b", "c"]


def test_a_task_that_loses_its_workers_is_parked_after_max_crashes(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = lost_execution(service, runner, "abc")
    for _ in range(2):
        wait_until(lambda: service.recover_expired(runner.templates))
        assert service.claim(runner.templates, {FlowStatus.RESCHEDULED}, "gone", lease_seconds=0.01)
    wait_until(lambda: service.recover_expired(runner.templates))
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    assert [each.failure for each in service.get_task_executions(execution_id)] == [Failure.LOST] * 3


def test_run_until_idle_and_re_run_flow_take_over_what_was_lost(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    lost_execution(service, runner, "abc", lease_seconds=0.001)
    wait_until(lambda: runner.re_run_flow() is not None)
    lost_execution(service, runner, "abc", lease_seconds=0.001)
    wait_until(lambda: runner.run_until_idle() == 1)
    assert statuses(service) == {FlowStatus.SUCCEEDED}


@pytest.mark.parametrize("how", ["worker", "runner"])
def test_a_lease_is_renewed_while_a_task_runs_longer_than_it(service: FlowService, database_url: str, how: str) -> None:
    gate = Gate()
    runner = FlowRunner(service, lease_seconds=0.3)
    runner.register_flow_template(FlowTemplate("gate", [gate]))
    execution_id = runner.schedule_flow("gate")
    with FlowService(database_url) as other, contextlib.ExitStack() as stack:
        if how == "worker":
            worker = Worker(runner, lease_seconds=0.3)
            stack.enter_context(worker.running())
        else:
            thread = threading.Thread(target=runner.run_flow)
            thread.start()
            stack.callback(thread.join)
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
        first = other.get_flow_execution(execution_id).lease_expires_at
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            assert other.recover_expired(runner.templates) == {}
            threading.Event().wait(0.05)
        renewed = other.get_flow_execution(execution_id).lease_expires_at
        assert first is not None
        assert renewed is not None
        assert renewed > first
        gate.opened.set()
        wait_until(lambda: other.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
    assert len(service.get_task_executions(execution_id)) == 1


def test_what_a_zombie_writes_is_refused_and_its_effects_are_rolled_back(
    service: FlowService, runner: FlowRunner, database: str
) -> None:
    """The worker is not stopped here: its execution is taken from it, which it cannot know before it writes."""
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (worker VARCHAR(80))"))
    entered, opened = threading.Event(), threading.Event()
    first = [True]

    class Sell(TransactionalTask):
        def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
            if first:
                first.clear()
                if database == "postgresql":
                    session.execute(text("INSERT INTO effects VALUES ('zombie')"))
                entered.set()
                opened.wait(PATIENCE_SECONDS)
            else:
                session.execute(text("INSERT INTO effects VALUES ('successor')"))
            return context.copy(sold=True)

    class Charge(Task):
        def run(self, context: ExecutionContext) -> ExecutionContext:
            if first:
                first.clear()
                entered.set()
                opened.wait(PATIENCE_SECONDS)
                return context.copy(charged="zombie")
            return context.copy(charged="successor")

    body = Sell() if database == "postgresql" else Charge()  # nobody can write beside a transaction on SQLite
    runner.register_flow_template(FlowTemplate("sell", [body]))
    execution_id = runner.schedule_flow("sell")
    with Worker(runner, lease_seconds=300, poll_seconds=0.02).running() as worker:
        assert entered.wait(PATIENCE_SECONDS)
        with service.engine.begin() as connection:
            connection.execute(text("UPDATE ebbs_flow_executions SET lease_expires_at = '2001-01-01 00:00:00.000000'"))
        successor = FlowRunner(service)
        successor.register_flow_template(FlowTemplate("sell", [body]))
        assert successor.run_until_idle() + worker.health().claimed == 2
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
        opened.set()
        wait_until(lambda: worker.health().in_flight == 0)
    if database == "postgresql":
        with service.engine.connect() as connection:
            assert connection.scalars(text("SELECT worker FROM effects")).all() == ["successor"]
    else:
        assert service.get_flow_execution(execution_id).execution_context["charged"] == "successor"
    lost, done = service.get_task_executions(execution_id)
    assert (lost.failure, done.status) == (Failure.LOST, TaskStatus.SUCCEEDED)


# --- what the database does ----------------------------------------------------------------------------------------


def test_a_worker_outlasts_a_database_that_does_not_answer(
    service: FlowService, runner: FlowRunner, outside: Outside, caplog: pytest.LogCaptureFixture
) -> None:
    runner.register_flow_template(abc(outside))
    is_down = threading.Event()

    @event.listens_for(service.engine, "before_cursor_execute")
    def refuse(*_: object) -> None:
        if is_down.is_set():
            raise OperationalError("SELECT", {}, Exception("the server is gone"))

    with Worker(runner, poll_seconds=0.02).running() as worker:
        is_down.set()
        wait_until(lambda: worker.health().outage)
        assert "the server is gone" in (worker.health().outage or "")
        is_down.clear()
        execution_id = runner.schedule_flow("abc")
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
        wait_until(lambda: worker.health().outage is None)
    assert "the database answers again" not in caplog.text  # INFO is not captured by default
    assert "does not answer as it should" in caplog.text


def test_an_end_that_could_not_be_written_is_written_when_it_can_be(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    refusals = [OperationalError("UPDATE", {}, Exception("try later")) for _ in range(3)]
    record = service.checkpoint_free

    def refuse(checkpoints: object) -> object:
        if refusals:
            raise refusals.pop()
        return record(checkpoints)  # type: ignore[arg-type]

    service.checkpoint_free = refuse  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert refusals == []


def test_a_commit_whose_answer_is_lost_is_read_back_and_not_written_again(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    record = service.checkpoint_free
    answers_lost = [3]

    def lose_answer(checkpoints: object) -> object:
        recorded = record(checkpoints)  # type: ignore[arg-type]
        if answers_lost[0]:
            answers_lost[0] -= 1
            raise OperationalError("COMMIT", {}, Exception("connection lost"), connection_invalidated=True)
        return recorded

    service.checkpoint_free = lose_answer  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert [each.status for each in service.get_task_executions(execution_id)] == [TaskStatus.SUCCEEDED] * 3


def test_a_claim_whose_answer_is_lost_is_handed_back(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    claim = service.claim
    answers_lost = [True]

    def lose_answer(*args: object, **kwargs: object) -> object:
        claims = claim(*args, **kwargs)  # type: ignore[arg-type]
        if claims and answers_lost:
            answers_lost.clear()
            raise OperationalError("COMMIT", {}, Exception("connection lost"), connection_invalidated=True)
        return claims

    service.claim = lose_answer  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    attempts = service.get_task_executions(execution_id)
    assert [each.failure for each in attempts] == [Failure.STOPPED, None, None, None]
    assert outside.calls == ["a", "b", "c"]


def test_an_execution_that_somebody_has_locked_holds_nobody_else_up(
    database: str, service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    gate, other = Gate(), Gate("other")
    runner.register_flow_template(FlowTemplate("gate", [gate]))
    runner.register_flow_template(FlowTemplate("other", [other]))
    locked = runner.schedule_flow("gate")
    free = runner.schedule_flow("other")
    with worker.running():
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
        assert other.entered.acquire(timeout=PATIENCE_SECONDS)
        with service.engine.connect() as connection:
            if database == "postgresql":  # SQLite locks no rows
                lock = text("SELECT 1 FROM ebbs_flow_executions WHERE execution_id = :id FOR UPDATE")
                connection.execute(lock, {"id": locked})
            gate.opened.set()
            other.opened.set()
            wait_until(lambda: service.get_flow_execution(free).status is FlowStatus.SUCCEEDED)
            if database == "postgresql":
                assert service.get_flow_execution(locked).status is FlowStatus.RUNNING
        wait_until(lambda: service.get_flow_execution(locked).status is FlowStatus.SUCCEEDED)


def test_what_the_database_will_never_store_fails_its_attempt_and_no_other(
    service: FlowService, runner: FlowRunner, worker: Worker, database: str
) -> None:
    with service.engine.begin() as connection:  # stands for whatever a database refuses
        if database == "sqlite":
            connection.execute(
                text(
                    "CREATE TRIGGER refuse BEFORE UPDATE ON ebbs_task_executions WHEN new.entries LIKE '%poison%' "
                    "BEGIN SELECT RAISE(ABORT, 'no poison here'); END"
                )
            )
        else:
            connection.execute(
                text("ALTER TABLE ebbs_task_executions ADD CONSTRAINT refuse CHECK (entries::text NOT LIKE '%poison%')")
            )

    together = threading.Barrier(2, timeout=PATIENCE_SECONDS)

    @task(outputs="result")
    def give(word: str) -> str:
        together.wait()
        return word

    runner.register_flow_template(FlowTemplate("give", [give]))
    bad = runner.schedule_flow("give", {"word": "poison"})
    good = runner.schedule_flow("give", {"word": "milk"})
    with worker.running():
        wait_until(lambda: service.get_flow_execution(good).status is FlowStatus.SUCCEEDED)
        wait_until(lambda: service.get_flow_execution(bad).status is FlowStatus.FAILED)
    with service.engine.begin() as connection:
        connection.execute(
            text(
                "DROP TRIGGER refuse"
                if database == "sqlite"
                else "ALTER TABLE ebbs_task_executions DROP CONSTRAINT refuse"
            )
        )
    (attempt,) = service.get_task_executions(bad)
    assert "The database refused to store what the task returned." in (attempt.output or "")


def test_a_damaged_context_parks_its_execution_and_no_other(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    damaged = runner.schedule_flow("abc", {"order": 17})
    well = runner.schedule_flow("abc", {"order": 18})
    with service.engine.begin() as connection:
        connection.execute(
            text(
                'UPDATE ebbs_flow_transitions SET entry_types = \'{"other": "int"}\' '
                "WHERE entries IS NOT NULL AND flow_execution_id = :id"
            ),
            {"id": damaged},
        )
    worker.run(until_idle=True)
    assert service.get_flow_execution(well).status is FlowStatus.SUCCEEDED
    (found,) = service.find_flow_executions(FlowFilter(statuses=frozenset({FlowStatus.FAILED})), with_contexts=False)
    assert found.execution_id == damaged
    reason = service.get_flow_status_history(damaged)[-1].reason or ""
    assert reason.startswith("UndecodableValueError: ")


def test_a_worker_keeps_within_the_pool(service: FlowService, database: str, runner: FlowRunner) -> None:
    """Twenty transactional tasks at once, on an engine that gives out five connections."""
    engine = create_engine(service.engine.url, pool_size=4, max_overflow=1, pool_timeout=0.5)
    inside, most = [0], [0]
    lock = threading.Lock()

    @task
    def use(session: Session) -> None:
        session.execute(text("SELECT 1"))
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        wait_for_stop(0.02)
        with lock:
            inside[0] -= 1

    with FlowService(engine) as narrow:
        narrow_runner = FlowRunner(narrow)
        narrow_runner.register_flow_template(FlowTemplate("use", [use]))
        for _ in range(20):
            narrow_runner.schedule_flow("use")
        worker = Worker(narrow_runner, concurrency=20)
        worker.run(until_idle=True)
        assert worker.health().succeeded == 20
        assert worker.health().attempts == 20
    assert most[0] == {"sqlite": 1, "postgresql": 2}[database]
    engine.dispose()


# --- bounds, arguments, logs -----------------------------------------------------------------------------------------


def test_queues_and_templates_have_bounds_over_all_workers(service: FlowService, database_url: str) -> None:
    inside: dict[str, int] = {"queue": 0, "template": 0}
    most: dict[str, int] = {"queue": 0, "template": 0}
    lock = threading.Lock()

    @task
    def use(what: str) -> None:
        with lock:
            inside[what] += 1
            most[what] = max(most[what], inside[what])
        wait_for_stop(0.02)
        with lock:
            inside[what] -= 1

    def workers_runner(its_service: FlowService) -> FlowRunner:
        made = FlowRunner(its_service)
        made.register_flow_template(FlowTemplate("free", [use]))
        made.register_flow_template(FlowTemplate("bounded", [use], max_in_flight=2))
        return made

    with FlowService(database_url) as other:
        runners = [workers_runner(service), workers_runner(other)]
        for _ in range(8):
            runners[0].schedule_flow("free", {"what": "queue"}, queue="mails")
            runners[0].schedule_flow("bounded", {"what": "template"})
        workers = [
            Worker(each, queues=["default", "mails"], max_in_flight={"mails": 3}, poll_seconds=0.02) for each in runners
        ]
        threads = [threading.Thread(target=each.run, kwargs={"until_idle": True}) for each in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses(service) == {FlowStatus.SUCCEEDED}
    assert most["queue"] <= 3
    assert most["template"] <= 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"concurrency": 0},
        {"concurrency": True},
        {"concurrency": 1.5},
        {"lease_seconds": 0},
        {"lease_seconds": float("nan")},
        {"queues": "default"},
        {"queues": []},
        {"queues": [""]},
        {"queues": [17]},
        {"max_in_flight": {"default": 0}},
        {"max_in_flight": {"": 1}},
        {"max_in_flight": [("default", 1)]},
        {"poll_seconds": 0},
        {"poll_seconds": "1"},
        {"grace_seconds": -1},
        {"executor": 4},
    ],
    ids=str,
)
def test_arguments_of_no_use_are_refused(runner: FlowRunner, arguments: dict[str, object]) -> None:
    with pytest.raises((InvalidArgumentError, InvalidNameError)):
        Worker(runner, **arguments)  # type: ignore[arg-type]


def test_a_worker_needs_a_runner(service: FlowService) -> None:
    with pytest.raises(InvalidArgumentError, match="expected a FlowRunner"):
        Worker(service)  # type: ignore[arg-type]


def test_an_engine_that_shares_a_connection_between_threads_is_refused() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    with FlowService(engine) as service, pytest.raises(DatabaseUrlError, match="StaticPool"):
        Worker(FlowRunner(service))
    engine.dispose()


def test_every_record_says_which_attempt_it_is_about(
    runner: FlowRunner, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(AttemptLogFilter())
    caplog.set_level(logging.DEBUG)

    @task
    def speak() -> None:
        logging.getLogger("shop").info("hello")

    @task
    async def speak_too() -> None:
        logging.getLogger("shop").info("hello")
        raise ValueError("no more")

    runner.register_flow_template(FlowTemplate("speak", [speak, speak_too]))
    execution_id = runner.schedule_flow("speak")
    worker.run(until_idle=True)
    about = [
        (each.name, each.getMessage().split(": ")[-1], getattr(each, "task", None), getattr(each, "attempt", None))
        for each in caplog.records
        if getattr(each, "execution_id", None) == execution_id
    ]
    assert about == [
        ("ebbs_and_flows", "started", "speak", 1),
        ("shop", "hello", "speak", 1),
        ("ebbs_and_flows", "succeeded", "speak", 1),
        ("ebbs_and_flows", "started", "speak_too", 1),
        ("shop", "hello", "speak_too", 1),
        ("ebbs_and_flows", "no more", "speak_too", 1),
        ("ebbs_and_flows", "no more", "speak_too", 1),
    ]
    others = [each for each in caplog.records if each.name == "ebbs_and_flows" and each.getMessage().endswith("ended")]
    assert all(getattr(each, "execution_id", 0) is None for each in others)


def test_templates_that_are_registered_later_are_run_as_well(
    service: FlowService, runner: FlowRunner, worker: Worker
) -> None:
    with worker.running():
        runner.register_flow_template(one(lambda: None, "later"))
        execution_id = runner.schedule_flow("later")
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
