"""What is recorded of a flow: statuses, the edges between them, and the records that the service returns.

The transition table stands here once; the service, the runner, the command line and the tests obey it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from ebbs_and_flows.context import ExecutionContext


class FlowStatus(str, Enum):
    """Where one execution of a flow stands."""

    CREATED = "CREATED"
    """Set by `create_flow_execution`. Nothing runs it until it is scheduled. A crash leaves it as it is."""

    SCHEDULED = "SCHEDULED"
    """Set by `schedule_flow`: waits for its `run_at`, then for a worker. A crash leaves it as it is."""

    RUNNING = "RUNNING"
    """Set by the claim of a worker, which holds a lease. A crash leaves it RUNNING with a lease that expires, and one
    attempt RUNNING under it; whoever recovers it ends that attempt as `WorkerLost` and goes on at the same task."""

    SUCCEEDED = "SUCCEEDED"
    """Set by the checkpoint of the last task, in the same transaction. Final."""

    FAILED = "FAILED"
    """Set by the checkpoint of a failed attempt that is not retried. Rests until a person reschedules or cancels it."""

    RESCHEDULED = "RESCHEDULED"
    """Set by a retry policy (`run_at` holds the wait), by `reschedule_flow_execution`, by recovery, and by a worker
    that stops in good order: goes on at its current task. A crash leaves it as it is."""

    CANCELLED = "CANCELLED"
    """Set by `cancel_flow_execution`. Final: a task that was running may end, but its result is refused."""

    __str__ = str.__str__

    @property
    def is_final(self) -> bool:
        """Whether nothing can follow."""
        return not ALLOWED_TRANSITIONS[self]

    def allows(self, target: FlowStatus) -> bool:
        """Whether an execution in this status may become `target`."""
        return target in ALLOWED_TRANSITIONS[self]


ALLOWED_TRANSITIONS: Mapping[FlowStatus, frozenset[FlowStatus]] = MappingProxyType(
    {
        FlowStatus.CREATED: frozenset({FlowStatus.SCHEDULED, FlowStatus.CANCELLED}),
        FlowStatus.SCHEDULED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
        FlowStatus.RUNNING: frozenset(
            {FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.RESCHEDULED, FlowStatus.CANCELLED}
        ),
        FlowStatus.FAILED: frozenset({FlowStatus.RESCHEDULED, FlowStatus.CANCELLED}),
        FlowStatus.RESCHEDULED: frozenset({FlowStatus.RUNNING, FlowStatus.CANCELLED}),
        FlowStatus.SUCCEEDED: frozenset(),
        FlowStatus.CANCELLED: frozenset(),
    }
)

RUNNABLE_STATUSES = frozenset({FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED})
"""The statuses from which a worker may claim an execution."""


class TaskStatus(str, Enum):
    """Where one attempt at a task stands."""

    RUNNING = "RUNNING"
    """Written before the task starts, so that an attempt that a crash cut off is still counted."""

    SUCCEEDED = "SUCCEEDED"
    """Written by the checkpoint together with what the task added to the context. Final."""

    FAILED = "FAILED"
    """Written with the formatted traceback; `failure` says what kind of end it was. Final."""

    __str__ = str.__str__


class Failure(str, Enum):
    """Why an attempt ended FAILED. Only the first two count towards `max_attempts`, only LOST towards `max_crashes`."""

    EXCEPTION = "EXCEPTION"
    """The task raised, or what it returned could not be recorded."""

    TIMEOUT = "TIMEOUT"
    """The task ran past its `timeout_seconds`."""

    LOST = "LOST"
    """The worker, or the process that ran the task, died or lost its lease under the attempt; its `error_type` is
    `WorkerLost`. Or a transactional task's database connection was lost; then it is the database's error."""

    STOPPED = "STOPPED"
    """The worker stopped in good order and handed the execution back; its `error_type` is `WorkerStopped`."""

    CANCELLED = "CANCELLED"
    """The execution was cancelled, or its status set by hand, while the attempt ran."""

    __str__ = str.__str__


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")


class FlowExecution(_Record):
    """One run of a template, as the database had it when it was read. Times are aware UTC, issued by the database."""

    execution_id: int
    template_name: str
    status: FlowStatus
    execution_step: int
    """The last number taken: every status transition and every start of an attempt takes the next, from 1, gapless."""
    current_task_index: int
    """0-based: the task that runs now or next; the number of tasks once the flow has succeeded."""
    execution_context: ExecutionContext
    """The read-only context as the current task receives it: the initial one with the successes so far folded in."""
    created_at: datetime
    updated_at: datetime
    """When the execution was last written; never goes back."""
    started_at: datetime | None
    """When it was claimed for the first time."""
    finished_at: datetime | None
    """When it came to rest as SUCCEEDED, FAILED or CANCELLED; empty again once it is rescheduled."""
    run_at: datetime
    """When it is due; moved on by the wait of a retry policy."""
    priority: int
    """Higher runs first."""
    queue: str
    idempotency_key: str | None
    epoch: int
    """Raised by each claim; a write that names an earlier epoch is refused."""
    lease_owner: str | None
    """The worker that holds the execution, while it is RUNNING."""
    lease_expires_at: datetime | None
    """Until when the worker holds it, unless renewed."""


class TaskExecution(_Record):
    """One attempt at one task of one execution."""

    flow_execution_id: int
    flow_execution_step: int
    """The execution's step number that the start of this attempt took."""
    task_index: int
    name: str
    attempt: int
    """1 for the first attempt at this task in this execution; counts on over retries, crashes and re-runs."""
    status: TaskStatus
    output: str | None = None
    """On failure the formatted traceback, at most 16,000 characters; on success nothing."""
    error_type: str | None = None
    """On failure the exception's class name, or `WorkerLost`, `WorkerStopped`, `FlowCancelled`."""
    failure: Failure | None = None
    """On failure, which kind of end it was."""
    started_at: datetime
    finished_at: datetime | None = None
    worker: str | None = None
    """The worker that ran it: host, process and a random part."""


class FlowTransition(_Record):
    """One change of an execution's status."""

    flow_execution_id: int
    flow_execution_step: int
    from_status: FlowStatus | None
    """`None` for the creation."""
    to_status: FlowStatus
    at: datetime
    worker: str | None = None
    """The worker that made it, empty where a caller did."""
    reason: str | None = None
    """Why, where the edge alone does not say it."""


class FlowFilter(_Record):
    """Which executions to find; what is left out does not restrict. Conditions are joined by "and"."""

    template_name: str | None = None
    statuses: frozenset[FlowStatus] | None = None
    queue: str | None = None
    idempotency_key: str | None = None
    created_after: datetime | None = None
    """Inclusive; must be aware."""
    created_before: datetime | None = None
    """Exclusive; must be aware."""
    before_id: int | None = None
    """Only executions with a smaller id: the last id of one page gives the next page."""
    limit: int = 100
    """At most this many, newest first."""
