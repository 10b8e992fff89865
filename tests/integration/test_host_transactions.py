"""Flows and the rows of a host's own models: in one transaction, whatever way the host begins and ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, String, TextClause, create_engine, func, select, text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    RetryPolicy,
    TransactionalTask,
    Worker,
    task,
)
from tests.integration.flows import AT_ONCE
from tests.postgres import PostgresServer
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("sound_history")


class Base(DeclarativeBase):
    """The host's models."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(50), unique=True)
    sales: Mapped[list[Sale]] = relationship(back_populates="order")


class Sale(Base):
    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    order: Mapped[Order] = relationship(back_populates="sales")


class RecordSale(TransactionalTask):
    """Works on the host's models as the host does."""

    retry = RetryPolicy(max_attempts=3, wait=AT_ONCE)

    def __init__(self, failures: list[Exception] | None = None) -> None:
        self.failures = failures or []

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        order = session.scalars(select(Order).where(Order.item == context["item"])).one()
        order.sales.append(Sale())
        session.flush()
        if self.failures:
            raise self.failures.pop()
        return context.copy(sale=order.sales[0].id)


@pytest.fixture
def host(service: FlowService) -> Engine:
    """The engine, with the host's tables."""
    Base.metadata.create_all(service.engine)
    return service.engine


@pytest.fixture
def shop(host: Engine, runner: FlowRunner) -> FlowRunner:
    """A runner that knows a flow for an order."""
    runner.register_flow_template(FlowTemplate("sell", [RecordSale()]))
    return runner


def place(shop: FlowRunner, session: Session | Connection, item: str, key: str | None = None) -> int:
    """Insert an order and schedule its flow, as a host would."""
    if isinstance(session, Session):
        session.add(Order(item=item))
    else:
        session.execute(Order.__table__.insert().values(item=item))  # type: ignore[attr-defined]  # it is a Table
    return shop.schedule_flow("sell", {"item": item}, session=session, idempotency_key=key)


def there(shop: FlowRunner) -> tuple[list[str], list[str]]:
    """The items of the orders, and those of the flows."""
    with Session(shop.service.engine) as session:
        orders = sorted(session.scalars(select(Order.item)))
    return orders, sorted(each.execution_context["item"] for each in shop.service.find_flow_executions())


def scalar(host: Engine, statement: TextClause) -> object:
    """What a statement says, in a transaction of its own: within one, what others do is seen once."""
    with host.connect() as connection:
        return connection.execute(statement).scalar_one()


# --- the ways to begin and to end a transaction -------------------------------------------------------------------


