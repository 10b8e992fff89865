"""`ebbs check`: before a deploy, what the new code would do to the executions that a database has now."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Annotated

import typer
from rich.text import Text

from ebbs_and_flows.cli.apps import load_app
from ebbs_and_flows.cli.documents import print_json
from ebbs_and_flows.cli.findings import Entry, print_entries, tally
from ebbs_and_flows.cli.target import (
    DatabaseUrlOption,
    JsonOption,
    NoSuchFileError,
    SchemaOption,
    Settings,
    find_target,
)
from ebbs_and_flows.cli.terminal import safe, say
from ebbs_and_flows.diagnosis import Verdict
from ebbs_and_flows.preflight import Concern, Kind, Preflight, When, common_beginning, preflight
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.worker import Worker

UNANSWERED, SCHEMA, REFUSED = 1, 3, 4

NAME_WIDTH = 16
"""Columns of a template's name on a terminal; a longer one is cut."""

ALIKE_SHOWN, OTHERS_SHOWN = 2, 4
"""How many tasks are shown before and from the place where two lists part; of a few more, all are."""


def check(
    ctx: typer.Context,
    app: Annotated[
        str,
        typer.Option(
            "--app",
            metavar="MODULE:NAME",
            help="The new code, as for the worker: for example shop.flows:runner.",
            show_default=False,
        ),
    ],
    elsewhere: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEMPLATE",
            help="A template that another application runs on this database; repeat it for several.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Say, before a deploy, which unfinished executions the new code would not go on with.

    It imports the new code, reads the database as it is now, and compares: the tasks that executions have completed
    with those of the templates; what tasks need, and of which types it is, with what is in the contexts; the schema.
    The database is the app's own, unless one is given. Writes nothing to it, and can run beside workers.

    Exits with 4 if executions would be parked, fail or wait for ever; with 3 if the schema is behind, which comes
    first. What concerns FAILED executions only, which rest until somebody re-runs them, is a warning, and exits with 0.
    """
    before = ctx.find_object(Settings) or Settings()
    target = find_target(ctx, database_url, schema) if database_url or before.database_url else None
    if target is not None:
        try:
            target.require_file()
        except NoSuchFileError as error:
            say(f"error: {error}")
            raise typer.Exit(SCHEMA) from error
    with redirect_stdout(sys.stderr):  # what the app prints while it is imported is no data
        runner = _runner(load_app(app))
    if target is None:
        named = schema or before.schema or runner.service.schema
        found = preflight(runner, schema=named, elsewhere=elsewhere or ())
        where = runner.service.engine.url.render_as_string(hide_password=True)
    else:
        with target.untouched() as engine:
            found = preflight(runner, engine=engine, schema=target.schema, elsewhere=elsewhere or ())
        where, named = target.shown_url, target.schema
    if as_json:
        print_json({"verdict": found.verdict, **found.model_dump(mode="json")})
    else:
        _print(found, named)
        say(f"{where}: {_summary(found)}")
    code = _exit_code(found)
    if code:
        raise typer.Exit(code)


def _runner(app: FlowRunner | Worker) -> FlowRunner:
    return app.runner if isinstance(app, Worker) else app


def _exit_code(found: Preflight) -> int:
    broken = [each.check for each in found.database if each.verdict is Verdict.PROBLEM]
    if broken:
        return SCHEMA if "schema" in broken else UNANSWERED
    return REFUSED if found.verdict is Verdict.PROBLEM else 0


def _summary(found: Preflight) -> str:
    if found.unfinished is None:
        return "its executions were not looked at"
    number = sum(found.unfinished.values())
    if not number:
        return "no execution is unfinished"
    executions = f"{number:,} unfinished {'execution' if number == 1 else 'executions'}"
    verdicts = [each.verdict for each in found.concerns]
    return f"{executions}, {tally(verdicts) if verdicts else 'and this code can go on with all of them'}"


def _print(found: Preflight, schema: str | None) -> None:
    entries = [Entry(each.verdict, each.check, each.found, advice=each.advice) for each in found.database]
    entries += [
        Entry(each.verdict, each.template_name, each.found, _details(each), each.advice) for each in found.concerns
    ]
    print_entries(entries, schema, name_width=NAME_WIDTH)


def _details(concern: Concern) -> tuple[Text, ...]:
    details = []
    if concern.completed is not None and concern.tasks is not None:
        same = common_beginning(concern.completed, concern.tasks)
        is_mismatch = concern.kind is Kind.CHANGED_TEMPLATE
        done = "then: " if concern.when is When.TASK_ENDED else "done: "
        details.append(_tasks(done, concern.completed, same, is_mismatch))
        details.append(_tasks("now:  ", concern.tasks, same, is_mismatch))
    each = ", ".join(f"{number:,} {status}" for status, number in concern.statuses.items())
    more = ", ..." if concern.number > len(concern.examples) else ""
    details.append(Text(f"{each}: {', '.join(map(str, concern.examples))}{more}", style="dim"))
    return tuple(details)


def _tasks(label: str, names: Sequence[str], same: int, is_mismatch: bool) -> Text:
    """The tasks around the place where two lists part."""
    left_out = same - ALIKE_SHOWN if same > ALIKE_SHOWN + 1 else 0
    shown = names[left_out:]
    beyond = len(names) - same - OTHERS_SHOWN
    if beyond > 1:
        shown = shown[:-beyond]
    text = Text(label)
    if left_out:
        text.append(f"{left_out} alike, ", style="dim")
    for place, name in enumerate(shown, start=left_out):
        is_the_place = is_mismatch and place == same
        text.append(", " if place > left_out else "").append(safe(name), "bold red" if is_the_place else "")
    if beyond > 1:
        text.append(f", and {beyond} more", style="dim")
    if not names:
        text.append("none", style="dim")
    return text
