"""FlowTemplate: a named, ordered list of tasks whose data flow is checked while it is put together."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar, Union

from ebbs_and_flows.codec import declare_type
from ebbs_and_flows.errors import MissingInputError, TemplateError, TemplateMismatchError
from ebbs_and_flows.names import valid_name
from ebbs_and_flows.retries import RetryPolicy
from ebbs_and_flows.tasks import Task, TaskDataItem


class FlowTemplate:
    """The blueprint of a flow: a name and its tasks, in the order in which they run.

    Args:
        name: under which executions refer to it in the database; keep it over deploys.
        tasks: the tasks, added one by one as by `add_task`.
        inputs: the entries with which the flow must be scheduled; default those of its first task.
        timeout_seconds: how long a whole execution may take, from its first claim on, with the waits between retries; a
            re-run by hand has the whole time again. Past it the running attempt is ended as for a task's own limit, and
            the execution is parked as FAILED. Default without limit.
        max_in_flight: how many of its executions may be RUNNING at once, over all workers and runners that were given
            this number; default as many as there are places.

    Raises:
        InvalidNameError: a name that cannot be stored.
        TemplateError: as for `add_task`; a limit that is not a positive number.
    """

    def __init__(
        self,
        name: str,
        tasks: Iterable[Task] = (),
        *,
        inputs: Sequence[TaskDataItem] | None = None,
        timeout_seconds: float | None = None,
        max_in_flight: int | None = None,
    ) -> None:
        self.name = valid_name("template", name)
        if not _is_limit(timeout_seconds):
            raise TemplateError(f"template {self.name!r} has timeout_seconds={timeout_seconds!r}: {_A_LIMIT}")
        self.timeout_seconds = timeout_seconds
        if max_in_flight is not None and not is_positive_int(max_in_flight):
            raise TemplateError(
                f"template {self.name!r} has max_in_flight={max_in_flight!r}: an int of at least 1, or None"
            )
        self.max_in_flight = max_in_flight
        self._tasks: list[Task] = []
        self._task_names: tuple[str, ...] = ()
        self._declared_inputs = None if inputs is None else _items(f"template {self.name!r}", "inputs", inputs)
        self._available: dict[str, Any] = {item.name: item.type for item in self._declared_inputs or ()}
        self._types_declared = False
        if isinstance(tasks, (str, Task)) or not isinstance(tasks, Iterable):
            raise TemplateError(f"template {self.name!r} takes a list of tasks, not {type(tasks).__name__}")
        for task in tasks:
            self.add_task(task)

    def __repr__(self) -> str:
        return f"<FlowTemplate {self.name!r}: {' -> '.join(self._task_names) or 'no tasks'}>"

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in order."""
        return tuple(self._tasks)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names, in order: what an execution remembers of the tasks it has completed."""
        return self._task_names

    @property
    def inputs(self) -> tuple[TaskDataItem, ...]:
        """The entries with which the flow is to be scheduled."""
        if self._declared_inputs is not None:
            return self._declared_inputs
        return tuple(self._tasks[0].inputs()) if self._tasks else ()

    def get_task(self, index: int) -> Task | None:
        """The task at this 0-based index; `None` past the end, and for a negative index."""
        return self._tasks[index] if 0 <= index < len(self._tasks) else None

    def index_of(self, task_name: str) -> int:
        """The 0-based index of the task of this name.

        Raises:
            TemplateError: the template has none of this name.
        """
        try:
            return self._task_names.index(valid_name("task", task_name))
        except ValueError:
            raise TemplateError(
                f"template {self.name!r} has no task {task_name!r}; it has: {list(self._task_names)}"
            ) from None

    def add_task(self, task: Task, name: str | None = None) -> None:
        """Append a task.

        Args:
            task: an instance of a `Task` class, or a function under `@task`.
            name: its name in this template; default the task's own.

        Raises:
            TemplateError: not a task; a name that the template has already; a declared input that neither the flow's
                inputs nor an earlier task's outputs provide by name and compatible type; an output that redefines an
                existing item. The template stays as it was.
        """
        _check_is_task(task)
        task_name = valid_name("task", task.name if name is None else name)
        if task_name in self._task_names:
            raise TemplateError(
                f"template {self.name!r} has a task {task_name!r} already: give this one another name with "
                "add_task(task, name=...)"
            )
        self._available = self._check_data_flow(task, task_name)
        self._tasks.append(task)
        self._task_names = (*self._task_names, task_name)
        if self._types_declared:
            _declare_types(task)

    def declare_types(self) -> None:
        """Register the types that the flow's inputs and its tasks declare, now and for tasks added later."""
        for item in self._declared_inputs or ():
            declare_type(item.type)
        for task in self._tasks:
            _declare_types(task)
        self._types_declared = True

    def check_inputs(self, present: Iterable[str]) -> None:
        """Raise `MissingInputError` unless every required input of the flow is among the names `present`."""
        names = set(present)
        missing = [item.name for item in self.inputs if item.required and item.name not in names]
        if missing:
            raise MissingInputError(self.name, missing, sorted(names))

    def check_completed(self, completed: Sequence[str]) -> None:
        """Raise `TemplateMismatchError` unless the template begins with the tasks named in `completed`, in that
        order.
        """
        if self._task_names[: len(completed)] != tuple(completed):
            raise TemplateMismatchError(self.name, completed, self._task_names)

    def _check_data_flow(self, task: Task, task_name: str) -> dict[str, Any]:
        owner = f"task {task_name!r} of template {self.name!r}"
        inputs = _items(owner, "inputs", task.inputs())
        outputs = _items(owner, "outputs", task.outputs())
        available = dict(self._available)
        if not self._tasks and self._declared_inputs is None:
            available.update({item.name: item.type for item in inputs})
        for item in inputs:
            if item.name not in available:
                if item.required:
                    raise TemplateError(
                        f"{owner} needs {item.name!r}, which neither the flow's inputs nor an earlier task provide; "
                        f"provided so far: {sorted(available)}. What a flow is to be scheduled with, if not its "
                        "first task's inputs alone, is named by FlowTemplate(..., inputs=[...])"
                    )
            elif not is_compatible(available[item.name], item.type):
                raise TemplateError(
                    f"{owner} needs {item.name!r} as {_show(item.type)}, but it is provided as "
                    f"{_show(available[item.name])}"
                )
        for item in outputs:
            if item.name in available:
                raise TemplateError(f"{owner} outputs {item.name!r}, which is there already: choose another name")
            available[item.name] = item.type
        return available


