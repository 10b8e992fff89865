"""Diagnosis: what stands in the way of flows in one database, and the way out of it. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError, DBAPIError, SQLAlchemyError

from ebbs_and_flows import schema as database_schema
from ebbs_and_flows.errors import DatabaseUrlError, SchemaError
from ebbs_and_flows.persistence.inspection import Inspection, Left, OpenTransaction
from ebbs_and_flows.service import FlowService
from ebbs_and_flows.texts import one_line

OWN_CONNECTIONS = 3
"""What a worker on PostgreSQL takes of its engine's pool by itself: to write, to renew leases, to listen."""

LONGEST_TEXT = 300
"""Characters of a message of the database's or of a list of names."""

DAY_SECONDS = 24 * 60 * 60.0


class Verdict(str, Enum):
    """What a finding means."""

    OK = "ok"
    """Nothing to do."""

    WARNING = "warning"
    """Flows go on, but somebody should have a look."""

    PROBLEM = "problem"
    """Flows do not go on as they should before somebody has done something."""

    __str__ = str.__str__


class Finding(BaseModel):
    """What one check has found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    """What was looked at, in a word or two; the same words in every release."""
    verdict: Verdict
    found: str
    """In one line of printable characters; long lists are cut."""
    advice: str | None = None
    """The way out; `None` where there is nothing to do."""


class Limits(BaseModel):
    """From when on something is worth a word. The defaults suit leases of half a minute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clock_seconds: float = 1.0
    """By how much the clocks of this machine and the database may differ."""
    unattended_seconds: float = 60.0
    """How long an expired lease or a due execution may wait to be taken."""
    idle_in_transaction_seconds: float = 60.0
    long_transaction_seconds: float = 300.0


