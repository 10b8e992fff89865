"""Waiting for what is expected, with a deadline, instead of sleeping to hope."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_SECONDS = 20.0
"""How long a test waits for what it expects before it fails."""


def wait_until(condition: Callable[[], object], what: str = "it", seconds: float = PATIENCE_SECONDS) -> None:
    """Wait for a condition; fail where it does not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not come within {seconds:g} s"
        threading.Event().wait(0.01)
