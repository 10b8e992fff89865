"""User classes that the codec takes apart by itself: dataclasses, NamedTuples, Pydantic models; and what their fields
promise.

A record is stored as an object of its fields. What its annotations promise is not said again in the data: a field
annotated `Decimal` has a *slot* of that class, and a value of exactly that class is stored in it without a tag.

Beside the fields an object may have:

    $attributes   instance attributes that are no fields (set in `__post_init__`, say), without cached properties
    $fields_set   a model's explicitly set fields, where those are not all of its fields
    $extra        a model's extra fields
    $private      a model's private attributes
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
import types
import typing
import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ebbs_and_flows.scalars import SLOT_CLASSES, is_clean

CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset, dict)

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class statement made it


@dataclass(frozen=True, slots=True)
class Slot:
    """What a place promises about the value in it.

    Attributes:
        ref: the exact class; weak, so that the cache of shapes keeps no class alive.
        name: the type name of a bare node of that class; `None` for user classes, whose nodes are always bare here.
        item: the slot of a container's elements (of a dict's values), `None` where nothing is promised.
    """

    ref: weakref.ref[type]
    name: str | None
    item: Slot | None = None


class RecordKind(Protocol):
    """One way of being a record: how its instances are read and made without running their constructor."""

    def annotations(self, cls: type) -> dict[str, Any]:
        """Give the fields in order, each with its annotation, `Any` where that cannot be resolved."""

    def take_apart(self, value: Any, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the fields, and what is kept beside them under a name with `$`."""

    def put_together(self, cls: type, fields: dict[str, Any], beside: dict[str, Any]) -> Any:
        """Make an instance of exactly these values; a missing field gets its default.

        Raises:
            ValueError: a field without default is missing.
        """


@dataclass(frozen=True, slots=True)
class Shape:
    """A record class as the codec sees it: its kind, and the slot of each field in order."""

    kind: RecordKind
    slots: dict[str, Slot | None]


def shape_of(cls: type) -> Shape | None:
    """Give the shape of a record class; `None` for any other, and where a field's name cannot be a key. Cached."""
    try:
        return _SHAPES[cls]
    except KeyError:
        kind = _kind_of(cls)
        shape = None
        annotations = {} if kind is None else kind.annotations(cls)
        # What is kept beside the fields is told from them by its $.
        if kind is not None and not any(name.startswith("$") or not is_clean(name) for name in annotations):
            shape = Shape(kind, {name: slot_for(annotation) for name, annotation in annotations.items()})
        _SHAPES[cls] = shape
        return shape


def field_annotations(cls: type) -> dict[str, Any]:
    """Give a record class' fields with their annotations; nothing for any other class."""
    kind = _kind_of(cls)
    return {} if kind is None else kind.annotations(cls)


def is_record(cls: type) -> bool:
    """Whether instances of this class are stored field by field."""
    return _kind_of(cls) is not None


def slot_for(annotation: Any) -> Slot | None:
    """Give what an annotation promises: `None` where it allows several classes, or one that the codec does not know."""
    bare = unwrap(annotation)
    cls = typing.get_origin(bare) or bare
    if not isinstance(cls, type):
        return None
    if cls in SLOT_CLASSES:
        exact, name = SLOT_CLASSES[cls]
        return Slot(weakref.ref(exact), name)
    if cls in CONTAINERS:
        return Slot(weakref.ref(cls), cls.__name__, _item_slot(cls, typing.get_args(bare)))
    if issubclass(cls, Enum) or is_record(cls):
        return Slot(weakref.ref(cls), None)
    return None


def unwrap(annotation: Any) -> Any:
    """Strip what says nothing about the class: Annotated, Final, NewType, type aliases, and `| None`."""
    for _ in range(20):
        origin = typing.get_origin(annotation)
        if origin is typing.Annotated or origin is typing.Final:
            annotation = typing.get_args(annotation)[0]
        elif origin is typing.Union or origin is types.UnionType:
            members = [member for member in typing.get_args(annotation) if member is not type(None)]
            if len(members) != 1:
                return annotation
            annotation = members[0]
        elif hasattr(annotation, "__supertype__"):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation
    return Any


