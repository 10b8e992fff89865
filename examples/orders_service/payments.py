"""A payment provider in miniature: somebody else's system, with a database of its own, that does not always answer.

It keeps its promise by the idempotency key: whatever is called how often, each key is charged once.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager


class PaymentUnavailableError(Exception):
    """The provider did not answer. Whether the money has moved is unknown: ask again with the same key."""


class PaymentRefusedError(Exception):
    """The provider says no, and will say so again."""


class PaymentProvider:
    """Charges and gives back.

    Args:
        file: its database.
        failures: how many calls for a key fail before one succeeds: the first as if the line was down, all others after
            the money has moved, as if the answer was lost.
        seconds: how long an answer takes.
    """

    def __init__(self, file: str, *, failures: int = 0, seconds: float = 0.0) -> None:
        self.file = file
        self.failures = failures
        self.seconds = seconds

    def charge(self, key: str, amount_cents: int) -> str:
        """Charge an amount, once for each key, and return the receipt.

        Raises:
            PaymentUnavailableError: no answer.
            PaymentRefusedError: the key was given back already.
        """
        with self._transaction() as database:
            (call,) = database.execute(
                "INSERT INTO calls VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET number = number + 1 RETURNING number",
                [key],
            ).fetchone()
            is_voided = database.execute("SELECT 1 FROM payments WHERE key = ? AND voided", [key]).fetchone()
            is_reached = call > 1 or self.failures == 0
            if is_reached and not is_voided:
                database.execute("INSERT OR IGNORE INTO payments VALUES (?, ?, 0)", [key, amount_cents])
        if is_voided:
            raise PaymentRefusedError(f"{key} was given back")
        time.sleep(self.seconds)
        if call <= self.failures:
            raise PaymentUnavailableError("the answer was lost" if is_reached else "the line is down")
        return f"receipt for {key}"

    def void(self, key: str) -> None:
        """Give back what was charged under a key, and charge nothing under it from now on; safe to repeat."""
        with self._transaction() as database:
            database.execute("INSERT INTO payments VALUES (?, 0, 1) ON CONFLICT (key) DO UPDATE SET voided = 1", [key])

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.file, timeout=30, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, number INTEGER)")
            database.execute("CREATE TABLE IF NOT EXISTS payments (key TEXT PRIMARY KEY, cents INTEGER, voided BOOL)")
            yield database
            database.execute("COMMIT")
