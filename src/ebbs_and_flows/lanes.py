"""Lanes: where the bodies of attempts run in this process, and how many at once: threads, and one event loop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ebbs_and_flows.checkpoints import Claim, Verdict
from ebbs_and_flows.errors import StopRequestedError
from ebbs_and_flows.logs import ABOUT, log_claim, logger
from ebbs_and_flows.outcomes import Failed, Limit, Outcome, run_async_body, run_body
from ebbs_and_flows.stopping import SIGNAL, WORKER_STOPS, StopSignal
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.transactions import Transactions, Written
from ebbs_and_flows.verdicts import STOPPED, judge, limit_of

TOLD_TO_STOP = (StopRequestedError, asyncio.CancelledError)
"""What a body raises that ends because it was asked to."""

NO_THREAD_SECONDS = 5.0
"""After how long an attempt is tried again for which there was no thread."""


class Run:
    """One attempt that a worker holds, from the claim or checkpoint that started it to the one that ends it.

    Args:
        claim: with the open attempt.
        template: the execution's.
        task: the attempt's.
        alone: whether it is to run without any other in its lane, because it may be what has broken the executor.
    """

    __slots__ = (
        "alone",
        "began",
        "claim",
        "deadline",
        "execution_id",
        "is_async",
        "is_last_chance",
        "is_past_limit",
        "is_settled",
        "is_transactional",
        "limit",
        "name",
        "signal",
        "starts_over",
        "task",
        "template",
        "was_tried",
    )

    def __init__(self, claim: Claim, template: FlowTemplate, task: Task, *, alone: bool = False) -> None:
        assert claim.attempt is not None, "a run has an open attempt"
        self.claim = claim
        self.template = template
        self.task = task
        self.alone = alone
        self.name = claim.attempt.name
        self.execution_id = claim.execution.execution_id
        self.is_transactional = task.is_transactional
        self.is_async = not self.is_transactional and task.is_async
        """Whether its body runs on an event loop: that of a transactional task runs in a thread."""
        self.signal = StopSignal()
        self.limit: Limit | None = None
        """How long its body may take; set as it begins."""
        self.deadline: float | None = None
        """When that is over, on `time.monotonic`."""
        self.is_last_chance = False
        """Whether it was started although one more lost worker would park it: nothing is claimed beside it for a
        while."""
        self.began: float | None = None
        self.is_past_limit = False
        """Whether it was asked to end because its limit was reached."""
        self.is_settled = False
        """Whether it is known how it ended; what its body still has to say is not heard."""
        self.was_tried = False
        """Whether a checkpoint of it may have been committed without an answer."""
        self.starts_over: str | None = None
        """Why another attempt is to follow at once without blame, where the body was cut off by somebody else's
        fault."""


Ended = Callable[[Run, "Verdict | Written"], None]
"""Called from any thread when a body has ended."""


class Lane(ABC):
    """Admits runs to the places it has. All but the end of a body happens in the thread of the worker's loop.

    A run that is to be alone waits until the lane is empty, and then nothing else is admitted until it has ended.

    Args:
        slots: how many bodies may run at once.
        patience_seconds: how long a run that is to be alone waits for the others at most.
    """

    is_in_this_process = True
    """Whether a body that crashes its process crashes the worker."""

    def __init__(self, slots: int, patience_seconds: float) -> None:
        self.slots = slots
        self.active: set[Run] = set()
        self.limited: set[Run] = set()
        """Those of them whose bodies have a time limit."""
        self._patience_seconds = patience_seconds
        self._waiting: deque[Run] = deque()
        self._waiting_alone: deque[tuple[float, Run]] = deque()
        self._alone: Run | None = None

    def add(self, run: Run) -> None:
        """Take a run, to be started as soon as there is a place for it."""
        if run.alone:
            self._waiting_alone.append((time.monotonic() + self._patience_seconds, run))
            self.start_what_can()
        elif self._waiting or self._waiting_alone or self._alone is not None or len(self.active) >= self.slots:
            self._waiting.append(run)
            self.start_what_can()
        else:
            self._begin(run)

    def ended(self, run: Run) -> None:
        """A body has ended, so that its place is free."""
        self._leave(run)
        if self._has_waiting:
            self.start_what_can()

    @property
    def _has_waiting(self) -> bool:
        """Whether a run waits for a place."""
        return bool(self._waiting or self._waiting_alone)

    def _leave(self, run: Run) -> None:
        self.active.discard(run)
        self.limited.discard(run)
        if run is self._alone:
            self._alone = None

    def start_what_can(self) -> float | None:
        """Start the runs there is a place for; in how many seconds this is to be asked again, if at all."""
        if self._alone is not None:
            return None
        while self._waiting_alone and self._waiting_alone[0][1].is_settled:
            self._waiting_alone.popleft()
        if self._waiting_alone:
            until, run = self._waiting_alone[0]
            now = time.monotonic()
            if self.active and now < until:
                return until - now
            self._waiting_alone.popleft()
            self._begin(run)
            return None
        while (run_or_none := self._next()) is not None:
            self._begin(run_or_none)
        return None

    def _next(self) -> Run | None:
        while self._waiting and len(self.active) < self.slots:
            run = self._waiting.popleft()
            if not run.is_settled:
                return run
        return None

    def _begin(self, run: Run) -> None:
        self.active.add(run)
        if run.alone:
            self._alone = run
        run.began = time.monotonic()
        run.limit = limit_of(run.claim, run.template, run.task, run.name)
        if run.limit.seconds is not None:
            run.deadline = run.began + run.limit.seconds
            self.limited.add(run)
        self._start(run)

    @abstractmethod
    def _start(self, run: Run) -> None:
        """Start the run's body."""

    def deadline_of(self, run: Run, now: float) -> float:
        """When a limit is over, on `time.monotonic`; asked when it seems to be."""
        assert run.deadline is not None, "it has a limit"
        return run.deadline

    @abstractmethod
    def interrupt(self, run: Run) -> bool:
        """Stop a body as well as it can be; whether it is going to end soon."""

    @abstractmethod
    def give_up(self, run: Run) -> None:
        """Its end is not waited for any more. Its place stays taken where its body goes on using it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the lane has; bodies that still run are left to themselves."""


