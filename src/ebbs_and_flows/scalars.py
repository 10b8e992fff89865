"""How single values are written as JSON: numbers, text, bytes, times, paths. Containers and user classes are elsewhere.

Every form is exact (type and value come back), castable to PostgreSQL's `jsonb` (no NUL, no lone surrogate, no number
beyond `numeric`), and as natural as that allows.

    type name             node
    bool, str             as in JSON
    int                   number; "0x1f..." (hexadecimal) from 639 digits on
    float                 number; "NaN", "Infinity", "-Infinity"; "NaN:fff8000000000001" (the 64 bits) for any other NaN
    str:escaped           text with NUL or surrogates: those as backslash, u, four hex digits; a backslash doubled
    bytes                 base64
    Decimal, UUID         their `str`
    date                  ISO 8601
    datetime, time        ISO 8601 with the offset from UTC, if any. The type name tells what ISO 8601 cannot say:
                              name ["[fold=1]"] ["[" zone "]"]
                          where zone is the key of a `zoneinfo.ZoneInfo` (`datetime[Europe/Berlin]`) or `name=` and the
                          percent-encoded name of a `timezone` that was given one (`datetime[name=CEST]`). Without zone,
                          the offset is a plain `timezone` (+00:00 is `timezone.utc`). A ZoneInfo time is read back as
                          its wall clock in that zone, so new rules for a zone never shift it. Casts to `timestamptz`
                          as long as the offset is of whole seconds and below 16 hours.
    timedelta             ISO 8601 as days and seconds, "P-1DT86399.000001S"; casts to `interval`
    Path, PurePosixPath,  their `str`; "Path:escaped" and so on where that text has NUL or undecodable bytes
    PureWindowsPath
"""

from __future__ import annotations

import base64
import math
import pickle
import re
import struct
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from pathlib import Path, PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote
from uuid import UUID
from zoneinfo import ZoneInfo

T = TypeVar("T", datetime, time)

# Integers of up to 638 digits are JSON numbers: `sys.set_int_max_str_digits` cannot be set below 640, so no setting,
# here or where the row is read, refuses them.
INT_NUMBER_BITS = 2120

_HEX_INT = re.compile(r"-?0x[0-9a-f]+")
_PLAIN_NAN_BITS = 0x7FF8000000000000
_UNCLEAN = re.compile("[\x00\\\\\ud800-\udfff]")
_ESCAPE = re.compile(r"\\(\\|u[0-9a-f]{4})?")
_ZONED_NAME = re.compile(r"(datetime|time)(\[fold=1\])?(?:\[name=([^\[\]]*)\]|\[([\w+\-./]+)\])?", re.ASCII)
_ZONE_KEY = re.compile(r"[\w+\-./]+", re.ASCII)
_FINE_OFFSET = re.compile(r"([+-])(\d\d):(\d\d):(\d\d)\.(\d{6})$", re.ASCII)
_DURATION = re.compile(r"P(-?\d{1,9})DT(\d{1,5})(?:\.(\d{6}))?S", re.ASCII)


class RefusedValueError(Exception):
    """A value that cannot be stored, on its way up to where the path to it is complete.

    Attributes:
        value_type: the class of the value.
        problem: what is wrong with it, and what to do instead.
        steps: the way to the value from where this was caught, innermost step first.
    """

    def __init__(self, value_type: type, problem: str) -> None:
        super().__init__(problem)
        self.value_type = value_type
        self.problem = problem
        self.steps: list[str] = []

    @property
    def path(self) -> str:
        """The steps as they are read: outermost first."""
        return "".join(reversed(self.steps))


def described(error: BaseException) -> str:
    """Say class and message of an exception that user code may have raised."""
    try:
        text = str(error)[:300]
    except Exception:  # an exception that cannot be shown must not hide where it came from
        text = "(it cannot be shown)"
    return f"{type(error).__name__}: {text}"


def is_clean(text: str) -> bool:
    """Whether the text can be a JSON string everywhere: it has no NUL and no surrogate."""
    if "\x00" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escape(text: str) -> str:
    """Write NUL and surrogates as backslash, u and four hex digits, and double each backslash."""
    return _UNCLEAN.sub(lambda found: "\\\\" if found[0] == "\\" else f"\\u{ord(found[0]):04x}", text)


def unescape(text: str) -> str:
    """Undo `escape`.

    Raises:
        ValueError: a backslash that `escape` did not write.
    """
    return _ESCAPE.sub(_unescaped, text)


