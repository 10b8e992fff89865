"""Free text as a database can store it: messages, tracebacks and reasons, wherever they come from."""

from __future__ import annotations

MAX_OUTPUT_LENGTH = 16_000
"""Characters kept of a text. Of a longer one the beginning and, mostly, the end: of a traceback the error."""

_KEPT_FROM_THE_BEGINNING = 2_000


def printable(text: str) -> str:
    """The text without what a database cannot store: NUL and lone surrogates become their escapes."""
    # Of a subclass of str the plain text: its methods are code of that class.
    return str.__str__(text).encode("utf-8", "backslashreplace").decode("utf-8").replace("\x00", "\\x00")


def bounded(text: str) -> str:
    """The text as it is stored: printable, and at most `MAX_OUTPUT_LENGTH` characters."""
    text = printable(text)
    if len(text) <= MAX_OUTPUT_LENGTH:
        return text
    beginning = text[:_KEPT_FROM_THE_BEGINNING]
    cut = f"\n... {len(text) - MAX_OUTPUT_LENGTH:,} characters left out ...\n"
    return beginning + cut + text[len(beginning) + len(cut) - MAX_OUTPUT_LENGTH :]


def one_line(text: str, width: int) -> str:
    """The text on one line of at most `width` characters; what would steer a terminal (escapes, right-to-left marks) is
    shown, not sent.
    """
    line = " ".join(printable(text)[: 4 * width].split())
    line = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
    return line if len(line) <= width else f"{line[: width - 3]}..."


def class_name(cls: type) -> str:
    """A class's own name, whatever its metaclass says it is."""
    return printable(type.__dict__["__name__"].__get__(cls))
