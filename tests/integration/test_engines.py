"""URLs, engines and connections: what is accepted, what is hidden, what is left alone."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    DatabaseUrlError,
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    TransitionError,
    schema,
    task,
)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://user:secret@host/db", "sqlite+aiosqlite://", "oracle://secret@x", 17, None]
)
def test_what_is_no_database_for_flows_is_refused(url: object) -> None:
    with pytest.raises(DatabaseUrlError) as caught:
        FlowService(url)  # type: ignore[arg-type]  # that is the test
    assert "secret" not in str(caught.value)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(OperationalError) as caught:
        FlowService("postgresql://ebbs:s3cret@127.0.0.1:1/flows")
    assert "s3cret" not in str(caught.value)


def test_flows_in_memory_are_shared_by_all_threads() -> None:
    with FlowService("sqlite://") as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        with ThreadPoolExecutor(4) as pool:
            ids = list(pool.map(lambda _: runner.schedule_flow("t"), range(20)))
            ran = [each for each in pool.map(lambda _: runner.run_flow(), range(20)) if each is not None]
        assert sorted(each.execution_id for each in ran) == sorted(ids)


def test_a_given_engine_is_used_as_it_is_and_left_open(database_url: str) -> None:
    from ebbs_and_flows.persistence.databases import create_engine_for

    engine = create_engine(create_engine_for(database_url).url)
    before = engine.pool
    with FlowService(engine) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        runner.schedule_flow("t")
        done = runner.run_flow()
        assert done is not None
        assert done.status is FlowStatus.SUCCEEDED
    assert engine.pool is before
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a QueuePool
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ebbs_flow_executions")).scalar_one() == 1
    engine.dispose()


@pytest.mark.parametrize("isolation_level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_the_hosts_isolation_level_does_not_take_the_transactions_apart(
    database_url: str, isolation_level: str
) -> None:
    from ebbs_and_flows.persistence.databases import create_engine_for

    engine = create_engine(create_engine_for(database_url).url, isolation_level=isolation_level)
    runner = FlowRunner(FlowService(engine))

    @task
    def fails_after_writing(session: Session) -> None:
        session.execute(text("UPDATE ebbs_flow_executions SET queue = 'changed'"))
        raise OSError("no")

    runner.register_flow_template(FlowTemplate("t", [fails_after_writing]))
    execution_id = runner.schedule_flow("t")
    runner.run_flow()
    assert runner.service.get_flow_execution(execution_id).queue == "default"
    engine.dispose()


def test_no_connection_is_kept_while_a_plain_task_runs(service: FlowService, runner: FlowRunner) -> None:
    seen = []

    @task
    def look() -> None:
        seen.append(service.engine.pool.checkedout())  # type: ignore[attr-defined]  # a QueuePool

    runner.register_flow_template(FlowTemplate("t", [look, task(lambda: None)]))
    runner.schedule_flow("t")
    runner.run_flow()
    assert seen == [0]
    assert service.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a QueuePool


def test_the_embedded_database_is_set_up_to_be_durable(tmp_path: Path) -> None:
    with FlowService(f"sqlite:///{tmp_path / 'flows.db'}") as service, service.engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_twenty_threads_with_one_idempotency_key_schedule_one_execution(
    service: FlowService, runner: FlowRunner
) -> None:
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    barrier = Barrier(10)

    def schedule(number: int) -> int:
        barrier.wait()
        return runner.schedule_flow("t", ExecutionContext(number=number), idempotency_key="the one")

    with ThreadPoolExecutor(10) as pool:
        ids = set(pool.map(schedule, range(20)))
    assert len(ids) == 1
    assert [each.execution_id for each in service.find_flow_executions()] == list(ids)


def test_many_threads_run_each_execution_once(service: FlowService, runner: FlowRunner) -> None:
    ran: list[int] = []

    @task
    def note(number: int) -> None:
        ran.append(number)

    runner.register_flow_template(FlowTemplate("t", [note]))
    for number in range(40):
        runner.schedule_flow("t", {"number": number})

    def drain(_: int) -> None:
        while runner.run_flow() is not None:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(drain, range(8)))
    while runner.run_flow() is not None:  # a claim skips what another one is just claiming
        pass
    assert sorted(ran) == list(range(40))
    assert {each.status for each in service.find_flow_executions()} == {FlowStatus.SUCCEEDED}


def test_a_cancel_and_a_completion_at_once_have_one_outcome(service: FlowService, runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    for _ in range(10):
        execution_id = runner.schedule_flow("t")
        barrier = Barrier(2)

        def cancel(execution_id: int = execution_id, barrier: Barrier = barrier) -> None:
            barrier.wait()
            with contextlib.suppress(TransitionError):  # the completion was quicker
                runner.cancel_flow_execution(execution_id)

        with ThreadPoolExecutor(1) as pool:
            cancelling = pool.submit(cancel)
            barrier.wait()
            runner.run_flow()
            cancelling.result()
        history = service.get_flow_status_history(execution_id)
        assert [each.to_status for each in history if each.to_status.is_final] == [history[-1].to_status]
        assert service.get_flow_execution(execution_id).status is history[-1].to_status


@pytest.mark.parametrize("session", [object(), "session", type("AsyncSession", (), {"run_sync": None})()])
def test_a_session_that_cannot_be_joined_is_refused(runner: FlowRunner, session: object) -> None:
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    with pytest.raises(InvalidArgumentError):
        runner.schedule_flow("t", session=session)  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_statement_that_a_pooler_has_lost_names_the_way_out(database_url: str) -> None:
    from ebbs_and_flows.persistence.databases import create_engine_for, said

    engine = create_engine_for(f"{database_url}&prepare_threshold=0")
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
        # Unseen by the driver: as if the next statement came to another connection.
        connection.connection.driver_connection.pgconn.exec_(b"DEALLOCATE ALL")  # type: ignore[union-attr]
        with pytest.raises(DBAPIError) as caught:
            connection.execute(text("SELECT 1"))
    assert "prepare_threshold=none" in said(caught.value)
    engine.dispose()


@pytest.mark.parametrize("database", ["postgresql"])
@pytest.mark.parametrize(("given", "expected"), [("none", None), ("None", None), ("0", 0), ("7", 7)])
def test_a_url_can_say_when_statements_are_prepared(database_url: str, given: str, expected: int | None) -> None:
    with FlowService(f"{database_url}&prepare_threshold={given}") as service, service.engine.connect() as connection:
        assert connection.connection.driver_connection.prepare_threshold == expected  # type: ignore[union-attr]
        assert service.get_runnable_flow() is None


@pytest.mark.parametrize("given", ["never", "-1"])
def test_a_prepare_threshold_that_is_none_of_these_is_refused(given: str) -> None:
    with pytest.raises(DatabaseUrlError, match="prepare_threshold") as caught:
        FlowService(f"postgresql://ebbs:s3cret@host/flows?prepare_threshold={given}")
    assert "s3cret" not in str(caught.value)


def test_a_database_that_is_read_only_says_so_and_nothing_is_half_done(tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    schema.upgrade(f"sqlite:///{path}")
    with FlowService(f"sqlite:///file:{path}?mode=ro&uri=true") as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        with pytest.raises(OperationalError, match="readonly"):
            runner.schedule_flow("t")
        assert service.find_flow_executions() == []


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_connection_that_is_in_use_as_its_service_is_closed_is_closed_when_it_is_given_back(
    database_url: str,
) -> None:
    service = FlowService(database_url)
    connection = service.engine.connect()
    driver_connection = connection.connection.driver_connection
    service.close()
    connection.close()
    assert driver_connection.closed
    assert service.find_flow_executions() == [], "it can still be used"
    service.close()