_SHAPES: weakref.WeakKeyDictionary[type, Shape | None] = weakref.WeakKeyDictionary()


def _item_slot(cls: type, arguments: tuple[Any, ...]) -> Slot | None:
    try:
        if cls is dict:
            return slot_for(arguments[1]) if len(arguments) == 2 else None
        if cls is tuple:
            return slot_for(arguments[0]) if len(arguments) == 2 and arguments[1] is Ellipsis else None
        return slot_for(arguments[0]) if len(arguments) == 1 else None
    except RecursionError:  # a type alias that contains itself
        return None


def _kind_of(cls: type) -> RecordKind | None:
    if issubclass(cls, Enum):
        return None
    if issubclass(cls, tuple):
        fields = getattr(cls, "_fields", None)
        named = isinstance(fields, tuple) and all(type(name) is str for name in fields) and hasattr(cls, "_make")
        return _NAMED_TUPLE if named else None
    if issubclass(cls, BaseModel):
        return _MODEL
    if dataclasses.is_dataclass(cls) and _has_no_builtin_base(cls):
        return _DATACLASS
    return None


def _has_no_builtin_base(cls: type) -> bool:
    # The contents of a builtin base (of a list, an exception) are no attributes, and would be lost.
    return all(base is object or base.__flags__ & _HEAP_TYPE for base in cls.__mro__)


def _resolved(cls: type, names: Iterable[str]) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception:  # whatever evaluating the user's annotations raises: then they promise nothing
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def _attributes_beside(value: object, fields: Collection[str]) -> dict[str, Any]:
    """Give the instance's attributes that are no fields, less what a cached property has put there."""
    cls = type(value)
    return {
        name: attribute
        for name, attribute in getattr(value, "__dict__", {}).items()
        if name not in fields and not isinstance(inspect.getattr_static(cls, name, None), functools.cached_property)
    }


def _slots_beside(value: object, fields: Collection[str]) -> dict[str, Any]:
    """Give what stands in the instance's `__slots__` and is no field."""
    names: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]  # the slots that pickle sees
    return {name: getattr(value, name) for name in names if name not in fields and hasattr(value, name)}


def _names_of(cls: type) -> tuple[str, ...]:
    names: tuple[str, ...] = cls._fields  # type: ignore[attr-defined]  # a NamedTuple it is
    return names


def _set_attributes(value: object, beside: dict[str, Any]) -> None:
    for name, attribute in _mapping(beside, "$attributes").items():
        object.__setattr__(value, name, attribute)


def _mapping(beside: dict[str, Any], key: str) -> dict[str, Any]:
    found = beside.get(key, {})
    if type(found) is not dict or not all(type(name) is str for name in found):
        raise ValueError(f"{key} is not an object")
    return found


