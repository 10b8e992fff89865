"""Every error this library raises, under one root.

Each class also subclasses the built-in exception a caller would expect, carries its values as attributes, and says what
was found, what was expected and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


class EbbsError(Exception):
    """The root of all errors of this library: `except EbbsError` catches each of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Made of its message and attributes, not of its arguments: it travels between processes as it is.
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        # KeyError shows its argument's repr; a message is to be read as it was written.
        return str(self.args[0]) if self.args else ""


# --- the context and its values -----------------------------------------------------------------------------------


class InvalidNameError(EbbsError, ValueError):
    """A name (of an entry, a task, a template, a queue) that cannot be stored.

    Attributes:
        kind: what was being named, for example `"context entry"`.
        name: the name as it was given.
    """

    def __init__(self, kind: str, name: object, problem: str) -> None:
        self.kind = kind
        self.name = name
        super().__init__(f"{kind} name {_shown(name)} {problem}")


class DuplicateEntryError(EbbsError, ValueError):
    """The context already has an entry of this name; entries are never overwritten silently.

    Attributes:
        name: the entry that is already there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"the context already has an entry {name!r}: choose another name, "
            f"or replace it on purpose with context.without({name!r}).copy({name}=...)"
        )


class MissingEntryError(EbbsError, KeyError):
    """The context has no entry of this name.

    Attributes:
        name: the entry that was asked for.
        present: the names that are there.
    """

    def __init__(self, name: object, present: Iterable[str]) -> None:
        self.name = name
        self.present = tuple(present)
        there = ", ".join(repr(entry) for entry in self.present[:20]) or "none"
        more = f" and {len(self.present) - 20} more" if len(self.present) > 20 else ""
        super().__init__(f"the context has no entry {_shown(name)}; it has: {there}{more}")


class FrozenContextError(EbbsError, TypeError):
    """The context handed to a task is read-only; a task adds entries by returning a copy."""

    def __init__(self, name: object) -> None:
        self.name = name
        super().__init__(
            f"this context is read-only, so {_shown(name)} cannot be set: return context.copy(a_name=...) instead"
        )


class InvalidContextError(EbbsError, TypeError):
    """What was given as the entries of a context is no mapping of names to values.

    Attributes:
        found: the class of what was given.
    """

    def __init__(self, given: object) -> None:
        self.found = type(given)
        super().__init__(
            f"the entries of a context are a mapping of names to values, not {type(given).__name__}: "
            f'use ExecutionContext({{"order_id": 17}}) or ExecutionContext(order_id=17)'
        )


class InvalidEntryError(EbbsError, ValueError):
    """An entry's value does not fit the type it was asked for as.

    Attributes:
        name: the entry.
        expected: the type that was asked for.
    """

    def __init__(self, name: str, expected: object, problem: str) -> None:
        self.name = name
        self.expected = expected
        self.problem = problem
        super().__init__(f"entry {name!r} is not a valid {_type_name(expected)}: {problem}")


class UnserializableValueError(EbbsError, ValueError, TypeError):
    """A value that cannot be stored: not one of the supported types, circular, or nested too deeply.

    A `TypeError` as `json.dumps` raises for an unsupported type, and a `ValueError` as it raises for a circular value.

    Attributes:
        path: where the value stands, for example `order.lines[3].price`.
        value_type: the class of the value that stopped the encoding.
    """

    def __init__(self, path: str, value_type: type, problem: str) -> None:
        self.path = path
        self.value_type = value_type
        super().__init__(f"{path} cannot be stored: {problem}")


class UnknownTypeError(EbbsError, TypeError):
    """A stored value names a type that is not registered in this process. The stored value is intact.

    Attributes:
        entry: the entry, `None` where a value was decoded outside a context.
        type_name: the name under which the type was stored.
    """

    def __init__(self, entry: str | None, type_name: str) -> None:
        self.entry = entry
        self.type_name = type_name
        where = f"entry {entry!r}" if entry is not None else "the value"
        super().__init__(
            f"{where} was stored as type {type_name!r}, which is not registered in this process: call "
            f'register_type(YourClass, name="{type_name}") or register the template that declares it'
        )


class UndecodableValueError(EbbsError, ValueError):
    """A stored value does not fit the registered type it names (its class has changed, or the row was altered).

    Attributes:
        entry: the entry, `None` where a value was decoded outside a context.
        type_name: the name under which the type was stored.
    """

    def __init__(self, entry: str | None, type_name: str, problem: str) -> None:
        self.entry = entry
        self.type_name = type_name
        self.problem = problem
        where = f"entry {entry!r}" if entry is not None else "the value"
        super().__init__(f"{where} cannot be read back as {type_name!r}: {problem}")


class TypeRegistrationError(EbbsError, ValueError):
    """A type or codec cannot be registered: its name is taken by another class, or it is of no use as one."""


class InvalidArgumentError(EbbsError, ValueError, TypeError):
    """An argument that is of the wrong type or out of range; nothing was written.

    Attributes:
        argument: the parameter's name.
        value: what was given.
    """

    def __init__(self, argument: str, value: object, expected: str) -> None:
        self.argument = argument
        self.value = value
        super().__init__(f"{argument}={_shown(value)} cannot be used: expected {expected}")


# --- tasks and templates ------------------------------------------------------------------------------------------


class TemplateError(EbbsError, ValueError):
    """A template, or a task in it, is not well formed: nothing of it was registered."""


class UnknownTemplateError(EbbsError, ValueError):
    """No template of this name is registered with this runner.

    Attributes:
        name: the template that was asked for.
        registered: the names that are registered.
    """

    def __init__(self, name: object, registered: Iterable[str]) -> None:
        self.name = name
        self.registered = tuple(sorted(registered))
        there = ", ".join(repr(template) for template in self.registered) or "none"
        super().__init__(
            f"no template {_shown(name)} is registered; registered: {there}. "
            "Call runner.register_flow_template(template) first"
        )


class DuplicateTemplateError(EbbsError, ValueError):
    """A template of this name is registered already.

    Attributes:
        name: the name that is taken.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"a template {name!r} is registered already: give this one another name")


