"""Three roles on PostgreSQL: the migrator makes the tables, the worker runs flows, the reader looks, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from sqlalchemy import URL, Engine, inspect, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session
from typer.testing import CliRunner, Result

from ebbs_and_flows import (
    DatabaseUrlError,
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    InvalidNameError,
    RetryPolicy,
    SchemaError,
    Worker,
    grants,
    schema,
    task,
)
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.persistence.databases import create_engine_for
from tests.integration.flows import AT_ONCE
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

Ebbs = Callable[..., Result]


@dataclass
class Roles:
    """Three roles without any privilege, and a database in which they are to get some."""

    admin: Engine
    names: dict[str, str]

    def url(self, role: str) -> str:
        """Where this role logs in."""
        return _text(self.admin.url.set(username=self.names[role], password="secret"))

    def quoted(self, role: str) -> str:
        """Its name in SQL."""
        return _quoted(self.names[role])

    def grant(self, sql: str) -> None:
        """Run a script as a DBA would."""
        _execute(self.admin, sql)

    def run(self, role: str, *statements: str) -> None:
        """Run statements as this role."""
        engine = create_engine_for(self.url(role))
        _execute(engine, *statements)
        engine.dispose()

    def refuses(self, role: str, statement: str) -> bool:
        """Whether the database does not let this role do it."""
        engine = create_engine_for(self.url(role))
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        except ProgrammingError as error:
            if getattr(error.orig, "sqlstate", None) != "42501":  # insufficient_privilege
                raise
            return True
        finally:
            engine.dispose()
        return False


@pytest.fixture
def database() -> str:
    """SQLite has no roles."""
    return "postgresql"


@pytest.fixture(params=["plain", "worst"])
def roles(request: pytest.FixtureRequest, empty_database_url: str) -> Iterator[Roles]:
    """Once with plain names, once with the worst ones that PostgreSQL takes."""
    mark = uuid4().hex[:8]
    odd = "" if request.param == "plain" else "A \"b'; $grants$ $grants_$ % :c é"
    names = {role: f"{role} {mark}{odd}" if odd else f"{role}_{mark}" for role in ("migrator", "worker", "reader")}
    admin = create_engine_for(empty_database_url)
    _execute(admin, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")  # as it is from PostgreSQL 15 on
    for name in names.values():
        _execute(admin, f"CREATE ROLE {_quoted(name)} LOGIN PASSWORD 'secret'")
    yield Roles(admin, names)
    for name in names.values():
        _execute(admin, f"DROP OWNED BY {_quoted(name)} CASCADE", f"DROP ROLE {_quoted(name)}")
    admin.dispose()


@pytest.fixture
def ebbs(monkeypatch: pytest.MonkeyPatch) -> Ebbs:
    """The command, as a role or without any database in its environment."""
    for name in ("EBBS_DATABASE_URL", "EBBS_SCHEMA"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, url: str | None = None) -> Result:
        result = CliRunner().invoke(app, [*map(str, arguments)], env={"EBBS_DATABASE_URL": url})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


def _execute(engine: Engine, *statements: str) -> None:
    """Past SQLAlchemy, to which a `:` or a `%` in a name would be a parameter."""
    with engine.begin() as connection:
        for statement in statements:
            connection.connection.driver_connection.execute(statement)  # type: ignore[union-attr]  # it is connected


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


# --- what they may do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "ebbs"], ids=["in public", "in a named schema"])
def test_three_roles_live_a_whole_life(roles: Roles, ebbs: Ebbs, name: str | None) -> None:
    options = [each for role, given in roles.names.items() for each in (f"--{role}", given)]
    options += ["--schema", name] if name else []
    printed = ebbs("db", "grants", *options)
    assert printed.exit_code == 0
    assert printed.stdout == grants.sql(**roles.names, schema=name)
    in_schema = ["--schema", name] if name else []

    roles.grant(printed.stdout)  # so that the migrator may make tables
    with pytest.raises(SchemaError):
        FlowService(roles.url("worker"), schema=name)
    upgraded = ebbs("db", "upgrade", *in_schema, url=roles.url("migrator"))
    assert upgraded.exit_code == 0, upgraded.stderr
    if name is not None:  # default privileges are enough; run again, it takes back what the worker does not need
        with FlowService(roles.url("worker"), schema=name) as service:
            service.cancel(service.schedule("covered"))
    roles.grant(printed.stdout)
    assert ebbs("db", "check", "--deep", *in_schema, url=roles.url("reader")).exit_code == 0
    upgraded = ebbs("db", "upgrade", *in_schema, url=roles.url("migrator"))
    assert upgraded.exit_code == 0, "the schema is there, and the migrator may not create another one"

    live_as_worker(roles, ebbs, name)
    look_as_reader(roles, ebbs, name)

    prefix = f"{name or 'public'}."
    for statement in (
        f"DELETE FROM {prefix}ebbs_flow_executions",
        f"DELETE FROM {prefix}ebbs_flow_transitions",
        f"TRUNCATE {prefix}ebbs_task_executions CASCADE",
        f"UPDATE {prefix}ebbs_flow_transitions SET reason = 'another'",
        f"UPDATE {prefix}ebbs_alembic_version SET version_num = '9999'",
        f"ALTER TABLE {prefix}ebbs_flow_executions ADD COLUMN mine INTEGER",
        f"DROP TABLE {prefix}ebbs_flow_transitions",
        f"CREATE TABLE {prefix}mine (id INTEGER)",
    ):
        assert roles.refuses("worker", statement), statement
        assert roles.refuses("reader", statement), statement
    for table in ("ebbs_flow_executions", "ebbs_task_executions", "ebbs_flow_transitions"):
        assert not roles.refuses("reader", f"SELECT * FROM {prefix}{table}")
        assert roles.refuses("reader", f"INSERT INTO {prefix}{table} DEFAULT VALUES")
        assert roles.refuses("reader", f"SELECT * FROM {prefix}{table} FOR UPDATE")
    assert roles.refuses("migrator", "CREATE SCHEMA another")
    roles.grant("CREATE TABLE public.the_hosts (id INTEGER)")
    for role in roles.names:
        assert roles.refuses(role, "SELECT * FROM public.the_hosts")


def live_as_worker(roles: Roles, ebbs: Ebbs, name: str | None) -> None:
    """Everything that services, workers and those on call do."""
    roles.grant(f"CREATE TABLE public.sales (price INTEGER); GRANT INSERT ON public.sales TO {roles.quoted('worker')}")
    broken = [OSError("not yet"), OSError("nor now")]

    @task(outputs="price", retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def price() -> int:
        if broken:
            raise broken.pop()
        return 42

    @task
    def sell(price: int, session: Session) -> None:
        session.execute(text("INSERT INTO public.sales VALUES (:price)"), {"price": price})

    @task(outputs="thanks")
    async def thank(price: int) -> str:
        return f"for {price}"

    with FlowService(roles.url("worker"), schema=name) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("order", [price, sell, thank], max_in_flight=5))
        with Session(service.engine) as session:
            first = runner.schedule_flow("order", session=session, idempotency_key="first")
            session.commit()
        # It polls once in a minute, so what it starts within the patience of a test it was told of.
        with Worker(runner, poll_seconds=60, lease_seconds=30, max_in_flight={"default": 5}).running():
            wait_until(lambda: service.get_flow_execution(first).status is FlowStatus.FAILED, "the failure")
            runner.reschedule_flow_execution(first)
            wait_until(lambda: service.get_flow_execution(first).status.is_final, "the re-run")
            many = runner.schedule_flows("order", [{} for _ in range(20)])
            wait_until(lambda: all(service.get_flow_execution(each).status.is_final for each in many))
        assert {service.get_flow_execution(each).status for each in [first, *many]} == {FlowStatus.SUCCEEDED}
        assert len(service.get_flow_task_execution_history(first)) == 2 * 5

        waiting = runner.schedule_flow("order", delay=3600)
        assert runner.run_flow() is None
        runner.cancel_flow_execution(waiting)
        by_hand = service.create_flow_execution("order", ExecutionContext(price=1))
        service.update_flow_status(by_hand.execution_id, FlowStatus.SCHEDULED)
        running = service.update_flow_status(by_hand.execution_id, FlowStatus.RUNNING, lease_seconds=0.001)
        service.create_task_execution(running, lease_seconds=0.001)
        wait_until(lambda: service.recover_expired(runner.templates))
        service.cancel(by_hand.execution_id)

        options = ["--schema", name] if name else []
        diagnosis = json.loads(ebbs("doctor", "--json", *options, url=roles.url("worker")).stdout)
        assert {each["check"] for each in diagnosis if each["verdict"] == "problem"} == set()
        failing = runner.schedule_flow("order", {"thanks": "too early"})
        runner.run_flow()
        again = ebbs("runs", "reschedule", failing, *options, url=roles.url("worker"))
        assert again.exit_code == 0, again.stderr
        assert ebbs("runs", "cancel", failing, *options, url=roles.url("worker")).exit_code == 0
        where = {"options": f"-csearch_path={name or 'public'}"}
        assert check_invariants(service.engine.url.update_query_dict(where)) == []


def look_as_reader(roles: Roles, ebbs: Ebbs, name: str | None) -> None:
    """Everything that reads, and nothing that writes."""
    options = ["--schema", name] if name else []
    with FlowService(roles.url("reader"), schema=name) as service:
        found = service.find_flow_executions()
        assert found[-1].execution_context.get("price", default=42) == 42
        assert service.get_flow_status_history(found[-1].execution_id)
        for write in (lambda: service.schedule("order"), lambda: service.cancel(found[0].execution_id)):
            with pytest.raises(ProgrammingError, match="permission denied"):
                write()
    assert ebbs("runs", "list", *options, url=roles.url("reader")).exit_code == 0
    assert ebbs("runs", "show", 1, *options, url=roles.url("reader")).exit_code == 0
    refused = ebbs("runs", "cancel", 1, *options, url=roles.url("reader"))
    assert refused.exit_code == 1
    assert "secret" not in refused.output


def test_what_a_later_migration_makes_is_covered(roles: Roles) -> None:
    roles.grant(grants.sql(**roles.names, schema="ebbs"))
    schema.upgrade(roles.url("migrator"), schema="ebbs")
    roles.run(
        "migrator",
        "CREATE TABLE ebbs.ebbs_later (id BIGINT GENERATED BY DEFAULT AS IDENTITY)",
        "CREATE VIEW ebbs.ebbs_view AS SELECT execution_id FROM ebbs.ebbs_flow_executions",
    )
    assert not roles.refuses("worker", "INSERT INTO ebbs.ebbs_later DEFAULT VALUES")
    assert not roles.refuses("reader", "SELECT * FROM ebbs.ebbs_later, ebbs.ebbs_view")
    assert roles.refuses("reader", "INSERT INTO ebbs.ebbs_later DEFAULT VALUES")
    assert roles.refuses("worker", "DROP TABLE ebbs.ebbs_later")


def test_in_public_what_the_migrator_makes_for_others_is_not_given_away(roles: Roles) -> None:
    roles.grant(grants.sql(**roles.names))
    schema.upgrade(roles.url("migrator"))
    roles.run("migrator", "CREATE TABLE the_hosts (id INTEGER)")
    # As the owner of the tables, after each upgrade.
    roles.run("migrator", grants.sql(worker=roles.names["worker"], reader=roles.names["reader"]))
    for role in ("worker", "reader"):
        assert not roles.refuses(role, "SELECT * FROM ebbs_flow_executions")
        assert roles.refuses(role, "SELECT * FROM the_hosts")
    roles.grant(grants.sql(**roles.names, default_privileges=True))  # for a migrator that makes nothing else
    roles.run("migrator", "CREATE TABLE ebbs_later (id INTEGER)")
    assert not roles.refuses("reader", "SELECT * FROM ebbs_later")


def test_every_table_and_view_is_named(empty_database_url: str) -> None:
    schema.upgrade(empty_database_url)
    engine = create_engine_for(empty_database_url)
    found = inspect(engine)
    assert {*found.get_table_names(), *found.get_view_names()} == set(grants.WRITTEN_BY_WORKERS)
    engine.dispose()


# --- what is printed --------------------------------------------------------------------------------------------------


def test_without_a_role_all_three_are_granted(ebbs: Ebbs) -> None:
    printed = ebbs("db", "grants").stdout
    for name in ("ebbs_migrator", "ebbs_worker", "ebbs_reader"):
        assert f'"{name}"' in printed
    assert printed == grants.sql(migrator="ebbs_migrator", worker="ebbs_worker", reader="ebbs_reader")


def test_roles_that_are_not_named_are_not_mentioned() -> None:
    assert "TO" in grants.sql(reader="eyes")
    assert "ebbs_worker" not in grants.sql(reader="eyes")
    assert "INSERT" not in grants.sql(reader="eyes")
    assert "TABLES" not in grants.sql(migrator="m", schema="flows")


@pytest.mark.parametrize(
    "name", ["", " ", "public", "none", "pg_monitor", "a\nb", "a\0b", "\ud800", "x" * 64, "é" * 32, 17]
)
def test_what_is_no_role_is_refused(name: object) -> None:
    for role in ("migrator", "worker", "reader"):
        with pytest.raises(InvalidNameError, match=role):
            grants.sql(**{role: name})  # type: ignore[arg-type]  # that is the test


def test_arguments_that_do_not_go_together_are_refused(ebbs: Ebbs) -> None:
    with pytest.raises(InvalidArgumentError, match="worker"):
        grants.sql(worker="app", reader="app")
    with pytest.raises(InvalidArgumentError, match="migrator"):
        grants.sql(worker="app", default_privileges=True)
    with pytest.raises(DatabaseUrlError):
        grants.sql(schema='x"; DROP TABLE y; --')
    for arguments, url in (
        (["--worker", "public"], None),
        (["--worker", "app", "--reader", "app"], None),
        (["--worker", "app", "--default-privileges"], None),
        (["--schema", "1x"], None),
        ([], "sqlite:///flows.db"),
    ):
        refused = ebbs("db", "grants", *arguments, url=url)
        assert (refused.exit_code, refused.stdout) == (2, ""), refused.output
        assert refused.stderr.startswith("error: ")


def test_no_database_is_needed_and_no_password_is_shown(ebbs: Ebbs) -> None:
    printed = ebbs("db", "grants", url="postgresql://boss:s3cret@127.0.0.1:1/shop")
    assert printed.exit_code == 0
    assert "s3cret" not in printed.output
