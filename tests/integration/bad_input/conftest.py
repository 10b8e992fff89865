"""Bad input has three answers only: refused at the call, a failed attempt with a record, or kept exactly.

(A) *Refused*: the call raises an `EbbsError` that is also the built-in error a caller expects, and writes nothing.
(B) *Failed*: the attempt ends with a record that says what was found, what went before it is intact, and a re-run with
    a mended task succeeds. What cannot be recorded is not tried again; what a task raises is, as its policy says.
(C) *Kept*: what comes back is what was put in, type and value.

After each of them nothing is left RUNNING, and the invariants hold.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from sqlalchemy import text

from ebbs_and_flows import (
    FlowService,
)
from tests.integration.invariants import check_invariants


@pytest.fixture(autouse=True)
def _nothing_is_left_running(database_url: str, service: FlowService) -> Iterator[None]:
    yield
    with service.engine.connect() as connection:
        running = connection.execute(
            text("SELECT count(*) FROM ebbs_flow_executions WHERE status = 'RUNNING'")
        ).scalar()
    assert running == 0
    assert check_invariants(database_url) == []


@pytest.fixture(autouse=True)
def _interrupts_work_as_before() -> Iterator[None]:
    """A task that spoils the handler of the process fails its own test, not all those after it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    try:
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        with suppress(Exception):  # the handler that was there, where it cannot even be shown
            signal.signal(signal.SIGINT, handler)


@pytest.fixture
def default_interrupts(_interrupts_work_as_before: None) -> Iterator[None]:
    """Ctrl-C as a program has it; a test runner may ignore it in its workers."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what a value has open, after the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def effects(service: FlowService) -> Callable[[], list[int]]:
    """A table beside the library's own; called, it gives what is in it."""
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (n INTEGER PRIMARY KEY)"))

    def read() -> list[int]:
        with service.engine.connect() as connection:
            return list(connection.execute(text("SELECT n FROM effects ORDER BY n")).scalars())

    return read
