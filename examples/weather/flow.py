"""The flow: five tasks, the template that puts them in order, and the table that one of them fills."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Column, Date, Float, Integer, MetaData, Table, delete, insert
from sqlalchemy.orm import Session

from ebbs_and_flows import ExecutionContext, FlowTemplate, Task, TaskDataItem, TransactionalTask, task
from examples.weather.chart import draw
from examples.weather.readings import Month, read_days, seattle_weather_file, summarize

metadata = MetaData()
weather_months = Table(
    "weather_months",
    metadata,
    Column("month", Date, primary_key=True),
    Column("days", Integer, nullable=False),
    Column("precipitation_mm", Float, nullable=False),
    Column("mean_high_celsius", Float, nullable=False),
    Column("mean_low_celsius", Float, nullable=False),
    Column("highest_celsius", Float, nullable=False),
    Column("lowest_celsius", Float, nullable=False),
)


# A function is a task. Its parameter is taken from the context by name; its result is added under `outputs`.
@task(outputs="readings")
def take_snapshot(folder: Path) -> Path:
    """Keep the readings as they are now: a re-run next week is to see the same."""
    return Path(shutil.copyfile(seattle_weather_file(), folder / "seattle-weather.csv"))


# A class is a task as well, with what it needs and what it adds declared. It holds no state: all is in the context.
class SummarizeMonths(Task):
    """Check 1,461 days and sum them up by month.

    The days are read and left: they stand in the file, whose path the flow carries. What the next tasks need are the
    48 months, and Pydantic models come back from the database as Pydantic models. Their class is known to the library
    because it is declared here.
    """

    name = "summarize_months"

    def inputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("readings", Path)]

    def outputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("months", list[Month])]

    def run(self, context: ExecutionContext) -> ExecutionContext:
        days = read_days(context.get_as("readings", Path))
        return context.copy(months=summarize(days))


# Its session belongs to the transaction that also records the task as done. Whenever the machine dies, there are either
# both, the new rows and the record, or neither; nobody reads half of the rows.
class StoreMonths(TransactionalTask):
    """Replace the rows of the table."""

    name = "store_months"

    def inputs(self) -> Sequence[TaskDataItem]:
        return [TaskDataItem("months", list[Month])]

    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext:
        months = context.get_as("months", list[Month])
        session.execute(delete(weather_months))
        session.execute(insert(weather_months), [month.model_dump() for month in months])
        return context


@task(outputs="chart")
def draw_chart(months: list[Month], folder: Path) -> Path:
    """Draw the months. Drawn a second time, the chart replaces the first: at least once is as good as once."""
    chart = folder / "seattle-weather.png"
    draw(months, chart)
    return chart


# The task that fails. It does not count its runs (a task holds no state, and the re-run may be on another machine): the
# world outside is in its way, here a site that is closed for maintenance, as a file in its folder says. Until somebody
# opens it, each attempt fails. With `@task(retry=RetryPolicy(max_attempts=5))` the runner would try again by itself.
@task(outputs="published")
def publish(chart: Path, site: Path) -> Path:
    """Put the chart on the site."""
    if closed_sign(site).exists():
        raise ConnectionRefusedError("the site is closed for maintenance")
    return Path(shutil.copy(chart, site))


def closed_sign(site: Path) -> Path:
    """The file that closes the site as long as it is there."""
    return site / "CLOSED"


template = FlowTemplate(
    "seattle-weather",
    [take_snapshot, SummarizeMonths(), StoreMonths(), draw_chart, publish],
    inputs=[TaskDataItem("folder", Path), TaskDataItem("site", Path)],
)
