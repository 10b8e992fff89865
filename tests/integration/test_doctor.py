"""The diagnosis: each finding is provoked, on the databases that can have it; and what `ebbs doctor` makes of them."""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.pool import NullPool, StaticPool
from typer.testing import CliRunner, Result

from ebbs_and_flows import FlowRunner, FlowService, FlowStatus, Worker, schema, worker as worker_module
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.diagnosis import (
    OWN_CONNECTIONS,
    Finding,
    Limits,
    Verdict,
    diagnose,
    judge_server_connections,
    reach,
)
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.tables import build_tables

OK, WARNING, PROBLEM = Verdict.OK, Verdict.WARNING, Verdict.PROBLEM

ALWAYS = [
    "database",
    "schema",
    "clock",
    "expired leases",
    "due executions",
    "failed executions",
    "retries",
    "connection pool",
]
CHECKS = {
    "sqlite": [*ALWAYS, "journal", "durability", "writing", "integrity", "size"],
    "postgresql": [*ALWAYS, "server connections", "idle in transaction", "long transactions"],
}

Ebbs = Callable[..., Result]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Ebbs:
    """`ebbs doctor` without any database in its environment."""
    for name in ("EBBS_DATABASE_URL", "EBBS_SCHEMA", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, **environment: str) -> Result:
        result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def doctor(bare: Ebbs, database_url: str) -> Ebbs:
    """`ebbs doctor` on a database that has the schema."""

    def run(*arguments: object, **environment: str) -> Result:
        return bare(*arguments, EBBS_DATABASE_URL=database_url, **environment)

    return run


def finding(service: FlowService, check: str, **how: Any) -> Finding:
    """What a diagnosis says of one check."""
    (found,) = [each for each in diagnose(service, **how) if each.check == check]
    return found


def change(service: FlowService, execution_id: int, **values: Any) -> None:
    """Change an execution's row by hand."""
    executions = build_tables().executions
    with service.engine.begin() as connection:
        connection.execute(executions.update().where(executions.c.execution_id == execution_id).values(**values))


