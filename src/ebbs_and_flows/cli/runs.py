"""`ebbs runs`: what failed, why, and making it run again."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated

import typer

from ebbs_and_flows.cli.details import print_run
from ebbs_and_flows.cli.documents import execution_document, print_json, run_document
from ebbs_and_flows.cli.listing import look_up, print_rows
from ebbs_and_flows.cli.target import DatabaseUrlOption, JsonOption, SchemaOption, find_target
from ebbs_and_flows.cli.terminal import say
from ebbs_and_flows.executions import FlowExecution, FlowFilter, FlowStatus

app = typer.Typer(
    help="See what ran, what failed and why; make it run again.", no_args_is_help=True, rich_markup_mode=None
)

ExecutionId = Annotated[int, typer.Argument(metavar="ID", help="The execution's id.")]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why; kept in the history.", show_default=False)]


@app.command("list")
def list_runs(
    ctx: typer.Context,
    status: Annotated[
        list[FlowStatus] | None,
        typer.Option(
            metavar="STATUS",
            help=f"Only these: {', '.join(FlowStatus)}. Repeat it for several.",
            case_sensitive=False,
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only of this template.", show_default=False)
    ] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Only of this queue.", show_default=False)] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=10_000, metavar="NUMBER", help="At most this many, newest first.")
    ] = 25,
    before: Annotated[
        int | None, typer.Option(metavar="ID", help="Only ids below this one: the next page.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """List executions: what failed, why, the way out.

    Newest first; below the table stands the command that re-runs each one that failed.
    """
    criteria = FlowFilter(
        template_name=template,
        statuses=frozenset(status) if status else None,
        queue=queue,
        before_id=before,
        limit=limit,
    )
    with find_target(ctx, database_url, schema).service() as service:
        rows = [
            look_up(service, execution) for execution in service.find_flow_executions(criteria, with_contexts=as_json)
        ]
    if as_json:
        print_json([execution_document(row.execution, task_name=row.task_name, reason=row.reason) for row in rows])
        return
    if not rows:
        say("No executions match.")
        return
    print_rows(rows, _now())
    if len(rows) == limit:
        say(f"There may be older ones: --before {rows[-1].execution.execution_id}")


@app.command()
def show(
    ctx: typer.Context,
    execution_id: ExecutionId,
    full: Annotated[bool, typer.Option("--full", help="The whole traceback, and values in full.")] = False,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Show all that is known of one execution.

    Its attempts on a time scale, its status changes, its last failure, its context, and what comes next.
    """
    with find_target(ctx, database_url, schema).service() as service:
        execution = service.get_flow_execution(execution_id)
        attempts = service.get_task_executions(execution_id)
        transitions = service.get_flow_status_history(execution_id)
    if as_json:
        print_json(run_document(execution, attempts, transitions))
    else:
        print_run(execution, attempts, transitions, _now(), full=full)


@app.command()
def reschedule(
    ctx: typer.Context,
    execution_id: ExecutionId,
    from_task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="An earlier task to re-run from; default the one that failed.", show_default=False
        ),
    ] = None,
    reason: Reason = None,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Make a FAILED execution run again.

    It goes on at the task that failed, or at an earlier one, with the context as it was then.
    """
    with find_target(ctx, database_url, schema).service() as service:
        execution = service.reschedule(execution_id, from_task, reason)
        row = look_up(service, execution)
    _tell(execution, f"goes on at {row.task_name or row.step} as soon as a process that knows it is free", as_json)


@app.command()
def cancel(
    ctx: typer.Context,
    execution_id: ExecutionId,
    reason: Reason = None,
    as_json: JsonOption = False,
    database_url: DatabaseUrlOption = None,
    schema: SchemaOption = None,
) -> None:
    """Cancel an execution: no task of it starts any more.

    What a task returns that is running by now is refused.
    """
    with find_target(ctx, database_url, schema).service() as service:
        execution = service.cancel(execution_id, reason)
    _tell(execution, "no task of it starts any more", as_json)


def _tell(execution: FlowExecution, what_follows: str, as_json: bool) -> None:
    if as_json:
        print_json(execution_document(execution))
    say(f"Execution {execution.execution_id} of {execution.template_name} is {execution.status}: {what_follows}.")


def _now() -> datetime:
    return datetime.now(timezone.utc)
