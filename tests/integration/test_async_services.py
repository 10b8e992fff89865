"""A host on asyncio: flows in its sessions' transactions, and an event loop that never waits for the database."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, String, TextClause, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ebbs_and_flows import (
    FlowExecution,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    Worker,
    task,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("sound_history")

CONTEXT = {
    "number": 2**70,
    "price": Decimal("12.50"),
    "at": datetime(2026, 11, 24, 12, 30, 0, 123456, tzinfo=timezone.utc),
    "days": [date(2026, 11, 24)],
    "tags": {"ü", "'", "\\", '"'},
}

LONGEST_GAP_SECONDS = 0.5
"""How long a loop that nobody blocks may be away on a machine that is busy with other things."""


class Base(DeclarativeBase):
    """The host's models."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(50))


DRIVERS = [("sqlite", "aiosqlite"), ("postgresql", "psycopg"), ("postgresql", "asyncpg")]
on_each_driver = pytest.mark.parametrize(("database", "driver"), DRIVERS, indirect=["database"])


@pytest.fixture
def shop(service: FlowService, runner: FlowRunner) -> FlowRunner:
    """A runner that knows a flow, on a database with the host's table."""
    Base.metadata.create_all(service.engine)
    runner.register_flow_template(FlowTemplate("flow", [task(lambda: None)]))
    return runner


