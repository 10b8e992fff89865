"""Worker: runs many executions at once, and keeps running whatever happens to the database or to other workers."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from datetime import datetime, timezone
from types import FrameType
from typing import Any

from ebbs_and_flows.arguments import valid_lease_seconds, valid_seconds
from ebbs_and_flows.dispatcher import Dispatcher, WorkerSettings
from ebbs_and_flows.errors import InvalidArgumentError, WorkerStateError
from ebbs_and_flows.health import InFlight, WorkerHealth
from ebbs_and_flows.logs import logger
from ebbs_and_flows.names import MAX_NAME_LENGTH, valid_name
from ebbs_and_flows.persistence.databases import said
from ebbs_and_flows.persistence.listening import Listener
from ebbs_and_flows.pools import runs_here
from ebbs_and_flows.remote import portable
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.templates import is_positive_int
from ebbs_and_flows.writers import OWN_CONNECTIONS

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Worker:
    """Takes due executions of a runner's templates and runs them, many at once, until it is stopped.

    Any number of workers, on any number of machines, share one database; none of them leads. Each renews the leases of
    what it holds, and takes over what a lost one has left behind once its lease has expired: at most `lease_seconds` +
    `poll_seconds` + 1 s after its death. Every write names the epoch of its claim, so that a worker which was thought
    dead writes nothing any more. A database that does not answer is waited for.

    Functions run in threads, `async def` tasks on one event loop, transactional tasks in threads with a connection of
    the engine's pool each. Of that pool the worker itself needs three connections; tasks that take more from it (by the
    service's engine, say) are to leave it those, or its leases cannot be renewed: give them an engine of their own.

    Args:
        runner: whose templates it runs; templates that are registered later count from then on.
        concurrency: how many executions it has in flight at most. Default 32.
        lease_seconds: for how long a claim holds unless it is renewed, which is done every third of it. Default 30.
        queues: from which queues it takes executions. Default `["default"]`.
        executor: where the bodies of plain functions run instead of in threads: a `concurrent.futures.Executor`, which
            stays its maker's to shut down, or a function that makes one. With processes a time limit kills, and a crash
            costs one attempt. See docs/scaling.md.
        max_in_flight: by queue, how many of its executions may be RUNNING at once over all workers; give the same to
            each of them. Default without bound. Templates have a bound of their own.
        poll_seconds: how often it looks for due executions and expired leases when nothing tells it. Default 1.
        grace_seconds: how long, when it stops, tasks that run may take to end before their executions are handed back.
            Default 10.
        listen: whether to be told at once of due executions, on PostgreSQL with psycopg, by LISTEN and NOTIFY: takes
            one connection of the pool. Turn it off behind a pooler in transaction mode. Default yes.

    Raises:
        InvalidArgumentError, InvalidNameError: an argument that cannot be used.
        DatabaseUrlError: the engine's pool lets threads share a connection.
        TemplateError: with an executor, a task that cannot be sent to another process.
    """

    def __init__(
        self,
        runner: FlowRunner,
        concurrency: int = 32,
        lease_seconds: float = 30.0,
        queues: Sequence[str] = ("default",),
        *,
        executor: Executor | Callable[[], Executor] | None = None,
        max_in_flight: Mapping[str, int] | None = None,
        poll_seconds: float = 1.0,
        grace_seconds: float = 10.0,
        listen: bool = True,
    ) -> None:
        if not isinstance(runner, FlowRunner):
            raise InvalidArgumentError("runner", runner, "a FlowRunner")
        if not is_positive_int(concurrency):
            raise InvalidArgumentError("concurrency", concurrency, "an int of at least 1")
        if executor is not None and not isinstance(executor, Executor) and not callable(executor):
            raise InvalidArgumentError("executor", executor, "a concurrent.futures.Executor, or what makes one")
        if not isinstance(listen, bool):
            raise InvalidArgumentError("listen", listen, "True or False")
        self.runner = runner
        self._concurrency = concurrency
        self._lease_seconds = valid_lease_seconds(lease_seconds)
        self._queues = _valid_queues(queues)
        self._executor = executor
        self._max_in_flight = _valid_bounds(max_in_flight or {})
        self._poll_seconds = valid_seconds("poll_seconds", poll_seconds)
        self._grace_seconds = valid_seconds("grace_seconds", grace_seconds, least=0.0)
        capacity = runner.service.connections
        self._listens = listen and runner.service.can_listen and (capacity is None or capacity > OWN_CONNECTIONS)
        reserved = OWN_CONNECTIONS + (1 if self._listens else 0)
        self._transaction_slots = concurrency if capacity is None else max(1, capacity - reserved)
        if runner.service.has_one_writer:
            self._transaction_slots = 1
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._name = _new_name()
        self._dispatcher: Dispatcher | None = None
        self._is_running = False
        self._started_at: datetime | None = None
        if executor is not None and not runs_here(executor):
            self._check_tasks_can_travel()

    def __repr__(self) -> str:
        state = "running" if self.is_running else "not running"
        return f"<Worker {self.name}, {state}, {self._concurrency} at once from {', '.join(self._queues)}>"

    @property
    def name(self) -> str:
        """The name under which it holds executions: host, process and a random part."""
        self._forget_parent()
        return self._name

    @property
    def is_running(self) -> bool:
        """Whether `run` has been called and has not returned."""
        self._forget_parent()
        return self._is_running

    def run(self, *, until_idle: bool = False) -> None:
        """Run executions, in this thread and those that it starts, until `stop` is called. Every step commits.

        In the main thread SIGTERM and SIGINT (Ctrl-C) stop it as `stop` does; a second one lets tasks that still run
        no more time. Then it claims nothing more; what is running may take `grace_seconds` to end, and what has not
        ended then is handed back, to go on at the same task elsewhere.

        Args:
            until_idle: whether to return as soon as nothing is due here, nothing is in flight here, and no retry is to
                come, however late. What other workers hold is theirs.

        What tasks raise is recorded, and what the database says is logged and waited for; neither is raised.

        Raises:
            WorkerStateError: it is running already; or its executor broke and could not be made anew.
        """
        self._serve(self._begin(), until_idle=until_idle)

    def stop(self, grace_seconds: float | None = None) -> None:
        """Ask it to stop, from any thread, and return at once. Nothing happens where it is not running (yet).

        `run` returns some seconds after the grace period at the latest, unless a statement waits for a lock in the
        database: that is bounded by what the database allows (`lock_timeout`; 30 s on SQLite).

        Args:
            grace_seconds: how long tasks that run may take to end; default as the worker was made. A shorter one may
                follow.
        """
        self._forget_parent()
        grace = self._grace_seconds if grace_seconds is None else valid_seconds("grace_seconds", grace_seconds, 0.0)
        if self._dispatcher is not None and self._is_running:
            self._dispatcher.stop(grace)

    @contextmanager
    def running(self) -> Iterator[Worker]:
        """Run in a background thread while the `with` block lasts; at its end the worker is stopped and waited for.

        For web services, within their lifespan. Signals are left to the service.

        Raises:
            WorkerStateError: as for `run`; what ended the thread before its time is raised at the end of the block.
        """
        ended: list[BaseException] = []
        dispatcher = self._begin()

        def serve() -> None:
            try:
                self._serve(dispatcher, until_idle=False)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=serve, name=f"ebbs worker {self._name}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()
        if ended:
            raise ended[0]

    # --- what it says of itself ---------------------------------------------------------------------------------------

    def health(self) -> WorkerHealth:
        """How the worker is, for health checks. Asks nobody, so that it answers also when the database does not."""
        self._forget_parent()
        dispatcher, now = self._dispatcher, time.monotonic()
        turned = answered = None
        counts: Mapping[str, int] = {}
        if dispatcher is not None:
            turned, answered, counts = (
                now - dispatcher.turned_at,
                now - dispatcher.outage.answered_at,
                dispatcher.counts,
            )
        patience = max(self._lease_seconds, 2 * self._poll_seconds)
        is_healthy = (
            self._is_running
            and turned is not None
            and answered is not None
            and max(turned, answered) < patience
            and dispatcher is not None
            and dispatcher.failure is None
        )
        return WorkerHealth(
            worker=self._name,
            is_running=self._is_running,
            is_stopping=dispatcher is not None and self._is_running and dispatcher.is_stopping,
            is_healthy=is_healthy,
            started_at=self._started_at,
            concurrency=self._concurrency,
            in_flight=len(dispatcher.runs) if dispatcher is not None else 0,
            queues=self._queues,
            claimed=counts.get("claimed", 0),
            succeeded=counts.get("SUCCEEDED", 0),
            failed=counts.get("FAILED", 0),
            rescheduled=counts.get("RESCHEDULED", 0),
            refused=counts.get("refused", 0),
            recovered=counts.get("recovered", 0),
            attempts=counts.get("attempts", 0),
            seconds_since_turn=turned,
            seconds_since_database=answered,
            outage=dispatcher.outage.error if dispatcher is not None else None,
            pool=self.runner.service.engine.pool.status(),
        )

    def in_flight(self) -> list[InFlight]:
        """The attempts that it has in flight now, the longest running first."""
        self._forget_parent()
        if self._dispatcher is None:
            return []
        now = time.monotonic()
        found = []
        for run in list(self._dispatcher.runs.values()):
            attempt = run.claim.attempt
            if attempt is not None:
                found.append(
                    InFlight(
                        execution_id=run.execution_id,
                        template_name=run.template.name,
                        task=attempt.name,
                        attempt=attempt.attempt,
                        seconds=None if run.began is None else now - run.began,
                        is_asked_to_stop=run.signal.is_set,
                    )
                )
        return sorted(found, key=lambda each: (-(each.seconds or 0.0), each.execution_id))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self) -> Dispatcher:
        self._forget_parent()
        with self._lock:
            if self._is_running:
                raise WorkerStateError("this worker is running already: make another one, or stop it first")
            self._is_running = True
            self._started_at = datetime.now(timezone.utc)
            self._dispatcher = Dispatcher(self.runner, self._settings())
            return self._dispatcher

    def _serve(self, dispatcher: Dispatcher, *, until_idle: bool) -> None:
        try:
            with self._stopped_by_signals(), self._listening(dispatcher):
                logger.info(
                    "worker %s takes up to %s executions at once from %s",
                    self._name,
                    self._concurrency,
                    ", ".join(self._queues),
                )
                dispatcher.loop(until_idle=until_idle)
                logger.info("worker %s has ended", self._name)
        finally:
            self._is_running = False
        if dispatcher.failure is not None:
            raise WorkerStateError(f"worker {self._name} has stopped: {dispatcher.failure}")

    def _settings(self) -> WorkerSettings:
        return WorkerSettings(
            name=self._name,
            concurrency=self._concurrency,
            lease_seconds=self._lease_seconds,
            queues=self._queues,
            max_in_flight=self._max_in_flight,
            executor=self._executor,
            poll_seconds=self._poll_seconds,
            transaction_slots=self._transaction_slots,
        )

    def _check_tasks_can_travel(self) -> None:
        for template in self.runner.templates.values():
            for task, name in zip(template.tasks, template.task_names, strict=True):
                if not (task.is_async or task.is_transactional):
                    portable(template, task, name)

    @contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop the worker, if this is the main thread, which alone may say so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        received: list[int] = []

        def stop(number: int, _frame: FrameType | None) -> None:
            received.append(number)
            self.stop(None if len(received) == 1 else 0.0)

        before: dict[signal.Signals, Any] = {each: signal.signal(each, stop) for each in STOP_SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                # None stands for a handler that was not set from Python, and cannot be set again from there.
                signal.signal(each, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def _listening(self, dispatcher: Dispatcher) -> Iterator[None]:
        if not self._listens:
            yield
            return
        service = self.runner.service

        def report(error: Exception) -> None:
            logger.warning("cannot listen, polling instead: %s", said(error))

        listener = Listener(service.engine, service.channel, dispatcher.wake, report)
        listener.start()
        try:
            yield
        finally:
            listener.stop()

    def _forget_parent(self) -> None:
        """In a child process after a fork, this worker is one that has not been run: its threads are the parent's."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._name = _new_name()
        self._lock = threading.Lock()
        self._dispatcher = None
        self._is_running = False
        self._started_at = None


def _new_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"[:MAX_NAME_LENGTH]


def _valid_queues(queues: Sequence[str]) -> tuple[str, ...]:
    if isinstance(queues, str) or not isinstance(queues, (list, tuple, set, frozenset)) or not queues:
        raise InvalidArgumentError("queues", queues, 'a list of at least one queue, for example ["default"]')
    return tuple(dict.fromkeys([valid_name("queue", each) for each in queues]))


def _valid_bounds(bounds: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(bounds, Mapping):
        raise InvalidArgumentError("max_in_flight", bounds, 'a mapping of queues to ints, for example {"mails": 5}')
    for queue, most in bounds.items():
        if not is_positive_int(most):
            raise InvalidArgumentError("max_in_flight", most, f"an int of at least 1 for queue {queue!r}")
    return {valid_name("queue", queue): most for queue, most in bounds.items()}
