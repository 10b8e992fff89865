"""Errors: one root, and they travel between processes."""

from __future__ import annotations

import pickle

import pytest

from ebbs_and_flows import errors
from ebbs_and_flows.errors import EbbsError

EXAMPLES: list[EbbsError] = [
    errors.InvalidNameError("task", "", "must not be blank"),
    errors.DuplicateEntryError("a"),
    errors.MissingEntryError("a", ["b"]),
    errors.FrozenContextError("a"),
    errors.InvalidContextError(3),
    errors.InvalidEntryError("a", int, "not a number"),
    errors.UnserializableValueError("a.b", object, "it is a lock"),
    errors.UnknownTypeError("a", "shop.Order"),
    errors.UndecodableValueError("a", "shop.Order", "a field is missing"),
    errors.TypeRegistrationError("taken"),
    errors.InvalidArgumentError("delay", -1, "a delay"),
    errors.TemplateError("no tasks"),
    errors.UnknownTemplateError("a", ["b"]),
    errors.DuplicateTemplateError("a"),
    errors.MissingInputError("t", ["a"], ["b"]),
    errors.TemplateMismatchError("t", ["a"], ["b"]),
    errors.TaskResultError("t", "returned None"),
    errors.FlowTimeoutError("order", 3600),
    errors.StopRequestedError("its worker is stopping"),
    errors.WorkerStateError("this worker is running already"),
    errors.TaskTimeoutError("t", 3.0),
    errors.UnknownExecutionError(17),
    errors.TransitionError(17, "FAILED", "RUNNING"),
    errors.LeaseLostError(17, 2),
    errors.SchemaError(None, "ebbs_0001"),
    errors.MigrationError("9999", "there is none"),
    errors.MigrationTimeoutError("lock_timeout_seconds", 10.0, "a lock was not free", "look for long transactions"),
    errors.DatabaseUrlError("no URL"),
]


def test_every_error_has_an_example_here() -> None:
    kinds = {each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, EbbsError)}
    assert kinds - {EbbsError} == {type(each) for each in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_after_a_journey_between_processes(error: EbbsError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_is_a_built_in_one_as_well(error: EbbsError) -> None:
    assert isinstance(error, (ValueError, KeyError, TypeError, RuntimeError, TimeoutError))
