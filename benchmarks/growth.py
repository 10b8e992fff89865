"""Does a step cost what it adds, or what the flow has become? A long flow with a large context, timed task by task.

Run it as `python benchmarks/growth.py`, and with `--database-url URL` on PostgreSQL.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowStatus, FlowTemplate, Task, schema

HUNDRED = 100


class Grow(Task):
    """Adds one entry."""

    def __init__(self, index: int, starts: list[float]) -> None:
        self.index = index
        self.starts = starts

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.starts.append(time.perf_counter())
        return context.copy({f"added-{self.index}": self.index})


class Replace(Grow):
    """Adds one entry and drops the oldest one, so that the context keeps its size."""

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.starts.append(time.perf_counter())
        smaller = context.without(next(iter(context)))
        smaller.set(f"added-{self.index}", self.index)
        return smaller


VARIANTS = {"grow": Grow, "replace": Replace}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=options.folder) as folder:
        url = options.database_url or f"sqlite:///{Path(folder) / 'flows.db'}"
        schema.upgrade(url)
        with FlowService(url) as service:
            print(service.engine.url.render_as_string(hide_password=True))
            print(
                f"{options.tasks:,} tasks, {options.entries:,} entries to begin with, median of {options.repeats} runs;"
            )
            print("milliseconds a task, from its start to the start of the next one")
            for variant in options.variant or VARIANTS:
                report(variant, measure(service, variant, options))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database-url", metavar="URL", help="default: an SQLite file in a temporary folder")
    parser.add_argument("--folder", help="where that temporary folder is made: on the disk to be measured")
    parser.add_argument("--tasks", type=int, default=1000, help="a multiple of 100; default 1000")
    parser.add_argument("--entries", type=int, default=1000, help="in the context at the beginning; default 1000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: both")
    options = parser.parse_args(arguments)
    if options.tasks < 2 * HUNDRED or options.tasks % HUNDRED:
        parser.error("--tasks is a multiple of 100, at least 200")
    return options


Run = tuple[list[float], list[float]]
"""Milliseconds a task in each hundred: by this process's clock, and by the times in the database."""


def measure(service: FlowService, variant: str, options: argparse.Namespace) -> list[Run]:
    starts: list[float] = []
    runner = FlowRunner(service)
    template = FlowTemplate(f"growth-{variant}-{options.tasks}")
    for index in range(options.tasks + 1):  # one more, whose start is the end of the last one
        template.add_task(VARIANTS[variant](index, starts), name=f"task-{index}")
    runner.register_flow_template(template)
    entries = {f"entry-{index}": f"value {index}" for index in range(options.entries)}
    return [run_once(service, runner, template, entries, starts) for _ in range(options.repeats)]


def run_once(
    service: FlowService, runner: FlowRunner, template: FlowTemplate, entries: dict[str, str], starts: list[float]
) -> Run:
    starts.clear()
    execution_id = runner.schedule_flow(template.name, ExecutionContext(entries))
    execution = runner.run_flow()
    if execution is None or execution.execution_id != execution_id or execution.status is not FlowStatus.SUCCEEDED:
        raise SystemExit(f"execution {execution_id} has not run to its end: is another one of {template.name} waiting?")
    attempts = service.get_task_executions(execution_id)
    begun = [attempt.started_at.timestamp() for attempt in attempts]
    return milliseconds_by_hundred(starts), milliseconds_by_hundred(begun)


def milliseconds_by_hundred(starts: Sequence[float]) -> list[float]:
    return [(starts[first + HUNDRED] - starts[first]) * 1000 / HUNDRED for first in range(0, len(starts) - 1, HUNDRED)]


def report(variant: str, runs: list[Run]) -> None:
    here = [statistics.median(each) for each in zip(*(run[0] for run in runs), strict=True)]
    there = [statistics.median(each) for each in zip(*(run[1] for run in runs), strict=True)]
    print(f"\n{variant}: each task {(VARIANTS[variant].__doc__ or '').lower().rstrip('.')}")
    print(f"{'tasks':>12}  {'perf_counter':>12}  {'database':>8}")
    for number, (own, database) in enumerate(zip(here, there, strict=True)):
        print(f"{f'{number * HUNDRED + 1}-{(number + 1) * HUNDRED}':>12}  {own:12.3f}  {database:8.3f}")
    ratios = [run[0][-1] / run[0][0] for run in runs]
    print(f"last hundred / first hundred: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
