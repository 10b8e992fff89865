"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
from ebbs_and_flows.schema import in_step, named_schema

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


@in_step(revision, down_revision)
def upgrade() -> None:
    schema = named_schema()
    ${upgrades if upgrades else "pass"}


@in_step(revision, down_revision)
def downgrade() -> None:
    schema = named_schema()
    ${downgrades if downgrades else "pass"}
