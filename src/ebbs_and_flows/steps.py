"""The steps of an execution's life as they are written: created, claimed, moved on, left. Each is a part of its
caller's unit of work, takes the next step numbers, and leaves committing to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from ebbs_and_flows.arguments import valid_id
from ebbs_and_flows.checkpoints import (
    NO_COUNTS,
    AttemptCounts,
    Checkpoint,
    Claim,
    OpenAttempt,
    Recorded,
    with_context,
)
from ebbs_and_flows.context import ContextDelta
from ebbs_and_flows.errors import (
    FlowTimeoutError,
    InvalidArgumentError,
    TemplateError,
    TemplateMismatchError,
    UndecodableValueError,
    UnknownExecutionError,
)
from ebbs_and_flows.executions import (
    Failure,
    FlowExecution,
    FlowStatus,
    FlowTransition,
)
from ebbs_and_flows.persistence.batches import CheckpointBatch
from ebbs_and_flows.persistence.contexts import NO_CONTEXT, Progress
from ebbs_and_flows.persistence.repositories import NewExecution
from ebbs_and_flows.persistence.rows import Moved
from ebbs_and_flows.persistence.tables import to_utc
from ebbs_and_flows.persistence.unit_of_work import UnitOfWork
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.verdicts import judge_lost


def existing(work: UnitOfWork, execution_id: int, *, lock: bool = False) -> FlowExecution:
    """The execution, locked against other writers if asked; `UnknownExecutionError` where there is none."""
    execution = work.executions.get(valid_id(execution_id), lock=lock)
    if execution is None:
        raise UnknownExecutionError(execution_id)
    return execution


def current(work: UnitOfWork, execution_id: int) -> FlowExecution:
    """The execution as this transaction sees it, with its context."""
    return work.contexts.with_contexts([existing(work, execution_id)])[0]


def add(work: UnitOfWork, new: NewExecution, delta: ContextDelta) -> int:
    """Write a new execution with its first transitions; its id, or that of the one that has its idempotency key."""
    added = work.executions.add(new)
    if added is None:
        assert new.idempotency_key is not None, "nothing else can conflict"
        holder = work.executions.id_of_key(new.idempotency_key)
        if holder is not None:
            return holder
        # The one that had the key was deleted in between, or is none that this transaction may see.
        added = work.executions.add(new)
        if added is None:
            raise InvalidArgumentError("idempotency_key", new.idempotency_key, "a key whose execution can be read here")
    execution_id, at = added
    created = FlowTransition(
        flow_execution_id=execution_id,
        flow_execution_step=1,
        from_status=None,
        to_status=FlowStatus.CREATED,
        at=at,
    )
    work.transitions.add(created, 0, delta)
    if new.status is FlowStatus.SCHEDULED:
        work.transitions.add(
            created.model_copy(
                update={
                    "flow_execution_step": 2,
                    "from_status": FlowStatus.CREATED,
                    "to_status": FlowStatus.SCHEDULED,
                }
            ),
            0,
        )
    return execution_id


def add_transition(
    work: UnitOfWork,
    execution: FlowExecution,
    status: FlowStatus,
    at: datetime,
    *,
    step: int | None = None,
    from_status: FlowStatus | None = None,
    worker: str | None = None,
    reason: str | None = None,
    delta: ContextDelta | None = None,
    task_index: int | None = None,
) -> None:
    """Append a transition; by default from the execution's status, under the step number after its last."""
    work.transitions.add(
        FlowTransition(
            flow_execution_id=execution.execution_id,
            flow_execution_step=step if step is not None else execution.execution_step + 1,
            from_status=from_status or execution.status,
            to_status=status,
            at=at,
            worker=worker,
            reason=reason,
        ),
        execution.current_task_index if task_index is None else task_index,
        delta,
    )


