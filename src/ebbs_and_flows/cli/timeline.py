"""Attempts as bars on one time scale, the waits between them dotted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ebbs_and_flows.executions import TaskExecution

LONGEST_WAIT_SECONDS = 60.0
"""A longer wait may be drawn shorter than it was, where it would leave no room for the rest."""

BROKEN_SHARE = 0.25
"""How long such a wait is drawn, as a share of all that is drawn to scale."""


@dataclass(frozen=True)
class Glyphs:
    """The characters of a bar; a character cell has two halves."""

    full: str
    left: str
    right: str
    wait: str
    broken: str


LINES = Glyphs("━", "╸", "╺", "┄", "//")
ASCII = Glyphs("=", "=", "=", ".", "//")


@dataclass(frozen=True)
class Bar:
    """One attempt's part of the scale, and the wait before it."""

    indent: str
    wait: str
    run: str


@dataclass(frozen=True)
class Timeline:
    """The bars of all attempts of one execution.

    Attributes:
        seconds: from the first start to the last end, or to now.
        broken: whether a wait is drawn shorter than it was.
    """

    bars: tuple[Bar, ...]
    seconds: float
    broken: bool


def draw(attempts: Sequence[TaskExecution], now: datetime, width: int, glyphs: Glyphs = LINES) -> Timeline:
    """Draw attempts, oldest first, in so many columns; one that has not ended reaches until now."""
    if not attempts:
        return Timeline((), 0.0, False)
    origin = end = attempts[0].started_at
    waits, runs = [], []
    for attempt in attempts:
        started = max(attempt.started_at, end)
        finished = max(attempt.finished_at or now, started)
        waits.append((started - end).total_seconds())
        runs.append((finished - started).total_seconds())
        end = finished
    drawn_waits, broken = _shortened(waits, sum(runs))
    scale = 2 * width / (sum(drawn_waits) + sum(runs) or 1.0)

    bars = []
    position = 0.0
    for wait, was_broken, run in zip(drawn_waits, broken, runs, strict=True):
        waited_from = _half(position * scale, width)
        position += wait
        first = _half(position * scale, width)
        position += run
        last = max(first + 1, min(round(position * scale), 2 * width))
        bars.append(_bar(waited_from, first, last, glyphs, was_broken))
    return Timeline(tuple(bars), (end - origin).total_seconds(), any(broken))


def _shortened(waits: Sequence[float], running: float) -> tuple[list[float], list[bool]]:
    """The waits as they are drawn, and which of them are shorter than they were.

    A flow that failed at night and was re-run in the morning has waited for hours between seconds of work.
    """
    to_scale = running
    limit = float("inf")
    for wait in sorted(waits):
        if wait > LONGEST_WAIT_SECONDS and wait > 4 * to_scale:
            limit = wait
            break
        to_scale += wait
    broken = [wait >= limit for wait in waits]
    return [BROKEN_SHARE * to_scale if cut else wait for wait, cut in zip(waits, broken, strict=True)], broken


def _half(position: float, width: int) -> int:
    """The half cell at a position; the last one is left for what begins at the very end."""
    return min(round(position), 2 * width - 1)


def _bar(waited_from: int, first: int, last: int, glyphs: Glyphs, broken: bool) -> Bar:
    """A bar of the half cells from `first` to before `last`, after a wait since `waited_from`."""
    begins = first // 2
    run = glyphs.right if first % 2 else ""
    full, half = divmod(last - first - (first % 2), 2)
    run += glyphs.full * full + (glyphs.left if half else "")
    indent = min((waited_from + 1) // 2, begins)
    wait = glyphs.wait * (begins - indent)
    if broken and len(wait) >= len(glyphs.broken):
        middle = (len(wait) - len(glyphs.broken)) // 2
        wait = wait[:middle] + glyphs.broken + wait[middle + len(glyphs.broken) :]
    return Bar(" " * indent, wait, run)
