"""Who takes part, on which database, with how many flows in flight."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import cast

from benchmarks.contestants.work import Contestant

IN_FLIGHT = (1, 8, 32, 128)
MANY_IN_FLIGHT = IN_FLIGHT[1:]
POSTGRESQL, SQLITE = "postgresql", "sqlite"
BOTH = (POSTGRESQL, SQLITE)

EBBS_DIRECT, EBBS_WORKER, EBBS_IDLE = "ebbs-direct", "ebbs-worker", "ebbs-idle"
DBOS_DIRECT, DBOS_QUEUE = "dbos-direct", "dbos-queue"
FLOOR_ONE_COMMIT, FLOOR_EXECUTEMANY, FLOOR_RECORDSET = "floor-one-commit", "floor-executemany", "floor-recordset"


@dataclass(frozen=True)
class Entrant:
    """One way of running flows."""

    title: str
    """As the table names it."""
    classes: dict[str, str]
    """By database: the class, as module.Class in this package."""
    rate: float
    """Tasks per second that the first, uncounted run expects; it sets the number of flows of the others."""
    in_flight: tuple[int, ...] = IN_FLIGHT

    def open(self, url: str, in_flight: int) -> Contestant:
        """Import it, which is not done elsewhere, and give it the database."""
        module, name = self.classes[url.partition(":")[0].partition("+")[0]].split(".")
        made = getattr(import_module(f"benchmarks.contestants.{module}"), name)
        return cast(Contestant, made(url, in_flight))


ENTRANTS = {
    EBBS_DIRECT: Entrant("Ebbs and Flows, run_flow", dict.fromkeys(BOTH, "ebbs.EbbsDirect"), 1500, (1,)),
    EBBS_WORKER: Entrant("Ebbs and Flows, Worker", dict.fromkeys(BOTH, "ebbs.EbbsWorker"), 3000),
    DBOS_DIRECT: Entrant("DBOS Transact, direct", dict.fromkeys(BOTH, "dbos_transact.DbosDirect"), 500),
    DBOS_QUEUE: Entrant("DBOS Transact, queue", dict.fromkeys(BOTH, "dbos_transact.DbosQueue"), 400),
    "absurd": Entrant("Absurd", {POSTGRESQL: "absurd.AbsurdWorkers"}, 1000),
    "procrastinate": Entrant("Procrastinate, a job a task", {POSTGRESQL: "procrastinate.Procrastinate"}, 300),
    FLOOR_ONE_COMMIT: Entrant(
        "floor: one commit a step",
        {POSTGRESQL: "floors.PostgresqlOneCommit", SQLITE: "floors.SqliteOneCommit"},
        2000,
        (1,),
    ),
    FLOOR_EXECUTEMANY: Entrant(
        "floor: batched, executemany",
        {POSTGRESQL: "floors.PostgresqlExecutemany", SQLITE: "floors.SqliteBatched"},
        15000,
        MANY_IN_FLIGHT,
    ),
    FLOOR_RECORDSET: Entrant(
        "floor: batched, one statement",
        {POSTGRESQL: "floors.PostgresqlRecordset"},
        15000,
        MANY_IN_FLIGHT,
    ),
}

IDLE = Entrant("schedule to start, an idle Worker", {POSTGRESQL: "ebbs.EbbsIdle"}, 0, (32,))
"""Measured as well, but not in tasks per second."""

TURNS = [*(name for name in reversed(ENTRANTS) if name.startswith("floor")), EBBS_IDLE]
TURNS += [name for name in ENTRANTS if not name.startswith("floor")]
"""The library comes between the floors and the others, so that what it is compared with is near."""
