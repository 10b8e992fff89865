"""Pool: one executor from its making to its end, and what is known of its processes, where it has any."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from ebbs_and_flows.checkpoints import Verdict
from ebbs_and_flows.lanes import Run
from ebbs_and_flows.remote import Entry, read_journal, start_process, token_of

EXIT_CODE_SECONDS = 1.0
"""How long the exit code of a process that has ended may take to arrive."""


class Pool:
    """An executor and what runs in it.

    The standard library's process pool, and loky's, which is made after it, break as a whole when one of their
    processes dies, and do not say which call that one was running. So the processes note in a journal what they run,
    and who has died is seen before the others are killed. Neither has a public way to its processes, or to how it was
    made; the private names used here have been the same from Python 3.10 to 3.14.

    Args:
        executor: the executor.
        is_own: whether it was made for the worker, which then shuts it down.
    """

    def __init__(self, executor: Executor, *, is_own: bool) -> None:
        self.executor: Any = executor
        self.runs: dict[Run, Future[Verdict]] = {}
        """What was submitted and has not been heard of since."""
        self.killed_for: Run | None = None
        """The run because of whose limit its processes were killed."""
        self.died: dict[int, int | None] = {}
        """The processes that had died by themselves when it broke, and their exit codes."""
        self.has_processes = isinstance(getattr(executor, "_processes", None), dict)
        """Whether it has processes on this machine, which are its own and can be killed."""
        self.journal = _new_folder() if self.has_processes else None
        """The folder in which they note what they run; `None` where that is not known."""
        self._is_own = is_own
        self._is_broken = False
        if self.has_processes:
            _prepare(executor)

    @property
    def slots(self) -> int | None:
        """How many calls it runs at once, where it says so."""
        most = getattr(self.executor, "_max_workers", None)
        return most if isinstance(most, int) and most > 0 else None

    def submit(self, run: Run, call: Callable[..., Verdict], *arguments: Any) -> Future[Verdict]:
        """Have a run's body called.

        Raises:
            BrokenExecutor: it broke while nothing of the worker's was in it.
            Exception: it takes nothing any more.
        """
        future: Future[Verdict] = self.executor.submit(call, *arguments)
        self.runs[run] = future
        future.add_done_callback(self._note_deaths)
        return future

    def entries(self) -> dict[Run, Entry]:
        """What the processes have noted of the runs that are in it, once they have taken them up."""
        try:
            noted = {} if self.journal is None else read_journal(self.journal)
        except OSError:  # whoever cleans up temporary files has been here
            self.journal, noted = None, {}
        return {run: noted[token] for run in self.runs if (token := token_of(run.claim)) in noted}

    def kill(self) -> None:
        """Kill its processes. All that it runs is cut off."""
        for process in self._processes():
            _kill(process)

    def close(self) -> None:
        """Let go of it. What still runs in it is killed, or withdrawn where that is not possible."""
        if self.has_processes:
            if self.runs:
                self.kill()
        else:
            # Not in a pool of processes: up to Python 3.11 one that breaks with a cancelled call in it leaves all
            # others without an answer (https://github.com/python/cpython/issues/94777).
            for future in list(self.runs.values()):
                future.cancel()
        if self._is_own:
            try:
                self.executor.shutdown(wait=False, cancel_futures=True)
            except TypeError:  # an executor that knows no cancel_futures
                self.executor.shutdown(wait=False)
        if self.journal is not None:
            shutil.rmtree(self.journal, ignore_errors=True)

    def _processes(self) -> list[Any]:
        return list((getattr(self.executor, "_processes", None) or {}).values())

    def _note_deaths(self, future: Future[Verdict]) -> None:
        """See who has died, and kill the others. Called in the executor's own thread, before it ends them itself: it
        would ask them to end, and wait until they do.
        """
        if self._is_broken or future.cancelled() or not isinstance(future.exception(), BrokenExecutor):
            return
        self._is_broken = True
        processes = {process.sentinel: process for process in self._processes()}
        dead = wait(list(processes), timeout=0) if processes else []
        for sentinel, process in processes.items():
            if sentinel in dead:
                process.join(EXIT_CODE_SECONDS)
                self.died[process.pid] = process.exitcode
            else:
                _kill(process)


def made_anew(broken: Any) -> Executor | None:
    """An executor like the one that broke, for the kinds that are known: the standard library's, and loky's."""
    how = vars(broken) if hasattr(broken, "__dict__") else {}
    loky = sys.modules.get("loky")
    if type(broken) is ProcessPoolExecutor:
        more = {"max_tasks_per_child": how["_max_tasks_per_child"]} if "_max_tasks_per_child" in how else {}
        return ProcessPoolExecutor(
            how["_max_workers"],
            mp_context=how["_mp_context"],
            initializer=how["_initializer"],
            initargs=how["_initargs"],
            **more,
        )
    if loky is not None and isinstance(broken, loky.ProcessPoolExecutor):
        made: Executor = loky.ProcessPoolExecutor(
            how["_max_workers"],
            timeout=how["_timeout"],
            context=how["_context"],
            initializer=how["_initializer"],
            initargs=how["_initargs"],
            env=how["_env"],
        )
        return made
    return None


def runs_here(executor: object) -> bool:
    """Whether an executor runs what it is given in this process, so that nothing has to travel."""
    return isinstance(executor, ThreadPoolExecutor)


def _prepare(executor: Any) -> None:
    """Have each process prepared as it starts. Those that have started already are prepared by their first call."""
    how = vars(executor)
    if executor._processes or "_initializer" not in how or "_initargs" not in how:
        return
    initializer, arguments = how["_initializer"], how["_initargs"]
    if initializer is start_process:  # for another worker, or before this process was forked
        _, initializer, arguments = arguments
    executor._initializer, executor._initargs = start_process, (os.getpid(), initializer, arguments)


def _kill(process: Any) -> None:
    with suppress(OSError):
        if hasattr(signal, "SIGKILL"):
            os.kill(process.pid, signal.SIGKILL)
        else:  # Windows, where nothing can resist
            process.terminate()


def _new_folder() -> str | None:
    try:
        return tempfile.mkdtemp(prefix="ebbs-pool-")
    except OSError:  # no place for it: then it is not known who died
        return None