class LocalLane(Lane):
    """Bodies in this process: functions in threads, coroutines on one event loop, transactional tasks in threads that
    each take a connection of the engine's pool.

    Args:
        transactions, transaction_slots: what runs transactional tasks, and how many at once: the pool is shared with
            the host and with the worker's own writing.
        has_one_writer: whether nobody else can write while a transactional task runs. Then one is started each time
            that `allow_transactions` is called, so that they and the worker's own writing take turns.
        goes_on: whether the next task follows when one has succeeded.
        ended: called from a body's thread at its end.
    """

    def __init__(
        self,
        slots: int,
        patience_seconds: float,
        *,
        transactions: Transactions,
        transaction_slots: int,
        has_one_writer: bool,
        goes_on: Callable[[], bool],
        ended: Ended,
    ) -> None:
        super().__init__(slots, patience_seconds)
        self._transactions = transactions
        self._transaction_slots = transaction_slots
        self._waiting_transactions: deque[Run] = deque()
        self._has_one_writer = has_one_writer
        self._is_transactions_turn = True
        self._goes_on = goes_on
        self._ended = ended
        self._threads = BodyThreads(self._run_to_its_end)
        self._loop = BodyLoop()

    def add(self, run: Run) -> None:
        if run.is_transactional and not run.alone:
            self._waiting_transactions.append(run)
            self.start_what_can()
        else:
            super().add(run)

    @property
    def holds_the_write_lock(self) -> bool:
        """Whether a transactional task runs, and nobody else can write meanwhile."""
        return self._has_one_writer and self._active_transactions > 0

    def allow_transactions(self) -> None:
        """The worker has written what it had to write: it is the transactional tasks' turn."""
        self._is_transactions_turn = True
        if self._waiting_transactions:
            self.start_what_can()

    def _next(self) -> Run | None:
        has_turn = self._is_transactions_turn or not self._has_one_writer
        while has_turn and self._waiting_transactions and self._active_transactions < self._transaction_slots:
            run = self._waiting_transactions.popleft()
            if not run.is_settled:
                self._is_transactions_turn = False
                return run
        return super()._next()

    @property
    def _has_waiting(self) -> bool:
        return bool(self._waiting or self._waiting_transactions or self._waiting_alone)

    @property
    def _active_transactions(self) -> int:
        return sum(1 for run in self.active if run.is_transactional)

    def give_up(self, run: Run) -> None:
        if run.is_transactional or run not in self.active:
            return  # its thread has a connection of the pool
        if run.is_async and run.is_past_limit:
            self._loop.leave()  # it was cancelled and has not ended: something blocks the loop
        self.ended(run)

    def _start(self, run: Run) -> None:
        if run.is_async:
            self._loop.start(run, lambda verdict: self._ended(run, verdict))
        else:
            try:
                self._threads.start(run)
            except RuntimeError as error:  # no more threads for this process; somebody else may have some
                log_claim(run.claim, "handed back: %s", error, level=logging.ERROR)
                self._ended(run, STOPPED._replace(retry_seconds=NO_THREAD_SECONDS))

    def _run_to_its_end(self, run: Run) -> None:
        self._ended(run, contextvars.Context().run(self._body, run))

    def _body(self, run: Run) -> Verdict | Written:
        if not run.is_transactional:
            return run_here(run)
        SIGNAL.set(run.signal)
        ABOUT.set(run.claim)
        assert run.limit is not None, "its body has begun"
        try:
            return self._transactions.run(
                run.claim,
                run.template,
                run.task,
                limit=run.limit,
                goes_on=self._goes_on,
                failed=partial(verdict_of, run),
            )
        except BaseException as error:  # also KeyboardInterrupt: in this thread it is the task's own doing
            return verdict_of(run, Failed(error))

    def interrupt(self, run: Run) -> bool:
        if run.is_async:
            self._loop.cancel(run)
            return True
        return False

    def close(self) -> None:
        self._threads.close()
        self._loop.close()


