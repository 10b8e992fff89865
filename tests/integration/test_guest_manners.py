"""A guest in the host's engine and database: what it is given it uses as it is, and leaves as it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg.types.string import StrDumper
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    NullPool,
    QueuePool,
    StaticPool,
    Table,
    create_engine,
    event,
    insert,
    make_url,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool, SingletonThreadPool
from typer.testing import CliRunner

from ebbs_and_flows import (
    DatabaseUrlError,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    RetryPolicy,
    Worker,
    schema,
    task,
)
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.unit_of_work import UnitOfWork
from tests.integration.flows import AT_ONCE, Gate
from tests.waiting import wait_until

MakeEngine = Callable[..., Engine]

SETTINGS = {
    "postgresql": "SELECT name, setting FROM pg_settings WHERE name <> 'transaction_read_only' ORDER BY name",
    "sqlite": " UNION ALL ".join(
        f"SELECT '{name}', {column} FROM pragma_{name}"
        for name, column in {
            "busy_timeout": "timeout",
            "foreign_keys": "foreign_keys",
            "journal_mode": "journal_mode",
            "locking_mode": "locking_mode",
            "synchronous": "synchronous",
        }.items()
    ),
}


@pytest.fixture
def host_engine(database_url: str) -> Iterator[MakeEngine]:
    """Makes engines as a host does, without this library; they are disposed of in the end."""
    with ExitStack() as stack:

        def make(**options: Any) -> Engine:
            engine = create_engine(create_engine_for(database_url).url, **options)
            stack.callback(engine.dispose)
            return engine

        yield make


def runner_on(engine: Engine, **options: Any) -> FlowRunner:
    """A runner with a flow of each kind of task, one of which fails once in a while."""
    runner = FlowRunner(FlowService(engine, **options))
    failed: set[int] = set()

    @task(outputs="price", retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def price(number: int) -> int:
        if number % 5 == 0 and number not in failed:
            failed.add(number)
            raise OSError("try again")
        return 10 * number

    @task
    def sell(price: int, session: Session) -> None:
        session.execute(text("SELECT :price"), {"price": price})

    @task(outputs="thanks")
    async def thank(price: int) -> str:
        return f"for {price}"

    runner.register_flow_template(FlowTemplate("order", [price, sell, thank], max_in_flight=10))
    return runner


def live(runner: FlowRunner, *, joins: bool = True, has_worker: bool = True) -> None:
    """A whole life: schedules of all kinds, a runner, a worker, a re-run, a cancel, and what reads.

    Args:
        joins: whether the engine's sessions have transactions to join.
        has_worker: whether its pool is good for threads.
    """
    service = runner.service
    with Session(service.engine) as session:
        if joins:
            runner.schedule_flow("order", {"number": 2}, session=session)
            session.rollback()
            first = runner.schedule_flow("order", {"number": 1}, session=session)
            session.commit()
        else:
            with pytest.raises(InvalidArgumentError, match="AUTOCOMMIT"):
                runner.schedule_flow("order", {"number": 2}, session=session)
            first = runner.schedule_flow("order", {"number": 1})
    done = runner.run_flow()
    assert done is not None
    assert (done.execution_id, done.status) == (first, FlowStatus.SUCCEEDED)
    runner.schedule_flows("order", [{"number": number} for number in range(20)])
    if has_worker:
        Worker(runner, concurrency=6, poll_seconds=0.1).run(until_idle=True)
    else:
        runner.run_until_idle()
    failing = runner.schedule_flow("order", {"number": 3, "thanks": "too early"})
    runner.run_until_idle()
    runner.reschedule_flow_execution(failing)
    runner.cancel_flow_execution(failing)
    found = service.find_flow_executions(FlowFilter(limit=1000))
    assert [each.status for each in found] == [FlowStatus.CANCELLED] + 21 * [FlowStatus.SUCCEEDED]
    assert len(service.get_flow_task_execution_history(first)) == 6


def listeners(target: Any) -> dict[str, int]:
    """How many listeners there are for each event of an engine, a pool or a class."""
    events = target.dispatch
    found = {name: getattr(events, name) for name in dir(events) if not name.startswith("_")}
    return {name: len(each) for name, each in found.items() if hasattr(each, "__len__")}  # of a class there is no count


# --- the engine -------------------------------------------------------------------------------------------------------


def test_an_engine_is_left_as_it_was(host_engine: MakeEngine, database: str) -> None:
    engine = host_engine(pool_size=4, max_overflow=2, pool_timeout=20)
    most = []
    event.listen(engine, "checkout", lambda *_: most.append(engine.pool.checkedout()))  # type: ignore[attr-defined]

    def seen() -> list[Any]:
        pool: Any = engine.pool
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            return [
                [listeners(each) for each in (engine, pool, engine.dialect, Engine, Session)],
                dict(engine.get_execution_options()),
                (type(pool), id(pool), pool.size(), pool._max_overflow, pool._timeout, pool.checkedout()),
                (engine.hide_parameters, engine.echo, engine.dialect.isolation_level),
                (connection.get_isolation_level(), getattr(driver, "autocommit", None)),
                connection.execute(text(SETTINGS[database])).all(),
            ]

    before = seen()
    live(runner_on(engine))
    wait_until(lambda: engine.pool.checkedout() == 0, "the last connection")  # type: ignore[attr-defined]
    assert seen() == before
    assert max(most) <= 6


@pytest.mark.parametrize(
    "options",
    [
        {"pool_size": 1, "max_overflow": 0},
        {"pool_size": 2, "max_overflow": 0},
        {"pool_size": 3, "max_overflow": 0},
        {"poolclass": NullPool},
        {"isolation_level": "AUTOCOMMIT"},
        {"isolation_level": "SERIALIZABLE"},
        {"execution_options": {"schema_translate_map": {"theirs": "of_their_own"}}},
        {"execution_options": {"isolation_level": "SERIALIZABLE"}},
    ],
    ids=str,
)
def test_a_whole_life_on_engines_of_many_kinds(host_engine: MakeEngine, options: dict[str, Any]) -> None:
    live(runner_on(host_engine(**options)), joins=options.get("isolation_level") != "AUTOCOMMIT")


@pytest.mark.parametrize("poolclass", [StaticPool, SingletonThreadPool, AssertionPool])
def test_a_pool_whose_threads_share_a_connection_is_for_one_thread(
    host_engine: MakeEngine, database: str, poolclass: type
) -> None:
    engine = host_engine(poolclass=poolclass)
    runner = runner_on(engine)
    with pytest.raises(DatabaseUrlError, match=poolclass.__name__):
        Worker(runner)


@pytest.mark.parametrize("poolclass", [NullPool, QueuePool])
def test_databases_in_memory_that_no_two_connections_share_are_refused(poolclass: type) -> None:
    engine = create_engine("sqlite://", poolclass=poolclass)
    with pytest.raises(DatabaseUrlError, match=poolclass.__name__):
        FlowService(engine)


def test_a_database_in_memory_of_the_hosts_is_for_one_thread() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    live(runner_on(engine), has_worker=False)
    engine.dispose()


@pytest.mark.parametrize("where", ["the engine", "the options of the engine", "an engine made from it"])
@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_our_transactions_are_whole_whatever_the_hosts_isolation_level(
    host_engine: MakeEngine, database: str, level: str, where: str
) -> None:
    """As it is at READ COMMITTED: what a task wrote goes with its failure, and it sees what was committed meanwhile."""
    engine = host_engine(isolation_level=level) if where == "the engine" else host_engine()
    if where == "the options of the engine":
        engine = host_engine(execution_options={"isolation_level": level})
    if where == "an engine made from it":
        engine = engine.execution_options(isolation_level=level)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE sales (price INTEGER)"))
    found = []

    @task
    def sell(session: Session) -> None:
        session.execute(text("INSERT INTO sales VALUES (1)"))
        if database == "postgresql":
            found.append(session.scalar(text("SHOW transaction_isolation")))
        raise OSError("no")

    runner = FlowRunner(FlowService(engine))
    runner.register_flow_template(FlowTemplate("sale", [sell]))
    runner.schedule_flow("sale")
    runner.run_flow()
    runner.schedule_flow("sale")
    Worker(runner).run(until_idle=True)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM sales")) == 0
        if database == "postgresql":
            shown = connection.scalar(text("SHOW transaction_isolation"))
            assert shown == ("serializable" if level == "SERIALIZABLE" else "read committed")
            assert bool(connection.connection.driver_connection.autocommit) is (level == "AUTOCOMMIT")  # type: ignore[union-attr]
    assert set(found) <= {"read committed"}


# --- time-outs and transactions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql"])
@pytest.mark.parametrize("options", [{}, {"isolation_level": "SERIALIZABLE"}], ids=str)
def test_no_transaction_is_open_while_a_task_runs_or_a_worker_waits(
    host_engine: MakeEngine, options: dict[str, str]
) -> None:
    gate = Gate()
    # The server ends whoever idles in a transaction for longer than that.
    settings = "-c idle_in_transaction_session_timeout=200 -c statement_timeout=5000 -c lock_timeout=5000"
    engine = host_engine(
        connect_args={"options": settings, "application_name": "the host"},
        pool_size=3,
        max_overflow=0,
        execution_options=options,
    )
    runner = FlowRunner(FlowService(engine))
    runner.register_flow_template(FlowTemplate("gate", [gate, task(lambda: None)]))
    states = text("SELECT state FROM pg_stat_activity WHERE application_name = 'the host' AND pid <> pg_backend_pid()")
    watching = host_engine(isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def look(seconds: float) -> set[str]:
        """What the sessions of the host are doing when they are doing nothing."""
        found = []
        with watching.connect() as connection:
            end = f"clock_timestamp() + interval '{seconds} s'"
            until = connection.scalar(text(f"SELECT {end}"))
            while connection.scalar(text("SELECT clock_timestamp()")) < until:
                rested = text(f"{states} AND state_change < clock_timestamp() - interval '0.1 s'")
                sessions = connection.scalars(rested).all()
                assert len(sessions) <= 3
                found += sessions
        return set(found)

    with Worker(runner, poll_seconds=0.05).running():
        assert look(0.6) <= {"idle"}
        runner.schedule_flow("gate")
        gate.entered.acquire()
        assert look(0.6) <= {"idle"}
        gate.opened.set()
        wait_until(lambda: runner.service.get_flow_execution(1).status is FlowStatus.SUCCEEDED)
    history = runner.service.get_task_executions(1)
    assert [each.attempt for each in history] == [1, 1]


# --- named schemas and the search_path --------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql"])
@pytest.mark.parametrize("how", ["schema=", "connection", "role", "database", "mixed"])
def test_two_installations_in_one_database_do_not_see_each_other(empty_database_url: str, how: str) -> None:
    """As a library, as workers, and on the command line."""
    admin = create_engine_for(empty_database_url)
    names = ["first", "second"]
    urls, schemas = [], []
    with admin.begin() as connection:
        for name in names:
            connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    role = f"{make_url(empty_database_url).database}_role"
    with ExitStack() as stack:
        for name in names:
            url = make_url(empty_database_url)
            by_name = how == "schema=" or (how == "mixed" and name == "first")
            if how in ("connection", "mixed") and not by_name:
                url = url.update_query_dict({"options": f"-csearch_path={name}"})
            if how == "role":
                with admin.begin() as connection:
                    connection.exec_driver_sql(f"CREATE ROLE {role}_{name} SUPERUSER LOGIN PASSWORD 'p'")
                    connection.exec_driver_sql(f"ALTER ROLE {role}_{name} SET search_path = {name}")
                url = url.set(username=f"{role}_{name}", password="p")
            if how == "database":
                # One at a time: what is opened meanwhile keeps the path that it found.
                with admin.begin() as connection:
                    connection.exec_driver_sql(f'ALTER DATABASE "{url.database}" SET search_path = {name}')
            urls.append(url.render_as_string(hide_password=False))
            schemas.append(name if by_name else None)
            schema.upgrade(urls[-1], schema=schemas[-1])
            engine = create_engine_for(urls[-1])
            stack.callback(engine.dispose)
            live(runner_on(engine, schema=schemas[-1]))  # where the other one has left as many, or none
            listed = ebbs(urls[-1], schemas[-1], "runs", "list", "--json", "--limit", "100")
            assert len(json.loads(listed)) == 22
            ebbs(urls[-1], schemas[-1], "db", "check")
            ebbs(urls[-1], schemas[-1], "doctor")
        with admin.connect() as connection:
            counts = [connection.scalar(text(f"SELECT count(*) FROM {name}.ebbs_flow_executions")) for name in names]
        assert counts == [22, 22]
    if how == "role":
        with admin.begin() as connection:
            for name in names:
                connection.exec_driver_sql(f"DROP OWNED BY {role}_{name} CASCADE")
                connection.exec_driver_sql(f"DROP ROLE {role}_{name}")
    admin.dispose()


def ebbs(url: str, schema: str | None, *arguments: str) -> str:
    """What the command prints, which must succeed."""
    done = CliRunner().invoke(app, [*arguments], env={"EBBS_DATABASE_URL": url, "EBBS_SCHEMA": schema})
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("database", ["postgresql"])
def test_bounds_and_notices_are_each_installations_own(empty_database_url: str) -> None:
    services = []
    for name in ("first", "second"):
        schema.upgrade(empty_database_url, schema=name)
        services.append(FlowService(empty_database_url, schema=name))
    first, second = services
    with psycopg.connect(empty_database_url.replace("+psycopg", ""), autocommit=True) as listener:
        listener.execute(f'LISTEN "{second.channel}"')
        first.schedule("any")
        assert list(listener.notifies(timeout=0.5)) == []
        second.schedule("any")
        assert len(list(listener.notifies(timeout=10, stop_after=1))) == 1
    with locked(first) as one, locked(second) as other, locked(first) as same:
        assert one.try_lock("queue mails")
        assert other.try_lock("queue mails")
        assert not same.try_lock("queue mails")
    for service in services:
        service.close()


@pytest.mark.parametrize("database", ["postgresql"])
def test_one_installation_has_one_lock_however_its_schema_is_found(empty_database_url: str) -> None:
    schema.upgrade(empty_database_url, schema="flows")
    by_path = make_url(empty_database_url).update_query_dict({"options": "-csearch_path=flows"})
    one, other = FlowService(empty_database_url, schema="flows"), FlowService(by_path)
    with one, other, locked(one) as first, locked(other) as second:
        assert first.try_lock("queue mails")
        assert not second.try_lock("queue mails")


def locked(service: FlowService) -> UnitOfWork:
    """A transaction of the service's own."""
    return service._work()