def is_compatible(provided: Any, needed: Any) -> bool:
    """Whether a value of the annotation `provided` may stand where `needed` is asked for.

    Refuses only what is clearly wrong: where annotations go beyond classes, unions and generics, it says yes.
    """
    provided, needed = _plain(provided), _plain(needed)
    if provided is needed or provided == needed or Any in (provided, needed) or object is needed:
        return True
    if isinstance(provided, TypeVar) or isinstance(needed, TypeVar):
        return True
    if _is_union(provided):
        return all(is_compatible(member, needed) for member in typing.get_args(provided))
    if _is_union(needed):
        return any(is_compatible(provided, member) for member in typing.get_args(needed))
    provided_class = typing.get_origin(provided) or provided
    needed_class = typing.get_origin(needed) or needed
    if not inspect.isclass(provided_class) or not inspect.isclass(needed_class):
        return True
    if (provided_class, needed_class) in {(int, float), (int, complex), (float, complex)}:
        return True  # PEP 484, "The numeric tower"
    try:
        if not issubclass(provided_class, needed_class):
            return False
    except TypeError:
        return True  # a Protocol that cannot be asked
    provided_args, needed_args = typing.get_args(provided), typing.get_args(needed)
    if provided_class is not needed_class or len(provided_args) != len(needed_args):
        return True
    return all(
        is_compatible(one, other) for one, other in zip(provided_args, needed_args, strict=True) if one is not Ellipsis
    )


def _plain(annotation: Any) -> Any:
    if annotation is None:
        return type(None)
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        else:
            return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _check_is_task(task: object) -> None:
    if inspect.isclass(task) and issubclass(task, Task):
        raise TemplateError(f"a template takes tasks, not classes: add {task.__name__}() instead of {task.__name__}")
    if not isinstance(task, Task):
        hint = ": put @task above the function" if callable(task) else ""
        raise TemplateError(f"a template takes Task instances and functions under @task, not {task!r}{hint}")
    if not isinstance(task.retry, RetryPolicy):
        raise TemplateError(f"task {task.name!r} has retry={task.retry!r}, which is not a RetryPolicy")
    if not _is_limit(task.timeout_seconds):
        raise TemplateError(f"task {task.name!r} has timeout_seconds={task.timeout_seconds!r}: {_A_LIMIT}")


_A_LIMIT = "a positive number of seconds, or None"


def _is_limit(seconds: object) -> bool:
    if seconds is None:
        return True
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < math.inf


def is_positive_int(value: object) -> bool:
    """Whether it is an int of at least 1, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _items(owner: str, what: str, items: object) -> tuple[TaskDataItem, ...]:
    listed = tuple(items) if isinstance(items, Iterable) and not isinstance(items, str) else (items,)
    for item in listed:
        if not isinstance(item, TaskDataItem):
            raise TemplateError(f"{owner} declares {what} {item!r}: each must be a TaskDataItem")
    names = [item.name for item in listed]
    if len(set(names)) != len(names):
        raise TemplateError(f"{owner} declares {what} {names}, one of them twice")
    return typing.cast("tuple[TaskDataItem, ...]", listed)


def _declare_types(task: Task) -> None:
    for item in (*task.inputs(), *task.outputs()):
        declare_type(item.type)


def _show(annotation: Any) -> str:
    is_plain_class = inspect.isclass(annotation) and typing.get_origin(annotation) is None
    return annotation.__qualname__ if is_plain_class else str(annotation)
