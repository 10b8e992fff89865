"""A worker runs many executions at once, from its queues, within its bounds, with retries."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool
from tenacity import wait_fixed

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
    Worker,
    task,
    wait_for_stop,
)
from tests.integration.flows import AT_ONCE, Gate, Outside, abc, one, statuses
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("sound_history")


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


def test_hundreds_of_coroutines_need_no_thread_each(service: FlowService, runner: FlowRunner) -> None:
    threads: set[int] = set()
    opened = threading.Event()

    @task
    async def sleep() -> None:
        while not opened.is_set():  # noqa: ASYNC110  # it is set in another thread
            await asyncio.sleep(0.05)
        threads.add(threading.get_ident())

    runner.register_flow_template(FlowTemplate("sleep", [sleep]))
    with Session(service.engine) as session:
        for _ in range(300):
            runner.schedule_flow("sleep", session=session)
        session.commit()
    before = threading.active_count()
    with Worker(runner, concurrency=300, poll_seconds=0.05).running() as worker:
        wait_until(lambda: worker.health().in_flight == 300)
        assert threading.active_count() - before < 10
        opened.set()
        wait_until(lambda: worker.health().succeeded == 300)
    assert len(threads) == 1


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
        {"listen": "no"},
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


def test_a_claim_that_bounds_queues_names_those_it_takes_from(service: FlowService, runner: FlowRunner) -> None:
    with pytest.raises(InvalidArgumentError, match="where max_in_flight bounds some"):
        service.claim(
            runner.templates, {FlowStatus.SCHEDULED}, "somebody", lease_seconds=30, max_in_flight={"default": 1}
        )


def test_a_worker_with_its_hands_full_of_short_steps_still_takes_up_what_comes(
    service: FlowService, runner: FlowRunner
) -> None:
    class Step(Task):
        def run(self, context: ExecutionContext) -> ExecutionContext:
            return context

    long = FlowTemplate("long")
    for number in range(300):
        long.add_task(Step(), name=f"step {number}")
    runner.register_flow_template(long)
    runner.register_flow_template(FlowTemplate("short", [Step()]))
    runner.schedule_flows("long", [{}] * 40)
    short = runner.schedule_flow("short", delay=0.3)
    Worker(runner, concurrency=48, poll_seconds=0.05).run(until_idle=True)
    finished = service.get_flow_execution(short).finished_at
    assert finished is not None
    others = service.find_flow_executions(FlowFilter(template_name="long"))
    assert {each.status for each in others} == {FlowStatus.SUCCEEDED}
    assert any(each.finished_at is not None and each.finished_at > finished for each in others)
