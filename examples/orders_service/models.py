"""The service's own tables. Those of the flows are beside them, and none of its business."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, ForeignKey, MetaData, String, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PLACED, PAID, CANCELLING, CANCELLED = "placed", "paid", "cancelling", "cancelled"
"""What can become of an order."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Order(Base):
    """What somebody wants to have."""

    __tablename__ = "orders"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(String(200))
    amount_cents: Mapped[int]
    status: Mapped[str] = mapped_column(String(20))
    execution_id: Mapped[int] = mapped_column(BigInteger, unique=True)
    """The flow that fulfils it. Not a foreign key: old flows may be deleted, orders stay."""
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class Sale(Base):
    """An order that was paid, in the books."""

    __tablename__ = "sales"

    order_id: Mapped[UUID] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    amount_cents: Mapped[int]
    receipt: Mapped[str] = mapped_column(String(100))
