"""A host in a process of its own that stops at a place, to be killed there: `host_process.py URL PLACE GATE`.

It says where it is, and goes on from there only once the file GATE is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import ForeignKey, String, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTemplate, TransactionalTask, wait_for_stop

PLACES = ("before the commit", "after the commit", "within the task")


class Base(DeclarativeBase):
    """The host's models."""


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(50))
    sales: Mapped[list[Sale]] = relationship(back_populates="order")


class Sale(Base):
    __tablename__ = "sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))
    order: Mapped[Order] = relationship(back_populates="sales")


class RecordSale(TransactionalTask):
    """Enters a sale, and stops with it in hand."""

    def __init__(self, place: str, gate: Path) -> None:
        self.place = place
        self.gate = gate

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        order = session.scalars(select(Order)).one()
        order.sales.append(Sale())
        session.flush()
        stop_at("within the task", self.place, self.gate)
        return context.copy(is_sold=True)


def stop_at(here: str, place: str, gate: Path) -> None:
    """Say where it is and wait, if that is the place."""
    if here == place:
        print(here, flush=True)
        while not gate.exists():
            wait_for_stop(0.01)


def register(service: FlowService, place: str, gate: Path) -> FlowRunner:
    """A runner that knows the flow, under a short lease."""
    runner = FlowRunner(service, lease_seconds=0.5)
    runner.register_flow_template(FlowTemplate("sell", [RecordSale(place, gate)]))
    return runner


def main(url: str, place: str, gate: str) -> None:
    """Place an order and run its flow."""
    engine = create_engine(url)
    runner = register(FlowService(engine), place, Path(gate))
    with Session(engine) as session:
        session.add(Order(item="book"))
        session.flush()
        runner.schedule_flow("sell", session=session)
        stop_at("before the commit", place, Path(gate))
        session.commit()
    stop_at("after the commit", place, Path(gate))
    runner.run_flow()


if __name__ == "__main__":
    main(*sys.argv[1:])
