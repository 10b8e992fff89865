"""`ebbs db`: bring the schema up to a release and back, see where it is, write its SQL."""

from __future__ import annotations

from typing import Annotated

import typer

from ebbs_and_flows import schema as database_schema
from ebbs_and_flows.cli.documents import print_json
from ebbs_and_flows.cli.target import (
    DatabaseUrlOption,
    JsonOption,
    NoSuchFileError,
    SchemaOption,
    Target,
    find_dialect,
    find_target,
)
from ebbs_and_flows.cli.terminal import safe, say

app = typer.Typer(help="Bring the schema up to date, and see where it is.", no_args_is_help=True, rich_markup_mode=None)

MISSING = "none"
"""What stands for a revision where there is no schema."""


@app.command()
def upgrade(
    ctx: typer.Context,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Where to; with --sql also FROM:TO.", show_default="head")
    ] = "head",
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL instead; needs no database, by default for PostgreSQL.")
    ] = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Bring the schema up to this release.

    Safe to run from many processes at once: one does the work, all succeed.
    """
    if sql:
        dialect, schema = find_dialect(ctx, database_url, schema)
        typer.echo(database_schema.sql(dialect, revision, schema=schema), nl=False)
        return
    target = find_target(ctx, database_url, schema)
    reached = database_schema.upgrade(target.engine_url, revision, schema=target.schema)
    say(f"Schema is at {reached or MISSING}.")


@app.command()
def downgrade(
    ctx: typer.Context,
    revision: Annotated[str, typer.Argument(help='Where to; "base" removes all of it.')],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL instead, from this release's revision or from FROM:TO.")
    ] = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Take the schema back to an earlier revision.

    What does not fit there is lost, so it asks first.
    """
    if sql:
        dialect, schema = find_dialect(ctx, database_url, schema)
        typer.echo(database_schema.sql(dialect, revision, schema=schema, downgrade=True), nl=False)
        return
    target = find_target(ctx, database_url, schema)
    found = target.current()
    if found is None:
        say("There is no schema of this library here: nothing to take back.")
        return
    if not yes and not _confirmed(target, found, revision):
        say("error: nothing was changed; --yes answers the question beforehand.")
        raise typer.Exit(1)
    reached = database_schema.downgrade(target.engine_url, revision, schema=target.schema)
    say(f"Schema is at {reached or MISSING}.")


@app.command()
def current(
    ctx: typer.Context,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Print the revision that the database is at.

    It is "none" where there is no schema. Writes nothing.
    """
    found = find_target(ctx, database_url, schema).current()
    if as_json:
        print_json({"revision": found, "needed": database_schema.REVISION})
    else:
        typer.echo(safe(found or MISSING))


@app.command()
def check(
    ctx: typer.Context,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare each table with this release as well; takes a few seconds.")
    ] = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Exit with 3 unless the schema is up to date.

    One that is newer than this release needs is accepted. Writes nothing.
    """
    target = find_target(ctx, database_url, schema)
    try:
        target.check()
    except NoSuchFileError as error:
        say(f"error: {error}")
        raise typer.Exit(3) from error
    differences = target.differences() if deep else []
    for difference in differences:
        typer.echo(safe(difference))
    if differences:
        say("error: the tables differ from those of this release, as listed on stdout.")
        raise typer.Exit(3)
    say(f"Schema is at {target.current() or MISSING}, this release needs {database_schema.REVISION}.")


def _confirmed(target: Target, found: str, revision: str) -> bool:
    lost = "every execution and its history is deleted" if revision == "base" else "what does not fit there is lost"
    question = f"{target.shown_url}: from {found} back to {revision}, {lost}. Go on?"
    try:
        return typer.confirm(safe(question), err=True)
    except typer.Abort:  # nobody is there to answer
        say("")
        return False
