"""Stepper: runs the open attempt of a claimed execution and writes its checkpoint, whatever happens to the database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from ebbs_and_flows.checkpoints import AttemptEnd, Checkpoint, Claim, NextAttempt, Rest
from ebbs_and_flows.errors import TaskResultError
from ebbs_and_flows.executions import Failure, FlowExecution, FlowStatus, TaskStatus
from ebbs_and_flows.outcomes import Failed, Outcome, Success, run_body
from ebbs_and_flows.persistence.contexts import with_context
from ebbs_and_flows.persistence.databases import is_lost_savepoint, is_refusal
from ebbs_and_flows.service import CommitRefusedError, FlowService
from ebbs_and_flows.steps import Recorded
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate

logger = logging.getLogger("ebbs_and_flows")

OUTAGE_WAITS_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0)
"""The waits between tries to write a checkpoint: some 20 seconds in all, for a server that restarts or fails over."""


class Stepper:
    """Takes one execution from checkpoint to checkpoint.

    Args:
        service: where outcomes are recorded.
        templates: the registered templates by name.
        lease_seconds: for how long each checkpoint renews the lease.
        sleep: how it waits for a database that does not answer.
    """

    def __init__(
        self,
        service: FlowService,
        templates: Mapping[str, FlowTemplate],
        *,
        lease_seconds: float,
        sleep: Callable[[float], object],
    ) -> None:
        self._service = service
        self._templates = templates
        self._lease_seconds = lease_seconds
        self._sleep = sleep

    def step(self, claim: Claim) -> Claim:
        """Run the open attempt and write its checkpoint; the claim with the next attempt, or at rest."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        template = self._templates[claim.execution.template_name]
        task = template.get_task(attempt.task_index)
        assert task is not None, "attempts are started at tasks of the template"
        log_claim(claim, "started")
        if task.is_transactional:
            outcome, recorded = self._run_transactional(claim, template, task)
        else:
            outcome = run_body(task, attempt.name, claim.execution.execution_context)
            outcome, recorded = self._record(claim, template, task, outcome)
        if recorded is None:
            log_claim(claim, "refused, the execution is no longer held here", level=logging.WARNING)
            return claim.at_rest(claim.execution)
        if isinstance(outcome, Failed):
            log_claim(claim, "failed with %s", outcome.summary, level=logging.WARNING)
            return claim.at_rest(claim.execution)
        log_claim(claim, "succeeded")
        return _after(claim, outcome, recorded)

    def hand_back(self, held: FlowExecution) -> None:
        """Give the execution back to the database, to go on at the same task: a stop in good order is no failure.

        What is open is read anew: the interrupt may have come just after a checkpoint was committed. Where the database
        does not answer, the execution is left as a crash would leave it.
        """
        try:
            execution = self._service.get_flow_execution(held.execution_id)
            attempts = self._service.get_task_executions(held.execution_id)
            is_held = execution.status is FlowStatus.RUNNING and execution.epoch == held.epoch
            if not is_held or not attempts or attempts[-1].status is not TaskStatus.RUNNING:
                return
            attempt = attempts[-1]
            stopped = AttemptEnd(
                TaskStatus.FAILED,
                failure=Failure.STOPPED,
                error_type="WorkerStopped",
                output="The worker was stopped while this attempt was running.",
            )
            self._service.checkpoint(
                [
                    Checkpoint(
                        execution.execution_id,
                        execution.epoch,
                        attempt.worker or "",
                        attempt.flow_execution_step,
                        stopped,
                        Rest(FlowStatus.RESCHEDULED, attempt.task_index, reason="the worker was stopped"),
                        self._lease_seconds,
                    )
                ]
            )
        except SQLAlchemyError as error:
            logger.warning("execution %s could not be handed back: %s", held.execution_id, error)

    def _run_transactional(self, claim: Claim, template: FlowTemplate, task: Task) -> tuple[Outcome, Recorded | None]:
        """Run a task within the transaction that writes its checkpoint; where it fails, record that in another one."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        outcome: Outcome | None = None

        def body(session: Session, is_intact: Callable[[], bool]) -> Checkpoint:
            nonlocal outcome
            outcome = run_body(task, attempt.name, claim.execution.execution_context, session)
            if isinstance(outcome, Success):
                outcome = _flushed(outcome, session, is_intact, attempt.name)
            if isinstance(outcome, Failed):
                raise _RollBackError
            return self._checkpoint(claim, template, task, outcome)

        try:
            recorded = self._service.run_in_transaction(body)
        except _RollBackError:
            assert isinstance(outcome, Failed), "only a failure asks for a rollback"
            return self._record(claim, template, task, outcome)
        except CommitRefusedError as refused:
            return self._record(claim, template, task, Failed(refused.error))
        except DBAPIError as error:
            return self._after_lost_transaction(claim, template, task, outcome, error)
        assert outcome is not None, "the body has run"
        return outcome, recorded

    def _after_lost_transaction(
        self, claim: Claim, template: FlowTemplate, task: Task, outcome: Outcome | None, error: DBAPIError
    ) -> tuple[Outcome, Recorded | None]:
        """The database failed while a transactional task's checkpoint was written: find out what is there."""
        if isinstance(outcome, Success) and error.connection_invalidated:
            committed = self._read_back(self._checkpoint(claim, template, task, outcome))
            if committed is not None:
                return outcome, committed
        # The effects are rolled back, so the attempt has failed, and another one may do better.
        return self._record(claim, template, task, Failed(error, may_retry=not is_refusal(error)))

    def _read_back(self, checkpoint: Checkpoint) -> Recorded | None:
        for seconds in OUTAGE_WAITS_SECONDS:
            try:
                return self._service.outcome_of(checkpoint)
            except DBAPIError:
                self._sleep(seconds)
        return self._service.outcome_of(checkpoint)

    def _record(
        self, claim: Claim, template: FlowTemplate, task: Task, outcome: Outcome
    ) -> tuple[Outcome, Recorded | None]:
        """Write the checkpoint; where the database refuses what the task returned, write that instead."""
        try:
            return outcome, self._written(self._checkpoint(claim, template, task, outcome))
        except DBAPIError as error:
            if isinstance(outcome, Failed) or not is_refusal(error):
                raise
            outcome = Failed(error, may_retry=False, note="The database refused to store what the task returned.")
            return outcome, self._written(self._checkpoint(claim, template, task, outcome))

    def _written(self, checkpoint: Checkpoint) -> Recorded | None:
        """Write a checkpoint, over outages and lock time-outs of some seconds: the task is done, and is not to be lost.

        A commit whose answer was lost is read back, not repeated blindly.
        """
        for seconds in OUTAGE_WAITS_SECONDS:
            try:
                return self._service.checkpoint([checkpoint])[0] or self._service.outcome_of(checkpoint)
            except DBAPIError as error:
                if is_refusal(error):
                    raise
                logger.warning("execution %s: checkpoint not written yet: %s", checkpoint.execution_id, error.orig)
                self._sleep(seconds)
        return self._service.checkpoint([checkpoint])[0] or self._service.outcome_of(checkpoint)

    def _checkpoint(self, claim: Claim, template: FlowTemplate, task: Task, outcome: Outcome) -> Checkpoint:
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can end"
        then: NextAttempt | Rest
        if isinstance(outcome, Failed):
            outcome, then = _after_failure(claim, task, outcome)
        else:
            then = _after_success(claim, template)
        return Checkpoint(
            execution_id=claim.execution.execution_id,
            epoch=claim.execution.epoch,
            worker=attempt.worker or "",
            step=attempt.flow_execution_step,
            end=outcome.attempt_end(),
            then=then,
            lease_seconds=self._lease_seconds,
        )


