"""A user's first script: `nox -s wheel` runs it with an installed wheel, from an empty folder."""

import os
from importlib.resources import files

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowStatus, FlowTemplate, task


@task(outputs="total")
def add(left: int, right: int) -> int:
    return left + right


@task(outputs="answer")
def double(total: int) -> int:
    return 2 * total


service = FlowService(os.environ["EBBS_DATABASE_URL"])
runner = FlowRunner(service)
runner.register_flow_template(FlowTemplate("installed-wheel", [add, double]))
execution_id = runner.schedule_flow("installed-wheel", ExecutionContext(left=10, right=11))
execution = runner.run_flow()
service.close()

assert execution is not None
assert execution.execution_id == execution_id
assert execution.status is FlowStatus.SUCCEEDED, execution
assert execution.execution_context.get("answer") == 42
assert (files("ebbs_and_flows") / "py.typed").is_file()
