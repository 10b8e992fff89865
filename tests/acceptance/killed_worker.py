"""Run one flow and kill this process at a given point, as a power cut would: `killed_worker.py URL POINT`."""

from __future__ import annotations

import os
import signal
import sys

from sqlalchemy import event, text
from sqlalchemy.orm import Session

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTemplate, task

POINTS = [
    "in the plain task",
    "before the plain task's checkpoint commits",
    "after the plain task's checkpoint committed",
    "in the transactional task",
    "before the transactional task commits",
    "after the transactional task committed",
]


def flow(point: str) -> FlowTemplate:
    """Three tasks, of which the middle two note in the table `effects` that they were there."""

    def die_at(here: str) -> None:
        if point == here:
            os.kill(os.getpid(), signal.SIGKILL)

    @task(outputs="prepared")
    def prepare(order_id: int) -> dict[str, int]:
        return {"order": order_id}

    @task(outputs="charged")
    def charge(prepared: dict[str, int], context: ExecutionContext) -> list[str]:
        die_at("in the plain task")
        return sorted(context)

    @task(outputs="sold")
    def sell(charged: list[str], session: Session) -> str:
        session.execute(text("INSERT INTO effects VALUES (:effect)"), {"effect": "sold"})
        session.flush()
        die_at("in the transactional task")
        return " ".join(charged)

    return FlowTemplate("order", [prepare, charge, sell])


def die_around_commit(service: FlowService, point: str) -> None:
    """Kill this process just before or after the commit that ends the task named in `point`."""
    ending = {"plain": "charge", "transactional": "sell"}["plain" if "plain" in point else "transactional"]
    ended: list[str] = []

    @event.listens_for(service.engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.startswith("UPDATE ebbs_task_executions"):
            ended.append(statement)

    @event.listens_for(service.engine, "commit")
    def commit(_connection: object) -> None:
        if len(ended) == {"charge": 2, "sell": 3}[ending] and point.startswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)

    @event.listens_for(service.engine, "checkin")
    def checkin(*_: object) -> None:
        if len(ended) == {"charge": 2, "sell": 3}[ending] and point.startswith("after"):
            os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, point: str) -> None:
    """Schedule the flow and run it until the point."""
    service = FlowService(url)
    if "commit" in point:
        die_around_commit(service, point)
    runner = FlowRunner(service)
    runner.register_flow_template(flow(point))
    print(runner.schedule_flow("order", ExecutionContext(order_id=17)), flush=True)
    runner.run_flow()


if __name__ == "__main__":
    main(*sys.argv[1:])
