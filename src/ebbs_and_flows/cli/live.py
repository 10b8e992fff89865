"""The live view of a worker: what it has in flight, how fast it is, and its log, on one screen that fits any terminal.

While it is shown, whatever this process and its children write to stdout or stderr goes through a pipe into the log at
its foot: log records, prints, the last words of C code. So nothing can disturb the screen. At the end the terminal is
as it was, with the last lines of the log below.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ebbs_and_flows.cli.terminal import can_show, cell, duration, one_line, open_console, safe, say
from ebbs_and_flows.health import InFlight, WorkerHealth
from ebbs_and_flows.logs import logger
from ebbs_and_flows.worker import Worker

REFRESH_SECONDS = 0.25

RATE_SECONDS = 5.0
"""Over how long attempts per second are counted."""

SILENT_SECONDS = 5.0
"""From when on it is worth a word that the database has not been heard of."""

LOG_LINES = 8
"""How many lines of the log are shown where there is room for them."""

LOG_INDENT = 10
"""Columns before a line's text: those of the time."""

KEPT_LINES = 200
"""How many are kept for a taller terminal."""

ABOVE_THE_TABLE = 7
"""Lines: the title, what is in flight, the database, two of counts, and two that are empty."""

LOG_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red", "DEBUG": "dim"}

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT(\d\d:\d\d:\d\d)\.\d+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)", re.DOTALL)
"""A record as `logs.TextFormatter` writes it."""


def can_be_live() -> bool:
    """Whether stdout is a terminal that can be drawn on."""
    if not sys.stdout.isatty():
        return False
    console = open_console()
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


@contextmanager
def live_view(worker: Worker) -> Iterator[None]:
    """Show a worker while the block lasts; leave the terminal as it was, with the last lines of its log below."""
    captured = Captured()
    console = open_console()  # while stdout is the terminal yet
    try:
        with captured.capture() as terminal:
            console.file = terminal
            with _drawn(View(worker, captured.lines), console, terminal):
                yield
    finally:
        if sys.stderr.isatty():  # elsewhere they are already
            with suppress(OSError):  # the terminal may have been closed
                for line in list(captured.lines)[-LOG_LINES:]:
                    say(line)


class Captured:
    """What this process and its children write to stdout and stderr, line by line.

    The file descriptors themselves are redirected: so are children, C code, and handlers that hold the streams.
    """

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)

    @contextmanager
    def capture(self) -> Iterator[io.TextIOWrapper]:
        """Capture while the block lasts; gives the terminal that was stdout. A stderr that is none stays as it is."""
        stdout, stderr = os.dup(1), os.dup(2)
        copy_to = None if os.isatty(stderr) else stderr
        reading, writing = os.pipe()
        _flush()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        reader = threading.Thread(target=self._read, args=(reading, copy_to), name="ebbs captured output", daemon=True)
        reader.start()
        terminal = os.fdopen(stdout, "w", encoding=sys.stdout.encoding or "utf-8", errors="backslashreplace")
        try:
            yield terminal
        finally:
            _flush()
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            with suppress(OSError):  # the terminal may be gone
                terminal.close()
            reader.join(1.0)  # a child that is still there may hold the other end
            if not reader.is_alive():
                os.close(stderr)

    def _read(self, reading: int, copy_to: int | None) -> None:
        with open(reading, encoding="utf-8", errors="backslashreplace") as lines:
            for line in lines:
                self.lines.append(line.rstrip("\r\n"))
                if copy_to is not None:
                    with suppress(OSError):
                        os.write(copy_to, line.encode())


