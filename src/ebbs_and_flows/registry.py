"""Which user classes may come back from the database, and under which names.

Nothing is ever imported by a name read from the database: a name is looked up here, among the classes that the running
code has registered, and nowhere else.
"""

from __future__ import annotations

import re
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeVar, overload

from ebbs_and_flows.errors import TypeRegistrationError
from ebbs_and_flows.records import CONTAINERS, field_annotations, is_record, unwrap
from ebbs_and_flows.scalars import DECODERS, ENCODERS, is_zoned_name

T = TypeVar("T")
C = TypeVar("C", bound=type)

MAX_TYPE_NAME = 255

_BUILTIN_NAMES = frozenset(DECODERS) | frozenset(cls.__name__ for cls in CONTAINERS)
_BUILTIN_CLASSES = frozenset(ENCODERS) | frozenset(CONTAINERS)
_REFUSED_IN_NAME = re.compile("[$\\[\\]\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class ValueCodec(Protocol[T]):
    """How a class that the library does not know is stored, given by the user with `register_codec`.

    Both methods must be safe to call from several threads.
    """

    def encode(self, value: T, /) -> Any:
        """Give the value in terms of types that can be stored; the result is itself encoded."""

    def decode(self, encoded: Any, /) -> T:
        """Make the value again, of exactly the class that the codec is registered for."""


@dataclass(eq=False, slots=True)
class Registration:
    """A class under one of its names.

    Attributes:
        cls: the class.
        name: the type name that is stored.
        codec: how it is stored; `None` for classes that the library takes apart by itself.
        chosen: whether the user gave the name; else it is the class' own.
        fields_declared: whether the classes that its fields declare are registered, too.
    """

    cls: type
    name: str
    codec: ValueCodec[Any] | None = None
    chosen: bool = False
    fields_declared: bool = False


@dataclass(eq=False, slots=True)
class TypeRegistry:
    """The registered classes. One serves the whole process; another is of use only to tests."""

    changes: int = 0
    """How often something has been registered."""
    _by_name: dict[str, Registration] = field(default_factory=dict)
    _by_class: dict[type, Registration] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def register(self, cls: type, name: str | None = None) -> None:
        """Let values of this enum, dataclass, NamedTuple or Pydantic model come back from the database.

        Raises:
            TypeRegistrationError: the class is of another kind, or the name is not usable or taken.
        """
        if not isinstance(cls, type):
            raise TypeRegistrationError(f"register_type takes a class, not {cls!r}")
        if not (issubclass(cls, Enum) or is_record(cls)):
            raise TypeRegistrationError(
                f"{default_name(cls)} is no enum, dataclass, NamedTuple or Pydantic model: say how it is stored with "
                f"register_codec (and place @register_type above @dataclass)"
            )
        self._add(Registration(cls, default_name(cls) if name is None else name, chosen=name is not None))

    def register_codec(self, cls: type, codec: ValueCodec[Any], name: str | None = None) -> None:
        """Let values of exactly this class be stored by this codec.

        Raises:
            TypeRegistrationError: the class is stored natively, or the name is not usable or taken.
        """
        if not isinstance(cls, type):
            raise TypeRegistrationError(f"register_codec takes a class, not {cls!r}")
        if cls in _BUILTIN_CLASSES:
            raise TypeRegistrationError(f"{cls.__name__} is stored exactly already, and takes no codec")
        if not (callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))):
            raise TypeRegistrationError(f"the codec of {default_name(cls)} needs the methods encode and decode")
        chosen = name is not None
        self._add(Registration(cls, default_name(cls) if name is None else name, codec=codec, chosen=chosen))

    def declare(self, annotation: Any) -> None:
        """Register each class that an annotation names, and those of its fields, under their own names.

        Classes that have a name already keep it; what cannot be registered is left out.
        """
        self._declare(annotation, set())

    def registration_of(self, cls: type) -> Registration | None:
        """Give the registration under which values of this class are stored."""
        return self._by_class.get(cls)

    def registration_named(self, name: str) -> Registration | None:
        """Give the registration of a stored type name, its fields' classes registered as well."""
        registration = self._by_name.get(name)
        if registration is None:
            # It may be of a class that is known only as the type of another one's field.
            for other in list(self._by_name.values()):
                self._declare_fields_of(other)
            registration = self._by_name.get(name)
        if registration is not None:
            self._declare_fields_of(registration)
        return registration

    def name_of(self, cls: type) -> str:
        """Give the type name for values of this class, registered or not.

        Raises:
            TypeRegistrationError: it has no name of its own, or its name is registered for another class.
        """
        registration = self._by_class.get(cls)
        if registration is not None:
            return registration.name
        name = default_name(cls)
        _check_name(name)
        self._check_free(name, cls)
        return name

    def registrations(self) -> list[Registration]:
        """Give all registrations, so that adding them one by one to another registry makes one that is the same."""
        with self._lock:
            found = list(self._by_name.values())
            # Of a class' names the one to store under comes last, as that which the user gave last.
            return sorted(found, key=lambda each: self._by_class.get(each.cls) is each)

    def add(self, new: Registration) -> None:
        """Add what another registry has.

        Raises:
            TypeRegistrationError: the name is taken by another class.
        """
        self._add(Registration(new.cls, new.name, new.codec, new.chosen))

    def _add(self, new: Registration) -> None:
        _check_name(new.name)
        with self._lock:
            self.changes += 1
            self._check_free(new.name, new.cls)
            self._by_name[new.name] = new
            old = self._by_class.get(new.cls)
            # The name that a user chose stays the one to store under; so does a codec.
            if old is None or new.codec is not None or (old.codec is None and (new.chosen or not old.chosen)):
                self._by_class[new.cls] = new

    def _check_free(self, name: str, cls: type) -> None:
        taken = self._by_name.get(name)
        if taken is not None and taken.cls is not cls and default_name(taken.cls) != default_name(cls):
            raise TypeRegistrationError(
                f"type name {name!r} is registered for {default_name(taken.cls)}: give {default_name(cls)} "
                f"another one, register_type({cls.__name__}, name=...)"
            )

    def _declare(self, annotation: Any, seen: set[type]) -> None:
        annotation = unwrap(annotation)
        for argument in typing.get_args(annotation):
            self._declare(argument, seen)
        cls = typing.get_origin(annotation) or annotation
        if not isinstance(cls, type) or cls in seen or not (issubclass(cls, Enum) or is_record(cls)):
            return
        seen.add(cls)
        if cls not in self._by_class:
            try:
                self.register(cls)
            except TypeRegistrationError:
                return
        self._declare_fields(cls, seen)

    def _declare_fields_of(self, registration: Registration) -> None:
        """Done when it is first needed, not when a class is registered: its annotations may name later ones."""
        if not registration.fields_declared:
            self._declare_fields(registration.cls, {registration.cls})
            registration.fields_declared = True

    def _declare_fields(self, cls: type, seen: set[type]) -> None:
        for annotation in field_annotations(cls).values():
            self._declare(annotation, seen)