class _Dataclass:
    """Dataclasses, the frozen, slotted and Pydantic ones included."""

    def annotations(self, cls: type) -> dict[str, Any]:
        return _resolved(cls, [field.name for field in dataclasses.fields(cls)])

    def take_apart(self, value: Any, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        fields = {}
        for field in dataclasses.fields(value):
            try:
                fields[field.name] = getattr(value, field.name)
            except AttributeError:
                if field.init or field.default_factory is not dataclasses.MISSING:
                    raise
        attributes = _attributes_beside(value, names) | _slots_beside(value, names)
        return fields, {"$attributes": attributes} if attributes else {}

    def put_together(self, cls: type, fields: dict[str, Any], beside: dict[str, Any]) -> Any:
        value: Any = object.__new__(cls)
        for field in dataclasses.fields(cls):
            name = field.name
            if name in fields:
                object.__setattr__(value, name, fields[name])
            elif field.default_factory is not dataclasses.MISSING:
                object.__setattr__(value, name, field.default_factory())
            elif field.default is not dataclasses.MISSING:
                object.__setattr__(value, name, field.default)
            elif field.init:
                raise ValueError(f"the stored value has no field {name!r}, and the field has no default")
        _set_attributes(value, beside)
        return value


class _NamedTuple:
    """`typing.NamedTuple` and `collections.namedtuple`, and subclasses of those."""

    def annotations(self, cls: type) -> dict[str, Any]:
        return _resolved(cls, _names_of(cls))

    def take_apart(self, value: Any, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        elements = list(tuple.__iter__(value))
        if len(elements) != len(names):
            raise ValueError(f"it has {len(elements)} elements for its {len(names)} fields")
        attributes = _attributes_beside(value, names)
        return dict(zip(names, elements, strict=True)), {"$attributes": attributes} if attributes else {}

    def put_together(self, cls: type, fields: dict[str, Any], beside: dict[str, Any]) -> Any:
        defaults: dict[str, Any] = getattr(cls, "_field_defaults", {})
        names = _names_of(cls)
        for name in names:
            if name not in fields and name not in defaults:
                raise ValueError(f"the stored value has no field {name!r}, and the field has no default")
        value: Any = tuple.__new__(cls, [fields[name] if name in fields else defaults[name] for name in names])
        _set_attributes(value, beside)
        return value


class _Model:
    """Pydantic models, through the state that Pydantic itself pickles: nothing is validated again."""

    def annotations(self, cls: type[BaseModel]) -> dict[str, Any]:
        if not cls.__pydantic_complete__:
            cls.model_rebuild(raise_errors=False)
        return {name: field.annotation for name, field in cls.model_fields.items()}

    def take_apart(self, value: BaseModel, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        state = value.__dict__
        fields = {}
        for name in names:
            if name not in state:
                raise ValueError(f"its field {name!r} is not set")
            fields[name] = state[name]
        beside: dict[str, Any] = {}
        chosen = value.__pydantic_fields_set__
        if chosen != fields.keys():
            beside["$fields_set"] = sorted(chosen)
        if value.__pydantic_extra__:
            beside["$extra"] = value.__pydantic_extra__
        if value.__pydantic_private__ is not None:
            beside["$private"] = {
                name: kept for name, kept in value.__pydantic_private__.items() if kept is not PydanticUndefined
            }
        attributes = _attributes_beside(value, fields)
        if attributes:
            beside["$attributes"] = attributes
        return fields, beside

    def put_together(self, cls: type[BaseModel], fields: dict[str, Any], beside: dict[str, Any]) -> Any:
        chosen = set(beside.get("$fields_set", fields))
        values: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            if name in fields:
                values[name] = fields[name]
            elif field.is_required():
                raise ValueError(f"the stored value has no field {name!r}, and the field has no default")
            else:
                values[name] = field.get_default(call_default_factory=True, validated_data=values)
        value = cls.__new__(cls)
        BaseModel.__setstate__(
            value,
            {
                "__dict__": values | _mapping(beside, "$attributes"),
                "__pydantic_fields_set__": chosen,
                "__pydantic_extra__": _mapping(beside, "$extra") if cls.model_config.get("extra") == "allow" else None,
                "__pydantic_private__": self._private(cls, beside),
            },
        )
        return value

    def _private(self, cls: type[BaseModel], beside: dict[str, Any]) -> dict[str, Any] | None:
        if not cls.__private_attributes__:
            return _mapping(beside, "$private") if "$private" in beside else None
        private = {name: attribute.get_default() for name, attribute in cls.__private_attributes__.items()}
        private = {name: default for name, default in private.items() if default is not PydanticUndefined}
        return private | _mapping(beside, "$private")


_DATACLASS = _Dataclass()
_NAMED_TUPLE = _NamedTuple()
_MODEL = _Model()
