"""A worker takes over what was lost, and outlasts what the database does."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    Task,
    TaskStatus,
    TransactionalTask,
    Worker,
    task,
    wait_for_stop,
)
from tests.integration.flows import Gate, Outside, abc, statuses
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("sound_history")


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
    runner = FlowRunner(service, lease_seconds=0.6)
    runner.register_flow_template(FlowTemplate("gate", [gate]))
    execution_id = runner.schedule_flow("gate")
    with FlowService(database_url) as other, contextlib.ExitStack() as stack:
        if how == "worker":
            worker = Worker(runner, lease_seconds=0.6)
            stack.enter_context(worker.running())
        else:
            thread = threading.Thread(target=runner.run_flow)
            thread.start()
            stack.callback(thread.join)
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
        first = other.get_flow_execution(execution_id).lease_expires_at
        began = time.monotonic()
        while time.monotonic() - began < 2.0:
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
    record = service.turn

    def refuse(checkpoints: object, *rest: object, **named: object) -> object:
        if checkpoints and refusals:
            raise refusals.pop()
        return record(checkpoints, *rest, **named)  # type: ignore[arg-type]

    service.turn = refuse  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert refusals == []


def test_a_commit_whose_answer_is_lost_is_read_back_and_not_written_again(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    record = service.turn
    answers_lost = [3]

    def lose_answer(checkpoints: object, *rest: object, **named: object) -> object:
        recorded = record(checkpoints, *rest, **named)  # type: ignore[arg-type]
        if checkpoints and answers_lost[0]:
            answers_lost[0] -= 1
            raise OperationalError("COMMIT", {}, Exception("connection lost"), connection_invalidated=True)
        return recorded

    service.turn = lose_answer  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert outside.calls == ["a", "b", "c"]
    assert [each.status for each in service.get_task_executions(execution_id)] == [TaskStatus.SUCCEEDED] * 3


def test_an_end_whose_answer_and_read_back_are_both_lost_goes_on_all_the_same(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    record, read_back = service.turn, service.outcome_of
    losses = [True, True]

    def lose_answer(checkpoints: object, *rest: object, **named: object) -> object:
        recorded = record(checkpoints, *rest, **named)  # type: ignore[arg-type]
        if checkpoints and len(losses) == 2:
            losses.pop()
            raise OperationalError("COMMIT", {}, Exception("connection lost"))
        return recorded

    def lose_read_back(checkpoint: object) -> object:
        if losses:
            losses.pop()
            raise OperationalError("SELECT", {}, Exception("connection lost"))
        return read_back(checkpoint)  # type: ignore[arg-type]

    service.turn = lose_answer  # type: ignore[method-assign,assignment]
    service.outcome_of = lose_read_back  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    with Worker(runner, poll_seconds=0.05).running():
        wait_until(lambda: service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED)
    assert losses == []
    assert outside.calls == ["a", "b", "c"]


def test_nothing_starts_after_a_cancel_that_came_between_a_commit_and_its_lost_answer(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    record = service.turn
    losses = [True]

    def lose_answer(checkpoints: object, *rest: object, **named: object) -> object:
        recorded = record(checkpoints, *rest, **named)  # type: ignore[arg-type]
        if checkpoints and losses:
            losses.pop()
            runner.cancel_flow_execution(execution_id)
            raise OperationalError("COMMIT", {}, Exception("connection lost"))
        return recorded

    service.turn = lose_answer  # type: ignore[method-assign,assignment]
    execution_id = runner.schedule_flow("abc")
    Worker(runner, poll_seconds=0.05).run(until_idle=True)
    assert service.get_flow_execution(execution_id).status is FlowStatus.CANCELLED
    assert outside.calls == ["a"]


def test_a_claim_whose_answer_is_lost_is_handed_back(
    service: FlowService, runner: FlowRunner, outside: Outside
) -> None:
    runner.register_flow_template(abc(outside))
    turn = service.turn
    answers_lost = [True]

    def lose_answer(*args: object, **kwargs: object) -> object:
        recorded, claims = turn(*args, **kwargs)  # type: ignore[arg-type]
        if claims and answers_lost:
            answers_lost.clear()
            raise OperationalError("COMMIT", {}, Exception("connection lost"), connection_invalidated=True)
        return recorded, claims

    service.turn = lose_answer  # type: ignore[method-assign,assignment]
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


@pytest.mark.parametrize("database", ["postgresql"])
def test_what_somebody_has_locked_holds_up_none_of_the_others_and_is_not_asked_for_all_the_time(
    service: FlowService, runner: FlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of what is in flight is locked, and ends first."""
    first, second = Gate("first"), Gate("second")
    runner.register_flow_template(FlowTemplate("first", [first]))
    runner.register_flow_template(FlowTemplate("second", [second]))
    locked = runner.schedule_flows("first", [{}] * 30)
    others = runner.schedule_flows("second", [{}] * 10)
    turns = []
    turn = FlowService.turn
    monkeypatch.setattr(FlowService, "turn", lambda *given, **named: turns.append(given) or turn(*given, **named))
    with Worker(runner, concurrency=40, poll_seconds=0.2).running():
        for _ in locked:
            assert first.entered.acquire(timeout=PATIENCE_SECONDS)
        for _ in others:
            assert second.entered.acquire(timeout=PATIENCE_SECONDS)
        with service.engine.connect() as somebody:
            of_these = {"ids": locked}
            statement = "SELECT 1 FROM ebbs_flow_executions WHERE execution_id = ANY(:ids) FOR UPDATE"
            somebody.execute(text(statement), of_these)
            first.opened.set()
            wait_until(lambda: len(turns) > 3, "a few tries")
            second.opened.set()
            wait_until(lambda: all(is_done(service, each) for each in others), "the end of the others")
            turns.clear()
            threading.Event().wait(1.0)
            assert len(turns) < 50
        wait_until(lambda: all(is_done(service, each) for each in locked), "the end of those that were locked")


def is_done(service: FlowService, execution_id: int) -> bool:
    return service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED


@pytest.mark.parametrize("damage", ["""entry_types = '{"other": "int"}'""", "dropped = '17'"])
def test_a_damaged_context_parks_its_execution_and_no_other(
    service: FlowService, runner: FlowRunner, worker: Worker, outside: Outside, damage: str
) -> None:
    runner.register_flow_template(abc(outside))
    damaged = runner.schedule_flow("abc", {"order": 17})
    well = runner.schedule_flow("abc", {"order": 18})
    with service.engine.begin() as connection:
        connection.execute(
            text(
                f"UPDATE ebbs_flow_transitions SET {damage} WHERE entries IS NOT NULL AND flow_execution_id = {damaged}"
            ),
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
