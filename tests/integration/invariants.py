"""The invariants of a flow's history, checked from the database alone: plain SQL, and none of the library's code.

What is checked, for each execution:

- *steps*: the steps of transitions and attempts together are 1..n, each once, and n is the execution's step;
- *chain*: each transition begins where the one before it ended, lies on a declared edge, none follows a final status,
  and the last one ends at the execution's status;
- *order*: a task's attempt begins only after the task before it succeeded, since the last re-run by hand;
- *ends*: attempts are numbered 1..k for each task name; one has an end if and only if it is not RUNNING; only a
  success adds to the context;
- *rest*: only a RUNNING execution has a RUNNING attempt, and at most one, its latest;
- *time*: times never go back along the steps, and nothing ends before it began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


def check_invariants(database: str | URL | Engine) -> list[str]:
    """Give each violation that the three tables show, in one sentence that begins with its kind; empty if all is well.

    Args:
        database: where they are. All is read in one snapshot, so work may go on meanwhile.
    """
    with _snapshot(database) as connection:
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
        for check in (_steps, _chain, _order, _ends, _rest, _time):
            violations += [f"{problem} (execution {execution['execution_id']})" for problem in check(*history)]
    return violations


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
    for row in _in_order(transitions, attempts):
        if "to_status" in row:
            may_go_back = may_go_back or (row["from_status"], row["to_status"]) == ("FAILED", "RESCHEDULED")
            continue
        if row["task_index"] != index and not (may_go_back and row["task_index"] < index):
            yield f"order: {_name(row)} begins at task {row['task_index']}, but the next one due is task {index}"
        may_go_back = False
        index = row["task_index"] + (1 if row["status"] == "SUCCEEDED" else 0)
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
