"""What a worker says of itself, and what it has in flight: plain records for health checks and live views."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerHealth(_Record):
    """How a worker of this process is. Counts are since it started."""

    worker: str
    """Its name: host, process and a random part; the `lease_owner` of what it holds."""
    is_running: bool
    is_stopping: bool
    """Whether it was asked to stop and is finishing or handing back what it holds."""
    is_healthy: bool
    """Whether it runs, its loop has turned and its database has answered within one lease."""
    started_at: datetime | None
    """By this machine's clock, aware UTC."""
    concurrency: int
    in_flight: int
    """Executions that it holds now."""
    queues: tuple[str, ...]
    claimed: int
    """Executions that it has taken up, each time one was."""
    succeeded: int
    """Executions that came to rest as SUCCEEDED."""
    failed: int
    """Executions that came to rest as FAILED."""
    rescheduled: int
    """Executions that it has left as RESCHEDULED: for a retry, or handed back."""
    refused: int
    """Checkpoints that were refused because the execution was cancelled or lost meanwhile."""
    recovered: int
    """Executions of lost workers, found with an expired lease, that it has rescheduled or parked."""
    attempts: int
    """Attempts whose end it has recorded."""
    seconds_since_turn: float | None
    """Since its loop turned last."""
    seconds_since_database: float | None
    """Since its database answered last."""
    outage: str | None
    """What the database said last, while it does not answer as it should."""
    pool: str
    """The state of the engine's pool of connections, in SQLAlchemy's words."""


class InFlight(_Record):
    """One attempt that a worker has in flight."""

    execution_id: int
    template_name: str
    task: str
    attempt: int
    seconds: float | None
    """For how long its body has been running; `None` while it waits for a place."""
    is_asked_to_stop: bool