def encode_scalar_as(type_name: str, text: str) -> tuple[str, str]:
    """Give type name and node of a value that is written as this text, escaped where it must be."""
    return (type_name, text) if is_clean(text) else (f"{type_name}:escaped", escape(text))


def _unescaped(found: re.Match[str]) -> str:
    if found[1] is None:
        raise ValueError("it has a backslash that begins no escape")
    return "\\" if found[1] == "\\" else chr(int(found[1][1:], 16))


# --- encoding -----------------------------------------------------------------------------------------------------


def encode_int(value: int) -> tuple[str, int | str]:
    return "int", value if value.bit_length() <= INT_NUMBER_BITS else hex(value)


def _encode_float(value: float) -> tuple[str, float | str]:
    if math.isfinite(value):
        return "float", value
    if math.isinf(value):
        return "float", "Infinity" if value > 0 else "-Infinity"
    (bits,) = struct.unpack(">Q", struct.pack(">d", value))
    return "float", "NaN" if bits == _PLAIN_NAN_BITS else f"NaN:{bits:016x}"


def _encode_datetime(value: datetime) -> tuple[str, str]:
    return f"datetime{_zone_suffix(value)}", value.isoformat()


def _encode_time(value: time) -> tuple[str, str]:
    return f"time{_zone_suffix(value)}", value.isoformat()


def _zone_suffix(value: datetime | time) -> str:
    fold = "[fold=1]" if value.fold else ""
    zone = value.tzinfo
    if zone is None or zone is timezone.utc:
        return fold
    if type(zone) is timezone:
        name = zone.__getinitargs__()[1:]  # type: ignore[attr-defined]  # how pickle tells a name that was given
        return f"{fold}[name={quote(name[0], safe='', errors='surrogatepass')}]" if name else fold
    if type(zone) is ZoneInfo:
        return f"{fold}[{_zone_key(zone, type(value))}]"
    raise RefusedValueError(
        type(value),
        f"its time zone is a {_class_name(type(zone))}: use datetime.timezone or zoneinfo.ZoneInfo",
    )


def _zone_key(zone: ZoneInfo, value_type: type) -> str:
    try:
        zone.__reduce__()
    except pickle.PicklingError:
        # Made by ZoneInfo.from_file: the key, if it has one, need not name the same rules.
        raise RefusedValueError(value_type, 'its time zone was read from a file: use ZoneInfo("Area/City")') from None
    if not _ZONE_KEY.fullmatch(zone.key):
        raise RefusedValueError(value_type, f"its time zone has the key {zone.key!r}: use a name of the IANA database")
    return zone.key


def _encode_timedelta(value: timedelta) -> tuple[str, str]:
    fraction = f".{value.microseconds:06d}" if value.microseconds else ""
    return "timedelta", f"P{value.days}DT{value.seconds}{fraction}S"


def _encode_windows_path(value: PureWindowsPath) -> tuple[str, str]:
    text = str(value)
    if PureWindowsPath(text) != value:
        # Before 3.12 the text of PureWindowsPath("./c:") is that of a drive.
        raise RefusedValueError(type(value), f"its text {text!r} stands for another path: store its parts")
    return encode_scalar_as("PureWindowsPath", text)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


ENCODERS: dict[type, Callable[[Any], tuple[str, Any]]] = {
    type(None): lambda value: ("null", None),
    bool: lambda value: ("bool", value),
    int: encode_int,
    float: _encode_float,
    str: lambda value: encode_scalar_as("str", value),
    bytes: lambda value: ("bytes", base64.b64encode(value).decode("ascii")),
    Decimal: lambda value: ("Decimal", str(value)),
    UUID: lambda value: ("UUID", str(value)),
    date: lambda value: ("date", value.isoformat()),
    datetime: _encode_datetime,
    time: _encode_time,
    timedelta: _encode_timedelta,
    PosixPath: lambda value: encode_scalar_as("Path", str(value)),
    WindowsPath: lambda value: encode_scalar_as("Path", str(value)),
    PurePosixPath: lambda value: encode_scalar_as("PurePosixPath", str(value)),
    PureWindowsPath: _encode_windows_path,
}

# What an annotation promises: the exact class of the value, and the type name under which a bare node is of that class.
SLOT_CLASSES: dict[type, tuple[type, str]] = {
    **{
        cls: (cls, cls.__name__)
        for cls in (bool, int, float, str, bytes, Decimal, UUID, date, datetime, time, timedelta)
    },
    Path: (type(Path()), "Path"),
    PurePosixPath: (PurePosixPath, "PurePosixPath"),
    PureWindowsPath: (PureWindowsPath, "PureWindowsPath"),
}