def ago(seconds: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


@contextmanager
def given_engine(url: str, **options: Any) -> Iterator[FlowService]:
    """A service on an engine of the host's own, closed afterwards."""
    engine = create_engine(make_url(url).set(drivername=_driver(url)), **options)
    try:
        yield FlowService(engine)
    finally:
        engine.dispose()


def _driver(url: str) -> str:
    return "postgresql+psycopg" if url.startswith("postgresql") else "sqlite"


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_database_that_is_well_is_told_check_by_check(doctor: Ebbs, service: FlowService, database: str) -> None:
    findings = diagnose(service)
    assert [(each.check, each.verdict) for each in findings] == [(check, OK) for check in CHECKS[database]]
    assert all(each.found and each.advice is None for each in findings)
    result = doctor()
    assert result.exit_code == 0
    assert [line.split("  ")[:2] for line in result.stdout.splitlines()] == [["ok", each] for each in CHECKS[database]]
    assert result.stderr == f"{len(findings)} ok\n"


def test_findings_are_records_for_programs(doctor: Ebbs, service: FlowService) -> None:
    service.schedule("order", queue="mails")
    change(service, 1, run_at=ago(600))
    result = doctor("--json")
    assert result.exit_code == 1
    assert result.stderr == ""
    document = {each["check"]: each for each in json.loads(result.stdout)}
    assert set(document["clock"]) == {"check", "verdict", "found", "advice"}
    assert document["due executions"]["verdict"] == "problem"
    assert "mails" in document["due executions"]["advice"]


def test_each_finding_is_one_line_in_a_pipe_and_warnings_are_exit_code_0(doctor: Ebbs, service: FlowService) -> None:
    name = "order \u202e" + "long " * 40
    service.schedule(name)
    service.update_flow_status(1, FlowStatus.RUNNING)
    service.update_flow_status(1, FlowStatus.FAILED)
    result = doctor()
    assert result.exit_code == 0
    (line,) = [line for line in result.stdout.splitlines() if "failed executions" in line]
    assert line.startswith("warning  failed executions ")
    assert ' -> they rest until somebody re-runs them: "ebbs runs list --status FAILED" says why' in line
    assert "\\u202e" in line
    assert result.stderr.startswith("1 warning, ")


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_the_way_out_below_what_was_found(doctor: Ebbs, service: FlowService, columns: int) -> None:
    service.schedule("order")
    change(service, 1, run_at=ago(600))
    result = doctor(FORCE_COLOR="1", TERM="xterm-256color", COLUMNS=str(columns))
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert any("\x1b[1;31mproblem" in line for line in lines)
    plain = doctor(FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color", COLUMNS=str(columns)).stdout
    assert max(len(line) for line in plain.splitlines()) <= columns
    assert any(line.strip().startswith("-> nothing of queue default is running") for line in plain.splitlines())


def test_nothing_is_written(doctor: Ebbs, service: FlowService, database_url: str) -> None:
    service.schedule("order")
    change(service, 1, run_at=ago(600))
    before = service.get_flow_execution(1)
    doctor()
    diagnose(service)
    assert service.get_flow_execution(1) == before


def test_help_says_what_is_looked_at_and_the_exit_codes(bare: Ebbs) -> None:
    shown = " ".join(bare("--help").stdout.split())
    assert "Look for what keeps flows from going on, and say what to do." in shown
    assert "Exits with 1 if there is a problem, with 3 if it is the schema." in shown


# --- the database and its schema --------------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_is_a_problem(bare: Ebbs) -> None:
    result = bare("--database-url", "postgresql://user:hunter2@127.0.0.1:1/database")
    assert result.exit_code == 1
    assert result.stdout.startswith("problem  database  does not answer: connection failed: ")
    assert result.stdout.count("\n") == 1
    assert "hunter2" not in result.output


def test_a_file_that_is_not_there_is_a_problem_and_is_not_made(bare: Ebbs, tmp_path: Path) -> None:
    result = bare("--database-url", f"sqlite:///{tmp_path / 'mistyped.db'}")
    assert result.exit_code == 1
    assert result.stdout.startswith("problem  database  no such file ")
    assert ' -> check the URL, or run "ebbs db upgrade" to make it' in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_a_problem(bare: Ebbs, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n" * 1000)
    result = bare("--database-url", f"sqlite:///{path}")
    assert result.exit_code == 1
    assert "file is not a database" in result.stdout


def test_a_schema_that_is_missing_is_exit_code_3(bare: Ebbs, empty_database_url: str, tmp_path: Path) -> None:
    if empty_database_url.startswith("sqlite"):
        (tmp_path / "empty.db").touch()
    result = bare("--database-url", empty_database_url)
    assert result.exit_code == 3
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == ["ok", "problem"]
    assert (
        f'There is no schema of this library here, this release needs {schema.REVISION} -> run "ebbs db upgrade"'
        in (result.stdout)
    )


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_named_schema_is_looked_at_and_named_in_the_way_out(bare: Ebbs, empty_database_url: str) -> None:
    missing = bare("--schema", "flows", "--database-url", empty_database_url)
    assert missing.exit_code == 3
    assert 'run "ebbs db upgrade --schema flows"' in missing.stdout
    schema.upgrade(empty_database_url, schema="flows")
    assert bare("--schema", "flows", "--database-url", empty_database_url).exit_code == 0


def test_a_schema_of_another_release_is_told_apart(doctor: Ebbs, service: FlowService) -> None:
    def set_revision(revision: str) -> None:
        with service.engine.begin() as connection:
            connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = :new"), {"new": revision})

    set_revision("ebbs_9999")
    assert finding(service, "schema").found == f"at ebbs_9999, newer than {schema.REVISION}"
    set_revision("0000")
    database, behind = diagnose(service)
    assert (database.verdict, behind.verdict) == (OK, PROBLEM)
    assert behind.found == f"Schema is at 0000, this release needs {schema.REVISION}"
    assert behind.advice == 'run "ebbs db upgrade"'
    assert doctor().exit_code == 3


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_database_that_goes_away_is_said_once(service: FlowService, database_url: str) -> None:
    gone = create_engine(make_url(database_url).set(drivername="postgresql+psycopg", database="no_such_database"))
    (only,) = reach(gone)
    assert (only.check, only.verdict) == ("database", PROBLEM)
    assert 'database "no_such_database" does not exist' in only.found


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_check_that_is_not_allowed_is_a_finding_and_the_others_are_made(
    service: FlowService, database_url: str
) -> None:
    with as_role(service, database_url, "SELECT ON ebbs_alembic_version") as restricted:
        findings = {each.check: each for each in diagnose(restricted)}
    assert findings["due executions"].verdict is PROBLEM
    assert "cannot be looked at: permission denied for table" in findings["due executions"].found
    assert findings["server connections"].verdict is OK
    told = " (only this role's own sessions can be seen: grant pg_monitor)"
    assert findings["long transactions"].found == f"none is older than 5 min{told}"
    assert findings["idle in transaction"].found.endswith(told)


@contextmanager
def as_role(service: FlowService, database_url: str, grant: str) -> Iterator[FlowService]:
    """A service whose connections have the rights of a role that was given only this."""
    role = f"ebbs_test_{uuid.uuid4().hex}"
    with service.engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"GRANT {grant} TO {role}"))

    engine = create_engine_for(database_url)

    @event.listens_for(engine, "connect")
    def set_role(connection: Any, _record: object) -> None:
        connection.execute(f"SET ROLE {role}")
        connection.commit()

    try:
        yield FlowService(engine)
    finally:
        engine.dispose()
        with service.engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))
            connection.execute(text(f"DROP ROLE {role}"))


