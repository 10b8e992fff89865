"""Migrations: they make exactly the tables in code, can be undone, and are safe to run from anywhere at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, MetaData, create_engine, event, inspect, text

from ebbs_and_flows import (
    DatabaseUrlError,
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowTemplate,
    MigrationError,
    SchemaError,
    schema,
    task,
)
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.tables import build_tables

ROOT = Path(__file__).parents[2]
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


def test_the_revision_in_code_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [schema.REVISION]


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
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'"))
    engine.dispose()
    with pytest.raises(SchemaError, match="Schema is at 0000, this release needs 0001"):
        FlowService(empty_database_url)


def test_a_newer_schema_is_accepted(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    with empty_engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0099'"))
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


@pytest.mark.parametrize("dialect", ["postgresql", "sqlite"])
def test_the_sql_for_a_dba_makes_the_same_schema(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    script = schema.sql(dialect)
    if dialect == "sqlite":
        import sqlite3
        from contextlib import closing

        with closing(sqlite3.connect(tmp_path / "dba.db")) as connection:
            connection.executescript(script)
        engine = create_engine_for(f"sqlite:///{tmp_path / 'dba.db'}")
    else:
        server = request.getfixturevalue("postgres_server")
        engine = create_engine(server.create_database())
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.connection.driver_connection.execute(script)
    assert schema.current(engine) == schema.REVISION
    assert schema.differences(engine) == []
    engine.dispose()


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
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0099'"))
    assert schema.upgrade(empty_engine) == "0099"
