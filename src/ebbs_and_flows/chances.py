"""LastChances: executions that one more lost worker would park are held by a worker without any other beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from ebbs_and_flows.checkpoints import Verdict
from ebbs_and_flows.lanes import Run
from ebbs_and_flows.verdicts import STOPPED


class LastChances:
    """Sees to it that nobody is parked for a crash of another one's.

    All that a process holds when it dies is lost, and nothing says which of it was to blame. So the losses of one that
    crashes its worker time and again are also those of its neighbours. Before the last one that a task may lose, its
    execution is handed back, and claimed again once the worker holds nothing else.

    Args:
        patience_seconds: how long it waits for the others to end, and how long nothing is claimed beside it: what
            crashes its worker does so soon, as a rule.
    """

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._waiting: deque[int] = deque()
        self._waiting_since = 0.0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def hand_back(self, run: Run, now: float) -> Verdict:
        """Note an execution that is to be held by itself, and give the verdict that hands it back unstarted until then;
        somebody else may take it after `patience_seconds`, should this process die.
        """
        if not self._waiting:
            self._waiting_since = now
        self._waiting.append(run.execution_id)
        why = f"one more lost worker would park task {run.name!r}, so it is to be held without any other"
        return Verdict(STOPPED.end._replace(output=f"Not started: {why}."), why, self._patience_seconds)

    def keep_others_out(self, runs: Collection[Run], now: float) -> bool:
        """Whether nothing is to be claimed now."""
        if self._waiting and runs and now < self._waiting_since + self._patience_seconds:
            return True
        return any(
            run.is_last_chance and (run.began is None or now < run.began + self._patience_seconds) for run in runs
        )

    def next(self, now: float) -> int:
        """The id of the execution that is to be claimed by itself now."""
        self._waiting_since = now
        return self._waiting.popleft()


def is_last_chance(run: Run) -> bool:
    """Whether an execution would be parked if its worker were lost once more."""
    if not run.claim.counts:
        return False
    lost = run.claim.counts_of(run.name).lost
    return lost > 0 and lost + 1 >= run.task.retry.max_crashes
