"""Contexts, folded from the deltas in the attempts and transitions; the only place that knows how a delta is kept."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from ebbs_and_flows.checkpoints import with_context
from ebbs_and_flows.codec import dumps_entries, loads_entries
from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.errors import UndecodableValueError
from ebbs_and_flows.executions import FlowExecution
from ebbs_and_flows.persistence.statements import Statements

NO_CONTEXT = ExecutionContext.from_encoded({})


@dataclass(frozen=True)
class Progress:
    """What an execution's history says of where it stands."""

    completed: tuple[str, ...]
    """The names of the tasks that it has completed, in order."""
    readable: ExecutionContext | UndecodableValueError
    """The context as the task at its current index receives it, or what is wrong with the rows that keep it."""

    @property
    def context(self) -> ExecutionContext:
        """The context as the task at its current index receives it.

        Raises:
            UndecodableValueError: a row that keeps a part of it was damaged.
        """
        if isinstance(self.readable, UndecodableValueError):
            raise self.readable
        return self.readable


class Contexts:
    """Contexts, folded from the deltas in the attempts and transitions."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements

    def progress(self, executions: Sequence[FlowExecution], *, has_run: bool = True) -> dict[int, Progress]:
        """Fold the histories of executions that were read before, as they stood then.

        Rows that came later are left out, so it needs no snapshot: their step is beyond the execution's.

        Args:
            has_run: False where none of them has had an attempt yet.
        """
        if not executions:
            return {}
        ids = {"the_ids": json.dumps([execution.execution_id for execution in executions])}
        deltas: dict[int, list[Delta]] = defaultdict(list)
        for row in self._connection.execute(self._statements.transition_deltas, ids):
            deltas[row.flow_execution_id].append(Delta(row, row.flow_execution_step, row.task_index, None))
        for done in self._connection.execute(self._statements.attempt_deltas, ids) if has_run else ():
            deltas[done.flow_execution_id].append(Delta(done, done.flow_execution_step, done.task_index, done.name))
        return {each.execution_id: _progress(each, deltas[each.execution_id]) for each in executions}

    def with_contexts(self, executions: Sequence[FlowExecution]) -> list[FlowExecution]:
        """The same executions with their contexts."""
        progress = self.progress(executions)
        return [with_context(each, progress[each.execution_id].context) for each in executions]


@dataclass(frozen=True)
class Delta:
    """A row that keeps a delta, and where it stands: at which step, before or after which task."""

    row: Any
    step: int
    task_index: int
    task_name: str | None

    @property
    def place(self) -> int:
        """Where it stands in the flow: what a caller set before task i at 2i, what task i itself added at 2i + 1."""
        return 2 * self.task_index + (0 if self.task_name is None else 1)


def standing(deltas: Iterable[Delta], task_index: int) -> list[Delta]:
    """Replay deltas by step: those that stand for an execution at this index, in order.

    A later one at the same or an earlier place supersedes what stood from there on. That is what a re-run from an
    earlier task means: the results after it are history, not context.
    """
    stack: list[Delta] = []
    for delta in sorted(deltas, key=lambda each: each.step):
        while stack and (
            stack[-1].place > delta.place or (stack[-1].place == delta.place and delta.task_name is not None)
        ):
            stack.pop()
        stack.append(delta)
    return [delta for delta in stack if delta.place <= 2 * task_index]


def completed_in(deltas: Iterable[Delta]) -> tuple[str, ...]:
    """The names of the tasks that are completed where these deltas stand, in order."""
    return tuple([delta.task_name for delta in deltas if delta.task_name is not None])


def _progress(execution: FlowExecution, deltas: Iterable[Delta]) -> Progress:
    written = [delta for delta in deltas if delta.step <= execution.execution_step]
    reached = standing(written, execution.current_task_index)
    completed = completed_in(reached)
    try:
        folded = [_read(execution, delta) for delta in reached if delta.row.entries is not None]
    except UndecodableValueError as error:  # of this execution alone: the others that were asked for are well
        return Progress(completed, error)
    return Progress(completed, ExecutionContext.folded(folded))


def _read(execution: FlowExecution, delta: Delta) -> ContextDelta:
    try:
        return delta_of_row(delta.row)
    except UndecodableValueError as error:
        where = f"{error.problem} (execution {execution.execution_id}, step {delta.step})"
        raise UndecodableValueError(error.entry, error.type_name, where) from error


def delta_to_row(delta: ContextDelta | None) -> Mapping[str, str | None]:
    """The columns that keep a delta: all NULL where nothing has changed."""
    entries, entry_types, dropped = delta_to_texts(delta) if delta is not None else _NOTHING
    return {"entries": entries, "entry_types": entry_types, "dropped": dropped}


def delta_to_texts(delta: ContextDelta) -> tuple[str | None, str | None, str | None]:
    """The columns that keep a delta: its entries, their types, and the names of those that were dropped."""
    if not (delta.entries or delta.dropped):
        return _NOTHING
    return (*dumps_entries(delta.entries), json.dumps(delta.dropped) if delta.dropped else None)


_NOTHING = (None, None, None)


def delta_of_row(row: Any) -> ContextDelta:
    """The delta that a row keeps."""
    try:
        dropped = tuple(json.loads(row.dropped)) if row.dropped is not None else ()
    except (TypeError, ValueError, RecursionError) as error:
        raise UndecodableValueError(None, "dropped", "the stored JSON is damaged") from error
    return ContextDelta(loads_entries(row.entries, row.entry_types), dropped)
