"""What passes between the runner, which runs tasks, and the service, which records what came of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ebbs_and_flows.context import ContextDelta
from ebbs_and_flows.executions import Failure, FlowExecution, FlowStatus, TaskExecution, TaskStatus

NO_CHANGE = ContextDelta({}, ())


@dataclass(frozen=True)
class AttemptCounts:
    """How the attempts at one task of one execution have ended so far, counted in the database."""

    started: int = 0
    failed: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Claim:
    """An execution that this worker holds, with the attempt that is open in it.

    `execution` has the context as the open attempt receives it. `attempt` is `None` once nothing is left to run: the
    execution has come to rest, or is no longer this worker's.
    """

    execution: FlowExecution
    attempt: TaskExecution | None
    counts: dict[str, AttemptCounts] = field(default_factory=dict)

    def counts_of(self, task_name: str) -> AttemptCounts:
        """The counts for one task; nothing yet for one that never started."""
        return self.counts.get(task_name, AttemptCounts())

    def at_rest(self, execution: FlowExecution) -> Claim:
        """The claim once nothing is left to run."""
        return replace(self, execution=execution, attempt=None)


@dataclass(frozen=True)
class AttemptEnd:
    """How one attempt ended."""

    status: TaskStatus
    delta: ContextDelta = NO_CHANGE
    failure: Failure | None = None
    error_type: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class NextAttempt:
    """What follows: the next task's first attempt in this claim."""

    task_index: int
    task_name: str
    attempt: int


@dataclass(frozen=True)
class Rest:
    """What follows: the execution leaves RUNNING.

    `wait_seconds` moves `run_at` on; `task_index` is where it stands then.
    """

    status: FlowStatus
    task_index: int
    reason: str | None = None
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """The end of one attempt and what follows it: written in one transaction, or refused as a whole.

    Refused unless the execution is still RUNNING under this `epoch` and at this attempt's step.
    """

    execution_id: int
    epoch: int
    worker: str
    step: int
    end: AttemptEnd
    then: NextAttempt | Rest
    lease_seconds: float