class _RollBackError(Exception):
    """Leaves a transactional task's transaction without a commit; the outcome is recorded in another one."""


def _flushed(outcome: Success, session: Session, is_intact: Callable[[], bool], name: str) -> Outcome:
    """Send what the task has left in its session, so that the database's objections are the attempt's failure."""
    try:
        if is_intact():
            session.commit()
        if is_intact():
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


def _after_success(claim: Claim, template: FlowTemplate) -> NextAttempt | Rest:
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can succeed"
    index = attempt.task_index + 1
    if template.get_task(index) is None:
        return Rest(FlowStatus.SUCCEEDED, index)
    name = template.task_names[index]
    return NextAttempt(index, name, claim.counts_of(name).started + 1)


def _after_failure(claim: Claim, task: Task, outcome: Failed) -> tuple[Failed, Rest]:
    """Ask the retry policy; the outcome comes back with a note where the policy itself has failed."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can fail"
    failed_attempts = claim.counts_of(attempt.name).failed + 1
    policy = task.retry
    try:
        if outcome.may_retry and policy.allows_retry(outcome.exception, failed_attempts):
            seconds = policy.wait_seconds(outcome.exception, failed_attempts)
            reason = f"{outcome.summary}; {failed_attempts} of {policy.max_attempts} attempts, next in {seconds:.1f} s"
            return outcome, Rest(FlowStatus.RESCHEDULED, attempt.task_index, reason, seconds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a wait strategy is the user's code
        outcome = replace(outcome, note=f"No retry: the retry policy raised {Failed(error).summary}")
    return outcome, Rest(FlowStatus.FAILED, attempt.task_index, outcome.summary)


def _after(claim: Claim, outcome: Success, recorded: Recorded) -> Claim:
    """The claim after a success: what the next task receives is what was stored, not what the last one had in hand."""
    execution = with_context(claim.execution, claim.execution.execution_context.fold(outcome.delta))
    return Claim(execution, recorded.attempt, claim.counts)


def log_claim(claim: Claim, message: str, *values: object, level: int = logging.DEBUG) -> None:
    """Log what became of an attempt, with its execution, task and number as fields of the record."""
    if not logger.isEnabledFor(level):
        return
    execution, attempt = claim.execution, claim.attempt
    about = {
        "execution_id": execution.execution_id,
        "template": execution.template_name,
        "task": attempt.name if attempt is not None else None,
        "attempt": attempt.attempt if attempt is not None else None,
    }
    logger.log(
        level,
        "execution %s of %s, task %s, attempt %s: " + message,  # noqa: G003  # the beginning all records share
        *about.values(),
        *values,
        extra=about,
    )
