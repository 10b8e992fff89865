"""Many flows scheduled in one call."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import text

from ebbs_and_flows import (
    ExecutionContext,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    InvalidArgumentError,
    MissingInputError,
    TaskDataItem,
    UnknownTemplateError,
    UnserializableValueError,
    Worker,
    task,
)
from tests.integration.invariants import check_invariants


@task(outputs="doubled")
def double(number: int) -> int:
    return 2 * number


@pytest.fixture
def doubling(runner: FlowRunner) -> FlowRunner:
    runner.register_flow_template(FlowTemplate("double", [double], inputs=[TaskDataItem("number", int)]))
    return runner


def contexts(count: int) -> Iterator[dict[str, Any]]:
    return ({"number": number, "note": 'it\'s "é" \\ %s :x'} for number in range(count))


def test_each_context_has_an_execution_of_its_own_in_order(service: FlowService, doubling: FlowRunner) -> None:
    ids = doubling.schedule_flows("double", contexts(1203))
    assert len(ids) == 1203
    assert ids == sorted(set(ids))
    Worker(doubling, concurrency=64).run(until_idle=True)
    for number in (0, 499, 500, 1000, 1202):
        execution = service.get_flow_execution(ids[number])
        assert execution.status is FlowStatus.SUCCEEDED
        expected = {"number": number, "note": 'it\'s "é" \\ %s :x', "doubled": 2 * number}
        assert dict(execution.execution_context) == expected
    assert check_invariants(service.engine) == []


def test_they_are_as_schedule_flow_makes_them(service: FlowService, doubling: FlowRunner) -> None:
    at = datetime.now(timezone.utc) + timedelta(hours=1)
    arguments: dict[str, Any] = {"run_at": at, "priority": 7, "queue": "slow"}
    one = service.get_flow_execution(doubling.schedule_flow("double", {"number": 1}, **arguments))
    [many] = doubling.schedule_flows("double", [ExecutionContext(number=1)], **arguments)
    other = service.get_flow_execution(many)
    left_out = {"execution_id", "created_at", "updated_at", "execution_context"}
    assert other.model_dump(exclude=left_out) == one.model_dump(exclude=left_out)
    assert other.execution_context == one.execution_context
    assert other.created_at == other.updated_at
    steps = [each.to_status for each in service.get_flow_status_history(many)]
    assert steps == [FlowStatus.CREATED, FlowStatus.SCHEDULED]


def test_a_delay_is_counted_from_the_databases_now(service: FlowService, doubling: FlowRunner) -> None:
    ids = doubling.schedule_flows("double", contexts(2), delay=timedelta(hours=2))
    for each in ids:
        execution = service.get_flow_execution(each)
        assert abs(execution.run_at - execution.created_at - timedelta(hours=2)) < timedelta(seconds=1)
    assert doubling.run_flow() is None


def test_they_join_the_callers_transaction(service: FlowService, doubling: FlowRunner) -> None:
    with service.engine.connect() as connection:
        doubling.schedule_flows("double", contexts(600), session=connection)
        connection.rollback()
        assert connection.scalar(text("SELECT count(*) FROM ebbs_flow_executions")) == 0
        connection.rollback()
        kept = doubling.schedule_flows("double", contexts(3), session=connection)
        connection.commit()
    assert [each.execution_id for each in service.find_flow_executions(FlowFilter())] == kept[::-1]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([{"number": 1}, {"number": object()}], UnserializableValueError),
        ([{"number": 1}, {"other": 1}], MissingInputError),
        ([{"number": 1}, 5], ValueError),
        ({"number": 1}, InvalidArgumentError),
        ("abc", InvalidArgumentError),
        (None, InvalidArgumentError),
    ],
)
def test_one_that_cannot_be_scheduled_stops_all_of_them(
    service: FlowService, doubling: FlowRunner, given: Any, error: type[Exception]
) -> None:
    with pytest.raises(error) as raised:
        doubling.schedule_flows("double", given)
    if isinstance(given, list) and hasattr(raised.value, "__notes__"):
        assert raised.value.__notes__ == ["It is about contexts[1]."]
    assert service.find_flow_executions() == []


def test_none_is_no_error_and_an_unknown_template_is(doubling: FlowRunner) -> None:
    assert doubling.schedule_flows("double", []) == []
    with pytest.raises(UnknownTemplateError):
        doubling.schedule_flows("triple", [{}])
