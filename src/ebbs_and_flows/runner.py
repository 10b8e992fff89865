"""FlowRunner: knows the templates, and runs one execution at a time from claim to rest."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from ebbs_and_flows.arguments import as_context, runnable_status, valid_lease_seconds
from ebbs_and_flows.checkpoints import AttemptEnd, Checkpoint, Claim, NextAttempt, Rest
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import (
    DuplicateTemplateError,
    InvalidArgumentError,
    InvalidNameError,
    TaskResultError,
    TemplateError,
    UnknownTemplateError,
)
from ebbs_and_flows.executions import RUNNABLE_STATUSES, Failure, FlowExecution, FlowStatus, TaskStatus
from ebbs_and_flows.names import valid_name
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

LONGEST_SLEEP_SECONDS = 1.0
"""How long `run_until_idle` sleeps at most before it looks again: another process may have scheduled something."""


class FlowRunner:
    """Schedules flows and runs them, one at a time, in the caller's thread.

    Args:
        service: where executions are kept.
        lease_seconds: for how long a claim holds unless it is renewed; each checkpoint renews it. Default 30.
        sleep: how `run_until_idle` waits; for tests.

    Templates are registered with a runner, in every process that schedules or runs them. A runner claims executions of
    its own templates only, so that processes of different releases can share a database.
    """

    def __init__(
        self, service: FlowService, *, lease_seconds: float = 30.0, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        if not isinstance(service, FlowService):
            raise InvalidArgumentError("service", service, "a FlowService")
        self.service = service
        self._thread = _ThreadState()
        self._lease_seconds = valid_lease_seconds(lease_seconds)
        self._sleep = sleep
        self._templates: dict[str, FlowTemplate] = {}

    def __repr__(self) -> str:
        return f"<FlowRunner {self.worker} on {self.service!r}: {', '.join(self._templates) or 'no templates'}>"

    @property
    def worker(self) -> str:
        """The name under which this thread of this process holds executions: host, process and a random part."""
        return self._thread.worker()

    # --- templates ----------------------------------------------------------------------------------------------------

    def register_flow_template(self, template: FlowTemplate) -> None:
        """Make a template known to this runner, and the types that its tasks declare known to this process.

        Raises:
            DuplicateTemplateError: one of this name is registered already.
            InvalidArgumentError: not a FlowTemplate.
        """
        if not isinstance(template, FlowTemplate):
            raise InvalidArgumentError("template", template, "a FlowTemplate")
        if template.name in self._templates:
            raise DuplicateTemplateError(template.name)
        template.declare_types()
        self._templates[template.name] = template
        self.service.remember_template(template)

    def get_flow_template(self, name: str) -> FlowTemplate:
        """The template of this name.

        Raises:
            UnknownTemplateError: none is registered with this runner.
        """
        try:
            template = self._templates.get(valid_name("template", name))
        except InvalidNameError:
            template = None
        if template is None:
            raise UnknownTemplateError(name, self._templates)
        return template

    @property
    def templates(self) -> Mapping[str, FlowTemplate]:
        """The registered templates by name."""
        return dict(self._templates)

    # --- schedule, reschedule, cancel ---------------------------------------------------------------------------------

    def schedule_flow(
        self,
        name: str,
        context: ExecutionContext | Mapping[str, Any] | None = None,
        *,
        session: Session | Connection | None = None,
        run_at: datetime | None = None,
        delay: timedelta | float | None = None,
        priority: int = 0,
        queue: str = "default",
        idempotency_key: str | None = None,
    ) -> int:
        """Schedule an execution of a registered template and return its id. Commits, unless `session` is given.

        Args:
            name: the template's.
            context: what its first task receives; default empty. Encoded here and now.
            session: a Session or Connection of the caller's on the same database: the execution joins that transaction,
                so a rollback leaves nothing. From asyncio: `await session.run_sync(lambda s: runner.schedule_flow(...,
                session=s))`.
            run_at: when it is due, an aware datetime; default at once.
            delay: instead of `run_at`, from the database's now: a timedelta, or seconds.
            priority: higher runs first; default 0.
            queue: a name by which workers choose what they take.
            idempotency_key: an execution that has this key already, of whatever template, is returned instead of a new
                one, also where many callers schedule at once.

        Raises:
            UnknownTemplateError, TemplateError: no such template, or one without tasks.
            MissingInputError: the context lacks an entry that the flow needs.
            UnserializableValueError: the context holds a value that cannot be stored.
            InvalidArgumentError, InvalidNameError: another argument that cannot be used.
            All of them are ValueErrors, and raised before anything is written.
        """
        template = self.get_flow_template(name)
        if not template.tasks:
            raise TemplateError(f"template {name!r} has no tasks: add one before it is scheduled")
        context = as_context({} if context is None else context)
        template.check_inputs(context)
        return self.service.schedule(
            template.name,
            context,
            session=session,
            run_at=run_at,
            delay=delay,
            priority=priority,
            queue=queue,
            idempotency_key=idempotency_key,
        )

    def reschedule_flow_execution(
        self, execution_id: int, from_task: str | None = None, reason: str | None = None
    ) -> FlowExecution:
        """Make a FAILED execution run again; see `FlowService.reschedule`. Commits."""
        return self.service.reschedule(execution_id, from_task, reason)

    def cancel_flow_execution(self, execution_id: int, reason: str | None = None) -> FlowExecution:
        """Cancel an execution that is not final; see `FlowService.cancel`. Commits."""
        return self.service.cancel(execution_id, reason)

    # --- run ----------------------------------------------------------------------------------------------------------

    def run_flow(self, status: FlowStatus = FlowStatus.SCHEDULED) -> FlowExecution | None:
        """Run one due execution to its end, in this thread. Every step commits.

        Args:
            status: from which to take it: SCHEDULED (the default) or RESCHEDULED.

        Returns:
            The execution as it came to rest: SUCCEEDED; FAILED; RESCHEDULED for later where a retry policy has attempts
            left; CANCELLED if somebody did that meanwhile. `None` if none of this runner's templates is due.

        What a task raises is recorded, not raised; only `KeyboardInterrupt` is raised on, after the execution has been
        handed back.

        Raises:
            InvalidArgumentError: another status.
        """
        return self._run_one({runnable_status(status)})

    def re_run_flow(self) -> FlowExecution | None:
        """Run one RESCHEDULED execution that is due, from its current task; else as `run_flow`."""
        return self._run_one({FlowStatus.RESCHEDULED})

    def run_until_idle(self) -> int:
        """Run all that is due, and the retries that come due later, until nothing of this runner's templates is left.

        It waits for RESCHEDULED executions, not for SCHEDULED ones whose time is yet to come.

        Returns:
            How many times an execution was taken up.
        """
        runs = 0
        while True:
            if self._run_one(RUNNABLE_STATUSES) is not None:
                runs += 1
                continue
            seconds = self.service.seconds_until_retry(self._templates)
            if seconds is None:
                return runs
            self._sleep(min(max(seconds, 0.01), LONGEST_SLEEP_SECONDS))

    def recover(self, execution_id: int) -> FlowExecution:
        """Take over a RUNNING execution whose worker is known to be dead, and run it to its end from the task it was
        at.

        The caller vouches for the death; should the worker live after all, its writes are refused from now on.

        Returns:
            The execution as it came to rest, as for `run_flow`; FAILED without having run where the task has lost
            `max_crashes` workers.

        Raises:
            TransitionError: the execution is not RUNNING.
            UnknownExecutionError, UnknownTemplateError: there is no such execution, or its template is not registered.
        """
        self.get_flow_template(self.service.get_flow_execution(execution_id).template_name)
        claim = self.service.recover(execution_id, self._templates, self.worker, lease_seconds=self._lease_seconds)
        return self._run_to_rest(claim)

    # --- step by step -------------------------------------------------------------------------------------------------

    def get_current_task(self, execution: FlowExecution) -> Task | None:
        """The task that runs now or next; `None` once all have succeeded."""
        return self.get_flow_template(execution.template_name).get_task(execution.current_task_index)

    def get_next_task(self, execution: FlowExecution) -> Task | None:
        """The task after the current one; `None` if the current one is the last."""
        return self.get_flow_template(execution.template_name).get_task(execution.current_task_index + 1)

    def run_task(self, execution: FlowExecution, task: Task) -> FlowExecution:
        """Run the current task of an execution that is RUNNING, and record what came of it. Commits.

        For those who drive an execution by hand, after `service.update_flow_status(id, FlowStatus.RUNNING)`.

        Args:
            execution: as it was read; if it has moved since, nothing runs.
            task: the template's task at its current index.

        Returns:
            The execution after it: RUNNING with the next task started, or at rest.

        Raises:
            InvalidArgumentError: `task` is not the current task, or the execution is not RUNNING.
            LeaseLostError: the execution has moved since it was read, or another worker holds it.
        """
        if not isinstance(execution, FlowExecution):
            raise InvalidArgumentError("execution", execution, "a FlowExecution")
        current = self.get_current_task(execution)
        if current is None or task is not current:
            raise InvalidArgumentError(
                "task", task, f"the current task of execution {execution.execution_id}, {current}"
            )
        if execution.status is not FlowStatus.RUNNING:
            raise InvalidArgumentError("execution", execution.status, "an execution that is RUNNING")
        name = self.get_flow_template(execution.template_name).task_names[execution.current_task_index]
        claim = self.service.resume_by_hand(execution, name, self.worker, self._lease_seconds)
        try:
            self._step(claim)
        except KeyboardInterrupt:
            self._hand_back(claim.execution)
            raise
        return self.service.get_flow_execution(execution.execution_id)

    def _run_one(self, statuses: frozenset[FlowStatus] | set[FlowStatus]) -> FlowExecution | None:
        try:
            claims = self.service.claim(self._templates, statuses, self.worker, lease_seconds=self._lease_seconds)
            return self._run_to_rest(claims[0]) if claims else None
        except BaseException:
            self._hand_back_strays()
            raise

    def _run_to_rest(self, claim: Claim) -> FlowExecution:
        if claim.attempt is None:
            _log(claim, "came to rest without an attempt as %s", claim.execution.status)
            return claim.execution
        held = claim.execution
        self._thread.holds.add(held.execution_id)
        try:
            while claim.attempt is not None:
                claim = self._step(claim)
            return self.service.get_flow_execution(held.execution_id)
        except KeyboardInterrupt:
            self._hand_back(held)
            raise
        finally:
            self._thread.holds.discard(held.execution_id)

    def _step(self, claim: Claim) -> Claim:
        """Run the open attempt and write its checkpoint; the claim with the next attempt, or at rest."""
        attempt = claim.attempt
        assert attempt is not None, "only an open attempt can be run"
        template = self._templates[claim.execution.template_name]
        task = template.get_task(attempt.task_index)
        assert task is not None, "attempts are started at tasks of the template"
        _log(claim, "started")
        if task.is_transactional:
            outcome, recorded = self._run_transactional(claim, template, task)
        else:
            outcome = run_body(task, attempt.name, claim.execution.execution_context)
            outcome, recorded = self._record(claim, template, task, outcome)
        if recorded is None:
            _log(claim, "refused, the execution is no longer held here", level=logging.WARNING)
            return claim.at_rest(claim.execution)
        if isinstance(outcome, Failed):
            _log(claim, "failed with %s", outcome.summary, level=logging.WARNING)
            return claim.at_rest(claim.execution)
        _log(claim, "succeeded")
        return _after(claim, outcome, recorded)

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
            recorded = self.service.run_in_transaction(body)
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
                return self.service.outcome_of(checkpoint)
            except DBAPIError:
                self._sleep(seconds)
        return self.service.outcome_of(checkpoint)

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
                return self.service.checkpoint([checkpoint])[0] or self.service.outcome_of(checkpoint)
            except DBAPIError as error:
                if is_refusal(error):
                    raise
                logger.warning("execution %s: checkpoint not written yet: %s", checkpoint.execution_id, error.orig)
                self._sleep(seconds)
        return self.service.checkpoint([checkpoint])[0] or self.service.outcome_of(checkpoint)

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
            worker=attempt.worker or self.worker,
            step=attempt.flow_execution_step,
            end=outcome.attempt_end(),
            then=then,
            lease_seconds=self._lease_seconds,
        )

    def _hand_back_strays(self) -> None:
        """Hand back what this thread holds and does not run: a claim that was committed, but cut off before it ran."""
        try:
            strays = [each for each in self.service.held_by(self.worker) if each.execution_id not in self._thread.holds]
        except SQLAlchemyError:  # what led here is raised on, and is the better message
            return
        for stray in strays:
            self._hand_back(stray)

    def _hand_back(self, held: FlowExecution) -> None:
        """Give the execution back to the database, to go on at the same task: a stop in good order is no failure.

        What is open is read anew: the interrupt may have come just after a checkpoint was committed. Where the database
        does not answer, the execution is left as a crash would leave it.
        """
        try:
            execution = self.service.get_flow_execution(held.execution_id)
            attempts = self.service.get_task_executions(held.execution_id)
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
            self.service.checkpoint(
                [
                    Checkpoint(
                        execution.execution_id,
                        execution.epoch,
                        attempt.worker or self.worker,
                        attempt.flow_execution_step,
                        stopped,
                        Rest(FlowStatus.RESCHEDULED, attempt.task_index, reason="the worker was stopped"),
                        self._lease_seconds,
                    )
                ]
            )
        except SQLAlchemyError as error:
            logger.warning("execution %s could not be handed back: %s", held.execution_id, error)


class _ThreadState(threading.local):
    """What one thread of one process holds; after a fork the child has a name of its own."""

    def __init__(self) -> None:
        self.holds: set[int] = set()
        self._process = 0
        self._worker = ""

    def worker(self) -> str:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._worker = f"{socket.gethostname()}:{self._process}:{secrets.token_hex(4)}"
            self.holds = set()
        return self._worker


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


def _log(claim: Claim, message: str, *values: object, level: int = logging.DEBUG) -> None:
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
