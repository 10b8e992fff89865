"""Migrations: they make exactly the tables in code, can be undone, and are safe to run from anywhere at once."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from psycopg.errors import UndefinedFunction
from sqlalchemy import Engine, MetaData, event, inspect, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner

from ebbs_and_flows import (
    DatabaseUrlError,
    ExecutionContext,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    MigrationError,
    MigrationTimeoutError,
    SchemaError,
    Worker,
    schema,
    task,
)
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.tables import build_tables
from tests.integration.compatibility import (
    MIGRATIONS,
    NEXT_REVISION,
    scripts_in,
    unmarked_breaks,
    write_next_release,
)
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

OURS = ["ebbs_flow_executions", "ebbs_flow_transitions", "ebbs_task_executions"]


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[Engine]:
    engine = create_engine_for(empty_database_url)
    yield engine
    engine.dispose()


def definitions(engine: Engine) -> list[str]:
    """What the database itself says its tables, constraints and indexes are."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            rows = connection.execute(text("SELECT type || ' ' || sql FROM sqlite_master WHERE sql LIKE '%ebbs_%'"))
        else:
            rows = connection.execute(
                text(
                    """
                    SELECT concat_ws(' ', 'column', table_name, ordinal_position, column_name, data_type,
                                     character_maximum_length, is_nullable, column_default, is_identity,
                                     identity_generation)
                      FROM information_schema.columns WHERE table_name LIKE 'ebbs_%'
                    UNION ALL
                    SELECT concat_ws(' ', 'constraint', conrelid::regclass, conname, pg_get_constraintdef(oid))
                      FROM pg_constraint WHERE conrelid::regclass::text LIKE 'ebbs_%'
                    UNION ALL
                    SELECT concat_ws(' ', 'index', indexdef) FROM pg_indexes WHERE tablename LIKE 'ebbs_%'
                    UNION ALL
                    SELECT concat_ws(' ', 'options', relname, reloptions::text)
                      FROM pg_class WHERE relname LIKE 'ebbs_%' AND relkind = 'r'
                    """
                )
            )
        found = [re.sub(r"\s+", " ", row[0]).strip() for row in rows]
    return sorted(line for line in found if schema.VERSION_TABLE not in line)


