"""How many tasks a second, side by side with others that do the same, and with what the database itself allows?

Run it as `python benchmarks/compare.py`, or `nox -s bench`: on a PostgreSQL server of its own and on SQLite files. Each
measurement is a fresh process on a fresh database; the contestants take turns, so that all of them get the good and the
bad moments of the machine. It prints tables and writes benchmarks/results.md and results.json; `--quick` shows in a few
minutes whether all of it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compare_report import Measurement, Report, versions_and_machine
from benchmarks.contestants.roster import BOTH, EBBS_IDLE, ENTRANTS, IDLE, IN_FLIGHT, POSTGRESQL, TURNS
from benchmarks.contestants.work import TASKS
from benchmarks.servers import Databases, SqliteDatabases, postgres_databases

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results.md")

UNCOUNTED = 0
"""The round before the first one, which shows how many flows a measurement needs."""

TIMEOUT_SECONDS = 900
"""For one measurement and what it takes to prepare it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 where a contestant has failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no server is left
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", dir=options.folder))
        databases: dict[str, Databases] = {}
        for name in options.database or BOTH:
            if name == POSTGRESQL:
                databases[name] = stack.enter_context(postgres_databases(options.database_url))
            else:
                databases[name] = SqliteDatabases(folder)
        facts = {"command": command(arguments), **versions_and_machine(databases, folder)}
        report = Report(facts, options.rounds)
        race = Race(options, databases)
        try:
            for measurement in race.run():
                report.add(measurement)
        except KeyboardInterrupt:
            print("interrupted: what follows is what there is, and is not written")
            options.output = None
    print("\n" + report.text())
    for failure in race.failures:
        print(f"FAILED {failure}")
    if options.output is not None:
        options.output.write_text(report.document(race.failures))
        raw = {"facts": facts, "measurements": [asdict(each) for each in report.measurements]}
        options.output.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")
        print(f"written: {options.output} and {options.output.with_suffix('.json').name}")
    return 1 if race.failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database-url", metavar="URL", help="of a PostgreSQL role that may create databases")
    parser.add_argument("--database", choices=BOTH, action="append", help="default: both")
    parser.add_argument("--only", choices=[*ENTRANTS, EBBS_IDLE], action="append", help="contestants; default: all")
    parser.add_argument("--in-flight", type=int, choices=IN_FLIGHT, action="append", help="default: each of them")
    parser.add_argument("--rounds", type=int, default=5, help="in which each contestant has its turns; default 5")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a measurement is to last; default 3")
    parser.add_argument("--latencies", type=int, default=200, help="flows that an idle worker starts, a round")
    parser.add_argument("--folder", help="of the SQLite files: on the disk to be measured; default a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--quick", action="store_true", help="one short round, none uncounted; nothing is written")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    if options.quick:
        options.rounds, options.seconds, options.latencies, options.output = 1, 1.0, 30, None
    return options


def command(arguments: Sequence[str] | None) -> str:
    """Return the command line, as it may be repeated; a URL may hold a password, and is left out."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for place, word in enumerate(words):
        if word == "--database-url":
            words[place + 1] = "URL"
        elif word.startswith("--database-url="):
            words[place] = "--database-url=URL"
    return shlex.join(["python", "benchmarks/compare.py", *words])


Key = tuple[str, str, int]
"""Database, contestant, in flight."""


class Race:
    """All rounds of all contestants."""

    def __init__(self, options: argparse.Namespace, databases: dict[str, Databases]) -> None:
        self._options = options
        self._databases = databases
        self._rates: dict[Key, float] = {}
        """Tasks per second, of the last measurement."""
        self.failures: list[str] = []

    def run(self) -> Iterator[Measurement]:
        """Measure, and give what counts."""
        first = 1 if self._options.quick else UNCOUNTED
        for number in range(first, self._options.rounds + 1):
            for key in self._turns(number):
                measurement = self._measure(key, number)
                if measurement is not None and number != UNCOUNTED:
                    yield measurement

    def _turns(self, number: int) -> Iterator[Key]:
        """Give those that are compared with each other one right after the other, the other way round each round."""
        names = [name for name in TURNS if not self._options.only or name in self._options.only]
        if number % 2:
            names.reverse()
        for database in self._databases:
            for in_flight in self._options.in_flight or IN_FLIGHT:
                for name in names:
                    entrant = ENTRANTS.get(name, IDLE)
                    if database in entrant.classes and in_flight in entrant.in_flight:
                        yield database, name, in_flight

    def _measure(self, key: Key, number: int) -> Measurement | None:
        database, name, in_flight = key
        flows = self._options.latencies if name == EBBS_IDLE else self._flows(key)
        databases = self._databases[database]
        try:
            found = run_contestant(name, databases.create(with_schema=False), in_flight, flows)
        except ContestantError as error:
            self.failures.append(f"{database}, {name}, {in_flight} in flight, round {number}: {error}")
            print(self.failures[-1], flush=True)
            return None
        finally:
            databases.clear()  # on PostgreSQL this is a checkpoint as well: the next one does not pay for this one
        measurement = Measurement(database, name, in_flight, number, **found)
        if name != EBBS_IDLE:
            self._rates[key] = measurement.rate
        print(f"round {number}  {measurement}", flush=True)
        return measurement

    def _flows(self, key: Key) -> int:
        """Return how many flows last as long as they should: twice the number in flight at least."""
        in_flight = key[2]
        rate = self._rates.get(key, ENTRANTS[key[1]].rate)
        return in_flight * max(2, math.ceil(rate * self._options.seconds / TASKS / in_flight))


class ContestantError(Exception):
    """A contestant has not done the work; the message says what it said."""


def run_contestant(name: str, url: str, in_flight: int, flows: int) -> dict[str, Any]:
    """Run one contestant once, in a process of its own, and return what it has printed.

    Raises:
        ContestantError: it ended in an error, or not at all.
    """
    words = [name, "--database-url", url, "--in-flight", str(in_flight), "--flows", str(flows)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.contestants.run", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ContestantError(f"has not ended after {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise ContestantError("\n".join(done.stderr.strip().splitlines()[-10:]))
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
