"""What a run of `chaos.py` has left: its own tables, the checks, and the report. All of it comes from the database."""

from __future__ import annotations

import bisect
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Engine, text

from benchmarks.chaos_worker import MAX_ATTEMPTS, MAX_CRASHES, PLAIN_TASKS, TRANSACTIONAL_TASKS
from tests.integration.invariants import (
    NOW,
    Expected,
    check_effects,
    check_invariants,
    check_schedules,
    check_starts,
    process_of,
)

EXPECTED = Expected(
    max_attempts=dict.fromkeys((*PLAIN_TASKS, *TRANSACTIONAL_TASKS), MAX_ATTEMPTS),
    max_crashes=dict.fromkeys((*PLAIN_TASKS, *TRANSACTIONAL_TASKS), MAX_CRASHES),
    no_lease_has_expired=True,
    received="received",
)

UP_AGAIN_SECONDS = 2.0
"""How long after the return of a server that was down for two seconds a worker may still wait before it tries again."""


@dataclass(frozen=True)
class Disturbance:
    """Something that was done to a worker ("kill", "zombie") or to the server ("restart"), by the database's clock in
    seconds since 1970.
    """

    kind: str
    process: int | None
    began_at: float
    ended_at: float


def make_tables(engine: Engine) -> None:
    """Make the tables for what tasks do outside of the library's own, and for what is done to workers and server."""
    is_postgresql = engine.dialect.name == "postgresql"
    time_type = "TIMESTAMP WITH TIME ZONE" if is_postgresql else "TEXT"
    now = "clock_timestamp()" if is_postgresql else f"({NOW['sqlite'].removeprefix('SELECT ')})"
    flow_task = "flow_key VARCHAR(64) NOT NULL, task VARCHAR(64) NOT NULL"
    with engine.begin() as connection:
        for table in (
            # Without a unique constraint: what is done twice is to be there twice.
            f"effects ({flow_task}, effect VARCHAR(64) NOT NULL)",
            f"starts ({flow_task}, start VARCHAR(64) NOT NULL, process INTEGER NOT NULL, at {time_type} DEFAULT {now})",
            f"disturbances (kind VARCHAR(16) NOT NULL, process INTEGER, began_at {time_type}, ended_at {time_type})",
        ):
            connection.execute(text(f"CREATE TABLE {table}"))


def write_disturbances(engine: Engine, disturbances: Sequence[Disturbance]) -> None:
    """Put down what was done to the workers and to the server."""
    with engine.begin() as connection:
        for each in disturbances:
            connection.execute(
                text("INSERT INTO disturbances VALUES (:kind, :process, :began_at, :ended_at)"),
                {
                    "kind": each.kind,
                    "process": each.process,
                    "began_at": _as_column(engine, each.began_at),
                    "ended_at": _as_column(engine, each.ended_at),
                },
            )


def database_time(engine: Engine) -> float:
    """The database's clock, in seconds since 1970."""
    with engine.connect() as connection:
        return _as_seconds(connection.execute(text(NOW[engine.dialect.name])).scalar_one())


# --- the checks -------------------------------------------------------------------------------------------------------


def check(engine: Engine, acknowledged: Mapping[str, int], bound_seconds: float) -> list[str]:
    """Give everything that is wrong, one sentence each.

    Args:
        acknowledged: by idempotency key the id that the caller was given.
        bound_seconds: how long an execution may wait after its worker's death, unless the server was down meanwhile.
    """
    with engine.connect() as connection:
        unfinished = connection.execute(
            text("SELECT execution_id, status FROM ebbs_flow_executions WHERE status <> 'SUCCEEDED'")
        ).all()
    return [
        *(f"stranded: execution {execution_id} is {status}" for execution_id, status in unfinished),
        *check_schedules(engine, acknowledged),
        *check_invariants(engine, EXPECTED),
        *check_effects(engine, TRANSACTIONAL_TASKS),
        *check_starts(engine, PLAIN_TASKS),
        *(
            f"recovery: execution {each.execution_id} ran again {each.seconds:.2f} s after process {each.process} "
            f"died, {bound_seconds:.1f} s is the most"
            for each in recoveries(engine)
            if each.seconds > bound_seconds and not each.server_was_down
        ),
    ]


@dataclass(frozen=True)
class Recovery:
    """How long an execution waited from its worker's death until it ran again elsewhere."""

    execution_id: int
    process: int
    seconds: float
    server_was_down: bool


def recoveries(engine: Engine) -> list[Recovery]:
    """From each kill to the next claim of each execution that lost an attempt with it."""
    done = _disturbances(engine)
    kills = {each.process: each.began_at for each in done if each.kind == "kill"}
    # On SQLite a worker that is stopped may hold the write lock, and then nobody can write before it goes on.
    kinds = {"restart", "zombie"} if engine.dialect.name == "sqlite" else {"restart"}
    outages = [each for each in done if each.kind in kinds]
    found = []
    for execution_id, process, lost_at, again_at in _lost_attempts(engine):
        killed_at = kills.get(process)
        # What was taken over from it before, while it was stopped, is not of its death.
        if killed_at is not None and again_at is not None and lost_at >= killed_at:
            was_down = any(
                each.began_at < again_at and killed_at < each.ended_at + UP_AGAIN_SECONDS for each in outages
            )
            found.append(Recovery(execution_id, process, again_at - killed_at, was_down))
    return found


