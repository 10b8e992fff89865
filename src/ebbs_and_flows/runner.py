"""FlowRunner: knows the templates, and runs one execution at a time from claim to rest."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ebbs_and_flows.arguments import as_context, runnable_status, valid_contexts, valid_lease_seconds
from ebbs_and_flows.checkpoints import Claim
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import (
    DuplicateTemplateError,
    InvalidArgumentError,
    InvalidNameError,
    TemplateError,
    UnknownTemplateError,
)
from ebbs_and_flows.executions import RUNNABLE_STATUSES, FlowExecution, FlowStatus
from ebbs_and_flows.leases import LeaseKeeper
from ebbs_and_flows.logs import log_claim
from ebbs_and_flows.names import valid_name
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.stepper import Stepper
from ebbs_and_flows.stopping import NO_LONGER_HELD, SIGNAL, StopSignal
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate

LONGEST_SLEEP_SECONDS = 1.0
"""How long `run_until_idle` sleeps at most before it looks again: another process may have scheduled something."""


class FlowRunner:
    """Schedules flows and runs them, one at a time, in the caller's thread.

    Args:
        service: where executions are kept.
        lease_seconds: for how long a claim holds unless it is renewed, as it is by each checkpoint and, while a task
            runs, in the background. Default 30.
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
        self._leases = LeaseKeeper(service, lease_seconds=self._lease_seconds)
        self._stepper = Stepper(service, self._templates, lease_seconds=self._lease_seconds, sleep=sleep)

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

    def schedule_flows(
        self,
        name: str,
        contexts: Iterable[ExecutionContext | Mapping[str, Any]],
        *,
        session: Session | Connection | None = None,
        run_at: datetime | None = None,
        delay: timedelta | float | None = None,
        priority: int = 0,
        queue: str = "default",
    ) -> list[int]:
        """Schedule an execution of a registered template for each context: very many in a few seconds. Commits, all of
        them or none, unless `session` is given.

        Args:
            name: the template's.
            contexts: what the first task of each receives; an iterable, all of which is encoded and checked before
                anything is written.
            session, run_at, delay, priority, queue: as for `schedule_flow`, the same for all.

        Returns:
            Their ids, in the order of the contexts.

        Raises:
            UnknownTemplateError, TemplateError, MissingInputError, UnserializableValueError, InvalidArgumentError,
            InvalidNameError: as for `schedule_flow`; from Python 3.11 on, a note says which context it is about.
        """
        template = self.get_flow_template(name)
        if not template.tasks:
            raise TemplateError(f"template {name!r} has no tasks: add one before it is scheduled")
        return self.service.schedule_many(
            template.name,
            _checked(template, valid_contexts(contexts)),
            session=session,
            run_at=run_at,
            delay=delay,
            priority=priority,
            queue=queue,
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
        """Run one RESCHEDULED execution that is due, from its current task; else as `run_flow`.

        Executions whose worker was lost, and whose lease has expired, become RESCHEDULED first.
        """
        self.service.recover_expired(self._templates)
        return self._run_one({FlowStatus.RESCHEDULED})

    def run_until_idle(self) -> int:
        """Run all that is due, and the retries that come due later, until nothing of this runner's templates is left.

        It takes over what lost workers have left behind once its lease has expired, and waits for RESCHEDULED
        executions; not for SCHEDULED ones whose time is yet to come, nor for leases that others hold.

        Returns:
            How many times an execution was taken up.
        """
        runs = 0
        while True:
            if self._run_one(RUNNABLE_STATUSES) is not None:
                runs += 1
                continue
            if self.service.recover_expired(self._templates):
                continue
            seconds = self.service.seconds_until_next(self._templates)
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
        self._leases.hold(self.worker, execution.execution_id, execution.epoch)
        try:
            self._stepper.step(claim)
        except KeyboardInterrupt:
            self._stepper.hand_back(claim.execution)
            raise
        finally:
            self._leases.release(self.worker, execution.execution_id)
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
            log_claim(claim, "came to rest without an attempt as %s", claim.execution.status)
            return claim.execution
        held, worker = claim.execution, self.worker
        self._thread.holds.add(held.execution_id)
        signal = StopSignal()
        self._leases.hold(worker, held.execution_id, held.epoch, lambda: signal.set(NO_LONGER_HELD))
        token = SIGNAL.set(signal)
        try:
            while claim.attempt is not None:
                claim = self._stepper.step(claim)
            if claim.execution.status is not FlowStatus.RUNNING:
                return claim.execution
            return self.service.get_flow_execution(held.execution_id)  # it is no longer held here
        except KeyboardInterrupt:
            self._stepper.hand_back(held)
            raise
        finally:
            SIGNAL.reset(token)
            self._leases.release(worker, held.execution_id)
            self._thread.holds.discard(held.execution_id)

    def _hand_back_strays(self) -> None:
        """Hand back what this thread holds and does not run: a claim that was committed, but cut off before it ran."""
        try:
            strays = [each for each in self.service.held_by(self.worker) if each.execution_id not in self._thread.holds]
        except SQLAlchemyError:  # what led here is raised on, and is the better message
            return
        for stray in strays:
            self._stepper.hand_back(stray)


def _checked(
    template: FlowTemplate, contexts: Iterable[ExecutionContext | Mapping[str, Any]]
) -> Iterator[ExecutionContext]:
    for given in contexts:
        context = as_context(given)
        template.check_inputs(context)
        yield context


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
