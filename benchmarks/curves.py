"""What does a step, a claim or a start cost as something grows? Measures the curves of docs/performance.md.

Run it as `python benchmarks/curves.py`: on a PostgreSQL server of its own and on SQLite files; some 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import curves_measures as measures
from benchmarks.curves_flows import call_in_process
from benchmarks.curves_measures import Line, Plan
from benchmarks.servers import Databases, SqliteDatabases, describe, postgres_databases
from ebbs_and_flows import FlowService

OUTPUT = Path(__file__).with_name("curves.json")
PACKAGES = ("ebbs-and-flows", "sqlalchemy", "psycopg", "pydantic")
POSTGRESQL, SQLITE = "PostgreSQL", "SQLite"

CURVE_SECONDS = 900.0
"""How long one curve may take on one database before it is given up."""


@dataclass(frozen=True)
class Curve:
    """A curve: what measures it, where, in what unit, and to what its last point may have grown."""

    measure: Callable[[Databases, Plan], list[Line]]
    what: str
    unit: str
    databases: tuple[str, ...] = (POSTGRESQL, SQLITE)
    at_most: float | None = None
    """The value at the greatest size, divided by that at the smallest one."""
    panels: tuple[str, ...] = ()
    """Those for which this holds; default all."""


CURVES = {
    "in_flight": Curve(measures.in_flight, "tasks/s against executions in flight", "tasks/s"),
    "claim": Curve(measures.claim, "claim time against executions that wait", "ms a claim", at_most=1.3),
    "claim_behind": Curve(measures.claim_behind, "claim time against executions of others in front", "ms a claim"),
    "finished": Curve(measures.finished, "step time against executions that have finished", "ms a step", at_most=1.3),
    "context": Curve(
        measures.context,
        "step time against bytes carried",
        "ms",
        at_most=1.3,
        panels=("run_flow, a step", "Worker, a step"),
    ),
    "tasks": Curve(measures.tasks, "step time against tasks in the flow", "ms a step"),
    "latency": Curve(measures.latency, "from schedule to start, worker idle", "ms"),
    "memory": Curve(measures.memory, "a worker's memory against executions in flight", "MB; s"),
    "processes": Curve(measures.processes, "tasks/s against worker processes", "tasks/s", databases=(POSTGRESQL,)),
}
LATENCY_P50_AT_MOST = 10.0
"""Milliseconds from schedule to start, on PostgreSQL."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write down after each curve what there is, and print the ratios; 1 where a curve could not be had."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no server and no worker is left
    chosen = [name for name in CURVES if not options.only or name in options.only]
    document = begin(options)
    plan = measures.QUICK if options.quick else measures.FULL
    if options.rounds is not None:
        plan = replace(plan, rounds=options.rounds)
    with ExitStack() as stack:
        kinds: dict[str, Databases] = {}
        if not options.sqlite_only:
            kinds[POSTGRESQL] = stack.enter_context(postgres_databases(options.database_url))
        files = stack.enter_context(tempfile.TemporaryDirectory(prefix="curves-", dir=options.folder))
        kinds[SQLITE] = SqliteDatabases(files)
        for name, databases in kinds.items():
            document["databases"][name] = call_in_process(description, databases, seconds=60)
        for name in chosen:
            curve, began = CURVES[name], time.monotonic()
            print(f"\n{name}: {curve.what}", flush=True)
            lines: list[Line] = []
            errors: dict[str, str] = {}
            for databases in [kinds[each] for each in curve.databases if each in kinds]:
                try:
                    found = call_in_process(curve.measure, databases, plan, seconds=CURVE_SECONDS)
                    show(found, curve.unit)
                    lines += found
                except Exception:
                    errors[databases.name] = traceback.format_exc()
                    print(f"  {databases.name}: FAILED\n{errors[databases.name]}", flush=True)
                databases.clear()
            document["curves"][name] = {
                "what": curve.what,
                "unit": curve.unit,
                "command": f"python benchmarks/curves.py --only {name}",
                "measured_at": now(),
                "is_quick": options.quick,
                "seconds": round(time.monotonic() - began, 1),
                "lines": [asdict(line) for line in lines],
                "errors": errors,
            }
            document["ratios"] = ratios(document["curves"])
            write(options.output, document)
    print()
    for each in document["ratios"]:
        print(said(each))
    failed = [name for name in chosen if document["curves"][name]["errors"]]
    print(f"\n{options.output}", f"without some of {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--database-url", metavar="URL", help="a PostgreSQL server, as a role that may create databases")
    where.add_argument("--sqlite-only", action="store_true", help="leave PostgreSQL out")
    parser.add_argument("--folder", help="where SQLite's files are made: on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: under two minutes")
    parser.add_argument("--rounds", type=int, help="default 7")
    parser.add_argument("--only", metavar="NAME", action="append", choices=CURVES, help=f"of {', '.join(CURVES)}")
    parser.add_argument("--output", type=Path, help=f"default {OUTPUT.name} beside this file; a temporary one if quick")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path(tempfile.gettempdir(), "ebbs-curves-quick.json") if options.quick else OUTPUT
    return options


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """The document to write: a new one, or with `--only` the one that is there, of which those curves are replaced."""
    before: dict[str, Any] = {}
    if options.only and options.output.exists():
        before = json.loads(options.output.read_text())
    rounds = [] if options.rounds is None else ["--rounds", str(options.rounds)]
    return {
        "command": " ".join(["python", "benchmarks/curves.py", *["--quick"] * options.quick, *rounds]),
        "measured_at": now(),
        "machine": {
            "system": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gb": memory_gb(),
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "databases": before.get("databases", {}),
        "curves": before.get("curves", {}),
        "ratios": before.get("ratios", []),
    }


def description(databases: Databases) -> dict[str, str]:
    """What the databases are, said by one of them."""
    with FlowService(databases.create()) as service:
        return describe(service.engine)


def show(lines: Sequence[Line], unit: str) -> None:
    """Print what was seen: medians, and their range."""
    for line in lines:
        name = ", ".join(filter(None, (line.database, line.panel, line.variant)))
        print(f"  {name} ({unit})")
        for size, values in sorted(line.points.items()):
            if size == 0 and len(line.points) == 1:
                print(f"    p50 {percentile(values, 50):.2f}, p99 {percentile(values, 99):.2f} of {len(values)}")
            else:
                print(f"    {size:>12,}  {statistics.median(values):12,.3f}  {min(values):,.3f} to {max(values):,.3f}")
    sys.stdout.flush()


# --- ratios -----------------------------------------------------------------------------------------------------------


def ratios(curves: dict[str, Any]) -> list[dict[str, Any]]:
    """How far each line has grown from its smallest size to its greatest one, round by round; and the latencies."""
    found = []
    for name, measured in curves.items():
        curve = CURVES[name]
        for line in measured["lines"]:
            title = ", ".join(filter(None, (name, line["database"], line["panel"], line["variant"])))
            points = {int(size): values for size, values in line["points"].items()}
            if name == "latency":
                for percent in (50, 99):
                    is_bound = percent == 50 and line["database"] == POSTGRESQL
                    value = percentile(points[0], percent)
                    found.append(
                        {
                            "name": f"{title}, p{percent}, ms",
                            "value": round(value, 3),
                            "at_most": LATENCY_P50_AT_MOST if is_bound else None,
                        }
                    )
            elif len(points) > 1:
                least, most = min(points), max(points)
                each_round = [there / here for there, here in zip(points[most], points[least], strict=True)]
                is_bound = not curve.panels or line["panel"] in curve.panels
                found.append(
                    {
                        "name": f"{title}: {most:,} against {least:,}",
                        "value": round(statistics.median(each_round), 3),
                        "range": [round(min(each_round), 3), round(max(each_round), 3)],
                        "at_most": curve.at_most if is_bound else None,
                    }
                )
    return found


def said(ratio: dict[str, Any]) -> str:
    """One ratio in a line."""
    line = f"{ratio['value']:10.2f}  {ratio['name']}"
    if "range" in ratio:
        line += f" ({ratio['range'][0]:.2f} to {ratio['range'][1]:.2f})"
    if ratio["at_most"] is not None:
        line += f"; at most {ratio['at_most']:g}: {'held' if ratio['value'] <= ratio['at_most'] else 'NOT HELD'}"
    return line


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many per cent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


# --- the document -----------------------------------------------------------------------------------------------------


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace the file, never leaving half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(document, indent=1, default=str) + "\n")
    partial.replace(path)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def memory_gb() -> float | None:
    """The machine's memory, where the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())
