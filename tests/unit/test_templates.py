"""Templates: the order of tasks, and the flow of data that is checked while they are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NewType, Optional

import pytest

from ebbs_and_flows import (
    ExecutionContext,
    FlowTemplate,
    MissingInputError,
    RetryPolicy,
    Task,
    TaskDataItem,
    TemplateError,
    TemplateMismatchError,
    task,
)
from ebbs_and_flows.templates import is_compatible


class Declared(Task):
    """A task that declares what it is given."""

    def __init__(self, name: str, needs: Sequence[TaskDataItem] = (), adds: Sequence[TaskDataItem] = ()) -> None:
        self.name = name
        self.needs = needs
        self.adds = adds

    def inputs(self) -> Sequence[TaskDataItem]:
        return self.needs

    def outputs(self) -> Sequence[TaskDataItem]:
        return self.adds

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context


def item(name: str, type_: Any = Any, required: bool = True) -> TaskDataItem:
    return TaskDataItem(name, type_, required)


def test_tasks_are_found_by_index_and_none_lies_beyond() -> None:
    one, two = Declared("one"), Declared("two")
    template = FlowTemplate("t", [one])
    template.add_task(two)
    assert template.tasks == (one, two)
    assert template.task_names == ("one", "two")
    assert template.get_task(0) is one
    assert template.get_task(len(template.tasks)) is None
    assert template.get_task(-1) is None
    assert template.index_of("two") == 1
    with pytest.raises(TemplateError):
        template.index_of("three")


def test_a_task_may_be_added_twice_under_two_names() -> None:
    one = Declared("one")
    template = FlowTemplate("t", [one])
    with pytest.raises(TemplateError, match="already"):
        template.add_task(one)
    template.add_task(one, name="again")
    assert template.task_names == ("one", "again")


def test_the_inputs_of_a_flow_are_those_of_its_first_task_or_the_ones_it_names() -> None:
    first = Declared("first", [item("a", int), item("b", int, required=False)])
    assert [each.name for each in FlowTemplate("t", [first]).inputs] == ["a", "b"]
    named = FlowTemplate("t", [first], inputs=[item("a", int), item("z", str)])
    assert [each.name for each in named.inputs] == ["a", "z"]
    assert FlowTemplate("t").inputs == ()
    with pytest.raises(MissingInputError, match="'a'"):
        FlowTemplate("t", [first]).check_inputs({"b": 1})
    FlowTemplate("t", [first]).check_inputs(["a"])


@pytest.mark.parametrize(
    "tasks",
    [
        [Declared("one", [], [item("a")]), Declared("two", [item("b")])],
        [Declared("one", [item("a")]), Declared("two", [item("b")])],
        [Declared("one"), Declared("two", [item("b")])],
        [Declared("one", [], [item("a", str)]), Declared("two", [item("a", int)])],
        [Declared("one", [item("a", int)], []), Declared("two", [item("a", str)])],
        [Declared("one", [item("a")], [item("a")])],
        [Declared("one", [], [item("a")]), Declared("two", [], [item("a")])],
        [Declared("one", [], [item("a"), item("a")])],
        [Declared("one", ["a"])],  # type: ignore[list-item]  # that is the test
        [Declared("one", "a")],  # type: ignore[arg-type]  # that is the test
        [Declared],
        [lambda context: context],
        ["task"],
        [None],
    ],
    ids=range(14),
)
def test_a_flow_of_data_that_cannot_work_is_refused_and_the_template_stays_as_it_was(tasks: list[Any]) -> None:
    template = FlowTemplate("t")
    for each in tasks[:-1]:
        template.add_task(each)
    before = template.tasks
    with pytest.raises(TemplateError):
        template.add_task(tasks[-1])
    assert template.tasks == before


def test_an_optional_input_may_be_missing_but_not_of_another_type() -> None:
    template = FlowTemplate("t", [Declared("one", [], [item("a", str)])])
    template.add_task(Declared("two", [item("b", int, required=False)]))
    with pytest.raises(TemplateError):
        template.add_task(Declared("three", [item("a", int, required=False)]))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "3"])
def test_a_time_limit_that_is_none_is_refused(seconds: Any) -> None:
    @task(timeout_seconds=seconds)
    def limited() -> None: ...

    with pytest.raises(TemplateError, match="timeout_seconds"):
        FlowTemplate("t", [limited])


def test_a_retry_that_is_no_policy_is_refused() -> None:
    one = Declared("one")
    one.retry = 3  # type: ignore[assignment]  # that is the test
    with pytest.raises(TemplateError, match="RetryPolicy"):
        FlowTemplate("t", [one])
    one.retry = RetryPolicy()
    FlowTemplate("t", [one])


def test_completed_tasks_must_be_the_templates_beginning() -> None:
    template = FlowTemplate("t", [Declared("a"), Declared("b")])
    template.check_completed([])
    template.check_completed(["a", "b"])
    for completed in (["b"], ["a", "c"], ["a", "b", "c"]):
        with pytest.raises(TemplateMismatchError) as caught:
            template.check_completed(completed)
        assert caught.value.completed == tuple(completed)
        assert caught.value.current == ("a", "b")


class Animal: ...


class Dog(Animal): ...


UserId = NewType("UserId", int)


@pytest.mark.parametrize(
    ("provided", "needed", "fits"),
    [
        (int, int, True),
        (Dog, Animal, True),
        (Animal, Dog, False),
        (int, str, False),
        (int, float, True),
        (float, int, False),
        (int, Any, True),
        (Any, int, True),
        (int, object, True),
        (int, Optional[int], True),  # noqa: UP045  # the older spelling is to work as well
        (Optional[int], int, False),  # noqa: UP045  # the older spelling is to work as well
        (int | None, int | str | None, True),
        (None, type(None), True),
        (list[int], list[int], True),
        (list[int], list[str], False),
        (list[int], list, True),
        (list, list[int], True),
        (list[int], Sequence[int], True),
        (list[Dog], list[Animal], True),
        (dict[str, int], dict[str, str], False),
        (tuple[int, ...], tuple[int, ...], True),
        (UserId, int, True),
        (Callable[[int], str], Callable[[int], str], True),
        (bool, int, True),
    ],
)
def test_types_fit_as_a_reader_would_expect(provided: Any, needed: Any, fits: bool) -> None:
    assert is_compatible(provided, needed) is fits
