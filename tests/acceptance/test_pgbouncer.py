"""Behind the real PgBouncer in transaction mode, where each transaction has another connection to the server."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Worker,
    schema,
    task,
)
from ebbs_and_flows.persistence.databases import create_engine_for
from tests.acceptance.test_worker_process import started
from tests.acceptance.worker_process import register
from tests.integration.flows import AT_ONCE, Gate
from tests.integration.invariants import check_invariants
from tests.pgbouncer import SERVERS, Pooler, pooler_before
from tests.postgres import PostgresServer
from tests.waiting import wait_until

SETTINGS = text("SELECT name, setting FROM pg_settings WHERE name NOT IN ('application_name') ORDER BY name")


@pytest.fixture
def database() -> str:
    """There is no PgBouncer before SQLite."""
    return "postgresql"


@pytest.fixture(scope="module")
def pooler(postgres_server: PostgresServer) -> Iterator[Pooler]:
    """A PgBouncer in transaction mode."""
    with pooler_before(postgres_server.url) as pooler:
        yield pooler


@pytest.fixture
def direct(database_url: str) -> Iterator[Engine]:
    """The database itself, without the pooler."""
    engine = create_engine_for(database_url)
    yield engine
    assert check_invariants(engine) == []
    engine.dispose()


@pytest.fixture
def url(pooler: Pooler, direct: Engine) -> str:
    """The database as it is reached through the pooler, with the one setting that this needs."""
    return _text(pooler.url(direct.url, prepare_threshold="none"))


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged that somebody should look at."""
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def succeeded(service: FlowService) -> int:
    """How many executions have."""
    return len(service.find_flow_executions(FlowFilter(statuses=[FlowStatus.SUCCEEDED], limit=1000)))


@contextmanager
def service_on(database: str | URL | Engine) -> Iterator[FlowService]:
    """A service that is closed when all of its connections are back in the pool."""
    with FlowService(database) as service:
        yield service
        wait_until(lambda: service.engine.pool.checkedout() == 0, "the last connection")  # type: ignore[attr-defined]  # a QueuePool


@contextmanager
def on_each_server(url: str) -> Iterator[list[Session]]:
    """A transaction on each of the connections that the pooler has to the server."""
    engine = create_engine_for(url)
    with ExitStack() as stack:
        sessions = [stack.enter_context(Session(engine)) for _ in range(SERVERS)]
        pids = {session.scalar(text("SELECT pg_backend_pid()")) for session in sessions}
        assert len(pids) == SERVERS
        yield sessions
    engine.dispose()


def test_workers_share_two_connections_and_leave_nothing_on_them(
    url: str, direct: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with direct.begin() as connection:
        connection.execute(text("CREATE TABLE sales (number INTEGER PRIMARY KEY, price INTEGER)"))
    failed: set[int] = set()

    @task(outputs="price", retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def price(number: int) -> int:
        if number % 7 == 0 and number not in failed:
            failed.add(number)
            raise OSError("try again")
        return 10 * number

    @task
    def sell(number: int, price: int, session: Session) -> None:
        session.execute(text("INSERT INTO sales VALUES (:number, :price)"), {"number": number, "price": price})

    @task(outputs="thanks")
    async def thank(price: int) -> str:
        return f"for {price}"

    with on_each_server(url) as sessions:
        before = [session.execute(SETTINGS).all() for session in sessions]
    with service_on(url) as service, ExitStack() as workers:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("order", [price, sell, thank], max_in_flight=10))
        for _ in range(3):
            workers.enter_context(Worker(runner, concurrency=8, poll_seconds=0.1, listen=False).running())
        with Session(service.engine) as session:
            runner.schedule_flow("order", {"number": 0}, session=session, idempotency_key="the first")
            session.commit()
        with Session(service.engine) as session:
            runner.schedule_flow("order", {"number": 1000}, session=session)
            session.rollback()
        runner.schedule_flows("order", [{"number": number} for number in range(1, 100)])
        wait_until(lambda: succeeded(service) == 100, "the last execution", 60)
        runner.cancel_flow_execution(runner.schedule_flow("order", {"number": 2000}, delay=3600))
        workers.close()
        with service.engine.connect() as connection:
            assert connection.execute(text("SELECT count(*), sum(price) FROM sales")).one() == (100, 49500)
    assert [each for each in warnings_in(caplog) if "failed with OSError" not in each] == []

    with on_each_server(url) as sessions:
        assert [session.execute(SETTINGS).all() for session in sessions] == before
        for session in sessions:
            assert session.scalars(text("SELECT pg_listening_channels()")).all() == []
            assert session.scalars(text("SELECT name FROM pg_prepared_statements")).all() == []
            locks = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
            assert session.scalar(locks) == 0


def test_no_server_connection_is_held_by_a_task_or_by_a_worker_that_waits(url: str, direct: Engine) -> None:
    gate = Gate()
    with service_on(url) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("gate", [gate]))
        with Worker(runner, poll_seconds=0.05).running():
            runner.schedule_flow("gate")
            gate.entered.acquire()
            with on_each_server(url):  # each of them is free
                pass
            in_transaction = text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state ~ 'in transaction'"
                " AND state_change < clock_timestamp() - interval '0.3 s'"
            )
            with direct.connect() as connection:
                assert connection.scalar(in_transaction) == 0
            gate.opened.set()
            wait_until(lambda: succeeded(service) == 1)