def diagnose(
    service: FlowService, *, limits: Limits | None = None, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Look for what stands in the way of flows: one finding a check, in the order of what depends on what.

    Where the database does not answer or has no schema that this release can work on, that is all there is to say.
    It raises nothing that the database says: a check that cannot be made is a finding as well.

    Args:
        service: whose database is looked at; its pool of connections is judged, too.
        limits: from when on something is worth a word; default as they are in `Limits`.
        clock: this machine's, in seconds since 1970; for tests.
    """
    limits = limits or Limits()
    findings = reach(service.engine, service.schema)
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        return findings
    findings += _made("clock", lambda: _clock(service, clock, limits))
    findings += _made("expired leases", lambda: _expired_leases(service, limits))
    findings += _made("due executions", lambda: _due_executions(service, limits))
    findings += _made("failed executions", lambda: _failed_executions(service))
    findings += _made("retries", lambda: _retries(service))
    findings += _made("connection pool", lambda: _connection_pool(service))
    if service.has_one_writer:
        findings += _made("journal", lambda: _journal(service))
        findings += _made("durability", lambda: _durability(service))
        findings += _made("writing", lambda: _writing(service))
        findings += _made("integrity", lambda: _integrity(service))
        findings += _made("size", lambda: _size(service))
    else:
        findings += _made("server connections", lambda: _server_connections(service))
        findings += _made("idle in transaction", lambda: _idle_in_transaction(service, limits))
        findings += _made("long transactions", lambda: _long_transactions(service, limits))
    return findings


def reach(engine: Engine, schema: str | None = None) -> list[Finding]:
    """The first two findings, which need no service: whether the database answers, and has the schema."""
    began = time.perf_counter()
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
            took_ms = (time.perf_counter() - began) * 1000
            version = ".".join(map(str, connection.dialect.server_version_info or ()))
        revision = database_schema.current(engine, schema=schema)
    except SQLAlchemyError as error:
        return [unreachable(error)]
    name = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}.get(engine.dialect.name, engine.dialect.name)
    database = Finding(check="database", verdict=Verdict.OK, found=f"{name} {version} answers in {took_ms:.1f} ms")
    try:
        database_schema.check(engine, schema=schema)
    except SchemaError as error:
        return [database, schema_problem(error)]
    except SQLAlchemyError as error:
        return [unreachable(error)]
    needed = database_schema.REVISION
    found = f"at {revision}, as this release needs" if revision == needed else f"at {revision}, newer than {needed}"
    return [database, Finding(check="schema", verdict=Verdict.OK, found=found)]


def unreachable(error: Exception) -> Finding:
    """The finding that the database does not answer."""
    return Finding(
        check="database",
        verdict=Verdict.PROBLEM,
        found=f"does not answer: {_said(error)}",
        advice="check the URL, the network, and that the server runs; workers wait for it and go on by themselves",
    )


def schema_problem(error: SchemaError) -> Finding:
    """The finding that the schema is missing or behind."""
    found, _, advice = str(error).rstrip(".").rpartition(": ")
    return Finding(check="schema", verdict=Verdict.PROBLEM, found=found, advice=advice)


def _made(check: str, make: Callable[[], Finding]) -> list[Finding]:
    """The check's finding; that it could not be made where the database refused it."""
    try:
        return [make()]
    except SQLAlchemyError as error:
        return [Finding(check=check, verdict=Verdict.PROBLEM, found=f"cannot be looked at: {_said(error)}")]


# --- executions -------------------------------------------------------------------------------------------------------


def _expired_leases(service: FlowService, limits: Limits) -> Finding:
    with service.inspected() as inspection:
        left = inspection.expired()
    if not left:
        return Finding(check="expired leases", verdict=Verdict.OK, found="no RUNNING execution was left by its worker")
    seconds = left[0].seconds
    is_old = seconds > limits.unattended_seconds
    number = sum(each.number for each in left)
    templates = list(dict.fromkeys(each.template_name for each in left))
    return Finding(
        check="expired leases",
        verdict=Verdict.PROBLEM if is_old else Verdict.WARNING,
        found=f"{number} RUNNING {_executions(number)} under a lease that has expired, the oldest "
        f"{_span(seconds)} ago: {_groups(left)}",
        advice=f"no worker that knows {_names(templates)} is running: start one, and it takes them over by itself"
        if is_old
        else "any running worker that knows the template takes them over within seconds: look again",
    )


def _due_executions(service: FlowService, limits: Limits) -> Finding:
    with service.inspected() as inspection:
        left = inspection.due()
        busy = inspection.queues_at_work()
    if not left:
        return Finding(check="due executions", verdict=Verdict.OK, found="none waits for a worker")
    number = sum(each.number for each in left)
    seconds = left[0].seconds
    found = f"{number} {_wait(number)} for a worker, the oldest for {_span(seconds)}: {_groups(left)}"
    late = [each for each in left if each.seconds > limits.unattended_seconds]
    if not late:
        return Finding(check="due executions", verdict=Verdict.OK, found=found)
    nobody = [each for each in late if each.queue not in busy]
    if nobody:
        queues = list(dict.fromkeys(each.queue for each in nobody))
        templates = list(dict.fromkeys(each.template_name for each in nobody))
        return Finding(
            check="due executions",
            verdict=Verdict.PROBLEM,
            found=found,
            advice=f"nothing of queue {_names(queues)} is running: start a worker that takes from it (--queue) and "
            f"knows {_names(templates)}",
        )
    return Finding(
        check="due executions",
        verdict=Verdict.WARNING,
        found=found,
        advice="the workers of these queues are busy, or do not know these templates: start more, raise their "
        "concurrency, or deploy the templates",
    )


def _failed_executions(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        failed = inspection.failed(DAY_SECONDS)
    if not failed:
        return Finding(check="failed executions", verdict=Verdict.OK, found="none in the last 24 hours")
    each = ", ".join(f"{name} {number}" for name, number in failed.items())
    return Finding(
        check="failed executions",
        verdict=Verdict.WARNING,
        found=f"{sum(failed.values())} in the last 24 hours: {one_line(each, LONGEST_TEXT)}",
        advice='they rest until somebody re-runs them: "ebbs runs list --status FAILED" says why, and how',
    )


def _retries(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        number, seconds = inspection.retries()
    found = "no RESCHEDULED execution waits for its time"
    if seconds is not None:
        found = f"{number} RESCHEDULED {_executions(number)} {_wait(number)}, the next one is due in {_span(seconds)}"
    return Finding(check="retries", verdict=Verdict.OK, found=found)


# --- clock and connections --------------------------------------------------------------------------------------------


def _clock(service: FlowService, clock: Callable[[], float], limits: Limits) -> Finding:
    ahead, unsure = min((_measured(service, clock) for _ in range(3)), key=lambda measured: measured[1])
    if abs(ahead) - unsure <= limits.clock_seconds:
        return Finding(check="clock", verdict=Verdict.OK, found="this machine and the database agree")
    return Finding(
        check="clock",
        verdict=Verdict.WARNING,
        found=f"this machine is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the database",
        advice="no effect on flows, which go by the database's clock alone, only on how long ago times are shown to "
        "be; let both machines synchronise their clocks (NTP)",
    )


def _measured(service: FlowService, clock: Callable[[], float]) -> tuple[float, float]:
    """How far this machine's clock is ahead of the database's, and by how much that may be wrong: in seconds."""
    with service.inspected() as inspection:
        inspection.now()  # whatever has to be set up has been by the next one
        before = clock()
        now = inspection.now().timestamp()
        after = clock()
    return (before + after) / 2 - now, (after - before) / 2


def _connection_pool(service: FlowService) -> Finding:
    try:
        capacity = service.connections
    except DatabaseUrlError as error:
        return Finding(check="connection pool", verdict=Verdict.WARNING, found=f"a worker cannot use it: {error}")
    if capacity is None:
        return Finding(check="connection pool", verdict=Verdict.OK, found="without bound")
    found = f"up to {capacity} {'connection' if capacity == 1 else 'connections'} for each process"
    if service.has_one_writer:
        return Finding(check="connection pool", verdict=Verdict.OK, found=found)
    found += f"; a worker takes {OWN_CONNECTIONS}, and 1 more for each transactional task that runs"
    if capacity > OWN_CONNECTIONS:
        return Finding(check="connection pool", verdict=Verdict.OK, found=found)
    return Finding(
        check="connection pool",
        verdict=Verdict.WARNING,
        found=found,
        advice=f"make the engine with pool_size + max_overflow of at least {OWN_CONNECTIONS + 1}",
    )


def _server_connections(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        used, most = inspection.server_connections()
    try:
        wanted = service.connections
    except DatabaseUrlError:
        wanted = 1  # shared by all threads
    return judge_server_connections(used, most, wanted or OWN_CONNECTIONS + 1)


def judge_server_connections(used: int, most: int, wanted: int) -> Finding:
    """The finding about a server that has `used` of `most` connections, where a process takes up to `wanted`."""
    free = most - used
    found = f"{used} of {most} are in use"
    if free >= wanted and used < 0.8 * most:
        return Finding(check="server connections", verdict=Verdict.OK, found=found)
    return Finding(
        check="server connections",
        verdict=Verdict.PROBLEM if free <= OWN_CONNECTIONS else Verdict.WARNING,
        found=f"{found}; one more process with this pool takes up to {wanted}",
        advice="lower pool_size and max_overflow of the engines, raise max_connections of the server, or put a pooler "
        "in front of it",
    )


def _idle_in_transaction(service: FlowService, limits: Limits) -> Finding:
    with service.inspected() as inspection:
        idle = inspection.idle_in_transaction(limits.idle_in_transaction_seconds)
        seen = _seen(inspection)
    if not idle:
        found = f"no session holds locks on the tables and does nothing{seen}"
        return Finding(check="idle in transaction", verdict=Verdict.OK, found=found)
    return Finding(
        check="idle in transaction",
        verdict=Verdict.WARNING,
        found=f"holding locks on the tables: {_sessions(idle)}{seen}",
        advice="their executions cannot go on, nor can an upgrade: end the session's program, or the session with "
        f"SELECT pg_terminate_backend({idle[0].pid}); a transactional task should not wait for others",
    )


def _long_transactions(service: FlowService, limits: Limits) -> Finding:
    with service.inspected() as inspection:
        open_long = inspection.long_transactions(limits.long_transaction_seconds)
        seen = _seen(inspection)
    if not open_long:
        found = f"none is older than {_span(limits.long_transaction_seconds)}{seen}"
        return Finding(check="long transactions", verdict=Verdict.OK, found=found)
    return Finding(
        check="long transactions",
        verdict=Verdict.WARNING,
        found=f"{_sessions(open_long)}{seen}",
        advice="while one is open, what flows have overwritten since cannot be cleared away (VACUUM), and every step "
        "becomes slower: let long reports run elsewhere, or in several transactions",
    )


def _seen(inspection: Inspection) -> str:
    return "" if inspection.sees_all_sessions() else " (only this role's own sessions can be seen: grant pg_monitor)"


# --- SQLite -----------------------------------------------------------------------------------------------------------


def _journal(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        mode = str(inspection.pragma("journal_mode"))
        is_in_memory = not inspection.file()
    if mode == "wal" or is_in_memory:
        return Finding(check="journal", verdict=Verdict.OK, found=f"journal_mode is {mode.upper()}")
    return Finding(
        check="journal",
        verdict=Verdict.WARNING,
        found=f"journal_mode is {mode.upper()}: readers and the writer wait for each other",
        advice='open it once by its URL, which FlowService switches to WAL, or run "PRAGMA journal_mode=WAL" while '
        "nobody else uses it",
    )


def _durability(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        level = int(inspection.pragma("synchronous"))
        is_in_memory = not inspection.file()
    name = {0: "OFF", 1: "NORMAL", 2: "FULL", 3: "EXTRA"}.get(level, str(level))
    if level >= 2 or is_in_memory:
        return Finding(check="durability", verdict=Verdict.OK, found=f"synchronous is {name} on this connection")
    return Finding(
        check="durability",
        verdict=Verdict.WARNING,
        found=f"synchronous is {name} on this engine's connections: a power cut may undo what was committed",
        advice='let the engine run "PRAGMA synchronous=FULL" on each connection, as FlowService does for a URL',
    )


def _writing(service: FlowService) -> Finding:
    try:
        with service.inspected() as inspection:
            inspection.take_write_lock()
    except DBAPIError as error:
        if "locked" in str(error.orig):
            return Finding(
                check="writing",
                verdict=Verdict.WARNING,
                found="another process holds the write lock, and did not give it back while this one waited",
                advice="find the program that has a transaction open on the file: nothing else can write meanwhile",
            )
        return Finding(
            check="writing",
            verdict=Verdict.PROBLEM,
            found=f"not possible: {_said(error)}",
            advice="this user needs to write to the file and to its folder, where the journal stands",
        )
    return Finding(check="writing", verdict=Verdict.OK, found="the write lock can be taken")


def _integrity(service: FlowService) -> Finding:
    try:
        with service.inspected() as inspection:
            damage = inspection.damage()
    except DatabaseError as error:
        damage = [_said(error)]
    if not damage:
        return Finding(check="integrity", verdict=Verdict.OK, found="quick_check finds no damage")
    return Finding(
        check="integrity",
        verdict=Verdict.PROBLEM,
        found=f"the file is damaged: {one_line('; '.join(damage), LONGEST_TEXT)}",
        advice="stop all workers, keep a copy of the file, and go back to a backup or try sqlite3's .recover",
    )


def _size(service: FlowService) -> Finding:
    with service.inspected() as inspection:
        size = int(inspection.pragma("page_count")) * int(inspection.pragma("page_size"))
        file = inspection.file()
    found = _bytes(size)
    journal = Path(f"{file}-wal")
    if file and journal.exists() and journal.stat().st_size:
        found += f", and {_bytes(journal.stat().st_size)} in its write-ahead log"
    return Finding(check="size", verdict=Verdict.OK, found=found)


# --- words ------------------------------------------------------------------------------------------------------------


def _said(error: Exception) -> str:
    return one_line(str(error.orig) if isinstance(error, DBAPIError) else str(error), LONGEST_TEXT)


def _executions(number: int) -> str:
    return "execution" if number == 1 else "executions"


def _wait(number: int) -> str:
    return "waits" if number == 1 else "wait"


def _groups(left: Sequence[Left]) -> str:
    each = ", ".join(f"{each.number} of {each.template_name} in queue {each.queue}" for each in left[:5])
    more = f", and of {len(left) - 5} more" if len(left) > 5 else ""
    return one_line(each, LONGEST_TEXT) + more


def _names(names: Sequence[str]) -> str:
    return one_line(", ".join(names), LONGEST_TEXT)


def _sessions(transactions: Sequence[OpenTransaction]) -> str:
    each = ", ".join(
        f"pid {each.pid} of {each.user or 'another role'}"
        + (f" ({each.application})" if each.application else "")
        + f" for {_span(each.seconds)}"
        for each in transactions[:3]
    )
    more = f", and {len(transactions) - 3} more" if len(transactions) > 3 else ""
    return one_line(each, LONGEST_TEXT) + more


def _span(seconds: float) -> str:
    """So many seconds in one unit, which is as much as a diagnosis needs: 42 s, 3 min, 5 h, 12 days."""
    for unit, length, until in (("s", 1, 120), ("min", 60, 120 * 60), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _bytes(number: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= length:
            return f"{number / length:.1f} {unit}"
    return f"{number} bytes"
