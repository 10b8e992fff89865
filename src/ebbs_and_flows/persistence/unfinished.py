"""Unfinished executions by where they stand: grouped in the database, so that many which are alike are read as one."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, TextClause, text

from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import UndecodableValueError
from ebbs_and_flows.executions import FlowStatus, TaskStatus
from ebbs_and_flows.persistence.contexts import Delta, completed_in, delta_of_row, standing
from ebbs_and_flows.persistence.tables import Tables

ROWS_AT_ONCE = 100
"""How many rows are fetched at a time: what is in memory, however many groups there are."""


@dataclass(frozen=True)
class Standing:
    """Unfinished executions that are alike: in template, status, tasks completed, and the types in their contexts."""

    template_name: str
    status: FlowStatus
    task_index: int
    """The task that runs now or next."""
    running: str | None
    """The task whose attempt is open."""
    completed: tuple[str, ...]
    """The names of the tasks that they have completed, in order."""
    types: Mapping[str, tuple[str, ...]]
    """By entry of their contexts as they are now, the type names that its value needs: its own, and those within."""
    number: int
    examples: tuple[int, ...]
    """The ids of the oldest of them."""


@contextmanager
def open_unfinished(engine: Engine, tables: Tables) -> Iterator[Unfinished]:
    """The unfinished executions of a database, in one transaction that sees one state of it and, on PostgreSQL, may not
    write.
    """
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Of this transaction alone: an option of SQLAlchemy's would leave READ WRITE behind on the connection.
            connection.execute(_READ_ONLY)
            connection.execute(_ALL_ROWS)
        else:
            connection.begin()
            # Python's sqlite3 begins nothing for a SELECT; an engine of the host may have begun already.
            if not getattr(connection.connection.driver_connection, "in_transaction", False):
                connection.exec_driver_sql("BEGIN")
        yield Unfinished(connection, tables)


class Unfinished:
    """The executions that are neither SUCCEEDED nor CANCELLED, asked for on one connection."""

    def __init__(self, connection: Connection, tables: Tables) -> None:
        self._connection = connection
        self._tables = tables

    def counts(self) -> dict[FlowStatus, int]:
        """How many there are of each status; none for one that none has."""
        rows = self._connection.execute(self._statement(_COUNTS))
        return {FlowStatus(status): number for status, number in rows}

    def standings(self, examples: int) -> Iterator[Standing]:
        """Where they stand, in no particular order.

        Args:
            examples: how many ids of each group to give.
        """
        statement = self._statement(_STANDINGS[self._connection.dialect.name])
        for row in self._connection.execute(statement, execution_options={"yield_per": ROWS_AT_ONCE}):
            yield _standing(row, examples)

    def _statement(self, template: str) -> TextClause:
        names = self._connection.dialect.identifier_preparer
        tables = self._tables
        return text(
            template.format(
                executions=names.format_table(tables.executions),
                attempts=names.format_table(tables.attempts),
                transitions=names.format_table(tables.transitions),
            )
        )


class _Columns(NamedTuple):
    """The columns of a delta, with the names of types in the place of values."""

    entries: str | None
    entry_types: str | None
    dropped: str | None


def _standing(row: Any, examples: int) -> Standing:
    deltas = [
        Delta(_Columns(_types_within(types, tags), types, dropped), step, index, name)
        for step, index, name, types, dropped, tags in json.loads(row.history or "[]")
    ]
    reached = standing(deltas, row.current_task_index)
    return Standing(
        template_name=row.template_name,
        status=FlowStatus(row.status),
        task_index=row.current_task_index,
        running=row.running,
        completed=completed_in(reached),
        types=_types(reached),
        number=row.number,
        examples=tuple(heapq.nsmallest(examples, json.loads(row.ids))),
    )


def _types_within(types: str | None, tags: str | None) -> str | None:
    """JSON of what the entries' values name within, each under its entry."""
    if types is None:
        return None
    within: dict[str, list[str]] = {}
    for entry, tag in json.loads(tags) if tags is not None else ():
        within.setdefault(entry, []).append(tag)
    try:
        names = json.loads(types)
    except ValueError:
        return types  # damaged: reading it says so
    return json.dumps({entry: within.get(entry, []) for entry in names} if isinstance(names, dict) else names)


def _types(reached: list[Delta]) -> dict[str, tuple[str, ...]]:
    """By entry, the names of its types; nothing of a context that cannot be read, which no release could go on with."""
    try:
        context = ExecutionContext.folded([delta_of_row(each.row) for each in reached if each.row.entries is not None])
    except (UndecodableValueError, ValueError):
        return {}
    return {entry: (encoded.type_name, *encoded.node) for entry, encoded in context.encode().items()}