@pytest.mark.parametrize("flow", ["hold", "sell"])
def test_what_a_killed_worker_held_is_taken_over(url: str, direct: Engine, tmp_path: Path, flow: str) -> None:
    with direct.begin() as connection:
        connection.execute(text("CREATE TABLE effects (process INTEGER)"))
    gate = tmp_path / "gate"
    with service_on(url) as service, started(url, lease_seconds=1) as killed:
        runner = register(service)
        runner.schedule_flow(flow, {"gate": str(gate)})
        assert killed.next_line() == f"entered {flow}"
        killed.process.kill()
        killed.process.wait()
        gate.touch()
        with Worker(runner, poll_seconds=0.1, listen=False).running():
            wait_until(lambda: succeeded(service) == 1, "the taking over")
        with direct.connect() as connection:
            effects = connection.scalars(text("SELECT process FROM effects")).all()
        assert effects == ([os.getpid()] if flow == "sell" else [])


def test_a_worker_that_cannot_listen_says_so_once_and_polls(
    url: str, pooler: Pooler, direct: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    logged_before = len(pooler.log)
    with service_on(url) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        with Worker(runner, poll_seconds=0.1).running():
            wait_until(lambda: warnings_in(caplog), "the warning")
            for number in range(1, 4):
                runner.schedule_flow("t")
                wait_until(lambda number=number: succeeded(service) == number, "the poll")  # type: ignore[misc]
            held = service.engine.pool.checkedout()  # type: ignore[attr-defined]  # a QueuePool
            assert held <= 2, "the connection to listen on was given back"
    (warning,) = warnings_in(caplog)
    assert warning == (
        "cannot listen, polling instead: a pooler in transaction mode stands before the server. "
        "To poll from the beginning: Worker(..., listen=False), ebbs worker --no-listen"
    )
    with on_each_server(url) as sessions:
        for session in sessions:
            # Where its trial was taken back on another connection, one is left that listens to a name nobody ever says.
            channels = session.scalars(text("SELECT pg_listening_channels()")).all()
            assert [each for each in channels if not each.startswith("ebbs_trial_")] == []
    # A notice that came before the worker had found out, on a connection that it had just let go of.
    logged = [each for each in pooler.log[logged_before:].splitlines() if "got packet 'A'" not in each]
    assert not [each for each in logged if "WARNING" in each or "ERROR" in each]


def test_a_worker_behind_a_pooler_in_session_mode_is_told_at_once(
    postgres_server: PostgresServer, direct: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with pooler_before(postgres_server.url, "session") as pooler, service_on(pooler.url(direct.url)) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        with Worker(runner, poll_seconds=60).running():
            listening = text("SELECT count(*) FROM pg_stat_activity WHERE query = 'LISTEN \"ebbs_due\"'")
            with direct.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                wait_until(lambda: connection.scalar(listening), "the listener")
            runner.schedule_flow("t")
            wait_until(lambda: succeeded(service) == 1, "the notice")
    assert warnings_in(caplog) == []


def test_a_pooler_that_is_killed_is_waited_for(
    postgres_server: PostgresServer, direct: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with pooler_before(postgres_server.url) as pooler:
        url = _text(pooler.url(direct.url, prepare_threshold="none"))
        with service_on(url) as service, service_on(direct) as beside:
            runner = FlowRunner(service)
            gate = Gate()
            runner.register_flow_template(FlowTemplate("gate", [gate, task(lambda: None)]))
            with Worker(runner, poll_seconds=0.1, listen=False).running() as worker:
                beside.schedule("gate")
                gate.entered.acquire()
                pooler.stop()
                gate.opened.set()
                wait_until(lambda: worker.health().outage, "the outage")
                pooler.start()
                wait_until(lambda: succeeded(beside) == 1, "the recovery")
    assert not any("s3cret" in each for each in warnings_in(caplog))


def test_the_command_line_works_and_shows_no_password(pooler: Pooler, direct: Engine, url: str) -> None:
    def ebbs(*arguments: str, url: str = url) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "EBBS_DATABASE_URL": url}
        command = [sys.executable, "-c", "from ebbs_and_flows.cli import main; main()", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert ebbs("db", "upgrade", "--schema", "ebbs").stderr == f"Schema is at {schema.REVISION}.\n"
    assert ebbs("db", "check", "--deep").returncode == 0
    with service_on(url) as service:
        service.schedule("nobody-runs-it", delay=60)
    assert "nobody-runs-it" in ebbs("runs", "list").stdout
    assert ebbs("runs", "cancel", "1").returncode == 0
    diagnosis = ebbs("doctor")
    assert diagnosis.returncode == 0, diagnosis.stdout
    there_is_none = make_url(url).set(database="there_is_none")
    refused = ebbs("runs", "list", url=_text(there_is_none))
    assert refused.returncode == 1
    assert "there_is_none" in refused.stderr
    for each in (diagnosis, refused):
        assert "s3cret" not in each.stdout + each.stderr


def test_a_hosts_engine_needs_the_same_setting(pooler: Pooler, direct: Engine) -> None:
    engine = create_engine(pooler.url(direct.url), connect_args={"prepare_threshold": None}, pool_size=5)
    service = FlowService(engine)
    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    runner.schedule_flows("t", [{} for _ in range(50)])
    Worker(runner, listen=False).run(until_idle=True)
    assert succeeded(service) == 50
    engine.dispose()
