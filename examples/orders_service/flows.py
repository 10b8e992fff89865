"""The flows, by which an order is fulfilled or cancelled: `ebbs worker --app examples.orders_service.flows:runner`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import delete, update
from sqlalchemy.orm import Session
from tenacity import wait_exponential_jitter

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Task,
    TaskDataItem,
    TransactionalTask,
    TransitionError,
    task,
)
from examples.orders_service.models import CANCELLED, CANCELLING, PAID, PLACED, Order, Sale
from examples.orders_service.payments import PaymentProvider, PaymentUnavailableError
from examples.orders_service.settings import Settings

log = logging.getLogger(__name__)
settings = Settings.from_environment()
provider = PaymentProvider(settings.payments_file, failures=settings.payment_failures, seconds=settings.payment_seconds)

asks_again = RetryPolicy(
    max_attempts=10, wait=wait_exponential_jitter(initial=0.2, max=60, jitter=0.1), retry_on=(PaymentUnavailableError,)
)


# A plain task runs at least once: after a failure, and after a kill, it starts again. What makes one charge out of
# several calls is the key, which is the same each time because it comes from the context.
@task(outputs="receipt", retry=asks_again, timeout_seconds=60)
def charge(order_id: UUID, amount_cents: int) -> str:
    """Have the order paid."""
    return provider.charge(f"order-{order_id}", amount_cents)


# A transactional task has its effects exactly once: they commit together with the record that it is done.
class RecordSale(TransactionalTask):
    """Enter the sale into the books."""

    name = "record_sale"

    def inputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("order_id", UUID), TaskDataItem("amount_cents", int), TaskDataItem("receipt", str)]

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        order_id = context["order_id"]
        session.add(Sale(order_id=order_id, amount_cents=context["amount_cents"], receipt=context["receipt"]))
        session.execute(update(Order).where(Order.id == order_id, Order.status == PLACED).values(status=PAID))
        return context


# Nothing tells a mail that was sent from one that was sent twice, so after a kill there may be two.
@task
def send_receipt(order_id: UUID, receipt: str) -> None:
    """Tell the customer."""
    log.info("mail: order %s is paid, %s", order_id, receipt)


class StopFulfilment(Task):
    """Cancel the flow that fulfils the order. From then on it starts no task, and what a running one returns is
    refused; yet it may be too late.
    """

    name = "stop_fulfilment"

    def __init__(self, service: FlowService) -> None:
        self.service = service

    def inputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("order_id", UUID), TaskDataItem("execution_id", int)]

    def outputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("is_stopped", bool)]

    def run(self, context: ExecutionContext) -> ExecutionContext:
        execution_id = context["execution_id"]
        try:
            status = self.service.cancel(execution_id, reason="the customer cancelled the order").status
        except TransitionError:  # it has come to its end, or this task has been here before
            status = self.service.get_flow_execution(execution_id).status
        return context.copy(is_stopped=status is FlowStatus.CANCELLED)


@task
def give_back(order_id: UUID, is_stopped: bool) -> None:
    """Give the money back, if any has moved; a call that is still under way is refused from now on."""
    if is_stopped:
        provider.void(f"order-{order_id}")


@task
def record_cancellation(order_id: UUID, is_stopped: bool, session: Session) -> None:
    """Take the sale out of the books."""
    if is_stopped:
        session.execute(delete(Sale).where(Sale.order_id == order_id))
    status = CANCELLED if is_stopped else PAID
    session.execute(update(Order).where(Order.id == order_id, Order.status == CANCELLING).values(status=status))


def runner() -> FlowRunner:
    """A runner on the service's database that knows the flows.

    Raises:
        SchemaError: on PostgreSQL, `ebbs db upgrade` has not been run.
    """
    # A service that has an engine of its own passes that instead of the URL.
    service = FlowService(settings.database_url)
    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("fulfil-order", [charge, RecordSale(), send_receipt]))
    runner.register_flow_template(
        FlowTemplate("cancel-order", [StopFulfilment(service), give_back, record_cancellation])
    )
    return runner
