"""RetryPolicy: how often, after what wait, and after which failures a task is tried again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tenacity import RetryCallState, Retrying
from tenacity.wait import wait_base, wait_exponential_jitter

from ebbs_and_flows.errors import InvalidArgumentError

WaitStrategy: TypeAlias = Callable[[RetryCallState], float] | wait_base

MAX_WAIT_SECONDS = 10 * 365 * 24 * 3600.0
"""Ten years: a longer wait is a mistake, and dates past the year 9999 cannot be stored."""


@dataclass(frozen=True)
class RetryPolicy:
    """When a failed attempt is followed by another one without a person's doing.

    Attempts are counted in the database, over crashes, processes and re-runs by hand, from the first. The wait between
    two attempts is spent in the database (`run_at`), not in a process.

    Args:
        max_attempts: how many attempts may end in an exception or a time-out; 1 (the default) means no retry. A re-run
            by hand always grants one attempt more.
        max_crashes: how many attempts may lose their worker (a killed process, a lost machine) before the flow is
            parked as FAILED; default 3. With 0 or 1 the first crash parks it already: a person decides. The loss of a
            transactional task's database connection counts as one.
        wait: a tenacity wait strategy, or any callable that takes a `tenacity.RetryCallState` (its `attempt_number` is
            the number of attempts that have failed) and returns seconds. Default: exponential from 1 s to 60 s, with
            up to 1 s of jitter.
        retry_on: the exceptions that are worth another attempt; default `(Exception,)`.
        give_up_on: exceptions that end the flow at once, even where `retry_on` names them; default none.

    Raises:
        InvalidArgumentError: a bound that is out of range, or an argument of another kind.
    """

    max_attempts: int = 1
    max_crashes: int = 3
    wait: WaitStrategy = wait_exponential_jitter(initial=1, max=60, jitter=1)
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        for field, least in (("max_attempts", 1), ("max_crashes", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgumentError(field, value, f"an int of at least {least}")
        if not callable(self.wait):
            raise InvalidArgumentError("wait", self.wait, "a tenacity wait strategy, for example wait_fixed(10)")
        for field in ("retry_on", "give_up_on"):
            object.__setattr__(self, field, _exception_classes(field, getattr(self, field)))

    def allows_retry(self, exception: BaseException, failed_attempts: int) -> bool:
        """Whether another attempt follows, now that `failed_attempts` have failed, the last one with `exception`."""
        if failed_attempts >= self.max_attempts:
            return False
        return isinstance(exception, self.retry_on) and not isinstance(exception, self.give_up_on)

    def wait_seconds(self, exception: BaseException, failed_attempts: int) -> float:
        """Ask the wait strategy how long to wait before the next attempt.

        Args:
            exception: what the last attempt raised.
            failed_attempts: how many attempts have failed so far, at least 1.

        Returns:
            Seconds, 0 or more.

        Raises:
            ValueError: the strategy returned something that is not a finite number of seconds up to ten years.
        """
        state = RetryCallState(Retrying(), None, (), {})
        state.attempt_number = failed_attempts
        state.set_exception((type(exception), exception, exception.__traceback__))
        seconds = float(self.wait(state))
        if not math.isfinite(seconds) or seconds > MAX_WAIT_SECONDS:
            raise ValueError(f"the wait strategy returned {seconds} seconds")
        return max(seconds, 0.0)


def _exception_classes(field: str, value: object) -> tuple[type[BaseException], ...]:
    classes = value if isinstance(value, tuple) else tuple(value) if isinstance(value, (list, set)) else (value,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise InvalidArgumentError(field, each, "exception classes")
    return classes
