"""What callers may pass: each argument is checked here, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import InvalidArgumentError, UnknownExecutionError
from ebbs_and_flows.executions import RUNNABLE_STATUSES, FlowFilter, FlowStatus
from ebbs_and_flows.names import valid_name
from ebbs_and_flows.retries import MAX_WAIT_SECONDS
from ebbs_and_flows.texts import MAX_OUTPUT_LENGTH, bounded

MAX_ID = 2**63 - 1
MAX_PRIORITY = 2**31 - 1


def runnable_status(status: FlowStatus) -> FlowStatus:
    """The status, if an execution can be claimed from it; `InvalidArgumentError` otherwise."""
    valid = valid_status(status)
    if valid not in RUNNABLE_STATUSES:
        raise InvalidArgumentError("status", status, "FlowStatus.SCHEDULED or FlowStatus.RESCHEDULED")
    return valid


def as_context(context: ExecutionContext | Mapping[str, Any]) -> ExecutionContext:
    """A context as it is, or made of a mapping."""
    if isinstance(context, ExecutionContext):
        return context
    if isinstance(context, Mapping):
        return ExecutionContext(context)
    raise InvalidArgumentError("context", context, "an ExecutionContext")


def valid_status(status: FlowStatus) -> FlowStatus:
    """A status, or the name of one."""
    try:
        return FlowStatus(status)
    except ValueError:
        raise InvalidArgumentError("status", status, f"one of {[str(each) for each in FlowStatus]}") from None


def valid_id(execution_id: int) -> int:
    """A number that can be the id of an execution; `UnknownExecutionError` otherwise."""
    if isinstance(execution_id, bool) or not isinstance(execution_id, int) or not 0 < execution_id <= MAX_ID:
        raise UnknownExecutionError(execution_id)
    return execution_id


def valid_priority(priority: int) -> int:
    """A 32-bit int."""
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise InvalidArgumentError("priority", priority, f"an int from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    return priority


def valid_run_at(run_at: datetime | None, delay: timedelta | float | None) -> datetime | None:
    """An aware datetime, in UTC; not together with a delay."""
    if run_at is None:
        return None
    if delay is not None:
        raise InvalidArgumentError("delay", delay, "either run_at or delay, not both")
    if not _is_aware(run_at):
        raise InvalidArgumentError("run_at", run_at, "an aware datetime, for example datetime.now(timezone.utc)")
    if not 1970 <= run_at.year <= 9000:
        raise InvalidArgumentError("run_at", run_at, "a year from 1970 to 9000")
    return run_at.astimezone(timezone.utc)


def valid_delay(delay: timedelta | float | None) -> float:
    """A delay in seconds, from none to ten years."""
    if delay is None:
        return 0.0
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else delay
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise InvalidArgumentError("delay", delay, "a timedelta or a number of seconds")
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise InvalidArgumentError("delay", delay, "a delay from none to ten years")
    return float(seconds)


def valid_lease_seconds(lease_seconds: float) -> float:
    """A lease of more than nothing and at most ten years."""
    if (
        isinstance(lease_seconds, bool)
        or not isinstance(lease_seconds, (int, float))
        or not 0 < lease_seconds <= MAX_WAIT_SECONDS
    ):
        raise InvalidArgumentError("lease_seconds", lease_seconds, "a positive number of seconds, at most ten years")
    return float(lease_seconds)


def valid_seconds(argument: str, seconds: float, least: float = 0.001) -> float:
    """A number of seconds, from `least` to ten years."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not least <= seconds <= MAX_WAIT_SECONDS:
        raise InvalidArgumentError(argument, seconds, f"a number of seconds from {least:g} to ten years")
    return float(seconds)


def valid_reason(reason: str | None) -> str | None:
    """A free text, or none."""
    if reason is None:
        return None
    if not isinstance(reason, str) or bounded(reason) != reason:
        expected = f"a str of at most {MAX_OUTPUT_LENGTH:,} characters, without NUL and lone surrogates"
        raise InvalidArgumentError("reason", reason, expected)
    return str.__str__(reason)


def valid_filter(criteria: FlowFilter) -> FlowFilter:
    """A filter with a limit from 1 to 10,000 and aware times."""
    if not isinstance(criteria, FlowFilter):
        raise InvalidArgumentError("criteria", criteria, "a FlowFilter")
    if criteria.limit < 1 or criteria.limit > 10_000:
        raise InvalidArgumentError("limit", criteria.limit, "a limit from 1 to 10,000")
    if criteria.before_id is not None and not 0 < criteria.before_id <= MAX_ID:
        raise InvalidArgumentError("before_id", criteria.before_id, "the id of an execution")
    for name in ("created_after", "created_before"):
        moment = getattr(criteria, name)
        if moment is not None and not _is_aware(moment):
            raise InvalidArgumentError(name, moment, "an aware datetime")
    for name in ("template_name", "queue", "idempotency_key"):
        wanted = getattr(criteria, name)
        if wanted is not None:
            criteria = criteria.model_copy(update={name: valid_name(name.replace("_", " "), wanted)})
    return criteria


def connection_of(session: Session | Connection | None) -> Connection | None:
    """The connection whose transaction the caller wants to share."""
    if session is None:
        return None
    if isinstance(session, Session):
        try:
            connection = session.connection()
        except InvalidRequestError as error:
            raise InvalidArgumentError("session", session, f"a session in a sound transaction: {error}") from error
    elif isinstance(session, Connection):
        if session.closed:
            raise InvalidArgumentError("session", session, "a connection that is open")
        connection = session
    else:
        hint = ""
        if hasattr(session, "run_sync"):
            hint = "; from asyncio: await session.run_sync(lambda sync: runner.schedule_flow(..., session=sync))"
        raise InvalidArgumentError("session", session, f"a sqlalchemy.orm.Session or sqlalchemy.Connection{hint}")
    if _commits_each_statement(connection):
        raise InvalidArgumentError("session", session, "a transaction; at AUTOCOMMIT there is none to join")
    return connection


def _commits_each_statement(connection: Connection) -> bool:
    """Whether it is at AUTOCOMMIT, by the driver's own account: its engine may have been made so."""
    pooled = connection.connection
    if getattr(pooled.driver_connection, "autocommit", None) is True:  # from Python 3.12 on SQLite's driver has it, too
        return True
    if pooled.dbapi_connection is None or not connection.dialect.detect_autocommit_setting(pooled.dbapi_connection):
        return False
    # SQLite's driver says the same where a host begins its transactions itself; then there is one by now.
    return not getattr(pooled.driver_connection, "in_transaction", False)


def way_out(status: FlowStatus) -> str:
    """What can be done with an execution in this status, for messages."""
    if status.is_final:
        return f"{status} is final; schedule a new execution"
    return f"from {status} it can become {', '.join(sorted(each for each in FlowStatus if status.allows(each)))}"


def _is_aware(moment: datetime) -> bool:
    try:
        return isinstance(moment, datetime) and moment.utcoffset() is not None
    except Exception:  # a tzinfo is code of somebody's class
        return False


def valid_contexts(contexts: object) -> Iterable[Any]:
    """The contexts of many executions, which may be given by a generator; none is looked at here.

    Raises:
        InvalidArgumentError: not an iterable, or a single context.
    """
    if isinstance(contexts, (Mapping, str)) or not isinstance(contexts, Iterable):
        raise InvalidArgumentError("contexts", contexts, "an iterable of contexts")
    return contexts