def leave(
    work: UnitOfWork,
    execution: FlowExecution,
    status: FlowStatus,
    *,
    reason: str | None = None,
    task_index: int | None = None,
    delta: ContextDelta | None = None,
) -> None:
    """Move an execution that is locked to a status other than RUNNING, ending the attempt it may have open."""
    at = work.executions.move(
        execution,
        status,
        step=execution.execution_step + 1,
        task_index=execution.current_task_index if task_index is None else task_index,
        wait_seconds=0.0 if status is FlowStatus.RESCHEDULED else None,
    )
    if execution.status is FlowStatus.RUNNING:
        error_type = "FlowCancelled" if status is FlowStatus.CANCELLED else "StatusChanged"
        ended = f"The execution became {status} while this attempt was running."
        work.attempts.end_open(execution.execution_id, Failure.CANCELLED, error_type, ended, at)
    add_transition(work, execution, status, at, reason=reason, delta=delta, task_index=task_index)


def lose_worker(work: UnitOfWork, execution: FlowExecution, template: FlowTemplate, reason: str) -> FlowStatus:
    """End what a dead worker left open, and reschedule the execution, or park it if that has happened too often.

    Args:
        execution: RUNNING, and locked by this transaction.
        reason: of the transition, where it is rescheduled.
    """
    counts = work.attempts.counts([execution.execution_id]).get(execution.execution_id, {})
    lost_by = f"Worker {execution.lease_owner} was lost while this attempt was running."
    status = FlowStatus.RESCHEDULED
    for name in work.attempts.open_names(execution.execution_id):
        task = template.get_task(template.task_names.index(name)) if name in template.task_names else None
        verdict = judge_lost(task, name, counts.get(name, AttemptCounts()), lost_by)
        if verdict.retry_seconds is None:
            status, reason = FlowStatus.FAILED, verdict.reason or reason
    at = work.executions.move(
        execution,
        status,
        step=execution.execution_step + 1,
        task_index=execution.current_task_index,
        wait_seconds=0.0 if status is FlowStatus.RESCHEDULED else None,
    )
    work.attempts.end_open(execution.execution_id, Failure.LOST, "WorkerLost", lost_by, at)
    add_transition(work, execution, status, at, reason=reason)
    return status


def begin(work: UnitOfWork, claimed: Sequence[FlowExecution], templates: Mapping[str, FlowTemplate]) -> list[Claim]:
    """Write the transition of each execution just claimed, and the first attempt that follows from it."""
    claimed_before = [each.execution_id for each in claimed if each.epoch > 1]
    progress = work.contexts.progress(claimed, has_run=bool(claimed_before))
    counts = work.attempts.counts(claimed_before)
    limited = [each.execution_id for each in claimed if templates[each.template_name].timeout_seconds is not None]
    began = work.transitions.run_began(limited)
    claims = []
    for execution in claimed:
        template = templates[execution.template_name]
        deadline = deadline_of(execution, template, began.get(execution.execution_id))
        claim = Claim(execution, NO_CONTEXT, None, counts.get(execution.execution_id, NO_COUNTS), deadline)
        claims.append(_start(claim, progress[execution.execution_id], template))
    work.batches.begin([_beginning(claim) for claim in claims])
    return [claim if isinstance(claim, Claim) else _rest_at_once(work, *claim) for claim in claims]


def deadline_of(execution: FlowExecution, template: FlowTemplate, began: datetime | None) -> float | None:
    """When the limit of an execution that was written just now is reached, on this process' `time.monotonic`.

    Args:
        began: when its first claim since it was scheduled or re-run by hand was; default just now.
    """
    if template.timeout_seconds is None:
        return None
    spent = 0.0 if began is None else (execution.updated_at - began).total_seconds()
    return time.monotonic() + template.timeout_seconds - spent


