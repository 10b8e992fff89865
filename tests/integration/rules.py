"""The rules that the store has to follow, as a plain model of one execution, and the ends of attempts it is told of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tenacity import wait_fixed, wait_none

from ebbs_and_flows import (
    ExecutionContext,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Task,
)
from ebbs_and_flows.checkpoints import Checkpoint, Claim, Verdict
from ebbs_and_flows.outcomes import Failed, Success
from ebbs_and_flows.verdicts import STOPPED, checkpoint_of, judge, judge_lost, start_over
from tests.integration.invariants import Expected

LEASE_SECONDS = 600.0


class Named(Task):
    """A task that is never run: the test says what came of it."""

    def __init__(self, name: str, retry: RetryPolicy) -> None:
        self.name = name
        self.retry = retry

    def run(self, context: ExecutionContext) -> ExecutionContext:
        raise NotImplementedError


POLICIES = {
    "a": RetryPolicy(max_attempts=2, max_crashes=2, wait=wait_none()),
    "b": RetryPolicy(max_attempts=3, max_crashes=0, wait=wait_fixed(3600)),
    "c": RetryPolicy(),
}
NAMES = tuple(POLICIES)
IS_DUE_AT_ONCE = {"a": True, "b": False}
TEMPLATE = FlowTemplate("abc", [Named(name, policy) for name, policy in POLICIES.items()])
TEMPLATES = {"abc": TEMPLATE}
EXPECTED = Expected(
    max_attempts={name: policy.max_attempts for name, policy in POLICIES.items()},
    max_crashes={name: policy.max_crashes for name, policy in POLICIES.items()},
)


@dataclass
class ModelAttempt:
    """What the row of an attempt has to say."""

    step: int
    index: int
    name: str
    number: int
    status: str = "RUNNING"
    failure: str | None = None


@dataclass
class Model:
    """One execution as it has to be."""

    execution_id: int
    status: FlowStatus
    queue: str
    priority: int
    contexts: list[dict[str, Any]]
    """What the task at each index received; at the current one, what it receives."""
    transitions: list[tuple[int, str | None, str]]
    step: int
    is_due: bool = True
    """Whether its time has come."""
    epoch: int = 0
    index: int = 0
    owner: str | None = None
    is_expired: bool = False
    attempts: list[ModelAttempt] = field(default_factory=list)

    @property
    def context(self) -> dict[str, Any]:
        return self.contexts[self.index]

    @property
    def open(self) -> ModelAttempt | None:
        return self.attempts[-1] if self.attempts and self.attempts[-1].status == "RUNNING" else None

    def reached(self) -> list[str]:
        """The tasks from which it can be re-run."""
        return [*NAMES[: self.index], *{each.name for each in self.attempts if each.index == self.index}]

    def move(self, status: FlowStatus, *, is_due: bool = True) -> None:
        """Take the next step for a transition."""
        self.step += 1
        self.transitions.append((self.step, str(self.status), str(status)))
        self.status = status
        self.owner, self.is_expired = None, False
        if status is FlowStatus.RESCHEDULED:
            self.is_due = is_due

    def run(self, worker: str) -> None:
        """Become RUNNING under a lease of this worker's."""
        self.move(FlowStatus.RUNNING)
        self.epoch += 1
        self.owner = worker

    def start(self) -> None:
        """Take the next step for an attempt at the current task, which renews the lease."""
        self.step += 1
        name = NAMES[self.index]
        number = 1 + sum(each.name == name for each in self.attempts)
        self.attempts.append(ModelAttempt(self.step, self.index, name, number))
        self.is_expired = False

    def end(self, failure: str | None) -> int:
        """End the attempt that is open, if any; how many at its task have ended like this by now."""
        attempt = self.open
        if attempt is None:
            return 0
        attempt.status, attempt.failure = ("SUCCEEDED" if failure is None else "FAILED"), failure
        return sum((each.name, each.failure) == (attempt.name, failure) for each in self.attempts)

    def succeed(self, returned: dict[str, Any], *, goes_on: bool) -> None:
        self.end(None)
        self.index += 1
        self.contexts[self.index :] = [returned]
        if self.index == len(NAMES):
            self.move(FlowStatus.SUCCEEDED)
        elif goes_on:
            self.start()
        else:
            self.move(FlowStatus.RESCHEDULED)

    def fail(self, *, may_retry: bool) -> None:
        name = NAMES[self.index]
        if self.end("EXCEPTION") < POLICIES[name].max_attempts and may_retry:
            self.move(FlowStatus.RESCHEDULED, is_due=IS_DUE_AT_ONCE[name])
        else:
            self.move(FlowStatus.FAILED)

    def lose(self) -> None:
        """Its worker is lost, with the attempt that is open; there is none where a person made it RUNNING."""
        is_open = self.open is not None
        if self.end("LOST") >= POLICIES[NAMES[self.index]].max_crashes and is_open:
            self.move(FlowStatus.FAILED)
        else:
            self.move(FlowStatus.RESCHEDULED)

    def leave(self, status: FlowStatus) -> None:
        """Somebody sets the status, whatever runs."""
        self.end("CANCELLED")
        self.move(status)


@dataclass(frozen=True)
class End:
    """How a worker says that the open attempt of a claim has ended."""

    claim: Claim
    how: str
    returned: dict[str, Any]
    """What the task returned, if it succeeded."""
    goes_on: bool
    """Whether the worker goes on with the next task then, or hands the execution back."""

    def verdict(self) -> Verdict:
        """As the library judges it."""
        attempt = self.claim.attempt
        assert attempt is not None
        task, counts = TEMPLATE.tasks[attempt.task_index], self.claim.counts_of(attempt.name)
        if self.how == "stop":
            return STOPPED
        if self.how in ("lose", "start over"):
            return judge_lost(task, attempt.name, counts, "its process died")
        if self.how == "succeed":
            delta = ExecutionContext(self.returned).delta_from(self.claim.context)
            return judge(task, Success(delta), counts)
        return judge(task, Failed(ValueError("no"), may_retry=self.how == "raise"), counts)

    def checkpoint(self) -> Checkpoint:
        """As the library writes it."""
        if self.how == "start over":
            return start_over(self.claim, "somebody else's fault", LEASE_SECONDS)
        return checkpoint_of(self.claim, TEMPLATE, self.verdict(), LEASE_SECONDS, goes_on=self.goes_on)

    def apply(self, model: Model) -> None:
        """As the rules have it."""
        if self.how == "succeed":
            model.succeed(self.returned, goes_on=self.goes_on)
        elif self.how in ("raise", "give up"):
            model.fail(may_retry=self.how == "raise")
        elif self.how == "lose":
            model.lose()
        else:
            model.end("STOPPED")
            if self.how == "stop":
                model.move(FlowStatus.RESCHEDULED)
            else:
                model.start()


HOW = ("succeed", "raise", "give up", "lose", "stop", "start over")
