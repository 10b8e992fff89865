"""Tasks as classes and as functions: what they take, what they give, what they refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    EbbsError,
    ExecutionContext,
    InvalidEntryError,
    InvalidNameError,
    MissingEntryError,
    Task,
    TaskDataItem,
    TaskResultError,
    TemplateError,
    TransactionalTask,
    task,
)


def frozen(**entries: Any) -> ExecutionContext:
    return ExecutionContext.from_encoded(ExecutionContext(entries).encode())


def test_a_task_is_abstract() -> None:
    with pytest.raises(TypeError):
        Task()  # type: ignore[abstract]  # that is the test
    with pytest.raises(TypeError):
        TransactionalTask()  # type: ignore[abstract]  # that is the test


def test_a_class_is_named_after_itself_unless_it_says_otherwise() -> None:
    class Plain(Task):
        def run(self, context: ExecutionContext) -> ExecutionContext:
            return context

    class Named(Plain):
        name = "a name"

    class Below(Named):
        pass

    assert [Plain().name, Named().name, Below().name] == ["Plain", "a name", "Below"]


def test_a_function_takes_its_parameters_from_the_context_and_its_result_goes_under_its_output() -> None:
    @task(outputs="total")
    def add(left: int, right: int = 10) -> int:
        return left + right

    assert add.run(frozen(left=1, right=2))["total"] == 3  # type: ignore[index]  # a context
    assert add.run(frozen(left=1))["total"] == 11  # type: ignore[index]  # a context
    assert add.name == "add"
    assert [(each.name, each.type, each.required) for each in add.inputs()] == [
        ("left", int, True),
        ("right", int, False),
    ]
    assert [(each.name, each.type) for each in add.outputs()] == [("total", int)]
    assert add(1, 2) == 3  # the function itself, for tests


def test_a_function_without_outputs_passes_the_context_on() -> None:
    @task
    def look(left: int) -> None: ...

    context = frozen(left=1)
    assert look.run(context) is context


def test_several_outputs_come_from_a_tuple() -> None:
    @task(outputs=("low", "high"))
    def limits(values: list[int]) -> tuple[int, float]:
        return min(values), float(max(values))

    after = limits.run(frozen(values=[3, 1, 2]))
    assert dict(after) == {"values": [3, 1, 2], "low": 1, "high": 3.0}  # type: ignore[call-overload]  # a context
    assert [(each.name, each.type) for each in limits.outputs()] == [("low", int), ("high", float)]


def test_a_session_makes_it_transactional_and_a_context_receives_all() -> None:
    seen = []

    @task
    def both(left: int, everything: ExecutionContext, session: Session) -> None:
        seen.append((left, dict(everything), session))

    session = Session()
    assert both.is_transactional
    both.run(frozen(left=1, other=2), session)
    assert seen == [(1, {"left": 1, "other": 2}, session)]
    assert [each.name for each in both.inputs()] == ["left"]


def test_async_functions_and_classes_are_known_as_such() -> None:
    @task(outputs="doubled")
    async def double(number: int) -> int:
        return 2 * number

    class Async(Task):
        async def run(self, context: ExecutionContext) -> ExecutionContext:
            return context

    assert double.is_async
    assert Async().is_async
    assert asyncio.run(double.run(frozen(number=2)))["doubled"] == 4  # type: ignore[arg-type]  # an awaitable


def test_a_parameter_is_validated_against_its_annotation() -> None:
    @task
    def needs(number: int) -> None: ...

    with pytest.raises(InvalidEntryError, match="number"):
        needs.run(frozen(number="many"))
    with pytest.raises(MissingEntryError, match="number"):
        needs.run(frozen(other=1))


def test_annotations_that_are_strings_may_name_local_classes() -> None:
    class Order: ...

    @task
    def needs(order: Order) -> None: ...

    assert needs.inputs()[0].type is Order


def args(*values: int) -> None: ...


def kwargs(**values: int) -> None: ...


def positional(value: int, /) -> None: ...


def two_sessions(one: Session, two: Session) -> None: ...


def unknown(value: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # that is the test


def generator() -> Any:
    yield 1


class AsyncSession: ...


def async_session(session: AsyncSession) -> None: ...


@pytest.mark.parametrize(
    "function", [args, kwargs, positional, two_sessions, unknown, generator, async_session, int, 3, "name"]
)
def test_a_function_that_cannot_be_filled_from_a_context_is_refused(function: Any) -> None:
    with pytest.raises(TemplateError):
        task(function)


@pytest.mark.parametrize("outputs", ["", " ", ("a", "a"), ("a", ""), (1,), "a\x00"])
def test_outputs_that_cannot_be_entries_are_refused(outputs: Any) -> None:
    with pytest.raises(EbbsError):
        task(outputs=outputs)(lambda: None)
    with pytest.raises(InvalidNameError):
        TaskDataItem("")


@pytest.mark.parametrize(
    ("outputs", "result"),
    [((), 17), (("a", "b"), 1), (("a", "b"), (1, 2, 3)), (("a", "b"), [1, 2]), ((), asyncio.sleep)],
)
def test_a_result_that_does_not_fit_the_outputs_is_refused(outputs: Any, result: Any) -> None:
    made = task(outputs=outputs)(lambda: result(0) if callable(result) else result)
    with pytest.raises(TaskResultError):
        made.run(frozen())
