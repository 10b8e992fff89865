"""What is stored, what is refused, and what may come back."""

from __future__ import annotations

import base64
import builtins
import dataclasses
import functools
import gc
import importlib
import importlib.resources
import io
import json
import logging
import pickle
import sqlite3
import subprocess
import sys
import threading
import types
import weakref
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, auto
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Generic, NamedTuple, NewType, Optional, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel, computed_field, create_model
from pydantic.dataclasses import dataclass as pydantic_dataclass

from ebbs_and_flows.codec import (
    MAX_DEPTH,
    EncodedValue,
    PickleCodec,
    TypeRegistry,
    ValueCodec,
    declare_type,
    decode_value,
    dumps_entries,
    encode_value,
    loads_entries,
    register_codec,
    register_type,
)
from ebbs_and_flows.errors import (
    EbbsError,
    TypeRegistrationError,
    UndecodableValueError,
    UnknownTypeError,
    UnserializableValueError,
)

T = TypeVar("T")
UserId = NewType("UserId", int)
Money = Annotated[Decimal, Field(ge=0)]


class Colour(Enum):
    RED = 1
    CRIMSON = 1  # noqa: PIE796  # an alias
    BLUE = "blue"


class Size(IntEnum):
    S = 1
    L = 2


class Rights(Flag):
    READ = auto()
    WRITE = auto()


class Bits(IntFlag):
    ONE = 1


class Line(BaseModel):
    sku: str
    price: Decimal


class Order(BaseModel):
    total: Decimal
    lines: list[Line]
    colour: Colour = Colour.RED
    placed_at: Optional[datetime] = None  # noqa: UP045  # both spellings
    prices: dict[str, Decimal] = {}
    anything: Any = None


@dataclasses.dataclass
class Plain:
    user: UserId
    money: Money
    tags: set[str]
    pair: tuple[Decimal, ...] = ()
    child: Plain | None = None
    when: date | str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any
    items: list[Any] = dataclasses.field(default_factory=list)


class Point(NamedTuple):
    x: Decimal
    y: Any = 0


Pair = namedtuple("Pair", ["left", "right"])  # the untyped kind


class Unregistered(Enum):
    HERE = 1


for _cls in (Colour, Size, Rights, Bits, Order, Plain, Frozen, Point, Pair):
    register_type(_cls)


def stored(value: Any) -> tuple[str, Any]:
    encoded = encode_value(value, "v")
    return encoded.type_name, json.loads(encoded.json_text)


def back(value: Any) -> Any:
    texts = dumps_entries({"v": encode_value(value, "v")})
    found = decode_value(loads_entries(*texts)["v"], "v")
    assert type(found) is type(value)
    return found


def problem_of(value: Any, path: str = "order") -> UnserializableValueError:
    with pytest.raises(UnserializableValueError) as caught:
        encode_value(value, path)
    return caught.value


