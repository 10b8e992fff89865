"""Values: refused at the call, fail the attempt that returns them, or are kept exactly."""

from __future__ import annotations

import asyncio
import copy
import math
import sqlite3
import struct
import sys
import threading
import types
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    FunctionTask,
)
from ebbs_and_flows.codec import MAX_DEPTH
from tests.integration.bad_input.suspects import (
    KINDS,
    UTC,
    Guarded,
    Impostor,
    Moody,
    NoEquality,
    NoReduce,
    NoRepr,
    OddlyMade,
    OwnInt,
    OwnStr,
    OwnZone,
    Ring,
    Suspect,
    begin,
    cases,
    circle,
    failed,
    finish,
    nested,
    nothing,
    refused,
    schedule,
    succeeds_once_mended,
)

# --- values: refused at the call, or the attempt fails -------------------------------------------------------------


@dataclass(frozen=True)
class BadValue:
    """A value that cannot be stored, and the path to what cannot be in it."""

    id: str
    make: Callable[[ExitStack], Any]
    path: str = "bad cannot be stored"


def _open_file(stack: ExitStack) -> Any:
    return stack.enter_context(Path(__file__).open(encoding="utf-8"))


def _coroutine(stack: ExitStack) -> Any:
    made = asyncio.sleep(0)
    stack.callback(made.close)
    return made


def _connection(stack: ExitStack) -> Any:
    made = sqlite3.connect(":memory:")
    stack.callback(made.close)
    return made


BAD_VALUES = [
    BadValue("a lambda", lambda _: lambda: 1),
    BadValue("a function", lambda _: nothing),
    BadValue("a task", lambda _: begin),
    BadValue("a lock", lambda _: threading.Lock()),
    BadValue("an open file", _open_file),
    BadValue("a database connection", _connection),
    BadValue("a generator", lambda _: (each for each in (1, 2))),
    BadValue("a coroutine", _coroutine),
    BadValue("a module", lambda _: types),
    BadValue("a class", lambda _: Guarded),
    BadValue("a plain object", lambda _: object()),
    BadValue("an exception", lambda _: ValueError("no")),
    BadValue("a complex number", lambda _: 1j),
    BadValue("a bytearray", lambda _: bytearray(b"1")),
    BadValue("a range", lambda _: range(3)),
    BadValue("NotImplemented", lambda _: NotImplemented),
    BadValue("a circular list", lambda _: circle([], lambda made: made.append(made)), "bad[0] cannot be stored"),
    BadValue("a circular dict", lambda _: circle({}, lambda made: made.update(me=made)), "bad['me'] cannot be stored"),
    BadValue(
        "a circular dataclass",
        lambda _: circle(Ring(), lambda made: setattr(made, "next", [made])),
        "bad.next[0] cannot",
    ),
    BadValue(
        "one level too deep", lambda _: nested(MAX_DEPTH), "[0][0][0][0] cannot be stored: it is nested too deeply"
    ),
    BadValue("far too deep", lambda _: nested(100_000), "it is nested too deeply"),
    BadValue("a foreign time zone", lambda _: [datetime(2030, 1, 1, tzinfo=OwnZone())], "bad[0] cannot be stored"),
    BadValue("a time with a foreign zone", lambda _: time(12, tzinfo=OwnZone())),
    BadValue("a subclass of int", lambda _: OwnInt(1)),
    BadValue("a subclass of str", lambda _: OwnStr("1")),
    BadValue("a subclass of str as a key", lambda _: {OwnStr("1"): 1}, "(the key) cannot be stored"),
    BadValue("a subclass of dict", lambda _: OrderedDict(a=1)),
    BadValue("another subclass of dict", lambda _: {"count": Counter("abc")}, "bad['count'] cannot be stored"),
    BadValue("a mapping that is no dict", lambda _: UserDict(a=1)),
    BadValue("an object whose __reduce__ raises", lambda _: NoReduce()),
    BadValue("an object whose __eq__ raises", lambda _: [NoEquality()], "bad[0] cannot be stored"),
    BadValue("an object whose __repr__ raises", lambda _: NoRepr()),
    BadValue("an object that says it is a dict", lambda _: Impostor()),
    BadValue("an object whose class cannot be named", lambda _: OddlyMade()),
    BadValue("a dataclass whose field raises", lambda _: Moody(1)),
    BadValue("a dataclass that holds a lock", lambda _: Guarded(1, threading.Lock()), "bad.guard cannot be stored"),
    BadValue(
        "a lock deep within",
        lambda _: {"lines": [Guarded(1, None), Guarded(1, (0, threading.Lock()))]},
        "bad['lines'][1].guard[1] cannot be stored",
    ),
    BadValue("a lambda in a set", lambda _: {len}, "bad{...} cannot be stored"),
    BadValue("a lambda as a key", lambda _: {(1, len): 2}, "(the key)[1] cannot be stored"),
    BadValue("a context", lambda _: ExecutionContext(a=1)),
    BadValue("a context in a list", lambda _: [ExecutionContext(a=1)], "bad[0] cannot be stored"),
]


