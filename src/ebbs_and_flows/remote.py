"""What travels to another process, and what runs there: the task's reference, its encoded context, its verdict."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import threading
from dataclasses import dataclass
from typing import Any

from ebbs_and_flows.checkpoints import AttemptCounts, Claim, Verdict
from ebbs_and_flows.codec import declare_type
from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import TemplateError
from ebbs_and_flows.logs import ABOUT, about
from ebbs_and_flows.outcomes import run_body
from ebbs_and_flows.tasks import Task
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.verdicts import judge


@dataclass(frozen=True)
class RemoteCall:
    """One attempt, as it travels to the process that runs its body.

    A function task is pickled as the name under which its module has it, a task class' instance as its class' name and
    its attributes, the context in its stored form: the other process imports what it needs, as this one did, and gets
    no code.
    """

    task: Task
    name: str
    context: ExecutionContext
    counts: AttemptCounts
    types: tuple[Any, ...]
    fields: dict[str, Any]
    token: str
    """Different for each attempt: an executor that remembers the results of equal calls must not take two for one."""


def remote_call(claim: Claim, template: FlowTemplate, task: Task) -> RemoteCall:
    """The open attempt of a claim, ready to travel."""
    attempt = claim.attempt
    assert attempt is not None, "only an open attempt can be run"
    execution = claim.execution
    return RemoteCall(
        task,
        attempt.name,
        execution.execution_context,
        claim.counts_of(attempt.name),
        template.declared_types(),
        about(claim),
        f"{execution.execution_id}/{attempt.flow_execution_step}/{execution.epoch}",
    )


def run_call(call: RemoteCall) -> Verdict:
    """Run an attempt's body in this process and give its verdict, which is plain data: exceptions may not travel."""
    _prepare_process(os.getpid())
    for declared in call.types:
        declare_type(declared)
    token = ABOUT.set(call.fields)
    try:
        return judge(call.task, run_body(call.task, call.name, call.context), call.counts)
    finally:
        ABOUT.reset(token)


def check_can_travel(template: FlowTemplate, task: Task, name: str) -> None:
    """Raise `TemplateError` if this task cannot be sent to another process by reference."""
    try:
        pickle.dumps((task, template.declared_types()))
    except Exception as error:  # pickling runs code of the task's class
        raise TemplateError(
            f"task {name!r} of template {template.name!r} cannot run in another process, which has to import it: "
            f"define it, and the types that it declares, at the top of a module ({type(error).__name__}: {error})"
        ) from error


@functools.lru_cache(maxsize=1)
def _prepare_process(_process: int) -> None:
    """Once in each pool process: leave Ctrl-C to the worker, and end when the worker's process has ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="ebbs end with parent", daemon=True).start()
