"""Build the docs as a site in site/, strictly: a warning, a link that leads nowhere, or anything that a page would
fetch from elsewhere is an error.

python docs/site/build.py
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from check import problems_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")

EXPECTED = re.compile(r"Build started|Build finished in .*|No issues found|")
"""What the tool says of a build without any warning."""


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class BrokenLinkError(Exception):
    """A page links to what is not in the repository."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        shutil.copy(HERE / "zensical.toml", stage)
        try:
            Pages(stage / "docs").gather()
        except BrokenLinkError as error:
            sys.exit(str(error))
        build(stage)
        problems = problems_of(stage / "site")
        if problems:
            sys.exit("\n".join([*problems, f"{len(problems)} problems"]))
        shutil.rmtree(ROOT / "site", ignore_errors=True)
        shutil.copytree(stage / "site", ROOT / "site")
    print(f"built {ROOT / 'site' / 'index.html'}: no warnings, no broken links, nothing fetched from elsewhere")


class Pages:
    """Copies docs/, and what it links to elsewhere in the repository, so that all of it is below one folder.

    Args:
        folder: where to; made here.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._copied: set[str] = set()

    def gather(self) -> None:
        """Copy everything.

        Raises:
            BrokenLinkError: a page links to what is not there.
        """
        for path in sorted((ROOT / "docs").rglob("*")):
            if path.is_file() and HERE not in path.parents:
                self._copy(path.relative_to(ROOT).as_posix())
        shutil.copy(HERE / "style.css", self.folder)

    def _copy(self, source: str) -> str:
        """Copy a file of the repository, and give its path below the folder."""
        target = place_of(source)
        if source not in self._copied:
            self._copied.add(source)
            copy = self.folder / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.endswith(".md"):
                text = (ROOT / source).read_text(encoding="utf-8")
                copy.write_text(LINK.sub(lambda link: self._link(source, link), text), encoding="utf-8")
            else:
                shutil.copy(ROOT / source, copy)
        return target

    def _link(self, source: str, link: re.Match[str]) -> str:
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        if (ROOT / wanted).is_dir():
            wanted = posixpath.join(wanted, "README.md")
        if wanted == "README.md":
            wanted = "docs/index.md"  # the site's first page says the same
        if wanted.startswith("../") or not (ROOT / wanted).is_file():
            raise BrokenLinkError(f"{source} links to {link['target']}, which is not there")
        place = self._copy(wanted)
        return posixpath.relpath(place, posixpath.dirname(place_of(source)) or ".") + (link["anchor"] or "")


def place_of(source: str) -> str:
    """Where a file of the repository stands in the site: what is in docs/ at its top, the rest in its own folder."""
    return source.removeprefix("docs/")


def build(stage: Path) -> None:
    """Run the tool, and end with its output if it says anything but that all went well."""
    command = ["zensical", "build", "--strict", "--clean", "--config-file", str(stage / "zensical.toml")]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=dict(os.environ, PYTHONPATH=str(HERE)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    said = COLOUR.sub("", done.stdout)
    if done.returncode or not all(EXPECTED.fullmatch(line.strip()) for line in said.splitlines()):
        sys.exit(f"the build is not without warnings (exit code {done.returncode}):\n{said}")


if __name__ == "__main__":
    main()
