"""Runs the migrations on the connection that `ebbs_and_flows.schema` hands over, or on `sqlalchemy.url` of alembic.ini.

The version table is this library's own, so that a host's Alembic history in the same database is left alone.
"""

from alembic import context
from sqlalchemy import create_engine, pool

from ebbs_and_flows.persistence.tables import build_tables
from ebbs_and_flows.schema import SCHEMA_OPTION, VERSION_TABLE


def configure(**how: object) -> None:
    schema = context.config.get_alembic_option(SCHEMA_OPTION)
    context.configure(
        target_metadata=build_tables(schema).metadata,
        version_table=VERSION_TABLE,
        version_table_schema=schema,
        include_schemas=schema is not None,
        **how,
    )
    with context.begin_transaction():
        for statement in context.config.attributes.get("first", ()):
            context.execute(statement)
        context.run_migrations()


def run() -> None:
    attributes = context.config.attributes
    if context.is_offline_mode():
        dialect = attributes.get("dialect")
        url = None if dialect else context.config.get_main_option("sqlalchemy.url")
        # A part of a host's script stands in the host's transaction.
        transactional = False if attributes.get("is_part") else None
        configure(url=url, dialect_name=dialect, literal_binds=True, transactional_ddl=transactional)
    elif "connection" in attributes:
        configure(connection=attributes["connection"])
    else:
        engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
        with engine.connect() as connection:
            configure(connection=connection)


run()
