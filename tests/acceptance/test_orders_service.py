"""The orders service as it is run: deployed, served by uvicorn, driven over HTTP, killed, started again."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from ebbs_and_flows import FlowFilter, FlowService, FlowStatus
from examples.orders_service.models import Base
from tests.integration.invariants import check_invariants
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")

ROOT = Path(__file__).parents[2]
ALEMBIC = ["-m", "alembic", "-c", "examples/orders_service/alembic.ini"]
BOOK = {"item": "book", "amount_cents": 1250}


class Shop:
    """The deployed service: its processes, its HTTP interface, its database and that of the payment provider."""

    def __init__(self, database_url: str, folder: Path) -> None:
        self.folder = folder
        self.payments_file = folder / "payments.db"
        self.environment = {
            **os.environ,
            "ORDERS_DATABASE_URL": database_url,
            "ORDERS_PAYMENTS_FILE": str(self.payments_file),
            "ORDERS_LEASE_SECONDS": "1",
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.http = httpx.Client(timeout=PATIENCE_SECONDS)

    def deploy(self) -> None:
        """What is done before a release starts."""
        self.run(sys.executable, *ALEMBIC, "upgrade", "head")
        self.run(_ebbs(), "db", "upgrade", "--database-url", self.environment["ORDERS_DATABASE_URL"])

    def run(self, *command: str | Path) -> str:
        """Run a command to its end, which is to be a good one."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serve(self, *, worker: str = "inside", **settings: object) -> None:
        """Start uvicorn, with a worker "inside", in a process of its own ("ebbs worker"), or none."""
        self.environment.update({f"ORDERS_{name.upper()}": str(value) for name, value in settings.items()})
        self.environment["ORDERS_WORKER"] = "yes" if worker == "inside" else "no"
        app = ["--factory", "examples.orders_service.app:create_app"]
        log = self._start(sys.executable, "-m", "uvicorn", *app, "--port", "0")
        if worker == "ebbs worker":
            flows = "examples.orders_service.flows:runner"
            self._start(_ebbs(), "worker", "--app", flows, "--lease-seconds", "1", "--poll-seconds", "0.1")
        address = re.compile(r"running on (http://[\d.:]+)")
        wait_until(lambda: address.search(log.read_text()) or self.processes[0].poll() is not None, "the service")
        found = address.search(log.read_text())
        assert found, log.read_text()
        self.http.base_url = httpx.URL(found[1])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send all processes a signal and wait for their ends."""
        for process in self.processes:
            process.send_signal(number)
        for process in self.processes:
            process.wait(PATIENCE_SECONDS)
        self.processes.clear()

    def place(self, **headers: str) -> dict[str, Any]:
        """Place an order for a book."""
        answer = self.http.post("/orders", json=BOOK, headers={k.replace("_", "-"): v for k, v in headers.items()})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def order(self, order_id: str) -> dict[str, Any]:
        """How far an order is."""
        answer = self.http.get(f"/orders/{order_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, order_id: str, **expected: str) -> dict[str, Any]:
        """The order, once it is as expected."""
        wait_until(lambda: expected.items() <= self.order(order_id).items(), f"{expected}")
        return self.order(order_id)

    def payments(self) -> dict[str, tuple[int, bool, int]]:
        """What the provider knows: by key the cents, whether they were given back, and how often it was called."""
        with closing(sqlite3.connect(self.payments_file, timeout=30)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'payments'").fetchone():
                return {}  # nobody has called yet
            rows = database.execute("SELECT key, cents, voided, number FROM payments JOIN calls USING (key)").fetchall()
        return {key: (cents, bool(voided), number) for key, cents, voided, number in rows}

    def _start(self, *command: str | Path) -> Path:
        log = self.folder / f"{uuid.uuid4().hex}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
        self.processes.append(process)
        return log


def _ebbs() -> Path:
    return Path(sysconfig.get_path("scripts"), "ebbs")


@pytest.fixture
def shop(database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """The service on a database with its tables; what runs of it after the test is killed."""
    with FlowService(database_url) as service:
        Base.metadata.create_all(service.engine)
    with _ended(Shop(database_url, tmp_path)) as shop:
        yield shop


@pytest.fixture
def deployed(empty_database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """The service on a database that was empty before it was deployed."""
    with _ended(Shop(empty_database_url, tmp_path)) as shop:
        shop.deploy()
        yield shop


@contextmanager
def _ended(shop: Shop) -> Iterator[Shop]:
    try:
        yield shop
    finally:
        shop.kill()
        shop.http.close()
    with FlowService(shop.environment["ORDERS_DATABASE_URL"]) as service:
        assert check_invariants(service.engine) == []


def sales(shop: Shop) -> list[tuple[str, int]]:
    """What the books say: by order the cents."""
    with FlowService(shop.environment["ORDERS_DATABASE_URL"]) as service, service.engine.connect() as connection:
        rows = connection.execute(text("SELECT order_id, amount_cents FROM sales")).all()
    return sorted((str(uuid.UUID(str(order_id))), cents) for order_id, cents in rows)


def count_orders(shop: Shop) -> tuple[int, int]:
    """How many orders there are, and how many flows."""
    with FlowService(shop.environment["ORDERS_DATABASE_URL"]) as service, service.engine.connect() as connection:
        orders = connection.execute(text("SELECT count(*) FROM orders")).scalar_one()
        return orders, len(service.find_flow_executions(FlowFilter(limit=1000)))


@pytest.mark.parametrize("worker", ["inside", "ebbs worker"])
def test_an_order_is_fulfilled_although_the_payment_fails_at_first(deployed: Shop, worker: str) -> None:
    shop = deployed
    shop.serve(worker=worker, payment_failures=2)
    placed = shop.place()
    assert (placed["item"], placed["amount_cents"], placed["status"]) == ("book", 1250, "placed")
    done = shop.wait_for(placed["id"], flow="SUCCEEDED")
    assert done["status"] == "paid"
    assert done["tasks"] == [
        {"name": "charge", "status": "SUCCEEDED", "attempts": 3},
        {"name": "record_sale", "status": "SUCCEEDED", "attempts": 1},
        {"name": "send_receipt", "status": "SUCCEEDED", "attempts": 1},
    ]
    assert done["last_error"].endswith("PaymentUnavailableError: the answer was lost")
    assert shop.payments() == {f"order-{placed['id']}": (1250, False, 3)}
    assert sales(shop) == [(placed["id"], 1250)]


@pytest.mark.parametrize("worker", ["inside", "ebbs worker"])
def test_each_order_is_charged_once_although_all_is_killed_between_the_charge_and_its_answer(
    shop: Shop, worker: str
) -> None:
    shop.serve(worker=worker, payment_failures=0, payment_seconds=600)
    ids = sorted(shop.place()["id"] for _ in range(5))
    wait_until(lambda: len(shop.payments()) == 5, "that the money has moved")
    assert {shop.order(each)["flow"] for each in ids} == {"RUNNING"}
    assert sales(shop) == []
    shop.kill()

    shop.serve(worker=worker, payment_failures=2, payment_seconds=0)  # the second call fails as well
    for each in ids:
        done = shop.wait_for(each, flow="SUCCEEDED")
        assert done["status"] == "paid"
        assert [(task["name"], task["attempts"]) for task in done["tasks"]] == [
            ("charge", 3),
            ("record_sale", 1),
            ("send_receipt", 1),
        ]
    assert shop.payments() == {f"order-{each}": (1250, False, 3) for each in ids}
    assert sales(shop) == [(each, 1250) for each in ids]


def test_an_order_that_was_acknowledged_survives_the_death_of_the_service(shop: Shop) -> None:
    shop.serve(worker="none", payment_failures=0)
    placed = shop.place()
    shop.kill()
    shop.serve(payment_failures=0)
    assert shop.wait_for(placed["id"], flow="SUCCEEDED")["status"] == "paid"


def test_an_order_that_is_sent_again_is_the_same_order(shop: Shop) -> None:
    shop.serve(payment_failures=0)

    def send(_: int) -> httpx.Response:
        return shop.http.post("/orders", json=BOOK, headers={"Idempotency-Key": "cart-17"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(16)))
    assert sorted(each.status_code for each in answers) == [200] * 15 + [201]
    assert len({each.json()["id"] for each in answers}) == 1
    assert count_orders(shop) == (1, 1)

    other = shop.http.post("/orders", json={**BOOK, "item": "pen"}, headers={"Idempotency-Key": "cart-17"})
    assert (other.status_code, other.json()["detail"]) == (422, "this Idempotency-Key was used for another order")
    assert shop.place(Idempotency_Key="cart-18")["id"] != answers[0].json()["id"]
    assert count_orders(shop) == (2, 2)


def test_what_cannot_be_an_order_is_refused_and_leaves_nothing(shop: Shop) -> None:
    shop.serve()
    for body in ({}, {**BOOK, "amount_cents": 0}, {**BOOK, "item": ""}, {**BOOK, "amount_cents": "much"}):
        assert shop.http.post("/orders", json=body).status_code == 422
    assert shop.http.post("/orders", json=BOOK, headers={"Idempotency-Key": "x" * 201}).status_code == 422
    assert shop.http.get("/orders/17").status_code == 422
    assert shop.http.get(f"/orders/{uuid.uuid4()}").status_code == 404
    assert shop.http.post(f"/orders/{uuid.uuid4()}/cancel").status_code == 404
    assert count_orders(shop) == (0, 0)


def test_a_cancelled_order_gives_its_money_back(shop: Shop) -> None:
    shop.serve(payment_failures=1000)  # the money moves with the second call, and no answer ever comes
    order_id = shop.place()["id"]
    wait_until(shop.payments, "that the money has moved")
    cancelled = shop.http.post(f"/orders/{order_id}/cancel")
    assert cancelled.status_code == 202
    assert cancelled.json()["status"] in ("cancelling", "cancelled")
    assert shop.wait_for(order_id, status="cancelled")["flow"] == "CANCELLED"
    assert shop.payments()[f"order-{order_id}"][:2] == (1250, True)
    assert sales(shop) == []
    assert shop.http.post(f"/orders/{order_id}/cancel").json()["status"] == "cancelled"
    assert count_orders(shop) == (1, 2)


def test_an_order_that_is_fulfilled_cannot_be_cancelled(shop: Shop) -> None:
    shop.serve(payment_failures=0)
    order_id = shop.place()["id"]
    shop.wait_for(order_id, flow="SUCCEEDED")
    assert shop.http.post(f"/orders/{order_id}/cancel").status_code == 409
    assert shop.order(order_id)["status"] == "paid"


def test_the_service_stops_in_good_order(shop: Shop) -> None:
    shop.serve(payment_failures=0)
    ids = [shop.place()["id"] for _ in range(20)]
    shop.kill(signal.SIGTERM)
    with FlowService(shop.environment["ORDERS_DATABASE_URL"]) as service:
        found = {each.status for each in service.find_flow_executions()}
    assert found <= {FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED, FlowStatus.SUCCEEDED}
    shop.serve(payment_failures=0)
    for each in ids:
        shop.wait_for(each, flow="SUCCEEDED")


def test_autogenerate_sees_the_services_own_tables_only(deployed: Shop) -> None:
    assert "No new upgrade operations detected" in deployed.run(sys.executable, *ALEMBIC, "check")
    deployed.run(sys.executable, *ALEMBIC, "downgrade", "base")
    with FlowService(deployed.environment["ORDERS_DATABASE_URL"]) as service:
        assert service.find_flow_executions() == []  # the flows' tables are still there
