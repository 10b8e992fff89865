"""Retry policies: bounds, waits, and what is worth another attempt."""

from __future__ import annotations

from typing import Any

import pytest
from tenacity import wait_chain, wait_fixed, wait_incrementing

from ebbs_and_flows import InvalidArgumentError, RetryPolicy


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 1.5},
        {"max_attempts": True},
        {"max_crashes": -1},
        {"max_crashes": None},
        {"wait": 3},
        {"retry_on": (3,)},
        {"retry_on": "ValueError"},
        {"give_up_on": (int,)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        RetryPolicy(**arguments)


def test_one_exception_class_need_not_be_a_tuple() -> None:
    assert RetryPolicy(retry_on=OSError).retry_on == (OSError,)  # type: ignore[arg-type]  # a kindness at run time
    assert RetryPolicy(give_up_on=[OSError, ValueError]).give_up_on == (OSError, ValueError)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        (wait_fixed(3), [3, 3, 3]),
        (wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (wait_chain(wait_fixed(1), wait_fixed(7)), [1, 7, 7]),
        (lambda state: 2 * state.attempt_number, [2, 4, 6]),
        (lambda state: 5 if isinstance(state.outcome.exception(), OSError) else 1, [5, 5, 5]),
        (lambda state: -1, [0, 0, 0]),
    ],
)
def test_tenacity_strategies_see_the_number_of_failures_and_the_exception(wait: Any, seconds: list[float]) -> None:
    policy = RetryPolicy(max_attempts=9, wait=wait)
    assert [policy.wait_seconds(OSError("down"), failed) for failed in (1, 2, 3)] == seconds


def test_the_default_wait_grows_and_is_bounded() -> None:
    waits = [RetryPolicy().wait_seconds(OSError(), failed) for failed in range(1, 12)]
    assert 1 <= waits[0] <= 2
    assert waits[-1] <= 60
    assert max(waits) > 30


@pytest.mark.parametrize("returned", [float("nan"), float("inf"), 1e12, "soon", None])
def test_a_wait_that_is_no_number_of_seconds_is_an_error(returned: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        RetryPolicy(wait=lambda state: returned).wait_seconds(OSError(), 1)
