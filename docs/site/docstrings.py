"""How the reference reads this library's docstrings.

They are in Google's style, with three liberties, which are put into its form here: one entry may stand for several
names (`queue, priority: as for ...`), a section may close with a sentence, and a name in backticks is a link where the
reference has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

_SECTION = re.compile(r"^(Args|Attributes|Raises):$")
_ENTRY = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*): (?P<text>.*)$")
_NAME = re.compile(r"(?<![`\[])`(?P<name>[A-Za-z]\w*(?:\.\w+)*)(?:\(\))?`(?!`)")
_PAGE = re.compile(r"\bdocs/(?P<page>[\w-]+)\.md\b")


class HouseStyle(griffe.Extension):
    """Rewrites each docstring of a package once all of it has been read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        for each in _objects(pkg):
            if each.docstring is not None:
                text = one_name_an_entry(each.docstring.value)
                text = _NAME.sub(lambda found, each=each: _linked(found, each, pkg), text)
                each.docstring.value = _PAGE.sub(r"[\g<page>](../\g<page>.md)", text)


def one_name_an_entry(docstring: str) -> str:
    """The docstring with an entry for each name, and the closing sentences of its sections behind them."""
    done: list[str] = []
    lines = docstring.splitlines()
    while lines:
        line = lines.pop(0)
        done.append(line)
        if _SECTION.match(line):
            section: list[str] = []
            while lines and (lines[0].startswith("    ") or not lines[0].strip()):
                section.append(lines.pop(0))
            done.extend(_entries(section))
    return "\n".join(done)


def _entries(section: list[str]) -> Iterator[str]:
    closing: list[str] = []
    lines = list(section)
    while lines:
        line = lines.pop(0)
        while re.fullmatch(r"    [\w*, ]+,", line) and lines:  # the names go on in the next line
            line = f"{line} {lines.pop(0).strip()}"
        below: list[str] = []
        while lines and (lines[0].startswith("     ") or not lines[0].strip()):
            below.append(lines.pop(0))
        entry = _ENTRY.match(line)
        if entry is None:
            closing.extend([line, *below])
            continue
        for name in entry["names"].split(", "):
            yield f"    {name}: {entry['text']}"
            yield from (each for each in below if each.strip())
    yield ""
    yield from (each.strip() for each in closing)


def _objects(scope: griffe.Object) -> Iterator[griffe.Object]:
    yield scope
    for member in scope.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _linked(found: re.Match[str], where: griffe.Object, package: griffe.Module) -> str:
    """The name as a link to where the reference has it: a public name, or a member of the same class or module."""
    for scope in (package, where, where.parent):
        if not isinstance(scope, griffe.Module | griffe.Class):
            continue
        try:
            target = scope[found["name"]]
            target = target.final_target if isinstance(target, griffe.Alias) else target
        except (KeyError, griffe.AliasResolutionError):  # no such member, or one of another package
            continue
        if target is not where and target.has_docstring and _is_public(target, package):
            return f"[{found[0]}][{target.canonical_path}]"
    return found[0]


def _is_public(target: griffe.Object, package: griffe.Module) -> bool:
    """Whether the reference has it: an exported name, a member of one, or what stands in an exported module."""
    exported = {str(name) for name in package.exports or ()}
    holder = target
    while holder.parent is not None and not holder.parent.is_module:
        holder = holder.parent
    return not target.is_module and (holder.name in exported or holder.module.name in exported)