def run(service: FlowService, driver: str, body: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine with an asynchronous engine of the host's on the service's database."""
    url = make_url(service.engine.url)

    async def main() -> None:
        engine = create_async_engine(url.set(drivername=f"{url.get_backend_name()}+{driver}"))
        try:
            await body(engine)
        finally:
            await engine.dispose()

    asyncio.run(main())


def flows(shop: FlowRunner) -> list[FlowExecution]:
    """All flows, oldest first."""
    return shop.service.find_flow_executions(FlowFilter(limit=1000))[::-1]


def scalar(engine: Engine, statement: TextClause) -> object:
    """What a statement says, in a transaction of its own."""
    with engine.connect() as connection:
        return connection.execute(statement).scalar_one()


# --- in the transaction of an asynchronous session ----------------------------------------------------------------


@on_each_driver
def test_a_flow_joins_an_asynchronous_sessions_transaction(shop: FlowRunner, driver: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        for ends in (AsyncSession.rollback, AsyncSession.commit):
            async with AsyncSession(engine) as session:
                session.add(Order(item="book"))
                await session.run_sync(lambda sync: shop.schedule_flow("flow", CONTEXT, session=sync))
                await ends(session)
        async with AsyncSession(engine) as session, session.begin():
            await session.run_sync(lambda sync: shop.schedule_flows("flow", [CONTEXT] * 3, session=sync))
        async with engine.begin() as connection:
            await connection.run_sync(lambda sync: shop.schedule_flow("flow", CONTEXT, session=sync))

    run(shop.service, driver, body)
    assert [dict(each.execution_context) for each in flows(shop)] == [CONTEXT] * 5
    assert scalar(shop.service.engine, text("SELECT count(*) FROM orders")) == 1
    assert shop.run_until_idle() == 5


@on_each_driver
def test_every_argument_works_in_an_asynchronous_session(shop: FlowRunner, driver: str) -> None:
    at = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=timezone.utc)
    ids: list[int] = []

    async def body(engine: AsyncEngine) -> None:
        for arguments in (
            {"idempotency_key": "the one", "priority": 7, "queue": "mails"},
            {"idempotency_key": "the one"},
            {"run_at": at},
            {"delay": 3600.5},
        ):
            async with AsyncSession(engine) as session, session.begin():
                ids.append(
                    await session.run_sync(
                        lambda sync, given=arguments: shop.schedule_flow("flow", session=sync, **given)  # type: ignore[misc]  # a default of a lambda
                    )
                )

    run(shop.service, driver, body)
    keyed, again, timed, delayed = [shop.service.get_flow_execution(each) for each in ids]
    assert again == keyed
    assert (keyed.priority, keyed.queue, keyed.idempotency_key) == (7, "mails", "the one")
    assert timed.run_at == at
    assert delayed.run_at is not None
    assert 3595 < (delayed.run_at - delayed.created_at).total_seconds() < 3605


@pytest.mark.parametrize(("database", "driver"), DRIVERS[1:], indirect=["database"])
def test_an_asynchronous_savepoint_that_is_rolled_back_takes_its_flow_with_it(shop: FlowRunner, driver: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.run_sync(lambda sync: shop.schedule_flow("flow", {"n": 1}, session=sync))
            async with session.begin_nested() as within:
                await session.run_sync(lambda sync: shop.schedule_flow("flow", {"n": 2}, session=sync))
                await within.rollback()
            await session.commit()

    run(shop.service, driver, body)
    assert [each.execution_context["n"] for each in flows(shop)] == [1]


@on_each_driver
def test_an_asynchronous_session_itself_is_refused_with_the_way_to_do_it(shop: FlowRunner, driver: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            with pytest.raises(InvalidArgumentError, match=r"await session\.run_sync\(lambda sync: "):
                shop.schedule_flow("flow", session=session)  # type: ignore[arg-type]  # that is the test

    run(shop.service, driver, body)


@pytest.mark.parametrize(("database", "driver"), DRIVERS[1:], indirect=["database"])
def test_the_commit_of_an_asynchronous_session_wakes_the_worker(shop: FlowRunner, driver: str) -> None:
    listening = text("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.run_sync(lambda sync: shop.schedule_flow("flow", session=sync))
            await session.commit()

    with Worker(shop, poll_seconds=600).running() as worker:
        wait_until(lambda: scalar(shop.service.engine, listening), "the listener")
        run(shop.service, driver, body)
        wait_until(lambda: worker.health().succeeded == 1)


# --- without a session, in threads --------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(service: FlowService) -> Iterator[threading.Event]:
    """The tables of the flows are locked by another connection, until the event is set or the block ends."""
    holds, release = threading.Event(), threading.Event()
    lock = "BEGIN IMMEDIATE" if service.has_one_writer else "LOCK TABLE ebbs_flow_executions IN ACCESS EXCLUSIVE MODE"

    def hold() -> None:
        with service.engine.connect() as connection:
            connection.exec_driver_sql(lock)
            holds.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holds.wait()
    try:
        yield release
    finally:
        release.set()
        thread.join()


class Ticker:
    """Looks at the clock every 5 ms, as often as the event loop lets it."""

    def __init__(self) -> None:
        self.ticks = 0
        self.longest_gap_seconds = 0.0

    async def __aenter__(self) -> Ticker:
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.01)  # so that a gap that has just ended is seen
        self._task.cancel()

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            self.longest_gap_seconds = max(self.longest_gap_seconds, now - last)
            self.ticks += 1
            last = now

    async def has_ticked(self, times: int) -> None:
        """Wait for so many more ticks."""
        until = self.ticks + times
        while self.ticks < until:  # noqa: ASYNC110  # to wake at each tick is the point
            await asyncio.sleep(0.005)


def test_the_loop_goes_on_while_200_flows_wait_for_a_locked_database(shop: FlowRunner) -> None:
    async def main() -> Ticker:
        async with Ticker() as ticker:
            with locked(shop.service) as release:
                calls = [asyncio.create_task(asyncio.to_thread(shop.schedule_flow, "flow")) for _ in range(200)]
                await ticker.has_ticked(100)
                assert not any(each.done() for each in calls)
                release.set()
                ids = await asyncio.gather(*calls)
            assert len(set(ids)) == 200
            found = await asyncio.to_thread(flows, shop)
            assert len(found) == 200
        return ticker

    assert asyncio.run(main()).longest_gap_seconds < LONGEST_GAP_SECONDS


def test_a_call_without_a_thread_would_hold_up_the_loop(shop: FlowRunner) -> None:
    """The measure of the test above finds what it is to find."""

    async def main() -> Ticker:
        async with Ticker() as ticker:
            with locked(shop.service) as release:
                threading.Timer(2 * LONGEST_GAP_SECONDS, release.set).start()
                shop.schedule_flow("flow")
        return ticker

    assert asyncio.run(main()).longest_gap_seconds > LONGEST_GAP_SECONDS


@on_each_driver
def test_the_loop_goes_on_while_an_asynchronous_session_waits_for_a_lock(shop: FlowRunner, driver: str) -> None:
    gaps: list[float] = []

    async def place(engine: AsyncEngine) -> int:
        async with AsyncSession(engine) as session, session.begin():
            return await session.run_sync(lambda sync: shop.schedule_flow("flow", session=sync))

    async def body(engine: AsyncEngine) -> None:
        async with Ticker() as ticker:
            with locked(shop.service) as release:
                calls = [asyncio.create_task(place(engine)) for _ in range(4)]
                await ticker.has_ticked(100)
                assert not any(each.done() for each in calls)
                release.set()
                assert len(set(await asyncio.gather(*calls))) == 4
        gaps.append(ticker.longest_gap_seconds)

    run(shop.service, driver, body)
    assert gaps[0] < LONGEST_GAP_SECONDS


# --- a coroutine that is cancelled while it waits -----------------------------------------------------------------


def test_who_is_cancelled_while_a_thread_schedules_may_ask_again_with_the_same_key(shop: FlowRunner) -> None:
    def schedule() -> int:
        return shop.schedule_flow("flow", idempotency_key="the one")

    async def main() -> int:
        with locked(shop.service):
            waiting = asyncio.create_task(asyncio.to_thread(schedule))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        return await asyncio.to_thread(schedule)

    execution_id = asyncio.run(main())
    assert [each.execution_id for each in flows(shop)] == [execution_id]
    assert shop.run_until_idle() == 1


async def place_slowly(shop: FlowRunner, engine: AsyncEngine, reached: asyncio.Event) -> None:
    """Schedule flow 1, and say when that is about to wait for the lock."""
    async with AsyncSession(engine) as session, session.begin():
        await session.connection()
        reached.set()
        await session.run_sync(lambda sync: shop.schedule_flow("flow", {"n": 1}, session=sync))


async def place_another(shop: FlowRunner, engine: AsyncEngine) -> None:
    """Schedule flow 2: the engine is as good as before."""
    async with AsyncSession(engine) as session, session.begin():
        await session.run_sync(lambda sync: shop.schedule_flow("flow", {"n": 2}, session=sync))


# With aiosqlite, from Python 3.11 on, a cancel in the middle of an INSERT with RETURNING can leave the write lock to a
# connection that nobody has any more, also without this library: there, what writes is shielded.
@pytest.mark.parametrize(("database", "driver"), DRIVERS[1:], indirect=["database"])
def test_a_session_whose_coroutine_is_cancelled_leaves_nothing(shop: FlowRunner, driver: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        with locked(shop.service):
            reached = asyncio.Event()
            waiting = asyncio.create_task(place_slowly(shop, engine, reached))
            await reached.wait()
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await place_another(shop, engine)

    run(shop.service, driver, body)
    assert [each.execution_context["n"] for each in flows(shop)] == [2]


@on_each_driver
def test_a_session_that_is_shielded_goes_on_to_its_commit(shop: FlowRunner, driver: str) -> None:
    async def body(engine: AsyncEngine) -> None:
        with locked(shop.service):
            reached = asyncio.Event()
            placing = asyncio.create_task(place_slowly(shop, engine, reached))

            async def request() -> None:
                await asyncio.shield(placing)

            waiting = asyncio.create_task(request())
            await reached.wait()
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await placing
        await place_another(shop, engine)

    run(shop.service, driver, body)
    assert [each.execution_context["n"] for each in flows(shop)] == [1, 2]


# --- a worker within an asynchronous service ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(worker: Worker) -> AsyncIterator[None]:
    """As docs/embedding.md has it: the loop does not wait for the worker's end."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(worker.running())
        yield
        await asyncio.to_thread(stack.close)


def test_a_worker_in_the_lifespan_runs_flows_beside_the_loop_and_does_not_hold_up_its_end(shop: FlowRunner) -> None:
    loops: list[bool] = []

    @task
    async def note_loop() -> None:
        loops.append(asyncio.get_running_loop() is main_loop[0])

    entered, main_loop = threading.Event(), []

    @task
    def take_long() -> None:
        entered.set()
        time.sleep(2 * LONGEST_GAP_SECONDS)

    shop.register_flow_template(FlowTemplate("note", [note_loop]))
    shop.register_flow_template(FlowTemplate("long", [take_long]))

    async def main() -> Ticker:
        main_loop.append(asyncio.get_running_loop())
        worker = Worker(shop, poll_seconds=0.05)
        async with Ticker() as ticker:
            async with lifespan(worker):
                await asyncio.to_thread(shop.schedule_flow, "note")
                await asyncio.to_thread(shop.schedule_flow, "long")
                while not (entered.is_set() and worker.health().succeeded):  # noqa: ASYNC110  # set in other threads
                    await asyncio.sleep(0.01)
            assert not worker.is_running
        return ticker

    assert asyncio.run(main()).longest_gap_seconds < LONGEST_GAP_SECONDS
    assert loops == [False]
    assert {each.status for each in flows(shop)} == {FlowStatus.SUCCEEDED}
