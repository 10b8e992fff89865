"""The list of executions: one line each, and below it the way out of each failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ebbs_and_flows.cli.details import re_run_command
from ebbs_and_flows.cli.terminal import cell, distance, duration, open_console, print_trimmed, safe, status_text
from ebbs_and_flows.errors import UnknownExecutionError
from ebbs_and_flows.executions import RUNNABLE_STATUSES, FlowExecution, FlowStatus
from ebbs_and_flows.service import FlowService

EXPLAINED = frozenset({FlowStatus.FAILED, FlowStatus.RESCHEDULED, FlowStatus.CANCELLED})
"""The statuses whose reason is worth a look."""

NARROW = 110
"""Below this many columns a reason in the table would be cut to a few letters; it stands below the table anyway."""

UNCUT = 10_000
"""Columns that no table needs: where stdout is no terminal, nothing is cut."""


@dataclass(frozen=True)
class ListedRun:
    """An execution, and what its history says of where it stands."""

    execution: FlowExecution
    task_name: str | None
    """The task that runs now, failed, or runs next, as far as it has been started once."""
    reason: str | None
    """Why it has its status."""

    @property
    def step(self) -> str:
        """Where it stands, counted from 1: 2/… until all are done, since only its application knows the template."""
        index = self.execution.current_task_index
        return f"{index}/{index}" if self.execution.status is FlowStatus.SUCCEEDED else f"{index + 1}/…"

    def when(self, now: datetime) -> str:
        """When its status changed; for one that waits, when it is due."""
        execution = self.execution
        if execution.status in RUNNABLE_STATUSES and execution.run_at > now:
            return f"due {distance(execution.run_at, now)}"
        return distance(execution.updated_at, now)

    def took(self, now: datetime) -> str:
        """From its first start to its end, or to now while it runs."""
        execution = self.execution
        end = now if execution.status is FlowStatus.RUNNING else execution.finished_at
        if execution.started_at is None or end is None:
            return ""
        return duration((end - execution.started_at).total_seconds())


def look_up(service: FlowService, execution: FlowExecution) -> ListedRun:
    """Read from the history of an execution where it stands and why."""
    task_name = reason = None
    try:
        if execution.started_at is not None and execution.status is not FlowStatus.SUCCEEDED:
            for attempt in service.get_task_executions(execution.execution_id):
                if attempt.task_index == execution.current_task_index:
                    task_name = attempt.name
        if execution.status in EXPLAINED:
            reason = service.get_flow_status_history(execution.execution_id)[-1].reason
    except UnknownExecutionError:
        pass  # deleted since it was found
    return ListedRun(execution, task_name, reason)


def print_rows(rows: Sequence[ListedRun], now: datetime) -> None:
    """Print the table, and below it the commands that re-run what failed."""
    console = open_console(needed_width=UNCUT)
    _print_table(console, rows, now)
    failed = [row for row in rows if row.execution.status is FlowStatus.FAILED]
    for row in failed:
        execution_id = row.execution.execution_id
        where = f" at {safe(row.task_name)}" if row.task_name is not None else ""
        console.print()
        console.print(
            Text.assemble((f"{execution_id} failed{where}: ", "bold"), safe(row.reason or "no reason is recorded"))
        )
        console.print(f"  re-run: {safe(re_run_command(execution_id, row.reason))}")
        console.print(f"  more:   ebbs runs show {execution_id}")


def _print_table(console: Console, rows: Sequence[ListedRun], now: datetime) -> None:
    with_reason = console.width >= NARROW and any(row.reason for row in rows)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("template", min_width=8)
    table.add_column("status", no_wrap=True)
    table.add_column("step", min_width=6)
    table.add_column("when", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    if with_reason:
        table.add_column("reason", min_width=10)
    for row in rows:
        execution = row.execution
        cells = [
            cell(str(execution.execution_id)),
            cell(execution.template_name),
            status_text(execution.status),
            cell(f"{row.step} {row.task_name or ''}".rstrip()),
            cell(row.when(now), "dim"),
            cell(row.took(now)),
        ]
        if with_reason:
            cells.append(cell(row.reason or ""))
        table.add_row(*cells)
    print_trimmed(console, table)
