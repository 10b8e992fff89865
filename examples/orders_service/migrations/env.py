"""How Alembic runs: on the service's database, for its own tables, past those of the flows."""

from __future__ import annotations

from alembic import context
from sqlalchemy import NullPool, create_engine

from ebbs_and_flows.schema import include_name
from examples.orders_service.models import Base
from examples.orders_service.settings import Settings

options = {
    "target_metadata": Base.metadata,
    # Autogenerate would take tables that it does not find in the models for tables to drop.
    "include_name": include_name,
}
url = Settings.from_environment().database_url

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