class View:
    """What is on the screen: a function of the worker's state, the log, and the time."""

    def __init__(self, worker: Worker, log: Sequence[str] | deque[str]) -> None:
        self._worker = worker
        self._log = log
        self._attempts: deque[tuple[float, int]] = deque()

    def draw(self, console: Console) -> RenderableType:
        """The whole screen, exactly as many lines as the console has."""
        health = self._worker.health()
        in_flight = self._worker.in_flight()
        width, height = console.size
        room = max(0, height - ABOVE_THE_TABLE - 3)  # the table's heading, an empty line, and the last line
        rows = min(room, max(3, min(room - LOG_LINES, room // 2)))
        log_lines = room - rows
        lines: list[RenderableType] = [
            self._title(health, width),
            _load(health, width, console),
            *_database(health, console),
            *_count_lines(health, self._rate(health.attempts)),
            Text(""),
        ]
        if health.is_stopping:  # then all of them are asked to stop
            in_flight = [each.model_copy(update={"is_asked_to_stop": False}) for each in in_flight]
        table = _table(in_flight, rows, width)
        lines += [table, *[Text("")] * (rows - min(len(in_flight), rows) + 1)]
        log = [line for each in list(self._log)[-log_lines:] for line in _log_lines(each, console)]
        log = log[-log_lines:] if log_lines else []
        lines += [*log, *[Text("")] * (log_lines - len(log))]
        lines.append(_last_line(health))
        return Group(*lines)

    def _title(self, health: WorkerHealth, width: int) -> Text:
        up = ""
        if health.started_at is not None:
            up = f"up {duration((datetime.now(timezone.utc) - health.started_at).total_seconds())}"
        state, style = _state(health)
        right = Text.assemble(up, "  ", (state, style))
        left = Text.assemble("worker ", (safe(health.worker), "bold"), no_wrap=True)
        left.truncate(max(0, width - right.cell_len - 4), overflow="ellipsis")
        return Text.assemble(" ", left, " " * (width - left.cell_len - right.cell_len - 2), right, no_wrap=True)

    def _rate(self, attempts: int) -> float:
        """Attempts per second, over the last few."""
        now = time.monotonic()
        self._attempts.append((now, attempts))
        while len(self._attempts) > 2 and self._attempts[1][0] < now - RATE_SECONDS:
            self._attempts.popleft()
        since, before = self._attempts[0]
        return (attempts - before) / (now - since) if now > since else 0.0


def _state(health: WorkerHealth) -> tuple[str, str]:
    if health.is_stopping:
        return "stopping", "bold yellow"
    if not health.is_running:
        return "starting" if health.started_at is None else "ended", "dim"
    return ("running", "green") if health.is_healthy else ("not healthy", "bold red")


def _load(health: WorkerHealth, width: int, console: Console) -> Text:
    """The bar of what is in flight, and from where it is taken."""
    full_glyph, rest_glyph = ("━", "─") if can_show(console, "━─") else ("=", "-")
    length = max(10, min(40, width // 3))
    full = round(length * min(1.0, health.in_flight / health.concurrency))
    if health.in_flight and not full:
        full = 1
    text = Text(" in flight  ", no_wrap=True, overflow="ellipsis")
    text.append(full_glyph * full, style="cyan")
    text.append(rest_glyph * (length - full), style="dim")
    text.append(f"  {health.in_flight}/{health.concurrency}", style="bold")
    text.append(f"  from {', '.join(safe(queue) for queue in health.queues)}")
    return text


def _database(health: WorkerHealth, console: Console) -> list[Text]:
    """Two lines: that it is well, and an empty one; or what it said last."""
    silent = health.seconds_since_database or 0.0
    if health.outage is None:
        answered = f"  answered {duration(silent)} ago" if silent > SILENT_SECONDS else ""
        return [Text.assemble(" database   ", ("ok", "green"), (answered, "yellow"), no_wrap=True), Text("")]
    text = Text(f"does not answer for {duration(silent)}: {safe(one_line(health.outage))}", style="bold red")
    first, second = _two_lines(text, console.width - 13, console)
    return [
        Text.assemble(" database   ", first, no_wrap=True),
        Text.assemble(" " * 12, second or "", no_wrap=True, overflow="ellipsis"),
    ]


def _counts(health: WorkerHealth) -> list[tuple[str, int, str]]:
    return [
        ("claimed", health.claimed, ""),
        ("succeeded", health.succeeded, "green"),
        ("failed", health.failed, "bold red"),
        ("rescheduled", health.rescheduled, "yellow"),
        ("refused", health.refused, "yellow"),
        ("recovered", health.recovered, "yellow"),
    ]


def _count_lines(health: WorkerHealth, rate: float) -> list[Text]:
    """The names of the counts, and below each its number."""
    names, numbers = Text(no_wrap=True), Text(no_wrap=True)
    for name, number, style in _counts(health):
        shown = f"{number:,}"
        width = max(len(name), len(shown))
        names.append(f" {name:>{width}} ", style="dim")
        numbers.append(f" {shown:>{width}} ", style=style if number else "dim")
    names.append("  attempts/s", style="dim")
    numbers.append(f"  {rate:>10,.1f}", style="bold")
    return [names, numbers]


def _table(in_flight: Sequence[InFlight], rows: int, width: int) -> Table:
    """The longest running attempts, and how many more there are."""
    notes = any(each.is_asked_to_stop for each in in_flight)
    names = max(6, min(40, (width - 11 - 7 - (22 if notes else 11) - 8) // 2))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    table.add_column(" execution", justify="right", width=11, no_wrap=True)
    table.add_column("template", width=names, no_wrap=True)
    table.add_column("task", width=names, no_wrap=True)
    table.add_column("attempt", justify="right", width=7, no_wrap=True)
    table.add_column("running for", width=22 if notes else 11, no_wrap=True)
    shown = list(in_flight[: rows if len(in_flight) <= rows else max(0, rows - 1)])
    for each in shown:
        table.add_row(
            str(each.execution_id), cell(each.template_name), cell(each.task), str(each.attempt), _running_for(each)
        )
    if len(shown) < len(in_flight) and rows:
        more = len(in_flight) - len(shown)
        table.add_row("", Text(f"and {more:,} more" if shown else f"{more:,}", style="dim"))
    return table


def _running_for(each: InFlight) -> Text:
    text = Text("waits", style="dim") if each.seconds is None else Text(duration(each.seconds))
    if each.is_asked_to_stop:
        text.append("  asked to stop", style="yellow")
    return text


def _log_lines(line: str, console: Console) -> list[Text]:
    """A line of the log: with the time of day and the colour of its level if it is a record, else as it is.

    It is cut at the end of the line; a warning or an error at the end of the second one.
    """
    match = LOG_LINE.fullmatch(line)
    if match is None:
        return [Text(f" {safe(line)}", no_wrap=True, overflow="ellipsis")]
    at, level, message = match.groups()
    message, fields = _split(safe(message))
    text = Text(message, style=LOG_STYLES.get(level, ""))
    if not message.startswith("execution "):  # else it says itself what it is about
        text.append(fields, style="not bold dim default")
    first, second = text, None
    if level not in ("DEBUG", "INFO"):
        first, second = _two_lines(text, console.width - LOG_INDENT, console)
    shown = [Text.assemble((f" {at} ", "dim"), first, no_wrap=True, overflow="ellipsis")]
    if second is not None:
        shown.append(Text.assemble(" " * LOG_INDENT, second, no_wrap=True, overflow="ellipsis"))
    return shown


def _two_lines(text: Text, width: int, console: Console) -> tuple[Text, Text | None]:
    """A text that is broken at the end of a word, once; `None` where that is not needed."""
    first, *rest = text.wrap(console, max(1, width))
    for line in rest:
        line.rstrip()
    return first, Text(" ").join(rest) if rest else None


def _split(message: str) -> tuple[str, str]:
    """A record's message, and the fields behind it."""
    before, found, fields = message.rpartition(" execution_id=")
    return (before, found + fields) if found else (message, "")


def _last_line(health: WorkerHealth) -> Text:
    """What can be done, or is being done."""
    text = Text(no_wrap=True, overflow="ellipsis")
    if not health.is_stopping:
        return text.append(" Ctrl-C stops it in good order", style="dim")
    if not health.in_flight:
        return text.append(" stopping", style="bold yellow")
    what = "1 execution" if health.in_flight == 1 else f"{health.in_flight:,} executions"
    them = "it" if health.in_flight == 1 else "them"
    return text.append(f" stopping: waiting for {what}, Ctrl-C again to hand {them} back now", style="bold yellow")


@contextmanager
def _drawn(view: View, console: Console, terminal: io.TextIOWrapper) -> Iterator[None]:
    """Draw it on the terminal again and again, in a thread of its own."""
    ended = threading.Event()

    def draw() -> RenderableType:
        with suppress(OSError):
            columns, lines = os.get_terminal_size(terminal.fileno())
            if columns and lines:
                console.size = columns, lines
        return view.draw(console)

    live = Live(
        get_renderable=draw,
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )

    def keep_drawing() -> None:
        try:
            live.refresh()
            while not ended.wait(REFRESH_SECONDS):
                live.refresh()
        except OSError:  # the terminal is gone
            return
        except Exception:
            logger.exception("the live view has ended, the worker goes on")

    thread = threading.Thread(target=keep_drawing, name="ebbs live view", daemon=True)
    with suppress(OSError):
        live.start()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2.0)
        if not thread.is_alive():  # else the terminal takes nothing, and would not take this either
            with suppress(OSError):
                live.stop()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
