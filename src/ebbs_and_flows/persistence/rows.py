"""Rows of batches: what is sent to the database in one text, and what each database's statements have to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Connection

Row = tuple[Any, ...]
"""The values of one row, in the order of its fields."""


class Rows:
    """The rows of one statement, and the forms in which they are sent, each made once."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self.rows: list[Row] = rows if rows is not None else []
        self.text: str | None = None
        """The form in which a database takes them that reads them as one text."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def values(self) -> Row:
        """All values of the first row, then all of the second, and so on."""
        return tuple(chain.from_iterable(self.rows))


@dataclass(frozen=True)
class Field:
    """A column of a batch, with its type on PostgreSQL."""

    name: str
    type_name: str


CHECKPOINT_FIELDS = (
    Field("execution_id", "BIGINT"),
    Field("epoch", "INTEGER"),
    Field("step", "INTEGER"),
    # How the attempt of this step has ended.
    Field("end_status", "TEXT"),
    Field("failure", "TEXT"),
    Field("error_type", "TEXT"),
    Field("output", "TEXT"),
    Field("entries", "TEXT"),
    Field("entry_types", "TEXT"),
    Field("dropped", "TEXT"),
    # What follows: the next attempt, or a status other than RUNNING.
    Field("task_index", "INTEGER"),
    Field("name", "TEXT"),
    Field("attempt", "INTEGER"),
    Field("status", "TEXT"),
    Field("reason", "TEXT"),
    Field("wait_seconds", "DOUBLE PRECISION"),
    Field("lease_seconds", "DOUBLE PRECISION"),
    Field("worker", "TEXT"),
)

OUTPUT, ENTRIES, NAME = (
    next(place for place, field in enumerate(CHECKPOINT_FIELDS) if field.name == name)
    for name in ("output", "entries", "name")
)
"""The places of these in a row of a checkpoint."""

CONTEXT_FIELDS = (Field("execution_id", "BIGINT"), Field("entries", "TEXT"), Field("entry_types", "TEXT"))

BEGIN_FIELDS = (Field("execution_id", "BIGINT"), Field("name", "TEXT"), Field("attempt", "INTEGER"))


class Moved(NamedTuple):
    """An execution that a checkpoint has moved on; where it has come to rest and was waited for, with its times as the
    driver gives them (`to_utc`).
    """

    execution_id: int
    updated_at: datetime | str | None
    run_at: datetime | str | None


class BatchStatements(Protocol):
    """The statements of one schema of one kind of database."""

    def prepare(self, rows: Rows) -> None:
        """Make now the form in which these rows will be sent."""

    def write_checkpoints(self, connection: Connection, rows: Rows, *, wait: bool) -> list[Moved]:
        """Write checkpoints, each one if its fence holds.

        Args:
            rows: with `CHECKPOINT_FIELDS`.
            wait: whether to wait for what somebody else has locked; else that is left out.
        """

    def add_scheduled(self, connection: Connection, count: int, new: Mapping[str, Any]) -> list[int]:
        """Insert executions that are SCHEDULED and alike; their ids, in ascending order.

        Args:
            new: their `template_name`, `priority`, `queue`, `run_at` and `delay_seconds`.
        """

    def add_contexts(self, connection: Connection, rows: Rows) -> None:
        """Write the first transitions of executions that were inserted in this transaction, with what they begin with.

        Args:
            rows: with `CONTEXT_FIELDS`.
        """

    def begin(self, connection: Connection, rows: Rows) -> None:
        """Write the transition of executions that were claimed in this transaction, and the attempts that follow.

        Args:
            rows: with `BEGIN_FIELDS`; without a name, no attempt follows.
        """
