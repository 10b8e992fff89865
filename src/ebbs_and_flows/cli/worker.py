"""`ebbs worker`: a worker in a process of its own, with a live view on a terminal and log lines elsewhere."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import typer

from ebbs_and_flows.cli.apps import AppError, load_app
from ebbs_and_flows.cli.live import can_be_live, live_view
from ebbs_and_flows.cli.logs import LogFormat, LogLevel, log_in_pool_process, logs_on_stderr
from ebbs_and_flows.cli.terminal import duration
from ebbs_and_flows.errors import InvalidArgumentError
from ebbs_and_flows.health import WorkerHealth
from ebbs_and_flows.logs import logger
from ebbs_and_flows.worker import Worker


def worker(
    app: Annotated[
        str,
        typer.Option(
            "--app",
            metavar="MODULE:NAME",
            help="What to run, for example shop.flows:runner; a dotted name will do.",
            show_default=False,
        ),
    ],
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Executions in flight at most. [default: 32]", show_default=False),
    ] = None,
    queue: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Take executions of this queue; repeat it for several. [default: default]",
            show_default=False,
        ),
    ] = None,
    max_in_flight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUEUE=NUMBER",
            help="Of this queue, at most so many RUNNING at once over all workers; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="Run plain functions in so many processes instead of threads: a time limit kills there.",
            show_default=False,
        ),
    ] = None,
    lease_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a lost worker's executions wait for another one, at most. [default: 30]",
            show_default=False,
        ),
    ] = None,
    poll_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How often to look for what is due when nothing tells. [default: 1]",
            show_default=False,
        ),
    ] = None,
    grace_seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long tasks may take to end when it is stopped. [default: 10]",
            show_default=False,
        ),
    ] = None,
    no_listen: Annotated[
        bool, typer.Option("--no-listen", help="Only poll: for PostgreSQL behind a pooler in transaction mode.")
    ] = False,
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="End as soon as nothing is due, in flight, or to be retried.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Log lines instead of the live view.")] = False,
    log_level: Annotated[
        LogLevel,
        typer.Option(metavar="LEVEL", help=f"Log from here on: {', '.join(LogLevel)}.", case_sensitive=False),
    ] = LogLevel.INFO,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            metavar="FORMAT", help="text, or json: one object a line, never a live view.", case_sensitive=False
        ),
    ] = LogFormat.TEXT,
) -> None:
    """Run flows, many at once, until it is stopped.

    MODULE:NAME is a FlowRunner, a Worker with options of its own, or a function that returns one of them; the module is
    looked for in the current folder first. It brings its own database.

    SIGTERM or Ctrl-C stops it in good order: it takes nothing more, and what has not ended within the grace is handed
    back, to go on at the same task elsewhere. A second one hands back at once.

    On a terminal it shows what it is doing; elsewhere it logs to stderr, a line a record.
    """
    found = load_app(app)
    options: dict[str, Any] = {
        "concurrency": concurrency,
        "queues": queue or None,
        "max_in_flight": _bounds(max_in_flight or []) or None,
        "lease_seconds": lease_seconds,
        "poll_seconds": poll_seconds,
        "grace_seconds": grace_seconds,
        "listen": False if no_listen else None,
        "executor": None if processes is None else _maker_of_pools(processes, log_level, log_format),
    }
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(found, Worker):
        if given:
            raise AppError(f"{app} is a Worker with options of its own: leave out {_as_options(given)}")
        running = found
    else:
        running = Worker(found, **given)
    is_live = not plain and log_format is LogFormat.TEXT and can_be_live()
    with (
        live_view(running) if is_live else nullcontext(),
        logs_on_stderr(log_level, log_format),
        _hangup_stops(),
    ):
        if not running.runner.templates:
            logger.warning("%s has no templates: nothing is run before some are registered", app)
        began = time.monotonic()
        try:
            running.run(until_idle=until_idle)
        finally:
            logger.info("%s", _summary(running.health(), time.monotonic() - began))


def _summary(health: WorkerHealth, seconds: float) -> str:
    """What the worker has done, on one line."""
    names = ("succeeded", "failed", "rescheduled", "refused", "recovered")
    counts = [f"{getattr(health, name):,} {name}" for name in names if getattr(health, name)]
    if health.in_flight:
        counts.append(f"{health.in_flight:,} left to the end of their leases")
    return f"worker {health.worker} ran for {duration(seconds)}: {', '.join([f'{health.claimed:,} claimed', *counts])}"


def _maker_of_pools(number: int, log_level: LogLevel, log_format: LogFormat) -> Callable[[], ProcessPoolExecutor]:
    """What makes the worker's pools of processes; they are its own to end."""
    if number < 1:
        raise InvalidArgumentError("processes", number, "an int of at least 1")

    def make() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            number,
            mp_context=multiprocessing.get_context("spawn"),  # a fork would not survive this process' threads
            initializer=log_in_pool_process,
            initargs=(log_level, log_format),
        )

    return make


@contextmanager
def _hangup_stops() -> Iterator[None]:
    """Let a terminal that is closed stop the worker in good order, too, unless nohup says otherwise."""
    number = getattr(signal, "SIGHUP", None)
    if number is None or signal.getsignal(number) is not signal.SIG_DFL:
        yield
        return
    signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(number, signal.SIG_DFL)


def _bounds(given: Sequence[str]) -> dict[str, int]:
    bounds = {}
    for each in given:
        queue, _, number = each.rpartition("=")
        if not (queue and number.isdecimal()):
            raise InvalidArgumentError("max_in_flight", each, "QUEUE=NUMBER, for example mails=5")
        bounds[queue] = int(number)
    return bounds


def _as_options(given: dict[str, Any]) -> str:
    names = {"queues": "--queue", "listen": "--no-listen", "executor": "--processes"}
    return ", ".join(names.get(name, f"--{name.replace('_', '-')}") for name in given)
