"""`ebbs db`: bring the schema up to a release and back, see where it is, write its SQL."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from ebbs_and_flows import schema as database_schema
from ebbs_and_flows.cli.documents import print_json
from ebbs_and_flows.cli.grants import grants
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
from ebbs_and_flows.errors import SchemaError
from ebbs_and_flows.persistence.timeouts import LOCK_TIMEOUT_SECONDS, STATEMENT_TIMEOUT_SECONDS

app = typer.Typer(help="Bring the schema up to date, and see where it is.", no_args_is_help=True, rich_markup_mode=None)

MISSING = "none"
"""What stands for a revision where there is no schema."""

LockTimeoutOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--lock-timeout-seconds",
        metavar="SECONDS",
        help="How long to wait for each lock; 0: as long as the role's own setting says.",
    ),
]
StatementTimeoutOption: TypeAlias = Annotated[
    float,
    typer.Option(
        "--statement-timeout-seconds",
        metavar="SECONDS",
        help="How long each statement may take (PostgreSQL), and another upgrade that is going on; 0: as above.",
    ),
]


@app.command()
def upgrade(
    ctx: typer.Context,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="Where to; with --sql also FROM:TO.", show_default="head")
    ] = "head",
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL instead; needs no database, by default for PostgreSQL.")
    ] = False,
    lock_timeout_seconds: LockTimeoutOption = LOCK_TIMEOUT_SECONDS,
    statement_timeout_seconds: StatementTimeoutOption = STATEMENT_TIMEOUT_SECONDS,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Bring the schema up to this release.

    Safe to run from many processes at once: one does the work, all succeed. What cannot be done in time is not done at
    all: exit code 1, and the schema is as it was.
    """
    lock, statement = lock_timeout_seconds or None, statement_timeout_seconds or None
    if sql:
        dialect, schema = find_dialect(ctx, database_url, schema)
        script = database_schema.sql(
            dialect, revision, schema=schema, lock_timeout_seconds=lock, statement_timeout_seconds=statement
        )
        typer.echo(script, nl=False)
        return
    target = find_target(ctx, database_url, schema)
    reached = database_schema.upgrade(
        target.engine_url,
        revision,
        schema=target.schema,
        lock_timeout_seconds=lock,
        statement_timeout_seconds=statement,
    )
    say(f"Schema is at {reached or MISSING}.")


@app.command()
def downgrade(
    ctx: typer.Context,
    revision: Annotated[str, typer.Argument(help='Where to; "base" removes all of it.')],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the SQL instead, from this release's revision or from FROM:TO.")
    ] = False,
    lock_timeout_seconds: LockTimeoutOption = LOCK_TIMEOUT_SECONDS,
    statement_timeout_seconds: StatementTimeoutOption = STATEMENT_TIMEOUT_SECONDS,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Take the schema back to an earlier revision.

    What does not fit there is lost, so it asks first.
    """
    lock, statement = lock_timeout_seconds or None, statement_timeout_seconds or None
    if sql:
        dialect, schema = find_dialect(ctx, database_url, schema)
        script = database_schema.sql(
            dialect,
            revision,
            schema=schema,
            downgrade=True,
            lock_timeout_seconds=lock,
            statement_timeout_seconds=statement,
        )
        typer.echo(script, nl=False)
        return
    target = find_target(ctx, database_url, schema)
    found = target.current()
    if found is None:
        say("There is no schema of this library here: nothing to take back.")
        return
    if not yes and not _confirmed(target, found, revision):
        say("error: nothing was changed; --yes answers the question beforehand.")
        raise typer.Exit(1)
    reached = database_schema.downgrade(
        target.engine_url,
        revision,
        schema=target.schema,
        lock_timeout_seconds=lock,
        statement_timeout_seconds=statement,
    )
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
    """Exit with 3 unless the schema is up to date, and print the command that brings it there.

    One that is newer than this release needs is accepted. Writes nothing.
    """
    target = find_target(ctx, database_url, schema)
    try:
        target.check()
    except (NoSuchFileError, SchemaError) as error:
        typer.echo("ebbs db upgrade" if target.schema is None else f"ebbs db upgrade --schema {target.schema}")
        if isinstance(error, SchemaError):
            raise
        say(f"error: {error}")
        raise typer.Exit(3) from error
    differences = target.differences() if deep else []
    for difference in differences:
        typer.echo(safe(difference))
    if differences:
        say("error: the tables differ from those of this release, as listed on stdout.")
        raise typer.Exit(3)
    say(f"Schema is at {target.current() or MISSING}, this release needs {database_schema.REVISION}.")


app.command()(grants)


def _confirmed(target: Target, found: str, revision: str) -> bool:
    lost = "every execution and its history is deleted" if revision == "base" else "what does not fit there is lost"
    question = f"{target.shown_url}: from {found} back to {revision}, {lost}. Go on?"
    try:
        return typer.confirm(safe(question), err=True)
    except typer.Abort:  # nobody is there to answer
        say("")
        return False
