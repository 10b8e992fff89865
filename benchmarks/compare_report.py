"""What compare.py has measured, as tables, ratios and a document."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks.contestants.roster import (
    DBOS_DIRECT,
    DBOS_QUEUE,
    EBBS_DIRECT,
    EBBS_IDLE,
    EBBS_WORKER,
    ENTRANTS,
    FLOOR_EXECUTEMANY,
    FLOOR_ONE_COMMIT,
    FLOOR_RECORDSET,
    IN_FLIGHT,
    POSTGRESQL,
    SQLITE,
)
from benchmarks.contestants.work import TASKS
from benchmarks.servers import Databases

TITLES = {POSTGRESQL: "PostgreSQL", SQLITE: "SQLite"}
PACKAGES = ("ebbs-and-flows", "sqlalchemy", "psycopg", "dbos", "absurd-sdk", "absurdctl", "procrastinate")


@dataclass(frozen=True)
class Measurement:
    """One contestant, once."""

    database: str
    name: str
    in_flight: int
    round: int
    flows: int
    seconds: float
    durability: dict[str, str]
    latencies: list[float] = field(default_factory=list)
    """Seconds from schedule to start, where that is what was measured."""

    @property
    def rate(self) -> float:
        """Tasks per second."""
        return self.flows * TASKS / self.seconds

    def __str__(self) -> str:
        place = f"{self.database:10}  {self.name:17}  {self.in_flight:3} in flight  "
        if self.name == EBBS_IDLE:
            return f"{place}{self.flows:6,} flows, p50 {1000 * statistics.median(self.latencies):.1f} ms to start"
        return f"{place}{self.flows:6,} flows in {self.seconds:5.2f} s  {self.rate:9,.0f} tasks/s"


Side = tuple[int, tuple[str, ...]]
"""In flight, and the contestants of which the best counts."""


@dataclass(frozen=True)
class Ratio:
    """Two figures of the same round, and what their ratio has to be at least."""

    what: str
    at_least: dict[str, float | None]
    """By database; None says nothing about it."""
    ours: Side
    theirs: Side


RATIOS = (
    Ratio(
        "128 in flight, to DBOS's better figure",
        {POSTGRESQL: 25, SQLITE: 40},
        (128, (EBBS_WORKER,)),
        (128, (DBOS_DIRECT, DBOS_QUEUE)),
    ),
    Ratio(
        "one flow at a time, to DBOS direct",
        {POSTGRESQL: 2.5, SQLITE: 5},
        (1, (EBBS_DIRECT, EBBS_WORKER)),
        (1, (DBOS_DIRECT,)),
    ),
    Ratio(
        "128 in flight, to the floor of executemany",
        {POSTGRESQL: 0.5, SQLITE: 0.5},
        (128, (EBBS_WORKER,)),
        (128, (FLOOR_EXECUTEMANY,)),
    ),
    Ratio(
        "128 in flight, to the floor of one statement",
        {POSTGRESQL: None},
        (128, (EBBS_WORKER,)),
        (128, (FLOOR_RECORDSET,)),
    ),
    Ratio(
        "one at a time, to the floor of one commit a step",
        {POSTGRESQL: 0.5, SQLITE: 0.5},
        (1, (EBBS_DIRECT, EBBS_WORKER)),
        (1, (FLOOR_ONE_COMMIT,)),
    ),
)

START_AT_MOST_MS = 10.0
"""From schedule to start, p50, an idle worker on PostgreSQL."""


class Report:
    """Collects measurements, and says what they come to."""

    def __init__(self, facts: dict[str, str], rounds: int) -> None:
        self._facts = facts
        self._rounds = rounds
        self.measurements: list[Measurement] = []

    def add(self, measurement: Measurement) -> None:
        """Take one more."""
        self.measurements.append(measurement)

    def text(self) -> str:
        """Return one block a database: a table, and below it what has to be reached."""
        databases = dict.fromkeys(each.database for each in self.measurements)
        return "\n\n".join(self.block(database) for database in databases)

    def block(self, database: str) -> str:
        """Return the table of one database and its ratios."""
        rounds = f"{self._rounds} rounds" if self._rounds > 1 else "one round"
        title = f"{TITLES[database]}: tasks per second, median of {rounds} (least..most)"
        return "\n".join([title, "", *self._table(database), "", *self._goals(database)])

    def document(self, failures: Sequence[str]) -> str:
        """Return all there is to say, as Markdown."""
        from benchmarks.contestants import absurd, dbos_transact, procrastinate

        settings = {
            database: next(each.durability for each in self.measurements if each.database == database)
            for database in dict.fromkeys(each.database for each in self.measurements)
        }
        lines = ["# Side by side", "", f"Written by `{self._facts['command']}`; README.md says what is measured.", ""]
        for database in settings:
            lines += ["```", self.block(database), "```", ""]
        if failures:
            lines += ["Failed:", "", *(f"- {each}" for each in failures), ""]
        lines += ["## Where", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self._facts.items() if name != "command"]
        lines += ["", "What the databases said about their durability, each contestant on a connection of its own:", ""]
        for database, read in settings.items():
            same = all(each.durability == read for each in self.measurements if each.database == database)
            lines.append(f"- {TITLES[database]}: {', '.join(f'{name} {value}' for name, value in read.items())}; ")
            lines[-1] += "the same for all." if same else "not the same for all, see results.json."
        lines += ["", "## How the others were set up", ""]
        lines += ["Of what their documentation and options offer, what was fastest here.", ""]
        for title, module in (("DBOS Transact", dbos_transact), ("Absurd", absurd), ("Procrastinate", procrastinate)):
            lines += [f"**{title}.** {module.CONFIGURATION}", ""]
        return "\n".join(lines)

    def _table(self, database: str) -> list[str]:
        rows = [["in flight", *(str(each) for each in IN_FLIGHT)]]
        for name, entrant in ENTRANTS.items():
            figures = [self._rates(database, name, in_flight) for in_flight in IN_FLIGHT]
            if any(figures):
                rows.append([entrant.title, *(spread(each, ",.0f") if each else "" for each in figures)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for name, *cells in rows:
            right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        return [lines[0], "-" * max(len(line) for line in lines), *lines[1:]]

    def _goals(self, database: str) -> list[str]:
        lines = [f"{'ratio within a round':50}  {'at least':>9}  measured"]
        for ratio in RATIOS:
            if database not in ratio.at_least:
                continue
            goal = ratio.at_least[database]
            found = self._ratios(database, ratio)
            wanted = "" if goal is None else f"{goal:g}"
            lines.append(f"{ratio.what:50}  {wanted:>9}  {verdict(found, goal)}")
        if database == POSTGRESQL:
            lines += self._starts()
        return lines

    def _ratios(self, database: str, ratio: Ratio) -> list[float]:
        found = []
        for number in range(1, self._rounds + 1):
            ours, theirs = (self._best(database, side, number) for side in (ratio.ours, ratio.theirs))
            if ours and theirs:
                found.append(ours / theirs)
        return found

    def _best(self, database: str, side: Side, number: int) -> float | None:
        in_flight, names = side
        rates = [rate for name in names for rate in self._rates(database, name, in_flight, number)]
        return max(rates, default=None)

    def _rates(self, database: str, name: str, in_flight: int, number: int | None = None) -> list[float]:
        return [
            each.rate
            for each in self.measurements
            if (each.database, each.name, each.in_flight) == (database, name, in_flight)
            and number in (None, each.round)
        ]

    def _starts(self) -> list[str]:
        rounds = [each.latencies for each in self.measurements if each.name == EBBS_IDLE]
        halves = [1000 * percentile(each, 50) for each in rounds]
        tails = [1000 * percentile(each, 99) for each in rounds]
        lines = ["", f"{'from schedule to start, an idle Worker, ms':50}  {'at most':>9}  measured"]
        if not rounds:
            return [*lines, f"{'p50':50}  {START_AT_MOST_MS:9g}  not measured"]
        missed = "" if statistics.median(halves) <= START_AT_MOST_MS else "  MISSED"
        return [
            *lines,
            f"{'p50':50}  {START_AT_MOST_MS:9g}  {spread(halves, '.1f')}{missed}",
            f"{'p99':50}  {'':9}  {spread(tails, '.1f')}",
        ]


def verdict(found: Sequence[float], at_least: float | None) -> str:
    """Return a ratio's median and range, and whether it is too small."""
    if not found:
        return "not measured"
    missed = at_least is not None and statistics.median(found) < at_least
    return spread(found, ".2f") + ("  MISSED" if missed else "")


