"""What travels to another process, and what runs there: the task's reference, its encoded context, its verdict."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ebbs_and_flows.checkpoints import AttemptCounts, Claim, Verdict
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import TemplateError
from ebbs_and_flows.logs import ABOUT, about
from ebbs_and_flows.outcomes import Failed, run_body
from ebbs_and_flows.registry import REGISTRY
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.verdicts import judge

LOOK_SECONDS = 0.5
"""How often a pool's process looks whether the worker's process is still there, where nothing tells it."""


@dataclass(frozen=True)
class RemoteCall:
    """One attempt, as it travels to the process that runs its body."""

    task: bytes
    """As `portable` made it. Unpickled only where its failure can be recorded: a pool's process that could not read a
    call would die of it."""
    name: str
    context: ExecutionContext
    """In its stored form, not decoded before the task reads it."""
    counts: AttemptCounts
    fields: dict[str, Any]
    token: str
    """Different for each attempt: an executor that remembers the results of equal calls must not take two for one."""
    worker_process: int
    """The id of the worker's process."""
    journal: str | None
    """The folder in which the processes of a pool note what they run; `None` where nobody reads it."""


def portable(template: FlowTemplate, task: Task, name: str) -> bytes:
    """A task as it travels to another process, by reference.

    A function task is pickled as the name under which its module has it, a task class' instance as its class' name and
    its attributes: the other process imports what it needs, as this one did, and gets no code. With it go the names and
    codecs under which this process has registered types, those that templates declare among them.

    Raises:
        TemplateError: it cannot be sent.
    """
    try:
        return pickle.dumps((task, _portable_registrations()))
    except Exception as error:  # pickling runs code of the task's class
        raise TemplateError(
            f"task {name!r} of template {template.name!r} cannot run in another process, which has to import it: "
            f"define it at the top of a module ({type(error).__name__}: {error})"
        ) from error


def remote_call(claim: Claim, task: bytes, journal: str | None) -> RemoteCall:
    """The open attempt of a claim, ready to travel."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can be run"
    return RemoteCall(
        task,
        attempt.name,
        claim.context,
        claim.counts_of(attempt.name),
        about(claim),
        token_of(claim),
        os.getpid(),
        journal,
    )


def token_of(claim: Claim) -> str:
    """What tells the open attempt of a claim from all others."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt has a token"
    return f"{claim.execution.execution_id}/{attempt.flow_execution_step}/{claim.execution.epoch}"


def run_call(call: RemoteCall) -> Verdict:
    """Run an attempt's body in this process and give its verdict, which is plain data: exceptions may not travel."""
    prepare_process(call.worker_process)
    _note(call)
    try:
        task = _load(call.task)
    except BaseException as error:  # it imports the user's modules
        failed = Failed(error, note="The task cannot be imported in the executor's process.")
        return Verdict(failed.attempt_end(), f"it cannot be imported in the executor's process: {failed.summary}")
    token = ABOUT.set(call.fields)
    try:
        _note(call, time.monotonic())
        return judge(task, run_body(task, call.name, call.context), call.counts)
    except BaseException as error:  # also KeyboardInterrupt: Ctrl-C goes to the worker, so this is the task's own doing
        return judge(task, Failed(error), call.counts)
    finally:
        ABOUT.reset(token)


@functools.lru_cache(maxsize=256)
def _load(portable_task: bytes) -> Task:
    """The task, as one instance for all its calls in this process."""
    task, registrations = pickle.loads(portable_task)
    for each in registrations:
        with suppress(Exception):  # a module that is not here: what needs it will say so
            REGISTRY.add(pickle.loads(each))
    return task  # type: ignore[no-any-return]  # as it was pickled


def _portable_registrations() -> tuple[bytes, ...]:
    """Each by itself, so that one which cannot travel holds up none of the others."""
    found = []
    for each in REGISTRY.registrations():
        with suppress(Exception):  # a class that no module has, or a codec that cannot be pickled
            found.append(pickle.dumps(each))
    return tuple(found)


# --- the journal ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a process of a pool has noted last: the attempt it took up, and since when its body runs, on
    `time.monotonic`, which the processes of one machine share; `None` while the task is being imported.
    """

    process: int
    began: float | None


def read_journal(folder: str) -> dict[str, Entry]:
    """What the processes of a pool have noted last, by the attempt's token.

    Raises:
        OSError: the folder is not there any more.
    """
    entries = {}
    for page in Path(folder).iterdir():
        with suppress(OSError, ValueError):  # it is being written
            token, *began = page.read_text("ascii").split()
            entries[token] = Entry(int(page.name), float(began[0]) if began else None)
    return entries


def _note(call: RemoteCall, began: float | None = None) -> None:
    if call.journal is not None:
        with suppress(OSError):  # a machine that does not have the folder
            page = Path(call.journal) / str(os.getpid())
            page.write_text(f"{call.token} {'' if began is None else began}", "ascii")


# --- the process ------------------------------------------------------------------------------------------------------


def start_process(worker_process: int, initializer: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    """The initializer of a pool's processes: what this library needs, then what the pool's maker has asked for."""
    prepare_process(worker_process)
    if initializer is not None:
        initializer(*arguments)


def prepare_process(worker_process: int) -> None:
    """Make this process one of a worker's pool, if its parent is the worker's process: leave signals to the worker, and
    end when that one has ended.
    """
    _prepare(os.getpid(), worker_process)


@functools.lru_cache(maxsize=1)
def _prepare(_process: int, worker_process: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != worker_process:
        return  # a thread of the worker itself, or a process of a cluster, which looks after itself
    if threading.current_thread() is threading.main_thread():
        # Ctrl-C reaches the whole group: the worker answers it. A forked process has the worker's own handlers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sentinel = getattr(parent, "sentinel", None)  # loky's have none
    if sentinel is not None and sys.platform == "linux":
        _end_by_kernel(sentinel)
    watch = threading.Thread(target=_end_with, args=(parent.pid, sentinel), name="ebbs end with worker", daemon=True)
    watch.start()


def _end_with(parent: int, sentinel: Any) -> None:
    is_child = sentinel is None or os.getppid() == parent  # not a fork server's
    while True:
        if sentinel is None:
            time.sleep(LOOK_SECONDS)
        elif wait([sentinel], LOOK_SECONDS):
            os._exit(1)
        if is_child and os.getppid() != parent:
            os._exit(1)


def _end_by_kernel(sentinel: int) -> None:
    """Have the kernel kill this process as the worker's end of the pipe closes: a thread could not, while the task is
    in C code that holds the interpreter's lock. See F_SETSIG in fcntl(2).
    """
    import fcntl  # there is none on Windows

    with suppress(OSError):
        fcntl.fcntl(sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)