def run_here(run: Run) -> Verdict:
    """Run a body in this thread, in a context that is its own, and give the verdict. Raises nothing."""
    SIGNAL.set(run.signal)
    ABOUT.set(run.claim)
    try:
        return verdict_of(run, run_body(run.task, run.name, run.claim.context))
    except BaseException as error:  # also KeyboardInterrupt: in this thread it is the task's own doing
        return verdict_of(run, Failed(error))


def verdict_of(run: Run, outcome: Outcome) -> Verdict:
    """The verdict on what came of a run's body; one that stopped because its worker is stopping is not to blame."""
    is_told = isinstance(outcome, Failed) and isinstance(outcome.exception, TOLD_TO_STOP)
    if is_told and run.signal.why == WORKER_STOPS:
        return STOPPED
    return judge(run.task, outcome, run.claim.counts_of(run.name))


class BodyThreads:
    """Daemon threads that are used again. One whose body never returns is missed by nobody, and holds up no exit.

    `concurrent.futures.ThreadPoolExecutor` would count such a thread among its workers, and wait for it at exit.

    One thread at a time is on its way to the jobs that wait; as it takes one and leaves others, it calls the next. So
    where jobs take their time, each soon has a thread of its own; and where they do not, one thread has done them all
    before the next one arrives, and hardly any time goes into changing threads.

    Args:
        do: does a run's body, and raises nothing.
    """

    def __init__(self, do: Callable[[Run], None]) -> None:
        self._do = do
        self._jobs: deque[Run] = deque()
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For each thread that is called, True; False where it is to end."""
        self._idle = 0
        self._is_one_coming = False
        self._is_closed = False

    def start(self, job: Run) -> None:
        """Do a run's body in a thread that has nothing to do or a new one.

        Raises:
            RuntimeError: there is no such thread, and no new one for this process.
        """
        with self._lock:
            self._jobs.append(job)
            if self._is_one_coming:
                return
            try:
                self._call_one()
            except RuntimeError:
                self._jobs.remove(job)
                raise

    def close(self) -> None:
        """End the threads that have nothing to do; the others end after what they do."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._idle):
                self._calls.put(False)
            self._idle = 0

    def _call_one(self) -> None:
        """Send a thread to the jobs that wait; called under the lock."""
        if self._idle > 0:
            self._idle -= 1
            self._calls.put(True)
        else:
            threading.Thread(target=self._serve, name="ebbs task", daemon=True).start()
        self._is_one_coming = True

    def _serve(self) -> None:
        is_coming = True
        while True:
            with self._lock:
                if is_coming:
                    self._is_one_coming = is_coming = False
                job = self._jobs.popleft() if self._jobs else None
                if job is None:
                    if self._is_closed:
                        return
                    self._idle += 1
                elif self._jobs and not self._is_one_coming:
                    with suppress(RuntimeError):  # no more threads: this one, or another one that is free, comes back
                        self._call_one()
            if job is not None:
                self._do(job)
                del job
            elif self._calls.get():
                is_coming = True
            else:
                return


