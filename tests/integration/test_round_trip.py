"""What is put into a context is what comes back, through real rows of both databases."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import text

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, task
from tests.unit.test_codec_properties import same, values

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of the strategy


@pytest.fixture
def echo(service: FlowService, runner: FlowRunner) -> FlowRunner:
    @task(outputs="returned")
    def returns(given: object) -> object:
        return given

    runner.register_flow_template(FlowTemplate("echo", [returns]))
    return runner


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values)
def test_what_is_put_in_is_what_the_task_receives_and_what_it_returns_comes_back(
    echo: FlowRunner, database: str, value: object
) -> None:
    execution_id = echo.schedule_flow("echo", {"given": value})
    done = echo.run_flow()
    assert done is not None
    assert done.status == "SUCCEEDED", echo.service.get_task_executions(execution_id)
    read = echo.service.get_flow_execution(execution_id).execution_context
    assert same(read["given"], value)
    assert same(read["returned"], value)
    with echo.service.engine.connect() as connection:
        if database == "postgresql":
            query = "SELECT CAST(entries AS jsonb) -> 'returned' IS NOT NULL FROM ebbs_task_executions WHERE"
        else:
            query = "SELECT json_valid(entries) FROM ebbs_task_executions WHERE"
        assert connection.execute(text(f"{query} flow_execution_id = :id"), {"id": execution_id}).scalar_one()