# --- decoding: each takes a node that may be anything, and raises some exception for one that does not fit ----------


def is_zoned_name(type_name: str) -> bool:
    """Whether this names a datetime or time with a suffix for fold or zone, well formed or not."""
    return type_name.startswith(("datetime[", "time["))


def decode_zoned(type_name: str, node: object) -> datetime | time:
    """Read a datetime or time back whose type name has a suffix."""
    found = _ZONED_NAME.fullmatch(type_name)
    if found is None:
        raise ValueError("its suffix is neither a fold nor a time zone")
    base, fold, name, key = found.groups()
    value: datetime | time = _from_iso(datetime, node) if base == "datetime" else _from_iso(time, node)
    zone: tzinfo | None = value.tzinfo
    if key is not None:
        zone = ZoneInfo(key)
    elif name is not None:
        offset = value.utcoffset()
        if offset is None:
            raise ValueError("it has the name of a time zone, but no offset")
        zone = timezone(offset, unquote(name, errors="surrogatepass"))
    return value.replace(tzinfo=zone, fold=1 if fold else 0)


def _from_iso(cls: type[T], node: object) -> T:
    text = _text(node)
    fine = _FINE_OFFSET.search(text)
    if fine is None:
        return cls.fromisoformat(text)
    # CPython's fromisoformat reads an offset of less than a second as UTC.
    sign, hours, minutes, seconds, microseconds = fine.groups()
    offset = timedelta(0, int(seconds), int(microseconds), minutes=int(minutes), hours=int(hours))
    return cls.fromisoformat(text[: fine.start()]).replace(tzinfo=timezone(-offset if sign == "-" else offset))


def _text(node: object) -> str:
    if type(node) is not str:
        raise TypeError(f"expected a JSON string, found {type(node).__name__}")
    return node


def _decode_null(node: object) -> None:
    if node is not None:
        raise TypeError(f"expected null, found {type(node).__name__}")


def _decode_bool(node: object) -> bool:
    if type(node) is not bool:
        raise TypeError(f"expected true or false, found {type(node).__name__}")
    return node


def decode_int(node: object) -> int:
    if type(node) is int:
        return node
    text = _text(node)
    if not _HEX_INT.fullmatch(text):
        raise ValueError("expected a number or a hexadecimal string")
    return int(text, 16)


def _decode_float(node: object) -> float:
    if type(node) is float or type(node) is int:
        return float(node)
    text = _text(node)
    if text in ("NaN", "Infinity", "-Infinity"):
        return float(text)
    if not re.fullmatch(r"NaN:[0-9a-f]{16}", text):
        raise ValueError("expected a number, NaN or Infinity")
    (value,) = struct.unpack(">d", bytes.fromhex(text[4:]))
    if not math.isnan(value):
        raise ValueError("expected the bits of a NaN")
    return float(value)


def _decode_timedelta(node: object) -> timedelta:
    found = _DURATION.fullmatch(_text(node))
    if found is None:
        raise ValueError("expected a duration of days and seconds, P1DT2.000003S")
    return timedelta(days=int(found[1]), seconds=int(found[2]), microseconds=int(found[3] or 0))


def _path_decoders(name: str, cls: type[PurePath]) -> dict[str, Callable[[Any], Any]]:
    return {name: lambda node: cls(_text(node)), f"{name}:escaped": lambda node: cls(unescape(_text(node)))}


DECODERS: dict[str, Callable[[Any], Any]] = {
    "null": _decode_null,
    "bool": _decode_bool,
    "int": decode_int,
    "float": _decode_float,
    "str": _text,
    "str:escaped": lambda node: unescape(_text(node)),
    "bytes": lambda node: base64.b64decode(_text(node), validate=True),
    "Decimal": lambda node: Decimal(_text(node)),
    "UUID": lambda node: UUID(_text(node)),
    "date": lambda node: date.fromisoformat(_text(node)),
    "datetime": lambda node: _from_iso(datetime, node),
    "time": lambda node: _from_iso(time, node),
    "timedelta": _decode_timedelta,
    **_path_decoders("Path", Path),
    **_path_decoders("PurePosixPath", PurePosixPath),
    **_path_decoders("PureWindowsPath", PureWindowsPath),
}
