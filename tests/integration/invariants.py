"""The invariants of a flow's history, checked from the database alone: plain SQL, and none of the library's code.

What is checked, for each execution:

- *steps*: the steps of transitions and attempts together are 1..n, each once, and n is the execution's step;
- *chain*: each transition begins where the one before it ended, lies on a declared edge, none follows a final status,
  and the last one ends at the execution's status;
- *order*: a task's attempt begins only after the task before it succeeded, and no task succeeds twice, since the last
  re-run by hand;
- *ends*: attempts are numbered 1..k for each task name; one has an end if and only if it is not RUNNING; only a
  success adds to the context;
- *rest*: only a RUNNING execution has a RUNNING attempt, and at most one, its latest;
- *holds*: each claim raises the epoch by one; attempts begin only under a claim, with its epoch and its worker's name;
  a lease stands if and only if the execution is RUNNING;
- *time*: times never go back along the steps, and nothing ends before it began.

And where the caller says what to expect (`Expected`):

- *bounds*: no more attempts fail or lose their worker than the task's policy allows;
- *lease*: no lease has expired;
- *context*: what each task received is the fold of what was stored before it.

What tasks did outside of the library's tables is held against the history by `check_effects` and `check_starts`, what
callers were told by `check_schedules`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

DECLARED_EDGES = {
    None: {"CREATED"},
    "CREATED": {"SCHEDULED", "CANCELLED"},
    "SCHEDULED": {"RUNNING", "CANCELLED"},
    "RUNNING": {"SUCCEEDED", "FAILED", "RESCHEDULED", "CANCELLED"},
    "FAILED": {"RESCHEDULED", "CANCELLED"},
    "RESCHEDULED": {"RUNNING", "CANCELLED"},
    "SUCCEEDED": set(),
    "CANCELLED": set(),
}


@dataclass(frozen=True)
class Expected:
    """What has to hold of one database beyond what holds of every one."""

    max_attempts: Mapping[str, int] = field(default_factory=dict)
    """By task name, how many attempts may fail without a re-run by hand."""
    max_crashes: Mapping[str, int] = field(default_factory=dict)
    """By task name, how many attempts may lose their worker without a re-run by hand."""
    no_lease_has_expired: bool = False
    """Whether workers have had the time to take over what was left behind."""
    received: str | None = None
    """The entry under which each task returns the `digest` of the context that it received."""


NOTHING_MORE = Expected()


def check_invariants(database: str | URL | Engine, expected: Expected = NOTHING_MORE) -> list[str]:
    """Give each violation that the three tables show, in one sentence that begins with its kind; empty if all is well.

    Args:
        database: where they are. All is read in one snapshot, so work may go on meanwhile.
        expected: what else has to hold; default nothing.
    """
    with _snapshot(database) as connection:
        now = connection.execute(text(NOW[connection.dialect.name])).scalar_one()
        executions = _rows(connection, "SELECT * FROM ebbs_flow_executions ORDER BY execution_id")
        transitions = _rows(connection, "SELECT * FROM ebbs_flow_transitions ORDER BY flow_execution_step")
        attempts = _rows(connection, "SELECT * FROM ebbs_task_executions ORDER BY flow_execution_step")
    transitions_of, attempts_of = _by_execution(transitions), _by_execution(attempts)
    known = {execution["execution_id"] for execution in executions}
    violations = [
        f"chain: there is a history of {each}, but no execution" for each in {*transitions_of, *attempts_of} - known
    ]
    for execution in executions:
        history = execution, transitions_of[execution["execution_id"]], attempts_of[execution["execution_id"]]
        problems = [
            problem for check in (_steps, _chain, _order, _ends, _rest, _holds, _time) for problem in check(*history)
        ]
        problems += [*_bounds(*history, expected), *_context(*history, expected.received)]
        if expected.no_lease_has_expired and (execution["lease_expires_at"] or now) < now:
            problems.append(f"lease: it expired at {execution['lease_expires_at']}, and now is {now}")
        violations += [f"{problem} (execution {execution['execution_id']})" for problem in problems]
    return violations


NOW = {"postgresql": "SELECT clock_timestamp()", "sqlite": "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now') || '000'"}


def digest(context: Mapping[str, Any]) -> str:
    """A context of plain JSON values in a few characters, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(dict(context), sort_keys=True).encode()).hexdigest()[:16]