_UNFINISHED = "status IN ({})".format(
    ", ".join(
        f"'{each}'"
        for each in (
            FlowStatus.CREATED,
            FlowStatus.SCHEDULED,
            FlowStatus.RESCHEDULED,
            FlowStatus.RUNNING,
            FlowStatus.FAILED,
        )
    )
)

_READ_ONLY = text("SET TRANSACTION READ ONLY")
# A cursor is planned for its first rows: here all of them are wanted.
_ALL_ROWS = text("SET LOCAL cursor_tuple_fraction = 1")

_COUNTS = f"SELECT status, count(*) FROM {{executions}} WHERE {_UNFINISHED} GROUP BY status"

# The steps of two executions differ wherever one was retried; their order is what counts, so they are numbered anew.
_GROUPED = f"""
WITH unfinished AS (
    SELECT execution_id, template_name, status, execution_step, current_task_index
      FROM {{executions}} WHERE {_UNFINISHED}
), deltas AS (
    SELECT flow_execution_id, flow_execution_step, task_index, NULL AS name, entries, entry_types, dropped
      FROM unfinished JOIN {{transitions}} ON flow_execution_id = execution_id
     WHERE entries IS NOT NULL AND flow_execution_step <= execution_step
     UNION ALL
    SELECT flow_execution_id, flow_execution_step, task_index, name, entries, entry_types, dropped
      FROM unfinished JOIN {{attempts}} AS attempt ON flow_execution_id = execution_id
     WHERE attempt.status = '{TaskStatus.SUCCEEDED}' AND flow_execution_step <= execution_step
), numbered AS (
    SELECT flow_execution_id, task_index, name, entry_types, dropped, __TAGS__ AS tags,
           row_number() OVER (PARTITION BY flow_execution_id ORDER BY flow_execution_step) AS number
      FROM deltas
), histories AS (
    SELECT flow_execution_id, __HISTORY__ AS history FROM numbered GROUP BY flow_execution_id
), standings AS (
    SELECT execution_id, template_name, unfinished.status, current_task_index, attempt.name AS running, history
      FROM unfinished
      LEFT JOIN histories ON histories.flow_execution_id = execution_id
      LEFT JOIN {{attempts}} AS attempt
             ON attempt.flow_execution_id = execution_id AND attempt.flow_execution_step = execution_step
            AND attempt.status = '{TaskStatus.RUNNING}' AND unfinished.status = '{FlowStatus.RUNNING}'
)
SELECT template_name, status, current_task_index, running, history, count(*) AS number, __IDS__ AS ids
  FROM standings GROUP BY template_name, status, current_task_index, running, history
"""

# A tag within a value is an object of "$type" and "value" (see codec); in a string its quotes would be escaped.
_STANDINGS = {
    "postgresql": _GROUPED.replace(
        "__HISTORY__",
        "CAST(json_agg(json_build_array(number, task_index, name, CAST(entry_types AS TEXT), CAST(dropped AS TEXT),"
        " CAST(tags AS TEXT)) ORDER BY number) AS TEXT)",
    )
    .replace("__IDS__", "CAST(json_agg(execution_id) AS TEXT)")
    .replace(
        "__TAGS__",
        r"""CASE WHEN strpos(CAST(entries AS TEXT), '"$type"') > 0 THEN (
               SELECT json_agg(json_build_array(entry, CAST('"' || tag || '"' AS JSON)) ORDER BY entry, tag)
                 FROM (SELECT DISTINCT entry, found[1] AS tag
                         FROM json_each(entries) AS each(entry, value),
                              regexp_matches(CAST(value AS TEXT), '(?<!\\)"\$type":"((?:[^"\\]|\\.)*)"', 'g') AS found
                      ) AS tags_of_entries) END""",
    ),
    "sqlite": _GROUPED.replace(
        "__HISTORY__",
        "json_group_array(json_array(number, task_index, name, entry_types, dropped, CAST(tags AS TEXT)))",
    )
    .replace("__IDS__", "json_group_array(execution_id)")
    .replace(
        "__TAGS__",
        """CASE WHEN instr(entries, '"$type"') > 0 AND json_valid(entries) THEN (
               SELECT json_group_array(json_array(entry, tag))
                 FROM (SELECT DISTINCT each.key AS entry, tree.value AS tag
                         FROM json_each(entries) AS each, json_tree(each.value) AS tree
                        WHERE each.type IN ('array', 'object') AND tree.key = '$type' AND tree.type = 'text'
                        ORDER BY each.key, tree.value)) END""",
    ),
}
