"""What is written where: data on stdout, messages on stderr, and no text from the database that could do anything."""

from __future__ import annotations

import os
import sys
from datetime import datetime

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from ebbs_and_flows.executions import FlowStatus, TaskStatus

WIDTH_OF_A_FILE = 120
"""Columns where stdout is no terminal, and neither COLUMNS nor the data ask for more."""

STYLES: dict[FlowStatus | TaskStatus, str] = {
    FlowStatus.CREATED: "dim",
    FlowStatus.SCHEDULED: "blue",
    FlowStatus.RUNNING: "cyan",
    FlowStatus.SUCCEEDED: "green",
    FlowStatus.FAILED: "bold red",
    FlowStatus.RESCHEDULED: "yellow",
    FlowStatus.CANCELLED: "magenta",
}
"""By status; an attempt's statuses are equal to those of an execution."""


def open_console(*, needed_width: int | None = None) -> Console:
    """A console on stdout that interprets nothing in what it prints.

    Args:
        needed_width: how wide the output is to be where stdout is no terminal.
    """
    console = Console(
        file=sys.stdout,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=False,
        # NO_COLOR asks for no colours (https://no-color.org); rich would leave bold and dim in.
        color_system=None if os.environ.get("NO_COLOR") else "auto",
    )
    if not console.is_terminal:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() and int(columns) > 0 else WIDTH_OF_A_FILE
        console.width = max(width, needed_width or 0)
    return console


def print_trimmed(console: Console, block: RenderableType) -> None:
    """Print a table or the like without the spaces that fill up its lines."""
    with console.capture() as capture:
        console.print(block)
    for line in capture.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")


def say(message: str) -> None:
    """Write one message to stderr."""
    typer.echo(safe(message), err=True)


def safe(text: str) -> str:
    """The text on one line, with all that `repr` would escape escaped: control characters, bidi overrides, newlines.

    So it can neither move the cursor, nor change a colour, nor hide or reorder what stands beside it.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def safe_lines(text: str) -> list[str]:
    """The lines of a longer text, each of them safe; tabs become spaces."""
    return [safe(line.rstrip("\r").expandtabs(4)) for line in text.rstrip("\n").split("\n")]


def one_line(text: str) -> str:
    """A message of several lines as one, without the spaces that were there for its layout."""
    return " ".join(text.split())


def cell(text: str, style: str = "") -> Text:
    """Text from the database for a column that may be too narrow for it."""
    return Text(safe(text), style=style, no_wrap=True, overflow="ellipsis")


def status_text(status: FlowStatus | TaskStatus) -> Text:
    """A status in its colour."""
    return Text(str(status), style=STYLES[status], no_wrap=True)


def duration(seconds: float) -> str:
    """A duration in at most seven characters: 12ms, 1.2s, 3m04s, 5h03m, 12d04h."""
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def moment(at: datetime, now: datetime) -> str:
    """A time and how far from now it is: 2026-11-23 20:15:29 UTC (3m04s ago)."""
    return f"{at:%Y-%m-%d %H:%M:%S} UTC ({distance(at, now)})"


def distance(at: datetime, now: datetime) -> str:
    """How far a time is from now: 3m04s ago, in 12ms."""
    seconds = (now - at).total_seconds()
    return f"{duration(seconds)} ago" if seconds >= 0 else f"in {duration(-seconds)}"


def can_show(console: Console, characters: str) -> bool:
    """Whether the console's encoding has these characters."""
    try:
        characters.encode(console.encoding)
    except (LookupError, UnicodeEncodeError):
        return False
    return True
