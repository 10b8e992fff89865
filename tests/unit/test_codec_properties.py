"""What goes in comes out, for every value that hypothesis can think of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sqlite3
import struct
import sys
from collections import namedtuple
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, auto
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from pydantic import BaseModel, PrivateAttr

from ebbs_and_flows.codec import EncodedValue, decode_value, dumps_entries, encode_value, loads_entries, register_type
from ebbs_and_flows.errors import UndecodableValueError, UnknownTypeError

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of the strategies below


class Colour(Enum):
    RED = 1
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Rights(Flag):
    READ = auto()
    WRITE = auto()


class Point(NamedTuple):
    x: Any
    y: Decimal = Decimal("0")


Pair = namedtuple("Pair", ["left", "right"])  # the untyped kind


@dataclasses.dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal
    colour: Colour | None
    extra: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    any_value: Any
    dates: list[date]
    by_name: dict[str, float]


class Order(BaseModel):
    model_config = {"arbitrary_types_allowed": True}
    total: Decimal
    lines: list[Line]
    note: Any = None
    tags: frozenset[str] = frozenset()
    _seen: Any = PrivateAttr(default=None)


for _cls in (Colour, Level, Rights, Point, Pair, Line, Slotted, Order):
    register_type(_cls)


def same(a: object, b: object) -> bool:
    """Whether two values are of the same type and the same value, all the way down, bits of floats included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if isinstance(a, (datetime, time)):
        return (
            a.replace(tzinfo=None) == b.replace(tzinfo=None)
            and a.fold == b.fold
            and type(a.tzinfo) is type(b.tzinfo)
            and (repr(a.tzinfo), str(a.tzinfo)) == (repr(b.tzinfo), str(b.tzinfo))
        )
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, (set, frozenset)):
        rest = list(b)
        for element in a:
            match = next((i for i, other in enumerate(rest) if same(element, other)), None)
            if match is None:
                return False
            del rest[match]
        return not rest
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, BaseModel):
        return (
            same(a.__dict__, b.__dict__)
            and a.model_fields_set == b.model_fields_set
            and same(a.__pydantic_extra__, b.__pydantic_extra__)
            and same(a.__pydantic_private__, b.__pydantic_private__)
        )
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


floats = st.one_of(
    st.floats(), st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", struct.pack(">Q", bits))[0])
)
texts = st.one_of(
    st.text(),
    st.text(st.characters(codec=None)),
    st.text(st.sampled_from("a\\u0\x00\ud800\udfff\U0001f600\ud83d\ude00$\"'")),
    st.sampled_from(["$type", "value", "$fields_set", "\\u0000", "NaN", "0x1"]),
)
offsets = st.timedeltas(min_value=timedelta(hours=-24, microseconds=1), max_value=timedelta(hours=24, microseconds=-1))
ZONE_KEYS = sorted(available_timezones())
zones = st.one_of(
    st.none(),
    st.just(timezone.utc),
    offsets.map(timezone),
    st.builds(timezone, offsets, texts),
    st.integers(0, len(ZONE_KEYS) - 1).map(lambda number: ZoneInfo(ZONE_KEYS[number])),
)
decimals = st.one_of(
    st.decimals(),
    st.sampled_from(["sNaN", "-sNaN12", "-NaN7", "-0", "0E+7", "-0.000", "1E+999999", "1.10", "Infinity"]).map(Decimal),
)
paths = st.one_of(
    st.text(st.characters(codec=None), max_size=8).map(Path),
    st.binary(max_size=8).map(lambda raw: PurePosixPath(raw.decode("utf-8", "surrogateescape"))),
)
hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    floats,
    texts,
    st.binary(),
    st.dates(),
    st.times(timezones=zones),
    st.datetimes(timezones=zones),
    st.builds(lambda when, fold: when.replace(fold=fold), st.datetimes(timezones=zones), st.sampled_from([0, 1])),
    st.timedeltas(),
    decimals.filter(lambda value: not value.is_snan()),
    st.uuids(),
    paths,
    st.sampled_from([*Colour, *Level, Rights.READ, Rights.READ | Rights.WRITE, Rights(0)]),
)
hashables = st.recursive(
    hashable_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.frozensets(inner, max_size=3),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=5,
)
lines = st.builds(Line, texts, decimals, st.sampled_from([None, *Colour]), st.one_of(st.none(), hashables))
values = st.recursive(
    st.one_of(hashables, decimals, lines, st.integers(-(10**700), 10**700)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(texts, inner, max_size=4),
        st.sets(hashables, max_size=4),
        st.builds(Point, inner, decimals),
        st.builds(Slotted, inner, st.lists(st.dates(), max_size=2), st.dictionaries(texts, floats, max_size=2)),
        st.builds(
            lambda total, rows, note, unset: Order.model_construct(
                total=total, lines=rows, **({} if unset else {"note": note})
            ),
            decimals,
            st.lists(lines, max_size=2),
            inner,
            st.booleans(),
        ),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def sqlite() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    yield connection
    connection.close()


def strings_of(node: object) -> Any:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for element in node:
            yield from strings_of(element)
    elif isinstance(node, dict):
        for key, element in node.items():
            yield key
            yield from strings_of(element)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], max_examples=400)