def _start(claim: Claim, standing: Progress, template: FlowTemplate) -> Claim | tuple[Claim, FlowStatus, str]:
    """The claim with the attempt at the current task; or the status in which it comes to rest at once, and why, where
    the template has changed, or has no task left.
    """
    execution = claim.execution
    index = execution.current_task_index
    try:
        template.check_completed(standing.completed)
        claim = claim._replace(context=standing.context)
    except (TemplateMismatchError, UndecodableValueError) as error:
        return claim, FlowStatus.FAILED, f"{type(error).__name__}: {error}"
    if template.get_task(index) is None:
        return claim, FlowStatus.SUCCEEDED, "the template has no task left to run"
    if claim.deadline is not None and time.monotonic() >= claim.deadline:
        assert template.timeout_seconds is not None, "without a limit there is no deadline"
        error_text = str(FlowTimeoutError(template.name, template.timeout_seconds))
        return claim, FlowStatus.FAILED, f"FlowTimeoutError: {error_text}"
    name = template.task_names[index]
    number = claim.counts_of(name).started + 1
    attempt = OpenAttempt(execution.execution_step, index, name, number, execution.lease_owner or "")
    return claim._replace(attempt=attempt)


def _beginning(claim: Claim | tuple[Claim, FlowStatus, str]) -> tuple[int, str | None, int]:
    if not isinstance(claim, Claim):
        return claim[0].execution.execution_id, None, 0
    assert claim.attempt is not None, "it was started"
    return claim.execution.execution_id, claim.attempt.name, claim.attempt.attempt


def _rest_at_once(work: UnitOfWork, claim: Claim, status: FlowStatus, reason: str) -> Claim:
    """Leave RUNNING without an attempt: the second number that the claim took is this transition's."""
    execution = claim.execution
    at = work.executions.move(execution, status, step=execution.execution_step, task_index=execution.current_task_index)
    add_transition(
        work, execution, status, at, step=execution.execution_step, worker=execution.lease_owner, reason=reason
    )
    after = existing(work, execution.execution_id)
    return claim.at_rest(with_context(after, claim.context))


def record(work: UnitOfWork, batch: CheckpointBatch, *, wait: bool) -> dict[int, Recorded | None]:
    """Write checkpoints, each one if its fence holds: a refused one writes nothing.

    Args:
        wait: whether to wait for what somebody else has locked; else that is missing from the answer.

    Returns:
        By execution id what came of each; `None` where it was refused.
    """
    moved = work.batches.write(batch, wait=wait)
    recorded: dict[int, Recorded | None] = {}
    unclear = {}
    for checkpoint in batch.checkpoints:
        found = moved.get(checkpoint.execution_id)
        if found is not None:
            recorded[checkpoint.execution_id] = _recorded(checkpoint, found)
        elif wait:
            recorded[checkpoint.execution_id] = None
        else:
            unclear[checkpoint.execution_id] = (checkpoint.epoch, checkpoint.step)
    if unclear:  # refused, or locked: that one stands where it stood
        places = work.executions.places(unclear)
        recorded.update({each: None for each, place in unclear.items() if places.get(each) != place})
    return recorded


def _recorded(checkpoint: Checkpoint, moved: Moved) -> Recorded:
    then = checkpoint.then
    if isinstance(then, OpenAttempt):
        return Recorded(then, then)
    if moved.updated_at is None or moved.run_at is None:
        return Recorded(None, then)
    return Recorded(None, then, to_utc(moved.updated_at), to_utc(moved.run_at))


def index_reached(work: UnitOfWork, execution: FlowExecution, task_name: str) -> int:
    """The index of a task that the execution has completed, or failed at; `TemplateError` for any other."""
    completed = work.contexts.progress([execution])[execution.execution_id].completed
    if task_name in completed:
        return completed.index(task_name)
    current = [
        attempt.name
        for attempt in work.attempts.of(execution.execution_id)
        if attempt.task_index == execution.current_task_index
    ]
    if current and task_name == current[-1]:
        return execution.current_task_index
    reached = [*completed, *current[-1:]]
    raise TemplateError(
        f"execution {execution.execution_id} has not reached a task {task_name!r}; it can be re-run from: {reached}"
    )
