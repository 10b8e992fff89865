"""Python values to JSON and back, exactly: the one place through which every stored value goes.

An entry is stored as a JSON value, its *node*, and beside it the name of its type. The node is what an analyst would
write: 17, "12.50", {"sku": "A-1", "price": "3.20"}. A type is named inside the node only where plain JSON, and the
annotations of the class around it, do not say it:

    {"$type": "<name>", "value": <node>}

Plain JSON says by itself: None, bool, int, finite float, str, list, and dict whose keys are str. A field of a user
class says the type of what is in it if its annotation is one exact class (`records`): a value of that class stands in
it bare, any other one tagged; None is null everywhere.

    type name                   node
    null, bool, int, ...        single values: see `scalars`
    list, tuple                 array
    set, frozenset              array, in the order of the elements' JSON texts: equal sets, equal texts
    dict                        object; an array of [key, value] pairs where a key is no str, is "$type", or has NUL or
                                lone surrogates
    <enum's name>               the member's name; a Flag's value
    <record's name>             object of the fields, see `records`
    <name of a codec's class>   what its `encode` gave, encoded in turn

A name is looked up among these and the registered classes (`registry`). Nothing is imported or unpickled by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from enum import Enum, Flag
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Final

from ebbs_and_flows.errors import (
    TypeRegistrationError,
    UndecodableValueError,
    UnknownTypeError,
    UnserializableValueError,
)
from ebbs_and_flows.pickle_codec import PickleCodec
from ebbs_and_flows.records import Shape, Slot, shape_of
from ebbs_and_flows.registry import (
    REGISTRY,
    Registration,
    TypeRegistry,
    ValueCodec,
    declare_type,
    register_codec,
    register_type,
)
from ebbs_and_flows.scalars import (
    DECODERS,
    ENCODERS,
    RefusedValueError,
    decode_int,
    decode_zoned,
    encode_int,
    is_clean,
    is_zoned_name,
)

__all__ = [
    "MAX_DEPTH",
    "EncodedValue",
    "PickleCodec",
    "TypeRegistry",
    "ValueCodec",
    "declare_type",
    "decode_value",
    "dumps_entries",
    "encode_value",
    "loads_entries",
    "register_codec",
    "register_type",
]

MAX_DEPTH: Final = 400
"""How deep a stored value may nest, tags included. SQLite's JSON functions end at 1000, and Python's default recursion
limit of 1000 must hold two frames a level."""

_TAG = "$type"
_ROOM = 3  # levels that the innermost container may need besides its own: a pair, a tag, a tagged key
_NATURAL_CLASSES: dict[str, type] = {cls.__name__: cls for cls in (bool, int, float, str, list, dict)}
_NATURAL_NAMES = {cls: name for name, cls in _NATURAL_CLASSES.items()}
_NATURAL_SCALARS = {name: cls for name, cls in _NATURAL_CLASSES.items() if cls not in (list, dict)}

_JSON = json.JSONEncoder(check_circular=False, allow_nan=False, separators=(",", ":"))


class EncodedValue:
    """A value as it is stored. Immutable; equal where type name and JSON text are, so that 1, 1.0 and True differ.

    Attributes:
        node: the value as plain JSON types. Shared, so never to be mutated or handed to a user.
        type_name: the name of its type.
    """

    __slots__ = ("_text", "node", "type_name")

    node: Any
    type_name: str
    _text: str | None

    def __init__(self, node: Any, type_name: str) -> None:
        _set_node(self, node)
        _set_type_name(self, type_name)
        _set_text(self, None)

    @property
    def json_text(self) -> str:
        """The node as compact ASCII JSON."""
        text = self._text
        if text is None:
            text = _json_text(self.node)
            _set_text(self, text)
        return text

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"EncodedValue is immutable: {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"EncodedValue is immutable: {name!r} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EncodedValue):
            return NotImplemented
        return self is other or (self.type_name == other.type_name and self.json_text == other.json_text)

    def __hash__(self) -> int:
        return hash((self.type_name, self.json_text))

    def __repr__(self) -> str:
        return f"<EncodedValue {self.type_name}>"

    def __reduce__(self) -> tuple[type[EncodedValue], tuple[Any, str]]:
        return EncodedValue, (self.node, self.type_name)

    def __copy__(self) -> EncodedValue:
        return self

    def __deepcopy__(self, memo: object) -> EncodedValue:
        return self


_set_node = EncodedValue.__dict__["node"].__set__
_set_type_name = EncodedValue.__dict__["type_name"].__set__
_set_text = EncodedValue.__dict__["_text"].__set__


def encode_value(value: Any, path: str, *, registry: TypeRegistry = REGISTRY) -> EncodedValue:
    """Give a value as it is stored.

    Args:
        value: the value.
        path: what to call it in an error: the name of the entry.
        registry: the registered classes.

    Raises:
        UnserializableValueError: the value, or one within it, cannot be stored; the error has the path to it.
    """
    try:
        scalar = ENCODERS.get(type(value))
        if scalar is not None:
            name, node = scalar(value)
            return EncodedValue(node, name)
        encoding = _Encoding(registry)
        name, node = encoding.encoder_of(type(value))(encoding, value, None, 1)
        encoded = EncodedValue(node, name)
        _set_text(encoded, _json_text(node))
        return encoded
    except RefusedValueError as refusal:
        full_path = path + refusal.path
        raise UnserializableValueError(full_path, refusal.value_type, refusal.problem) from refusal.__cause__
    except RecursionError as error:
        problem = f"it is nested too deeply for what is left of the call stack (at most {MAX_DEPTH} levels anywhere)"
        raise UnserializableValueError(path, type(value), problem) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UnserializableValueError(path, type(value), f"reading it raised {_described(error)}") from error


def decode_value(encoded: EncodedValue, entry: str | None = None, *, registry: TypeRegistry = REGISTRY) -> Any:
    """Make the value again. Each call makes a new one, which shares nothing with the stored form.

    Args:
        encoded: the stored form; it may come from an altered row.
        entry: the entry it is of, for errors.
        registry: the registered classes.

    Raises:
        UnknownTypeError: it, or a value within it, is of a type that is not registered here.
        UndecodableValueError: it does not fit the type it names.
    """
    node, type_name = encoded.node, encoded.type_name
    if type(node) is _NATURAL_SCALARS.get(type_name):
        return node
    try:
        return _Decoding(registry).nested({_TAG: type_name, "value": node}, None)
    except _UnknownNameError as unknown:
        raise UnknownTypeError(entry, unknown.type_name) from None
    except RecursionError as error:
        problem = "it is nested too deeply for what is left of the call stack"
        raise UndecodableValueError(entry, type_name, problem) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableValueError(entry, type_name, _described(error)) from error


def dumps_entries(entries: Mapping[str, EncodedValue]) -> tuple[str, str]:
    """Give two texts of JSON objects: of name to node, and of name to type name."""
    nodes, types = [], []
    for name, encoded in entries.items():
        key = _quote(name)
        nodes.append(f"{key}:{encoded.json_text}")
        types.append(f"{key}:{_quote(encoded.type_name)}")
    return f"{{{','.join(nodes)}}}", f"{{{','.join(types)}}}"


def loads_entries(entries_text: str, types_text: str) -> dict[str, EncodedValue]:
    """Read back what `dumps_entries` wrote. No value is decoded, so unknown types do no harm here.

    Raises:
        UndecodableValueError: the texts are not two JSON objects of the same names.
    """
    try:
        nodes, types = _loads(entries_text), _loads(types_text)
    except (ValueError, RecursionError, TypeError) as error:
        raise UndecodableValueError(None, "entries", f"the stored JSON is damaged: {_described(error)}") from error
    if type(nodes) is not dict or type(types) is not dict:
        raise UndecodableValueError(None, "entries", "the stored JSON is not an object of entries")
    if nodes.keys() != types.keys():
        raise UndecodableValueError(None, "entries", "the stored entries and types are not of the same names")
    for name, type_name in types.items():
        if type(type_name) is not str:
            raise UndecodableValueError(name, "?", "its stored type is not a string")
    return {name: EncodedValue(node, types[name]) for name, node in nodes.items()}


# --- encoding -----------------------------------------------------------------------------------------------------


class _Encoding:
    """The encoding of one value: what is open above the value at hand, to find circles.

    Here and in `_Decoding` a level of nesting takes two frames of the call stack. So there are no comprehensions around
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
            bare = fits and (name == slot.name or (slot.name is None and encode is not _Encoding.by_codec))
        return node if bare else {_TAG: name, "value": node}

    def encoder_of(self, cls: type) -> Encode:
        container = _CONTAINER_ENCODERS.get(cls)
        if container is not None:
            return container
        registration = self.registry.registration_of(cls)
        if registration is not None and registration.codec is not None:
            return _Encoding.by_codec
        if issubclass(cls, Flag):
            return _Encoding.flag
        if issubclass(cls, Enum):
            return _Encoding.enum
        if shape_of(cls) is not None:
            return _Encoding.record
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
                nodes.append(self.nested(element, item, depth + 1))  # noqa: PERF401  # see _Encoding
        except RefusedValueError as refusal:
            refusal.steps.append("{...}")
            raise
        self.open.discard(id(value))
        nodes.sort(key=_json_text)
        return type(value).__name__, nodes

    def mapping(self, value: dict[Any, Any], item: Slot | None, depth: int) -> tuple[str, Any]:
        self.enter(value, depth)
        natural = all(type(key) is str and key != _TAG and is_clean(key) for key in value)
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
            raise RefusedValueError(cls, f"reading its fields raised {_described(error)}") from error
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
            raise RefusedValueError(cls, f"its codec raised {_described(error)}") from error
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


