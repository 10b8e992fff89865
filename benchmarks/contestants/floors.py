"""The floors: raw psycopg and sqlite3, which write the least that a durable step has to write.

The state of the flow moves on, if it is where it is thought to be, and the result of the step is inserted.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator

import psycopg
from sqlalchemy import make_url

from benchmarks.contestants.durability import postgresql_settings, sqlite_settings
from benchmarks.contestants.work import TASKS, Entries, Recorded, entry, first_context, task_name

RECORDED = f"SELECT (SELECT count(*) FROM flows WHERE step = {TASKS}), (SELECT count(*) FROM steps)"

POSTGRESQL_TABLES = (
    "CREATE TABLE flows (id bigint PRIMARY KEY, step int NOT NULL, context json NOT NULL, updated_at timestamptz)",
    """CREATE TABLE steps (flow bigint, step int, name text NOT NULL, result json NOT NULL, at timestamptz NOT NULL,
       PRIMARY KEY (flow, step))""",
)
ONE_STEP = """
    WITH moved AS (UPDATE flows SET step = step + 1, updated_at = now() WHERE id = %s AND step = %s RETURNING id)
    INSERT INTO steps (flow, step, name, result, at) SELECT id, %s, %s, %s, now() FROM moved"""
MOVE = "UPDATE flows SET step = step + 1, updated_at = now() WHERE id = %s AND step = %s"
INSERT = "INSERT INTO steps (flow, step, name, result, at) VALUES (%s, %s, %s, %s, now())"
ROW = '{"flow":%d,"step":%d,"name":"%s","result":%s}'
MANY_STEPS = """
    WITH done AS (
        SELECT * FROM json_to_recordset(%s::json) AS done (flow bigint, step int, name text, result json)),
    moved AS (
        UPDATE flows SET step = flows.step + 1, updated_at = now() FROM done
         WHERE flows.id = done.flow AND flows.step = done.step RETURNING flows.id)
    INSERT INTO steps (flow, step, name, result, at)
    SELECT done.flow, done.step, done.name, done.result, now() FROM done JOIN moved ON moved.id = done.flow"""


class PostgresqlFloor:
    """Raw psycopg, one connection, one thread."""

    def __init__(self, url: str, in_flight: int) -> None:
        plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection = psycopg.connect(plain, autocommit=True)
        self._in_flight = in_flight
        self._flows = range(0)

    def prepare(self, flows: int) -> None:
        self._flows = range(flows)
        for statement in POSTGRESQL_TABLES:
            self._connection.execute(statement)
        with self._connection.cursor() as cursor:
            rows = [(flow, json.dumps(first_context(flow))) for flow in self._flows]
            cursor.executemany("INSERT INTO flows (id, step, context) VALUES (%s, 0, %s)", rows)

    def drain(self) -> float:
        began = time.perf_counter()
        self._run()
        return time.perf_counter() - began

    def _run(self) -> None:
        raise NotImplementedError

    def recorded(self) -> Recorded:
        row = self._connection.execute(RECORDED).fetchone()
        assert row is not None
        return Recorded(*row)

    def durability(self) -> dict[str, str]:
        return postgresql_settings(lambda statement: self._connection.execute(statement).fetchone()[0])

    def close(self) -> None:
        self._connection.close()


class PostgresqlOneCommit(PostgresqlFloor):
    """One statement a step, each its own transaction."""

    def _run(self) -> None:
        with self._connection.cursor() as cursor:
            for flow in self._flows:
                context = first_context(flow)
                for step in range(TASKS):
                    added = entry(step)
                    context |= added
                    values = (flow, step, step, task_name(step), json.dumps(added))
                    cursor.execute(ONE_STEP, values, prepare=True)
                    assert cursor.rowcount == 1


class PostgresqlExecutemany(PostgresqlFloor):
    """The steps of all flows in flight in one transaction: two executemany, which psycopg sends as pipelines."""

    def _run(self) -> None:
        with self._connection.cursor() as cursor:
            for done in batches(self._flows, self._in_flight):
                with self._connection.transaction():
                    cursor.executemany(MOVE, [(flow, step) for flow, step, _, _ in done])
                    assert cursor.rowcount == len(done)
                    cursor.executemany(INSERT, done)


class PostgresqlRecordset(PostgresqlFloor):
    """The steps of all flows in flight in one statement, sent as one JSON document."""

    def _run(self) -> None:
        with self._connection.cursor() as cursor:
            for done in batches(self._flows, self._in_flight):
                rows = ",".join(ROW % each for each in done)
                cursor.execute(MANY_STEPS, (f"[{rows}]",), prepare=True)
                assert cursor.rowcount == len(done)


SQLITE_TABLES = (
    "CREATE TABLE flows (id INTEGER PRIMARY KEY, step INTEGER NOT NULL, context TEXT NOT NULL, updated_at REAL)",
    """CREATE TABLE steps (flow INTEGER, step INTEGER, name TEXT NOT NULL, result TEXT NOT NULL, at REAL NOT NULL,
       PRIMARY KEY (flow, step)) WITHOUT ROWID""",
)
SQLITE_MOVE = "UPDATE flows SET step = step + 1, updated_at = ? WHERE id = ? AND step = ?"
SQLITE_INSERT = "INSERT INTO steps (flow, step, name, result, at) VALUES (?, ?, ?, ?, ?)"


class SqliteFloor:
    """Raw sqlite3, one connection, one thread."""

    def __init__(self, url: str, in_flight: int) -> None:
        self._connection = sqlite3.connect(str(make_url(url).database), isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._in_flight = in_flight
        self._flows = range(0)

    def prepare(self, flows: int) -> None:
        self._flows = range(flows)
        for statement in SQLITE_TABLES:
            self._connection.execute(statement)
        rows = [(flow, json.dumps(first_context(flow))) for flow in self._flows]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO flows (id, step, context) VALUES (?, 0, ?)", rows)
        self._connection.execute("COMMIT")

    def drain(self) -> float:
        began = time.perf_counter()
        self._run()
        return time.perf_counter() - began

    def _run(self) -> None:
        raise NotImplementedError

    def recorded(self) -> Recorded:
        return Recorded(*self._connection.execute(RECORDED).fetchone())

    def durability(self) -> dict[str, str]:
        return sqlite_settings(lambda statement: self._connection.execute(statement).fetchone()[0])

    def close(self) -> None:
        self._connection.close()


class SqliteOneCommit(SqliteFloor):
    """BEGIN IMMEDIATE, UPDATE, INSERT and COMMIT a step."""

    def _run(self) -> None:
        execute = self._connection.execute
        for flow in self._flows:
            context = first_context(flow)
            for step in range(TASKS):
                added = entry(step)
                context |= added
                now = time.time()
                execute("BEGIN IMMEDIATE")
                assert execute(SQLITE_MOVE, (now, flow, step)).rowcount == 1
                execute(SQLITE_INSERT, (flow, step, task_name(step), json.dumps(added), now))
                execute("COMMIT")


class SqliteBatched(SqliteFloor):
    """The steps of all flows in flight in one transaction: two executemany."""

    def _run(self) -> None:
        for done in batches(self._flows, self._in_flight):
            now = time.time()
            self._connection.execute("BEGIN IMMEDIATE")
            moved = self._connection.executemany(SQLITE_MOVE, [(now, flow, step) for flow, step, _, _ in done])
            assert moved.rowcount == len(done)
            self._connection.executemany(SQLITE_INSERT, [(*each, now) for each in done])
            self._connection.execute("COMMIT")


Step = tuple[int, int, str, str]
"""Flow, step, name and result."""


def batches(flows: range, in_flight: int) -> Iterator[list[Step]]:
    """Run the tasks of `in_flight` flows at a time, and give what is to be written before the next ones run."""
    for first in range(0, len(flows), in_flight):
        contexts: list[tuple[int, Entries]] = [(flow, first_context(flow)) for flow in flows[first : first + in_flight]]
        for step in range(TASKS):
            done = []
            for flow, context in contexts:
                added = entry(step)
                context.update(added)
                done.append((flow, step, task_name(step), json.dumps(added)))
            yield done
