"""One execution on one page: where it stands, its attempts, its status changes, its failure, its context, what next."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ebbs_and_flows.cli.terminal import (
    STYLES,
    can_show,
    cell,
    distance,
    duration,
    moment,
    open_console,
    print_trimmed,
    safe,
    safe_lines,
    status_text,
)
from ebbs_and_flows.cli.timeline import ASCII, LINES, draw
from ebbs_and_flows.codec import EncodedValue
from ebbs_and_flows.executions import (
    RUNNABLE_STATUSES,
    FlowExecution,
    FlowStatus,
    FlowTransition,
    TaskExecution,
    TaskStatus,
)
from ebbs_and_flows.registry import is_builtin_name

LAST_LINES = 8
"""How many lines of a traceback are shown unless all are asked for: the error stands at its end."""

LONGEST_PREVIEW = 1_000
"""Characters of a value that are looked at for its one line."""

WIDE = 110
"""From so many columns on there is room for the error's type beside the bar."""


def print_run(
    execution: FlowExecution,
    attempts: Sequence[TaskExecution],
    transitions: Sequence[FlowTransition],
    now: datetime,
    *,
    full: bool = False,
) -> None:
    """Print an execution with its history.

    Args:
        attempts, transitions: all of them, oldest first.
        now: what times are compared to.
        full: whether to print all of the traceback and of each value.
    """
    console = open_console()
    _print_state(console, execution, attempts, transitions, now)
    _print_attempts(console, attempts, now)
    _print_transitions(console, transitions)
    _print_failure(console, execution, attempts, full=full)
    _print_context(console, execution, full=full)
    _print_what_next(console, execution, transitions[-1].reason if transitions else None, now)


def _print_state(
    console: Console,
    execution: FlowExecution,
    attempts: Sequence[TaskExecution],
    transitions: Sequence[FlowTransition],
    now: datetime,
) -> None:
    title = Text.assemble(f"execution {execution.execution_id} of ", (safe(execution.template_name), "bold"), "  ")
    title.append_text(status_text(execution.status))
    at = [attempt.name for attempt in attempts if attempt.task_index == execution.current_task_index]
    if at and execution.status is not FlowStatus.SUCCEEDED:
        title.append(f" at {safe(at[-1])}")
    console.print(title)
    reason = transitions[-1].reason if transitions else None
    if reason:
        console.print(Text(safe(reason), style=STYLES[execution.status]))
    console.print()

    facts = [("created", moment(execution.created_at, now))]
    if execution.status in RUNNABLE_STATUSES:
        facts.append(("due", moment(execution.run_at, now)))
    if execution.started_at is not None:
        facts.append(("started", moment(execution.started_at, now)))
    if execution.finished_at is not None:
        end = moment(execution.finished_at, now)
        if execution.started_at is not None:
            end += f", took {duration((execution.finished_at - execution.started_at).total_seconds())}"
        facts.append(("finished", end))
    facts.append(("queue", f"{execution.queue}, priority {execution.priority}"))
    if execution.idempotency_key is not None:
        facts.append(("key", execution.idempotency_key))
    if execution.lease_owner is not None:
        facts.append(("worker", execution.lease_owner))
    if execution.lease_expires_at is not None:
        facts.append(("lease until", moment(execution.lease_expires_at, now)))
    table = _table()
    for name, value in facts:
        table.add_row(Text(f"  {name}", style="dim"), Text(safe(value), overflow="fold"))
    print_trimmed(console, table)