Encode = Callable[[_Encoding, Any, "Slot | None", int], tuple[str, Any]]

_CONTAINER_ENCODERS: dict[type, Encode] = {
    list: _Encoding.array,
    tuple: _Encoding.array,
    set: _Encoding.unordered,
    frozenset: _Encoding.unordered,
    dict: _Encoding.mapping,
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


# --- decoding -----------------------------------------------------------------------------------------------------


class _UnknownNameError(Exception):
    def __init__(self, type_name: str) -> None:
        super().__init__(type_name)
        self.type_name = type_name


class _Decoding:
    """The decoding of one value. What does not fit raises any exception: `decode_value` gives each the same name."""

    __slots__ = ("registry",)

    def __init__(self, registry: TypeRegistry) -> None:
        self.registry = registry

    def nested(self, node: Any, slot: Slot | None) -> Any:
        """Make the value of a node within another one."""
        item = None
        if type(node) is dict and _TAG in node:
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
            raise _UnknownNameError(name)
        return self.user(registration.cls, node) if registration.codec is None else self.by_codec(registration, node)

    def as_list(self, node: Any, item: Slot | None) -> list[Any]:
        elements = []
        for element in _array(node):
            elements.append(self.nested(element, item))  # noqa: PERF401  # see _Encoding
        return elements

    def as_tuple(self, node: Any, item: Slot | None) -> tuple[Any, ...]:
        elements = []
        for element in _array(node):
            elements.append(self.nested(element, item))  # noqa: PERF401  # see _Encoding
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
            if _TAG in node:
                raise ValueError(f"an object with the key {_TAG!r} stands where a dict is expected")
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


_CONTAINER_DECODERS: dict[str, Callable[[_Decoding, Any, Slot | None], Any]] = {
    "list": _Decoding.as_list,
    "tuple": _Decoding.as_tuple,
    "set": _Decoding.as_set,
    "frozenset": _Decoding.as_frozenset,
    "dict": _Decoding.as_dict,
}


def _untagged(node: dict[str, Any]) -> tuple[str, Any]:
    if len(node) != 2 or "value" not in node or type(node[_TAG]) is not str:
        raise ValueError(f"a tag is an object of a string {_TAG!r} and a 'value'")
    return node[_TAG], node["value"]


def _array(node: Any) -> list[Any]:
    if type(node) is not list:
        raise TypeError(f"expected an array, found {type(node).__name__}")
    return node


def _expect_all(made: Collection[Any], node: Collection[Any]) -> None:
    if len(made) != len(node):
        raise ValueError("some of its elements or keys are equal")


def _json_text(node: Any) -> str:
    if type(node) is int:
        return int.__repr__(node)
    return _quote(node) if type(node) is str else _JSON.encode(node)


def _loads(text: str) -> Any:
    return _LOADER.decode(text)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is beyond the range of a float")
    return number


_LOADER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)


def _described(error: BaseException) -> str:
    try:
        text = str(error)[:300]
    except Exception:  # an exception that cannot be shown must not hide where it came from
        text = "(it cannot be shown)"
    return f"{type(error).__name__}: {text}"