@given(value=values)
@example(value=10**5000)
@example(value=[-(10**5000), 2**2119, 2**2120, -(2**2120)])
@example(value=math.nan)
@example(value=[-0.0, 5e-324, 1.7976931348623157e308, -math.inf])
@example(value={"$type": "int", "value": 3})
@example(value={True: 1, "a": [{1.5}]})
@example(value=datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")))
@example(value=[datetime.min, datetime.max, datetime.min.replace(tzinfo=timezone(timedelta(hours=23, minutes=59)))])
@example(
    value=[ZoneInfo("UTC").key, datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")), datetime(2024, 1, 1, tzinfo=timezone.utc)]
)
@example(value=time(1, tzinfo=timezone(timedelta(0), "UTC")))
@example(value=[time(0, tzinfo=timezone(timedelta(microseconds=n))) for n in (1, -1, 999999, -999999)])
@example(value=[datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-2, microseconds=n))) for n in (1, -1)])
@example(value=time(0, tzinfo=timezone(timedelta(microseconds=-1), "fine")))
@example(value=[timedelta.min, timedelta.max, timedelta(microseconds=-1)])
@example(value=UUID(int=0))
def test_every_value_comes_back_as_it_was(value: Any, sqlite: sqlite3.Connection) -> None:
    encoded = encode_value(value, "entry")

    assert same(decode_value(encoded), value)

    entries_text, types_text = dumps_entries({"entry": encoded})
    loaded = loads_entries(entries_text, types_text)
    assert dumps_entries(loaded) == (entries_text, types_text)
    assert loaded["entry"] == encoded
    assert same(decode_value(loaded["entry"]), value)

    for text in (entries_text, types_text):
        assert sqlite.execute("select json_valid(?)", (text,)).fetchone() == (1,)
        for string in strings_of(json.loads(text)):
            assert "\x00" not in string
            string.encode()
    assert same(sqlite.execute("select json_extract(?, '$.entry')", (types_text,)).fetchone()[0], encoded.type_name)


@settings(deadline=None)
@given(elements=st.lists(hashables, max_size=6))
def test_equal_sets_have_equal_texts(elements: list[Any]) -> None:
    forwards = set(elements)
    backwards: set[Any] = set()
    for element in reversed(list(forwards)):
        backwards.add(element)
    assert encode_value(forwards, "s") == encode_value(backwards, "s")


json_nodes = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["RED", "1", "P1DT1S"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(), st.sampled_from(["$type", "value", "sku", "total", "lines", "$private", "$fields_set"])
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=10,
)
type_names = st.one_of(
    st.sampled_from(
        [
            *("null", "bool", "int", "float", "str", "str:escaped", "list", "tuple", "set", "frozenset", "dict"),
            *("bytes", "Decimal", "UUID", "date", "datetime", "time", "timedelta", "Path", "PureWindowsPath"),
            *("datetime[UTC]", "datetime[fold=1]", "time[name=a]", "datetime[../etc/passwd]", "datetime["),
            *("datetime[]", "time[Europe]", "datetime[posixrules]", "os.system"),
        ]
    ),
    st.sampled_from([Colour, Rights, Point, Pair, Line, Slotted, Order]).map(
        lambda c: f"{c.__module__}.{c.__qualname__}"
    ),
    st.text(max_size=5),
)


@settings(deadline=None, max_examples=1000)
@given(node=json_nodes, type_name=type_names, inside=st.booleans())
def test_an_altered_row_ends_in_one_of_two_errors_or_a_value(node: Any, type_name: str, inside: bool) -> None:
    if inside:
        node, type_name = [{"$type": type_name, "value": node}], "list"
    modules = set(sys.modules)
    with contextlib.suppress(UndecodableValueError, UnknownTypeError):
        decode_value(EncodedValue(node, type_name), "entry")
    assert {name for name in sys.modules if name not in modules and not name.startswith("tzdata")} == set()