@contextmanager
def _autobegin(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session
        session.commit()


@contextmanager
def _session_begin(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session, session.begin():
        yield session


@contextmanager
def _maker_begin(engine: Engine) -> Iterator[Session]:
    with sessionmaker(engine).begin() as session:
        yield session


@contextmanager
def _by_hand(engine: Engine) -> Iterator[Session]:
    session = Session(engine, autobegin=False)
    session.begin()
    try:
        yield session
        session.commit()
    finally:
        session.close()


@contextmanager
def _within_a_savepoint(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session, session.begin(), session.begin_nested(), session.begin_nested():
        yield session


@contextmanager
def _on_a_connection(engine: Engine) -> Iterator[Session]:
    with engine.begin() as connection, Session(connection, join_transaction_mode="create_savepoint") as session:
        yield session
        session.commit()


@contextmanager
def _connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection
        connection.commit()


@contextmanager
def _engine_begin(engine: Engine) -> Iterator[Connection]:
    with engine.begin() as connection:
        yield connection


WAYS = [
    _autobegin,
    _session_begin,
    _maker_begin,
    _by_hand,
    _within_a_savepoint,
    _on_a_connection,
    _connection,
    _engine_begin,
]


@pytest.mark.parametrize("way", WAYS)
def test_orders_and_flows_are_there_together_or_not_at_all(shop: FlowRunner, host: Engine, way: Callable) -> None:
    def fail() -> None:
        with way(host) as session:
            place(shop, session, "book")
            place(shop, session, "pen")
            raise RuntimeError("the request failed")

    with pytest.raises(RuntimeError, match="the request failed"):
        fail()
    assert there(shop) == ([], [])

    with way(host) as session:
        place(shop, session, "book")
        place(shop, session, "pen")
    assert there(shop) == (["book", "pen"], ["book", "pen"])
    assert shop.run_until_idle() == 2


def test_what_the_host_may_not_insert_takes_the_flow_with_it(shop: FlowRunner, host: Engine) -> None:
    with Session(host) as session:
        place(shop, session, "book")
        session.commit()
    with Session(host) as session:
        place(shop, session, "book")
        with pytest.raises(DBAPIError):
            session.commit()
    assert there(shop) == (["book"], ["book"])


# --- savepoints ---------------------------------------------------------------------------------------------------


def test_a_savepoint_that_is_rolled_back_takes_only_its_own_flows(shop: FlowRunner, host: Engine) -> None:
    with Session(host) as session:
        place(shop, session, "before")
        within = session.begin_nested()
        place(shop, session, "within")
        within.rollback()
        place(shop, session, "after")
        session.commit()
    assert there(shop) == (["after", "before"], ["after", "before"])


@pytest.mark.parametrize("begins_with_the_savepoint", [True, False])
def test_a_savepoint_that_is_released_commits_nothing(
    shop: FlowRunner, host: Engine, begins_with_the_savepoint: bool
) -> None:
    with Session(host) as session:
        if not begins_with_the_savepoint:
            place(shop, session, "before")
        with session.begin_nested():
            place(shop, session, "within")
        session.rollback()
    assert there(shop) == ([], [])


def test_an_idempotency_key_whose_savepoint_was_rolled_back_is_free(shop: FlowRunner, host: Engine) -> None:
    with Session(host) as session:
        within = session.begin_nested()
        place(shop, session, "first", key="the one")
        within.rollback()
        place(shop, session, "second", key="the one")
        session.commit()
    assert there(shop) == (["second"], ["second"])


# --- two at once --------------------------------------------------------------------------------------------------


def place_once(shop: FlowRunner, host: Engine, item: str, isolation_level: str | None = None) -> int:
    """What a request does whose sender may send it again: the flow first, the order only if the flow is its own."""
    engine = host if isolation_level is None else host.execution_options(isolation_level=isolation_level)
    with Session(engine) as session:
        if isolation_level is not None:
            session.execute(select(Order)).all()  # the snapshot is that of the first statement
        execution_id = shop.schedule_flow("sell", {"item": item}, session=session, idempotency_key="the one")
        session.add(Order(item=item))
        session.commit()
    return execution_id


def wait_for_the_other(host: Engine) -> None:
    """Wait until somebody waits for a lock; on SQLite nobody can tell, and whoever comes later is served later."""
    if host.dialect.name == "postgresql":
        waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        wait_until(lambda: scalar(host, waits), "the other one's wait")


@pytest.mark.parametrize("first_commits", [True, False])
def test_of_two_sessions_with_one_key_the_later_one_waits_for_the_outcome_of_the_first(
    shop: FlowRunner, host: Engine, first_commits: bool
) -> None:
    with Session(host) as session, ThreadPoolExecutor(1) as pool:
        first = place(shop, session, "first", key="the one")
        second = pool.submit(place_once, shop, host, "second")
        wait_for_the_other(host)
        assert not second.done()
        if first_commits:
            session.commit()
            assert second.result() == first
        else:
            session.rollback()
            assert shop.service.get_flow_execution(second.result()).execution_context["item"] == "second"
    flows = ["first"] if first_commits else ["second"]
    assert there(shop) == ([*dict.fromkeys([*flows, "second"])], flows)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_where_a_snapshot_hides_the_first_one_the_later_one_is_told_to_try_again(
    shop: FlowRunner, host: Engine, isolation_level: str
) -> None:
    with Session(host) as session, ThreadPoolExecutor(1) as pool:
        first = place(shop, session, "first", key="the one")
        second = pool.submit(place_once, shop, host, "second", isolation_level)
        wait_for_the_other(host)
        session.commit()
        with pytest.raises(OperationalError, match="could not serialize"):
            second.result()
    assert there(shop) == (["first"], ["first"])
    assert place_once(shop, host, "second", isolation_level) == first


def test_many_sessions_with_one_key_schedule_one_flow(shop: FlowRunner, host: Engine) -> None:
    def request(number: int) -> int:
        with Session(host) as session:
            execution_id = shop.schedule_flow("sell", {"item": "it"}, session=session, idempotency_key="the one")
            session.add(Order(item=f"from {number}"))
            if number % 3 == 0:
                session.rollback()
                return 0
            session.commit()
            return execution_id

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(request, range(24))) - {0}
    assert [each.execution_id for each in shop.service.find_flow_executions()] == list(ids)


# --- sessions that cannot be joined -------------------------------------------------------------------------------


def test_a_session_on_another_kind_of_database_is_refused(
    shop: FlowRunner, database: str, postgres_server: PostgresServer
) -> None:
    other = create_engine("sqlite://" if database == "postgresql" else postgres_server.url)
    found, expected = other.dialect.name, f"this service's {database} database"
    with Session(other) as session, pytest.raises(InvalidArgumentError, match=f"{expected}, not on {found}"):
        shop.schedule_flow("sell", {"item": "book"}, session=session)
    other.dispose()
    assert there(shop) == ([], [])


def test_a_session_on_another_database_without_the_tables_says_so(shop: FlowRunner, empty_database_url: str) -> None:
    other = create_engine(empty_database_url)
    with (
        Session(other) as session,
        pytest.raises(DBAPIError, match=r"no such table|does not exist"),
    ):
        shop.schedule_flow("sell", {"item": "book"}, session=session)
    other.dispose()
    assert there(shop) == ([], [])


def test_an_engine_at_autocommit_has_no_transaction_to_join(shop: FlowRunner, host: Engine, database_url: str) -> None:
    other = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with Session(other) as session, pytest.raises(InvalidArgumentError, match="AUTOCOMMIT"):
        place(shop, session, "book")
    other.dispose()
    assert there(shop) == ([], [])


# --- tasks on the host's models -----------------------------------------------------------------------------------


def test_a_transactional_task_works_on_the_hosts_models_and_engine(database_url: str) -> None:
    engine = create_engine(database_url)  # the host's own, as it made it
    Base.metadata.create_all(engine)
    runner = FlowRunner(FlowService(engine))
    failing = RecordSale([OSError("after the flush"), OSError("again")])
    runner.register_flow_template(FlowTemplate("sell", [failing]))
    with Session(engine) as session:
        execution_id = place(runner, session, "book")
        session.commit()

    assert runner.run_flow() is not None
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Sale)) == 0
    runner.run_until_idle()
    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    with Session(engine) as session:
        sale = session.scalars(select(Sale)).one()
        assert (sale.id, sale.order.item) == (execution.execution_context["sale"], "book")
    assert len(runner.service.get_task_executions(execution_id)) == 3
    engine.dispose()


