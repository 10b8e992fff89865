"""The execution context: the named Python objects that travel from task to task."""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar, overload

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from ebbs_and_flows.codec import EncodedValue, decode_value, encode_value
from ebbs_and_flows.errors import (
    DuplicateEntryError,
    EbbsError,
    FrozenContextError,
    InvalidContextError,
    InvalidEntryError,
    MissingEntryError,
)
from ebbs_and_flows.names import valid_name

T = TypeVar("T")
D = TypeVar("D")

_MISSING: Final[Any] = object()
_SHOWN_ENTRIES = 20

# Values of these types cannot be mutated, so an entry read as one needs no live value of its own.
_IMMUTABLE_TYPES = frozenset(
    ("null", "bool", "int", "float", "str", "str:escaped", "bytes", "Decimal", "UUID", "date", "datetime", "time")
) | {"timedelta", "Path", "Path:escaped"}
_SCALARS = frozenset((bool, int, float, str, bytes))


class _Live:
    """An entry's value in memory, and the stored form that it was read from, if any."""

    __slots__ = ("origin", "value")

    def __init__(self, value: Any, origin: EncodedValue | None = None) -> None:
        self.value = value
        self.origin = origin

    def encode(self, name: str) -> EncodedValue:
        encoded = encode_value(self.value, name)
        return self.origin if self.origin is not None and encoded == self.origin else encoded

    def copy(self) -> _Live:
        try:
            return _Live(copy.deepcopy(self.value), self.origin)
        except Exception:  # deepcopy runs code of the value's class; a value that cannot be copied is shared
            return _Live(self.value, self.origin)


class ContextDelta(NamedTuple):
    """What one task made of the context it was given.

    Attributes:
        entries: the entries that it added or changed, as they are stored.
        dropped: the names of those that it left out.
    """

    entries: dict[str, EncodedValue]
    dropped: tuple[str, ...] = ()


