"""Bodies in an executor: process pools, in which a limit kills and a crash costs no more than an attempt; clusters."""

from __future__ import annotations

import contextvars
import logging
import math
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from functools import partial

from ebbs_and_flows.checkpoints import Verdict
from ebbs_and_flows.errors import TemplateError
from ebbs_and_flows.lanes import Ended, Lane, Run, run_here, verdict_of
from ebbs_and_flows.logs import log_claim, logger
from ebbs_and_flows.outcomes import Failed
from ebbs_and_flows.pools import Pool, made_anew, runs_here
from ebbs_and_flows.registry import REGISTRY
from ebbs_and_flows.remote import Entry, portable, remote_call, run_call
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.verdicts import STOPPED, judge_lost

START_SECONDS = 60.0
"""How long a process may take to start and to import a task before the task's time limit counts regardless."""

LOOK_AGAIN_SECONDS = 0.1
"""How often it is looked, from the end of a limit on, whether the body that it is for has begun."""

UNCLEAR_CODES = (-signal.SIGTERM, 255)
"""Exit codes of a process that was ended by somebody else as likely as by its task: SIGTERM is sent to whole groups, as
a machine goes down; and 255 is what is known of a process whose fork server has died."""

MAX_IN_VAIN = 3
"""How often the executor may give back an execution that it has not begun before it is taken for dead."""


