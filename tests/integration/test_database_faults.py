"""What databases do to a worker: drop its connections, are busy, read-only, full or damaged."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Worker,
    task,
    wait_for_stop,
)
from tests.integration.flows import Gate, Outside, abc
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("sound_history")

ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"])
ON_POSTGRESQL = pytest.mark.parametrize("database", ["postgresql"])


def is_done(service: FlowService, execution_id: int) -> bool:
    """Whether an execution has succeeded."""
    return service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED


@ON_POSTGRESQL
def test_connections_that_the_server_terminates_cost_nothing_but_time(
    service: FlowService, runner: FlowRunner, database_url: str
) -> None:
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (number INTEGER)"))

    @task(outputs="a")
    def plain(number: int) -> int:
        wait_for_stop(0.01)
        return number

    # Its connection may be lost at each try, which is not its failure.
    @task(retry=RetryPolicy(max_crashes=1000))
    def transactional(number: int, session: Session) -> None:
        session.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
        wait_for_stop(0.01)

    runner.register_flow_template(FlowTemplate("flow", [plain, transactional]))
    with Session(service.engine) as session:
        for number in range(100):
            runner.schedule_flow("flow", {"number": number}, session=session)
        session.commit()
    terminate = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    other = create_engine(database_url, poolclass=NullPool)
    count = text("SELECT count(*) FROM ebbs_flow_executions WHERE status = 'SUCCEEDED'")
    idle = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    with Worker(runner, concurrency=8, poll_seconds=0.05).running() as worker, other.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        for done in (5, 15, 30, 50, 70):
            wait_until(lambda done=done: connection.execute(count).scalar_one() >= done)  # type: ignore[misc]
            connection.execute(terminate)
        wait_until(lambda: connection.execute(count).scalar_one() == 100)
        assert worker.is_running
        wait_until(lambda: connection.execute(idle).scalar_one() == 0)
    other.dispose()
    with service.engine.connect() as connection:
        effects = connection.scalars(text("SELECT number FROM effects ORDER BY number")).all()
    assert effects == list(range(100))
    for execution in service.find_flow_executions(FlowFilter(limit=1000)):
        for attempt in service.get_task_executions(execution.execution_id):
            assert attempt.failure in (None, Failure.LOST, Failure.STOPPED), attempt


@ON_POSTGRESQL
def test_a_transactional_task_that_always_loses_its_connection_is_parked(
    service: FlowService, runner: FlowRunner
) -> None:
    @task(retry=RetryPolicy(max_crashes=3))
    def poison(session: Session) -> None:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    runner.register_flow_template(FlowTemplate("poison", [poison]))
    ids = [runner.schedule_flow("poison")]
    Worker(runner, poll_seconds=0.05).run(until_idle=True)
    ids.append(runner.schedule_flow("poison"))
    runner.run_until_idle()
    for execution_id in ids:
        assert service.get_flow_execution(execution_id).status is FlowStatus.FAILED
        attempts = service.get_task_executions(execution_id)
        assert [each.failure for each in attempts] == [Failure.LOST] * 3
        assert "The database connection was lost" in (attempts[0].output or "")
        assert attempts[0].error_type in ("OperationalError", "AdminShutdown")


@ON_SQLITE
def test_a_worker_waits_for_another_writer(
    service: FlowService, runner: FlowRunner, outside: Outside, database_url: str
) -> None:
    runner.register_flow_template(abc(outside))
    execution_id = runner.schedule_flow("abc")
    path = make_url(database_url).database or ""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        with Worker(runner, poll_seconds=0.02).running():
            threading.Timer(0.3, other.execute, ["ROLLBACK"]).start()
            wait_until(lambda: is_done(service, execution_id))
    assert outside.calls == ["a", "b", "c"]


@ON_SQLITE
def test_on_a_database_that_cannot_be_written_a_worker_says_so_and_goes_on_trying(
    service: FlowService, database_url: str, outside: Outside
) -> None:
    scheduling = FlowRunner(service)
    scheduling.register_flow_template(abc(outside))
    execution_id = scheduling.schedule_flow("abc")
    path = Path(make_url(database_url).database or "")
    with FlowService(f"sqlite:///file:{path}?mode=ro&uri=true") as read_only:
        runner = FlowRunner(read_only)
        runner.register_flow_template(abc(outside))
        with Worker(runner, poll_seconds=0.02).running() as worker:
            wait_until(lambda: worker.health().outage)
            assert "readonly" in (worker.health().outage or "")
            assert worker.is_running
    assert outside.calls == []
    assert service.get_flow_execution(execution_id).status is FlowStatus.SCHEDULED


@ON_SQLITE
def test_a_full_disk_loses_nothing(database_url: str, service: FlowService) -> None:
    """The disk is full from the first task's end on, until somebody makes room."""
    is_full, began = threading.Event(), threading.Event()

    @task(outputs="page")
    def write(context: ExecutionContext) -> str:
        began.set()
        is_full.wait()
        return "x" * 500_000

    engine = engine_on_a_disk(database_url, is_full)
    with FlowService(engine) as bounded:
        runner = FlowRunner(bounded)
        runner.register_flow_template(FlowTemplate("write", [write]))
        execution_id = runner.schedule_flow("write")
        with Worker(runner, poll_seconds=0.02).running() as worker:
            wait_until(began.is_set)
            is_full.set()
            wait_until(lambda: worker.health().outage)
            assert "full" in (worker.health().outage or "")
            assert service.get_flow_execution(execution_id).status is FlowStatus.RUNNING
            is_full.clear()
            wait_until(lambda: is_done(service, execution_id))
    engine.dispose()
    assert len(service.get_task_executions(execution_id)) == 1