# --- executions -------------------------------------------------------------------------------------------------------


def test_leases_that_have_expired_are_counted_by_template(service: FlowService) -> None:
    for name, seconds in (("order", 600), ("order", 120), ("rates", 300)):
        execution_id = service.schedule(name)
        service.update_flow_status(execution_id, FlowStatus.RUNNING)
        change(service, execution_id, lease_expires_at=ago(seconds))
    held = service.schedule("held")
    service.update_flow_status(held, FlowStatus.RUNNING)
    found = finding(service, "expired leases")
    assert found.verdict is PROBLEM
    assert found.found == (
        "3 RUNNING executions under a lease that has expired, the oldest 10 min ago: 2 of order in queue default, "
        "1 of rates in queue default"
    )
    assert found.advice is not None
    assert found.advice.startswith("no worker that knows order, rates is running: start one")


def test_a_lease_that_has_just_expired_is_a_warning(service: FlowService) -> None:
    service.schedule("order")
    service.update_flow_status(1, FlowStatus.RUNNING)
    change(service, 1, lease_expires_at=ago(5))
    found = finding(service, "expired leases")
    assert found.verdict is WARNING
    assert found.found.startswith("1 RUNNING execution under a lease that has expired, the oldest 5 s ago: ")
    assert finding(service, "expired leases", limits=Limits(unattended_seconds=2)).verdict is PROBLEM


def test_due_executions_that_nobody_takes_are_a_problem(service: FlowService) -> None:
    late = service.schedule("order", queue="mails")
    change(service, late, run_at=ago(3 * 3600))
    service.schedule("rates")
    service.schedule("later", delay=3600)
    found = finding(service, "due executions")
    assert found.verdict is PROBLEM
    assert found.found.startswith("2 wait for a worker, the oldest for 3 h: 1 of order in queue mails, 1 of rates in")
    assert (
        found.advice == "nothing of queue mails is running: start a worker that takes from it (--queue) and knows order"
    )


def test_due_executions_of_a_queue_whose_workers_are_busy_are_a_warning(service: FlowService) -> None:
    busy = service.schedule("order")
    service.update_flow_status(busy, FlowStatus.RUNNING)
    waiting = service.schedule("rates")
    change(service, waiting, run_at=ago(600))
    found = finding(service, "due executions")
    assert found.verdict is WARNING
    assert found.advice is not None
    assert "are busy" in found.advice
    change(service, busy, lease_expires_at=ago(1))  # its worker is lost
    assert finding(service, "due executions").verdict is PROBLEM


def test_what_has_just_come_due_is_well(service: FlowService) -> None:
    service.schedule("order")
    found = finding(service, "due executions")
    assert found.verdict is OK
    assert found.found.startswith("1 waits for a worker, the oldest for 0 s: 1 of order in queue default")


def test_failures_of_the_last_day_are_counted_by_template(service: FlowService) -> None:
    for name, seconds in (("order", 60), ("order", 80_000), ("rates", 60), ("old", 90_000)):
        execution_id = service.schedule(name)
        service.update_flow_status(execution_id, FlowStatus.RUNNING)
        service.update_flow_status(execution_id, FlowStatus.FAILED)
        change(service, execution_id, finished_at=ago(seconds))
    found = finding(service, "failed executions")
    assert found.verdict is WARNING
    assert found.found == "3 in the last 24 hours: order 2, rates 1"