def spread(found: Sequence[float], form: str) -> str:
    """Return the median, and the range where there is one."""
    median = f"{statistics.median(found):{form}}"
    return f"{median} ({min(found):{form}}..{max(found):{form}})" if len(found) > 1 else median


def percentile(ordered: Sequence[float], percent: int) -> float:
    """Return the value that so many percent of the values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def versions_and_machine(databases: dict[str, Databases], folder: str) -> dict[str, str]:
    """Return on what this is measured, and with which versions of all that takes part."""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": memory(),
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
    if POSTGRESQL in databases:
        engine = create_engine(databases[POSTGRESQL].create(with_schema=False))
        with engine.connect() as connection:
            facts["PostgreSQL"] = str(connection.scalar(text("SHOW server_version")))
            place = Path(str(connection.scalar(text("SHOW data_directory"))))
        engine.dispose()
        databases[POSTGRESQL].clear()
        facts["disk of PostgreSQL"] = filesystem(place)
    if SQLITE in databases:
        facts["SQLite"] = sqlite3.sqlite_version
        facts["disk of SQLite"] = filesystem(Path(folder))
    return facts | {package: version(package) for package in PACKAGES}


def processor() -> str:
    """Return the model's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory() -> str:
    """Return how much the machine has."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (AttributeError, OSError, ValueError):
        return "not known"


def filesystem(folder: Path) -> str:
    """Return the type of the filesystem that a folder is on, and of its device."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "not known"
    around = [(mount, device, kind) for device, mount, kind, *_ in mounts if folder.is_relative_to(mount)]
    if not around:
        return "not known"
    _, device, kind = max(around, key=lambda each: len(each[0]))
    return f"{kind} on {device}"