def check_schedules(database: str | URL | Engine, acknowledged: Mapping[str, int]) -> list[str]:
    """Give each schedule that was acknowledged and is not there, or is there under another id, or more than once.

    Args:
        acknowledged: by idempotency key the id that the caller was given.
    """
    with _snapshot(database) as connection:
        rows = _rows(connection, "SELECT execution_id, idempotency_key FROM ebbs_flow_executions ORDER BY execution_id")
    ids: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        ids[row["idempotency_key"]].append(row["execution_id"])
    return [
        f"schedules: {key!r} was acknowledged as execution {execution_id}, the database has {ids[key]}"
        for key, execution_id in acknowledged.items()
        if ids[key] != [execution_id]
    ]


def check_effects(database: str | URL | Engine, tasks: Collection[str]) -> list[str]:
    """Give each effect of a transactional task that is missing, doubled, or of an attempt that did not succeed.

    Args:
        tasks: the transactional tasks. Each inserts a row `(flow_key, task, effect)` into the table `effects` in its
            session, with an `effect` that no other attempt uses, and returns that under its own name.
    """
    with _snapshot(database) as connection:
        effects = _rows(connection, "SELECT flow_key, task, effect FROM effects")
        attempts = _rows(connection, KEYED_ATTEMPTS)
    there = Counter((row["flow_key"], row["task"], row["effect"]) for row in effects)
    due = Counter(
        (row["flow_key"], row["name"], _json(row["entries"]).get(row["name"]))
        for row in attempts
        if row["name"] in tasks and row["status"] == "SUCCEEDED"
    )
    violations = []
    for key, task, effect in sorted(there | due, key=str):
        found, succeeded = there[key, task, effect], due[key, task, effect]
        if found != succeeded:
            violations.append(
                f"effects: {effect!r} of {task!r} is there {found} times, {succeeded} attempts succeeded with it "
                f"(flow {key})"
            )
    return violations


def check_starts(database: str | URL | Engine, tasks: Collection[str]) -> list[str]:
    """Give each start of a plain task that no attempt explains, and each success without a start.

    Args:
        tasks: the plain tasks. Each begins by inserting a row `(flow_key, task, start, process)` into the table
            `starts` in a transaction of its own, whose column `at` is filled by the database's clock; its `start` is
            one that no other attempt uses, and the task returns that under its own name.
    """
    with _snapshot(database) as connection:
        starts = _rows(connection, "SELECT flow_key, task, start, process, at FROM starts ORDER BY at")
        attempts = _rows(connection, KEYED_ATTEMPTS)
    noted: defaultdict[tuple[str, str, int], list[Any]] = defaultdict(list)
    for row in starts:
        noted[row["flow_key"], row["task"], row["process"]].append(row["at"])
    recorded: defaultdict[tuple[str, str, int], list[Any]] = defaultdict(list)
    for row in attempts:
        recorded[row["flow_key"], row["name"], process_of(row["worker"])].append(row["started_at"])
    violations = []
    for (key, task, process), times in noted.items():
        begun = recorded[key, task, process]
        if len(times) > len(begun):
            violations.append(
                f"starts: task {task!r} started {len(times)} times in process {process}, "
                f"which has {len(begun)} attempts at it (flow {key})"
            )
        for at, started_at in zip(times, begun, strict=False):
            if at < started_at:
                violations.append(
                    f"starts: task {task!r} started at {at} in process {process}, before its attempt was recorded at "
                    f"{started_at} (flow {key})"
                )
    known = {(row["flow_key"], row["task"], row["start"]) for row in starts}
    violations += [
        f"starts: an attempt at {row['name']!r} succeeded, and its start was not noted (flow {row['flow_key']})"
        for row in attempts
        if row["name"] in tasks and row["status"] == "SUCCEEDED"
        if (row["flow_key"], row["name"], _json(row["entries"]).get(row["name"])) not in known
    ]
    return violations


KEYED_ATTEMPTS = (
    "SELECT e.idempotency_key AS flow_key, t.* FROM ebbs_task_executions t"
    " JOIN ebbs_flow_executions e ON e.execution_id = t.flow_execution_id ORDER BY t.started_at"
)


