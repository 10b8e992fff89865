"""Orders and sales."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "orders",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("item", sa.String(200), nullable=False),
        sa.Column("amount_cents", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("execution_id", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_orders"),
        sa.UniqueConstraint("execution_id", name="uq_orders_execution_id"),
    )
    op.create_table(
        "sales",
        sa.Column("order_id", sa.Uuid(), nullable=False),
        sa.Column("amount_cents", sa.Integer(), nullable=False),
        sa.Column("receipt", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("order_id", name="pk_sales"),
        sa.ForeignKeyConstraint(["order_id"], ["orders.id"], name="fk_sales_order_id"),
    )


def downgrade() -> None:
    op.drop_table("sales")
    op.drop_table("orders")
