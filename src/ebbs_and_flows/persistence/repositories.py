"""Repositories: rows to records and back, once. Each works within the transaction of its unit of work."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Row, literal_column, select

from ebbs_and_flows.checkpoints import AttemptCounts, AttemptEnd
from ebbs_and_flows.context import ContextDelta
from ebbs_and_flows.executions import (
    Failure,
    FlowExecution,
    FlowFilter,
    FlowStatus,
    FlowTransition,
    TaskExecution,
    TaskStatus,
)
from ebbs_and_flows.persistence.contexts import NO_CONTEXT, delta_to_row
from ebbs_and_flows.persistence.expressions import statement_now
from ebbs_and_flows.persistence.statements import Statements


@dataclass(frozen=True)
class NewExecution:
    """What an execution begins with."""

    template_name: str
    status: FlowStatus
    execution_step: int
    priority: int = 0
    queue: str = "default"
    idempotency_key: str | None = None
    run_at: datetime | None = None
    """When it is due; `None` means `delay_seconds` from the database's now."""
    delay_seconds: float = 0.0


class Executions:
    """`ebbs_flow_executions`."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._table = statements.tables.executions

    def add(self, new: NewExecution) -> tuple[int, datetime] | None:
        """Insert it; `None` where another execution has its idempotency key.

        Returns:
            Its id and the time of its creation.
        """
        row = self._connection.execute(
            self._statements.insert_execution,
            {
                "new_template_name": new.template_name,
                "new_status": new.status.value,
                "new_execution_step": new.execution_step,
                "new_priority": new.priority,
                "new_queue": new.queue,
                "new_idempotency_key": new.idempotency_key,
                "new_run_at": new.run_at,
                "new_delay_seconds": new.delay_seconds,
            },
        ).one_or_none()
        return None if row is None else (row.execution_id, row.updated_at)

    def id_of_key(self, idempotency_key: str) -> int | None:
        """The execution that has this idempotency key."""
        found = select(self._table.c.execution_id).where(self._table.c.idempotency_key == idempotency_key)
        return self._connection.execute(found).scalar_one_or_none()

    def get(self, execution_id: int, *, lock: bool = False) -> FlowExecution | None:
        """The execution, without its context; locked against other writers until the transaction ends if asked."""
        found = select(self._table).where(self._table.c.execution_id == execution_id)
        row = self._connection.execute(found.with_for_update(key_share=True) if lock else found).one_or_none()
        return None if row is None else _to_execution(row)

    def find(self, criteria: FlowFilter) -> list[FlowExecution]:
        """The executions that match, newest first, without their contexts."""
        columns = self._table.c
        found = select(self._table).order_by(columns.execution_id.desc()).limit(criteria.limit)
        if criteria.template_name is not None:
            found = found.where(columns.template_name == criteria.template_name)
        if criteria.statuses is not None:
            literals: list[ColumnElement[str]] = [literal_column(f"'{status.value}'") for status in criteria.statuses]
            found = found.where(columns.status == literals[0] if len(literals) == 1 else columns.status.in_(literals))
        if criteria.queue is not None:
            found = found.where(columns.queue == criteria.queue)
        if criteria.idempotency_key is not None:
            found = found.where(columns.idempotency_key == criteria.idempotency_key)
        if criteria.created_after is not None:
            found = found.where(columns.created_at >= criteria.created_after)
        if criteria.created_before is not None:
            found = found.where(columns.created_at < criteria.created_before)
        if criteria.before_id is not None:
            found = found.where(columns.execution_id < criteria.before_id)
        return [_to_execution(row) for row in self._connection.execute(found)]

    def next_due(self, status: FlowStatus) -> FlowExecution | None:
        """The execution that a claim from `status` would take first, without its context. Claims nothing."""
        columns = self._table.c
        due = (
            select(self._table)
            .where(
                columns.status == status.value,
                columns.run_at <= statement_now(),
                columns.status.in_([literal_column("'SCHEDULED'"), literal_column("'RESCHEDULED'")]),
            )
            .order_by(columns.priority.desc(), columns.run_at, columns.execution_id)
            .limit(1)
        )
        row = self._connection.execute(due).one_or_none()
        return None if row is None else _to_execution(row)

    def held_by(self, worker: str) -> list[FlowExecution]:
        """The executions that this worker holds, without their contexts."""
        columns = self._table.c
        held = select(self._table).where(columns.status == "RUNNING", columns.lease_owner == worker)
        return [_to_execution(row) for row in self._connection.execute(held)]

    def seconds_until_next(self, templates: Collection[str], queues: Collection[str] | None) -> float | None:
        """How long, by the database's clock, until the next RESCHEDULED execution is due; 0.0 where a SCHEDULED one is
        due now, `None` where there is neither.
        """
        columns = self._table.c
        now = statement_now().label("now")
        of_these = [columns.template_name.in_(templates)]
        if queues is not None:
            of_these.append(columns.queue.in_(queues))
        soonest = (
            select(columns.run_at, now)
            # A literal, as the index has it: a parameter could be anything.
            .where(columns.status == literal_column("'RESCHEDULED'"), *of_these)
            .order_by(columns.run_at)
            .limit(1)
        )
        row = self._connection.execute(soonest).one_or_none()
        if row is not None and row.run_at <= row.now:
            return 0.0
        due = select(columns.execution_id).where(
            columns.status == "SCHEDULED",
            columns.status.in_([literal_column("'SCHEDULED'"), literal_column("'RESCHEDULED'")]),
            columns.run_at <= statement_now(),
            *of_these,
        )
        due = due.order_by(columns.priority.desc(), columns.run_at, columns.execution_id)
        if self._connection.execute(due.limit(1)).one_or_none() is not None:
            return 0.0
        return None if row is None else max(0.0, (row.run_at - row.now).total_seconds())

    def running_of(self, what: Literal["templates", "queues"], names: Collection[str]) -> dict[str, int]:
        """How many executions of each of these templates or queues are RUNNING; none for one that is not there."""
        if not names:
            return {}
        statement = (
            self._statements.count_running_of_templates
            if what == "templates"
            else self._statements.count_running_of_queues
        )
        rows = self._connection.execute(statement, {"the_names": list(names)})
        return {name: count for name, count in rows}  # noqa: C416  # dict(rows) would be of Row

    def renew(self, worker: str, execution_ids: Collection[int], lease_seconds: float) -> dict[int, int]:
        """Move the end of the leases on; the epoch of each one renewed. What somebody has locked is passed over."""
        rows = self._connection.execute(
            self._statements.renew,
            {"the_ids": json.dumps(sorted(execution_ids)), "the_worker": worker, "new_lease_seconds": lease_seconds},
        )
        return {row.execution_id: row.epoch for row in rows}

    def epochs(self, execution_ids: Collection[int]) -> dict[int, int]:
        """The epochs of those of these executions that are RUNNING. Locks nothing."""
        rows = self._connection.execute(self._statements.holders, {"the_ids": json.dumps(sorted(execution_ids))})
        return {row.execution_id: row.epoch for row in rows}

    def places(self, execution_ids: Collection[int]) -> dict[int, tuple[int, int]]:
        """The epochs and steps of those of these executions that are RUNNING. Locks nothing."""
        rows = self._connection.execute(self._statements.holders, {"the_ids": json.dumps(sorted(execution_ids))})
        return {row.execution_id: (row.epoch, row.execution_step) for row in rows}

    def lock_expired(self, templates: Collection[str], spared: str, limit: int) -> list[FlowExecution]:
        """Lock executions of these templates that are RUNNING under a lease that has expired, without their contexts.
        What somebody else has locked is passed over, and so is what the worker that is spared holds.
        """
        rows = self._connection.execute(
            self._statements.lock_expired,
            {"the_templates": list(templates), "the_spared": spared, "the_limit": limit},
        )
        return [_to_execution(row) for row in rows]

    def claim_due(
        self,
        statuses: Collection[FlowStatus],
        templates: Collection[str],
        worker: str,
        lease_seconds: float,
        limit: int,
        queues: Collection[str] | None = None,
    ) -> list[FlowExecution]:
        """Take due executions for a worker, in the order in which they are to run: without their contexts.

        Args:
            queues: only of these; default of all.

        It takes two step numbers of each: one for the transition, one for what follows it in the same transaction.
        """
        parameters: dict[str, Any] = {
            "the_statuses": [status.value for status in statuses],
            "the_templates": list(templates),
            "the_limit": limit,
            "new_worker": worker,
            "new_lease_seconds": lease_seconds,
            "new_numbers": 2,
        }
        statement = self._statements.claim_due
        if queues is not None:
            statement = self._statements.claim_due_of_queues
            parameters["the_queues"] = list(queues)
        rows = self._connection.execute(statement, parameters)
        claimed = [_to_execution(row) for row in rows]
        return sorted(claimed, key=lambda each: (-each.priority, each.run_at, each.execution_id))

    def claim_one(self, execution_id: int, worker: str, lease_seconds: float, numbers: int = 2) -> FlowExecution | None:
        """Take this execution for a worker, due or not; `None` unless it is SCHEDULED or RESCHEDULED.

        Args:
            numbers: how many step numbers it takes: one for the transition, one more if an attempt starts with it.
        """
        row = self._connection.execute(
            self._statements.claim_one,
            {
                "the_id": execution_id,
                "new_worker": worker,
                "new_lease_seconds": lease_seconds,
                "new_numbers": numbers,
            },
        ).one_or_none()
        return None if row is None else _to_execution(row)

    def advance(
        self, execution_id: int, *, epoch: int, step: int, task_index: int, lease_seconds: float
    ) -> tuple[datetime, datetime] | None:
        """Take the next step number for an attempt at `task_index`, fenced by the epoch and the step.

        Returns:
            The time it was, and the new end of the lease; `None` where refused.
        """
        row = self._connection.execute(
            self._statements.advance,
            {
                "the_id": execution_id,
                "the_epoch": epoch,
                "the_step": step,
                "new_task_index": task_index,
                "new_lease_seconds": lease_seconds,
            },
        ).one_or_none()
        return None if row is None else (row.updated_at, row.lease_expires_at)

    def move(
        self,
        execution: FlowExecution,
        status: FlowStatus,
        *,
        step: int,
        task_index: int,
        wait_seconds: float | None = None,
    ) -> datetime:
        """Change the status of an execution that this transaction has locked; the time it was.

        Args:
            step: the number that the transition takes.
            wait_seconds: after which it is due again; `None` leaves `run_at` as it is.
        """
        row = self._connection.execute(
            self._statements.move,
            {
                "the_id": execution.execution_id,
                "the_step": execution.execution_step,
                "new_step": step,
                "new_status": status.value,
                "new_task_index": task_index,
                "new_wait_seconds": wait_seconds,
            },
        ).one()
        return row.updated_at  # type: ignore[no-any-return]  # a row's attributes are Any

    def touch(self, execution: FlowExecution, task_index: int) -> datetime:
        """Set the current index of an execution that this transaction has locked; the time it was."""
        row = self._connection.execute(
            self._statements.touch, {"the_id": execution.execution_id, "new_task_index": task_index}
        ).one()
        return row.updated_at  # type: ignore[no-any-return]  # a row's attributes are Any


class Attempts:
    """`ebbs_task_executions`."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._table = statements.tables.attempts

    def start(
        self, execution: FlowExecution, step: int, task_index: int, name: str, attempt: int, at: datetime
    ) -> TaskExecution:
        """Write the attempt as RUNNING, before its task runs."""
        started = TaskExecution(
            flow_execution_id=execution.execution_id,
            flow_execution_step=step,
            task_index=task_index,
            name=name,
            attempt=attempt,
            status=TaskStatus.RUNNING,
            started_at=at,
            worker=execution.lease_owner,
        )
        self.add(started, execution.epoch)
        return started

    def add(self, attempt: TaskExecution, epoch: int) -> None:
        """Insert an attempt that has started."""
        self._connection.execute(
            self._statements.insert_attempt,
            {
                "flow_execution_id": attempt.flow_execution_id,
                "flow_execution_step": attempt.flow_execution_step,
                "task_index": attempt.task_index,
                "name": attempt.name,
                "attempt": attempt.attempt,
                "epoch": epoch,
                "status": attempt.status.value,
                "started_at": attempt.started_at,
                "worker": attempt.worker,
            },
        )

    def end(self, execution_id: int, step: int, end: AttemptEnd, at: datetime) -> bool:
        """End an attempt that is RUNNING; False where it is not."""
        result = self._connection.execute(
            self._statements.end_attempt,
            {
                "the_id": execution_id,
                "the_step": step,
                "new_status": end.status.value,
                "new_failure": end.failure.value if end.failure is not None else None,
                "new_error_type": end.error_type,
                "new_output": end.output,
                "new_finished_at": at,
                **{f"new_{column}": value for column, value in delta_to_row(end.delta).items()},
            },
        )
        return result.rowcount == 1

    def end_open(self, execution_id: int, failure: Failure, error_type: str, output: str, at: datetime) -> int:
        """End as FAILED what is still RUNNING of an execution; how many attempts that were."""
        result = self._connection.execute(
            self._statements.end_open_attempts,
            {
                "the_id": execution_id,
                "new_failure": failure.value,
                "new_error_type": error_type,
                "new_output": output,
                "new_finished_at": at,
            },
        )
        return result.rowcount

    def open_names(self, execution_id: int) -> list[str]:
        """The names of the tasks whose attempts are RUNNING in an execution; as a rule one, or none."""
        columns = self._table.c
        found = select(columns.name).where(
            columns.flow_execution_id == execution_id, columns.status == TaskStatus.RUNNING.value
        )
        return list(self._connection.scalars(found))

    def of(self, execution_id: int) -> list[TaskExecution]:
        """All attempts of an execution, oldest first."""
        columns = self._table.c
        found = (
            select(*(columns[name] for name in _ATTEMPT_COLUMNS))
            .where(columns.flow_execution_id == execution_id)
            .order_by(columns.flow_execution_step)
        )
        return [TaskExecution(**row._mapping) for row in self._connection.execute(found)]

    def counts(self, execution_ids: Sequence[int]) -> dict[int, dict[str, AttemptCounts]]:
        """How the attempts have ended so far, by execution and by task name."""
        counts: dict[int, dict[str, AttemptCounts]] = defaultdict(dict)
        if execution_ids:
            for row in self._connection.execute(
                self._statements.count_attempts, {"the_ids": json.dumps(list(execution_ids))}
            ):
                counts[row.flow_execution_id][row.name] = AttemptCounts(row.started, int(row.failed), int(row.lost))
        return counts


