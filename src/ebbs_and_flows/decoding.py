"""From JSON to Python: one node, and all that is in it, to a value. The form is told in `codec`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import Enum, Flag
from typing import Any

from ebbs_and_flows.encoding import TAG
from ebbs_and_flows.records import Shape, Slot, shape_of
from ebbs_and_flows.registry import Registration, TypeRegistry
from ebbs_and_flows.scalars import DECODERS, decode_int, decode_zoned, is_zoned_name


class UnknownNameError(Exception):
    def __init__(self, type_name: str) -> None:
        super().__init__(type_name)
        self.type_name = type_name


class Decoding:
    """The decoding of one value. What does not fit raises any exception: `decode_value` gives each the same name."""

    __slots__ = ("registry",)

    def __init__(self, registry: TypeRegistry) -> None:
        self.registry = registry

    def nested(self, node: Any, slot: Slot | None) -> Any:
        """Make the value of a node within another one."""
        item = None
        if type(node) is dict and TAG in node:
            name, node = _untagged(node)
        elif slot is None:
            if type(node) is list:
                return self.as_list(node, None)
            return self.as_dict(node, None) if type(node) is dict else node
        elif node is None:
            return None
        elif slot.name is None:
            return self.user(slot.ref(), node)
        else:
            name, item = slot.name, slot.item

        scalar = DECODERS.get(name)
        if scalar is not None:
            return scalar(node)
        container = _CONTAINER_DECODERS.get(name)
        if container is not None:
            return container(self, node, item)
        if is_zoned_name(name):
            return decode_zoned(name, node)
        registration = self.registry.registration_named(name)
        if registration is None:
            raise UnknownNameError(name)
        return self.user(registration.cls, node) if registration.codec is None else self.by_codec(registration, node)

    def as_list(self, node: Any, item: Slot | None) -> list[Any]:
        elements = []
        for element in _array(node):
            elements.append(self.nested(element, item))  # noqa: PERF401  # see Encoding
        return elements

    def as_tuple(self, node: Any, item: Slot | None) -> tuple[Any, ...]:
        elements = []
        for element in _array(node):
            elements.append(self.nested(element, item))  # noqa: PERF401  # see Encoding
        return tuple(elements)

    def as_set(self, node: Any, item: Slot | None) -> set[Any]:
        elements = set()
        for element in _array(node):
            elements.add(self.nested(element, item))
        _expect_all(elements, node)
        return elements

    def as_frozenset(self, node: Any, item: Slot | None) -> frozenset[Any]:
        elements = set()
        for element in _array(node):
            elements.add(self.nested(element, item))
        _expect_all(elements, node)
        return frozenset(elements)

    def as_dict(self, node: Any, item: Slot | None) -> dict[Any, Any]:
        entries: dict[Any, Any] = {}
        if type(node) is dict:
            if TAG in node:
                raise ValueError(f"an object with the key {TAG!r} stands where a dict is expected")
            for name, element in node.items():
                entries[name] = self.nested(element, item)
            return entries
        for pair in _array(node):
            key, element = _array(pair)
            entries[self.nested(key, None)] = self.nested(element, item)
        _expect_all(entries, node)
        return entries

    def user(self, cls: type | None, node: Any) -> Any:
        if cls is None:
            raise TypeError("the class of this field is gone")
        if issubclass(cls, Flag):
            return cls(decode_int(node))
        if issubclass(cls, Enum):
            if type(node) is not str or node not in cls.__members__:
                raise ValueError(f"{cls.__qualname__} has no member {node!r}")
            return cls[node]
        shape = shape_of(cls)
        if shape is None:
            raise TypeError(f"{cls.__qualname__} is not stored field by field")
        return self.record(cls, shape, node)

    def record(self, cls: type, shape: Shape, node: Any) -> Any:
        if type(node) is not dict:
            raise TypeError(f"expected an object of fields, found {type(node).__name__}")
        fields, beside = {}, {}
        for name, element in node.items():
            if name in shape.slots:
                fields[name] = self.nested(element, shape.slots[name])
            elif name.startswith("$"):
                beside[name] = self.nested(element, None)
            # A field that the class no longer has is left in the row.
        return shape.kind.put_together(cls, fields, beside)

    def by_codec(self, registration: Registration, node: Any) -> Any:
        assert registration.codec is not None
        value = registration.codec.decode(self.nested(node, None))
        if type(value) is not registration.cls:
            raise TypeError(f"its codec gave a {type(value).__qualname__}, not a {registration.cls.__qualname__}")
        return value


_CONTAINER_DECODERS: dict[str, Callable[[Decoding, Any, Slot | None], Any]] = {
    "list": Decoding.as_list,
    "tuple": Decoding.as_tuple,
    "set": Decoding.as_set,
    "frozenset": Decoding.as_frozenset,
    "dict": Decoding.as_dict,
}


def _untagged(node: dict[str, Any]) -> tuple[str, Any]:
    if len(node) != 2 or "value" not in node or type(node[TAG]) is not str:
        raise ValueError(f"a tag is an object of a string {TAG!r} and a 'value'")
    return node[TAG], node["value"]


def _array(node: Any) -> list[Any]:
    if type(node) is not list:
        raise TypeError(f"expected an array, found {type(node).__name__}")
    return node


def _expect_all(made: Collection[Any], node: Collection[Any]) -> None:
    if len(made) != len(node):
        raise ValueError("some of its elements or keys are equal")
