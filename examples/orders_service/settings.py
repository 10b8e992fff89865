"""What the service is told by its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The service's settings. Each is read from `ORDERS_` and its name in capitals."""

    database_url: str = "sqlite:///orders.db"
    """Where orders, sales and flows are: all in one database, because they commit together."""
    worker: bool = True
    """Whether this process runs the flows, too: `no` where `ebbs worker` does."""
    lease_seconds: float = 30.0
    """How long the flows of a process that was killed wait before another one goes on with them."""
    payments_file: str = "payments.db"
    """The database of the payment provider."""
    payment_failures: int = 2
    """How many calls for a payment fail before one succeeds."""
    payment_seconds: float = 0.0
    """How long the provider takes to answer."""

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings as the environment has them.

        Raises:
            ValueError: a number is none, or `ORDERS_WORKER` is neither `yes` nor `no`.
        """
        worker = os.environ.get("ORDERS_WORKER", "yes")
        if worker not in ("yes", "no"):
            raise ValueError(f"ORDERS_WORKER={worker!r}: expected yes or no")
        return cls(
            database_url=os.environ.get("ORDERS_DATABASE_URL", cls.database_url),
            worker=worker == "yes",
            lease_seconds=float(os.environ.get("ORDERS_LEASE_SECONDS", cls.lease_seconds)),
            payments_file=os.environ.get("ORDERS_PAYMENTS_FILE", cls.payments_file),
            payment_failures=int(os.environ.get("ORDERS_PAYMENT_FAILURES", cls.payment_failures)),
            payment_seconds=float(os.environ.get("ORDERS_PAYMENT_SECONDS", cls.payment_seconds)),
        )
