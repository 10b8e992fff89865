"""FlowService: one method a use case, one unit of work each. What it returns is what the database has."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from ebbs_and_flows import schema as database_schema, steps
from ebbs_and_flows.arguments import (
    as_context,
    connection_of,
    runnable_status,
    valid_contexts,
    valid_delay,
    valid_filter,
    valid_id,
    valid_lease_seconds,
    valid_priority,
    valid_reason,
    valid_run_at,
    valid_status,
    way_out,
)
from ebbs_and_flows.checkpoints import NO_CHANGE, NO_COUNTS, AttemptEnd, Checkpoint, Claim, OpenAttempt, Recorded
from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.errors import (
    EbbsError,
    InvalidArgumentError,
    LeaseLostError,
    SchemaError,
    TransitionError,
    UnknownExecutionError,
)
from ebbs_and_flows.executions import (
    RUNNABLE_STATUSES,
    Failure,
    FlowExecution,
    FlowFilter,
    FlowStatus,
    FlowTransition,
    TaskExecution,
    TaskStatus,
)
from ebbs_and_flows.names import MAX_NAME_LENGTH, valid_name
from ebbs_and_flows.persistence.batches import CheckpointBatch
from ebbs_and_flows.persistence.contexts import NO_CONTEXT
from ebbs_and_flows.persistence.databases import capacity_of, create_engine_for, database_of
from ebbs_and_flows.persistence.inspection import Inspection
from ebbs_and_flows.persistence.repositories import NewExecution
from ebbs_and_flows.persistence.statements import Statements
from ebbs_and_flows.persistence.tables import build_tables
from ebbs_and_flows.persistence.unit_of_work import UnitOfWork
from ebbs_and_flows.rooms import Room, Wanted
from ebbs_and_flows.templates import FlowTemplate
from ebbs_and_flows.texts import bounded, printable

BY_HAND = "by hand"
"""The owner of a lease that somebody took with `update_flow_status`, without a worker's name."""


class CommitRefusedError(Exception):
    """The database refused to commit a transactional task's effects, for example by a deferred constraint."""

    def __init__(self, error: DBAPIError) -> None:
        self.error = error
        super().__init__(str(error))