# --- schema_translate_map ---------------------------------------------------------------------------------------------


def test_a_map_that_would_move_our_tables_is_refused_at_the_start(host_engine: MakeEngine, database: str) -> None:
    engine = host_engine().execution_options(schema_translate_map={None: "tenant"})
    for call in (FlowService, schema.upgrade, schema.check):
        with pytest.raises(DatabaseUrlError, match="schema_translate_map") as caught:
            call(engine)  # type: ignore[operator]  # one of three functions
        assert ("schema='tenant'" in str(caught.value)) is (database == "postgresql")


def test_a_session_whose_map_would_move_our_tables_is_refused(host_engine: MakeEngine) -> None:
    engine = host_engine()
    runner = runner_on(engine)
    with Session(engine) as session:
        session.connection(execution_options={"schema_translate_map": {None: "tenant"}})
        for schedule in (
            lambda: runner.schedule_flow("order", {"number": 1}, session=session),
            lambda: runner.schedule_flows("order", [{"number": 1}], session=session),
        ):
            with pytest.raises(DatabaseUrlError, match="schema_translate_map"):
                schedule()
    assert runner.service.find_flow_executions() == []


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_host_with_a_map_names_our_schema_and_keeps_its_map(host_engine: MakeEngine) -> None:
    engine = host_engine(execution_options={"schema_translate_map": {None: "tenant"}})
    theirs = Table("theirs", MetaData(), Column("number", Integer))
    schema.upgrade(engine, schema="tenant")
    theirs.create(engine)
    runner = runner_on(engine, schema="tenant")

    @task
    def write(session: Session) -> None:
        session.execute(insert(theirs).values(number=1))

    runner.register_flow_template(FlowTemplate("theirs", [write]))
    live(runner)
    runner.schedule_flow("theirs")
    runner.run_until_idle()
    with engine.connect() as connection:
        assert connection.scalars(text("SELECT number FROM tenant.theirs")).all() == [1]
        assert connection.scalar(text("SELECT count(*) FROM tenant.ebbs_flow_executions")) == 23
        assert connection.scalar(text("SELECT count(*) FROM public.ebbs_flow_executions")) == 0


