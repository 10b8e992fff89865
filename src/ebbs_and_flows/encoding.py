"""From Python to JSON: one value, and all that is in it, to type name and node. The form is told in `codec`."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, Flag
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Final

from ebbs_and_flows.errors import TypeRegistrationError
from ebbs_and_flows.records import Slot, shape_of
from ebbs_and_flows.registry import TypeRegistry
from ebbs_and_flows.scalars import ENCODERS, RefusedValueError, described, encode_int, is_clean

MAX_DEPTH: Final = 400
"""How deep a stored value may nest, tags included. SQLite's JSON functions end at 1000, and Python's default recursion
limit of 1000 must hold two frames a level."""

TAG: Final = "$type"

_ROOM = 3  # levels that the innermost container may need besides its own: a pair, a tag, a tagged key
_NATURAL_NAMES = {cls: cls.__name__ for cls in (bool, int, float, str, list, dict)}
_JSON = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":"))


def json_text(node: Any) -> str:
    """Write a node as compact ASCII JSON."""
    if type(node) is int:
        return int.__repr__(node)
    return quote(node) if type(node) is str else _JSON.encode(node)


class Encoding:
    """The encoding of one value: what is open above the value at hand, to find circles.

    Here and in `Decoding` a level of nesting takes two frames of the call stack. So there are no comprehensions around
    `nested`: before Python 3.12 each would be a frame more.
    """

    __slots__ = ("open", "registry")

    def __init__(self, registry: TypeRegistry) -> None:
        self.registry = registry
        self.open: set[int] = set()

    def nested(self, value: Any, slot: Slot | None, depth: int) -> Any:
        """Give the node of a value within another one, tagged where the slot does not say its type.

        Args:
            depth: how deep this node is in the stored JSON; the outermost one is at 1.
        """
        if value is None:
            return None
        cls = type(value)
        fits = slot is not None and slot.ref() is cls
        scalar = ENCODERS.get(cls)
        if scalar is not None:
            name, node = scalar(value)
            encode = None
        else:
            encode = self.encoder_of(cls)
            tagged = not fits and (slot is not None or cls not in _NATURAL_NAMES)
            name, node = encode(self, value, slot.item if slot is not None and fits else None, depth + tagged)
        if slot is None:
            bare = type(node) is cls and _NATURAL_NAMES.get(cls) == name
        else:
            # What a codec wrote is always tagged: where the codec is missing, it must not pass for a plain value.
            bare = fits and (name == slot.name or (slot.name is None and encode is not Encoding.by_codec))
        return node if bare else {TAG: name, "value": node}

    def encoder_of(self, cls: type) -> Encode:
        container = _CONTAINER_ENCODERS.get(cls)
        if container is not None:
            return container
        registration = self.registry.registration_of(cls)
        if registration is not None and registration.codec is not None:
            return Encoding.by_codec
        if issubclass(cls, Flag):
            return Encoding.flag
        if issubclass(cls, Enum):
            return Encoding.enum
        if shape_of(cls) is not None:
            return Encoding.record
        raise RefusedValueError(cls, _why_not(cls))

    def enter(self, value: object, depth: int) -> None:
        if id(value) in self.open:
            raise RefusedValueError(type(value), "it is circular: it contains itself")
        if depth > MAX_DEPTH - _ROOM:
            raise RefusedValueError(
                type(value), f"it is nested too deeply: more than MAX_DEPTH = {MAX_DEPTH} levels of JSON"
            )
        self.open.add(id(value))

    def array(self, value: Any, item: Slot | None, depth: int) -> tuple[str, list[Any]]:
        self.enter(value, depth)
        nodes = []
        index = 0
        try:
            for index, element in enumerate(value):  # noqa: B007  # the error path below names it
                nodes.append(self.nested(element, item, depth + 1))
        except RefusedValueError as refusal:
            refusal.steps.append(f"[{index}]")
            raise
        self.open.discard(id(value))
        return type(value).__name__, nodes

    def unordered(self, value: Any, item: Slot | None, depth: int) -> tuple[str, list[Any]]:
        self.enter(value, depth)
        nodes = []
        try:
            for element in value:
                nodes.append(self.nested(element, item, depth + 1))  # noqa: PERF401  # see Encoding
        except RefusedValueError as refusal:
            refusal.steps.append("{...}")
            raise
        self.open.discard(id(value))
        nodes.sort(key=json_text)
        return type(value).__name__, nodes

    def mapping(self, value: dict[Any, Any], item: Slot | None, depth: int) -> tuple[str, Any]:
        self.enter(value, depth)
        natural = all(type(key) is str and key != TAG and is_clean(key) for key in value)
        nodes: dict[str, Any] = {}
        pairs: list[list[Any]] = []
        key: Any = None
        key_node: Any = None
        try:
            for key, element in value.items():
                if natural:
                    nodes[key] = self.nested(element, item, depth + 1)
                else:
                    key_node = self.key(key, depth + 3)
                    pairs.append([key_node, self.nested(element, item, depth + 3)])
        except RefusedValueError as refusal:
            refusal.steps.append(_key_step(key))
            raise
        self.open.discard(id(value))
        return "dict", nodes if natural else pairs

    def key(self, key: Any, depth: int) -> Any:
        try:
            return self.nested(key, None, depth)
        except RefusedValueError as refusal:
            refusal.steps.append(" (the key)")
            raise

    def record(self, value: Any, _: Slot | None, depth: int) -> tuple[str, dict[str, Any]]:
        cls = type(value)
        self.enter(value, depth)
        shape = shape_of(cls)
        assert shape is not None
        try:
            fields, beside = shape.kind.take_apart(value, shape.slots)
        except Exception as error:
            raise RefusedValueError(cls, f"reading its fields raised {described(error)}") from error
        nodes = {}
        name = ""
        try:
            for name, field in fields.items():
                nodes[name] = self.nested(field, shape.slots[name], depth + 1)
            for name, field in beside.items():
                nodes[name] = self.nested(field, None, depth + 1)
        except RefusedValueError as refusal:
            refusal.steps.append(f".{name}")
            raise
        self.open.discard(id(value))
        return self.name_of(cls), nodes

    def enum(self, value: Any, _: Slot | None, depth: int) -> tuple[str, str]:
        cls = type(value)
        name = value._name_
        if type(name) is not str or cls._member_map_.get(name) is not value or not is_clean(name):
            raise RefusedValueError(cls, f"it is no named member of {cls.__qualname__}")
        return self.name_of(cls), name

    def flag(self, value: Any, _: Slot | None, depth: int) -> tuple[str, int | str]:
        cls = type(value)
        if type(value._value_) is not int:
            raise RefusedValueError(cls, "its value is no int")
        return self.name_of(cls), encode_int(value._value_)[1]

    def by_codec(self, value: Any, _: Slot | None, depth: int) -> tuple[str, Any]:
        cls = type(value)
        self.enter(value, depth)
        registration = self.registry.registration_of(cls)
        assert registration is not None
        assert registration.codec is not None
        try:
            inner = registration.codec.encode(value)
        except Exception as error:
            raise RefusedValueError(cls, f"its codec raised {described(error)}") from error
        try:
            node = self.nested(inner, None, depth + 1)
        except RefusedValueError as refusal:
            refusal.steps.append(" (as its codec encodes it)")
            raise
        self.open.discard(id(value))
        return registration.name, node

    def name_of(self, cls: type) -> str:
        try:
            return self.registry.name_of(cls)
        except TypeRegistrationError as error:
            raise RefusedValueError(cls, str(error)) from error


Encode = Callable[[Encoding, Any, "Slot | None", int], tuple[str, Any]]

_CONTAINER_ENCODERS: dict[type, Encode] = {
    list: Encoding.array,
    tuple: Encoding.array,
    set: Encoding.unordered,
    frozenset: Encoding.unordered,
    dict: Encoding.mapping,
}


def _why_not(cls: type) -> str:
    name = f"{cls.__module__}.{cls.__qualname__}"
    for base in (*_CONTAINER_ENCODERS, *ENCODERS):
        if issubclass(cls, base):
            return (
                f"{name} is a subclass of {base.__name__} and would come back as another type: convert it to "
                f"{base.__name__}, or say how it is stored with register_codec({cls.__qualname__}, ...)"
            )
    return (
        f"a value of type {name} is none that can be: store what it stands for instead, or say how it is stored with "
        f"register_codec({cls.__qualname__}, ...)"
    )


def _key_step(key: object) -> str:
    if type(key) in ENCODERS:
        shown = repr(key)
        return f"[{shown}]" if len(shown) <= 60 else f"[{shown[:57]}...]"
    return f"[<{type(key).__qualname__}>]"
