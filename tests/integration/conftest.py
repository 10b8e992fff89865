"""Fixtures of tests that run flows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebbs_and_flows import FlowRunner, FlowService, Worker
from tests.integration.flows import Outside
from tests.integration.invariants import check_invariants


@pytest.fixture
def outside() -> Outside:
    """The world outside the flow."""
    return Outside()


@pytest.fixture
def worker(runner: FlowRunner) -> Worker:
    """A worker that looks often, and gives tasks time to end."""
    return Worker(runner, concurrency=8, poll_seconds=0.05, grace_seconds=5)


@pytest.fixture
def sound_history(service: FlowService) -> Iterator[None]:
    """Whatever a test has done: the invariants hold afterwards."""
    yield
    assert check_invariants(service.engine) == []