def taken_over_from_zombies(engine: Engine) -> list[int]:
    """For each worker that was stopped past its lease, how many attempts were taken over from it meanwhile."""
    lost = _lost_attempts(engine)
    return [
        sum(process == each.process and each.began_at < lost_at < each.ended_at for _, process, lost_at, _ in lost)
        for each in _disturbances(engine)
        if each.kind == "zombie"
    ]


def _disturbances(engine: Engine) -> list[Disturbance]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT kind, process, began_at, ended_at FROM disturbances")).all()
    return [Disturbance(kind, process, _as_seconds(began), _as_seconds(ended)) for kind, process, began, ended in rows]


def _lost_attempts(engine: Engine) -> list[tuple[int, int, float, float | None]]:
    """Of each attempt whose lease has expired: its execution, its process, when that was noticed, and when the
    execution was claimed again.
    """
    with engine.connect() as connection:
        lost = connection.execute(
            text(
                "SELECT flow_execution_id, flow_execution_step, worker, finished_at FROM ebbs_task_executions"
                " WHERE error_type = 'WorkerLost'"
            )
        ).all()
        claims: dict[int, list[tuple[int, Any]]] = {}
        for execution_id, step, at in connection.execute(
            text(
                "SELECT flow_execution_id, flow_execution_step, at FROM ebbs_flow_transitions"
                " WHERE to_status = 'RUNNING' ORDER BY flow_execution_step"
            )
        ):
            claims.setdefault(execution_id, []).append((step, at))
    found = []
    for execution_id, step, worker, lost_at in lost:
        later = claims[execution_id][bisect.bisect(claims[execution_id], step, key=lambda each: each[0]) :]
        again_at = _as_seconds(later[0][1]) if later else None
        found.append((execution_id, process_of(worker), _as_seconds(lost_at), again_at))
    return found


def _as_seconds(column: Any) -> float:
    """A time as it comes from the database, in seconds since 1970."""
    if isinstance(column, str):
        column = datetime.fromisoformat(column).replace(tzinfo=timezone.utc)
    return float(column.timestamp())


def _as_column(engine: Engine, seconds: float) -> Any:
    """Seconds since 1970 as the database keeps times."""
    at = datetime.fromtimestamp(seconds, timezone.utc)
    return at.strftime("%Y-%m-%d %H:%M:%S.%f") if engine.dialect.name == "sqlite" else at


# --- the report -------------------------------------------------------------------------------------------------------


def report(engine: Engine, acknowledged: Mapping[str, int], bound_seconds: float) -> None:
    """Print what was done, and what the database has of it."""
    with engine.connect() as connection:

        def counts(sql: str) -> dict[str, int]:
            return {str(name): int(count) for name, count in connection.execute(text(sql))}

        disturbances = counts("SELECT kind, count(*) FROM disturbances GROUP BY kind")
        statuses = counts("SELECT status, count(*) FROM ebbs_flow_executions GROUP BY status")
        ends = counts("SELECT coalesce(error_type, status), count(*) FROM ebbs_task_executions GROUP BY 1")
        effects = connection.execute(text("SELECT count(*) FROM effects")).scalar_one()
        starts = connection.execute(text("SELECT count(*) FROM starts")).scalar_one()
    zombies = taken_over_from_zombies(engine)
    print(
        f"done:        {disturbances.get('kill', 0)} workers killed, {disturbances.get('restart', 0)} crashes of the "
        f"server, {len(zombies)} workers stopped past their lease"
    )
    print(f"executions:  {len(acknowledged)} acknowledged; {_said(statuses)}")
    print(f"attempts:    {sum(ends.values())}: {_said(ends)}")
    print(f"effects:     {effects} of transactional tasks; {len(TRANSACTIONAL_TASKS) * len(acknowledged)} are due")
    print(f"starts:      {starts} of plain tasks; {len(PLAIN_TASKS) * len(acknowledged)} without any failure")
    if zombies:
        print(f"taken over:  {sum(zombies)} attempts from {sum(map(bool, zombies))} of the stopped workers")
    for was_down in (False, True):
        seconds = [each.seconds for each in recoveries(engine) if each.server_was_down is was_down]
        if seconds:
            with_what = "out of reach meanwhile" if was_down else f"{bound_seconds:.1f} s is the most allowed"
            print(
                f"recovery:    {len(seconds)} executions ran again after their worker's death: median "
                f"{statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s ({with_what})"
            )


def show_histories(engine: Engine, violations: Sequence[str], most: int = 5) -> None:
    """Print every step of the first executions that violations name."""
    named = re.findall(r"execution (\d+)|flow (chaos-\S+)\)", "\n".join(violations))
    with engine.connect() as connection:
        ids = dict.fromkeys(
            int(execution_id)
            or connection.execute(
                text("SELECT execution_id FROM ebbs_flow_executions WHERE idempotency_key = :key"), {"key": key}
            ).scalar_one()
            for execution_id, key in ((each or 0, key) for each, key in named)
        )
        for execution_id in list(ids)[:most]:
            for table in ("ebbs_flow_executions", "ebbs_flow_transitions", "ebbs_task_executions"):
                column = "execution_id" if table == "ebbs_flow_executions" else "flow_execution_id"
                order = "execution_step" if table == "ebbs_flow_executions" else "flow_execution_step"
                print(f"{table} of execution {execution_id}")
                rows = text(f"SELECT * FROM {table} WHERE {column} = :id ORDER BY {order}")
                for row in connection.execute(rows, {"id": execution_id}).mappings():
                    print("  ", {name: str(value)[:100] for name, value in row.items() if value is not None})


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
