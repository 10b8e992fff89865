"""Findings as they are printed: below each other on a terminal, and each on one line elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ebbs_and_flows.cli.terminal import cell, open_console, print_trimmed, safe
from ebbs_and_flows.diagnosis import Verdict

STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red"}

UNCUT = 10_000
"""Columns that no line needs: where stdout is no terminal, each finding is one line."""


@dataclass(frozen=True)
class Entry:
    """One finding."""

    verdict: Verdict
    name: str
    found: str
    details: tuple[Text, ...] = ()
    """More of what was found; each on a line of its own on a terminal."""
    advice: str | None = None


def print_entries(entries: Iterable[Entry], schema: str | None, *, name_width: int | None = None) -> None:
    """Print findings to stdout.

    Args:
        schema: the named schema, for the commands that are advised.
        name_width: columns for names at most, on a terminal; default as many as they need.
    """
    console = open_console(needed_width=UNCUT)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, max_width=name_width if console.is_terminal else None)
    table.add_column(overflow="fold")
    for entry in entries:
        said = Text(safe(entry.found))
        for detail in entry.details:
            said.append("\n" if console.is_terminal else "; ").append_text(detail)
        if entry.advice is not None:
            # Below it on a terminal and beside it elsewhere: the way out.
            said.append("\n-> " if console.is_terminal else " -> ", style="bold")
            said.append(safe(_for_schema(entry.advice, schema)), "bold" if entry.verdict is Verdict.PROBLEM else "")
        table.add_row(Text(str(entry.verdict), style=STYLES[entry.verdict]), cell(entry.name), said)
    print_trimmed(console, table)


def tally(verdicts: Iterable[Verdict]) -> str:
    """How many there are of each, the worst first: 1 problem, 2 warnings, 5 ok."""
    found = list(verdicts)
    counts = [(found.count(verdict), verdict) for verdict in reversed(Verdict)]
    return ", ".join(f"{number} {_plural(verdict, number)}" for number, verdict in counts if number)


def _for_schema(advice: str, schema: str | None) -> str:
    if schema is None:
        return advice
    return advice.replace('"ebbs db upgrade"', f'"ebbs db upgrade --schema {schema}"')


def _plural(verdict: Verdict, number: int) -> str:
    return str(verdict) if verdict is Verdict.OK or number == 1 else f"{verdict}s"
