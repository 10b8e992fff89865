"""`ebbs db grants`: the SQL of the three roles."""

from __future__ import annotations

from typing import Annotated

import typer

from ebbs_and_flows import grants as database_grants
from ebbs_and_flows.cli.target import DatabaseUrlOption, SchemaOption, find_dialect
from ebbs_and_flows.errors import DatabaseUrlError


def grants(
    ctx: typer.Context,
    migrator: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help='The role that runs "ebbs db upgrade", and owns the tables.'),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="ROLE", help="The role of services and workers: schedules, runs, cancels, re-runs."),
    ] = None,
    reader: Annotated[
        str | None, typer.Option(metavar="ROLE", help="The role that only looks, contexts included.")
    ] = None,
    default_privileges: Annotated[
        bool | None,
        typer.Option(
            "--default-privileges/--no-default-privileges",
            help="Whether to cover what the migrator will create in that schema later. Default with a named schema.",
            show_default=False,
        ),
    ] = None,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Print the SQL that gives the roles what they need.

    For PostgreSQL; needs no database. Without a role all three: ebbs_migrator, ebbs_worker, ebbs_reader; else those
    that are named. Run it before the first upgrade, so that the migrator may make tables, and once more after it.
    """
    dialect, schema = find_dialect(ctx, database_url, schema)
    if dialect != "postgresql":
        raise DatabaseUrlError("SQLite has no roles: who may open the file, and its folder, may do everything")
    typer.echo(
        database_grants.sql(
            migrator=migrator, worker=worker, reader=reader, schema=schema, default_privileges=default_privileges
        ),
        nl=False,
    )
