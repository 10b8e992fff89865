"""Run it twice: the first run is killed in the middle of a task, the second one goes on at that task.

python examples/survive_a_kill.py
python examples/survive_a_kill.py
"""

import os
import signal

from ebbs_and_flows import ExecutionContext, FlowFilter, FlowRunner, FlowService, FlowStatus, FlowTemplate, task

service = FlowService("sqlite:///survive_a_kill.db")
first_run = not service.find_flow_executions()


@task(outputs="coffee")
def brew(beans: str) -> str:
    print(f"brew:  grinding {beans}")
    return f"a cup of {beans}"


@task(outputs="served")
def serve(coffee: str) -> bool:
    print(f"serve: carrying {coffee}")
    if first_run:
        print("serve: the power goes out", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print("serve: on the table")
    return True


runner = FlowRunner(service)
runner.register_flow_template(FlowTemplate("coffee", [brew, serve]))

if first_run:
    runner.schedule_flow("coffee", ExecutionContext(beans="Yirgacheffe"))
    runner.run_flow()

for interrupted in service.find_flow_executions(FlowFilter(statuses={FlowStatus.RUNNING})):
    print(
        f"execution {interrupted.execution_id} was left RUNNING: going on at its task {interrupted.current_task_index}"
    )
    execution = runner.recover(interrupted.execution_id)
    print(execution.status, dict(execution.execution_context))

for attempt in service.get_task_executions(1):
    print(f"  {attempt.name:6} attempt {attempt.attempt}: {attempt.status} {attempt.error_type or ''}")
