"""The web service: `uvicorn --factory examples.orders_service.app:create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Annotated
from uuid import UUID, uuid4

from fastapi import FastAPI, Header, HTTPException, Response
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from ebbs_and_flows import FlowRunner, FlowStatus, TaskStatus, Worker
from examples.orders_service import flows
from examples.orders_service.models import CANCELLING, PAID, PLACED, Order


class NewOrder(BaseModel):
    """What a customer sends."""

    item: str = Field(min_length=1, max_length=200)
    amount_cents: int = Field(gt=0, lt=1_000_000_00)


class TaskView(BaseModel):
    """A task of the order's flow."""

    name: str
    status: str
    """WAITING, or how its latest attempt stands: RUNNING, SUCCEEDED, FAILED."""
    attempts: int


class OrderView(BaseModel):
    """An order and how far it is."""

    id: UUID
    item: str
    amount_cents: int
    status: str
    flow: FlowStatus
    tasks: list[TaskView]
    last_error: str | None


# As https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/ has it.
IdempotencyKey = Annotated[str | None, Header(pattern=r"^[!-~]{1,200}$")]


def create_app() -> FastAPI:
    """The application, on the database that its environment names."""
    runner = flows.runner()
    sessions = sessionmaker(runner.service.engine, expire_on_commit=False)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            if flows.settings.worker:
                stack.enter_context(Worker(runner, lease_seconds=flows.settings.lease_seconds).running())
            yield
            await asyncio.to_thread(stack.close)  # tasks may take 10 s to end; meanwhile the loop goes on
        runner.service.close()

    app = FastAPI(title="Orders", lifespan=lifespan)

    # The endpoints are plain functions: FastAPI runs them in threads, where a database that is slow holds up no event
    # loop. None takes a second connection while its session has one: else a full pool could wait for itself.

    @app.post("/orders", status_code=201)
    def place_order(new: NewOrder, response: Response, idempotency_key: IdempotencyKey = None) -> OrderView:
        """Take an order. Sent again with the same Idempotency-Key, it answers with the order that is there (200)."""
        order_id = uuid4()
        with sessions() as session:
            execution_id = runner.schedule_flow(
                "fulfil-order",
                {"order_id": order_id, "amount_cents": new.amount_cents},
                session=session,
                idempotency_key=None if idempotency_key is None else f"place-order {idempotency_key}",
            )
            order = session.scalar(select(Order).where(Order.execution_id == execution_id))
            if order is None:
                order = Order(id=order_id, execution_id=execution_id, status=PLACED, **new.model_dump())
                session.add(order)
            elif (order.item, order.amount_cents) != (new.item, new.amount_cents):
                raise HTTPException(422, "this Idempotency-Key was used for another order")
            else:
                response.status_code = 200
            session.commit()  # the order and its flow: both, or neither
        return view(runner, order)

    @app.get("/orders/{order_id}")
    def show_order(order_id: UUID) -> OrderView:
        """Show an order and how far it is."""
        with sessions() as session:
            order = existing(session, order_id)
        return view(runner, order)

    @app.post("/orders/{order_id}/cancel", status_code=202)
    def cancel_order(order_id: UUID) -> OrderView:
        """Cancel an order that is not fulfilled yet. What was charged is given back, in a flow of its own."""
        with sessions() as session:
            execution_id = existing(session, order_id).execution_id
        is_fulfilled = runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
        with sessions() as session:
            order = existing(session, order_id, lock=True)
            if order.status in (PLACED, PAID):
                if is_fulfilled:
                    raise HTTPException(409, "this order is fulfilled: it cannot be cancelled any more")
                order.status = CANCELLING
                runner.schedule_flow(
                    "cancel-order", {"order_id": order_id, "execution_id": execution_id}, session=session
                )
            session.commit()
        return view(runner, order)

    return app


def existing(session: Session, order_id: UUID, *, lock: bool = False) -> Order:
    """The order, locked against other requests if asked; 404 where there is none."""
    order = session.get(Order, order_id, with_for_update=lock)
    if order is None:
        raise HTTPException(404, f"there is no order {order_id}")
    return order


def view(runner: FlowRunner, order: Order) -> OrderView:
    """The order, with the state of its flow and the attempts at each task."""
    execution = runner.service.get_flow_execution(order.execution_id)
    attempts = runner.service.get_task_executions(order.execution_id)
    tasks = []
    for name in runner.get_flow_template(execution.template_name).task_names:
        of_this = [each.status for each in attempts if each.name == name]
        tasks.append(TaskView(name=name, status=of_this[-1] if of_this else "WAITING", attempts=len(of_this)))
    failures = [each.output for each in attempts if each.status is TaskStatus.FAILED and each.output]
    return OrderView(
        id=order.id,
        item=order.item,
        amount_cents=order.amount_cents,
        status=order.status,
        flow=execution.status,
        tasks=tasks,
        last_error=failures[-1].splitlines()[-1] if failures else None,
    )
