"""What a name may be: one rule for entries, tasks, templates, queues and keys."""

from __future__ import annotations

import unicodedata

from ebbs_and_flows.errors import InvalidNameError

MAX_NAME_LENGTH = 255
"""In characters, after normalisation: what the columns hold."""


def valid_name(kind: str, name: object) -> str:
    """Return `name` in Unicode normal form C, in which it is stored and compared.

    Args:
        kind: what is being named, for the message: `"task"`, `"context entry"`.
        name: any object; only a non-blank `str` of at most 255 characters without control characters (category Cc)
            or lone surrogates passes.

    Raises:
        InvalidNameError: for anything else.
    """
    if not isinstance(name, str):
        raise InvalidNameError(kind, name, f"must be a str, not {type(name).__name__}")
    if name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME_LENGTH and not name.isspace():
        return str.__str__(name)  # of a subclass, such as an enum's member, the plain text
    normal = unicodedata.normalize("NFC", str.__str__(name))
    if not normal.strip():
        raise InvalidNameError(kind, name, "must not be blank")
    if len(normal) > MAX_NAME_LENGTH:
        raise InvalidNameError(kind, name, f"is {len(normal)} characters long, at most {MAX_NAME_LENGTH} are allowed")
    for character in normal:
        category = unicodedata.category(character)
        if category == "Cc":
            raise InvalidNameError(kind, name, f"must not hold the control character {character!r}")
        if category == "Cs":
            raise InvalidNameError(kind, name, f"must not hold the lone surrogate {character!r}")
    return normal