class Transitions:
    """`ebbs_flow_transitions`."""

    def __init__(self, connection: Connection, statements: Statements) -> None:
        self._connection = connection
        self._statements = statements
        self._table = statements.tables.transitions

    def add(self, transition: FlowTransition, task_index: int, delta: ContextDelta | None = None) -> None:
        """Append a transition; `delta` is what its caller changed in the context, at this task.

        Every transition passes here, so this is where the table of allowed ones is held: who meets the assertion has
        found a mistake of this library's.
        """
        before = transition.from_status
        assert before is None or before.allows(transition.to_status), f"{before} -> {transition.to_status}"
        self._connection.execute(
            self._statements.insert_transition,
            {
                "flow_execution_id": transition.flow_execution_id,
                "flow_execution_step": transition.flow_execution_step,
                "from_status": transition.from_status.value if transition.from_status is not None else None,
                "to_status": transition.to_status.value,
                "at": transition.at,
                "worker": transition.worker,
                "reason": transition.reason,
                "task_index": task_index,
                **delta_to_row(delta),
            },
        )

    def of(self, execution_id: int) -> list[FlowTransition]:
        """All transitions of an execution, oldest first."""
        columns = self._table.c
        found = (
            select(*(columns[name] for name in FlowTransition.model_fields))
            .where(columns.flow_execution_id == execution_id)
            .order_by(columns.flow_execution_step)
        )
        return [FlowTransition(**row._mapping) for row in self._connection.execute(found)]

    def run_began(self, execution_ids: Sequence[int]) -> dict[int, datetime]:
        """When the first claim of each execution was, since it was scheduled or last re-run by hand; not for one that
        has not been claimed since.
        """
        began: dict[int, datetime] = {}
        if not execution_ids:
            return began
        columns = self._table.c
        turns = (
            select(columns.flow_execution_id, columns.from_status, columns.at)
            .where(
                columns.flow_execution_id.in_(execution_ids),
                (columns.to_status == FlowStatus.RUNNING.value) | (columns.from_status == FlowStatus.FAILED.value),
            )
            .order_by(columns.flow_execution_id, columns.flow_execution_step)
        )
        for row in self._connection.execute(turns):
            if row.from_status == FlowStatus.FAILED.value:
                began.pop(row.flow_execution_id, None)
            else:
                began.setdefault(row.flow_execution_id, row.at)
        return began


_ATTEMPT_COLUMNS = tuple(TaskExecution.model_fields)


def _to_execution(row: Row[Any]) -> FlowExecution:
    return FlowExecution(**row._mapping, execution_context=NO_CONTEXT)