class BodyLoop:
    """One event loop in a thread of its own, started with the first coroutine. None can end it for the others."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = threading.Event()
        self._tasks: dict[Run, asyncio.Task[None]] = {}

    def start(self, run: Run, ended: Callable[[Verdict], None]) -> None:
        """Run the body of an `async def` task on the loop."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
            arguments = (self._loop, self._is_closing)
            threading.Thread(target=_serve_loop, args=arguments, name="ebbs async tasks", daemon=True).start()
        self._loop.call_soon_threadsafe(self._begin, self._loop, run, ended)

    def cancel(self, run: Run) -> None:
        """Cancel a coroutine at its next await."""

        def cancel() -> None:
            task = self._tasks.get(run)
            if task is not None:
                task.cancel()

        self._call(cancel)

    def leave(self) -> None:
        """Leave a loop that does not react any more to itself: the next coroutine starts on a new one."""
        self._loop = None
        self._tasks = {}

    def close(self) -> None:
        """Cancel what still runs and end the loop."""
        self._is_closing.set()
        if self._loop is not None:
            self._call(self._loop.stop)
            self._loop = None

    def _call(self, callback: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # a task has closed it
                self._loop.call_soon_threadsafe(callback)

    def _begin(self, loop: asyncio.AbstractEventLoop, run: Run, ended: Callable[[Verdict], None]) -> None:
        self._tasks[run] = loop.create_task(self._body(run, ended), name=f"ebbs task {run.name}")

    async def _body(self, run: Run, ended: Callable[[Verdict], None]) -> None:
        SIGNAL.set(run.signal)
        ABOUT.set(run.claim)
        try:
            outcome = await run_async_body(run.task, run.name, run.claim.context)
            verdict = verdict_of(run, outcome)
        except BaseException as error:  # a cancellation that came before the body began, or a hostile policy
            verdict = verdict_of(run, Failed(error))
        finally:
            self._tasks.pop(run, None)
        ended(verdict)


def _serve_loop(loop: asyncio.AbstractEventLoop, is_closing: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    try:
        while not (is_closing.is_set() or loop.is_closed()):
            try:
                loop.run_forever()
            except BaseException as error:  # asyncio passes on a SystemExit of what a body has started beside itself
                logger.warning("a task has ended the event loop of all, which goes on: %r", error)
    finally:
        if not loop.is_closed():
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=1.0))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
