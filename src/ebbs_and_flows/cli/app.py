"""The command line as a whole: what stands before the subcommand, and what becomes of errors."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from typer.core import TyperGroup

from ebbs_and_flows.cli import db, runs
from ebbs_and_flows.cli.apps import AppError
from ebbs_and_flows.cli.check import check
from ebbs_and_flows.cli.doctor import doctor
from ebbs_and_flows.cli.target import DATABASE_URL_VARIABLE, SCHEMA_VARIABLE, Settings, Target
from ebbs_and_flows.cli.terminal import one_line, say
from ebbs_and_flows.cli.worker import worker
from ebbs_and_flows.errors import (
    DatabaseUrlError,
    EbbsError,
    InvalidArgumentError,
    InvalidNameError,
    SchemaError,
)

DONE, FAILED, USAGE, SCHEMA = 0, 1, 2, 3

EPILOG = """\b
Exit codes:
  0  done
  1  what was asked for failed: no such run, its status does not allow it, the database does not answer;
     the worker broke; the doctor found a problem
  2  usage: unknown option, no database given, a URL or an app that cannot be used
  3  the schema is missing, behind or altered: run "ebbs db upgrade"
  4  check: the new code would park or break executions, or never take them up

\b
Data goes to stdout, messages to stderr. NO_COLOR=1 turns colours off."""


ORDER = ("worker", "runs", "check", "doctor", "db")
"""The commands as the help lists them: in the order in which they are needed."""


class Commands(TyperGroup):
    """The commands, with an exit code and one line on stderr for each error that can be expected."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of the commands, as the help lists them."""
        names = super().list_commands(ctx)
        return [*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER)]

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            target = ctx.obj.target if isinstance(ctx.obj, Settings) else None
            code, message = _verdict(error, target)
            if code is None:
                raise
            say(f"error: {one_line(message)}")
            raise typer.Exit(code) from error


app = typer.Typer(
    name="ebbs",
    cls=Commands,
    help="Flows of tasks in your SQL database: run them, look after their runs, and bring the schema up to date.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they show local variables, and with them the password
)
app.add_typer(db.app, name="db")
app.add_typer(runs.app, name="runs")
app.command()(worker)
app.command()(check)
app.command()(doctor)


@app.callback()
def before_the_subcommand(
    ctx: typer.Context,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar=DATABASE_URL_VARIABLE,
            metavar="URL",
            help="The database: postgresql://user@host/database or sqlite:///flows.db; also after the subcommand.",
            show_default=False,
        ),
    ] = None,
    schema: Annotated[
        str | None,
        typer.Option(
            envvar=SCHEMA_VARIABLE,
            metavar="NAME",
            help="The named schema that holds the tables (PostgreSQL only); also after the subcommand.",
            show_default=False,
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Keep what stands before the subcommand."""
    ctx.obj = Settings(database_url or None, schema or None)


def _show_version(given: bool) -> None:
    if given:
        try:
            typer.echo(f"ebbs {version('ebbs-and-flows')}")
        except PackageNotFoundError:
            typer.echo("ebbs (not installed)")
        raise typer.Exit


def _verdict(error: Exception, target: Target | None) -> tuple[int | None, str]:
    """The exit code and the message; no code for an error that nobody expects."""
    if isinstance(error, SchemaError):
        message = str(error)
        if target is not None and target.schema is not None:
            message = message.replace('"ebbs db upgrade"', f'"ebbs db upgrade --schema {target.schema}"')
        return SCHEMA, message
    if isinstance(error, (AppError, DatabaseUrlError, InvalidArgumentError, InvalidNameError)):
        return USAGE, str(error)
    if isinstance(error, EbbsError):
        return FAILED, str(error)
    if isinstance(error, SQLAlchemyError):
        problem = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        return FAILED, f"{target.shown_url if target is not None else 'the database'}: {problem}"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return FAILED, str(error)
    return None, ""