def _print_attempts(console: Console, attempts: Sequence[TaskExecution], now: datetime) -> None:
    if not attempts:
        return
    origin = attempts[0].started_at
    is_wide = console.width >= WIDE
    errors = [safe(attempt.error_type or "") for attempt in attempts]
    names = [cell(attempt.name) for attempt in attempts]
    name_width = max(4, min(max(name.cell_len for name in names), console.width // 4))
    error_width = min(max(len(error) for error in errors), console.width // 5) if is_wide else 0
    # The other columns: try, status, at, took, and two spaces after each column.
    width = console.width - (2 + name_width + 2) - (3 + 2) - (9 + 2) - (8 + 2) - (7 + 2)
    width -= error_width + 2 if error_width else 0
    glyphs = LINES if can_show(console, "━╸╺┄") else ASCII
    timeline = draw(attempts, now, max(width, 8), glyphs)

    table = _table(header=True)
    table.add_column(Text("  task"), width=name_width + 2)
    table.add_column("try", justify="right", width=3)
    table.add_column("status", width=9)
    table.add_column("at", justify="right", width=8)
    table.add_column("took", justify="right", width=7)
    table.add_column(_scale(timeline.seconds, max(width, 8)), no_wrap=True)
    if error_width:
        table.add_column("error", width=error_width)
    for attempt, name, error, bar in zip(attempts, names, errors, timeline.bars, strict=True):
        took = ((attempt.finished_at or now) - attempt.started_at).total_seconds()
        style = STYLES[FlowStatus(attempt.status)]
        cells = [
            Text.assemble("  ", name, no_wrap=True, overflow="ellipsis"),
            Text(str(attempt.attempt)),
            status_text(attempt.status),
            Text(f"+{duration((attempt.started_at - origin).total_seconds())}"),
            Text(duration(took)),
            Text.assemble(bar.indent, (bar.wait, "dim"), (bar.run, style), no_wrap=True, overflow="crop"),
        ]
        if error_width:
            cells.append(cell(error, style))
        table.add_row(*cells)
    _print_heading(console, "attempts")
    print_trimmed(console, table)
    if timeline.broken:
        console.print(Text("  // a long wait, not to scale", style="dim"))


def _scale(seconds: float, width: int) -> Text:
    """The heading of the bars: from 0 to how long it took in all."""
    end = duration(seconds)
    return Text(f"0{end.rjust(width - 1)}" if width > len(end) + 1 else "", no_wrap=True)


def _print_transitions(console: Console, transitions: Sequence[FlowTransition]) -> None:
    _print_heading(console, "status")
    table = _table()
    for transition in transitions:
        because = safe(transition.reason or "")
        if transition.worker is not None and not because:
            because = f"by {safe(transition.worker)}"
        table.add_row(
            Text(f"  {transition.flow_execution_step}", style="dim", justify="right"),
            Text(f"{transition.at:%m-%d %H:%M:%S.%f}"[:-3], style="dim", no_wrap=True),
            status_text(transition.to_status),
            Text(because, overflow="fold"),
        )
    print_trimmed(console, table)


def _print_failure(
    console: Console, execution: FlowExecution, attempts: Sequence[TaskExecution], *, full: bool
) -> None:
    failed = [attempt for attempt in attempts if attempt.status is TaskStatus.FAILED and attempt.output]
    if not failed or execution.status is FlowStatus.SUCCEEDED:
        return
    last = failed[-1]
    lines = safe_lines(last.output or "")
    if not full:
        lines = [
            line for line in lines if line.strip(" ^~")
        ]  # of the marks below the code nothing is left when it wraps
    left_out = 0 if full else max(0, len(lines) - LAST_LINES)
    _print_heading(console, f"failure of {safe(last.name)}, attempt {last.attempt}")
    if left_out:
        console.print(Text(f"  ... {left_out} more lines with --full", style="dim"))
    for line in lines[left_out:]:
        indent = len(line) - len(line.lstrip(" "))
        print_trimmed(console, Padding(Text(line.lstrip(" "), overflow="fold"), (0, 0, 0, 2 + min(indent, 20))))


def _print_context(console: Console, execution: FlowExecution, *, full: bool) -> None:
    entries = execution.execution_context.encode()
    if not entries:
        return
    _print_heading(console, "context")
    table = _table(header=True)
    table.add_column("  name", max_width=2 + max(8, console.width // 4))
    table.add_column("type", max_width=max(8, console.width // 5))
    table.add_column("value")
    for name, encoded in entries.items():
        shown = value_text(encoded, None if full else LONGEST_PREVIEW)
        table.add_row(
            Text.assemble("  ", cell(name), no_wrap=True, overflow="ellipsis"),
            cell(encoded.type_name, "" if is_builtin_name(encoded.type_name) else "magenta"),
            Text(shown, overflow="fold") if full else Text(shown, no_wrap=True, overflow="ellipsis"),
        )
    print_trimmed(console, table)


def value_text(encoded: EncodedValue, limit: int | None) -> str:
    """A stored value as one safe line of JSON, of at most `limit` characters before escaping."""
    node = encoded.node
    if limit is not None and isinstance(node, str):
        node = node[: limit + 1]
    try:
        text = json.dumps(node, ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # a row that was altered by hand
        text = f"<cannot be shown: {type(error).__name__}>"
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return safe(text)


def _print_what_next(console: Console, execution: FlowExecution, reason: str | None, now: datetime) -> None:
    lines = _what_next(execution, reason, now)
    if lines:
        console.print()
    for line in lines:
        console.print(Text(safe(line), style="bold"))


def re_run_command(execution_id: int, reason: str | None) -> str:
    """The command that re-runs what has failed, from the task that the reason names if it names one: where the template
    has changed, an execution cannot go on where it was.
    """
    named = _FROM_TASK.search(reason or "")
    further_back = f" --from-task {shlex.quote(named[2])}" if named else ""
    return f"ebbs runs reschedule {execution_id}{further_back}"


_FROM_TASK = re.compile(r"""^TemplateMismatchError: .* from_task=(['"])([^\\]*)\1$""", re.DOTALL)


def _what_next(execution: FlowExecution, reason: str | None, now: datetime) -> list[str]:
    """What follows, and the command for it where it takes a person."""
    execution_id, status = execution.execution_id, execution.status
    if status is FlowStatus.FAILED:
        lines = [f"re-run: {re_run_command(execution_id, reason)}"]
        if execution.current_task_index > 0:
            lines.append("        --from-task NAME goes further back")
        return lines
    if status is FlowStatus.CREATED:
        return ["It is not scheduled yet: nothing runs it before that."]
    if status in RUNNABLE_STATUSES:
        if execution.run_at > now:
            return [f"It is due {distance(execution.run_at, now)}."]
        since = duration((now - execution.run_at).total_seconds())
        queue = f"takes from queue {execution.queue!r}"
        return [f"It is due since {since}, and waits for a process that has its template and {queue}."]
    if status is FlowStatus.RUNNING and execution.lease_expires_at is not None:
        expiry = distance(execution.lease_expires_at, now)
        if execution.lease_expires_at > now:
            return [f"Its worker holds it: the lease expires {expiry}, unless it is renewed."]
        way_out = f"runner.recover({execution_id}), or end it with ebbs runs cancel {execution_id}"
        return [
            f"Its lease expired {expiry}: the worker is lost, and any other one that has the template takes over.",
            f"If none does: start one, or take it over with {way_out}.",
        ]
    return []


def _print_heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _table(*, header: bool = False) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=header)
