"""What is wrong with a built site: links and anchors that lead nowhere, and what a page would fetch from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_FETCHED = {
    ("img", "src"),
    ("script", "src"),
    ("link", "href"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}
_STYLE_FETCHES = re.compile(r"(?:url\(|@import\s+)[\"']?(?P<url>(?:https?:)?//[^\"')]+)")


class Page(HTMLParser):
    """The links and anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name in ("href", "src", "data"):
                self.links.append((tag, name, value))
            elif name == "class":
                self.classes.update(value.split())


def problems_of(site: Path) -> list[str]:
    """Everything that is wrong, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    problems = [problem for path, page in pages.items() for problem in _problems_of_page(site, path, page, pages)]
    for path in sorted(site.rglob("*.css")):
        fetched = _STYLE_FETCHES.findall(path.read_text(encoding="utf-8"))
        problems += [f"{path.relative_to(site)} fetches {url}" for url in fetched]
    return problems


def _problems_of_page(site: Path, path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    name = path.relative_to(site)
    if "mermaid" in page.classes:
        yield f"{name} has a mermaid diagram, whose code is fetched from elsewhere: draw an SVG"
    for tag, attribute, link in page.links:
        parts = urlsplit(link)
        if parts.scheme in ("http", "https") or parts.netloc:
            if (tag, attribute) in _FETCHED:
                yield f"{name} fetches {link}"
            continue
        if parts.scheme or (path.name == "404.html" and parts.path.startswith("/")):  # data:, mailto:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            yield f"{name} links to {link}, which is not there"
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
            yield f"{name} links to {link}, but that page has no such anchor"
