"""What passes between the runner, which runs tasks, and the service, which records what came of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.executions import Failure, FlowExecution, FlowStatus, TaskStatus

NO_CHANGE = ContextDelta({}, ())


@dataclass(frozen=True, slots=True)
class AttemptCounts:
    """How the attempts at one task of one execution have ended so far, counted in the database."""

    started: int = 0
    failed: int = 0
    lost: int = 0


NO_COUNTS: Mapping[str, AttemptCounts] = MappingProxyType({})
_NONE_YET = AttemptCounts()


class OpenAttempt(NamedTuple):
    """An attempt that has begun, or that begins with a checkpoint: one is made for every step, so it is no more than
    that needs.
    """

    flow_execution_step: int
    task_index: int
    name: str
    attempt: int
    worker: str


class Claim(NamedTuple):
    """An execution that this worker holds, with the attempt that is open in it.

    `execution` is as it was when it was claimed, `context` what the open attempt receives. `attempt` is `None` once
    nothing is left to run: the execution has come to rest, or is no longer this worker's.
    """

    execution: FlowExecution
    context: ExecutionContext
    attempt: OpenAttempt | None
    counts: Mapping[str, AttemptCounts]
    deadline: float | None = None
    """When the limit of the whole execution is reached, on this process' `time.monotonic`; `None` without one."""

    def counts_of(self, task_name: str) -> AttemptCounts:
        """The counts for one task; nothing yet for one that never started."""
        return self.counts.get(task_name, _NONE_YET)

    def at_rest(self, execution: FlowExecution) -> Claim:
        """The claim once nothing is left to run."""
        return self._replace(execution=execution, attempt=None)


class AttemptEnd(NamedTuple):
    """How one attempt ended."""

    status: TaskStatus
    delta: ContextDelta = NO_CHANGE
    failure: Failure | None = None
    error_type: str | None = None
    output: str | None = None


class Verdict(NamedTuple):
    """How an attempt ended and what its task's policies say to that: plain data, which may come from another process.

    Attributes:
        end: what to record of the attempt.
        reason: recorded with the transition that follows a failure.
        retry_seconds: after how long it is to be tried again; `None` where it is not.
    """

    end: AttemptEnd
    reason: str | None = None
    retry_seconds: float | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the attempt succeeded."""
        return self.end.status is TaskStatus.SUCCEEDED


@dataclass(frozen=True, slots=True)
class Rest:
    """What follows: the execution leaves RUNNING.

    `wait_seconds` moves `run_at` on; `task_index` is where it stands then.
    """

    status: FlowStatus
    task_index: int
    reason: str | None = None
    wait_seconds: float = 0.0


class Checkpoint(NamedTuple):
    """The end of one attempt and what follows it: written in one transaction, or refused as a whole.

    Refused unless the execution is still RUNNING under this `epoch` and at this attempt's step. What follows is another
    attempt under the same claim, as a rule the next task's first, or rest.
    """

    execution_id: int
    epoch: int
    worker: str
    step: int
    end: AttemptEnd
    then: OpenAttempt | Rest
    lease_seconds: float


class Recorded(NamedTuple):
    """What came of a checkpoint."""

    attempt: OpenAttempt | None
    """The next attempt, if one was started."""
    then: OpenAttempt | Rest
    """What followed."""
    updated_at: datetime | None = None
    run_at: datetime | None = None
    """The times of the execution's row, where it has come to rest and was waited for."""


def with_context(execution: FlowExecution, context: ExecutionContext) -> FlowExecution:
    """The same execution with this context."""
    return execution.model_copy(update={"execution_context": context})
