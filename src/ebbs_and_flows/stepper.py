"""Stepper: runs the open attempt of a claimed execution and writes its checkpoint, whatever happens to the database."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ebbs_and_flows.checkpoints import Checkpoint, Claim, Recorded, Rest, Verdict
from ebbs_and_flows.executions import FlowExecution, FlowStatus, TaskStatus
from ebbs_and_flows.logs import log_claim, log_verdict, logger
from ebbs_and_flows.outcomes import Failed, run_body
from ebbs_and_flows.persistence.databases import is_refusal
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.transactions import Transactions, Written
from ebbs_and_flows.verdicts import STOPPED, checkpoint_of, claim_after, judge, limit_of

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
        self._transactions = Transactions(
            service, lease_seconds=lease_seconds, sleep=sleep, waits=lambda: OUTAGE_WAITS_SECONDS
        )

    def step(self, claim: Claim) -> Claim:
        """Run the open attempt and write its checkpoint; the claim with the next attempt, or at rest."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        template = self._templates[claim.execution.template_name]
        task = template.get_task(attempt.task_index)
        assert task is not None, "attempts are started at tasks of the template"
        log_claim(claim, "started")
        limit = limit_of(claim, template, task, attempt.name)
        if task.is_transactional:
            ended = self._transactions.run(claim, template, task, limit=limit)
        else:
            outcome = run_body(task, attempt.name, claim.context, limit=limit)
            ended = judge(task, outcome, claim.counts_of(attempt.name))
        written = ended if isinstance(ended, Written) else self._record(claim, template, task, ended)
        if written.recorded is None:
            log_claim(claim, "refused, the execution is no longer held here", level=logging.WARNING)
            return claim.at_rest(claim.execution)
        log_verdict(claim, written.verdict)
        return claim_after(claim, written.verdict, written.recorded)

    def hand_back(self, held: FlowExecution) -> bool:
        """Give the execution back to the database, to go on at the same task: a stop in good order is no failure.

        What is open is read anew: the interrupt may have come just after a checkpoint was committed. Where the database
        does not answer, the execution is left as a crash would leave it.

        Returns:
            Whether the database has answered.
        """
        try:
            execution = self._service.get_flow_execution(held.execution_id)
            attempts = self._service.get_task_executions(held.execution_id)
            is_held = execution.status is FlowStatus.RUNNING and execution.epoch == held.epoch
            if not is_held or not attempts or attempts[-1].status is not TaskStatus.RUNNING:
                return True
            attempt = attempts[-1]
            self._service.checkpoint(
                Checkpoint(
                    execution.execution_id,
                    execution.epoch,
                    attempt.worker or "",
                    attempt.flow_execution_step,
                    STOPPED.end,
                    Rest(FlowStatus.RESCHEDULED, attempt.task_index, reason=STOPPED.reason),
                    self._lease_seconds,
                )
            )
        except SQLAlchemyError as error:
            logger.warning("execution %s could not be handed back: %s", held.execution_id, error)
            return False
        return True

    def _record(self, claim: Claim, template: FlowTemplate, task: Task, verdict: Verdict) -> Written:
        """Write the checkpoint; where the database refuses what the task returned, write that instead."""
        try:
            return Written(verdict, self._written(checkpoint_of(claim, template, verdict, self._lease_seconds)))
        except DBAPIError as error:
            if not verdict.succeeded or not is_refusal(error):
                raise
            verdict = refused(claim, task, error)
            return Written(verdict, self._written(checkpoint_of(claim, template, verdict, self._lease_seconds)))

    def _written(self, checkpoint: Checkpoint) -> Recorded | None:
        """Write a checkpoint, over outages and lock time-outs of some seconds: the task is done, and is not to be lost.

        A commit whose answer was lost is read back, not repeated blindly.
        """
        for seconds in OUTAGE_WAITS_SECONDS:
            try:
                return self._service.checkpoint(checkpoint) or self._service.outcome_of(checkpoint)
            except DBAPIError as error:
                if is_refusal(error):
                    raise
                logger.warning("execution %s: checkpoint not written yet: %s", checkpoint.execution_id, error.orig)
                self._sleep(seconds)
        return self._service.checkpoint(checkpoint) or self._service.outcome_of(checkpoint)


def refused(claim: Claim, task: Task, error: Exception) -> Verdict:
    """The verdict on an attempt whose result the database will never store."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can end"
    note = "The database refused to store what the task returned."
    return judge(task, Failed(error, may_retry=False, note=note), claim.counts_of(attempt.name))
