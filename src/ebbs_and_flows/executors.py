"""Bodies in an executor: process pools, in which a limit kills and a crash costs no more than an attempt; clusters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor
from functools import partial
from typing import Any

from ebbs_and_flows.checkpoints import Verdict
from ebbs_and_flows.errors import TemplateError
from ebbs_and_flows.lanes import Ended, Lane, Run, verdict_of
from ebbs_and_flows.logs import log_claim, logger
from ebbs_and_flows.outcomes import Failed
from ebbs_and_flows.remote import check_can_travel, remote_call, run_call
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.verdicts import STOPPED, judge_lost


class ExecutorLane(Lane):
    """Bodies in a `concurrent.futures.Executor`.

    A pool of processes breaks as a whole when one of them dies: all that ran in it is cut off, and nothing says whose
    fault it was. So the pool is made anew, and each of them runs again, alone: the one that breaks it then is to blame,
    and only that one's attempt counts as a crash.

    Args:
        executor: the executor; or what makes one, for pools that this library does not know how to make anew.
        slots: how many bodies it runs at once.
        patience_seconds: how long a run that is to be alone waits for the others at most.
        is_stopping: whether the worker is stopping: then a broken pool is nobody's fault.
        post: has a function called in the thread of the worker's loop.
        ended: called there when a body has ended.
        on_dead: called there when the executor is broken and cannot be made anew.
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor],
        slots: int,
        patience_seconds: float,
        *,
        is_stopping: Callable[[], bool],
        post: Callable[[Callable[[], None]], None],
        ended: Ended,
        on_dead: Callable[[], None],
    ) -> None:
        super().__init__(slots, patience_seconds)
        self._make = executor if not isinstance(executor, Executor) else None
        self._given = executor if isinstance(executor, Executor) else None
        self._executor: Executor | None = self._given
        self._is_stopping = is_stopping
        self._post = post
        self._ended = ended
        self._on_dead = on_dead
        self._futures: dict[Run, Future[Verdict]] = {}
        self._checked: dict[tuple[str, str], Task] = {}
        self._killed_for: Run | None = None

    def _start(self, run: Run) -> None:
        try:
            self._check(run)
            future = self._submit(run)
        except TemplateError as error:
            self._post(partial(self._ended, run, verdict_of(run, Failed(error, may_retry=False))))
            return
        except Exception as error:  # an executor is somebody else's code
            log_claim(run.claim, "the executor refuses it: %s", error, level=logging.ERROR)
            self._post(partial(self._ended, run, self._lost(run, f"The executor refused it: {error!r}")))
            self._on_dead()
            return
        self._futures[run] = future
        future.add_done_callback(lambda done: self._post(partial(self._done, run, done)))

    def _submit(self, run: Run) -> Future[Verdict]:
        call = remote_call(run.claim, run.template, run.task)
        if self._executor is None:
            assert self._make is not None, "either the executor is given, or what makes one"
            self._executor = self._make()
        try:
            return self._executor.submit(run_call, call)
        except BrokenExecutor:  # it broke while nothing of ours was in it
            if not self._revive():
                raise
            return self._executor.submit(run_call, call)

    def _check(self, run: Run) -> None:
        key = (run.template.name, run.name)
        if self._checked.get(key) is not run.task:
            check_can_travel(run.template, run.task, run.name)
            self._checked[key] = run.task

    def _done(self, run: Run, future: Future[Verdict]) -> None:
        if self._futures.get(run) is not future:
            return  # it broke with its pool, which was said already
        del self._futures[run]
        if future.cancelled():
            error: BaseException | None = CancelledError()
        else:
            error = future.exception()
        if error is None:
            self._ended(run, future.result())
        elif isinstance(error, BrokenExecutor):
            self._broke(run, error)
        elif isinstance(error, CancelledError) or type(error).__name__ == "KilledWorker":
            # dask's name for what its scheduler gives up: https://distributed.dask.org/en/stable/killed.html
            self._ended(run, self._lost(run, f"The executor gave up the attempt: {error!r}"))
        else:
            # It did not get as far as the body, or the verdict did not get back.
            self._ended(run, verdict_of(run, Failed(error, note="The executor could not run the task.")))

    def _broke(self, first: Run, error: BaseException) -> None:
        """The pool has broken: `first` is the first of its runs to say so, and the others are known to have ended."""
        others = [run for run in self.active if run is not first and run in self._futures]
        cut_off = [run for run in (first, *others) if not run.is_settled]
        killed_for, self._killed_for = self._killed_for, None
        for run in others:
            self._futures.pop(run, None)  # what its future still says is known
        if not self._revive():
            self._on_dead()
        for run in cut_off:
            if run.is_past_limit:
                continue
            if killed_for is not None:
                run.starts_over = (
                    f"The pool's processes were killed because task {killed_for.name!r} of execution "
                    f"{killed_for.execution_id} ran past its limit."
                )
            elif len(cut_off) > 1 and not run.alone:
                run.starts_over = f"A process of the pool died ({error}) while this and other attempts were running."
                run.alone = True
        for run in (first, *others):
            died = self._lost(run, f"The process that ran this attempt died ({error}).")
            self._ended(run, STOPPED if self._is_stopping() else died)

    def _lost(self, run: Run, what_happened: str) -> Verdict:
        return judge_lost(run.task, run.name, run.claim.counts_of(run.name), what_happened)

    def _revive(self) -> bool:
        """Make the executor anew; False where nobody knows how."""
        broken = self._executor
        try:
            fresh = self._make() if self._make is not None else _made_anew(broken)
        except Exception:
            logger.exception("the executor could not be made anew")
            return False
        if fresh is None:
            return False
        if broken is not None and broken is not fresh and broken is not self._given:
            broken.shutdown(wait=False, cancel_futures=True)
        self._executor = fresh
        logger.warning("the executor broke and was made anew")
        return True

    def interrupt(self, run: Run) -> bool:
        """Kill a pool's processes; elsewhere withdraw the call, which helps if it has not been started yet."""
        future = self._futures.get(run)
        if future is None:
            return True
        processes = getattr(self._executor, "_processes", None)
        if not isinstance(processes, dict) or not processes:
            future.cancel()
            return False
        self._killed_for = run
        for process in list(processes.values()):
            process.kill()
        return True

    def give_up(self, run: Run) -> None:
        """Its place is free when its future is done."""

    def close(self) -> None:
        for future in list(self._futures.values()):
            future.cancel()
        if self._executor is not None and self._executor is not self._given:
            self._executor.shutdown(wait=False, cancel_futures=True)


def slots_of(executor: object, concurrency: int) -> int:
    """How many bodies an executor runs at once, where it says so; else as many as the worker has in flight."""
    most = getattr(executor, "_max_workers", None)
    return min(most, concurrency) if isinstance(most, int) and most > 0 else concurrency


def _made_anew(broken: Any) -> Executor | None:
    """An executor like the one that broke, for the kinds that are known: the standard library's, and loky's."""
    if type(broken) is ProcessPoolExecutor:
        # It has no public way to say how it was made; these names have been the same from Python 3.7 to 3.14.
        how = vars(broken)
        more = {"max_tasks_per_child": how["_max_tasks_per_child"]} if "_max_tasks_per_child" in how else {}
        return ProcessPoolExecutor(
            how["_max_workers"],
            mp_context=how["_mp_context"],
            initializer=how["_initializer"],
            initargs=how["_initargs"],
            **more,
        )
    loky = sys.modules.get("loky")
    if loky is not None and isinstance(broken, loky.process_executor.ProcessPoolExecutor):
        made: Executor = loky.get_reusable_executor(max_workers=broken._max_workers)
        return made
    return None