class ExecutorLane(Lane):
    """Bodies in a `concurrent.futures.Executor`.

    A pool of processes breaks as a whole when one of them dies. It is made anew, and what was cut off by somebody
    else's fault starts over at once, without blame. Whose fault it was is seen by which process had died; where that
    cannot be seen, those that may be to blame run again one by one, each alone in the executor.

    Args:
        executor: the executor, which stays its maker's; or what makes one, for kinds that this library does not know
            how to make anew.
        concurrency: how many bodies it is given at once at most; fewer where it says that it runs fewer.
        patience_seconds: how long a run that is to be alone waits for the others at most.
        post: has a function called in the thread of the worker's loop.
        ended: called there when a body has ended.
        on_dead: called there with the reason when the executor is of no use any more.
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor],
        concurrency: int,
        patience_seconds: float,
        *,
        post: Callable[[Callable[[], None]], None],
        ended: Ended,
        on_dead: Callable[[str], None],
    ) -> None:
        super().__init__(concurrency, patience_seconds)
        self._concurrency = concurrency
        self.is_in_this_process = False
        self._make = executor if not isinstance(executor, Executor) else None
        self._pool: Pool | None = None
        self._pool_of: dict[Run, Pool] = {}
        self._post = post
        self._ended = ended
        self._on_dead = on_dead
        self._portable: dict[tuple[str, str], tuple[Task, int, bytes]] = {}
        self._in_vain: Counter[int] = Counter()
        if isinstance(executor, Executor):
            self._use(Pool(executor, is_own=False))

    def add(self, run: Run) -> None:
        if self._pool is None:  # not before it is needed: some are expensive
            try:
                self._use(self._new_pool())
            except Exception as error:
                self._give_back(run, f"the executor could not be made: {error!r}")
                return
        super().add(run)

    def deadline_of(self, run: Run, now: float) -> float:
        """A limit counts from the moment at which the body begins: its process may have to be started first."""
        assert run.deadline is not None, "it has a limit"
        assert run.began is not None, "it has begun"
        pool = self._pool_of.get(run)
        entry = None if pool is None else pool.entries().get(run)
        if pool is None or pool.journal is None or run.limit is None or run.limit.seconds is None:
            return run.deadline
        latest = math.inf if run.claim.deadline is None else run.claim.deadline
        if entry is not None and entry.began is not None:
            return min(entry.began + run.limit.seconds, latest)
        return min(max(run.deadline, now + LOOK_AGAIN_SECONDS), run.began + START_SECONDS, latest)

    def interrupt(self, run: Run) -> bool:
        """Kill a pool's processes; elsewhere withdraw the call, which helps if it has not been started yet."""
        pool = self._pool_of.get(run)
        if pool is None:
            return True
        if pool.has_processes:
            pool.killed_for = run
            pool.kill()
            return True
        pool.runs[run].cancel()
        return False

    def give_up(self, run: Run) -> None:
        """Its place is free when its future is done."""

    def close(self) -> None:
        for pool in {id(each): each for each in (*self._pool_of.values(), self._pool) if each is not None}.values():
            try:
                pool.close()
            except Exception:  # an executor is somebody else's code
                logger.exception("the executor could not be shut down")

    # --- submit -------------------------------------------------------------------------------------------------------

    def _start(self, run: Run) -> None:
        try:
            self._submit(run)
        except TemplateError as error:
            verdict = verdict_of(run, Failed(error, may_retry=False))
            self._post(partial(self._ended, run, verdict))
        except Exception as error:  # an executor is somebody else's code
            self._give_back(run, f"the executor takes nothing any more: {error!r}")

    def _submit(self, run: Run) -> None:
        assert self._pool is not None, "it is made before a run is started"
        try:
            future = self._submit_to(self._pool, run)
        except TemplateError:
            raise
        except Exception as error:
            # It broke while nothing of the worker's was in it; or what the worker has made was ended by somebody.
            if not isinstance(error, BrokenExecutor) and self._make is None:
                raise
            self._replace(self._pool)
            future = self._submit_to(self._pool, run)
        pool = self._pool_of[run] = self._pool
        future.add_done_callback(lambda done: self._post(partial(self._done, pool, run, done)))

    def _submit_to(self, pool: Pool, run: Run) -> Future[Verdict]:
        if runs_here(pool.executor):
            return pool.submit(run, contextvars.Context().run, run_here, run)
        return pool.submit(run, run_call, remote_call(run.claim, self._portable_task(run), pool.journal))

    def _portable_task(self, run: Run) -> bytes:
        """The task as it travels, made once; and again after a type has been registered."""
        key = (run.template.name, run.name)
        found = self._portable.get(key)
        if found is None or found[0] is not run.task or found[1] != REGISTRY.changes:
            found = self._portable[key] = (run.task, REGISTRY.changes, portable(run.template, run.task, run.name))
        return found[2]

    # --- how calls end ------------------------------------------------------------------------------------------------

    def _done(self, pool: Pool, run: Run, future: Future[Verdict]) -> None:
        if run not in pool.runs:
            return  # it was cut off with its pool, which has been seen to
        error = CancelledError() if future.cancelled() else future.exception()
        if isinstance(error, BrokenExecutor):
            self._broke(pool, error)
            return
        self._forget(pool, run)
        if error is None:
            self._in_vain.clear()
            self._ended(run, future.result())
        elif isinstance(error, CancelledError):
            self._start_over(run, "The executor withdrew this attempt.", in_vain=True)
        elif type(error).__name__ == "KilledWorker":
            # dask's name for what its scheduler gives up: https://distributed.dask.org/en/stable/killed.html
            self._ended(run, self._lost(run, f"The executor gave up this attempt: {error}"))
        else:  # the executor could not bring it to its process, or its verdict back
            self._ended(run, verdict_of(run, Failed(error, note="The executor could not run the task.")))

    def _broke(self, pool: Pool, error: BrokenExecutor) -> None:
        entries = pool.entries()
        cut_off = [run for run, future in pool.runs.items() if not _has_verdict(future)]
        if pool is self._pool:
            try:
                self._replace(pool)
            except Exception as failure:
                self._on_dead(f"it broke, and could not be made anew: {failure!r}")
        for run in cut_off:
            self._forget(pool, run)
        guilty, suspects = self._to_blame(pool, cut_off, entries)
        if guilty:
            self._in_vain.clear()
        for run in cut_off:
            if run in guilty:
                self._ended(run, self._lost(run, _death_of(pool, entries.get(run), error)))
            elif pool.killed_for is not None:
                who = f"task {pool.killed_for.name!r} of execution {pool.killed_for.execution_id}"
                self._start_over(run, f"The executor's processes were killed because {who} ran past its limit.")
            else:
                run.alone = run in suspects
                why = "A process of the executor died while this and other attempts were running."
                self._start_over(run, why, in_vain=not (guilty or suspects))

    def _to_blame(self, pool: Pool, cut_off: list[Run], entries: dict[Run, Entry]) -> tuple[set[Run], set[Run]]:
        """Those of the runs whose fault it was that a pool broke; and, where that cannot be known, those it may be."""
        if pool.killed_for is not None or runs_here(pool.executor):
            return set(), set()
        if pool.journal is None:
            suspects = set(cut_off)
        else:
            died_of = {run: pool.died[entry.process] for run, entry in entries.items() if entry.process in pool.died}
            guilty = {run for run, code in died_of.items() if code not in UNCLEAR_CODES}
            if guilty:
                return guilty, set()
            suspects = set(died_of) if pool.died else set(entries)
        is_sure = len(suspects) == 1 and (pool.journal is None or not pool.died)
        guilty = {run for run in suspects if run.alone or is_sure}
        return guilty, suspects - guilty

    def _start_over(self, run: Run, why: str, *, in_vain: bool = False) -> None:
        """Cut off or given back by nobody's fault of its own: it goes on at once, unless that goes on and on."""
        if run.is_settled or run.is_past_limit:
            self._ended(run, STOPPED)  # it is known how it ended, or that its limit was reached
            return
        if in_vain:
            self._in_vain[run.execution_id] += 1
            if self._in_vain[run.execution_id] >= MAX_IN_VAIN:
                self._on_dead(f"{MAX_IN_VAIN} times in a row it has not run what it was given; the last time: {why}")
        run.starts_over = why
        self._ended(run, STOPPED)

    def _give_back(self, run: Run, why: str) -> None:
        log_claim(run.claim, "handed back, %s", why, level=logging.ERROR)
        self._post(partial(self._ended, run, STOPPED))
        self._on_dead(why)

    def _lost(self, run: Run, what_happened: str) -> Verdict:
        return judge_lost(run.task, run.name, run.claim.counts_of(run.name), what_happened)

    def _forget(self, pool: Pool, run: Run) -> None:
        pool.runs.pop(run, None)
        self._pool_of.pop(run, None)
        if pool is not self._pool and not pool.runs:
            pool.close()

    # --- the pool -----------------------------------------------------------------------------------------------------

    def _replace(self, broken: Pool) -> None:
        self._use(self._new_pool(broken))
        logger.warning("the executor broke and was made anew")

    def _new_pool(self, broken: Pool | None = None) -> Pool:
        executor = self._make() if self._make is not None else made_anew(broken and broken.executor)
        if not isinstance(executor, Executor):
            raise TypeError("pass a function that makes one" if self._make is None else f"{executor!r} is no Executor")
        return Pool(executor, is_own=True)

    def _use(self, pool: Pool) -> None:
        before, self._pool = self._pool, pool
        self.is_in_this_process = runs_here(pool.executor)
        if before is not None and not before.runs:
            before.close()
        self.slots = min(self._concurrency, pool.slots or self._concurrency)


def _has_verdict(future: Future[Verdict]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _death_of(pool: Pool, entry: Entry | None, error: BrokenExecutor) -> str:
    code = pool.died.get(entry.process) if entry is not None else None
    if code is None:
        return f"The process that ran this attempt died: {error}"
    try:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    except ValueError:  # a signal without a name
        how = f"was ended by signal {-code}"
    return f"The process that ran this attempt {how}."