# --- SQLite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_host_that_waits_for_no_lock_hears_of_it_and_its_worker_tries_again(host_engine: MakeEngine) -> None:
    engine = host_engine(connect_args={"timeout": 0})
    runner = runner_on(engine)
    other = host_engine().connect()
    other.exec_driver_sql("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError, match="locked"):
        runner.schedule_flow("order", {"number": 1})
    other.rollback()
    runner.schedule_flow("order", {"number": 1})
    other.exec_driver_sql("BEGIN IMMEDIATE")
    with Worker(runner, poll_seconds=0.05).running() as worker:
        wait_until(lambda: worker.health().outage, "the lock")
        other.rollback()
        wait_until(lambda: runner.service.get_flow_execution(1).status is FlowStatus.SUCCEEDED)
    other.close()


if sys.version_info >= (3, 12):  # before, the driver has no such option

    @pytest.mark.parametrize("database", ["sqlite"])
    def test_a_driver_that_is_always_in_a_transaction_will_do(host_engine: MakeEngine) -> None:
        live(runner_on(host_engine(connect_args={"autocommit": False, "timeout": 30})))

    @pytest.mark.parametrize("database", ["sqlite"])
    def test_a_driver_that_commits_no_transaction_is_refused(host_engine: MakeEngine) -> None:
        engine = host_engine(connect_args={"autocommit": True})
        runner = runner_on(engine)
        with pytest.raises(DatabaseUrlError, match="autocommit"):
            runner.schedule_flow("order", {"number": 1})
        with Session(engine) as session, pytest.raises(InvalidArgumentError, match="AUTOCOMMIT"):
            runner.schedule_flow("order", {"number": 1}, session=session)
        assert runner.service.find_flow_executions() == []


@pytest.mark.parametrize("database", ["sqlite"])
@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE"])
def test_a_host_that_begins_its_transactions_itself_goes_on_doing_so(host_engine: MakeEngine, begin: str) -> None:
    engine = host_engine()
    began = []

    @event.listens_for(engine, "connect")
    def _leave_it_to_the_host(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        began.append(connection.exec_driver_sql(begin))

    live(runner_on(engine))
    assert began


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_host_may_have_its_driver_send_texts_as_texts(database_url: str) -> None:
    engine = create_engine(database_url)

    @event.listens_for(engine, "connect")
    def adapt(connection: Any, _record: object) -> None:
        connection.adapters.register_dumper(str, StrDumper)

    with FlowService(engine) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: "a", outputs="a", name="a"), task(lambda: None)]))
        runner.schedule_flow("t")
        done = runner.run_flow()
        assert done is not None
        assert done.status is FlowStatus.SUCCEEDED
    engine.dispose()


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_host_may_rename_its_tables_when_those_of_the_library_are_gone(database_url: str) -> None:
    engine = create_engine(database_url)
    with FlowService(engine) as service:
        runner = FlowRunner(service)
        runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
        runner.schedule_flow("t")
        Worker(runner).run(until_idle=True)
        schema.downgrade(engine, "base")
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE ours (number INTEGER)"))
            connection.execute(text("ALTER TABLE ours RENAME TO renamed"))
        schema.upgrade(engine)
        runner.schedule_flow("t")
        Worker(runner).run(until_idle=True)
        (execution,) = service.find_flow_executions()
        assert execution.status is FlowStatus.SUCCEEDED
    engine.dispose()