REGISTRY = TypeRegistry()
"""The registry of this process."""


@overload
def register_type(cls: C, /, name: str | None = None) -> C: ...
@overload
def register_type(cls: None = None, /, name: str | None = None) -> Callable[[C], C]: ...
def register_type(cls: Any = None, /, name: str | None = None) -> Any:
    """Let values of a class come back from the database: an enum, dataclass, NamedTuple or Pydantic model.

    Use it as `register_type(Order, name="shop.Order")` or as a decorator, `@register_type` or
    `@register_type(name="shop.Order")`, above `@dataclass`. Classes in its fields' annotations need no registration of
    their own.

    Args:
        cls: the class; it is given back unchanged.
        name: the name to store, by default module and qualified name. Give one that stays when the code moves. A class
            may have several names: all are read, the one given last is written.

    Raises:
        TypeRegistrationError: the class is of another kind (`register_codec` is for those), or the name is taken by
            another class. A class of the same module and qualified name replaces the one registered before it.
    """
    if cls is None:
        return lambda decorated: register_type(decorated, name)
    REGISTRY.register(cls, name)
    return cls


def declare_type(annotation: Any) -> None:
    """Register each user class in an annotation, and in the fields of those, unless it is registered already.

    What cannot be registered is left out: it is refused when a value of it is to be stored.
    """
    REGISTRY.declare(annotation)


def register_codec(cls: type[T], codec: ValueCodec[T], *, name: str | None = None) -> None:
    """Store values of exactly this class as the codec says; subclasses of it are other classes.

    Args:
        cls: the class, for example `numpy.ndarray`.
        codec: an object with `encode(value)` and `decode(encoded)`.
        name: the name to store, by default module and qualified name of the class.

    Raises:
        TypeRegistrationError: the class is one that is stored exactly already, or the name is taken by another class.
    """
    REGISTRY.register_codec(cls, codec, name)


def is_builtin_name(type_name: str) -> bool:
    """Whether this is the name of a type of the library's own, which needs no registration."""
    return type_name in _BUILTIN_NAMES or is_zoned_name(type_name)


def default_name(cls: type) -> str:
    """Give module and qualified name; the brackets of a generic model become parentheses (`shop.Page(int)`)."""
    return f"{cls.__module__}.{cls.__qualname__}".replace("[", "(").replace("]", ")")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TypeRegistrationError(f"a type name is a non-blank str, not {name!r}")
    if len(name) > MAX_TYPE_NAME:
        raise TypeRegistrationError(
            f"a type name has at most {MAX_TYPE_NAME} characters: {name[:60]!r}... has {len(name)}"
        )
    if _REFUSED_IN_NAME.search(name):
        raise TypeRegistrationError(f"a type name has no control characters and none of $, [ and ]: {name!r}")
    if name in _BUILTIN_NAMES:
        raise TypeRegistrationError(f"{name!r} is the name of a built-in type: choose another one")