@pytest.mark.parametrize("case", cases(BAD_VALUES))
def test_a_value_that_cannot_be_stored_is_refused_at_the_call(
    case: BadValue, runner: FlowRunner, stack: ExitStack
) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    value = case.make(stack)
    calls: list[Callable[[], object]] = [
        lambda: runner.schedule_flow("flow", {"order": 17, "bad": value}),
        lambda: runner.schedule_flow("flow", ExecutionContext(order=17, bad=value)),
        lambda: runner.service.create_flow_execution("flow", {"bad": value}),
    ]
    for call in calls:
        error = refused(runner.service, ValueError, call)
        assert isinstance(error, TypeError)
        assert case.path in str(error)


@pytest.mark.parametrize("case", cases(BAD_VALUES))
def test_a_value_that_cannot_be_stored_fails_the_attempt_that_returns_it(
    case: BadValue, runner: FlowRunner, stack: ExitStack
) -> None:
    suspect = Suspect(lambda context: context.copy(bad=case.make(stack)))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="UnserializableValueError", says=case.path)
    succeeds_once_mended(runner, execution_id, suspect)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cannot_be_stored_fails_every_kind_of_task(kind: type[Suspect], runner: FlowRunner) -> None:
    suspect = kind(lambda context, *_: context.copy(bad={"lock": threading.Lock()}))
    execution_id = schedule(runner, suspect)
    runner.run_until_idle()

    failed(runner, execution_id, attempts=1, error_type="UnserializableValueError", says="bad['lock'] cannot be stored")
    succeeds_once_mended(runner, execution_id, suspect)


# --- values: kept exactly ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoodValue:
    id: str
    value: Any


BERLIN, NEW_YORK = ZoneInfo("Europe/Berlin"), ZoneInfo("America/New_York")

