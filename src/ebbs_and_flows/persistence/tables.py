"""The three tables, exactly as the migrations make them (a test compares the two).

`ebbs_flow_executions` is narrow and hot: one row an execution, updated at every step, with no indexed column among
those that change with a step. `ebbs_task_executions` has one row an attempt, `ebbs_flow_transitions` one a change of
status and is append-only. Contexts are kept as deltas: an attempt carries what its task added, changed or dropped, a
transition what its caller set, beginning with the initial context on the creation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    cast,
    event,
    text,
)
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from ebbs_and_flows.executions import Failure, FlowStatus, TaskStatus
from ebbs_and_flows.names import MAX_NAME_LENGTH

Id = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite gives out ids only for INTEGER PRIMARY KEY (https://sqlite.org/autoinc.html); it holds 64 bits as well."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime: TIMESTAMP WITH TIME ZONE on PostgreSQL, `YYYY-MM-DD HH:MM:SS.ffffff` as text on SQLite.

    The text has a fixed width, so that it sorts by time, and SQLite's date functions read it.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f").rjust(26, "0")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else to_utc(value)


def to_utc(value: datetime | str) -> datetime:
    """A time as the driver gives it, as an aware UTC datetime."""
    if isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=timezone.utc)
    return value.astimezone(timezone.utc)


class _Json(UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "JSON"


class JsonText(TypeDecorator[str]):
    """JSON that Python sees as its text: PostgreSQL's JSON, which keeps the text as it was given, and TEXT on SQLite.

    SQLAlchemy's own JSON type would parse it with whatever parser the host's engine has; key order, floats and large
    integers survive only as text.
    """

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else _Json())

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(column, Text)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables within one schema."""

    metadata: MetaData
    executions: Table
    attempts: Table
    transitions: Table


@functools.lru_cache(maxsize=32)
def build_tables(schema: str | None = None) -> Tables:
    """The tables, in the database's default schema or a named one (PostgreSQL only)."""
    metadata = MetaData(schema=schema)
    executions = Table(
        "ebbs_flow_executions",
        metadata,
        Column("execution_id", Id, Identity(), primary_key=True),
        Column("template_name", String(MAX_NAME_LENGTH), nullable=False),
        Column("status", String(16), nullable=False),
        Column("execution_step", Integer, nullable=False),
        Column("current_task_index", Integer, nullable=False),
        Column("epoch", Integer, nullable=False),
        Column("priority", Integer, nullable=False),
        Column("queue", String(MAX_NAME_LENGTH), nullable=False),
        Column("idempotency_key", String(MAX_NAME_LENGTH)),
        Column("run_at", UtcDateTime, nullable=False),
        Column("created_at", UtcDateTime, nullable=False),
        Column("updated_at", UtcDateTime, nullable=False),
        Column("started_at", UtcDateTime),
        Column("finished_at", UtcDateTime),
        Column("lease_owner", String(MAX_NAME_LENGTH)),
        Column("lease_expires_at", UtcDateTime),
        CheckConstraint(_one_of("status", FlowStatus), name="ck_ebbs_flow_executions_status"),
        sqlite_autoincrement=True,
    )
    # Room for the new version of a row on its own page, so that a step touches no index.
    fill = DDL("ALTER TABLE %(fullname)s SET (fillfactor = 70)")  # type: ignore[no-untyped-call]  # its __init__ is
    event.listen(executions, "after_create", fill.execute_if(dialect="postgresql"))
    waiting = text("status IN ('SCHEDULED', 'RESCHEDULED')")
    _partial_index(
        "ix_ebbs_flow_executions_due",
        executions.c.priority.desc(),
        executions.c.run_at,
        executions.c.execution_id,
        where=waiting,
    )
    # For workers that serve one queue, so that what waits in others does not stand in their way.
    _partial_index(
        "ix_ebbs_flow_executions_queue",
        executions.c.queue,
        executions.c.priority.desc(),
        executions.c.run_at,
        executions.c.execution_id,
        where=waiting,
    )
    # Of the id, not of the lease: a lease changes with every step, and a step is to touch no index.
    _partial_index("ix_ebbs_flow_executions_running", executions.c.execution_id, where=text("status = 'RUNNING'"))
    _partial_index("ix_ebbs_flow_executions_retry", executions.c.run_at, where=text("status = 'RESCHEDULED'"))
    _partial_index("ix_ebbs_flow_executions_failed", executions.c.execution_id, where=text("status = 'FAILED'"))
    _partial_index(
        "uq_ebbs_flow_executions_idempotency_key",
        executions.c.idempotency_key,
        where=text("idempotency_key IS NOT NULL"),
        unique=True,
    )
    attempts = Table(
        "ebbs_task_executions",
        metadata,
        _execution_key(executions, "ebbs_task_executions"),
        Column("flow_execution_step", Integer, primary_key=True, autoincrement=False),
        Column("task_index", Integer, nullable=False),
        Column("name", String(MAX_NAME_LENGTH), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("epoch", Integer, nullable=False),
        Column("status", String(16), nullable=False),
        Column("failure", String(16)),
        Column("error_type", String(MAX_NAME_LENGTH)),
        Column("output", Text),
        *_delta_columns(),
        Column("started_at", UtcDateTime, nullable=False),
        Column("finished_at", UtcDateTime),
        Column("worker", String(MAX_NAME_LENGTH)),
        CheckConstraint(_one_of("status", TaskStatus), name="ck_ebbs_task_executions_status"),
        CheckConstraint(_one_of("failure", Failure), name="ck_ebbs_task_executions_failure"),
    )
    transitions = Table(
        "ebbs_flow_transitions",
        metadata,
        _execution_key(executions, "ebbs_flow_transitions"),
        Column("flow_execution_step", Integer, primary_key=True, autoincrement=False),
        Column("from_status", String(16)),
        Column("to_status", String(16), nullable=False),
        Column("at", UtcDateTime, nullable=False),
        Column("worker", String(MAX_NAME_LENGTH)),
        Column("reason", Text),
        Column("task_index", Integer, nullable=False),
        *_delta_columns(),
        CheckConstraint(_one_of("from_status", FlowStatus), name="ck_ebbs_flow_transitions_from_status"),
        CheckConstraint(_one_of("to_status", FlowStatus), name="ck_ebbs_flow_transitions_to_status"),
    )
    return Tables(metadata, executions, attempts, transitions)


def _execution_key(executions: Table, table: str) -> Column[int]:
    return Column(
        "flow_execution_id",
        Id,
        ForeignKey(executions.c.execution_id, ondelete="CASCADE", name=f"fk_{table}_flow_execution_id"),
        primary_key=True,
        autoincrement=False,
    )


def _delta_columns() -> tuple[Column[str], Column[str], Column[str]]:
    return Column("entries", JsonText), Column("entry_types", JsonText), Column("dropped", JsonText)


def _partial_index(name: str, *columns: Any, where: Any, unique: bool = False) -> Index:
    return Index(name, *columns, unique=unique, postgresql_where=where, sqlite_where=where)


def _one_of(column: str, values: type[FlowStatus] | type[TaskStatus] | type[Failure]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"