class MissingInputError(EbbsError, ValueError):
    """A flow was scheduled without entries that its template needs. Nothing was written.

    Attributes:
        template_name: the template.
        missing: the names of the inputs that the context lacks.
    """

    def __init__(self, template_name: str, missing: Sequence[str], present: Iterable[str]) -> None:
        self.template_name = template_name
        self.missing = tuple(missing)
        there = ", ".join(repr(entry) for entry in present) or "none"
        wanted = ", ".join(repr(entry) for entry in missing)
        super().__init__(f"flow {template_name!r} needs the entries {wanted}; the context has: {there}")


class TemplateMismatchError(EbbsError, ValueError):
    """The template no longer begins with the tasks that this execution has completed, so it cannot go on.

    Attributes:
        template_name: the template.
        completed: names of the tasks that the execution has completed, in order.
        current: names of the tasks that the template has now, in order.
    """

    def __init__(self, template_name: str, completed: Sequence[str], current: Sequence[str]) -> None:
        self.template_name = template_name
        self.completed = tuple(completed)
        self.current = tuple(current)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(completed, current, strict=False)))
        super().__init__(
            f"template {template_name!r} has changed under this execution: it completed {list(completed)}, the "
            f"template is now {list(current)}. Deploy a template that begins with the completed tasks, or reschedule "
            f"from the first of them that differs, from_task={completed[same]!r}"
        )


class TaskResultError(EbbsError, TypeError):
    """What a task returned cannot be the next task's input; the attempt fails and is not retried.

    Attributes:
        task_name: the task.
    """

    def __init__(self, task_name: str, problem: str) -> None:
        self.task_name = task_name
        self.problem = problem
        super().__init__(f"task {task_name!r} {problem}")


class TaskTimeoutError(EbbsError, TimeoutError):
    """A task ran past its `timeout_seconds`.

    Attributes:
        task_name: the task.
        timeout_seconds: its limit.
    """

    def __init__(self, task_name: str, timeout_seconds: float) -> None:
        self.task_name = task_name
        self.timeout_seconds = timeout_seconds
        super().__init__(f"task {task_name!r} ran past its limit of {timeout_seconds:g} seconds")


class FlowTimeoutError(EbbsError, TimeoutError):
    """An execution ran past the `timeout_seconds` of its template; it is parked as FAILED, whatever its tasks allow.

    Attributes:
        template_name: the template.
        timeout_seconds: its limit.
    """

    def __init__(self, template_name: str, timeout_seconds: float) -> None:
        self.template_name = template_name
        self.timeout_seconds = timeout_seconds
        super().__init__(
            f"the flow ran past the limit of {timeout_seconds:g} seconds that template {template_name!r} sets; "
            "a re-run by hand has the whole limit again"
        )