# --- the stored form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "type_name", "node"),
    [
        (None, "null", None),
        (True, "bool", True),
        (17, "int", 17),
        (1.0, "float", 1.0),
        ("x", "str", "x"),
        (2**2120, "int", hex(2**2120)),
        (-(2**2120), "int", hex(-(2**2120))),
        (float("nan"), "float", "NaN"),
        (float("-inf"), "float", "-Infinity"),
        ("a\x00\\\ud800b", "str:escaped", "a\\u0000\\\\\\ud800b"),
        (b"\x00\xff", "bytes", "AP8="),
        ((1, 2), "tuple", [1, 2]),
        ({3, 1}, "set", [1, 3]),
        (frozenset({"b"}), "frozenset", ["b"]),
        ({"a": 1}, "dict", {"a": 1}),
        ({1: "a", "b": 2}, "dict", [[1, "a"], ["b", 2]]),
        ({"$type": 1}, "dict", [["$type", 1]]),
        ({"\x00": 1}, "dict", [[{"$type": "str:escaped", "value": "\\u0000"}, 1]]),
        ([{"$type": "int"}], "list", [{"$type": "dict", "value": [["$type", "int"]]}]),
        ([{1}, float("inf")], "list", [{"$type": "set", "value": [1]}, {"$type": "float", "value": "Infinity"}]),
        (date(2024, 2, 29), "date", "2024-02-29"),
        (time(1, 2, 3, 4), "time", "01:02:03.000004"),
        (time(1, tzinfo=ZoneInfo("Europe/Berlin")), "time[Europe/Berlin]", "01:00:00"),
        (datetime(2024, 1, 1), "datetime", "2024-01-01T00:00:00"),
        (datetime(2024, 1, 1, tzinfo=timezone.utc), "datetime", "2024-01-01T00:00:00+00:00"),
        (datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")), "datetime[UTC]", "2024-01-01T00:00:00+00:00"),
        (
            datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")),
            "datetime[Europe/Berlin]",
            "2024-07-01T00:00:00+02:00",
        ),
        (
            datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            "datetime[fold=1][Europe/Berlin]",
            "2024-10-27T02:30:00+01:00",
        ),
        (
            datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=2), "a]b")),
            "datetime[name=a%5Db]",
            "2024-01-01T00:00:00+02:00",
        ),
        (datetime(2024, 1, 1, fold=1), "datetime[fold=1]", "2024-01-01T00:00:00"),
        (timedelta(microseconds=-999999), "timedelta", "P-1DT86399.000001S"),
        (timedelta(0), "timedelta", "P0DT0S"),
        (Decimal("-0.00"), "Decimal", "-0.00"),
        (Decimal("sNaN12"), "Decimal", "sNaN12"),
        (UUID(int=1), "UUID", "00000000-0000-0000-0000-000000000001"),
        (Path("a/b"), "Path", "a/b"),
        (Path("a\udcff"), "Path:escaped", "a\\udcff"),
        (PurePosixPath("/x"), "PurePosixPath", "/x"),
        (PureWindowsPath("c:\\x"), "PureWindowsPath", "c:\\x"),
        (Colour.CRIMSON, f"{__name__}.Colour", "RED"),
        (Size.L, f"{__name__}.Size", "L"),
        (Rights.READ | Rights.WRITE, f"{__name__}.Rights", 3),
        (Bits(5), f"{__name__}.Bits", 5),
        (Point(Decimal("1.5"), {2}), f"{__name__}.Point", {"x": "1.5", "y": {"$type": "set", "value": [2]}}),
        (Pair(1, (2,)), f"{__name__}.Pair", {"left": 1, "right": {"$type": "tuple", "value": [2]}}),
    ],
)
def test_each_type_has_its_stored_form_and_comes_back(value: Any, type_name: str, node: Any) -> None:
    assert stored(value) == (type_name, node)
    assert repr(back(value)) == repr(value)


def test_what_the_annotations_of_a_model_say_is_not_said_again() -> None:
    order = Order(
        total=Decimal("12.50"),
        lines=[Line(sku="A", price=Decimal("3.20"))],
        placed_at=datetime(2024, 1, 1, tzinfo=timezone.utc),
        prices={"EUR": Decimal("1")},
        anything=Decimal("2"),
        colour=Colour.BLUE,
    )
    assert stored(order) == (
        f"{__name__}.Order",
        {
            "total": "12.50",
            "lines": [{"sku": "A", "price": "3.20"}],
            "colour": "BLUE",
            "placed_at": "2024-01-01T00:00:00+00:00",
            "prices": {"EUR": "1"},
            "anything": {"$type": "Decimal", "value": "2"},
        },
    )
    assert back(order) == order


def test_a_value_that_its_annotation_does_not_promise_is_tagged() -> None:
    plain = Plain(UserId(1), "free", {"a"}, (Decimal("1"), 2), Plain(UserId(2), Decimal("1"), set()), date(2024, 1, 1))  # type: ignore[arg-type]
    assert stored(plain)[1] == {
        "user": 1,
        "money": {"$type": "str", "value": "free"},
        "tags": ["a"],
        "pair": ["1", {"$type": "int", "value": 2}],
        "child": {"user": 2, "money": "1", "tags": [], "pair": [], "child": None, "when": None},
        "when": {"$type": "date", "value": "2024-01-01"},
    }
    assert back(plain) == plain


