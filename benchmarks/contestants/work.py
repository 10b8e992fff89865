"""The work that every contestant does: flows of ten trivial tasks, each of which adds an entry to a small context."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

TASKS = 10
"""In a flow."""

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 120

Entries = dict[str, int]


def first_context(flow: int) -> Entries:
    """Return what the first task of a flow receives."""
    return {"order": flow}


def task_name(step: int) -> str:
    """Return the name of a task, and of the entry that it adds."""
    return f"step_{step}"


def entry(step: int) -> Entries:
    """Return what a task adds: this is its whole body."""
    return {task_name(step): step}


@dataclass(frozen=True)
class Recorded:
    """What a contestant's database says after the work."""

    flows: int
    """That have succeeded."""
    tasks: int
    """That have succeeded, of all flows together."""


class Contestant(Protocol):
    """One way of running flows, on one database, with a number of flows in flight."""

    def prepare(self, flows: int) -> None:
        """Make the tables, and schedule the flows where there is a queue. Not timed."""

    def drain(self) -> float:
        """Run all flows to their end, and return the seconds it took."""

    def recorded(self) -> Recorded:
        """Count in the database what has succeeded."""

    def durability(self) -> dict[str, str]:
        """Ask the database, on a connection of the contestant's own, how durable its commits are."""

    def close(self) -> None:
        """Give the connections back."""


class Progress:
    """When the first flow began, and whether the last one is over: for those that run flows in threads of their own."""

    def __init__(self) -> None:
        self._left = 0
        self._lock = threading.Lock()
        self._began_at: float | None = None
        self._all_over = threading.Event()

    def expect(self, flows: int) -> None:
        """Say, before the first one begins, how many there are."""
        self._left = flows

    def flow_begins(self) -> None:
        """Note the time of the first call."""
        if self._began_at is None:
            with self._lock:
                self._began_at = self._began_at or time.perf_counter()

    def flow_ends(self) -> None:
        """Count a flow whose last task is over; that the flow is over need not be recorded yet."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._all_over.set()

    def seconds(self, are_recorded: Callable[[], bool]) -> float:
        """Wait until all flows are over and recorded, and return the seconds since the first one began."""
        if not self._all_over.wait(PATIENCE_SECONDS):
            raise TimeoutError(f"{self._left} flows have not ended after {PATIENCE_SECONDS} s")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not are_recorded():
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {PATIENCE_SECONDS} s it is not recorded that all flows have ended")
            time.sleep(POLL_SECONDS)
        assert self._began_at is not None
        return time.perf_counter() - self._began_at