def test_migrations_make_exactly_the_tables_in_code(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    assert schema.differences(empty_engine) == []
    migrated = definitions(empty_engine)
    schema.downgrade(empty_engine, "base")
    build_tables().metadata.create_all(empty_engine)
    assert definitions(empty_engine) == migrated
    assert len(migrated) > 5


def test_the_revisions_are_one_line_that_ends_at_the_one_in_code() -> None:
    revisions = [script.revision for script in scripts_in(MIGRATIONS)]
    assert revisions == [f"ebbs_{number:04d}" for number in range(1, len(revisions) + 1)]
    assert revisions[-1] == schema.REVISION
    assert all("ebbs" in script.branch_labels for script in scripts_in(MIGRATIONS))


def test_a_downgrade_removes_everything(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    assert set(OURS) <= set(inspect(empty_engine).get_table_names())
    assert schema.downgrade(empty_engine, "base") is None
    assert not set(OURS) & set(inspect(empty_engine).get_table_names())
    assert schema.upgrade(empty_engine) == schema.REVISION


def test_what_the_schema_lacks_is_seen(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_ebbs_flow_executions_due"))
    assert schema.differences(empty_engine) != []


def test_the_version_table_is_its_own(empty_engine: Engine) -> None:
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('host')"))
    schema.upgrade(empty_engine)
    schema.downgrade(empty_engine, "base")
    with empty_engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "host"


def test_ten_upgrades_at_once_all_succeed(empty_database_url: str) -> None:
    with ThreadPoolExecutor(10) as pool:
        revisions = list(pool.map(lambda _: schema.upgrade(empty_database_url), range(10)))
    assert revisions == [schema.REVISION] * 10
    assert schema.differences(empty_database_url) == []


def test_an_upgrade_joins_the_callers_transaction(empty_engine: Engine) -> None:
    with empty_engine.connect() as connection:
        schema.upgrade(connection)
        connection.rollback()
    assert schema.current(empty_engine) is None
    with empty_engine.begin() as connection:
        schema.upgrade(connection)
    assert schema.current(empty_engine) == schema.REVISION


def test_an_upgrade_that_fails_leaves_nothing_behind(empty_engine: Engine) -> None:
    def refuse(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "CREATE TABLE ebbs_flow_transitions" in statement:
            raise OSError("the disk is full")

    event.listen(empty_engine, "before_cursor_execute", refuse)
    with pytest.raises(OSError, match="full"):
        schema.upgrade(empty_engine)
    event.remove(empty_engine, "before_cursor_execute", refuse)
    assert inspect(empty_engine).get_table_names() == []
    assert schema.upgrade(empty_engine) == schema.REVISION


def test_a_missing_schema_is_made_on_sqlite_and_refused_elsewhere(empty_database_url: str, database: str) -> None:
    if database == "sqlite":
        FlowService(empty_database_url).close()
        assert schema.current(empty_database_url) == schema.REVISION
        return
    with pytest.raises(SchemaError, match='run "ebbs db upgrade"'):
        FlowService(empty_database_url)
    schema.upgrade(empty_database_url)
    engine = create_engine_for(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = 'ebbs_0000'"))
    engine.dispose()
    with pytest.raises(SchemaError, match=f"Schema is at ebbs_0000, this release needs {schema.REVISION}"):
        FlowService(empty_database_url)


def test_a_newer_schema_is_accepted(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = 'ebbs_0099'"))
    schema.check(empty_engine)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_all_lives_in_a_named_schema_where_one_is_given(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine, schema="Ebbs_2")
    assert inspect(empty_engine).get_table_names() == []
    assert set(OURS) <= set(inspect(empty_engine).get_table_names(schema="Ebbs_2"))
    assert schema.differences(empty_engine, schema="Ebbs_2") == []
    service = FlowService(empty_engine, schema="Ebbs_2")
    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    runner.schedule_flow("t", ExecutionContext(n=1), idempotency_key="k")
    done = runner.run_flow()
    assert done is not None
    assert done.status == "SUCCEEDED"
    assert schema.downgrade(empty_engine, "base", schema="Ebbs_2") is None
    with pytest.raises(DatabaseUrlError):
        schema.upgrade(empty_engine, schema='x"; DROP TABLE y; --')


def test_named_schemas_are_refused_on_sqlite(tmp_path: Path) -> None:
    with pytest.raises(DatabaseUrlError, match="PostgreSQL"):
        FlowService(f"sqlite:///{tmp_path / 'x.db'}", schema="ebbs")


def test_the_sql_for_a_dba_makes_the_same_schema(empty_engine: Engine, database: str) -> None:
    for named in (None,) if database == "sqlite" else (None, "ebbs"):
        run_script(empty_engine, schema.sql(database, schema=named))
        assert schema.current(empty_engine, schema=named) == schema.REVISION
        assert schema.differences(empty_engine, schema=named) == []
        FlowService(empty_engine, schema=named).close()
        run_script(empty_engine, schema.sql(database, "base", schema=named, downgrade=True))
        assert schema.current(empty_engine, schema=named) is None
        assert not set(OURS) & set(inspect(empty_engine).get_table_names(schema=named))


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_sql_for_a_dba_is_one_transaction_with_time_outs(empty_engine: Engine) -> None:
    script = schema.sql("postgresql", schema="ebbs", lock_timeout_seconds=2.5, statement_timeout_seconds=60)
    statements = [each.strip() for each in script.split(";") if each.strip()]
    assert statements[:4] == [
        "BEGIN",
        "SET LOCAL lock_timeout = '2500ms'",
        "SET LOCAL statement_timeout = '60000ms'",
        'CREATE SCHEMA IF NOT EXISTS "ebbs"',
    ]
    assert statements[-1] == "COMMIT"
    assert [each for each in statements if each in ("BEGIN", "COMMIT")] == ["BEGIN", "COMMIT"]
    with pytest.raises(UndefinedFunction):
        run_script(empty_engine, script.replace("COMMIT", "SELECT no_such_function(); COMMIT"))
    assert not inspect(empty_engine).has_schema("ebbs")
    assert "TIMEOUT" not in schema.sql("postgresql", lock_timeout_seconds=None, statement_timeout_seconds=None)[:200]


def run_script(engine: Engine, script: str) -> None:
    """What psql and sqlite3 do with a file."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver: Any = connection.connection.driver_connection
        try:
            (driver.executescript if engine.dialect.name == "sqlite" else driver.execute)(script)
        except Exception:
            driver.rollback()
            raise


def test_a_hosts_metadata_is_not_touched(empty_engine: Engine) -> None:
    host = MetaData()
    schema.upgrade(empty_engine)
    host.reflect(empty_engine, only=lambda name, _: not name.startswith("ebbs_"))
    assert host.tables == {}


def test_the_sql_of_a_downgrade_drops_the_tables() -> None:
    script = schema.sql("postgresql", "base", downgrade=True)
    assert all(f"DROP TABLE {name};" in script for name in OURS)
    with pytest.raises(MigrationError, match="9999"):
        schema.sql("postgresql", "9999")


def test_a_revision_that_is_not_there_is_refused(empty_engine: Engine) -> None:
    with pytest.raises(MigrationError, match="9999"):
        schema.upgrade(empty_engine, "9999")
    assert schema.current(empty_engine) is None


def test_an_upgrade_leaves_a_newer_schema_alone(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = 'ebbs_0099'"))
    assert schema.upgrade(empty_engine) == "ebbs_0099"


# --- within the caller's transaction ------------------------------------------------------------------------------


class Deploy:
    """A next release of this library, as far as its migrations go."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch

    def migrations(self, upgrade: str, downgrade: str = "pass") -> None:
        """From here on its migrations are the ones that an upgrade runs."""
        migrations = write_next_release(self._folder, upgrade, downgrade)
        self._monkeypatch.setattr(schema, "_migrations", lambda: migrations)

    def code(self) -> None:
        """From here on its code is the one that starts."""
        self._monkeypatch.setattr(schema, "REVISION", NEXT_REVISION)


@pytest.fixture
def deploy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    return Deploy(tmp_path, monkeypatch)


def test_an_upgrade_that_fails_leaves_the_callers_transaction_as_it_was(empty_engine: Engine, deploy: Deploy) -> None:
    deploy.migrations(
        """op.add_column("ebbs_flow_executions", sa.Column("owner", sa.Text), schema=schema)
        raise OSError("the disk is full")"""
    )
    schema.upgrade(empty_engine, "ebbs_0001")
    with empty_engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (id INTEGER)"))
        with pytest.raises(OSError, match="full"):
            schema.upgrade(connection, NEXT_REVISION)
        connection.execute(text("INSERT INTO mine VALUES (1)"))
    assert "mine" in inspect(empty_engine).get_table_names()
    assert schema.current(empty_engine) == "ebbs_0001"
    assert schema.differences(empty_engine) == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_connection_without_transactions_is_refused(empty_engine: Engine) -> None:
    with empty_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(InvalidArgumentError, match="AUTOCOMMIT"):
            schema.upgrade(connection)
        assert schema.current(connection) is None
    engine = empty_engine.execution_options(isolation_level="AUTOCOMMIT")
    assert schema.upgrade(engine) == schema.REVISION
    with engine.connect() as connection:
        assert connection.connection.dbapi_connection.autocommit  # type: ignore[union-attr]  # it is one that is open


def test_an_upgrade_runs_within_an_engine_of_asyncio(empty_database_url: str, empty_engine: Engine) -> None:
    async def upgrade() -> None:
        driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}[empty_engine.dialect.name]
        engine = create_async_engine(make_url(empty_database_url).set(drivername=driver))
        async with engine.connect() as connection:
            await connection.run_sync(schema.upgrade)
            await connection.rollback()
            assert await connection.run_sync(schema.current) is None
        async with engine.begin() as connection:
            await connection.run_sync(schema.upgrade)
        await engine.dispose()

    asyncio.run(upgrade())
    assert schema.differences(empty_engine) == []


def test_upgrades_of_several_databases_at_once_do_not_meet(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path / f'{number}.db'}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(schema.upgrade, urls)) == {schema.REVISION}
    assert [schema.differences(url) for url in urls] == [[]] * 8


def test_a_killed_upgrade_leaves_nothing_behind_and_holds_nobody_up(
    empty_database_url: str, empty_engine: Engine
) -> None:
    program = """
import os, signal, sys
from sqlalchemy import Engine, event
from ebbs_and_flows import schema

@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, statement, *_):
    if "CREATE TABLE ebbs_task_executions" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

schema.upgrade(sys.argv[1])
"""
    died = subprocess.run([sys.executable, "-c", program, empty_database_url], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    assert inspect(empty_engine).get_table_names() == []
    with ThreadPoolExecutor(10) as pool:
        assert set(pool.map(lambda _: schema.upgrade(empty_database_url), range(10))) == {schema.REVISION}
    assert schema.differences(empty_engine) == []


# --- time-outs ----------------------------------------------------------------------------------------------------


def test_a_lock_that_cannot_be_had_in_time_leaves_all_as_it_was(
    database_url: str, service: FlowService, database: str
) -> None:
    with service.engine.connect() as other:
        if database == "sqlite":
            other.exec_driver_sql("BEGIN IMMEDIATE")
        other.execute(text("SELECT count(*) FROM ebbs_flow_executions"))
        with pytest.raises(
            MigrationTimeoutError, match=r"within 0.1 seconds: let it end.* lock_timeout_seconds"
        ) as caught:
            schema.downgrade(database_url, "base", lock_timeout_seconds=0.1)
        assert (caught.value.limit, caught.value.timeout_seconds) == ("lock_timeout_seconds", 0.1)
        result = CliRunner().invoke(
            app, ["--database-url", database_url, "db", "downgrade", "base", "--yes", "--lock-timeout-seconds", "0.1"]
        )
        assert (result.exit_code, result.stdout) == (1, "")
        assert "the schema was not changed" in result.stderr
        assert result.stderr.count("\n") == 1
    assert schema.current(database_url) == schema.REVISION
    assert schema.differences(database_url) == []
    assert schema.downgrade(database_url, "base", lock_timeout_seconds=0.1) is None


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_time_out_leaves_the_callers_transaction_as_it_was(database_url: str, service: FlowService) -> None:
    with service.engine.connect() as other, service.engine.begin() as connection:
        other.execute(text("SELECT count(*) FROM ebbs_flow_executions"))
        connection.execute(text("SET LOCAL lock_timeout = '7s'"))
        connection.execute(text("CREATE TABLE mine (id INTEGER)"))
        with pytest.raises(MigrationTimeoutError):
            schema.downgrade(connection, "base", lock_timeout_seconds=0.1)
        assert connection.scalar(text("SHOW lock_timeout")) == "7s"
    assert "mine" in inspect(service.engine).get_table_names()
    assert schema.differences(database_url) == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_statement_that_takes_too_long_is_cut_off(empty_engine: Engine, deploy: Deploy) -> None:
    deploy.migrations('op.execute("SELECT pg_sleep(60)")')
    with pytest.raises(MigrationTimeoutError, match=r"within 0\.2 seconds.* statement_timeout_seconds"):
        schema.upgrade(empty_engine, statement_timeout_seconds=0.2)
    assert schema.current(empty_engine) is None
    assert inspect(empty_engine).get_table_names() == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_time_outs_hold_for_the_upgrade_and_no_longer(empty_engine: Engine, deploy: Deploy) -> None:
    deploy.migrations(
        """op.execute("DROP TABLE IF EXISTS seen")
        op.execute("CREATE TABLE seen AS SELECT current_setting('lock_timeout') || ' '"
                   " || current_setting('statement_timeout') AS settings")""",
        downgrade="pass",
    )

    def seen_with(**how: float | None) -> str:
        schema.upgrade(connection, **how)  # type: ignore[arg-type]  # its keywords are these two
        assert connection.scalar(text("SHOW lock_timeout")) == "7s"
        assert connection.scalar(text("SHOW statement_timeout")) == "8s"
        schema.downgrade(connection, "base")
        assert connection.scalar(text("SHOW lock_timeout")) == "7s"
        return str(connection.scalar(text("SELECT settings FROM seen")))

    with empty_engine.connect() as connection:
        connection.execute(text("SET lock_timeout = '7s'"))
        connection.execute(text("SET statement_timeout = '8s'"))
        connection.commit()
        assert seen_with() == "10s 5min"
        assert seen_with(lock_timeout_seconds=2.5, statement_timeout_seconds=60) == "2500ms 1min"
        assert seen_with(lock_timeout_seconds=None, statement_timeout_seconds=None) == "7s 8s"


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_the_patience_of_a_connection_is_its_own_again(empty_engine: Engine) -> None:
    with empty_engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 1234")
        schema.upgrade(connection, lock_timeout_seconds=1)
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 1234


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_another_upgrade_is_waited_for_as_long_as_a_statement_may_take(empty_engine: Engine) -> None:
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory' "
        "AND clock_timestamp() - query_start > interval '0.3 seconds'"
    )
    with empty_engine.connect() as first, empty_engine.connect() as observer, ThreadPoolExecutor(1) as pool:
        schema.upgrade(first)
        with pytest.raises(MigrationTimeoutError, match=r"another upgrade .* within 0\.2 seconds"):
            schema.upgrade(empty_engine, statement_timeout_seconds=0.2)
        second = pool.submit(schema.upgrade, empty_engine, lock_timeout_seconds=0.05)
        wait_until(lambda: observer.execute(text(waiting)).scalar_one(), "the second upgrade's wait")
        first.commit()
        assert second.result(timeout=20) == schema.REVISION
    assert schema.differences(empty_engine) == []


@pytest.mark.parametrize("bound", [0, -1, True, "10", float("nan"), 3_000_000])
def test_a_bound_that_is_none_is_refused(bound: Any, tmp_path: Path) -> None:
    for argument in ("lock_timeout_seconds", "statement_timeout_seconds"):
        with pytest.raises(InvalidArgumentError, match=argument):
            schema.upgrade(f"sqlite:///{tmp_path / 'x.db'}", **{argument: bound})
        with pytest.raises(InvalidArgumentError, match=argument):
            schema.sql("postgresql", **{argument: bound})
    assert list(tmp_path.iterdir()) == []


# --- in a pipeline ------------------------------------------------------------------------------------------------


def test_a_check_prints_the_command_that_mends_what_it_found(empty_database_url: str, database: str) -> None:
    def check(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["--database-url", empty_database_url, "db", "check", *options])
        return result.exit_code, result.stdout

    assert check() == (3, "ebbs db upgrade\n")
    if database == "postgresql":
        assert check("--schema", "flows") == (3, "ebbs db upgrade --schema flows\n")
    schema.upgrade(empty_database_url)
    assert check() == (0, "")


# --- old and new side by side -------------------------------------------------------------------------------------

EXPANDING = """
op.add_column("ebbs_flow_executions", sa.Column("owner", sa.String(64)), schema=schema)
op.add_column("ebbs_flow_executions", sa.Column("cost", sa.Integer, nullable=False, server_default="0"), schema=schema)
op.add_column("ebbs_task_executions", sa.Column("note", sa.Text), schema=schema)
op.add_column("ebbs_task_executions", sa.Column("cost", sa.Integer, nullable=False, server_default="0"), schema=schema)
op.add_column("ebbs_flow_transitions", sa.Column("note", sa.Text), schema=schema)
op.create_table("ebbs_labels", sa.Column("execution_id", sa.BigInteger, primary_key=True), schema=schema)
op.create_index("ix_ebbs_task_executions_name", "ebbs_task_executions", ["name"], schema=schema)
"""


def a_flow(failures: list[Exception]) -> FlowTemplate:
    @task(outputs="doubled")
    def double(number: int) -> int:
        return 2 * number

    @task(outputs="done")
    def fail_first(doubled: int) -> bool:
        with suppress(IndexError):
            raise failures.pop()
        return doubled > 0

    return FlowTemplate("a-flow", [double, fail_first])


def test_workers_of_the_release_before_go_on_while_and_after_the_schema_is_expanded(
    service: FlowService, deploy: Deploy
) -> None:
    failures: list[Exception] = []
    runner = FlowRunner(service)
    runner.register_flow_template(a_flow(failures))
    worker = Worker(runner, concurrency=8, poll_seconds=0.05)

    def succeeded() -> int:
        return len(service.find_flow_executions(FlowFilter(statuses=[FlowStatus.SUCCEEDED], limit=1000)))

    with worker.running():
        runner.schedule_flows("a-flow", [{"number": number} for number in range(1, 101)])
        wait_until(succeeded, "the first flow's end")
        deploy.migrations(EXPANDING)
        assert schema.upgrade(service.engine, NEXT_REVISION) == NEXT_REVISION
        runner.schedule_flows("a-flow", [{"number": number} for number in range(101, 201)])
        wait_until(lambda: succeeded() == 200, "the last flow's end", seconds=60)

    failures.append(OSError("the bank does not answer"))
    execution = runner.schedule_flow("a-flow", {"number": 1}, idempotency_key="once")
    failed = runner.run_flow()
    assert failed is not None
    assert failed.status is FlowStatus.FAILED
    runner.reschedule_flow_execution(execution)
    done = runner.re_run_flow()
    assert done is not None
    assert done.execution_context["done"] is True
    assert [each.name for each in service.get_task_executions(execution)] == ["double", "fail_first", "fail_first"]
    assert check_invariants(service.engine) == []


def test_old_code_starts_on_a_newer_schema(empty_database_url: str, deploy: Deploy) -> None:
    deploy.migrations(EXPANDING)
    assert schema.upgrade(empty_database_url) == NEXT_REVISION
    with FlowService(empty_database_url) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(a_flow([]))
        runner.schedule_flow("a-flow", {"number": 1})
        Worker(runner).run(until_idle=True)
        assert [each.status for each in service.find_flow_executions(FlowFilter())] == [FlowStatus.SUCCEEDED]
    assert schema.upgrade(empty_database_url) == NEXT_REVISION


def test_new_code_refuses_an_older_schema_at_its_start(database_url: str, database: str, deploy: Deploy) -> None:
    deploy.migrations(EXPANDING)
    deploy.code()
    if database == "sqlite":  # opened here, it is brought up to date
        FlowService(database_url).close()
    else:
        told = f'Schema is at ebbs_0001, this release needs {NEXT_REVISION}: run "ebbs db upgrade".'
        with pytest.raises(SchemaError) as refused:
            FlowService(database_url)
        assert str(refused.value) == told
        assert schema.current(database_url) == "ebbs_0001"
        assert schema.upgrade(database_url) == NEXT_REVISION
        FlowService(database_url).close()
    assert schema.current(database_url) == NEXT_REVISION


def test_no_migration_breaks_the_release_before(empty_engine: Engine) -> None:
    with empty_engine.connect() as connection:
        assert unmarked_breaks(connection, MIGRATIONS) == []


ATTEMPTS = 'with op.batch_alter_table("ebbs_task_executions") as attempts: attempts'
BREAKING = (
    ('op.drop_table("ebbs_flow_transitions")', "table ebbs_flow_transitions is gone"),
    ('op.rename_table("ebbs_flow_transitions", "ebbs_changes")', "table ebbs_flow_transitions is gone"),
    ('op.drop_column("ebbs_task_executions", "worker")', "column ebbs_task_executions.worker is gone"),
    (f'{ATTEMPTS}.alter_column("worker", new_column_name="host")', "column ebbs_task_executions.worker is gone"),
    (f'{ATTEMPTS}.alter_column("worker", nullable=False)', "column ebbs_task_executions.worker has to be given"),
    (
        f'{ATTEMPTS}.add_column(sa.Column("cost", sa.Integer, nullable=False))',
        "column ebbs_task_executions.cost has to be given",
    ),
    (
        f'{ATTEMPTS}.alter_column("worker", type_=sa.String(16))',
        "column ebbs_task_executions.worker was VARCHAR(255), is VARCHAR(16)",
    ),
    (
        f'{ATTEMPTS}.alter_column("attempt", type_=sa.SmallInteger)',
        "column ebbs_task_executions.attempt was INTEGER, is SMALLINT",
    ),
    (
        f'{ATTEMPTS}.alter_column("output", type_=sa.String(99))',
        "column ebbs_task_executions.output was TEXT, is VARCHAR(99)",
    ),
    (
        'op.create_index("ix", "ebbs_flow_executions", ["queue"], unique=True)',
        "ebbs_flow_executions ('queue',) has to be unique",
    ),
)


@pytest.mark.parametrize(("statement", "broken"), BREAKING)
def test_a_migration_that_would_break_it_is_refused_unless_it_names_a_release(
    statement: str, broken: str, empty_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found_with(mark: str) -> list[str]:
        migrations = write_next_release(tmp_path / (mark or "unmarked"), statement, mark=mark)
        monkeypatch.setattr(schema, "_migrations", lambda: migrations)
        with empty_engine.connect() as connection:
            found = unmarked_breaks(connection, migrations)
            connection.rollback()
        return found

    assert found_with("") == [f"{NEXT_REVISION}: {broken}"]
    assert found_with('contracts_since = "soon"') == [f"{NEXT_REVISION}: {broken}"]
    assert found_with('contracts_since = "0.4.0"') == []


def test_a_migration_that_only_adds_is_not_refused(
    empty_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = 'with op.batch_alter_table("ebbs_task_executions") as b: b.alter_column("worker", type_=sa.String(999))'
    migrations = write_next_release(tmp_path, f"{EXPANDING}\n{wider}")
    monkeypatch.setattr(schema, "_migrations", lambda: migrations)
    with empty_engine.connect() as connection:
        assert unmarked_breaks(connection, migrations) == []
        assert schema.current(connection) == NEXT_REVISION