def test_a_field_with_a_zone_or_with_unclean_text_keeps_it() -> None:
    order = Order(total=Decimal("1"), lines=[], placed_at=datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")))
    found = back(order)
    assert found.placed_at.tzinfo is ZoneInfo("Europe/Berlin")
    line = Line.model_construct(sku="\ud800", price=Decimal("NaN"))
    assert back(Order.model_construct(total=Decimal("1"), lines=[line])).lines[0].sku == "\ud800"


def test_a_set_is_stored_in_the_order_of_its_texts() -> None:
    assert stored({"b", "a", "c"})[1] == ["a", "b", "c"]
    assert stored({(2,), (1,)})[1] == [{"$type": "tuple", "value": [1]}, {"$type": "tuple", "value": [2]}]


def test_equality_of_encoded_values_is_exact() -> None:
    one = [encode_value(value, "v") for value in (1, 1.0, True, "1", Decimal("1"))]
    assert [[a == b for b in one] for a in one] == [[i == j for j in range(5)] for i in range(5)]
    assert encode_value([1], "v") == encode_value([1], "w")
    assert encode_value([1], "v") != encode_value((1,), "v")
    assert encode_value(1, "v") != 1
    assert len({encode_value(1, "v"), encode_value(1, "v")}) == 1


def test_an_encoded_value_is_immutable() -> None:
    encoded = encode_value([1], "v")
    with pytest.raises(AttributeError):
        encoded.node = 2
    with pytest.raises(AttributeError):
        del encoded.type_name
    assert pickle.loads(pickle.dumps(encoded)) == encoded


def test_each_decoding_is_a_value_of_its_own() -> None:
    value = {"a": [1, [2]]}
    encoded = encode_value(value, "v")
    value["a"].append(3)
    first, second = decode_value(encoded), decode_value(encoded)
    first["a"].append(9)
    first["a"][1].append(9)
    assert second == decode_value(encoded) == {"a": [1, [2]]}


def test_the_number_of_digits_that_python_converts_does_not_matter() -> None:
    before = sys.get_int_max_str_digits()
    values = [10**n for n in (600, 637, 638, 640, 1000, 4299, 4301, 10000)]
    try:
        sys.set_int_max_str_digits(640)
        for value in values:
            texts = dumps_entries({"v": encode_value([value, -value], "v")})
            assert decode_value(loads_entries(*texts)["v"]) == [value, -value]
    finally:
        sys.set_int_max_str_digits(before)


def test_stored_text_is_ascii_json() -> None:
    entries, _ = dumps_entries({"größe": encode_value("ü\U0001f600", "größe")})
    assert entries.isascii()
    assert json.loads(entries) == {"größe": "ü\U0001f600"}


def test_deep_values_come_back_and_sqlite_reads_them() -> None:
    value: list[Any] = []
    for _ in range(299):
        value = [value]
    entries, types_ = dumps_entries({"v": encode_value(value, "v")})
    assert decode_value(loads_entries(entries, types_)["v"]) == value
    with sqlite3.connect(":memory:") as connection:
        assert connection.execute("select json_valid(?)", (entries,)).fetchone() == (1,)
        assert connection.execute("select json_extract(?, '$.v')", (entries,)).fetchone()[0].startswith("[[[")
    connection.close()


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {1: v}, Frozen, lambda v: Pair(v, 1)]
)
def test_what_is_stored_is_never_deeper_than_the_limit(wrap: Any) -> None:
    value: Any = 1
    deepest = 0

    def depth(node: Any) -> int:
        level, rows = 0, [node]
        while rows := [
            child
            for row in rows
            if isinstance(row, (list, dict))
            for child in (row if isinstance(row, list) else row.values())
        ]:
            level += 1
        return level

    for levels in range(1, MAX_DEPTH + 5):
        value = wrap(value)
        try:
            encoded = encode_value(value, "v")
        except UnserializableValueError as error:
            assert "MAX_DEPTH" in str(error)  # noqa: PT017  # after as many that went well
            assert levels > MAX_DEPTH / 3 - 2
            break
        deepest = depth(encoded.node)
        decode_value(encoded)
    else:
        pytest.fail("no limit")
    assert MAX_DEPTH - 6 <= deepest <= MAX_DEPTH


def test_a_deep_call_stack_ends_in_an_error_of_ours() -> None:
    value: list[Any] = []
    for _ in range(299):
        value = [value]
    encoded = encode_value(value, "v")

    def dive(action: Any, levels: int) -> Any:
        return action() if levels == 0 else dive(action, levels - 1)

    with pytest.raises(UnserializableValueError, match="call stack"):
        dive(lambda: encode_value(value, "v"), sys.getrecursionlimit() - 400)
    with pytest.raises(UndecodableValueError, match="call stack"):
        dive(lambda: decode_value(encoded), sys.getrecursionlimit() - 400)


# --- what cannot be stored ----------------------------------------------------------------------------------------


def _generator() -> Iterator[int]:
    yield 1


