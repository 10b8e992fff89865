"""What a transactional task does to its session: its effects and its checkpoint stay together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
)
from tests.integration.bad_input.suspects import (
    Effect,
    Effects,
    TransactionalSuspect,
    add,
    cases,
    failed,
    schedule,
    succeeds_once_mended,
)

# --- what a transactional task does to its session -----------------------------------------------------------------


@dataclass(frozen=True)
class InSession:
    """What a task does between its effect, the number 1, and its end; and which effects are there once it succeeded."""

    id: str
    act: Callable[[Session], object]
    kept: list[int]


def _rolled_back(session: Session) -> None:
    session.rollback()
    add(session, 2)


def _nested(session: Session) -> None:
    with pytest.raises(DBAPIError), session.begin_nested():
        add(session, 1)
    add(session, 2)


def _committed_twice(session: Session) -> None:
    session.commit()
    add(session, 2)
    session.commit()
    session.commit()


SAFE_SESSIONS = [
    InSession("commits", lambda session: session.commit(), [1]),
    InSession("commits twice", _committed_twice, [1, 2]),
    InSession("rolls back", lambda session: session.rollback(), []),
    InSession("rolls back and goes on", _rolled_back, [2]),
    InSession("fails within a savepoint of its own", _nested, [1, 2]),
    InSession("commits and closes", lambda session: (session.commit(), session.close()), [1]),
    InSession("expunges all", lambda session: session.expunge_all(), [1]),
]


@pytest.mark.parametrize("case", cases(SAFE_SESSIONS))
def test_what_a_session_allows_ends_no_transaction(case: InSession, runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        case.act(session)
        return context.copy(seen=runner_sees())

    def runner_sees() -> int:
        # Nothing of it is there for others before the checkpoint is.
        return len(effects()) if runner.service.engine.dialect.name == "postgresql" else 0

    execution_id = schedule(runner, TransactionalSuspect(body))
    runner.run_until_idle()
    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    assert execution.execution_context["seen"] == 0
    assert effects() == case.kept


@pytest.mark.parametrize("case", cases(SAFE_SESSIONS))
def test_what_a_session_has_done_is_undone_with_a_failed_attempt(
    case: InSession, runner: FlowRunner, effects: Effects
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        case.act(session)
        raise ValueError("after all that")

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="ValueError", says="after all that")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_session_that_is_closed_undoes_what_it_did_not_commit(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.close()
        return context

    execution_id = schedule(runner, TransactionalSuspect(body))
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    assert effects() == []


def _ends_the_transaction(session: Session) -> None:
    session.connection().commit()


def _rolls_the_transaction_back(session: Session) -> None:
    session.connection().rollback()


def _closes_the_connection(session: Session) -> None:
    session.connection().close()


def _commits_in_sql(session: Session) -> None:
    session.execute(text("COMMIT"))


def _rolls_back_in_sql(session: Session) -> None:
    session.execute(text("ROLLBACK"))


@pytest.mark.parametrize(
    "act",
    [
        _ends_the_transaction,
        _rolls_the_transaction_back,
        _closes_the_connection,
        _commits_in_sql,
        _rolls_back_in_sql,
    ],
)
def test_a_task_that_ends_its_transaction_fails_and_is_not_retried(
    act: Callable[[Session], None], runner: FlowRunner, effects: Effects
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        act(session)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    # Once its effects may be there without its checkpoint, another attempt could have them twice.
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="ended the transaction")
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_task_that_loses_its_connection_has_no_effects(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.connection().invalidate()
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="PendingRollbackError", says="")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_database_error_fails_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        add(session, 1)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="IntegrityError", says="effects")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_database_error_that_the_task_swallows_never_loses_its_effects(
    runner: FlowRunner, effects: Effects, database: str
) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        with pytest.raises(DBAPIError):
            add(session, 1)
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    if database == "sqlite":  # where a statement that fails leaves the transaction as it was
        assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
        assert effects() == [1]
    else:  # where the transaction is lost with it
        failed(runner, execution_id, attempts=3, error_type="InternalError", says="transaction is aborted")
        assert effects() == []
        succeeds_once_mended(runner, execution_id, suspect)


def test_a_flush_that_failed_fails_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.add(Effect(n=1))
        with pytest.raises(DBAPIError):
            session.flush()
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(
        runner,
        execution_id,
        attempts=3,
        error_type="PendingRollbackError",
        says="rolled back due to a previous exception",
    )
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_what_a_session_has_not_flushed_is_flushed_within_the_attempt(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.add(Effect(n=1))
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type="IntegrityError", says="effects")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_commit_that_the_database_refuses_fails_the_attempt(
    runner: FlowRunner, effects: Effects, database: str
) -> None:
    with runner.service.engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE details (n INTEGER REFERENCES effects (n) DEFERRABLE INITIALLY DEFERRED)")
        )

    def body(context: ExecutionContext, session: Session) -> ExecutionContext:
        add(session, 1)
        session.execute(text("INSERT INTO details VALUES (2)"))
        return context

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(
        runner,
        execution_id,
        attempts=3,
        error_type="IntegrityError",
        says="violates foreign key" if database == "postgresql" else "FOREIGN KEY",
    )
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)


def test_a_result_that_cannot_be_recorded_takes_the_effects_with_it(runner: FlowRunner, effects: Effects) -> None:
    def body(context: ExecutionContext, session: Session) -> Any:
        add(session, 1)
        session.commit()

    suspect = TransactionalSuspect(body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="returned None")
    assert effects() == []
    succeeds_once_mended(runner, execution_id, suspect)
