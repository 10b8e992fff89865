"""Executions, attempts and transitions.

Revision ID: ebbs_0001
Revises:
"""

import sqlalchemy as sa
from alembic import op

from ebbs_and_flows.schema import in_step, named_schema

revision = "ebbs_0001"
down_revision = None
branch_labels = ("ebbs",)
depends_on = None

Id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
Time = sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite")
Json = sa.JSON().with_variant(sa.Text(), "sqlite")

FLOW_STATUSES = "('CREATED', 'SCHEDULED', 'RUNNING', 'SUCCEEDED', 'FAILED', 'RESCHEDULED', 'CANCELLED')"
TASK_STATUSES = "('RUNNING', 'SUCCEEDED', 'FAILED')"
FAILURES = "('EXCEPTION', 'TIMEOUT', 'LOST', 'STOPPED', 'CANCELLED')"


@in_step(revision, down_revision)
def upgrade() -> None:
    schema = named_schema()
    executions = f"{schema}.ebbs_flow_executions" if schema else "ebbs_flow_executions"

    op.create_table(
        "ebbs_flow_executions",
        sa.Column("execution_id", Id, sa.Identity(), primary_key=True),
        sa.Column("template_name", sa.String(255), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("execution_step", sa.Integer, nullable=False),
        sa.Column("current_task_index", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("queue", sa.String(255), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("run_at", Time, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("updated_at", Time, nullable=False),
        sa.Column("started_at", Time),
        sa.Column("finished_at", Time),
        sa.Column("lease_owner", sa.String(255)),
        sa.Column("lease_expires_at", Time),
        sa.CheckConstraint(f"status IN {FLOW_STATUSES}", name="ck_ebbs_flow_executions_status"),
        schema=schema,
        sqlite_autoincrement=True,
    )
    if op.get_context().dialect.name == "postgresql":
        # Room for the new version of a row on its own page, so that a step touches no index.
        op.execute(f"ALTER TABLE {_quoted(schema)}ebbs_flow_executions SET (fillfactor = 70)")
    for name, columns, where, unique in (
        (
            "ix_ebbs_flow_executions_due",
            [sa.text("priority DESC"), "run_at", "execution_id"],
            "status IN ('SCHEDULED', 'RESCHEDULED')",
            False,
        ),
        # For workers that serve one queue, so that what waits in others does not stand in their way.
        (
            "ix_ebbs_flow_executions_queue",
            ["queue", sa.text("priority DESC"), "run_at", "execution_id"],
            "status IN ('SCHEDULED', 'RESCHEDULED')",
            False,
        ),
        # Of the id, not of the lease: a lease changes with every step, and a step is to touch no index.
        ("ix_ebbs_flow_executions_running", ["execution_id"], "status = 'RUNNING'", False),
        ("ix_ebbs_flow_executions_retry", ["run_at"], "status = 'RESCHEDULED'", False),
        ("ix_ebbs_flow_executions_failed", ["execution_id"], "status = 'FAILED'", False),
        ("uq_ebbs_flow_executions_idempotency_key", ["idempotency_key"], "idempotency_key IS NOT NULL", True),
    ):
        op.create_index(
            name,
            "ebbs_flow_executions",
            columns,
            unique=unique,
            schema=schema,
            postgresql_where=sa.text(where),
            sqlite_where=sa.text(where),
        )

    op.create_table(
        "ebbs_task_executions",
        sa.Column(
            "flow_execution_id",
            Id,
            sa.ForeignKey(
                f"{executions}.execution_id", ondelete="CASCADE", name="fk_ebbs_task_executions_flow_execution_id"
            ),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("flow_execution_step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("task_index", sa.Integer, nullable=False),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("failure", sa.String(16)),
        sa.Column("error_type", sa.String(255)),
        sa.Column("output", sa.Text),
        sa.Column("entries", Json),
        sa.Column("entry_types", Json),
        sa.Column("dropped", Json),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("finished_at", Time),
        sa.Column("worker", sa.String(255)),
        sa.CheckConstraint(f"status IN {TASK_STATUSES}", name="ck_ebbs_task_executions_status"),
        sa.CheckConstraint(f"failure IN {FAILURES}", name="ck_ebbs_task_executions_failure"),
        schema=schema,
    )

    op.create_table(
        "ebbs_flow_transitions",
        sa.Column(
            "flow_execution_id",
            Id,
            sa.ForeignKey(
                f"{executions}.execution_id", ondelete="CASCADE", name="fk_ebbs_flow_transitions_flow_execution_id"
            ),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("flow_execution_step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("from_status", sa.String(16)),
        sa.Column("to_status", sa.String(16), nullable=False),
        sa.Column("at", Time, nullable=False),
        sa.Column("worker", sa.String(255)),
        sa.Column("reason", sa.Text),
        sa.Column("task_index", sa.Integer, nullable=False),
        sa.Column("entries", Json),
        sa.Column("entry_types", Json),
        sa.Column("dropped", Json),
        sa.CheckConstraint(f"from_status IN {FLOW_STATUSES}", name="ck_ebbs_flow_transitions_from_status"),
        sa.CheckConstraint(f"to_status IN {FLOW_STATUSES}", name="ck_ebbs_flow_transitions_to_status"),
        schema=schema,
    )


def _quoted(schema: str | None) -> str:
    quote = op.get_context().dialect.identifier_preparer.quote_identifier
    return f"{quote(schema)}." if schema else ""


@in_step(revision, down_revision)
def downgrade() -> None:
    schema = named_schema()
    op.drop_table("ebbs_flow_transitions", schema=schema)
    op.drop_table("ebbs_task_executions", schema=schema)
    op.drop_table("ebbs_flow_executions", schema=schema)
