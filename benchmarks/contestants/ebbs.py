"""Ebbs and Flows itself."""

from __future__ import annotations

import threading
import time

from sqlalchemy import text

from benchmarks.contestants.durability import postgresql_settings, sqlite_settings
from benchmarks.contestants.work import TASKS, Progress, Recorded, entry, first_context, task_name
from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTemplate, Task, Worker, schema

FLOW = "ten-steps"

RECORDED = """
    SELECT (SELECT count(*) FROM ebbs_flow_executions WHERE status = 'SUCCEEDED'),
           (SELECT count(*) FROM ebbs_task_executions WHERE status = 'SUCCEEDED')"""
FINISHED = "SELECT count(*) FROM ebbs_flow_executions WHERE status = 'SUCCEEDED'"
LATENCIES = """
    SELECT extract(epoch FROM t.started_at - e.created_at)
      FROM ebbs_flow_executions e JOIN ebbs_task_executions t ON t.flow_execution_id = e.execution_id
     WHERE t.task_index = 0 AND t.attempt = 1 ORDER BY 1"""


class AddEntry(Task):
    """Adds one entry."""

    def __init__(self, step: int, progress: Progress) -> None:
        self._step = step
        self._progress = progress

    def run(self, context: ExecutionContext) -> ExecutionContext:
        if self._step == 0:
            self._progress.flow_begins()
        added = context.copy(entry(self._step))
        if self._step == TASKS - 1:
            self._progress.flow_ends()
        return added


class Ebbs:
    """The library on an engine that it makes from the URL, with nothing set."""

    def __init__(self, url: str, in_flight: int) -> None:
        schema.upgrade(url)
        self._service = FlowService(url)
        self._in_flight = in_flight
        self._flows = 0
        self._progress = Progress()
        self._runner = FlowRunner(self._service)
        template = FlowTemplate(FLOW)
        for step in range(TASKS):
            template.add_task(AddEntry(step, self._progress), name=task_name(step))
        self._runner.register_flow_template(template)

    def prepare(self, flows: int) -> None:
        self._flows = flows
        self._progress.expect(flows)
        self._runner.schedule_flows(FLOW, (first_context(flow) for flow in range(flows)))

    def drain(self) -> float:
        began = time.perf_counter()
        self._run()
        return time.perf_counter() - began

    def _run(self) -> None:
        raise NotImplementedError

    def recorded(self) -> Recorded:
        with self._service.engine.connect() as connection:
            return Recorded(*connection.execute(text(RECORDED)).one())

    def durability(self) -> dict[str, str]:
        with self._service.engine.connect() as connection:
            read = postgresql_settings if self._service.engine.dialect.name == "postgresql" else sqlite_settings
            return read(lambda statement: connection.scalar(text(statement)))

    def close(self) -> None:
        self._service.close()


class EbbsDirect(Ebbs):
    """`run_flow`, again and again, in this thread."""

    def _run(self) -> None:
        for _ in range(self._flows):
            self._runner.run_flow()


class EbbsWorker(Ebbs):
    """One worker, which stops when nothing is due."""

    def drain(self) -> float:
        worker = Worker(self._runner, concurrency=self._in_flight)
        thread = threading.Thread(target=worker.run, kwargs={"until_idle": True})
        thread.start()
        seconds = self._progress.seconds(self._are_recorded)
        thread.join()
        return seconds

    def _are_recorded(self) -> bool:
        with self._service.engine.connect() as connection:
            return connection.scalar(text(FINISHED)) == self._flows


class EbbsIdle(Ebbs):
    """One worker that has nothing to do: how soon does a flow start that is scheduled now?"""

    PAUSE_SECONDS = 0.03

    def prepare(self, flows: int) -> None:
        self._flows = flows
        self._progress.expect(flows)

    def _run(self) -> None:
        with Worker(self._runner, concurrency=self._in_flight).running():
            time.sleep(1)
            for flow in range(self._flows):
                self._runner.schedule_flow(FLOW, ExecutionContext(first_context(flow)))
                time.sleep(self.PAUSE_SECONDS)
            deadline = time.monotonic() + 60
            while self.recorded().flows < self._flows and time.monotonic() < deadline:
                time.sleep(self.PAUSE_SECONDS)

    def latencies(self) -> list[float]:
        """Return the seconds from schedule to start, by the database's clock, the shortest first."""
        with self._service.engine.connect() as connection:
            return [float(each) for each in connection.scalars(text(LATENCIES))]