def test_a_task_that_places_orders_places_them_once(shop: FlowRunner, host: Engine) -> None:
    failures = [OSError("after the orders")]

    @task(retry=RetryPolicy(max_attempts=2, wait=AT_ONCE))
    def import_orders(items: list[str], session: Session) -> None:
        for item in items:
            place(shop, session, item)
        if failures:
            raise failures.pop()

    shop.register_flow_template(FlowTemplate("import", [import_orders]))
    execution_id = shop.schedule_flow("import", {"items": ["book", "pen"]})
    shop.run_until_idle()
    assert len(shop.service.get_task_executions(execution_id)) == 2
    with Session(host) as session:
        assert sorted(each.order.item for each in session.scalars(select(Sale))) == ["book", "pen"]


# --- how the worker learns of it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_hosts_commit_wakes_the_worker_and_nothing_before_it(shop: FlowRunner, host: Engine) -> None:
    listening = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    with Worker(shop, poll_seconds=600).running() as worker:
        wait_until(lambda: scalar(host, listening), "the listener")
        with Session(host) as session:
            uncommitted = place(shop, session, "book")
            with Session(host) as other:
                place(shop, other, "pen")
                other.commit()
            wait_until(lambda: worker.health().succeeded == 1, "the one that was committed")
            session.commit()
            wait_until(lambda: worker.health().succeeded == 2, "the other one")
        assert shop.service.get_flow_execution(uncommitted).status is FlowStatus.SUCCEEDED


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_on_sqlite_a_worker_finds_what_the_host_has_committed_when_it_looks(shop: FlowRunner, host: Engine) -> None:
    with Worker(shop, poll_seconds=0.05).running() as worker:
        with Session(host) as session:
            place(shop, session, "book")
            session.commit()
        wait_until(lambda: worker.health().succeeded == 1)


# --- many at once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads_first", [True, False])
def test_sessions_that_write_at_once_wait_for_each_other(shop: FlowRunner, host: Engine, reads_first: bool) -> None:
    def request(number: int) -> None:
        with Session(host) as session:
            if reads_first:
                session.scalars(select(Order)).all()
            place(shop, session, f"item {number}")
            session.commit()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(request, range(40)))
    orders, flows = there(shop)
    assert (len(orders), flows) == (40, orders)