def test_retries_that_wait_are_told_and_are_well(service: FlowService) -> None:
    for seconds in (3600, 7200):
        execution_id = service.schedule("order")
        service.update_flow_status(execution_id, FlowStatus.RUNNING)
        service.update_flow_status(execution_id, FlowStatus.RESCHEDULED)
        change(service, execution_id, run_at=ago(-seconds))
    found = finding(service, "retries")
    assert found.verdict is OK
    assert found.found == "2 RESCHEDULED executions wait, the next one is due in 60 min"


def test_long_lists_of_names_are_cut_and_harmless(service: FlowService) -> None:
    for number in range(30):
        service.schedule(f"{number} \u202e" + "x" * 200)
    found = finding(service, "due executions", limits=Limits(unattended_seconds=0))
    assert found.found.isprintable()
    assert found.found.endswith(", and of 25 more")
    assert found.advice is not None
    assert found.advice.isprintable()
    assert len(found.found) + len(found.advice) < 1000


# --- clock and connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "how"), [(5, "5.0 s ahead of"), (-300, "300.0 s behind")])
def test_a_clock_that_differs_is_a_warning(service: FlowService, seconds: float, how: str) -> None:
    found = finding(service, "clock", clock=lambda: time.time() + seconds)
    assert found.verdict is WARNING
    assert found.found == f"this machine is {how} the database"
    assert found.advice is not None
    assert found.advice.startswith("no effect on flows")


def test_a_clock_is_not_blamed_for_a_slow_answer(service: FlowService) -> None:
    ticks = iter(range(0, 600, 30))  # it takes 30 s to ask
    began = time.time()
    assert finding(service, "clock", clock=lambda: began + next(ticks) - 15).verdict is OK


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_pool_too_small_for_a_worker_is_a_warning(database_url: str) -> None:
    with given_engine(database_url, pool_size=1, max_overflow=2) as service:
        found = finding(service, "connection pool")
    assert found.verdict is WARNING
    assert found.advice == "make the engine with pool_size + max_overflow of at least 4"
    with given_engine(database_url, pool_size=1, max_overflow=3) as service:
        assert finding(service, "connection pool").verdict is OK
        worker = Worker(FlowRunner(service))
        assert OWN_CONNECTIONS == worker_module.OWN_CONNECTIONS + 1  # and one to listen
        assert worker._transaction_slots == 1
    with given_engine(database_url, poolclass=NullPool) as service:
        assert finding(service, "connection pool").found == "without bound"
    with given_engine(database_url, poolclass=StaticPool) as service:
        found = finding(service, "connection pool")
        assert found.verdict is WARNING
        assert found.found.startswith("a worker cannot use it: a worker's threads need connections of their own")


@pytest.mark.parametrize(
    ("used", "wanted", "verdict"), [(10, 15, OK), (79, 15, OK), (80, 15, WARNING), (90, 15, WARNING), (97, 3, PROBLEM)]
)
def test_a_server_without_room_for_one_more_process_is_worth_a_word(used: int, wanted: int, verdict: Verdict) -> None:
    found = judge_server_connections(used, 100, wanted)
    assert found.verdict is verdict
    assert found.found.startswith(f"{used} of 100 are in use")
    assert (found.advice is None) == (verdict is OK)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_pool_larger_than_the_server_is_a_warning(database_url: str) -> None:
    with given_engine(database_url, pool_size=5, max_overflow=100_000) as service:
        found = finding(service, "server connections")
    assert found.verdict is WARNING
    assert "one more process with this pool takes up to 100005" in found.found


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_session_that_idles_in_a_transaction_with_our_locks_is_named(service: FlowService) -> None:
    limits = Limits(idle_in_transaction_seconds=0, long_transaction_seconds=0)
    service.schedule("order")
    with service.engine.connect() as idle, service.engine.connect() as harmless:
        harmless.execute(text("SELECT 1"))
        idle.execute(text("SET LOCAL application_name = 'night report'"))
        idle.execute(text("SELECT * FROM ebbs_flow_executions FOR UPDATE"))
        pid, user = idle.execute(text("SELECT pg_backend_pid(), current_user")).one()
        found = finding(service, "idle in transaction", limits=limits)
        assert found.verdict is WARNING
        assert found.found == f"holding locks on the tables: pid {pid} of {user} (night report) for 0 s"
        assert found.advice is not None
        assert f"SELECT pg_terminate_backend({pid})" in found.advice
        assert finding(service, "idle in transaction").verdict is OK  # not yet
    assert finding(service, "idle in transaction", limits=limits).verdict is OK


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_transactions_that_are_open_for_long_are_named(service: FlowService) -> None:
    limits = Limits(long_transaction_seconds=0)
    with service.engine.connect() as open_long:
        pid = open_long.scalar(text("SELECT pg_backend_pid()"))
        found = finding(service, "long transactions", limits=limits)
        assert found.verdict is WARNING
        assert found.found.startswith(f"pid {pid} of ")
        assert finding(service, "long transactions").verdict is OK
    assert finding(service, "long transactions", limits=limits).verdict is OK


