"""`ebbs doctor`: what stands in the way of flows in a database, and the way out."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from sqlalchemy.exc import SQLAlchemyError

from ebbs_and_flows.cli.documents import print_json
from ebbs_and_flows.cli.findings import Entry, print_entries, tally
from ebbs_and_flows.cli.target import (
    DatabaseUrlOption,
    JsonOption,
    NoSuchFileError,
    SchemaOption,
    Target,
    find_target,
)
from ebbs_and_flows.cli.terminal import say
from ebbs_and_flows.diagnosis import Finding, Verdict, diagnose, reach, unreachable
from ebbs_and_flows.service import FlowService


def doctor(
    ctx: typer.Context,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Look for what keeps flows from going on, and say what to do.

    One line a check: ok, warning or problem. It looks at the database and its schema, at executions that wait or were
    left behind, at connections and transactions, and at the file of SQLite, all of which it reads. Writes nothing.

    Exits with 1 if there is a problem, with 3 if it is the schema.
    """
    target = find_target(ctx, database_url, schema)
    findings = _findings(target)
    if as_json:
        print_json([finding.model_dump(mode="json") for finding in findings])
    else:
        _print(findings, target)
    problems = [finding.check for finding in findings if finding.verdict is Verdict.PROBLEM]
    if problems:
        raise typer.Exit(3 if "schema" in problems else 1)


def _findings(target: Target) -> list[Finding]:
    """What there is to say, found with an engine that changes nothing: FlowService's own would switch SQLite to WAL."""
    try:
        target.require_file()
    except NoSuchFileError as error:
        found, _, advice = str(error).partition(": ")
        return [Finding(check="database", verdict=Verdict.PROBLEM, found=found, advice=advice)]
    with target.untouched() as engine:
        findings = reach(engine, target.schema)
        if any(finding.verdict is Verdict.PROBLEM for finding in findings):
            return findings
        try:
            return diagnose(FlowService(engine, schema=target.schema))
        except SQLAlchemyError as error:  # it has just gone away
            return [unreachable(error)]


def _print(findings: Sequence[Finding], target: Target) -> None:
    print_entries([Entry(each.verdict, each.check, each.found, advice=each.advice) for each in findings], target.schema)
    say(tally(each.verdict for each in findings))
