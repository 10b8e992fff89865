"""What follows an attempt: its outcome is held against the task's policies, and becomes the next checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace

from ebbs_and_flows.checkpoints import (
    AttemptCounts,
    AttemptEnd,
    Checkpoint,
    Claim,
    OpenAttempt,
    Recorded,
    Rest,
    Verdict,
)
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import FlowTimeoutError, TaskTimeoutError
from ebbs_and_flows.executions import RUNNABLE_STATUSES, Failure, FlowExecution, FlowStatus, TaskStatus
from ebbs_and_flows.outcomes import UNLIMITED, Failed, Limit, Outcome, Success
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate

STOPPED = Verdict(
    AttemptEnd(
        TaskStatus.FAILED,
        failure=Failure.STOPPED,
        error_type="WorkerStopped",
        output="The worker was stopped while this attempt was running.",
    ),
    "the worker was stopped",
    0.0,
)
"""Of an attempt that its worker handed back in good order: counts as no failure, goes on at once elsewhere."""


def judge(task: Task, outcome: Outcome, counts: AttemptCounts) -> Verdict:
    """Ask the retry policy; where the policy itself fails, there is no retry, and the record says so."""
    if isinstance(outcome, Success):
        return Verdict(outcome.attempt_end())
    failed_attempts = counts.failed + 1
    policy = task.retry
    try:
        if outcome.may_retry and policy.allows_retry(outcome.exception, failed_attempts):
            seconds = policy.wait_seconds(outcome.exception, failed_attempts)
            reason = f"{outcome.summary}; {failed_attempts} of {policy.max_attempts} attempts, next in {seconds:.1f} s"
            return Verdict(outcome.attempt_end(), reason, seconds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a wait strategy is the user's code
        outcome = replace(outcome, note=f"No retry: the retry policy raised {Failed(error).summary}")
    return Verdict(outcome.attempt_end(), outcome.summary)


def judge_lost(
    task: Task | None,
    name: str,
    counts: AttemptCounts,
    output: str,
    *,
    error_type: str = "WorkerLost",
    reason: str | None = None,
) -> Verdict:
    """The verdict on an attempt whose worker, process or database connection was lost under it.

    Args:
        task: whose `max_crashes` counts; `None` where the template no longer has it, and then nothing bounds it.
        name: its name.
        counts: how the attempts before this one ended.
        output, error_type: what to record of the attempt.
        reason: of the transition that follows; default the output.
    """
    end = AttemptEnd(TaskStatus.FAILED, failure=Failure.LOST, error_type=error_type, output=output)
    lost = counts.lost + 1
    if task is not None and lost >= task.retry.max_crashes:
        return Verdict(end, f"task {name!r} lost its worker {lost} times, max_crashes is {task.retry.max_crashes}")
    return Verdict(end, reason or output, 0.0)


def checkpoint_of(
    claim: Claim, template: FlowTemplate, verdict: Verdict, lease_seconds: float, *, goes_on: bool = True
) -> Checkpoint:
    """The checkpoint that records a verdict.

    Args:
        goes_on: whether the next task follows under this claim; False hands the execution back after this one.
    """
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can end"
    execution = claim.execution
    then = _after_success(claim, template, goes_on) if verdict.succeeded else _after_failure(claim, verdict)
    return Checkpoint(
        execution.execution_id,
        execution.epoch,
        attempt.worker,
        attempt.flow_execution_step,
        verdict.end,
        then,
        lease_seconds,
    )


def start_over(claim: Claim, why: str, lease_seconds: float) -> Checkpoint:
    """The checkpoint that ends an attempt without blame and starts another one at the same task, under this claim."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can end"
    end = STOPPED.end._replace(output=why)
    return Checkpoint(
        execution_id=claim.execution.execution_id,
        epoch=claim.execution.epoch,
        worker=attempt.worker,
        step=attempt.flow_execution_step,
        end=end,
        then=attempt._replace(flow_execution_step=attempt.flow_execution_step + 1, attempt=attempt.attempt + 1),
        lease_seconds=lease_seconds,
    )


def claim_after(claim: Claim, verdict: Verdict, recorded: Recorded) -> Claim:
    """The claim after a checkpoint: what the next task receives is what was stored, not what the last one had in
    hand.
    """
    context = claim.context.fold(verdict.end.delta) if verdict.succeeded else claim.context
    if recorded.attempt is not None:
        return Claim(claim.execution, context, recorded.attempt, claim.counts, claim.deadline)
    return claim.at_rest(_rested(claim, recorded, context))


def _rested(claim: Claim, recorded: Recorded, context: ExecutionContext) -> FlowExecution:
    """The execution as its row is after a checkpoint that has taken it out of RUNNING."""
    then, attempt = recorded.then, claim.attempt
    if recorded.updated_at is None or attempt is None or isinstance(then, OpenAttempt):
        return claim.execution
    return claim.execution.model_copy(
        update={
            "status": then.status,
            "execution_step": attempt.flow_execution_step + 1,
            "current_task_index": then.task_index,
            "execution_context": context,
            "updated_at": recorded.updated_at,
            "run_at": recorded.run_at,
            "finished_at": None if then.status in RUNNABLE_STATUSES else recorded.updated_at,
            "lease_owner": None,
            "lease_expires_at": None,
        }
    )


def limit_of(claim: Claim, template: FlowTemplate, task: Task, name: str) -> Limit:
    """How long the open attempt may take, from now on: the task's own limit, or what is left of its execution's,
    whichever is shorter.
    """
    seconds = task.timeout_seconds
    if claim.deadline is not None and template.timeout_seconds is not None:
        left = max(0.0, claim.deadline - time.monotonic())
        if seconds is None or left < seconds:
            return Limit(left, FlowTimeoutError(template.name, template.timeout_seconds))
    return UNLIMITED if seconds is None else Limit(seconds, TaskTimeoutError(name, seconds))


def _after_success(claim: Claim, template: FlowTemplate, goes_on: bool) -> OpenAttempt | Rest:
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can succeed"
    index = attempt.task_index + 1
    names = template.task_names
    if index >= len(names):
        return Rest(FlowStatus.SUCCEEDED, index)
    if claim.deadline is not None and template.timeout_seconds is not None and time.monotonic() >= claim.deadline:
        error = FlowTimeoutError(template.name, template.timeout_seconds)
        return Rest(FlowStatus.FAILED, index, Failed(error).summary)
    if not goes_on:
        return Rest(FlowStatus.RESCHEDULED, index, STOPPED.reason)
    name = names[index]
    return OpenAttempt(attempt.flow_execution_step + 1, index, name, claim.counts_of(name).started + 1, attempt.worker)


def _after_failure(claim: Claim, verdict: Verdict) -> Rest:
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can fail"
    if verdict.retry_seconds is None:
        return Rest(FlowStatus.FAILED, attempt.task_index, verdict.reason)
    return Rest(FlowStatus.RESCHEDULED, attempt.task_index, verdict.reason, verdict.retry_seconds)
