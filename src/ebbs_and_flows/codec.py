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
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from ebbs_and_flows.decoding import Decoding, UnknownNameError
from ebbs_and_flows.encoding import MAX_DEPTH, TAG, Encoding, json_text
from ebbs_and_flows.errors import UndecodableValueError, UnknownTypeError, UnserializableValueError
from ebbs_and_flows.pickle_codec import PickleCodec
from ebbs_and_flows.registry import REGISTRY, TypeRegistry, ValueCodec, declare_type, register_codec, register_type
from ebbs_and_flows.scalars import ENCODERS, RefusedValueError, described

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

_NATURAL_SCALARS: dict[str, type] = {cls.__name__: cls for cls in (bool, int, float, str)}


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
            text = json_text(self.node)
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
        encoding = Encoding(registry)
        name, node = encoding.encoder_of(type(value))(encoding, value, None, 1)
        encoded = EncodedValue(node, name)
        _set_text(encoded, json_text(node))
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
        raise UnserializableValueError(path, type(value), f"reading it raised {described(error)}") from error


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
        return Decoding(registry).nested({TAG: type_name, "value": node}, None)
    except UnknownNameError as unknown:
        raise UnknownTypeError(entry, unknown.type_name) from None
    except RecursionError as error:
        problem = "it is nested too deeply for what is left of the call stack"
        raise UndecodableValueError(entry, type_name, problem) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableValueError(entry, type_name, described(error)) from error


def dumps_entries(entries: Mapping[str, EncodedValue]) -> tuple[str, str]:
    """Give two texts of JSON objects: of name to node, and of name to type name."""
    nodes, types = [], []
    for name, encoded in entries.items():
        key = quote(name)
        nodes.append(f"{key}:{encoded.json_text}")
        types.append(f"{key}:{quote(encoded.type_name)}")
    return f"{{{','.join(nodes)}}}", f"{{{','.join(types)}}}"


def loads_entries(entries_text: str, types_text: str) -> dict[str, EncodedValue]:
    """Read back what `dumps_entries` wrote. No value is decoded, so unknown types do no harm here.

    Raises:
        UndecodableValueError: the texts are not two JSON objects of the same names.
    """
    try:
        nodes, types = _loads(entries_text), _loads(types_text)
    except (ValueError, RecursionError, TypeError) as error:
        raise UndecodableValueError(None, "entries", f"the stored JSON is damaged: {described(error)}") from error
    if type(nodes) is not dict or type(types) is not dict:
        raise UndecodableValueError(None, "entries", "the stored JSON is not an object of entries")
    if nodes.keys() != types.keys():
        raise UndecodableValueError(None, "entries", "the stored entries and types are not of the same names")
    for name, type_name in types.items():
        if type(type_name) is not str:
            raise UndecodableValueError(name, "?", "its stored type is not a string")
    return {name: EncodedValue(node, types[name]) for name, node in nodes.items()}


def _loads(text: str) -> Any:
    node, end = _LOADER.raw_decode(text)
    if end != len(text):
        raise ValueError("there is more after the JSON value")
    return node


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is beyond the range of a float")
    return number


_LOADER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
