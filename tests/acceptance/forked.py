"""Fork while a worker runs and connections are open: `forked.py URL`. Prints what parent and child see."""

from __future__ import annotations

import os
import sys
import time
import warnings

from sqlalchemy import text

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, Worker, task

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of a fork beside threads


@task(outputs="ran_in")
def note_process() -> int:
    return os.getpid()


def connection_of(service: FlowService) -> object:
    """What tells one connection from another: the server's process, or the driver's object."""
    with service.engine.connect() as connection:
        if service.engine.dialect.name == "postgresql":
            return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        return id(connection.connection.driver_connection)


def main(url: str) -> None:
    """Run a flow in the parent, one in the child beside it, and another one in the parent after that."""
    service = FlowService(url)
    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("note", [note_process], max_in_flight=100))
    worker = Worker(runner, poll_seconds=0.01, queues=["parent"])
    with worker.running():
        first = runner.schedule_flow("note", queue="parent")
        while not service.get_flow_execution(first).status.is_final:
            time.sleep(0.005)
        parents = connection_of(service)
        child = os.fork()
        if child == 0:
            try:
                in_child(service, runner, worker, parents)
            except BaseException as error:
                print("child failed", repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        runner.schedule_flow("note", queue="parent")
        while worker.health().succeeded < 2:
            time.sleep(0.005)
        print("parent", os.waitstatus_to_exitcode(status), worker.health().succeeded, flush=True)


def in_child(service: FlowService, runner: FlowRunner, worker: Worker, parents: object) -> None:
    """Use what was inherited."""
    assert not worker.is_running
    assert worker.health().in_flight == 0
    execution_id = runner.schedule_flow("note", queue="parent", run_at=None, delay=3600)
    assert service.get_flow_execution(execution_id).queue == "parent"
    if service.engine.dialect.name == "postgresql":
        assert connection_of(service) != parents
    mine = runner.schedule_flow("note", queue="child")
    Worker(runner, queues=["child"]).run(until_idle=True)
    assert service.get_flow_execution(mine).execution_context["ran_in"] == os.getpid()
    print("child", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
