"""Asking a running task to stop: nothing can stop a thread from outside, so a long task asks now and then."""

from __future__ import annotations

import contextvars
import threading

from ebbs_and_flows.errors import StopRequestedError

NO_LONGER_HELD = "its execution was cancelled, or is no longer held by this worker"
WORKER_STOPS = "its worker is stopping"
PAST_LIMIT = "it is past its time limit"


_MAKING_EVENT = threading.Lock()


class StopSignal:
    """Set once, from any thread, when the attempt that it belongs to is to stop."""

    __slots__ = ("_event", "_is_set", "_why")

    def __init__(self) -> None:
        self._event: threading.Event | None = None  # made for the first who waits: hardly any attempt does
        self._is_set = False
        self._why = ""

    def set(self, why: str) -> None:
        """Ask the attempt to stop; the first reason stays."""
        if not self._is_set:
            self._why = why
            self._is_set = True
            event = self._event
            if event is not None:
                event.set()

    @property
    def is_set(self) -> bool:
        """Whether the attempt was asked to stop."""
        return self._is_set

    @property
    def why(self) -> str:
        """What asked it to."""
        return self._why

    def wait(self, seconds: float) -> bool:
        """Wait until it is set, for at most so long; whether it is."""
        with _MAKING_EVENT:
            event = self._event = self._event or threading.Event()
        if self._is_set:  # maybe before the event was there to be set
            event.set()
        return event.wait(seconds)


SIGNAL: contextvars.ContextVar[StopSignal | None] = contextvars.ContextVar("ebbs_stop_signal", default=None)
"""The signal of the attempt whose task runs in this thread or coroutine."""


def stop_requested() -> bool:
    """Whether the task that calls this is asked to stop: its execution was cancelled or its lease lost, it is past its
    time limit, or its worker is stopping.

    For loops in long tasks: `while work and not stop_requested(): ...`. What a task returns or raises after that is
    recorded if its execution is still its worker's (a worker that is stopping waits for it, for its grace period), and
    refused otherwise. Works in threads, also in those that a task starts with a copy of its context
    (`contextvars.copy_context`), and in coroutines. False outside of tasks, and in an executor's other processes.
    """
    signal = SIGNAL.get()
    return signal is not None and signal.is_set


def raise_if_stop_requested() -> None:
    """Raise `StopRequestedError` if the task that calls this is asked to stop, else do nothing.

    Where it is a worker that is stopping, the attempt then counts as stopped, not as failed: the execution is handed
    back and goes on at the same task elsewhere.

    Raises:
        StopRequestedError: the task is to stop.
    """
    signal = SIGNAL.get()
    if signal is not None and signal.is_set:
        raise StopRequestedError(signal.why)


def wait_for_stop(seconds: float) -> bool:
    """Sleep for so many seconds, but not longer than until the task that calls this is asked to stop.

    Instead of `time.sleep` in a task that polls or waits.

    Returns:
        Whether it is asked to stop.
    """
    signal = SIGNAL.get()
    if signal is None:
        threading.Event().wait(seconds)
        return False
    return signal.wait(seconds)