def process_of(worker: str | None) -> int:
    """The process in a worker's name, which is host, process and a random part; 0 where it has none."""
    parts = (worker or "").rsplit(":", 2)
    return int(parts[1]) if len(parts) == 3 else 0


Row = dict[str, Any]


def _steps(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    steps = sorted(row["flow_execution_step"] for row in (*transitions, *attempts))
    if steps != list(range(1, len(steps) + 1)):
        yield f"steps: they are {steps}, not 1..{len(steps)}"
    if not steps or steps[-1] != execution["execution_step"]:
        yield f"steps: the execution is at {execution['execution_step']}, its history ends at {steps[-1:]}"


def _chain(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    before = None
    for row in transitions:
        edge = f"{row['from_status']} -> {row['to_status']} at step {row['flow_execution_step']}"
        if row["from_status"] != before:
            yield f"chain: {edge} follows {before}"
        if row["to_status"] not in DECLARED_EDGES[row["from_status"]]:
            yield f"chain: {edge} is no declared edge"
        if before in ("SUCCEEDED", "CANCELLED"):
            yield f"chain: {edge} follows the final {before}"
        before = row["to_status"]
    if before != execution["status"]:
        yield f"chain: the execution is {execution['status']}, its last transition ends at {before}"


def _order(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    index, may_go_back = 0, False
    done: dict[str, int] = {}
    for row in _in_order(transitions, attempts):
        if "to_status" in row:
            may_go_back = may_go_back or _is_re_run(row)
            continue
        if row["task_index"] != index and not (may_go_back and row["task_index"] < index):
            yield f"order: {_name(row)} begins at task {row['task_index']}, but the next one due is task {index}"
        done = {name: place for name, place in done.items() if place < row["task_index"]}
        if row["name"] in done:
            yield f"order: {_name(row)} begins, but that task has succeeded as task {done[row['name']]}"
        may_go_back = False
        index = row["task_index"] + (1 if row["status"] == "SUCCEEDED" else 0)
        if row["status"] == "SUCCEEDED":
            done[row["name"]] = row["task_index"]
    if execution["current_task_index"] != index and not (may_go_back and execution["current_task_index"] < index):
        yield f"order: the execution stands at task {execution['current_task_index']}, its attempts lead to {index}"


def _ends(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    numbers: dict[str, list[int]] = defaultdict(list)
    for row in attempts:
        numbers[row["name"]].append(row["attempt"])
        if (row["finished_at"] is None) != (row["status"] == "RUNNING"):
            yield f"ends: {_name(row)} is {row['status']} and finished at {row['finished_at']}"
        if (row["failure"] is None) == (row["status"] == "FAILED"):
            yield f"ends: {_name(row)} is {row['status']} with failure {row['failure']}"
        if row["status"] != "SUCCEEDED" and row["entries"] is not None:
            yield f"ends: {_name(row)} is {row['status']}, but has added to the context"
    for name, found in numbers.items():
        if found != list(range(1, len(found) + 1)):
            yield f"ends: the attempts at {name!r} are numbered {found}, not 1..{len(found)}"


def _rest(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    running = [row for row in attempts if row["status"] == "RUNNING"]
    if running and execution["status"] != "RUNNING":
        yield f"rest: {_name(running[0])} is RUNNING in an execution that is {execution['status']}"
    if len(running) > 1:
        yield f"rest: {len(running)} attempts are RUNNING at once"
    if running and running[-1] is not attempts[-1]:
        yield f"rest: {_name(running[-1])} is RUNNING, but {_name(attempts[-1])} came after it"


def _holds(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    claims, status, worker = 0, None, None
    for row in _in_order(transitions, attempts):
        if "to_status" in row:
            if row["to_status"] == "RUNNING":
                claims, worker = claims + 1, row["worker"]
            elif row["from_status"] == "RUNNING" and row["worker"] not in (None, worker):
                yield f"holds: {row['worker']} wrote step {row['flow_execution_step']}, the claim was {worker}'s"
            status = row["to_status"]
            continue
        if status != "RUNNING":
            yield f"holds: {_name(row)} began while the execution was {status}"
        if row["epoch"] != claims:
            yield f"holds: {_name(row)} was written under epoch {row['epoch']}, it began after claim {claims}"
        if worker not in (None, row["worker"]):
            yield f"holds: {_name(row)} is {row['worker']}'s, the claim was {worker}'s"
    if execution["epoch"] != claims:
        yield f"holds: the execution is at epoch {execution['epoch']}, it was claimed {claims} times"
    lease = execution["lease_owner"], execution["lease_expires_at"]
    if any(each is None for each in lease) if execution["status"] == "RUNNING" else lease != (None, None):
        yield f"holds: the execution is {execution['status']} under the lease {lease}"


def _bounds(execution: Row, transitions: list[Row], attempts: list[Row], expected: Expected) -> Iterator[str]:
    # Each re-run by hand grants one more.
    granted = sum(_is_re_run(row) for row in transitions)
    for bounds, kinds in ((expected.max_attempts, ("EXCEPTION", "TIMEOUT")), (expected.max_crashes, ("LOST",))):
        counts = Counter(row["name"] for row in attempts if row["failure"] in kinds)
        for name, most in bounds.items():
            if counts[name] > max(most, 1) + granted:
                yield f"bounds: {counts[name]} attempts at {name!r} ended with {' or '.join(kinds)}, not {most} at most"


def _context(execution: Row, transitions: list[Row], attempts: list[Row], received: str | None) -> Iterator[str]:
    context: dict[str, Any] = {}
    as_received: dict[int, dict[str, Any]] = {}
    for row in _in_order(transitions, attempts) if received is not None else ():
        if "to_status" not in row:
            as_received[row["task_index"]] = dict(context)
            noted = _json(row["entries"]).get(received)
            if row["status"] == "SUCCEEDED" and noted != digest(context):
                yield f"context: {_name(row)} received {noted}, what was stored before it is {context}"
        elif _is_re_run(row):
            context = dict(as_received.get(row["task_index"], context))
        for name in _json(row["dropped"]):
            context.pop(name, None)
        context.update(_json(row["entries"]))


def _time(execution: Row, transitions: list[Row], attempts: list[Row]) -> Iterator[str]:
    latest = execution["created_at"]
    for row in _in_order(transitions, attempts):
        begun = row["at"] if "to_status" in row else row["started_at"]
        ended = begun if "to_status" in row else row["finished_at"] or begun
        if begun < latest:
            yield f"time: step {row['flow_execution_step']} is at {begun}, but {latest} has been before it"
        if ended < begun:
            yield f"time: {_name(row)} began at {begun} and finished at {ended}"
        latest = max(latest, begun, ended)
    if execution["updated_at"] < latest:
        yield f"time: the execution was updated at {execution['updated_at']}, its history goes to {latest}"
    begun, ended = execution["started_at"], execution["finished_at"]
    if begun is not None and ended is not None and ended < begun:
        yield f"time: the execution began at {begun} and finished at {ended}"


def _is_re_run(transition: Row) -> bool:
    return (transition["from_status"], transition["to_status"]) == ("FAILED", "RESCHEDULED")


def _json(column: Any) -> Any:
    """What a JSON column holds, which PostgreSQL's driver has parsed already; nothing for NULL."""
    return json.loads(column) if isinstance(column, str) else column or {}


def _in_order(transitions: Iterable[Row], attempts: Iterable[Row]) -> list[Row]:
    return sorted((*transitions, *attempts), key=lambda row: row["flow_execution_step"])


def _name(attempt: Row) -> str:
    return f"attempt {attempt['attempt']} at {attempt['name']!r}, step {attempt['flow_execution_step']},"


def _by_execution(rows: Iterable[Row]) -> defaultdict[int, list[Row]]:
    grouped: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["flow_execution_id"]].append(row)
    return grouped


def _rows(connection: Connection, sql: str) -> list[Row]:
    return [dict(row) for row in connection.execute(text(sql)).mappings()]


@contextmanager
def _snapshot(database: str | URL | Engine) -> Iterator[Connection]:
    """A connection whose statements all see the same moment."""
    engine = database if isinstance(database, Engine) else _engine_for(make_url(database))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")  # the driver begins no transaction for a SELECT by itself
        else:
            connection.execution_options(isolation_level="REPEATABLE READ")
        yield connection
        connection.rollback()


def _engine_for(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return create_engine(url, poolclass=NullPool)
