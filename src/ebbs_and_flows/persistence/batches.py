"""Batches: many rows in a few statements. What each database says for it stands in a module of its own."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from ebbs_and_flows.checkpoints import Checkpoint, OpenAttempt
from ebbs_and_flows.context import ContextDelta
from ebbs_and_flows.executions import RUNNABLE_STATUSES, FlowStatus
from ebbs_and_flows.persistence.contexts import delta_to_texts
from ebbs_and_flows.persistence.repositories import NewExecution
from ebbs_and_flows.persistence.rows import ENTRIES, OUTPUT, BatchStatements, Moved, Row, Rows

MAX_ROWS = 500
"""How many rows go into one statement at most: SQLite takes 32,766 parameters (https://sqlite.org/limits.html)."""

MAX_TEXT = 4_000_000
"""How many characters of deltas and tracebacks go into one statement at most; one row may have more by itself."""


class CheckpointBatch:
    """Checkpoints as they are sent, cut where the text would be too long for one statement."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = checkpoints
        self.chunks: list[Rows] = []
        room = 0
        for checkpoint in checkpoints:
            row = _to_row(checkpoint)
            size = len(row[OUTPUT] or "") + len(row[ENTRIES] or "")
            if not self.chunks or size > room or len(self.chunks[-1]) == MAX_ROWS:
                self.chunks.append(Rows())
                room = MAX_TEXT
            self.chunks[-1].rows.append(row)
            room -= size

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def is_one_statement(self) -> bool:
        """Whether all of it goes into one statement, where the database takes one for it."""
        return len(self.chunks) == 1


class Batches:
    """Ends of attempts with what follows them, and the attempts that claims start."""

    def __init__(self, connection: Connection, statements: BatchStatements) -> None:
        self._connection = connection
        self._statements = statements

    def write(self, batch: CheckpointBatch, *, wait: bool) -> dict[int, Moved]:
        """Write the ends of attempts and what follows them.

        Args:
            batch: of each execution one checkpoint.
            wait: whether to wait for what somebody else has locked; else that is left out.

        Returns:
            By execution id those that were written. The others are not held any more, or are locked.
        """
        moved = {}
        for rows in batch.chunks:
            for each in self._statements.write_checkpoints(self._connection, rows, wait=wait):
                moved[each.execution_id] = each
        return moved

    def add_scheduled(self, new: NewExecution, deltas: Sequence[ContextDelta]) -> list[int]:
        """Insert an execution for each context, all alike else; their ids, in the order of the contexts."""
        ids: list[int] = []
        for first in range(0, len(deltas), MAX_ROWS):
            texts = [delta_to_texts(each) for each in deltas[first : first + MAX_ROWS]]
            added = self._statements.add_scheduled(
                self._connection,
                len(texts),
                {
                    "template_name": new.template_name,
                    "priority": new.priority,
                    "queue": new.queue,
                    "run_at": new.run_at,
                    "delay_seconds": new.delay_seconds,
                },
            )
            given: list[Row] = [
                (execution_id, entries, entry_types)
                for execution_id, (entries, entry_types, _) in zip(added, texts, strict=True)
            ]
            self._statements.add_contexts(self._connection, Rows(given))
            ids += added
        return ids

    def begin(self, attempts: Sequence[tuple[int, str | None, int]]) -> None:
        """Write the transition of executions that were claimed in this transaction, and the attempts that follow.

        Args:
            attempts: of each execution its id, and the task's name and the number of the attempt that begins; no name
                where none does.
        """
        for first in range(0, len(attempts), MAX_ROWS):
            self._statements.begin(self._connection, Rows(list(attempts[first : first + MAX_ROWS])))


def _to_row(checkpoint: Checkpoint) -> Row:
    """The row, in the order of `CHECKPOINT_FIELDS`."""
    execution_id, epoch, worker, step, end, then, lease_seconds = checkpoint
    status, delta, failure, error_type, output = end
    entries, types, dropped = delta_to_texts(delta)
    name = attempt = then_status = reason = wait_seconds = None
    if isinstance(then, OpenAttempt):
        name, attempt = then.name, then.attempt
    else:
        assert FlowStatus.RUNNING.allows(then.status), f"RUNNING -> {then.status}"
        then_status, reason = then.status.value, then.reason
        wait_seconds = then.wait_seconds if then.status in RUNNABLE_STATUSES else None
    return (
        execution_id,
        epoch,
        step,
        status.value,
        None if failure is None else failure.value,
        error_type,
        output,
        entries,
        types,
        dropped,
        then.task_index,
        name,
        attempt,
        then_status,
        reason,
        wait_seconds,
        lease_seconds,
        worker,
    )
