"""Run a transactional task: its effects and its checkpoint commit together, whatever happens to the database."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from ebbs_and_flows.checkpoints import Checkpoint, Claim, Recorded, Verdict
from ebbs_and_flows.errors import TaskResultError
from ebbs_and_flows.logs import logger
from ebbs_and_flows.outcomes import Failed, Limit, Outcome, Success, run_body
from ebbs_and_flows.persistence.databases import is_lost_savepoint, is_refusal, said
from ebbs_and_flows.persistence.unit_of_work import UnitOfWork
from ebbs_and_flows.service import CommitRefusedError, FlowService
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.verdicts import checkpoint_of, judge, judge_lost


@dataclass(frozen=True)
class Written:
    """A verdict whose checkpoint is in the database, or was refused there (`recorded` is `None`)."""

    verdict: Verdict
    recorded: Recorded | None


class Transactions:
    """Runs transactional tasks.

    Args:
        service: where outcomes are recorded.
        lease_seconds: for how long each checkpoint renews the lease.
        sleep: how it waits for a database that does not answer.
        waits: gives the waits between tries, in seconds, each time anew; when they are used up, the error is raised.
    """

    def __init__(
        self,
        service: FlowService,
        *,
        lease_seconds: float,
        sleep: Callable[[float], object],
        waits: Callable[[], Iterable[float]],
    ) -> None:
        self._service = service
        self._lease_seconds = lease_seconds
        self._sleep = sleep
        self._waits = waits

    def run(
        self,
        claim: Claim,
        template: FlowTemplate,
        task: Task,
        *,
        limit: Limit,
        goes_on: Callable[[], bool] = lambda: True,
        failed: Callable[[Failed], Verdict] | None = None,
    ) -> Verdict | Written:
        """Run the open attempt of a claim.

        Args:
            limit: how long it may take: past it, it is rolled back.
            goes_on: asked when the task is done: whether the next task follows under this claim.
            failed: judges what the task raised; default by its retry policy.

        Returns:
            What was written with the task's effects; or, where they were rolled back, the verdict that is to be.
        """
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        outcome: Outcome | None = None
        is_lost = False
        checkpoint: Checkpoint | None = None

        def body(session: Session, work: UnitOfWork) -> Checkpoint:
            nonlocal outcome, is_lost, checkpoint
            outcome = run_body(task, attempt.name, claim.context, session, limit=limit)
            if isinstance(outcome, Success):
                outcome = _flushed(outcome, session, work, attempt.name)
            if isinstance(outcome, Failed):
                is_lost = work.is_lost()
                raise _RollBackError
            verdict = judge(task, outcome, claim.counts_of(attempt.name))
            checkpoint = checkpoint_of(claim, template, verdict, self._lease_seconds, goes_on=goes_on())
            return checkpoint

        for seconds in itertools.chain(self._waits(), (None,)):
            try:
                recorded = self._service.run_in_transaction(body)
            except _RollBackError:
                assert isinstance(outcome, Failed), "only a failure asks for a rollback"
                if is_lost:
                    return self._lost(claim, task, outcome)
                return failed(outcome) if failed else judge(task, outcome, claim.counts_of(attempt.name))
            except CommitRefusedError as refused:
                return judge(task, Failed(refused.error), claim.counts_of(attempt.name))
            except SQLAlchemyError as error:
                if outcome is None and seconds is not None and not _is_refusal(error):
                    # The transaction could not be begun, so the task has not been started: no attempt of its own.
                    logger.warning("execution %s: no transaction yet: %s", claim.execution.execution_id, said(error))
                    self._sleep(seconds)
                    continue
                return self._after_failed_commit(claim, task, outcome, checkpoint, error)
            assert outcome is not None, "the body has run"
            return Written(judge(task, outcome, claim.counts_of(attempt.name)), recorded)
        raise AssertionError("the last round has no wait")

    def _after_failed_commit(
        self,
        claim: Claim,
        task: Task,
        outcome: Outcome | None,
        checkpoint: Checkpoint | None,
        error: SQLAlchemyError,
    ) -> Verdict | Written:
        """The database failed while the checkpoint was written: find out what is there."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        counts = claim.counts_of(attempt.name)
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if is_lost and checkpoint is not None and isinstance(outcome, Success):
            committed = self._read_back(checkpoint)
            if committed is not None:
                return Written(judge(task, outcome, counts), committed)
            return self._lost(claim, task, Failed(error))
        # The effects are rolled back, so the attempt has failed, and another one may do better.
        return judge(task, Failed(error, may_retry=not _is_refusal(error)), counts)

    def _lost(self, claim: Claim, task: Task, outcome: Failed) -> Verdict:
        """The database connection was lost under the task: not its failure, unless it goes on like that."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be lost"
        end = outcome.attempt_end()
        return judge_lost(
            task,
            attempt.name,
            claim.counts_of(attempt.name),
            f"The database connection was lost, and the task's effects were rolled back.\n\n{end.output}",
            error_type=outcome.error_type,
            reason=f"the database connection was lost: {outcome.summary}",
        )

    def _read_back(self, checkpoint: Checkpoint) -> Recorded | None:
        for seconds in self._waits():
            try:
                return self._service.outcome_of(checkpoint)
            except SQLAlchemyError:
                self._sleep(seconds)
        return self._service.outcome_of(checkpoint)


class _RollBackError(Exception):
    """Leaves a transactional task's transaction without a commit; the outcome is recorded in another one."""


def _is_refusal(error: SQLAlchemyError) -> bool:
    return isinstance(error, DBAPIError) and is_refusal(error)


def _flushed(outcome: Success, session: Session, work: UnitOfWork, name: str) -> Outcome:
    """Send what the task has left in its session, so that the database's objections are the attempt's failure."""
    try:
        if work.is_intact():
            session.commit()
        if work.is_intact():
            return outcome
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if not is_lost_savepoint(error):
            return Failed(error)
    return Failed(
        TaskResultError(
            name,
            "ended the transaction that its checkpoint belongs to, so its effects may be there without it: "
            "leave that to the library; session.commit() and session.rollback() are safe",
        ),
        may_retry=False,
    )
