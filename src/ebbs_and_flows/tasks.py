"""Task: the unit of work, as a class with `run` or as a function under `@task`."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from sqlalchemy.orm import Session

from ebbs_and_flows.context import ExecutionContext
from ebbs_and_flows.errors import TaskResultError, TemplateError
from ebbs_and_flows.names import valid_name
from ebbs_and_flows.retries import RetryPolicy

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class TaskDataItem:
    """A named, typed piece of the context that a task reads or adds.

    Args:
        name: the entry's name.
        type: its type, as in an annotation; `Any` (the default) fits everything.
        required: whether the flow must provide it; False for an input that has a default.

    Raises:
        InvalidNameError: the name is not one an entry can have.
    """

    name: str
    type: Any = Any
    required: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", valid_name("context entry", self.name))


class Task(ABC):
    """A unit of work, written as a class.

    Its effects happen at least once: a crash after the work and before the checkpoint runs it again. For effects in the
    same database that must happen exactly once, see `TransactionalTask`. An instance is shared by all executions of its
    flow, in several threads, so it holds no state of its own.

    Attributes:
        name: the task's name where the template gives none; default the class's name.
        retry: when a failed attempt is tried again; default never.
        timeout_seconds: how long one attempt may take; default without limit.
    """

    name: str = ""
    retry: RetryPolicy = RetryPolicy()
    timeout_seconds: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def inputs(self) -> Sequence[TaskDataItem]:
        """The entries this task reads. Declaring them lets the template check the flow's data before anything runs."""
        return ()

    def outputs(self) -> Sequence[TaskDataItem]:
        """The entries this task adds."""
        return ()

    @abstractmethod
    def run(
        self, context: ExecutionContext, *args: Any, **kwargs: Any
    ) -> ExecutionContext | Awaitable[ExecutionContext]:
        """Do the work. May be `async def`. Write it as `def run(self, context)`: nothing else is passed.

        Args:
            context: read-only; what the task before returned.
            *args, **kwargs: only there so that `TransactionalTask.run` may take a session as well (mypy reads
                `*args: Any, **kwargs: Any` as "any further parameters").

        Returns:
            The next task's input: `context`, or `context.copy(name=value)`. An entry it lacks is dropped from the flow.
        """

    @property
    def is_transactional(self) -> bool:
        """Whether `run` takes a session whose transaction also writes the checkpoint."""
        return False

    @property
    def is_async(self) -> bool:
        """Whether `run` is a coroutine function."""
        run = self.run
        try:
            return _is_async(getattr(run, "__func__", run))
        except TypeError:  # a callable that cannot be hashed
            return _is_async.__wrapped__(run)


@functools.lru_cache(maxsize=1024)
def _is_async(run: Callable[..., Any]) -> bool:
    """Asked at every attempt, and slow to find out."""
    return inspect.iscoroutinefunction(inspect.unwrap(run))


class TransactionalTask(Task):
    """A unit of work whose effects in the flow's own database and whose checkpoint commit together: exactly once.

    The session belongs to a transaction that the library begins and ends. `session.commit()` and `session.rollback()`
    in the task act on a savepoint within it. What the task does outside that session (mails, HTTP calls) is at least
    once. To schedule a flow from it, pass `session=session`: on SQLite another connection would wait for this very
    transaction to end.
    """

    @abstractmethod
    def run(self, context: ExecutionContext, session: Session) -> ExecutionContext | Awaitable[ExecutionContext]:
        """Do the work through `session`. Arguments and result are else those of `Task.run`."""

    @property
    def is_transactional(self) -> bool:
        return True