GOOD_VALUES = [
    GoodValue("a str with NUL", "a\x00b\x00"),
    GoodValue("a str with surrogates", "a\udc80b\ud83d"),
    GoodValue("a str with surrogates that would make a pair", "\ud83d\ude00"),
    GoodValue("backslashes that look like escapes", "\\u0000 \\x00 \\\\u0000 \\"),
    GoodValue("NUL and backslashes", "\\u0000\x00\\"),
    GoodValue("every control character", "".join(map(chr, range(32))) + "\x7f\x85\u2028\u2029\ufeff\uffff"),
    GoodValue("decomposed text", "cafe\u0301"),
    GoodValue("NaN", math.nan),
    GoodValue("a NaN with a payload", struct.unpack(">d", bytes.fromhex("fff8000000000001"))[0]),
    GoodValue("infinities", [math.inf, -math.inf, {"at": math.inf}]),
    GoodValue("minus zero", [-0.0, 0.0]),
    GoodValue("the least and the greatest float", [5e-324, sys.float_info.max, 0.1 + 0.2, 1e22]),
    GoodValue("a huge int", 10**5000),
    GoodValue("ints beyond 64 bits", [2**63, -(2**63) - 1, 2**64, -(10**5000)]),
    GoodValue("ints as keys, not strs", {1: "a", "1": "b"}),
    GoodValue("True beside 1 and 1.0", [True, 1, 1.0]),
    GoodValue("a str of a megabyte", "\u6f6e\U0001f30a~" * 330_000),
    GoodValue("bytes of a megabyte", bytes(range(256)) * 4096),
    GoodValue("a list of 10,000 elements", [{"n": n, "price": Decimal(n) / 7} for n in range(10_000)]),
    GoodValue("as deep as it may be", nested(MAX_DEPTH - 4)),
    GoodValue("empty containers", [[], (), set(), frozenset(), {}, "", b"", [[]], ((),)]),
    GoodValue("None in all places", [None, {"none": None}, (None,)]),
    GoodValue("a dict with tuples for keys", {(1, "a"): 1, (): 2, ("a", (None, 1.5)): [3]}),
    GoodValue("a dict with keys of many types", {None: 1, 1.5: 2, b"k": 3, frozenset({1}): 4, date(2030, 1, 1): 5}),
    GoodValue("a dict with odd keys", {"": 1, "$type": "int", "value": 2, "a\x00": 3, "\udc80": 4, "%s": 5}),
    GoodValue("a dict that looks like a tag", {"$type": "int", "value": "17"}),
    GoodValue("a dict that is out of order", {"b": 1, "a": 2, "C": 3, "10": 4, "9": 5}),
    GoodValue("a signalling NaN", Decimal("sNaN")),
    GoodValue(
        "odd decimals", [Decimal("-NaN123"), Decimal("-0"), Decimal("1.00"), Decimal("1E+400"), Decimal("-Infinity")]
    ),
    GoodValue("the greatest datetime", datetime.max),
    GoodValue("the least datetime", datetime.min),
    GoodValue("the greatest datetime in UTC", datetime.max.replace(tzinfo=UTC)),
    GoodValue("the least datetime in UTC", datetime.min.replace(tzinfo=UTC)),
    GoodValue(
        "the greatest datetime west of UTC", datetime.max.replace(tzinfo=timezone(timedelta(hours=-23, minutes=-59)))
    ),
    GoodValue("the least datetime east of UTC", datetime.min.replace(tzinfo=timezone(timedelta(hours=23, minutes=59)))),
    GoodValue("the greatest datetime in New York", datetime.max.replace(tzinfo=NEW_YORK)),
    GoodValue("the least datetime in Berlin", datetime.min.replace(tzinfo=BERLIN)),
    GoodValue("an hour that comes twice", datetime(2030, 10, 27, 2, 30, fold=1, tzinfo=BERLIN)),
    GoodValue("an hour that never comes", datetime(2030, 3, 31, 2, 30, tzinfo=BERLIN)),
    GoodValue("a zone of seconds", datetime(2030, 1, 1, tzinfo=timezone(timedelta(seconds=1), "one [second]"))),
    GoodValue("the ends of time", [date.min, date.max, time.max, timedelta.min, timedelta.max, timedelta.resolution]),
    GoodValue("text that looks like JSON", '{"$type": "set", "value": [1]}'),
    GoodValue("text that looks like null", ["null", "true", "NaN", "Infinity", "0x1f", "1e400"]),
    GoodValue("text that looks like SQL", "'; DELETE FROM ebbs_flow_executions; --"),
    GoodValue("text that looks like parameters", ":x %s %(x)s ? $1 {} {0!r}"),
    GoodValue("other values", [UUID(int=0), UUID(int=2**128 - 1), Path("a\udcff/../b"), Path()]),
    GoodValue("sets of mixed values", [{1, "1", None, (1,)}, frozenset({frozenset(), b""})]),
]


def exactly(value: Any) -> Any:
    """What tells a value from every other one: equal only for the same type and the same value, all the way down."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [exactly(each) for each in value]
    if kind in (set, frozenset):
        return kind, sorted((exactly(each) for each in value), key=repr)
    if kind is dict:
        return kind, [(exactly(key), exactly(each)) for key, each in value.items()]
    if kind is int:
        return kind, hex(value)
    if kind is float:
        return kind, struct.pack(">d", value)
    if kind is datetime:
        return kind, repr(value), exactly(value.tzname()) if value.tzinfo is not None else None
    return kind, value if kind is str else repr(value)


@pytest.mark.parametrize("case", cases(GOOD_VALUES))
def test_a_value_is_kept_exactly(case: GoodValue, runner: FlowRunner) -> None:
    received: list[Any] = []

    def receive(context: ExecutionContext) -> ExecutionContext:
        received.append(context["given"])
        return context.copy(returned=copy.deepcopy(case.value))

    def receive_again(context: ExecutionContext) -> ExecutionContext:
        received.extend((context["given"], context["returned"]))
        return context

    runner.register_flow_template(
        FlowTemplate("flow", [Suspect(receive), FunctionTask(receive_again, name="receive again")])
    )
    execution_id = runner.schedule_flow("flow", {"given": case.value})
    runner.run_until_idle()

    execution = runner.service.get_flow_execution(execution_id)
    assert execution.status is FlowStatus.SUCCEEDED
    received.extend((execution.execution_context["given"], execution.execution_context["returned"]))
    wanted = exactly(case.value)
    assert [exactly(each) == wanted for each in received] == [True] * 5


def test_what_the_caller_does_with_a_value_afterwards_changesnothing(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate("flow", [begin, finish]))
    lines = [1, 2]
    context = ExecutionContext(order=17, lines=lines)
    execution_id = runner.schedule_flow("flow", context)
    lines.append(3)
    context["lines"].append(4)
    runner.run_until_idle()
    assert runner.service.get_flow_execution(execution_id).execution_context["lines"] == [1, 2]