class StopRequestedError(EbbsError, RuntimeError):
    """Raised by `raise_if_stop_requested` in a task that is to stop: the attempt ends, and what it would return is not
    wanted any more.

    Attributes:
        why: what asked it to stop.
    """

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"this attempt is to stop: {why}")


class WorkerStateError(EbbsError, RuntimeError):
    """What was asked of a worker does not fit its state, for example to run it twice at once."""


# --- executions ---------------------------------------------------------------------------------------------------


class UnknownExecutionError(EbbsError, ValueError):
    """There is no execution (or no such attempt of it) in this database.

    Attributes:
        execution_id: the id that was asked for.
    """

    def __init__(self, execution_id: object, detail: str = "") -> None:
        self.execution_id = execution_id
        super().__init__(f"no flow execution {_shown(execution_id)} in this database{detail}")


class TransitionError(EbbsError, ValueError):
    """The execution's status does not allow what was asked for. Nothing was written.

    Attributes:
        execution_id: the execution.
        found: its status now.
        wanted: the status that was asked for.
    """

    def __init__(self, execution_id: int, found: str, wanted: str, hint: str = "") -> None:
        self.execution_id = execution_id
        self.found = found
        self.wanted = wanted
        super().__init__(
            f"execution {execution_id} is {found} and cannot become {wanted}" + (f": {hint}" if hint else "")
        )


class LeaseLostError(EbbsError, RuntimeError):
    """The execution was claimed by another worker, or ended, since this one claimed it: the write was refused.

    Attributes:
        execution_id: the execution.
        epoch: the epoch under which the write was tried.
    """

    def __init__(self, execution_id: int, epoch: int) -> None:
        self.execution_id = execution_id
        self.epoch = epoch
        super().__init__(
            f"execution {execution_id} is no longer held under epoch {epoch}: it was claimed again, cancelled or ended "
            f"meanwhile, so nothing of this attempt was written"
        )


# --- the database -------------------------------------------------------------------------------------------------


class SchemaError(EbbsError, RuntimeError):
    """The database's schema is missing or older than this release needs.

    Attributes:
        found: the revision in the database, `None` where there is none.
        expected: the revision this release needs.
    """

    def __init__(self, found: str | None, expected: str) -> None:
        self.found = found
        self.expected = expected
        state = "There is no schema of this library here" if found is None else f"Schema is at {found}"
        super().__init__(f'{state}, this release needs {expected}: run "ebbs db upgrade".')


class MigrationError(EbbsError, ValueError):
    """The migrations cannot go to the revision that was asked for.

    Attributes:
        revision: that revision.
    """

    def __init__(self, revision: object, problem: str) -> None:
        self.revision = revision
        super().__init__(f"the schema cannot be brought to revision {_shown(revision)}: {problem}")


class MigrationTimeoutError(EbbsError, TimeoutError):
    """A migration gave up waiting, or was cut off: nothing of it was done.

    Attributes:
        limit: the argument that bounds it, `"lock_timeout_seconds"` or `"statement_timeout_seconds"`.
        timeout_seconds: its value, `None` where the session has a bound of its own.
    """

    def __init__(self, limit: str, timeout_seconds: float | None, found: str, next_step: str) -> None:
        self.limit = limit
        self.timeout_seconds = timeout_seconds
        within = "the time that its session sets" if timeout_seconds is None else f"{timeout_seconds:g} seconds"
        super().__init__(
            f"the schema was not changed: {found} within {within}: {next_step}, and run this again, or allow more with "
            f"{limit}"
        )


class DatabaseUrlError(EbbsError, ValueError):
    """A database URL or engine that cannot be used."""


def _restored(cls: type[EbbsError], args: tuple[Any, ...], attributes: dict[str, Any]) -> EbbsError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def _shown(value: object) -> str:
    """A value that a caller gave, as a message shows it: whatever it is, and at most 80 characters of it."""
    try:
        shown = repr(value)
    except Exception:  # a repr is code of the value's class; an int of many digits refuses as well
        return f"<a {type(value).__name__} that cannot be shown>"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _type_name(expected: object) -> str:
    return getattr(expected, "__qualname__", None) or str(expected)