class FunctionTask(Task, Generic[P, R]):
    """A function under `@task`. Calling it calls the function, so that it can be tested by itself.

    Args:
        function: its parameters come from the context by name, save one annotated `Session` (it makes the task
            transactional) and one annotated `ExecutionContext` (it receives the whole context).
        name: the task's name; default the function's.
        outputs: the name, or the names, under which its result is added to the context.
        retry, timeout_seconds: as in `Task`.
        namespace: where annotations that are strings are looked up, besides the function's module.

    Raises:
        TemplateError: a signature that cannot be filled from a context.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        outputs: str | Sequence[str] = (),
        retry: RetryPolicy | None = None,
        timeout_seconds: float | None = None,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = valid_name(
            "task", name if name is not None else getattr(function, "__name__", type(function).__name__)
        )
        if retry is not None:
            self.retry = retry
        self.timeout_seconds = timeout_seconds
        signature = _read_signature(function, self.name, namespace or {})
        self._inputs = signature.inputs
        self._is_async = inspect.iscoroutinefunction(inspect.unwrap(function))
        self._context_parameter = signature.context_parameter
        self._session_parameter = signature.session_parameter
        self._single_output = isinstance(outputs, str)
        self._outputs = _declared_outputs(self.name, outputs, signature.returned)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name!r}>"

    def __reduce__(self) -> str:
        # To another process goes the name under which its module has it, never the function.
        return str(self.__dict__["__qualname__"])

    def inputs(self) -> Sequence[TaskDataItem]:
        return self._inputs

    def outputs(self) -> Sequence[TaskDataItem]:
        return self._outputs

    @property
    def is_transactional(self) -> bool:
        return self._session_parameter is not None

    @property
    def is_async(self) -> bool:
        return self._is_async

    def run(
        self, context: ExecutionContext, session: Session | None = None
    ) -> ExecutionContext | Awaitable[ExecutionContext]:
        """Call the function with what it asks for and put its result into the context."""
        result = cast("Callable[..., Any]", self.function)(**self._arguments(context, session))
        if self.is_async:
            return self._when_done(context, cast("Awaitable[Any]", result))
        return self._next_context(context, result)

    async def _when_done(self, context: ExecutionContext, result: Awaitable[Any]) -> ExecutionContext:
        return self._next_context(context, await result)

    def _arguments(self, context: ExecutionContext, session: Session | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for item in self._inputs:
            if item.required or item.name in context:
                arguments[item.name] = (
                    context.get(item.name) if item.type is Any else context.get_as(item.name, item.type)
                )
        if self._context_parameter is not None:
            arguments[self._context_parameter] = context
        if self._session_parameter is not None:
            arguments[self._session_parameter] = session
        return arguments

    def _next_context(self, context: ExecutionContext, result: Any) -> ExecutionContext:
        if inspect.iscoroutine(result):
            result.close()
            raise TaskResultError(self.name, "returned a coroutine that nobody awaits: declare it with async def")
        if isinstance(result, ExecutionContext) and not (self._single_output and self._outputs):
            return result
        names = [item.name for item in self._outputs]
        if self._single_output:
            return context.copy({names[0]: result})
        if names:
            if not isinstance(result, tuple) or len(result) != len(names):
                found = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
                raise TaskResultError(
                    self.name, f"returned {found}; its outputs {names} call for a tuple of {len(names)}"
                )
            return context.copy(dict(zip(names, result, strict=True)))
        if result is not None:
            raise TaskResultError(
                self.name,
                f"returned a {type(result).__name__} but names no outputs, so the value would be lost: "
                'write @task(outputs="a_name"), or return None',
            )
        return context


@overload
def task(function: Callable[P, R], /) -> FunctionTask[P, R]: ...
@overload
def task(
    *,
    name: str | None = None,
    outputs: str | Sequence[str] = (),
    retry: RetryPolicy | None = None,
    timeout_seconds: float | None = None,
) -> Callable[[Callable[P, R]], FunctionTask[P, R]]: ...
def task(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    outputs: str | Sequence[str] = (),
    retry: RetryPolicy | None = None,
    timeout_seconds: float | None = None,
) -> FunctionTask[P, R] | Callable[[Callable[P, R]], FunctionTask[P, R]]:
    """Turn a function into a task: `@task`, or `@task(outputs="receipt", retry=RetryPolicy(max_attempts=5))`.

    Its parameters are taken from the context by name and validated against their annotations, which are its declared
    inputs; a parameter with a default is optional. One annotated `Session` makes it transactional, one annotated
    `ExecutionContext` receives the whole context. `async def` works as well.

    Args:
        name: the task's name; default the function's.
        outputs: the name of the entry its result becomes, or a tuple of names for a tuple of results. Without outputs
            it returns None, or the next `ExecutionContext`.
        retry: when a failed attempt is tried again; default never.
        timeout_seconds: how long one attempt may take; default without limit.

    Raises:
        TemplateError: a signature that cannot be filled from a context.
        InvalidNameError: a name or an output that no task or entry can have.
    """
    # Annotations that are strings may name classes that are local to the function in which @task stands.
    namespace = dict(sys._getframe(1).f_locals)

    def decorate(function: Callable[P, R]) -> FunctionTask[P, R]:
        return FunctionTask(
            function, name=name, outputs=outputs, retry=retry, timeout_seconds=timeout_seconds, namespace=namespace
        )

    return decorate if function is None else decorate(function)


@dataclass(frozen=True)
class _Signature:
    inputs: tuple[TaskDataItem, ...]
    context_parameter: str | None
    session_parameter: str | None
    returned: Any


def _read_signature(function: Callable[..., Any], name: str, namespace: Mapping[str, Any]) -> _Signature:
    if not callable(function) or inspect.isclass(function):
        raise TemplateError(f"@task decorates a function, not {function!r}; a class is a task by deriving from Task")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TemplateError(f"task {name!r} is a generator: a task returns its result, it does not yield")
    hints = _annotations(function, name, namespace)
    items: list[TaskDataItem] = []
    special: dict[str, str] = {}
    for parameter in inspect.signature(function).parameters.values():
        annotation = hints.get(parameter.name, Any)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TemplateError(
                f"task {name!r} has the parameter {parameter}: parameters are filled from the context by name, so it "
                "can have neither *args, **kwargs nor positional-only ones; annotate one ExecutionContext for all"
            )
        kind = _special_kind(annotation, name)
        if kind is None:
            items.append(TaskDataItem(parameter.name, annotation, required=parameter.default is parameter.empty))
        elif kind in special:
            raise TemplateError(f"task {name!r} has two parameters annotated {kind}: {special[kind]}, {parameter.name}")
        else:
            special[kind] = parameter.name
    return _Signature(tuple(items), special.get("ExecutionContext"), special.get("Session"), hints.get("return", Any))


def _annotations(function: Callable[..., Any], name: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, localns=dict(namespace), include_extras=True)
    except NameError as error:
        raise TemplateError(f"task {name!r} has an annotation that names nothing known here: {error}") from error
    except TypeError:
        return {}  # a callable that carries no annotations: partial objects, some callables written in C


def _special_kind(annotation: Any, name: str) -> str | None:
    if not inspect.isclass(annotation) or typing.get_origin(annotation) is not None:  # list[int] is a class on 3.10
        return None
    if issubclass(annotation, ExecutionContext):
        return "ExecutionContext"
    if issubclass(annotation, Session):
        return "Session"
    if any(base.__name__ == "AsyncSession" for base in annotation.__mro__):
        raise TemplateError(
            f"task {name!r} asks for an AsyncSession: annotate it Session, which async tasks get as well"
        )
    return None


def _declared_outputs(name: str, outputs: str | Sequence[str], returned: Any) -> tuple[TaskDataItem, ...]:
    if isinstance(outputs, str):
        return (TaskDataItem(outputs, returned),)
    if not isinstance(outputs, Iterable):
        raise TemplateError(f"task {name!r} has outputs={outputs!r}: a name, or a tuple of names")
    names = tuple(valid_name("context entry", each) for each in outputs)
    if len(set(names)) != len(names):
        raise TemplateError(f"task {name!r} names an output twice: {list(names)}")
    types = typing.get_args(returned) if typing.get_origin(returned) is tuple else ()
    if len(types) != len(names) or Ellipsis in types:
        types = (Any,) * len(names)
    return tuple(TaskDataItem(each, type_) for each, type_ in zip(names, types, strict=True))
