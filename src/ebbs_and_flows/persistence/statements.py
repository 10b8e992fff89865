"""Every statement that writes, built once a service: building one costs as much as sending it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Integer, String, bindparam, case, func, insert, literal_column, null, select, update
from sqlalchemy.sql import ColumnElement

from ebbs_and_flows.executions import Failure, FlowStatus, TaskStatus
from ebbs_and_flows.persistence.databases import Database
from ebbs_and_flows.persistence.expressions import (
    database_now,
    latest,
    seconds_parameter,
    statement_now,
)
from ebbs_and_flows.persistence.tables import Tables, UtcDateTime


class Statements:
    """The statements for one schema of one kind of database. Parameters named `the_...` stand in conditions,
    `new_...` among the values.
    """

    def __init__(self, tables: Tables, database: Database) -> None:
        self.tables = tables
        self.batches = database.batches(tables.metadata.schema)
        executions, attempts, transitions = tables.executions, tables.attempts, tables.transitions
        now = latest(database_now(), executions.c.updated_at)
        is_it = executions.c.execution_id == bindparam("the_id")
        is_held = (
            is_it
            & (executions.c.status == FlowStatus.RUNNING.value)
            & (executions.c.epoch == bindparam("the_epoch"))
            & (executions.c.execution_step == bindparam("the_step"))
        )
        lease_end = seconds_parameter("new_lease_seconds")
        # One text, however many there are: a parameter for each would be another statement for each number of them.
        the_ids = database.select_ids()

        self.insert_execution = (
            database.insert(executions)
            .values(
                template_name=bindparam("new_template_name"),
                status=bindparam("new_status"),
                execution_step=bindparam("new_execution_step"),
                current_task_index=0,
                epoch=0,
                priority=bindparam("new_priority"),
                queue=bindparam("new_queue"),
                idempotency_key=bindparam("new_idempotency_key"),
                run_at=func.coalesce(
                    bindparam("new_run_at", type_=UtcDateTime()),
                    seconds_parameter("new_delay_seconds"),
                    type_=UtcDateTime(),
                ),
                created_at=database_now(),
                updated_at=database_now(),
            )
            .on_conflict_do_nothing(
                index_elements=[executions.c.idempotency_key], index_where=executions.c.idempotency_key.is_not(None)
            )
            .returning(executions.c.execution_id, executions.c.updated_at)
        )

        self.insert_transition = insert(transitions)
        self.insert_attempt = insert(attempts)

        is_due = (
            executions.c.status.in_(bindparam("the_statuses", expanding=True))
            & (executions.c.run_at <= statement_now())
            & executions.c.template_name.in_(bindparam("the_templates", expanding=True))
            # The literal condition is the index's own; the parameter above cannot be matched with it.
            & executions.c.status.in_([_literal(FlowStatus.SCHEDULED), _literal(FlowStatus.RESCHEDULED)])
        )
        is_of_queues = executions.c.queue.in_(bindparam("the_queues", expanding=True))
        due = (
            select(executions.c.execution_id)
            .where(is_due)
            .order_by(executions.c.priority.desc(), executions.c.run_at, executions.c.execution_id)
            .limit(bindparam("the_limit", type_=Integer()))
        )
        claimed: dict[str, Any] = {
            "status": FlowStatus.RUNNING.value,
            "epoch": executions.c.epoch + 1,
            "execution_step": executions.c.execution_step + bindparam("new_numbers", type_=Integer()),
            "lease_owner": bindparam("new_worker"),
            "lease_expires_at": lease_end,
            "started_at": func.coalesce(executions.c.started_at, now, type_=UtcDateTime()),
            "finished_at": null(),
            "updated_at": now,
        }
        self.claim_due = database.claim(executions, due).values(claimed).returning(*executions.c)
        self.claim_due_of_queues = (
            database.claim(executions, due.where(is_of_queues)).values(claimed).returning(*executions.c)
        )
        self.claim_one = (
            update(executions)
            .where(is_it, executions.c.status.in_([FlowStatus.SCHEDULED.value, FlowStatus.RESCHEDULED.value]))
            .values(claimed)
            .returning(*executions.c)
        )

        is_running = executions.c.status == _literal(FlowStatus.RUNNING)  # a literal, as the index has it
        is_one_of = executions.c.execution_id.in_(the_ids)
        self.renew = (
            database.claim(
                executions,
                select(executions.c.execution_id).where(
                    is_one_of, is_running, executions.c.lease_owner == bindparam("the_worker")
                ),
            )
            .values(lease_expires_at=lease_end)
            .returning(executions.c.execution_id, executions.c.epoch)
        )
        self.holders = select(executions.c.execution_id, executions.c.epoch, executions.c.execution_step).where(
            is_one_of, is_running
        )
        self.lock_expired = database.lock_free(
            select(executions)
            .where(
                is_running,
                executions.c.lease_expires_at < statement_now(),
                executions.c.template_name.in_(bindparam("the_templates", expanding=True)),
                executions.c.lease_owner != bindparam("the_spared"),
            )
            .order_by(executions.c.execution_id)
            .limit(bindparam("the_limit", type_=Integer()))
        )
        self.count_running_of_templates = (
            select(executions.c.template_name, func.count())
            .where(is_running, executions.c.template_name.in_(bindparam("the_names", expanding=True)))
            .group_by(executions.c.template_name)
        )
        self.count_running_of_queues = (
            select(executions.c.queue, func.count())
            .where(is_running, executions.c.queue.in_(bindparam("the_names", expanding=True)))
            .group_by(executions.c.queue)
        )

        started: dict[str, Any] = {
            "execution_step": executions.c.execution_step + 1,
            "current_task_index": bindparam("new_task_index"),
            "updated_at": now,
            "lease_expires_at": lease_end,
        }
        self.advance = (
            update(executions)
            .where(is_held)
            .values(started)
            .returning(executions.c.updated_at, executions.c.lease_expires_at)
        )

        moved: dict[str, Any] = {
            "status": bindparam("new_status"),
            "execution_step": bindparam("new_step"),
            "current_task_index": bindparam("new_task_index"),
            "updated_at": now,
            "lease_owner": null(),
            "lease_expires_at": null(),
            # Without a wait (NULL) it stays as it is.
            "run_at": func.coalesce(seconds_parameter("new_wait_seconds"), executions.c.run_at, type_=UtcDateTime()),
            "finished_at": case((_is_at_rest(bindparam("new_status", type_=String())), now), else_=null()),
        }
        self.move = (
            update(executions)
            .where(is_it, executions.c.execution_step == bindparam("the_step"))
            .values(moved)
            .returning(executions.c.updated_at)
        )

        self.touch = (
            update(executions)
            .where(is_it)
            .values(current_task_index=bindparam("new_task_index"), updated_at=now)
            .returning(executions.c.updated_at)
        )

        self.end_attempt = (
            update(attempts)
            .where(
                attempts.c.flow_execution_id == bindparam("the_id"),
                attempts.c.flow_execution_step == bindparam("the_step"),
                attempts.c.status == TaskStatus.RUNNING.value,
            )
            .values(
                {
                    name: bindparam(f"new_{name}")
                    for name in (
                        "status",
                        "failure",
                        "error_type",
                        "output",
                        "entries",
                        "entry_types",
                        "dropped",
                        "finished_at",
                    )
                }
            )
        )
        self.end_open_attempts = (
            update(attempts)
            .where(attempts.c.flow_execution_id == bindparam("the_id"), attempts.c.status == TaskStatus.RUNNING.value)
            .values(
                status=TaskStatus.FAILED.value,
                failure=bindparam("new_failure"),
                error_type=bindparam("new_error_type"),
                output=bindparam("new_output"),
                finished_at=bindparam("new_finished_at"),
            )
        )

        self.count_attempts = (
            select(
                attempts.c.flow_execution_id,
                attempts.c.name,
                func.count().label("started"),
                func.sum(
                    case((attempts.c.failure.in_([Failure.EXCEPTION.value, Failure.TIMEOUT.value]), 1), else_=0)
                ).label("failed"),
                func.sum(case((attempts.c.failure == Failure.LOST.value, 1), else_=0)).label("lost"),
            )
            .where(attempts.c.flow_execution_id.in_(the_ids))
            .group_by(attempts.c.flow_execution_id, attempts.c.name)
        )
        self.attempt_deltas = select(
            attempts.c.flow_execution_id,
            attempts.c.flow_execution_step,
            attempts.c.task_index,
            attempts.c.name,
            attempts.c.entries,
            attempts.c.entry_types,
            attempts.c.dropped,
        ).where(
            attempts.c.flow_execution_id.in_(the_ids),
            attempts.c.status == TaskStatus.SUCCEEDED.value,
        )
        self.transition_deltas = select(
            transitions.c.flow_execution_id,
            transitions.c.flow_execution_step,
            transitions.c.task_index,
            transitions.c.entries,
            transitions.c.entry_types,
            transitions.c.dropped,
        ).where(
            transitions.c.flow_execution_id.in_(the_ids),
            transitions.c.entries.is_not(None),
        )


def _literal(status: FlowStatus) -> ColumnElement[str]:
    return literal_column(f"'{status.value}'", String())


def _is_at_rest(status: ColumnElement[Any]) -> ColumnElement[bool]:
    return status.in_([FlowStatus.SUCCEEDED.value, FlowStatus.FAILED.value, FlowStatus.CANCELLED.value])
