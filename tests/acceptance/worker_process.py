"""A worker in a process of its own: `worker_process.py URL LEASE_SECONDS GRACE_SECONDS`. It says what its tasks do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, Worker, task, wait_for_stop


def say(what: str) -> None:
    """Tell the test, in one line."""
    print(what, flush=True)


@task(outputs="held")
def hold(gate: str) -> int:
    """Wait until the file `gate` is there."""
    say("entered hold")
    while not Path(gate).exists():
        if wait_for_stop(0.01):
            say("asked to stop")
    say("left hold")
    return os.getpid()


@task(outputs="deaf_to")
def be_deaf(gate: str) -> int:
    """Wait until the file `gate` is there, and hear nothing."""
    say("entered be_deaf")
    while not Path(gate).exists():
        pass
    return os.getpid()


@task(outputs="sold")
def sell(gate: str, session: Session) -> int:
    """Note in the table `effects` who was here, then wait until the file `gate` is there."""
    session.execute(text("INSERT INTO effects VALUES (:process)"), {"process": os.getpid()})
    say("entered sell")
    while not Path(gate).exists():
        wait_for_stop(0.01)
    say("left sell")
    return os.getpid()


def register(service: FlowService) -> FlowRunner:
    """A runner that knows the flows."""
    runner = FlowRunner(service)
    for body in (hold, be_deaf, sell):
        runner.register_flow_template(FlowTemplate(body.name, [body]))
    return runner


def main(url: str, lease_seconds: str, grace_seconds: str) -> None:
    """Run a worker until it is stopped by a signal."""
    worker = Worker(
        register(FlowService(url)),
        lease_seconds=float(lease_seconds),
        grace_seconds=float(grace_seconds),
        poll_seconds=0.05,
    )
    say(worker.name)
    worker.run()
    say("ended")


if __name__ == "__main__":
    main(*sys.argv[1:])
