"""Results that are no next context, and what a task does to the one it has: the attempt fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FunctionTask,
)
from tests.integration.bad_input.suspects import (
    EARLIER,
    KINDS,
    THREE_ATTEMPTS,
    Body,
    Impostor,
    OddlyMade,
    Suspect,
    attempts_at,
    cases,
    failed,
    schedule,
    succeeds_once_mended,
)

# --- results that are none: the attempt fails and is not retried ---------------------------------------------------


@dataclass(frozen=True)
class Result:
    id: str
    body: Body
    says: str


async def _later() -> None:
    """What nobody awaits."""


async def _many() -> Any:
    yield 1


BAD_RESULTS = [
    Result("None", lambda context, *_: None, "returned None"),
    Result("a coroutine", lambda context, *_: _later(), "returned a coroutine that nobody awaits"),
    Result("a generator", lambda context, *_: (each for each in ()), "returned a generator"),
    Result("an asynchronous generator", lambda context, *_: _many(), "returned a async_generator"),
    Result("a dict", lambda context, *_: dict(context), "returned a dict"),
    Result("True", lambda context, *_: True, "returned a bool"),
    Result("a str", lambda context, *_: "done", "returned a str"),
    Result("a tuple", lambda context, *_: (context, 1), "returned a tuple"),
    Result("an exception", lambda context, *_: ValueError("returned"), "returned a ValueError"),
    Result("the class of contexts", lambda context, *_: ExecutionContext, "returned a"),
    Result("an object whose class cannot be named", lambda context, *_: OddlyMade(), "returned a OddlyMade"),
    Result("an object that says it is a dict", lambda context, *_: Impostor(), "returned a Impostor"),
]


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("case", cases(BAD_RESULTS))
def test_a_result_that_is_no_context_fails_the_attempt(case: Result, kind: type[Suspect], runner: FlowRunner) -> None:
    suspect = kind(case.body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says=case.says)
    succeeds_once_mended(runner, execution_id, suspect)


@dataclass(frozen=True)
class FunctionResult:
    id: str
    outputs: Any
    result: Any
    says: str


BAD_FUNCTION_RESULTS = [
    FunctionResult("a tuple that is too short", ("a", "b"), (1,), "returned a tuple of 1; its outputs ['a', 'b']"),
    FunctionResult("a tuple that is too long", ("a", "b"), (1, 2, 3), "returned a tuple of 3; its outputs ['a', 'b']"),
    FunctionResult("an empty tuple", ("a",), (), "returned a tuple of 0"),
    FunctionResult("a list for a tuple", ("a", "b"), [1, 2], "returned list; its outputs ['a', 'b']"),
    FunctionResult("None for a tuple", ("a", "b"), None, "returned NoneType; its outputs ['a', 'b']"),
    FunctionResult("a value without a name", (), 17, "returned a int but names no outputs"),
    FunctionResult("a dict without a name", (), {"a": 1}, "returned a dict but names no outputs"),
    FunctionResult("a generator without a name", (), iter(()), "but names no outputs"),
]


@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
@pytest.mark.parametrize("case", cases(BAD_FUNCTION_RESULTS))
def test_a_result_that_does_not_fit_the_outputs_fails_the_attempt(
    case: FunctionResult, is_async: bool, runner: FlowRunner
) -> None:
    def plain() -> Any:
        return case.result

    async def asynchronous() -> Any:
        return case.result

    function: Body = asynchronous if is_async else plain
    suspect = FunctionTask(function, name="suspect", outputs=case.outputs, retry=THREE_ATTEMPTS)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says=case.says)


def test_a_function_that_returns_a_coroutine_fails_the_attempt(runner: FlowRunner) -> None:
    def forgetful() -> Any:
        return _later()

    execution_id = schedule(runner, FunctionTask(forgetful, name="suspect", outputs="a", retry=THREE_ATTEMPTS))
    runner.run_until_idle()
    failed(runner, execution_id, attempts=1, error_type="TaskResultError", says="returned a coroutine")


# --- what a task does to its context -------------------------------------------------------------------------------


def test_what_a_task_does_to_its_values_changes_nothing_stored(runner: FlowRunner) -> None:
    seen: list[list[int]] = []

    def body(context: ExecutionContext) -> ExecutionContext:
        values = context["earlier"]
        seen.append(list(values))
        values.append(3)
        context["earlier"].clear()
        if len(seen) < 3:
            raise ValueError("after it has changed them")
        return context

    execution_id = schedule(runner, Suspect(body))
    runner.run_until_idle()
    assert seen == [[1, 2]] * 3
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}


@dataclass(frozen=True)
class Change:
    id: str
    body: Body
    error_type: str
    says: str


BAD_CHANGES = [
    Change("sets an entry", lambda context: context.set("new", 1), "FrozenContextError", "'new' cannot be set"),
    Change("replaces an entry", lambda context: context.copy(order=18), "DuplicateEntryError", "'order'"),
    Change("assigns to an entry", lambda context: exec("context['order'] = 18"), "TypeError", "item assignment"),
    Change("deletes an entry", lambda context: exec("del context['order']"), "TypeError", "item deletion"),
    Change("drops what is not there", lambda context: context.without("ordre"), "MissingEntryError", "'ordre'"),
    Change("reads what is not there", lambda context: context["ordre"], "MissingEntryError", "'ordre'"),
    Change(
        "reads an entry as another type",
        lambda context: context.get_as("order", list[int]),
        "InvalidEntryError",
        "order",
    ),
    Change(
        "names an entry badly", lambda context: context.copy({"a\x00b": 1}), "InvalidNameError", "control character"
    ),
    Change("names an entry by a number", lambda context: context.copy({17: 1}), "InvalidNameError", "must be a str"),
    Change("takes no context", lambda: None, "TypeError", "positional argument"),
]


@pytest.mark.parametrize("case", cases(BAD_CHANGES))
def test_a_change_that_is_not_allowed_fails_the_attempt(case: Change, runner: FlowRunner) -> None:
    suspect = Suspect(case.body)
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()
    failed(runner, execution_id, attempts=3, error_type=case.error_type, says=case.says)
    succeeds_once_mended(runner, execution_id, suspect)


def test_an_output_that_is_there_already_fails_the_attempt(runner: FlowRunner) -> None:
    # An undeclared entry, so that no template could have known.
    suspect = Suspect(lambda context: context.copy(receipt="r-0"))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    assert execution.execution_context == {**EARLIER, "receipt": "r-0"}
    (clash,) = attempts_at(runner, execution_id, "finish")
    assert clash.error_type == "DuplicateEntryError"
    assert "'receipt'" in (clash.output or "")

    suspect.body = lambda context: context
    runner.reschedule_flow_execution(execution_id, from_task="suspect")
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}


def test_an_entry_that_a_later_task_needs_is_missed_there(runner: FlowRunner) -> None:
    suspect = Suspect(lambda context: context.without("order"))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.FAILED
    assert execution.execution_context == {"earlier": [1, 2]}
    (missed,) = attempts_at(runner, execution_id, "finish")
    assert missed.error_type == "MissingEntryError"
    assert "'order'" in (missed.output or "")

    suspect.body = lambda context: context
    runner.reschedule_flow_execution(execution_id, from_task="suspect")
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context == {**EARLIER, "receipt": "r-17"}
