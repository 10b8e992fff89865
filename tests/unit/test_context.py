"""The context: names, reading, copies, and what is stored of it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, Field

from ebbs_and_flows.codec import EncodedValue, dumps_entries, loads_entries, register_type
from ebbs_and_flows.context import ContextDelta, ExecutionContext
from ebbs_and_flows.errors import (
    DuplicateEntryError,
    EbbsError,
    FrozenContextError,
    InvalidContextError,
    InvalidEntryError,
    InvalidNameError,
    MissingEntryError,
    UndecodableValueError,
    UnknownTypeError,
    UnserializableValueError,
)


@register_type
class Order(BaseModel):
    order_id: int
    lines: list[str] = []


class Name(str, Enum):
    TOTAL = "total"


UNKNOWN = EncodedValue({"secret": 1}, "shop.Gone")


def frozen(**entries: Any) -> ExecutionContext:
    """What a task is given: through the stored texts, as from the database."""
    return ExecutionContext.from_encoded(loads_entries(*dumps_entries(ExecutionContext(entries).encode())))


def after(base: ExecutionContext, returned: ExecutionContext) -> ExecutionContext:
    return base.fold(returned.delta_from(base))


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", " ", "\t", "\u2003", "a\nb", "a\x00", "\x7f", "\x85", "\ud800", "x" * 256, 3, None, b"x", ("a",)]
)
def test_a_name_that_cannot_be_stored_is_refused(name: Any) -> None:
    with pytest.raises(InvalidNameError):
        ExecutionContext({name: 1})
    with pytest.raises(InvalidNameError):
        ExecutionContext().set(name, 1)
    with pytest.raises(InvalidNameError):
        ExecutionContext().copy({name: 1})
    assert name not in ExecutionContext(a=1)
    assert ExecutionContext(a=1).get(name, default=5) == 5
    with pytest.raises(MissingEntryError):
        ExecutionContext(a=1).get(name)


@pytest.mark.parametrize(
    "name", ["order id", "größe", "注文", "a.b", "$type", "x" * 255, "\U0001f600", "'\"\\", "self", "mapping"]
)
def test_any_other_name_is_kept(name: str) -> None:
    context = ExecutionContext(**{name: 1})
    assert list(context) == [name]
    assert after(frozen(), context)[name] == 1
    assert frozen(**{name: 2}).get(name) == 2


def test_names_are_normalised_when_set_and_when_looked_up() -> None:
    context = ExecutionContext({"e\u0301": 1})
    assert list(context) == ["\u00e9"]
    assert context["e\u0301"] == context["\u00e9"] == 1
    assert "e\u0301" in context
    assert len(context.without("e\u0301")) == 0
    with pytest.raises(DuplicateEntryError):
        context.set("\u00e9", 2)


def test_a_name_is_a_plain_str() -> None:
    context = ExecutionContext({Name.TOTAL: 1})
    assert [type(name) for name in context] == [str]
    assert context["total"] == context[Name.TOTAL] == 1


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_context_is_a_mapping() -> None:
    for context in (ExecutionContext({"a": 1}, b=[2]), frozen(a=1, b=[2])):
        assert isinstance(context, Mapping)
        assert dict(context) == {"a": 1, "b": [2]}
        assert dict(**context) == {"a": 1, "b": [2]}
        assert list(context.items()) == [("a", 1), ("b", [2])]
        assert list(context.values()) == [1, [2]]
        assert len(context) == 2
        assert context == {"a": 1, "b": [2]}
        assert context != {"a": 1}
        assert context != 3
        with pytest.raises(TypeError):
            hash(context)


def test_what_is_no_mapping_is_refused() -> None:
    for found in ([("a", 1)], "a", 3, {"a"}):
        with pytest.raises(InvalidContextError):
            ExecutionContext(found)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            ExecutionContext().copy(found)  # type: ignore[arg-type]


def test_a_missing_entry_names_itself_and_those_present() -> None:
    for context in (ExecutionContext(a=1), frozen(a=1)):
        with pytest.raises(KeyError, match=r"no entry 'b'; it has: 'a'"):
            context.get("b")
        with pytest.raises(MissingEntryError):
            context["b"]
        assert context.get("b", default=None) is None
        assert context.get("b", 3) == 3
        assert context.get("a", 3) == 1


def test_an_entry_is_never_overwritten() -> None:
    context = ExecutionContext(total=1)
    with pytest.raises(ValueError, match="total"):
        context.set("total", 2)
    with pytest.raises(DuplicateEntryError):
        context.copy(total=2)
    with pytest.raises(DuplicateEntryError):
        frozen(total=1).copy({"total": 2})
    with pytest.raises(DuplicateEntryError):
        ExecutionContext({"a": 1}, a=2)
    assert context["total"] == 1


def test_get_as_validates_and_coerces() -> None:
    context = frozen(order={"order_id": "3"}, count="17", nothing=None, ready=Order(order_id=1))
    assert context.get_as("order", Order) == Order(order_id=3)
    assert context.get_as("ready", Order) == Order(order_id=1)
    assert context.get_as("count", int) == 17
    assert context.get_as("nothing", int | None) is None
    assert context.get_as("count", Annotated[int, Field(gt=3)]) == 17
    assert context.get_as("count", Annotated[Any, []]) == "17"
    with pytest.raises(InvalidEntryError) as caught:
        context.get_as("order", int)
    assert caught.value.name == "order"
    assert caught.value.expected is int
    assert caught.value.__cause__ is not None
    with pytest.raises(MissingEntryError):
        context.get_as("absent", int)


def test_get_as_does_not_show_the_value() -> None:
    with pytest.raises(InvalidEntryError) as caught:
        ExecutionContext(key={"order_id": "hunter2"}).get_as("key", Order)
    assert "hunter2" not in str(caught.value)
    assert "order_id" in str(caught.value)


def test_get_as_takes_types_that_pydantic_does_not_know() -> None:
    context = ExecutionContext(array=np.zeros(2), lock=threading.Event(), text="\ud800")
    assert context.get_as("array", np.ndarray) is context["array"]
    assert context.get_as("lock", threading.Event) is context["lock"]
    assert context.get_as("text", str) == "\ud800"
    for wrong in (np.ndarray, list[np.ndarray], "NoSuchName"):
        with pytest.raises(InvalidEntryError):
            context.get_as("lock", wrong)


# --- the read-only context of a task ------------------------------------------------------------------------------


def test_the_context_of_a_task_is_read_only() -> None:
    context = frozen(a=1)
    assert context.frozen
    assert not ExecutionContext(a=1).frozen
    with pytest.raises(FrozenContextError):
        context.set("b", 2)
    with pytest.raises(TypeError):
        context.set("a", 2)
    assert dict(context) == {"a": 1}


def test_mutating_what_was_read_changes_nothing_stored() -> None:
    context = frozen(items=[1, {"a": [2]}], order=Order(order_id=1, lines=["x"]))
    before = context.encode()
    context["items"].append(3)
    context["items"][1]["a"].clear()
    context["order"].lines.append("y")
    context.get_as("order", Order).lines.append("y")
    assert context["items"] == [1, {"a": [2]}]
    assert context["order"].lines == ["x"]
    assert context.encode() == before


def test_an_entry_of_unknown_type_does_not_hurt_the_others() -> None:
    context = ExecutionContext.from_encoded({"gone": UNKNOWN, "a": EncodedValue(1, "int")})
    assert context["a"] == 1
    assert "gone" in context
    assert list(context) == ["gone", "a"]
    for each in (context, context.copy()):
        with pytest.raises(UnknownTypeError) as caught:
            each["gone"]
        assert (caught.value.entry, caught.value.type_name) == ("gone", "shop.Gone")
        assert each.encode()["gone"] is UNKNOWN
    assert after(context, context.copy(b=2)).encode()["gone"] is UNKNOWN


def test_an_altered_entry_is_an_error_with_its_name() -> None:
    context = ExecutionContext.from_encoded({"when": EncodedValue("soon", "datetime")})
    with pytest.raises(UndecodableValueError, match="when"):
        context["when"]


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ExecutionContext, frozen])
def test_a_copy_is_independent(make: Any) -> None:
    original = make(items=[[1]])
    copied = original.copy({"more": 2}, again=3)
    copied["items"][0].append(2)
    copied.set("new", 1)
    assert dict(copied) == {"items": [[1, 2]], "more": 2, "again": 3, "new": 1}
    assert dict(original) == {"items": [[1]]}
    second = copied.copy()
    second["items"].append(9)
    assert copied["items"] == [[1, 2]]
    assert not copied.frozen
    assert ExecutionContext(copied) == copied
    third = ExecutionContext(copied)
    third["items"].append(9)
    assert copied["items"] == [[1, 2]]


def test_a_value_that_cannot_be_copied_is_shared() -> None:
    lock = threading.Lock()
    assert ExecutionContext(lock=lock).copy()["lock"] is lock


def test_without_leaves_entries_out() -> None:
    for context in (ExecutionContext(a=1, b=[2], c=3), frozen(a=1, b=[2], c=3)):
        smaller = context.without("a", "c")
        assert dict(smaller) == {"b": [2]}
        smaller["b"].append(1)
        smaller.set("a", 5)
        assert dict(context) == {"a": 1, "b": [2], "c": 3}
        with pytest.raises(MissingEntryError):
            context.without("a", "absent")
        assert context.without() == context


# --- storing ------------------------------------------------------------------------------------------------------


def test_the_path_of_a_bad_value_begins_with_its_entry() -> None:
    with pytest.raises(UnserializableValueError) as caught:
        ExecutionContext(order={"lines": [1, lambda: 1]}).encode()
    assert caught.value.path == "order['lines'][1]"


def test_what_was_only_read_is_stored_as_the_same_object() -> None:
    base = frozen(a=1, items=[1], order=Order(order_id=1))
    returned = base.copy()
    assert returned["items"] == [1]
    assert returned["order"].order_id == 1
    encoded = returned.encode()
    assert all(encoded[name] is base.encode()[name] for name in base)
    assert returned.copy().delta_from(base) == ContextDelta({})


def test_a_delta_has_what_was_added_changed_and_dropped() -> None:
    base = frozen(kept=1, items=[1], gone=2, same="x")
    returned = base.copy(new=Decimal("1"))
    returned["items"].append(2)
    returned = returned.without("gone", "same").copy(same="x")
    delta = returned.delta_from(base)
    assert {name: encoded.node for name, encoded in delta.entries.items()} == {"items": [1, 2], "new": "1"}
    assert delta.dropped == ("gone",)
    folded = base.fold(delta)
    assert folded.frozen
    assert list(folded) == ["kept", "same", "items", "new"]
    assert folded == returned
    assert base == {"kept": 1, "items": [1], "gone": 2, "same": "x"}


def test_a_change_of_type_alone_is_a_change() -> None:
    base = frozen(a=1)
    assert base.without("a").copy(a=1.0).delta_from(base).entries.keys() == {"a"}
    assert base.without("a").copy(a=True).delta_from(base).entries.keys() == {"a"}
    assert base.without("a").copy(a=1).delta_from(base).entries == {}


def test_a_task_that_returns_a_new_context_drops_the_rest() -> None:
    base = frozen(a=1, b=2)
    assert dict(after(base, ExecutionContext(c=3))) == {"c": 3}
    assert ExecutionContext(b=2).delta_from(base) == ContextDelta({}, ("a",))
    assert base.delta_from(base) == ContextDelta({}, ())


def test_the_first_context_is_a_delta_from_nothing() -> None:
    nothing = ExecutionContext.from_encoded({})
    assert after(nothing, ExecutionContext(a=1, b=[2])) == {"a": 1, "b": [2]}


# --- as an object -------------------------------------------------------------------------------------------------


def test_equality_holds_between_live_and_stored_and_never_raises_for_unknown_types() -> None:
    live, stored = ExecutionContext(a=[1], b="x"), frozen(b="x", a=[1])
    assert live == stored
    assert stored == live
    assert stored == frozen(a=[1], b="x")
    assert frozen(a=1) != frozen(a=2)
    assert frozen(a=1) != frozen(b=1)
    unknown = ExecutionContext.from_encoded({"gone": UNKNOWN})
    assert unknown == ExecutionContext.from_encoded({"gone": EncodedValue({"secret": 1}, "shop.Gone")})
    assert unknown == unknown.copy()
    assert unknown != ExecutionContext(gone={"secret": 1})
    assert unknown != {"gone": 1}
    assert frozen(a=float("nan")) == frozen(a=float("nan"))


def test_repr_shows_names_and_types_but_no_values() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    context = ExecutionContext.from_encoded({"gone": UNKNOWN, "a": EncodedValue(1, "int")}).copy(r=Rude(), s="hunter2")
    assert repr(context) == "<ExecutionContext gone: shop.Gone, a: int, r: Rude, s: str>"
    assert "hunter2" not in repr(context)
    assert len(repr(ExecutionContext({f"name{n}": n for n in range(1000)}))) < 1000
    assert repr(ExecutionContext()) == "<ExecutionContext, empty>"


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda context: pickle.loads(pickle.dumps(context))])
def test_pickle_and_deepcopy_keep_what_it_is(clone: Any) -> None:
    live = ExecutionContext(items=[1])
    cloned = clone(live)
    assert cloned == live
    cloned["items"].append(2)
    cloned.set("b", 1)
    assert dict(live) == {"items": [1]}
    stored = ExecutionContext.from_encoded({"gone": UNKNOWN, "items": EncodedValue([1], "list")})
    cloned = clone(stored)
    assert cloned.frozen
    assert cloned == stored
    mixed = stored.copy(new={1})
    assert mixed["items"] == [1]
    assert clone(mixed).delta_from(stored).entries.keys() == {"new"}


def test_errors_are_under_one_root() -> None:
    for error in (DuplicateEntryError, FrozenContextError, InvalidContextError, InvalidNameError, MissingEntryError):
        assert issubclass(error, EbbsError)


# --- the delta of a copy is that of its entries, however it came about ---

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("copy"), st.sampled_from("abcxyz")),
        st.tuples(st.just("without"), st.sampled_from("abcxyz")),
        st.tuples(st.just("mutate"), st.sampled_from("abcxyz")),
        st.tuples(st.just("set"), st.sampled_from("abcxyz")),
    ),
    max_size=8,
)


@given(steps=_STEPS)
def test_what_a_copy_remembers_of_its_base_gives_the_same_delta_as_a_comparison(steps: list[tuple[str, str]]) -> None:
    base = ExecutionContext.from_encoded(ExecutionContext({name: [name] for name in "abc"}).encode())
    context = base
    for number, (step, name) in enumerate(steps):
        if step == "copy" and name not in context:
            context = context.copy({name: [name] if number % 2 else number})
        elif step == "without" and name in context:
            context = context.without(name)
        elif step == "mutate" and name in context and isinstance(context[name], list):
            context[name].append(number)
        elif step == "set" and name not in context and not context.frozen:
            context.set(name, number)
    remembered = context.delta_from(base)
    compared = context.delta_from(ExecutionContext.from_encoded(base.encode()))
    assert remembered.entries == compared.entries
    assert set(remembered.dropped) == set(compared.dropped)
    assert base.fold(remembered) == context
    assert dict(base) == {name: [name] for name in "abc"}
