"""The story, as it is printed: a flow fails at its last task, is mended, and goes on where it failed."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTransition, SchemaError, TaskExecution
from examples.weather.flow import closed_sign, metadata, template, weather_months


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the example.

    Args:
        arguments: those of the command line; default the process's own.
    """
    options = parse(arguments)
    logging.basicConfig(level=logging.ERROR)  # the library logs each failed attempt as a warning; here it is told below
    folder = Path(options.output or tempfile.mkdtemp(prefix="weather-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        service = FlowService(options.database_url or f"sqlite:///{folder / 'flows.db'}")
    except SchemaError as error:
        sys.exit(str(error))
    with service:
        metadata.create_all(service.engine)  # the example's own table; a service would do this in its own migrations
        tell(service, folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.weather", description=__doc__)
    parser.add_argument("--database-url", metavar="URL", help="default: an SQLite file in the output folder")
    parser.add_argument("--output", metavar="DIR", help="where the chart goes; default: a new temporary folder")
    return parser.parse_args(arguments)


def tell(service: FlowService, folder: Path) -> None:
    site = folder / "site"
    site.mkdir(exist_ok=True)
    closed_sign(site).touch()

    runner = FlowRunner(service)
    runner.register_flow_template(template)

    headline("1. Schedule the flow")
    execution_id = runner.schedule_flow("seattle-weather", ExecutionContext(folder=folder, site=site))
    print(f"execution  {execution_id} of {template.name}")
    print(f"tasks      {', '.join(template.task_names)}")
    print(f"database   {service.engine.url.render_as_string(hide_password=True)}")
    print(f"folder     {folder}")

    headline("2. Run it: the last task fails, because the site is closed")
    runner.run_flow()
    execution = service.get_flow_execution(execution_id)
    failed = service.get_task_executions(execution_id)[-1]
    print(f"status     {execution.status}")
    print(f"task       {failed.name}, task {failed.task_index + 1} of {len(template.tasks)}")
    print(f"error      {(failed.output or '').splitlines()[-1]}")
    print(f"to re-run  runner.reschedule_flow_execution({execution_id}); runner.re_run_flow()")

    headline("3. Open the site and re-run: it goes on with the task that failed")
    closed_sign(site).unlink()
    runner.reschedule_flow_execution(execution_id, reason="the site is open again")
    runner.re_run_flow()
    execution = service.get_flow_execution(execution_id)
    print(f"status     {execution.status}")
    print(f"chart      {execution.execution_context.get_as('chart', Path)}")
    print(f"published  {execution.execution_context.get_as('published', Path)}")

    headline("4. Its history: every step has its number, none is missing")
    print_history(service.get_flow_status_history(execution_id), service.get_task_executions(execution_id))

    headline("5. What it stored, once: the table weather_months")
    print_months(service)


def headline(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def print_history(transitions: Sequence[FlowTransition], attempts: Sequence[TaskExecution]) -> None:
    rows = [(each.flow_execution_step, f"flow is {each.to_status}", each.reason or "") for each in transitions]
    for attempt in attempts:
        outcome = f"{attempt.status:<10} {duration(attempt):>8}  {attempt.error_type or ''}"
        rows.append((attempt.flow_execution_step, f"  {attempt.name}, attempt {attempt.attempt}", outcome))
    print(f"{'step':>4}  {'what':<29}  outcome")
    for step, what, outcome in sorted(rows):
        print(f"{step:>4}  {what:<29}  {shortened(outcome, 43)}".rstrip())


def duration(attempt: TaskExecution) -> str:
    if attempt.finished_at is None:
        return "running"
    return f"{(attempt.finished_at - attempt.started_at).total_seconds() * 1000:,.0f} ms"


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def print_months(service: FlowService) -> None:
    with service.engine.connect() as connection:
        months = connection.execute(select(weather_months).order_by(weather_months.c.month)).all()
    print("month     mean low and high (°C)   precipitation (mm)")
    for each in months[:3]:
        print(
            f"{each.month:%Y-%m}      {each.mean_low_celsius:8.1f}    {each.mean_high_celsius:8.1f}"
            f"   {each.precipitation_mm:18.1f}"
        )
    print(f"... {len(months)} rows in all")


if __name__ == "__main__":
    main()
