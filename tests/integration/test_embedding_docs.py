"""What docs/embedding.md shows is a service that works."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.orm import Session
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from ebbs_and_flows import FlowRunner, FlowStatus
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]


async def order_by_http(app: FastAPI) -> FlowStatus:
    """Place an order over HTTP while the application's lifespan lasts, and follow its flow to the end."""
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://shop") as client,
    ):
        flow = (await client.post("/orders", params={"item": "book"})).raise_for_status().json()["flow"]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            status = FlowStatus((await client.get(f"/flows/{flow}")).raise_for_status().json()["status"])
            if status.is_final:
                break
            await asyncio.sleep(0.01)
    return status


def test_the_service_on_the_page_takes_an_order_and_fulfils_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    document = Sybil([PythonCodeBlockParser()], path=str(ROOT), pattern="docs/*.md").parse(ROOT / "docs/embedding.md")
    for example in document.examples():
        example.evaluate()
    names = document.namespace
    assert capsys.readouterr().out == "SCHEDULED\n"

    runner: FlowRunner = names["runner"]
    assert asyncio.run(order_by_http(names["app"])) is FlowStatus.SUCCEEDED
    runner.run_until_idle()
    refund = runner.schedule_flow("refund", {"order_id": 1})
    runner.run_until_idle()
    assert runner.service.get_flow_execution(refund).status is FlowStatus.SUCCEEDED
    with Session(names["engine"]) as session:
        assert sorted(sale.order_id for sale in session.scalars(select(names["Sale"]))) == [2, 3, 4]
    names["engine"].dispose()