class ExecutionContext(Mapping[str, Any]):
    """Named values, each of which comes back from the database as what was put in: the same type, the same value.

    A context that you make is yours to fill with `set`; its values are stored when the flow is scheduled. The context
    handed to a task is read-only, and each read of an entry gives a value of the task's own: mutating it changes
    nothing stored. A task adds entries with `return context.copy(receipt=receipt)`.

    Args:
        mapping: entries by name, or another context; then the new one is an independent copy of it.
        entries: more entries.

    Raises:
        InvalidNameError: a name that is no str, blank, of more than 255 characters, or with control characters or lone
            surrogates. Names are normalised to NFC.
        DuplicateEntryError: a name that is given twice.
        InvalidContextError: `mapping` is no mapping.
    """

    __slots__ = ("_base", "_dropped", "_entries", "_frozen", "_touched")

    _entries: dict[str, EncodedValue | _Live]
    _frozen: bool
    # What a copy of a read-only context remembers, so that what a task changed is found without looking at all else:
    # the entries that it is a copy of, the names added or read as values that can be mutated, and those left out.
    _base: dict[str, EncodedValue | _Live] | None
    _touched: dict[str, None]
    _dropped: dict[str, None]

    def __init__(self, mapping: Mapping[str, Any] | None = None, /, **entries: Any) -> None:
        self._frozen = False
        if isinstance(mapping, ExecutionContext):
            self._copy_from(mapping)
        else:
            self._entries = {}
            self._base = None
            self._touched = {}
            self._dropped = _NOTHING
            if mapping is not None:
                self._add(mapping)
        if entries:
            self._add(entries)

    @classmethod
    def from_encoded(cls, entries: Mapping[str, EncodedValue]) -> ExecutionContext:
        """Make a read-only context of stored entries. Nothing is decoded before it is read.

        Args:
            entries: stored entries by name; the names are taken as they are.
        """
        return cls._frozen_of(dict(entries))

    @classmethod
    def folded(cls, deltas: Iterable[ContextDelta]) -> ExecutionContext:
        """Make the read-only context that follows from these deltas, one after the other, from an empty one."""
        entries: dict[str, EncodedValue] = {}
        for delta in deltas:
            _apply(delta, entries)
        return cls._frozen_of(entries)

    @property
    def frozen(self) -> bool:
        """Whether this context is read-only."""
        return self._frozen

    # --- reading ---

    @overload
    def get(self, name: str) -> Any: ...
    @overload
    def get(self, name: str, default: D) -> Any | D: ...
    def get(self, name: str, default: Any = _MISSING) -> Any:
        """Give an entry's value.

        Args:
            name: the entry.
            default: what to give where there is no such entry; without it that is an error.

        Raises:
            MissingEntryError: there is no such entry, and no default.
            UnknownTypeError: its type is not registered in this process.
            UndecodableValueError: what is stored does not fit its type.
        """
        if default is _MISSING:
            return self[name]
        return self[name] if name in self else default  # noqa: SIM401  # this is get

    @overload
    def get_as(self, name: str, expected: type[T]) -> T: ...
    @overload
    def get_as(self, name: str, expected: Any) -> Any: ...
    def get_as(self, name: str, expected: Any) -> Any:
        """Give an entry's value, validated by Pydantic as this type.

        Args:
            name: the entry.
            expected: a class, or any annotation that Pydantic knows: `Order`, `list[Order]`, `int | None`.

        Raises:
            MissingEntryError: there is no such entry.
            InvalidEntryError: the value does not fit the type.
        """
        value = self[name]
        if type(value) is expected and expected in _SCALARS:
            return value  # every one of them, also those that Pydantic's str refuses
        try:
            return _adapter(expected).validate_python(value)
        except ValidationError as error:
            raise InvalidEntryError(name, expected, _problems(error)) from error
        except PydanticUserError as error:
            raise InvalidEntryError(name, expected, f"Pydantic cannot validate this type: {error.message}") from error

    def __getitem__(self, name: str) -> Any:
        key = self._key(name)
        if key is None:
            raise MissingEntryError(name, self._entries)
        entry = self._entries[key]
        if isinstance(entry, _Live):
            return entry.value
        value = decode_value(entry, key)
        if not self._frozen and entry.type_name not in _IMMUTABLE_TYPES and not entry.type_name.startswith(_ZONED):
            self._entries[key] = _Live(value, entry)
            self._touched[key] = None
        return value

    def __contains__(self, name: object) -> bool:
        return self._key(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # --- making contexts ---

    def set(self, name: str, value: Any) -> None:
        """Add an entry.

        Raises:
            FrozenContextError: this context is read-only: return `context.copy(...)` instead.
            InvalidNameError: the name cannot be stored.
            DuplicateEntryError: the entry is already there.
        """
        if self._frozen:
            raise FrozenContextError(name)
        self._add({name: value})

    def copy(self, mapping: Mapping[str, Any] | None = None, /, **new: Any) -> ExecutionContext:
        """Give an independent, mutable copy with new entries.

        Values in memory are copied deeply; one that cannot be copied is shared.

        Raises:
            InvalidNameError: a new name cannot be stored.
            DuplicateEntryError: a new name is already there.
            InvalidContextError: `mapping` is no mapping.
        """
        copied = self._copy()
        if mapping is not None:
            copied._add(mapping)
        if new:
            copied._add(new)
        return copied

    def without(self, *names: str) -> ExecutionContext:
        """Give an independent, mutable copy less these entries.

        Raises:
            MissingEntryError: one of them is not there.
        """
        left_out: dict[str, None] = {}
        for name in names:
            key = self._key(name)
            if key is None:
                raise MissingEntryError(name, self._entries)
            left_out[key] = None
        return self._copy(left_out)

    # --- storing ---

    def encode(self) -> dict[str, EncodedValue]:
        """Give the entries as they are stored. One that was read from the database and not changed is the same object.

        Raises:
            UnserializableValueError: a value that cannot be stored; the error has the path to it.
        """
        return {
            name: entry.encode(name) if isinstance(entry, _Live) else entry for name, entry in self._entries.items()
        }

    def delta_from(self, base: ExecutionContext) -> ContextDelta:
        """Give what a task that was given `base` has added, changed and dropped in this context.

        Raises:
            UnserializableValueError: a value that cannot be stored; the error has the path to it.
        """
        if self._base is not None and self._base is base._entries:
            return self._delta_from_own_base(self._base)
        before, after = base._stored(), self._stored()
        if before is after:
            return ContextDelta({})
        entries = {}
        for name, encoded in after.items():
            earlier = before.get(name)
            if earlier is not encoded and earlier != encoded:
                entries[name] = encoded
        return ContextDelta(entries, tuple([name for name in before if name not in after]))

    def fold(self, delta: ContextDelta) -> ExecutionContext:
        """Give the read-only context that follows: less what was dropped, what was added or changed at the end."""
        entries = self._stored().copy()
        _apply(delta, entries)
        return ExecutionContext._frozen_of(entries)

    # --- as an object ---

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        if len(self) != len(other) or any(name not in other for name in self):
            return False
        return all(self._entry_equals(name, other) for name in self._entries)

    __hash__ = None  # type: ignore[assignment]  # mutable, as dict is

    def __repr__(self) -> str:
        shown = [f"{name}: {_shown_type(entry)}" for name, entry in list(self._entries.items())[:_SHOWN_ENTRIES]]
        if len(self._entries) > _SHOWN_ENTRIES:
            shown.append(f"and {len(self._entries) - _SHOWN_ENTRIES} more")
        return f"<ExecutionContext {', '.join(shown)}>" if shown else "<ExecutionContext, empty>"

    def __copy__(self) -> ExecutionContext:
        return self.__deepcopy__(None)

    def __deepcopy__(self, memo: object) -> ExecutionContext:
        return ExecutionContext.from_encoded(self._stored()) if self._frozen else self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        live = {name: entry.value if isinstance(entry, _Live) else entry for name, entry in self._entries.items()}
        return _restored, (live, self._frozen)

    # --- inside ---

    def _add(self, entries: Mapping[str, Any]) -> None:
        if not isinstance(entries, Mapping):
            raise InvalidContextError(entries)
        for given, value in entries.items():
            name = _entry_name(given)
            if name in self._entries:
                raise DuplicateEntryError(name)
            self._entries[name] = _Live(value)
            self._touched[name] = None

    def _key(self, name: object) -> str | None:
        """Give the name under which the entry is there, `None` where it is not."""
        if not isinstance(name, str):
            return None
        if name in self._entries:
            return name
        if name.isascii():
            return None
        normal = unicodedata.normalize("NFC", name)
        return normal if normal in self._entries else None

    @classmethod
    def _frozen_of(cls, entries: dict[str, EncodedValue]) -> ExecutionContext:
        """Make a read-only context that keeps this very dict, which nobody may change from now on."""
        context: ExecutionContext = cls.__new__(cls)
        context._entries = entries  # type: ignore[assignment]  # frozen: all are encoded
        context._frozen = True
        context._base = None
        context._touched = context._dropped = _NOTHING
        return context

    def _copy(self, left_out: dict[str, None] | None = None) -> ExecutionContext:
        """A mutable copy, less some entries."""
        copied: ExecutionContext = ExecutionContext.__new__(ExecutionContext)
        copied._frozen = False
        copied._copy_from(self, left_out)
        return copied

    def _copy_from(self, other: ExecutionContext, left_out: dict[str, None] | None = None) -> None:
        """Take over another context's entries, less some, and what it remembers of where they come from."""
        entries = self._entries = other._entries.copy()
        if other._frozen:
            self._base = other._entries
            self._touched = {}
            self._dropped = left_out or _NOTHING
        else:
            self._base = other._base
            self._touched = other._touched.copy()
            self._dropped = {**other._dropped, **left_out} if left_out else other._dropped
        if left_out:
            for name in left_out:
                del entries[name]
        for name in self._touched:
            entry = entries.get(name)
            if isinstance(entry, _Live):
                entries[name] = entry.copy()

    def _delta_from_own_base(self, base: dict[str, EncodedValue | _Live]) -> ContextDelta:
        entries = {}
        # As a comparison of all entries would find them: those changed in their places, then those added at the end.
        changed = [name for name in self._touched if name in base and name not in self._dropped]
        for name in dict.fromkeys((*changed, *self._touched)):
            entry = self._entries.get(name)
            if entry is not None:
                encoded = entry.encode(name) if isinstance(entry, _Live) else entry
                earlier = base.get(name)
                if earlier is not encoded and earlier != encoded:
                    entries[name] = encoded
        return ContextDelta(
            entries, tuple([each for each in self._dropped if each in base and each not in self._entries])
        )

    def _stored(self) -> dict[str, EncodedValue]:
        return self._entries if self._frozen else self.encode()  # type: ignore[return-value]  # frozen: all are encoded

    def _entry_equals(self, name: str, other: Mapping[str, Any]) -> bool:
        mine = self._entries[name]
        theirs = other._entries.get(name) if isinstance(other, ExecutionContext) else None
        if isinstance(mine, EncodedValue) and isinstance(theirs, EncodedValue):
            return mine == theirs
        try:
            left, right = self[name], other[name]
        except EbbsError:  # one of them cannot be read here, so nobody can say that they are equal
            return False
        return left is right or bool(left == right)


_NOTHING: dict[str, None] = {}
"""What a read-only context has touched, and what most have dropped. Shared, and never written to."""


def _apply(delta: ContextDelta, entries: dict[str, EncodedValue]) -> None:
    for name in delta.dropped:
        entries.pop(name, None)
    for name, entry in delta.entries.items():
        entries.pop(name, None)
        entries[name] = entry


def _entry_name(name: object) -> str:
    # Of a subclass of str (an Enum, say), its text: what a lookup by it finds.
    return valid_name("context entry", str.__str__(name) if isinstance(name, str) else name)


_ZONED = ("datetime[", "time[")


def _restored(entries: dict[str, Any], frozen: bool) -> ExecutionContext:
    context = ExecutionContext()
    context._entries = {
        name: entry if isinstance(entry, EncodedValue) else _Live(entry) for name, entry in entries.items()
    }
    context._touched = dict.fromkeys(name for name, entry in context._entries.items() if isinstance(entry, _Live))
    context._frozen = frozen
    return context


def _shown_type(entry: EncodedValue | _Live) -> str:
    return entry.type_name if isinstance(entry, EncodedValue) else type(entry.value).__name__


def _adapter(expected: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(expected)
    except TypeError:  # an annotation that cannot be hashed
        return _new_adapter(expected)


def _new_adapter(expected: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(expected)
    except PydanticSchemaGenerationError:
        return TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True))


# Bounded, because classes made at run time would be kept alive otherwise.
_cached_adapter = lru_cache(maxsize=512)(_new_adapter)


def _problems(error: ValidationError) -> str:
    """Say what is wrong without showing the value, which may be a secret."""
    problems = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False)[:5]:
        place = ".".join(str(step) for step in problem["loc"])
        problems.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    return "; ".join(problems)