@ON_SQLITE
def test_a_worker_knows_that_it_cannot_write_while_it_can_read_and_others_run(database_url: str) -> None:
    """What is written beside the loop has not been written before it says so."""
    is_full = threading.Event()
    runs = Gate("runs")

    class Write(Gate):
        def run(self, context: ExecutionContext) -> ExecutionContext:
            return super().run(context).copy(page="x" * 500_000)

    writes = Write("writes")
    engine = engine_on_a_disk(database_url, is_full)
    with FlowService(engine) as bounded:
        runner = FlowRunner(bounded)
        runner.register_flow_template(FlowTemplate("runs", [runs]))
        runner.register_flow_template(FlowTemplate("writes", [writes]))
        ids = [runner.schedule_flow("runs"), runner.schedule_flow("writes")]
        with Worker(runner, lease_seconds=1, poll_seconds=0.2).running() as worker:
            assert runs.entered.acquire(timeout=PATIENCE_SECONDS)
            assert writes.entered.acquire(timeout=PATIENCE_SECONDS)
            is_full.set()
            writes.opened.set()
            wait_until(lambda: not worker.health().is_healthy)
            assert "full" in (worker.health().outage or "")
            is_full.clear()
            runs.opened.set()
            wait_until(lambda: all(is_done(bounded, each) for each in ids))
            wait_until(lambda: worker.health().is_healthy)
    engine.dispose()


def engine_on_a_disk(database_url: str, is_full: threading.Event) -> Engine:
    """An engine of SQLite for which the disk may be full."""
    engine = create_engine(database_url)

    @event.listens_for(engine, "checkout")
    def bound(connection: sqlite3.Connection, *_: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 20 if is_full.is_set() else 2**30}")

    return engine


@ON_SQLITE
def test_a_damaged_file_is_a_clear_error_and_is_left_as_it_is(service: FlowService, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"this was a database once" * 1000)
    before = damaged.read_bytes()
    with pytest.raises(DatabaseError, match="file is not a database"):
        FlowService(f"sqlite:///{damaged}")
    assert damaged.read_bytes() == before
