"""The weather example, run as a user would run it."""

from __future__ import annotations

import csv
import struct
from collections import defaultdict
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import text

from ebbs_and_flows import FlowExecution, FlowService, FlowStatus, TaskExecution, TaskStatus
from examples.weather.__main__ import main
from examples.weather.readings import Month, read_days, seattle_weather_file


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


@pytest.fixture
def story(database_url: str, output: Path, service: FlowService, capsys: pytest.CaptureFixture[str]) -> str:
    """What the example prints, run once on this database."""
    main(["--database-url", database_url, "--output", str(output)])
    return capsys.readouterr().out


def only_execution(service: FlowService) -> FlowExecution:
    (execution,) = service.find_flow_executions()
    return execution


def attempts_by_name(service: FlowService) -> dict[str, list[TaskExecution]]:
    attempts = defaultdict(list)
    for attempt in service.get_task_executions(only_execution(service).execution_id):
        attempts[attempt.name].append(attempt)
    return attempts


def months_from_the_file() -> dict[str, dict[str, Decimal]]:
    """The monthly figures, computed by another way than the example's."""
    days: dict[str, list[dict[str, str]]] = defaultdict(list)
    with seattle_weather_file().open(newline="") as lines:
        for row in csv.DictReader(lines):
            days[row["date"][:7].replace("/", "-")].append(row)
    return {
        month: {
            "days": Decimal(len(rows)),
            "precipitation_mm": sum(Decimal(row["precipitation"]) for row in rows),
            "mean_high_celsius": sum(Decimal(row["temp_max"]) for row in rows) / len(rows),
            "mean_low_celsius": sum(Decimal(row["temp_min"]) for row in rows) / len(rows),
            "highest_celsius": max(Decimal(row["temp_max"]) for row in rows),
            "lowest_celsius": min(Decimal(row["temp_min"]) for row in rows),
        }
        for month, rows in days.items()
    }


@pytest.mark.usefixtures("story")
def test_the_flow_succeeds_after_two_attempts_at_the_task_that_failed_and_one_at_each_other(
    service: FlowService,
) -> None:
    assert only_execution(service).status is FlowStatus.SUCCEEDED
    attempts = attempts_by_name(service)
    assert [each.status for each in attempts.pop("publish")] == [TaskStatus.FAILED, TaskStatus.SUCCEEDED]
    assert {name: [each.status for each in of] for name, of in attempts.items()} == {
        name: [TaskStatus.SUCCEEDED] for name in ("take_snapshot", "summarize_months", "store_months", "draw_chart")
    }


@pytest.mark.usefixtures("story")
def test_the_table_has_each_month_once_with_its_figures(service: FlowService) -> None:
    with service.engine.connect() as connection:
        rows = connection.execute(text("SELECT * FROM weather_months")).mappings().all()
    expected = months_from_the_file()
    assert len(expected) == 48
    assert sorted(str(row["month"])[:7] for row in rows) == sorted(expected)
    for row in rows:
        for column, figure in expected[str(row["month"])[:7]].items():
            assert row[column] == pytest.approx(float(figure), abs=0.05001), (row["month"], column)


@pytest.mark.usefixtures("story")
def test_the_months_come_back_from_the_context_as_models(service: FlowService) -> None:
    months = only_execution(service).execution_context["months"]
    assert len(months) == 48
    assert {type(month) for month in months} == {Month}
    assert sum(month.days for month in months) == 1461


@pytest.mark.usefixtures("story")
def test_the_chart_is_a_picture_and_published(output: Path) -> None:
    chart = (output / "seattle-weather.png").read_bytes()
    assert chart.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", chart[16:24])
    assert width > 1000
    assert height > 500
    assert len(chart) > 20_000
    assert (output / "site" / "seattle-weather.png").read_bytes() == chart


def test_the_story_tells_the_failure_the_re_run_and_the_whole_history(story: str, service: FlowService) -> None:
    execution = only_execution(service)
    assert "ConnectionRefusedError: the site is closed for maintenance" in story
    assert f"runner.reschedule_flow_execution({execution.execution_id}); runner.re_run_flow()" in story
    assert story.index("FAILED") < story.index("SUCCEEDED")
    history = story[story.index("\nstep") : story.index("\n5.")].strip().splitlines()[1:]
    assert [int(line.split()[0]) for line in history] == list(range(1, execution.execution_step + 1))
    assert sum("publish, attempt" in line for line in history) == 2


def test_it_can_be_run_twice_on_the_same_database_and_folder(
    database_url: str, output: Path, service: FlowService
) -> None:
    for _ in range(2):
        main(["--database-url", database_url, "--output", str(output)])
    assert [each.status for each in service.find_flow_executions()] == [FlowStatus.SUCCEEDED] * 2
    with service.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM weather_months")).scalar_one() == 48


def test_a_line_that_is_no_day_is_refused_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "weather.csv"
    header = "date,precipitation,temp_max,temp_min,wind,weather"
    file.write_text(f"{header}\n2012/01/01,0.0,12.8,5.0,4.7,drizzle\n2012/01/02,-1,10.6,2.8,4.5,rain\n")
    with pytest.raises(ValueError, match=r"weather.csv, line 3: .*\n.*precipitation"):
        read_days(file)
