"""Log records that say which attempt they are about, as fields for structured logging and in their text."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Mapping
from typing import Any

from ebbs_and_flows.checkpoints import Claim, Verdict
from ebbs_and_flows.executions import Failure

logger = logging.getLogger("ebbs_and_flows")
"""The one logger of this library."""

FIELDS = ("execution_id", "template", "task", "attempt")
"""What every record about an attempt carries."""

ABOUT: contextvars.ContextVar[Claim | Mapping[str, Any] | None] = contextvars.ContextVar("ebbs_about", default=None)
"""The claim with the attempt whose task runs in this thread or coroutine; or its fields, from another process."""


class AttemptLogFilter(logging.Filter):
    """Gives every record the fields `execution_id`, `template`, `task` and `attempt`.

    Put on a handler, it adds them to whatever is logged while a task runs, also by the task's own code and by other
    libraries; to records from elsewhere it adds None, so that a format string may name them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields that the record does not have yet; it always passes."""
        running = ABOUT.get() or {}
        fields = about(running) if isinstance(running, Claim) else running
        for field in FIELDS:
            if not hasattr(record, field):
                setattr(record, field, fields.get(field))
        return True


def about(claim: Claim) -> dict[str, Any]:
    """The fields of a claim's open attempt."""
    execution, attempt = claim.execution, claim.attempt
    return {
        "execution_id": execution.execution_id,
        "template": execution.template_name,
        "task": attempt.name if attempt is not None else None,
        "attempt": attempt.attempt if attempt is not None else None,
    }


def log_verdict(claim: Claim, verdict: Verdict) -> None:
    """Log how the open attempt of a claim has ended."""
    if verdict.succeeded:
        log_claim(claim, "succeeded")
    elif verdict.end.failure is Failure.STOPPED:
        log_claim(claim, "stopped: %s", verdict.reason or "without blame", level=logging.INFO)
    else:
        log_claim(claim, "failed with %s", verdict.reason or verdict.end.error_type, level=logging.WARNING)


def log_claim(claim: Claim, message: str, *values: object, level: int = logging.DEBUG) -> None:
    """Log what became of an attempt, with its execution, task and number as fields of the record."""
    if not logger.isEnabledFor(level):
        return
    fields = about(claim)
    logger.log(
        level,
        "execution %s of %s, task %s, attempt %s: " + message,  # noqa: G003  # the beginning all records share
        *fields.values(),
        *values,
        extra=fields,
    )