class FlowService:
    """Flow executions in a database.

    Args:
        database: a URL of PostgreSQL or SQLite (`"sqlite://"` is in memory), or a SQLAlchemy Engine, which is used as
            it is and left open. On SQLite the schema is made or brought up to date by itself; on PostgreSQL that is
            done at deploy time.
        schema: the named schema that holds the tables (PostgreSQL only); default the connection's own.
        notify: whether to tell waiting workers at once that something is due (NOTIFY, on PostgreSQL only); default yes.
            Without it they find it by polling. A commit that notifies takes a lock which is one for the whole server,
            so turn it off where very many transactions a second schedule flows; and where flows are scheduled in
            transactions with a two-phase commit, which PostgreSQL cannot prepare after a NOTIFY.

    Raises:
        SchemaError: on PostgreSQL, the schema is missing or behind: run `ebbs db upgrade`.
        DatabaseUrlError: the URL or engine cannot be used.

    One service may be shared by many threads. Every method that writes commits before it returns, unless it was handed
    a `session`.
    """

    def __init__(self, database: str | URL | Engine, *, schema: str | None = None, notify: bool = True) -> None:
        self._owns_engine = isinstance(database, (str, URL))
        self.engine: Engine = create_engine_for(database) if isinstance(database, (str, URL)) else database
        self._database = database_of(self.engine)
        if self._owns_engine:
            # Who drops the service without closing it leaves no connection behind. Not at exit, where the process' own
            # end closes them, and not in a forked child, whose connections are the parent's.
            weakref.finalize(self, _dispose_in, os.getpid(), self.engine).atexit = False
        self.schema = schema
        self._notify = notify
        self._process = os.getpid()
        try:
            self._prepare_schema()
        except BaseException:
            self.close()
            raise
        self._working_engine = self._database.isolate(self.engine)
        self._one_statement_engine = self._database.without_transactions(self.engine)
        self._statements = Statements(build_tables(schema), self._database)
        self._templates: dict[str, FlowTemplate] = {}

    def __enter__(self) -> FlowService:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<FlowService {self.engine.url.render_as_string(hide_password=True)}>"

    def close(self) -> None:
        """Close the connections of an engine that was made here; a given engine is left alone.

        One that is in use just now, in a thread that is about to end, is closed when it is given back.
        """
        if self._owns_engine:
            pool = self.engine.pool
            self.engine.dispose()
            event.listen(pool, "checkin", _close_late)

    # --- create and schedule ------------------------------------------------------------------------------------------

    def create_flow_execution(
        self, template_name: str, context: ExecutionContext | Mapping[str, Any] | None = None
    ) -> FlowExecution:
        """Record an execution as CREATED; nothing runs it until its status becomes SCHEDULED. Commits.

        Raises:
            UnserializableValueError: the context holds a value that cannot be stored. Nothing is written.
        """
        delta = initial_delta(context)
        new = NewExecution(valid_name("template", template_name), FlowStatus.CREATED, 1)
        with self._work() as work:
            execution_id = steps.add(work, new, delta)
            created = steps.current(work, execution_id)
            work.commit()
        return created

    def schedule(
        self,
        template_name: str,
        context: ExecutionContext | Mapping[str, Any] | None = None,
        *,
        session: Session | Connection | None = None,
        run_at: datetime | None = None,
        delay: timedelta | float | None = None,
        priority: int = 0,
        queue: str = "default",
        idempotency_key: str | None = None,
    ) -> int:
        """Record an execution as SCHEDULED and return its id; `FlowRunner.schedule_flow` checks its template as well.

        Commits, unless `session` is given: then it joins that transaction, and a rollback leaves nothing.

        Args:
            session: a Session or Connection of the caller's on the same database.
            run_at: when it is due, an aware datetime; default at once.
            delay: instead of `run_at`, from the database's now: a timedelta, or seconds.
            priority: higher runs first; a 32-bit int.
            queue: a name by which workers choose what they take.
            idempotency_key: an execution that has this key already, of whatever template, is returned instead of a new
                one, also where many callers schedule at once.

        Raises:
            InvalidArgumentError, InvalidNameError: an argument that cannot be used. Nothing is written.
            UnserializableValueError: the context holds a value that cannot be stored. Nothing is written.
        """
        new = NewExecution(
            template_name=valid_name("template", template_name),
            status=FlowStatus.SCHEDULED,
            execution_step=2,
            priority=valid_priority(priority),
            queue=valid_name("queue", queue),
            idempotency_key=None if idempotency_key is None else valid_name("idempotency key", idempotency_key),
            run_at=valid_run_at(run_at, delay),
            delay_seconds=valid_delay(delay),
        )
        delta = initial_delta(context)
        with self._work(joined=connection_of(session)) as work:
            execution_id = steps.add(work, new, delta)
            if run_at is None and not new.delay_seconds:
                self._announce(work)
            work.commit()
        return execution_id

    def schedule_many(
        self,
        template_name: str,
        contexts: Iterable[ExecutionContext | Mapping[str, Any]],
        *,
        session: Session | Connection | None = None,
        run_at: datetime | None = None,
        delay: timedelta | float | None = None,
        priority: int = 0,
        queue: str = "default",
    ) -> list[int]:
        """Record an execution as SCHEDULED for each context; `FlowRunner.schedule_flows` checks the template as well.

        Commits, all of them or none, unless `session` is given: then they join that transaction.

        Args:
            contexts: what each begins with; all of them are encoded before anything is written.
            session, run_at, delay, priority, queue: as for `schedule`, the same for all.

        Returns:
            Their ids, in the order of the contexts.

        Raises:
            InvalidArgumentError, InvalidNameError: an argument that cannot be used. Nothing is written.
            UnserializableValueError: a context holds a value that cannot be stored. Nothing is written.
        """
        new = NewExecution(
            template_name=valid_name("template", template_name),
            status=FlowStatus.SCHEDULED,
            execution_step=2,
            priority=valid_priority(priority),
            queue=valid_name("queue", queue),
            run_at=valid_run_at(run_at, delay),
            delay_seconds=valid_delay(delay),
        )
        given = valid_contexts(contexts)
        deltas: list[ContextDelta] = []
        try:
            deltas.extend(initial_delta(context) for context in given)
        except EbbsError as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"It is about contexts[{len(deltas)}].")
            raise
        if not deltas:
            return []
        with self._work(joined=connection_of(session)) as work:
            ids = work.batches.add_scheduled(new, deltas)
            if run_at is None and not new.delay_seconds:
                self._announce(work)
            work.commit()
        return ids

    # --- read ---------------------------------------------------------------------------------------------------------

    def get_flow_execution(self, execution_id: int) -> FlowExecution:
        """The execution as it is now, with the context as its current task receives it.

        Raises:
            UnknownExecutionError: there is none of this id.
        """
        with self._work(writes=False) as work:
            return work.contexts.with_contexts([steps.existing(work, execution_id)])[0]

    def get_runnable_flow(self, status: FlowStatus = FlowStatus.SCHEDULED) -> FlowExecution | None:
        """The execution, of whatever template, that is next to be claimed from this status; `None` if none is due.

        Claims nothing.

        Raises:
            InvalidArgumentError: a status other than SCHEDULED or RESCHEDULED.
        """
        status = runnable_status(status)
        with self._work(writes=False) as work:
            execution = work.executions.next_due(status)
            return None if execution is None else work.contexts.with_contexts([execution])[0]

    def find_flow_executions(
        self, criteria: FlowFilter | None = None, *, with_contexts: bool = True
    ) -> list[FlowExecution]:
        """The executions that match, newest first; by default the latest hundred.

        Args:
            criteria: what they have to be like; default nothing.
            with_contexts: False leaves their contexts empty, and reads one table instead of three.

        Raises:
            InvalidArgumentError: a filter that cannot be used.
        """
        criteria = valid_filter(criteria if criteria is not None else FlowFilter())
        with self._work(writes=False) as work:
            found = work.executions.find(criteria)
            return work.contexts.with_contexts(found) if with_contexts else found

    def get_task_executions(self, execution_id: int) -> list[TaskExecution]:
        """One record an attempt, oldest first.

        Raises:
            UnknownExecutionError: there is no such execution.
        """
        with self._work(writes=False) as work:
            execution = steps.existing(work, execution_id)
            return work.attempts.of(execution.execution_id)

    def get_flow_task_execution_history(self, execution_id: int) -> list[TaskExecution]:
        """Two records an attempt, oldest first: as it started (RUNNING), then as it ended. One while it runs.

        Raises:
            UnknownExecutionError: there is no such execution.
        """
        history: list[TaskExecution] = []
        for attempt in self.get_task_executions(execution_id):
            history.append(
                attempt.model_copy(
                    update={
                        "status": TaskStatus.RUNNING,
                        "output": None,
                        "error_type": None,
                        "failure": None,
                        "finished_at": None,
                    }
                )
            )
            if attempt.status is not TaskStatus.RUNNING:
                history.append(attempt)
        return history

    def get_flow_status_history(self, execution_id: int) -> list[FlowTransition]:
        """Every change of the execution's status, oldest first, beginning with its creation.

        Raises:
            UnknownExecutionError: there is no such execution.
        """
        with self._work(writes=False) as work:
            execution = steps.existing(work, execution_id)
            return work.transitions.of(execution.execution_id)

    def seconds_until_next(self, templates: Collection[str], queues: Collection[str] | None = None) -> float | None:
        """How long until there is something to do for these templates, by the database's clock: an execution that is
        due, or a RESCHEDULED one that will be. SCHEDULED ones whose time is yet to come do not count.

        Args:
            queues: only of these; default of all.

        Returns:
            Seconds, 0.0 if one is due now; `None` where there is none at all.
        """
        with self._work(writes=False) as work:
            return work.executions.seconds_until_next(templates, queues)

    # --- change a status ----------------------------------------------------------------------------------------------

    def update_flow_status(
        self,
        execution_id: int,
        status: FlowStatus,
        context: ExecutionContext | Mapping[str, Any] | None = None,
        *,
        reason: str | None = None,
        worker: str | None = None,
        lease_seconds: float = 30.0,
    ) -> FlowExecution:
        """Move an execution along one edge of the transition table, by hand. Commits.

        Args:
            context: replaces the context as of the current task, for example to mend a value before a re-run.
            reason: recorded with the transition.
            worker, lease_seconds: who holds it from now on and for how long; only for RUNNING, which raises the epoch.

        The current index stays as it is, also on SUCCEEDED: only ended attempts move it.

        An attempt that is open when the execution leaves RUNNING is ended as FAILED, with what happened as its error
        type.

        Raises:
            TransitionError: the execution's status has no edge to this one. Nothing is written.
            UnknownExecutionError: there is no such execution.
            UnserializableValueError: the context holds a value that cannot be stored. Nothing is written.
        """
        status = valid_status(status)
        reason = valid_reason(reason)
        worker = None if worker is None else valid_name("worker", worker)
        lease_seconds = valid_lease_seconds(lease_seconds)
        replacement = None if context is None else as_context(context)
        with self._work() as work:
            execution = steps.existing(work, execution_id, lock=True)
            if not execution.status.allows(status):
                raise TransitionError(execution.execution_id, execution.status, status, way_out(execution.status))
            delta = None
            if replacement is not None:
                delta = replacement.delta_from(work.contexts.progress([execution])[execution.execution_id].context)
            if status is FlowStatus.RUNNING:
                claimed = work.executions.claim_one(execution.execution_id, worker or BY_HAND, lease_seconds, numbers=1)
                assert claimed is not None, "the row is locked and its status allows it"
                steps.add_transition(
                    work, execution, status, claimed.updated_at, worker=worker, reason=reason, delta=delta
                )
            else:
                steps.leave(work, execution, status, reason=reason, delta=delta)
                if status in RUNNABLE_STATUSES:
                    self._announce(work)
            moved = steps.current(work, execution_id)
            work.commit()
        return moved

    def cancel(self, execution_id: int, reason: str | None = None) -> FlowExecution:
        """Cancel an execution that is not final. Once this has returned, no task of it starts any more. Commits.

        A task that is running may run to its end, but what it returns is refused, and what a transactional task wrote
        is rolled back.

        Raises:
            TransitionError: it has succeeded or was cancelled already.
            UnknownExecutionError: there is no such execution.
        """
        return self.update_flow_status(execution_id, FlowStatus.CANCELLED, reason=reason)

    def reschedule(self, execution_id: int, from_task: str | None = None, reason: str | None = None) -> FlowExecution:
        """Make a FAILED execution run again: from the task that failed, or from an earlier one. Commits.

        Args:
            from_task: the name of a task that it has completed, to re-run from there with the context as it was then.

        Raises:
            TransitionError: the execution is not FAILED.
            TemplateError: `from_task` is no task that it has reached.
            UnknownExecutionError: there is no such execution.
        """
        reason = valid_reason(reason)
        with self._work() as work:
            execution = steps.existing(work, execution_id, lock=True)
            if execution.status is not FlowStatus.FAILED:
                raise TransitionError(
                    execution.execution_id, execution.status, FlowStatus.RESCHEDULED, way_out(execution.status)
                )
            task_index = execution.current_task_index
            if from_task is not None:
                task_index = steps.index_reached(work, execution, valid_name("task", from_task))
                reason = reason or f"from task {from_task!r}"
            steps.leave(work, execution, FlowStatus.RESCHEDULED, reason=reason, task_index=task_index)
            self._announce(work)
            rescheduled = steps.current(work, execution_id)
            work.commit()
        return rescheduled

    # --- attempts by hand ---------------------------------------------------------------------------------------------

    def remember_template(self, template: FlowTemplate) -> None:
        """Let `create_task_execution` know the names of this template's tasks."""
        self._templates[template.name] = template

    def create_task_execution(
        self, execution: FlowExecution, name: str | None = None, *, lease_seconds: float = 30.0
    ) -> TaskExecution:
        """Record the start of an attempt at the current task of an execution that is RUNNING. Commits.

        Args:
            execution: as it was read; if another worker has claimed it since, the write is refused.
            name: the task's name; default as in the template of a runner on this service, else `task-<index>`.
            lease_seconds: for how long the execution is held from now on.

        Raises:
            TransitionError: an attempt is open already; end it first with `update_task_execution`.
            LeaseLostError: the execution is no longer RUNNING under the epoch and at the step that `execution` shows.
            UnknownExecutionError: there is no such execution.
        """
        _check_record("execution", execution, FlowExecution)
        lease_seconds = valid_lease_seconds(lease_seconds)
        with self._work() as work:
            found = steps.existing(work, execution.execution_id, lock=True)
            if (
                found.status is not FlowStatus.RUNNING
                or found.epoch != execution.epoch
                or found.execution_step != execution.execution_step
            ):
                raise LeaseLostError(execution.execution_id, execution.epoch)
            task_name = valid_name("task", name) if name is not None else self._task_name(found)
            counts = work.attempts.counts([found.execution_id])[found.execution_id]
            attempt = counts[task_name].started + 1 if task_name in counts else 1
            if any(each.status is TaskStatus.RUNNING for each in work.attempts.of(found.execution_id)):
                raise TransitionError(found.execution_id, found.status, "RUNNING with another attempt", "one is open")
            moved = work.executions.advance(
                found.execution_id,
                epoch=found.epoch,
                step=found.execution_step,
                task_index=found.current_task_index,
                lease_seconds=lease_seconds,
            )
            assert moved is not None, "the row is locked"
            started = work.attempts.start(
                found, found.execution_step + 1, found.current_task_index, task_name, attempt, moved[0]
            )
            work.commit()
        return started

    def update_task_execution(
        self,
        execution_id: int,
        task_execution: TaskExecution,
        context: ExecutionContext | Mapping[str, Any] | None = None,
    ) -> TaskExecution:
        """Record the end of an attempt that is RUNNING. Commits. On SUCCEEDED the execution moves on to the next index.

        Args:
            execution_id: the execution that the attempt belongs to.
            task_execution: the attempt as `create_task_execution` returned it, with its new status, and on failure its
                output and error type; the times are the database's own.
            context: what the task returned, for SUCCEEDED; default the context unchanged.

        Raises:
            InvalidArgumentError: the attempt is not of this execution, or its new status is RUNNING.
            TransitionError: the attempt has ended already, or its execution is not RUNNING.
            UnknownExecutionError: there is no such execution or attempt.
        """
        _check_record("task_execution", task_execution, TaskExecution)
        if task_execution.flow_execution_id != valid_id(execution_id):
            raise InvalidArgumentError("task_execution", task_execution, f"an attempt of execution {execution_id}")
        succeeded = task_execution.status is TaskStatus.SUCCEEDED
        if task_execution.status is TaskStatus.RUNNING:
            raise InvalidArgumentError("task_execution", task_execution, "the status SUCCEEDED or FAILED")
        returned = None if context is None else as_context(context)
        with self._work() as work:
            execution = steps.existing(work, execution_id, lock=True)
            attempts = {each.flow_execution_step: each for each in work.attempts.of(execution.execution_id)}
            found = attempts.get(task_execution.flow_execution_step)
            if found is None:
                raise UnknownExecutionError(
                    execution_id, f" with an attempt at step {task_execution.flow_execution_step}"
                )
            if found.status is not TaskStatus.RUNNING or execution.status is not FlowStatus.RUNNING:
                raise TransitionError(
                    execution_id, execution.status, task_execution.status, f"its attempt is {found.status}"
                )
            delta = NO_CHANGE
            if returned is not None and succeeded:
                delta = returned.delta_from(work.contexts.progress([execution])[execution.execution_id].context)
            end = AttemptEnd(
                task_execution.status,
                delta,
                None if succeeded else task_execution.failure or Failure.EXCEPTION,
                None if succeeded else printable(task_execution.error_type or "")[:MAX_NAME_LENGTH] or None,
                None if succeeded else bounded(task_execution.output or "") or None,
            )
            at = work.executions.touch(execution, found.task_index + (1 if succeeded else 0))
            work.attempts.end(execution.execution_id, found.flow_execution_step, end, at)
            ended = {each.flow_execution_step: each for each in work.attempts.of(execution.execution_id)}
            work.commit()
        return ended[found.flow_execution_step]

    def resume_by_hand(self, execution: FlowExecution, name: str, worker: str, lease_seconds: float) -> Claim:
        """The claim of an execution that somebody drives by hand: with its open attempt, which is started if need be.

        Args:
            execution: as it was read.
            name: its current task's name.
            worker: who drives it; an execution that another worker has claimed is left to that one.
            lease_seconds: for how long the execution is held from now on.

        Raises:
            LeaseLostError: the execution is no longer RUNNING under the epoch and at the step that `execution` shows.
        """
        attempts = self.get_task_executions(execution.execution_id)
        attempt = attempts[-1] if attempts and attempts[-1].status is TaskStatus.RUNNING else None
        if attempt is None:
            attempt = self.create_task_execution(execution, name, lease_seconds=lease_seconds)
        elif attempt.flow_execution_step != execution.execution_step or execution.lease_owner not in (worker, BY_HAND):
            raise LeaseLostError(execution.execution_id, execution.epoch)
        with self._work(writes=False) as work:
            found = work.contexts.with_contexts([steps.existing(work, execution.execution_id)])[0]
            counts = work.attempts.counts([execution.execution_id])
        if found.epoch != execution.epoch:
            raise LeaseLostError(execution.execution_id, execution.epoch)
        open_attempt = OpenAttempt(
            attempt.flow_execution_step, attempt.task_index, attempt.name, attempt.attempt, attempt.worker or ""
        )
        return Claim(found, found.execution_context, open_attempt, counts[execution.execution_id])

    # --- claim, renew, checkpoint, recover: what runners and workers stand on -----------------------------------------

    def claim(
        self,
        templates: Mapping[str, FlowTemplate],
        statuses: Collection[FlowStatus],
        worker: str,
        *,
        lease_seconds: float,
        limit: int = 1,
        queues: Collection[str] | None = None,
        max_in_flight: Mapping[str, int] | None = None,
        only: int | None = None,
    ) -> list[Claim]:
        """Take due executions of these templates for a worker and start the attempt at each one's current task.
        Commits.

        An execution whose template no longer begins with the tasks it has completed is parked as FAILED, and comes back
        as a claim without an attempt; so does one whose context cannot be read or whose time limit has passed, and, as
        SUCCEEDED, one that has nothing left to run.

        Args:
            limit: at most so many.
            queues: only of these; default of all.
            max_in_flight: by queue, how many executions may be RUNNING at once, over all workers; needs `queues`.
            only: the execution of this id and nothing else, also before it is due.

        Returns:
            The claims, in the order in which they are to run.

        Raises:
            InvalidArgumentError: `max_in_flight` without `queues`.
        """
        if max_in_flight and queues is None:
            raise InvalidArgumentError("queues", queues, "the queues to claim from, where max_in_flight bounds some")
        wanted = Wanted(templates, statuses, worker, lease_seconds, limit, queues, max_in_flight or {}, only)
        return self.turn([], wanted)[1]

    def batch_of(self, checkpoints: Sequence[Checkpoint]) -> CheckpointBatch:
        """Checkpoints, one of an execution each, made ready to be sent."""
        batch = CheckpointBatch(checkpoints)
        for chunk in batch.chunks:
            self._statements.batches.prepare(chunk)
        return batch

    def turn(
        self,
        checkpoints: Sequence[Checkpoint] | CheckpointBatch,
        wanted: Wanted | None = None,
        *,
        connection: Connection | None = None,
    ) -> tuple[dict[int, Recorded | None], list[Claim]]:
        """A turn of a worker: record the ends of attempts and what follows them, then claim, in one transaction.
        Commits.

        Args:
            checkpoints: of an execution each. What somebody else has locked just now is left out, to be written later.
            wanted: what to claim; as much more as executions come to rest with these checkpoints.
            connection: on which to do it, of this service's engine and in no transaction; default one of the pool.

        Returns:
            By execution id what came of each checkpoint that was written, `None` where it was refused; and the claims.
        """
        batch = checkpoints if isinstance(checkpoints, CheckpointBatch) else CheckpointBatch(checkpoints)
        if wanted is not None and not wanted.is_possible(batch.checkpoints):
            wanted = None
        if not batch.checkpoints and wanted is None:
            return {}, []
        is_one_statement = wanted is None and batch.is_one_statement
        with self._work(connection=connection, is_one_statement=is_one_statement) as work:
            recorded = steps.record(work, batch, wait=False)
            claims = [] if wanted is None else self._claim(work, wanted.more_by(recorded.values()))
            work.commit()
        return recorded, claims

    def _claim(self, work: UnitOfWork, wanted: Wanted) -> list[Claim]:
        room = Room.of(work, wanted.templates, wanted.queues, wanted.max_in_flight)
        claimed: list[FlowExecution] = []
        limit = wanted.limit
        if wanted.only is not None:
            limit, claimed = 0, self._claim_only(work, wanted.only, room, wanted)
        while len(claimed) < limit and not room.is_full:
            most = min(limit - len(claimed), room.most_at_once)
            found = work.executions.claim_due(
                wanted.statuses, room.templates, wanted.worker, wanted.lease_seconds, most, queues=room.queues
            )
            claimed += found
            room.take(found)
            if len(found) < most:
                break
        return steps.begin(work, claimed, wanted.templates) if claimed else []

    def _claim_only(
        self,
        work: UnitOfWork,
        execution_id: int,
        room: Room,
        wanted: Wanted,
    ) -> list[FlowExecution]:
        found = work.executions.get(execution_id, lock=True)
        if found is None or found.status not in wanted.statuses or not room.has(found):
            return []
        claimed = work.executions.claim_one(execution_id, wanted.worker, wanted.lease_seconds)
        return [] if claimed is None else [claimed]

    def renew(self, worker: str, held: Mapping[int, int], *, lease_seconds: float) -> set[int]:
        """Move the end of a worker's leases on, by the database's clock. Commits.

        Args:
            held: the epoch of each execution that the worker holds, by its id.
            lease_seconds: from now on.

        Returns:
            Those that it does not hold any more: cancelled, ended, or claimed by another one meanwhile.
        """
        if not held:
            return set()
        with self._work() as work:
            renewed = work.executions.renew(worker, held, lease_seconds)
            work.commit()
        missed = {execution_id for execution_id, epoch in held.items() if renewed.get(execution_id) != epoch}
        return self.no_longer_held({each: held[each] for each in missed})

    def no_longer_held(self, held: Mapping[int, int]) -> set[int]:
        """Those of these executions that are no longer RUNNING under the epoch given with each. Writes nothing."""
        if not held:
            return set()
        with self._work(writes=False) as work:
            epochs = work.executions.epochs(held)
        return {execution_id for execution_id, epoch in held.items() if epochs.get(execution_id) != epoch}

    def held_by(self, worker: str) -> list[FlowExecution]:
        """The executions that are RUNNING under this worker's name, without their contexts."""
        with self._work(writes=False) as work:
            return work.executions.held_by(worker)

    def checkpoint(self, checkpoint: Checkpoint) -> Recorded | None:
        """Record the end of an attempt and what follows it, once whoever has locked the execution lets it go. Commits.

        Returns:
            What came of it, `None` where it was refused because the execution is no longer held.
        """
        with self._work(is_one_statement=True) as work:
            recorded = steps.record(work, CheckpointBatch([checkpoint]), wait=True)
            work.commit()
        return recorded[checkpoint.execution_id]

    def outcome_of(self, checkpoint: Checkpoint) -> Recorded | None:
        """What came of a checkpoint whose commit went unanswered, read back; `None` where it was not committed, or the
        execution was cancelled or taken over since, so that nothing of it is to be started here.

        Only who holds the execution under the checkpoint's epoch can have ended its attempt without ending that hold,
        so an ended attempt under the same epoch is this checkpoint's doing.
        """
        with self._work(writes=False) as work:
            execution = steps.existing(work, checkpoint.execution_id)
            attempts = {each.flow_execution_step: each for each in work.attempts.of(checkpoint.execution_id)}
        ended = attempts.get(checkpoint.step)
        if execution.epoch != checkpoint.epoch or ended is None or ended.status is not checkpoint.end.status:
            return None
        following = attempts.get(checkpoint.step + 1)
        if ended.failure is not checkpoint.end.failure or (following and following.status is not TaskStatus.RUNNING):
            return None
        then = checkpoint.then
        if following is None:
            return Recorded(None, then, execution.updated_at, execution.run_at)
        attempt = OpenAttempt(
            following.flow_execution_step, following.task_index, following.name, following.attempt, checkpoint.worker
        )
        return Recorded(attempt, then)

    def run_in_transaction(self, body: Callable[[Session, UnitOfWork], Checkpoint]) -> Recorded | None:
        """Run a body whose effects and checkpoint commit together. What it raises rolls both back and is raised on.

        Args:
            body: gets a Session in the transaction, and the unit of work that it is a part of; returns the checkpoint.

        Returns:
            What came of the checkpoint; `None` where it was refused, and the effects rolled back with it.

        Raises:
            CommitRefusedError: the database refused the commit; nothing is left of it.
        """
        with self._work() as work:
            with work.session() as session:
                checkpoint = body(session, work)
            recorded = steps.record(work, CheckpointBatch([checkpoint]), wait=True)[checkpoint.execution_id]
            if recorded is None:
                return None
            try:
                work.commit()
            except DBAPIError as error:
                if error.connection_invalidated:
                    raise
                raise CommitRefusedError(error) from error
        return recorded

    def recover(
        self, execution_id: int, templates: Mapping[str, FlowTemplate], worker: str, *, lease_seconds: float
    ) -> Claim:
        """Take over an execution whose worker is known to be dead, whatever is left of its lease. Commits.

        The attempt that the worker left open ends as FAILED with the error type `WorkerLost`. The execution is
        rescheduled and claimed again by this worker, or, where its task has lost `max_crashes` workers, parked as
        FAILED (a claim without an attempt).

        Raises:
            TransitionError: the execution is not RUNNING.
            UnknownExecutionError: there is no such execution.
        """
        with self._work() as work:
            execution = steps.existing(work, execution_id, lock=True)
            if execution.status is not FlowStatus.RUNNING:
                raise TransitionError(execution.execution_id, execution.status, "recovered", way_out(execution.status))
            reason = f"worker {execution.lease_owner} was lost"
            verdict = steps.lose_worker(work, execution, templates[execution.template_name], reason)
            if verdict is FlowStatus.FAILED:
                after = steps.current(work, execution_id)
                claim = Claim(after, after.execution_context, None, NO_COUNTS)
            else:
                claimed = work.executions.claim_one(execution.execution_id, worker, lease_seconds)
                assert claimed is not None, "the row is locked and RESCHEDULED"
                claim = steps.begin(work, [claimed], templates)[0]
            work.commit()
        return claim

    def recover_expired(
        self, templates: Mapping[str, FlowTemplate], *, spared: str = "", limit: int = 100
    ) -> dict[int, FlowStatus]:
        """End what workers have left behind whose lease has expired: each such execution of these templates becomes
        RESCHEDULED, due at once, or FAILED where its task has lost `max_crashes` workers. Commits.

        Any process may do this at any time, whatever queues it serves. The attempt that was open ends as FAILED with
        the error type `WorkerLost`; should its worker live after all, its writes are refused from now on.

        Args:
            spared: the worker whose executions are left alone, because it is the caller, and lives.
            limit: at most so many.

        Returns:
            What became of each, by execution id.
        """
        if not templates:
            return {}
        with self._work() as work:
            became = {}
            for execution in work.executions.lock_expired(templates, spared, limit):
                reason = f"the lease of worker {execution.lease_owner} has expired"
                template = templates[execution.template_name]
                became[execution.execution_id] = steps.lose_worker(work, execution, template, reason)
            if FlowStatus.RESCHEDULED in became.values():
                self._announce(work)
            work.commit()
        return became

    @contextmanager
    def inspected(self) -> Iterator[Inspection]:
        """What a diagnosis asks the database, on one connection. Writes nothing."""
        with self._work(writes=False) as work:
            yield Inspection(work.connection, self._statements.tables)

    @property
    def has_one_writer(self) -> bool:
        """Whether the database lets one transaction write at a time, as SQLite does."""
        return self._database.name == "sqlite"

    @property
    def connections(self) -> int | None:
        """How many connections the engine's pool gives out at once; `None` where it has no bound.

        Raises:
            DatabaseUrlError: its pool lets threads share a connection.
        """
        return capacity_of(self.engine)

    @property
    def can_listen(self) -> bool:
        """Whether workers on this service can be told at once that something is due."""
        return self._database.can_listen(self.engine)

    @property
    def channel(self) -> str:
        """The channel of PostgreSQL's NOTIFY on which this service says that something is due."""
        return "ebbs_due" if self.schema is None else f"ebbs_due_{self.schema}"[:63]

    def plan_anew(self, connection: Connection) -> None:
        """Let a connection that is kept plan its statements anew: the tables may have grown."""
        self._database.plan_anew(connection)
        connection.commit()

    def _announce(self, work: UnitOfWork) -> None:
        if self._notify:
            work.announce(self.channel)

    def _work(
        self,
        *,
        joined: Connection | None = None,
        connection: Connection | None = None,
        writes: bool = True,
        is_one_statement: bool = False,
    ) -> UnitOfWork:
        if self._process != os.getpid():
            self._after_fork()
        engine = self._working_engine
        if is_one_statement:
            writes = False  # it takes its locks itself
            engine = self._one_statement_engine or engine
        return UnitOfWork(engine, self._database, self._statements, joined=joined, connection=connection, writes=writes)

    def _after_fork(self) -> None:
        """Leave the connections of the parent process to it: they are the same sockets. The pool begins anew."""
        self._process = os.getpid()
        if not self._database.lives_in_memory(self.engine):
            self.engine.dispose(close=False)

    def _prepare_schema(self) -> None:
        try:
            database_schema.check(self.engine, schema=self.schema)
        except SchemaError:
            if self._database.name != "sqlite":
                raise
            database_schema.upgrade(self.engine, schema=self.schema)

    def _task_name(self, execution: FlowExecution) -> str:
        template = self._templates.get(execution.template_name)
        names = template.task_names if template is not None else ()
        index = execution.current_task_index
        return names[index] if index < len(names) else f"task-{index}"


def initial_delta(context: ExecutionContext | Mapping[str, Any] | None) -> ContextDelta:
    """What an execution begins with, encoded: from here on the caller may change its objects as it likes."""
    return as_context({} if context is None else context).delta_from(NO_CONTEXT)


def _close_late(_connection: object, record: ConnectionPoolEntry) -> None:
    record.invalidate()


def _dispose_in(process: int, engine: Engine) -> None:
    if os.getpid() == process:
        engine.dispose()


def _check_record(argument: str, value: object, kind: type[FlowExecution] | type[TaskExecution]) -> None:
    if not isinstance(value, kind):
        raise InvalidArgumentError(argument, value, f"a {kind.__name__}")
