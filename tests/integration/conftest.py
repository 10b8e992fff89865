"""Fixtures of tests that run flows."""

from __future__ import annotations

import pytest

from tests.integration.flows import Outside


@pytest.fixture
def outside() -> Outside:
    """The world outside the flow."""
    return Outside()