class Foreign(tzinfo):
    def utcoffset(self, dt: datetime | None) -> timedelta:
        return timedelta(hours=1)


class SubInt(int):
    pass


class SubDatetime(datetime):
    pass


@dataclasses.dataclass
class ListRecord(list):  # type: ignore[type-arg]
    name: str = ""


@pytest.mark.parametrize(
    "value",
    [
        lambda: 1,
        threading.Lock(),
        io.StringIO(),
        _generator(),
        int,
        Order,
        types,
        object(),
        logging.getLogger("x"),
        range(3),
        1j,
        bytearray(b"x"),
        memoryview(b"x"),
        Fraction(1, 2),
        ValueError("x"),
        NotImplemented,
        ...,
        {}.keys(),
        SubInt(3),
        SubDatetime(2024, 1, 1),
        OrderedDict(a=1),
        defaultdict(list),
        UserDict(a=1),
        ListRecord("x"),
        np.int64(3),
        type("S", (str,), {})("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_with_the_path_to_it(value: Any) -> None:
    for holder, path in (
        (value, "order"),
        ([1, [value]], "order[1][0]"),
        ({"a": (value,)}, "order['a'][0]"),
        (Order.model_construct(total=value, lines=[]), "order.total"),
        ({("k", 1): value}, "order[<tuple>]"),
        ({3: value}, "order[3]"),
    ):
        problem = problem_of(holder)
        assert problem.path == path
        assert problem.value_type is type(value)
        assert "register_codec" in str(problem)
        assert str(problem).startswith(path)


def test_the_path_reads_as_python_does() -> None:
    lines = [Line(sku="a", price=Decimal("1"))] * 3 + [Line.model_construct(sku="a", price=object())]
    assert problem_of(Order.model_construct(total=Decimal("1"), lines=lines)).path == "order.lines[3].price"
    assert problem_of({"EUR": object()}, "prices").path == "prices['EUR']"
    assert problem_of({(object(),): 1}).path == "order[<tuple>] (the key)[0]"
    assert problem_of([{object()}]).path == "order[0]{...}"


def test_a_circular_value_is_refused_where_it_closes() -> None:
    circle: list[Any] = [1]
    circle.append({"again": (circle,)})
    problem = problem_of(circle)
    assert "circular" in str(problem)
    assert problem.path == "order[1]['again'][0]"
    node = Frozen(None)
    node.items.append(node)
    assert "circular" in str(problem_of(node))


def test_a_value_that_occurs_twice_is_not_circular() -> None:
    shared = [1]
    assert back([shared, shared, (shared,)]) == [[1], [1], ([1],)]


def test_zones_that_would_not_come_back_are_refused() -> None:
    problem = problem_of([datetime(2024, 1, 1, tzinfo=Foreign())])
    assert problem.path == "order[0]"
    assert "zoneinfo.ZoneInfo" in str(problem)
    with (importlib.resources.files("tzdata") / "zoneinfo" / "UTC").open("rb") as file:
        for key in (None, "Europe/Berlin"):
            file.seek(0)
            zone = ZoneInfo.from_file(file, key=key)
            assert "ZoneInfo(" in str(problem_of(datetime(2024, 1, 1, tzinfo=zone)))


def test_user_code_that_raises_is_named_with_the_path() -> None:
    class HostileError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    @dataclasses.dataclass
    class Moody:
        field: int = 0

        def __getattribute__(self, name: str) -> Any:
            if name == "field":
                raise HostileError
            return object.__getattribute__(self, name)

    problem = problem_of([Moody()])
    assert problem.path == "order[0]"
    assert isinstance(problem.__cause__, HostileError)

    class Interrupting:
        pass

    class Codec:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def encode(self, value: Any) -> Any:
            raise self.error

        def decode(self, encoded: Any) -> Any:
            raise self.error

    registry = TypeRegistry()
    registry.register_codec(Interrupting, Codec(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        encode_value(Interrupting(), "v", registry=registry)
    registry.register_codec(Interrupting, Codec(ZeroDivisionError("x")))
    with pytest.raises(UnserializableValueError) as caught:
        encode_value([Interrupting()], "v", registry=registry)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.path == "v[0]"
    with pytest.raises(UndecodableValueError) as undecodable:
        decode_value(EncodedValue(1, f"{__name__}.{Interrupting.__qualname__}"), "e", registry=registry)
    assert isinstance(undecodable.value.__cause__, ZeroDivisionError)
    assert undecodable.value.entry == "e"


# --- records ------------------------------------------------------------------------------------------------------


def test_a_dataclass_comes_back_without_running_its_code() -> None:
    ran = []

    @register_type
    @dataclasses.dataclass
    class Counting:
        name: str
        hidden: int = dataclasses.field(init=False)
        never: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            ran.append(self.name)
            self.hidden = 3
            self.beside = {1}

        @functools.cached_property
        def length(self) -> int:
            return len(self.name)

    value = Counting("abc")
    assert value.length == 3
    found = back(value)
    assert ran == ["abc"]
    assert found.__dict__ == {"name": "abc", "hidden": 3, "beside": {1}}
    assert found.length == 3


def test_slots_and_frozen_and_inheritance_come_back() -> None:
    @dataclasses.dataclass
    class Base:
        __slots__ = ("cache", "name")
        name: str

    @register_type
    @dataclasses.dataclass
    class Sub(Base):
        more: int = 0

    value = Sub("a", 2)
    value.cache = [1]  # type: ignore[attr-defined]
    found = back(value)
    assert (found.name, found.more, found.cache) == ("a", 2, [1])
    assert back(Frozen((1,), [2])) == Frozen((1,), [2])


def test_a_missing_field_gets_its_default_and_a_required_one_is_an_error() -> None:
    name = f"{__name__}."
    assert decode_value(
        EncodedValue({"value": 1, "gone": {"$type": "no.such", "value": 1}}, name + "Frozen")
    ) == Frozen(1)
    assert decode_value(EncodedValue({"x": "1"}, name + "Point")) == Point(Decimal("1"), 0)
    order = decode_value(EncodedValue({"total": "1", "lines": []}, name + "Order"))
    assert order == Order(total=Decimal("1"), lines=[])
    assert order.model_fields_set == {"total", "lines"}
    for cls in ("Frozen", "Point", "Pair", "Order"):
        with pytest.raises(UndecodableValueError, match="has no field"):
            decode_value(EncodedValue({}, name + cls))


def test_a_model_is_exactly_as_it_was() -> None:
    @register_type
    class Full(BaseModel):
        model_config = ConfigDict(extra="allow", frozen=True)
        name: str = Field(alias="theName")
        count: int = 1
        _secret: Any = PrivateAttr(default_factory=list)
        _unset: int = PrivateAttr()

        @computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return self.count * 2

        @functools.cached_property
        def cached(self) -> int:
            return 3

    value = Full(theName="a", odd=Decimal("1"), **{"$type": "x", "\x00": {1}})
    value._secret.append((1,))
    assert value.cached == 3
    found = back(value)
    assert found == value
    assert found.model_fields_set == value.model_fields_set
    assert found.__pydantic_extra__ == value.__pydantic_extra__
    assert found.__pydantic_private__ == {"_secret": [(1,)]}
    assert "cached" not in found.__dict__

    unchecked = Full.model_construct(name=5, count="x")
    assert back(unchecked).name == 5


def test_root_models_and_generic_models_and_pydantic_dataclasses_come_back() -> None:
    @register_type
    class Tags(RootModel[set[str]]):
        pass

    class Page(BaseModel, Generic[T]):
        items: list[T]

    @register_type
    @pydantic_dataclass
    class Checked:
        amount: Decimal

    register_type(Page[Decimal])
    assert back(Tags({"a"})) == Tags({"a"})
    page = Page[Decimal](items=[Decimal("1.0")])
    assert back(page) == page
    assert stored(page)[0].endswith("Page(Decimal)")
    assert stored(page)[1] == {"items": ["1.0"]}
    assert back(Checked("1")) == Checked("1")  # type: ignore[arg-type]


def test_a_subclass_in_a_field_keeps_its_class() -> None:
    @register_type
    class Express(Line):
        hours: int

    order = Order.model_construct(total=Decimal("1"), lines=[Express(sku="a", price=Decimal("1"), hours=2)])
    assert stored(order)[1]["lines"][0]["$type"].endswith("Express")
    assert type(back(order).lines[0]) is Express


def test_annotations_that_cannot_be_resolved_promise_nothing() -> None:
    @register_type
    @dataclasses.dataclass
    class Lost:
        a: NoSuchName  # type: ignore[name-defined]  # noqa: F821
        b: Decimal

    assert stored(Lost(1, Decimal("1")))[1] == {"a": 1, "b": {"$type": "Decimal", "value": "1"}}
    assert back(Lost(1, Decimal("1"))) == Lost(1, Decimal("1"))


def test_a_field_that_would_pass_for_something_else_is_refused() -> None:
    assert "register_codec" in str(problem_of(create_model("Odd", **{"$private": (int, 1)})()))


def test_a_member_that_is_gone_is_named() -> None:
    with pytest.raises(UndecodableValueError, match="Colour has no member 'GREEN'"):
        decode_value(EncodedValue("GREEN", f"{__name__}.Colour"))


def test_the_codec_keeps_no_class_alive() -> None:
    @dataclasses.dataclass
    class Local:
        child: Any = None

    Local.__annotations__["child"] = list[Local]
    encode_value(Local([Local()]), "v")
    ref = weakref.ref(Local)
    del Local
    gc.collect()
    assert ref() is None


def test_an_unset_field_is_refused() -> None:
    value = Plain(UserId(1), Decimal("1"), set())
    del value.user
    assert "user" in str(problem_of(value))
    assert "lines" in str(problem_of(Order.model_construct(total=Decimal("1"))))


# --- the registry -------------------------------------------------------------------------------------------------


def test_a_class_comes_back_only_if_registered() -> None:
    for value in (Unregistered.HERE, [Unregistered.HERE], {1: Unregistered.HERE}):
        encoded = encode_value(value, "v")
        with pytest.raises(UnknownTypeError) as caught:
            decode_value(encoded, "v")
        assert caught.value.entry == "v"
        assert caught.value.type_name == f"{__name__}.Unregistered"


def test_the_classes_of_a_registered_ones_fields_come_back_by_themselves() -> None:
    registry = TypeRegistry()
    registry.register(Order)
    line = Line(sku="A-1", price=Decimal("1.50"))
    # No Order has been read or written with this registry before.
    assert decode_value(encode_value(line, "line"), registry=registry) == line


def test_an_entry_of_unknown_type_survives_loading_and_dumping() -> None:
    texts = ('{"a":{"x":[1.50e3,{"$type":"gone","value":"\\ud83d\\ude00"}]},"b":-0.0}', '{"a":"shop.Gone","b":"float"}')
    loaded = loads_entries(*texts)
    again = dumps_entries(loaded)
    assert again == dumps_entries(loads_entries(*again))
    assert decode_value(loaded["b"]) == 0


def test_a_class_has_one_name_to_write_and_many_to_read() -> None:
    registry = TypeRegistry()

    class Kept(Enum):
        A = 1

    registry.register(Kept, "old.Kept")
    registry.register(Kept, "shop.Kept")
    registry.register(Kept)
    assert encode_value(Kept.A, "v", registry=registry).type_name == "shop.Kept"
    for name in ("old.Kept", "shop.Kept", f"{__name__}.{Kept.__qualname__}"):
        assert decode_value(EncodedValue("A", name), registry=registry) is Kept.A


def test_a_name_that_is_taken_is_refused_but_a_redefinition_replaces() -> None:
    registry = TypeRegistry()
    registry.register(Colour, "shop.Thing")
    with pytest.raises(TypeRegistrationError, match="is registered for"):
        registry.register(Size, "shop.Thing")

    def define() -> type[Enum]:
        class Same(Enum):
            A = 1

        return Same

    first, second = define(), define()
    registry.register(first, "shop.Same")
    registry.register(second, "shop.Same")
    assert decode_value(EncodedValue("A", "shop.Same"), registry=registry) is second["A"]


def test_an_unregistered_class_is_not_stored_under_the_name_of_another_one() -> None:
    registry = TypeRegistry()
    registry.register(Colour, f"{__name__}.Unregistered")
    with pytest.raises(UnserializableValueError, match="another one"):
        encode_value(Unregistered.HERE, "v", registry=registry)


@pytest.mark.parametrize(
    "name", ["", " ", "int", "dict", "Path:escaped", "a$b", "a[b", "a]b", "a\nb", "a\x00", "\ud800", "x" * 256, 3]
)
def test_a_name_that_cannot_be_stored_is_refused(name: Any) -> None:
    with pytest.raises(TypeRegistrationError):
        register_type(Colour, name=name)


@pytest.mark.parametrize("cls", [int, list, object, Path, UserDict, ListRecord, 3, ValueError])
def test_a_class_of_another_kind_is_refused(cls: Any) -> None:
    with pytest.raises(TypeRegistrationError):
        register_type(cls)


def test_register_type_is_a_decorator_too() -> None:
    @register_type(name="tests.decorated")
    class Decorated(Enum):
        A = 1

    assert Decorated.A.name == "A"
    assert encode_value(Decorated.A, "v").type_name == "tests.decorated"
    assert register_type(Decorated, "tests.again") is Decorated


def test_declaring_an_annotation_registers_all_classes_in_it() -> None:
    class Inner(BaseModel):
        colour: Colour

    class Card(BaseModel):
        number: str

    class Transfer(NamedTuple):
        iban: Any

    @dataclasses.dataclass
    class Outer:
        inner: Any
        how: Any

    Outer.__annotations__ = {"inner": Inner, "how": Card | Transfer}
    registry = TypeRegistry()
    registry.declare(Annotated[dict[str, list[Outer]] | None, "x"])
    registry.declare("a string")
    registry.declare(threading.Lock)
    for value in (Outer(Inner(colour=Colour.RED), Transfer(1)), Card(number="1"), Colour.RED):
        assert decode_value(encode_value(value, "v", registry=registry), registry=registry) == value
    declare_type(int | None)


def test_the_classes_of_a_registered_class_fields_come_back() -> None:
    class Card(BaseModel):
        number: str

    @dataclasses.dataclass
    class Payment:
        how: Any

    Payment.__annotations__ = {"how": Card | int}
    registry = TypeRegistry()
    encoded = encode_value(Payment(Card(number="1")), "v", registry=registry)
    registry.register(Payment)
    assert decode_value(encoded, registry=registry) == Payment(Card(number="1"))


def test_a_declaration_keeps_the_chosen_name() -> None:
    registry = TypeRegistry()
    registry.register(Order, "shop.Order")
    registry.declare(list[Order])
    assert registry.name_of(Order) == "shop.Order"
    assert registry.registration_named(f"{__name__}.Line") is not None


class ArrayCodec:
    def encode(self, value: np.ndarray[Any, Any]) -> Any:
        return {"dtype": value.dtype.str, "shape": value.shape, "data": value.tobytes()}

    def decode(self, encoded: Any) -> np.ndarray[Any, Any]:
        return np.frombuffer(encoded["data"], encoded["dtype"]).reshape(encoded["shape"]).copy()


class TagList(list):  # type: ignore[type-arg]
    pass


class TagListCodec:
    def encode(self, value: TagList) -> list[Any]:
        return list(value)

    def decode(self, encoded: Any) -> TagList:
        return TagList(encoded)


def test_a_codec_stores_a_class_of_the_users() -> None:
    array_codec: ValueCodec[Any] = ArrayCodec()
    register_codec(np.ndarray, array_codec)
    register_codec(TagList, TagListCodec(), name="tests.TagList")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(back({"a": [array]})["a"][0], array)
    assert back([TagList([1, TagList()])]) == [[1, []]]
    assert stored(TagList([1])) == ("tests.TagList", [1])
    assert stored([TagList([1])])[1] == [{"$type": "tests.TagList", "value": [1]}]
    assert problem_of(TagList([object()])).path == "order (as its codec encodes it)[0]"


def test_a_codec_that_gives_the_value_itself_is_circular() -> None:
    class Self:
        def encode(self, value: Any) -> Any:
            return [value]

        def decode(self, encoded: Any) -> Any:
            return encoded

    class Thing:
        pass

    registry = TypeRegistry()
    registry.register_codec(Thing, Self())
    with pytest.raises(UnserializableValueError, match="circular"):
        encode_value(Thing(), "v", registry=registry)
    with pytest.raises(UndecodableValueError, match="gave a list"):
        decode_value(EncodedValue([1], f"{__name__}.{Thing.__qualname__}"), registry=registry)


def test_a_value_of_a_codec_in_a_field_is_always_tagged() -> None:
    class LineCodec:
        def encode(self, value: Line) -> str:
            return value.sku

        def decode(self, encoded: Any) -> Line:
            return Line(sku=encoded, price=Decimal("0"))

    registry = TypeRegistry()
    registry.register(Order)
    registry.register_codec(Line, LineCodec())
    order = Order(total=Decimal("1"), lines=[Line(sku="a", price=Decimal("0"))])
    encoded = encode_value(order, "v", registry=registry)
    assert encoded.node["lines"] == [{"$type": f"{__name__}.Line", "value": "a"}]
    assert decode_value(encoded, registry=registry) == order


@pytest.mark.parametrize("cls", [int, dict, type(Path()), datetime, type(None)])
def test_builtin_types_take_no_codec(cls: type) -> None:
    with pytest.raises(TypeRegistrationError):
        register_codec(cls, TagListCodec())
    with pytest.raises(TypeRegistrationError):
        register_codec(UserDict, object())  # type: ignore[arg-type]


# --- security -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "type_name", ["os.system", "builtins.eval", "antigravity.x", "this.s", "decimal.Decimal", "object", "", "$type"]
)
def test_a_type_name_from_the_database_is_never_imported(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []
    nodes = [EncodedValue("id", type_name), EncodedValue([{"$type": type_name, "value": ["id"]}], "list")]
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", lambda name, *_: imported.append(name))
        patched.setattr(builtins, "__import__", lambda name, *_: imported.append(name))
        for encoded in nodes:
            try:
                decode_value(encoded, "e")
            except UnknownTypeError as error:
                found.append(error.type_name)
    assert found == [type_name, type_name]
    assert imported == []
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


class Legacy:
    loads = 0

    def __init__(self, value: Any) -> None:
        self.value = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).loads += 1
        self.__dict__ = state


def test_a_signed_pickle_comes_back_and_an_altered_one_is_not_unpickled() -> None:
    registry = TypeRegistry()
    registry.register_codec(Legacy, PickleCodec(b"k" * 32))
    encoded = encode_value(Legacy({1}), "v", registry=registry)
    assert decode_value(encoded, registry=registry).value == {1}
    loads = Legacy.loads

    raw = bytearray(base64.b64decode(encoded.node))
    bad = [base64.b64encode(pickle.dumps(Legacy(1))).decode(), "", "!!", 3, None, encoded.node[:-8], {"a": 1}]
    for position in range(0, len(raw), 7):
        altered = raw.copy()
        altered[position] ^= 1
        bad.append(base64.b64encode(altered).decode())
    for node in bad:
        with pytest.raises(UndecodableValueError):
            decode_value(EncodedValue(node, encoded.type_name), "v", registry=registry)

    other = TypeRegistry()
    other.register_codec(Legacy, PickleCodec(b"x" * 32))
    with pytest.raises(UndecodableValueError, match="signature"):
        decode_value(encoded, registry=other)
    assert Legacy.loads == loads


def test_a_signed_pickle_of_another_class_is_refused() -> None:
    class Other:
        pass

    registry = TypeRegistry()
    codec = PickleCodec(b"k" * 16)
    registry.register_codec(Legacy, codec, "legacy")
    registry.register_codec(Other, codec, "other")
    encoded = encode_value(Legacy(1), "v", registry=registry)
    with pytest.raises(UndecodableValueError):
        decode_value(EncodedValue(encoded.node, "other"), registry=registry)


@pytest.mark.parametrize("key", [b"short", b"", "a" * 32, None])
def test_a_weak_key_is_refused(key: Any) -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        PickleCodec(key)


def test_the_key_is_not_shown() -> None:
    assert "kkkk" not in repr(PickleCodec(b"k" * 32))


@pytest.mark.parametrize(
    "texts",
    [
        ("", ""),
        ("[]", "[]"),
        ("{}", "null"),
        ('{"a":1}', "{}"),
        ('{"a":1}', '{"b":"int"}'),
        ('{"a":1}', '{"a":1}'),
        ('{"a":NaN}', '{"a":"float"}'),
        ('{"a":1e999}', '{"a":"float"}'),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", '{"a":"list"}'),
        ('{"a":' + "9" * 10_000 + "}", '{"a":"int"}'),
    ],
)
def test_damaged_json_is_an_error_of_ours(texts: tuple[str, str]) -> None:
    with pytest.raises(UndecodableValueError) as caught:
        loads_entries(*texts)
    assert isinstance(caught.value, EbbsError)


@pytest.mark.parametrize("zone", ["../../etc/passwd", "/etc/passwd", "Europe", "No/Such", "..", "os"])
def test_a_bad_zone_is_an_error_of_ours(zone: str) -> None:
    with pytest.raises(UndecodableValueError):
        decode_value(EncodedValue("2024-01-01T00:00:00", f"datetime[{zone}]"), "when")


def test_nothing_is_registered_by_importing() -> None:
    script = "import ebbs_and_flows.codec as codec; assert not codec.REGISTRY._by_name"
    subprocess.run([sys.executable, "-c", script], check=True)
