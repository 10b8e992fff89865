"""Tasks whose effects and checkpoint commit together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    TransactionalTask,
    task,
)
from tests.integration.flows import AT_ONCE


@pytest.fixture
def sales(service: FlowService) -> Callable[[], list[str]]:
    """A table of the host's own, and a way to read it."""
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE sales (item VARCHAR(50) PRIMARY KEY)"))

    def read() -> list[str]:
        with service.engine.connect() as connection:
            return list(connection.execute(text("SELECT item FROM sales ORDER BY item")).scalars())

    return read


def sell(session: Session, item: str) -> None:
    session.execute(text("INSERT INTO sales VALUES (:item)"), {"item": item})


def run(runner: FlowRunner, *tasks: object, **context: object) -> int:
    runner.register_flow_template(FlowTemplate("t", tasks))  # type: ignore[arg-type]  # tasks
    execution_id = runner.schedule_flow("t", context)
    runner.run_until_idle()
    return execution_id


class RecordSale(TransactionalTask):
    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        sell(session, context["item"])
        return context.copy(recorded=True)


def test_effects_and_checkpoint_are_there_together(service: FlowService, runner: FlowRunner, sales: Callable) -> None:
    execution_id = run(runner, RecordSale(), item="book")
    assert sales() == ["book"]
    assert service.get_flow_execution(execution_id).execution_context["recorded"] is True


def test_a_failure_leaves_no_effect_and_a_retry_has_its_own_transaction(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    tries = []

    @task(retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def record(item: str, session: Session) -> None:
        sell(session, f"{item} {len(tries)}")
        tries.append(1)
        if len(tries) == 1:
            raise OSError("after the insert")

    execution_id = run(runner, record, item="book")
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert sales() == ["book 1"]


def test_a_result_that_cannot_be_stored_takes_the_effect_with_it(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    @task(outputs="bad")
    def record(session: Session) -> object:
        sell(session, "book")
        return lambda: None

    execution_id = run(runner, record)
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
    assert sales() == []


def test_a_constraint_that_the_flush_breaks_is_the_attempts_failure(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    @task
    def record(session: Session) -> None:
        sell(session, "book")
        sell(session, "book")

    execution_id = run(runner, record)
    (attempt,) = service.get_task_executions(execution_id)
    assert (attempt.error_type, attempt.failure) == ("IntegrityError", Failure.EXCEPTION)
    assert sales() == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_constraint_that_the_commit_breaks_is_the_attempts_failure(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    with service.engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE refunds (item VARCHAR(50) REFERENCES sales DEFERRABLE INITIALLY DEFERRED)")
        )

    @task
    def refund(session: Session) -> None:
        session.execute(text("INSERT INTO refunds VALUES ('never sold')"))

    execution_id = run(runner, refund)
    (attempt,) = service.get_task_executions(execution_id)
    assert attempt.error_type == "IntegrityError"
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED


def test_commit_and_rollback_in_the_task_act_within_its_transaction(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    tries = []

    @task(retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def record(session: Session) -> None:
        sell(session, "kept")
        session.commit()
        sell(session, "rolled back")
        session.rollback()
        tries.append(1)
        if len(tries) == 1:
            raise OSError("after the commit")

    execution_id = run(runner, record)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert sales() == ["kept"]


def test_a_task_that_ends_the_transaction_itself_is_told_so(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    @task
    def record(session: Session) -> None:
        session.connection().commit()

    execution_id = run(runner, record)
    (attempt,) = service.get_task_executions(execution_id)
    assert attempt.output is not None
    assert "ended the transaction" in attempt.output or "closed" in attempt.output
    assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED


def test_a_flow_scheduled_in_the_tasks_session_is_there_exactly_with_its_success(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    tries = []

    @task(outputs="follow_up", retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def schedule_next(session: Session) -> int:
        follow_up = runner.schedule_flow("next", session=session)
        tries.append(follow_up)
        if len(tries) == 1:
            raise OSError("after scheduling")
        return follow_up

    runner.register_flow_template(FlowTemplate("next", [task(lambda: None)]))
    execution_id = run(runner, schedule_next)
    others = [each for each in service.find_flow_executions() if each.execution_id != execution_id]
    assert [each.status for each in others] == [FlowStatus.SUCCEEDED]


def test_async_transactional_tasks_get_the_same_session(
    service: FlowService, runner: FlowRunner, sales: Callable
) -> None:
    @task
    async def record(session: Session) -> None:
        sell(session, "async")

    execution_id = run(runner, record)
    assert service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert sales() == ["async"]


def test_a_cancelled_flow_rolls_back_what_its_task_wrote(
    service: FlowService, runner: FlowRunner, sales: Callable, database: str
) -> None:
    from threading import Thread

    started: list[int] = []

    @task
    def record(session: Session) -> None:
        # On SQLite the task's transaction is the one writer, so the cancel comes before it writes: from the read lock's
        # point of view it has begun, and the cancel waits. There it is refused at the checkpoint all the same.
        sell(session, "cancelled")
        if database == "postgresql":
            canceller = Thread(target=runner.cancel_flow_execution, args=(started[0],))
            canceller.start()
            canceller.join()
        else:
            session.execute(
                text("UPDATE ebbs_flow_executions SET epoch = epoch + 1 WHERE execution_id = :id"), {"id": started[0]}
            )

    runner.register_flow_template(FlowTemplate("t", [record]))
    started.append(runner.schedule_flow("t"))
    runner.run_flow()
    assert sales() == []
