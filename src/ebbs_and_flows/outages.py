"""Outage: whether a database answers, and when it is to be tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

from ebbs_and_flows.logs import logger
from ebbs_and_flows.persistence.databases import said

WAITS_SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
"""The waits between tries while the database does not answer; the last one repeats."""


class Outage:
    """What is known of a database that may not answer."""

    def __init__(self) -> None:
        self.error: str | None = None
        """What it said last, while it does not answer as it should."""
        self.until = 0.0
        """Before that it is not to be tried again, on `time.monotonic`."""
        self.answered_at = time.monotonic()
        """When it answered last."""
        self._waits = waits_without_end()

    def note(self, error: Exception) -> None:
        """It does not answer, or not as it should."""
        # Spread out, so that all workers do not come back to a server that has just started in the same moment.
        seconds = next(self._waits) * random.uniform(0.75, 1.25)
        self.until = time.monotonic() + seconds
        self.error = said(error)
        logger.warning("the database does not answer as it should, trying again in %.2f s: %s", seconds, self.error)

    def over(self) -> None:
        """It has answered."""
        if self.error is not None:
            logger.info("the database answers again")
            self.error = None
            self._waits = waits_without_end()
        self.answered_at = time.monotonic()


def waits_without_end() -> Iterator[float]:
    """The waits between tries, in seconds."""
    yield from WAITS_SECONDS
    while True:
        yield WAITS_SECONDS[-1]