# --- SQLite -----------------------------------------------------------------------------------------------------------

on_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


def file_of(database_url: str) -> str:
    path = make_url(database_url).database
    assert path is not None
    return path


@on_sqlite
def test_another_journal_mode_is_a_warning_and_is_left_as_it_is(doctor: Ebbs, database_url: str) -> None:
    with closing(sqlite3.connect(file_of(database_url))) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    result = doctor()
    assert result.exit_code == 0
    assert (
        "warning  journal            journal_mode is DELETE: readers and the writer wait for each other"
        in result.stdout
    )
    with closing(sqlite3.connect(file_of(database_url))) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


@on_sqlite
def test_an_engine_that_gives_up_durability_is_a_warning(database_url: str) -> None:
    engine = create_engine(database_url)

    @event.listens_for(engine, "connect")
    def make_fast(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous=NORMAL")

    found = finding(FlowService(engine), "durability")
    engine.dispose()
    assert found.verdict is WARNING
    assert found.found.startswith("synchronous is NORMAL on this engine's connections")


@on_sqlite
def test_a_file_that_cannot_be_written_is_a_problem(bare: Ebbs, database_url: str) -> None:
    result = bare("--database-url", f"sqlite:///file:{file_of(database_url)}?mode=ro&uri=true")
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "writing" in line]
    assert line.startswith("problem  writing            not possible: attempt to write a readonly database -> ")


@on_sqlite
def test_a_write_lock_that_is_not_given_back_is_a_warning(database_url: str) -> None:
    engine = create_engine(database_url, connect_args={"timeout": 0.05})
    with closing(sqlite3.connect(file_of(database_url), isolation_level=None)) as other:
        service = FlowService(engine)
        other.execute("BEGIN IMMEDIATE")
        found = finding(service, "writing")
        other.execute("ROLLBACK")
        assert finding(service, "writing").verdict is OK
    engine.dispose()
    assert found.verdict is WARNING
    assert found.found.startswith("another process holds the write lock")


@on_sqlite
@pytest.mark.parametrize("damage", [b"\x00" * 200, b"\xff" * 4096])
def test_damage_is_a_problem(doctor: Ebbs, service: FlowService, database_url: str, damage: bytes) -> None:
    for number in range(300):
        service.schedule(f"template-{number}", idempotency_key=f"key-{number}")
    service.close()
    path = Path(file_of(database_url))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        root = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'uq_ebbs_flow_executions_idempotency_key'"
        ).fetchone()[0]
    with path.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(damage)
    result = doctor()
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "integrity" in line]
    assert line.startswith("problem  integrity          the file is damaged: ")
    assert "-> stop all workers, keep a copy of the file" in line


@on_sqlite
def test_the_size_is_told_with_that_of_the_log(service: FlowService, database_url: str) -> None:
    service.schedule("order")
    found = finding(service, "size")
    with service.engine.connect() as connection:
        pages, size = (connection.scalar(text(f"PRAGMA {each}")) for each in ("page_count", "page_size"))
    assert found.found.startswith(f"{pages * size / 1000:.1f} kB, and ")
    assert found.found.endswith(" kB in its write-ahead log")
    log = Path(f"{file_of(database_url)}-wal")
    assert log.stat().st_size > 0


def test_a_database_in_memory_is_well() -> None:
    with FlowService("sqlite://") as service:
        assert {each.verdict for each in diagnose(service)} == {OK}


# --- what a diagnosis costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_no_connection_is_kept(service: FlowService) -> None:
    diagnose(service)
    assert service.engine.pool.status().endswith("Current Checked out connections: 0")
