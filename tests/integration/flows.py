"""Tasks and templates that several tests run."""

from __future__ import annotations

import threading

from tenacity import wait_none

from ebbs_and_flows import (
    ExecutionContext,
    FlowFilter,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    Task,
    raise_if_stop_requested,
    stop_requested,
    task,
)

AT_ONCE = wait_none()
"""Retries without a wait: no test sleeps to hope."""


class Outside:
    """The world outside the flow: what was called, and what is to fail next."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failures: list[BaseException] = []

    def call(self, name: str) -> None:
        """Note the call; raise the next of the failures that were prepared."""
        self.calls.append(name)
        if self.failures:
            raise self.failures.pop(0)


class Step(Task):
    """Calls the outside under its own name and adds an entry of that name."""

    def __init__(self, outside: Outside, name: str, retry: RetryPolicy | None = None) -> None:
        self.outside = outside
        self.name = name
        self.retry = retry or RetryPolicy()

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.outside.call(self.name)
        return context.copy({self.name: f"{self.name} done"})


def abc(outside: Outside, *, retry_b: RetryPolicy | None = None) -> FlowTemplate:
    """A template of three steps: a, b, c."""
    return FlowTemplate("abc", [Step(outside, "a"), Step(outside, "b", retry_b), Step(outside, "c")])


def one(body: object, name: str = "one") -> FlowTemplate:
    """A template of one function."""
    return FlowTemplate(name, [task(body)])


class Gate(Task):
    """Waits within its task until it is opened, or asked to stop."""

    def __init__(self, name: str = "gate") -> None:
        self.name = name
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.asked: list[str] = []

    def run(self, context: ExecutionContext) -> ExecutionContext:
        self.entered.release()
        while not self.opened.wait(0.005):
            if stop_requested():
                self.asked.append("asked")
                raise_if_stop_requested()
        return context.copy({self.name: "passed"})


def statuses(service: FlowService) -> set[FlowStatus]:
    """Those of all executions."""
    return {each.status for each in service.find_flow_executions(FlowFilter(limit=1000))}
