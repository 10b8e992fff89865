"""Runs the code on a page of the docs, from top to bottom, as its reader would.

| block | what is done with it |
| --- | --- |
| `python` | it runs, in one module for the whole page |
| `python title="shop.py"` | it is written to that file |
| `text` | it is what the Python blocks since the last one have printed |
| `console` | each line after `$` is run, and what follows is what it says on stdout |
| `sh` | each line is run |

Times, dates, names of workers and the bars of timelines may differ from those on the page, and `...` stands for
anything.
`pip install` is not run; what it names has to be this project, with extras that it has.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<language>[\w+-]*)(?P<options>.*)$")
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')
_VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC|\d\d-\d\d \d\d:\d\d:\d\d\.\d+"), "<date>"),
    (re.compile(r"[\w.-]+:\d+:[0-9a-f]{8}\b"), "<worker>"),
    (re.compile(r"\b\d+(\.\d+)?(ms|s)\b"), "<time>"),
    (re.compile(r"[━╸╺]+"), " "),
    (re.compile(r"[ \t]+"), " "),
]


@dataclass(frozen=True)
class Block:
    """One block of code of a page."""

    language: str
    options: str
    text: str
    line: int


def blocks_of(markdown: str) -> list[Block]:
    """Every fenced block of a page, in order."""
    blocks: list[Block] = []
    opened: tuple[re.Match[str], int, list[str]] | None = None
    for number, line in enumerate(markdown.splitlines(), start=1):
        found = _FENCE.match(line)
        if opened is None:
            opened = (found, number, []) if found else None
            continue
        fence, first, lines = opened
        if found and found["marks"].startswith(fence["marks"]) and not found["language"]:
            text = "\n".join(each.removeprefix(fence["indent"]) for each in lines) + "\n"
            blocks.append(Block(fence["language"], fence["options"], text, first))
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"the block in line {opened[1]} is not closed"
    return blocks


def commands_of(blocks: Iterable[Block], language: str = "sh") -> list[str]:
    """The commands in the blocks of shell code, a line each, without their comments."""
    lines = [line for block in blocks if block.language == language for line in block.text.splitlines()]
    return [shlex.join(words) for words in (shlex.split(line, comments=True) for line in lines) if words]


def check_requirement(command: str) -> None:
    """Assert that a `pip install` names this project, and extras that it has."""
    wanted = re.search(r"ebbs-and-flows(?:\[(?P<extras>[\w,-]+)\])?", command)
    assert wanted, f"{command} does not install this project"
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    there = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))
    assert set((wanted["extras"] or "").split(",")) - {""} <= there, f"{command}: the extras are {sorted(there)}"


def check_understood(command: str) -> None:
    """Assert that the program has this subcommand and these options, without running it."""
    words = re.split(r" (?=-)| > ", command)[0].split()
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [scripts / words[0], *words[1:], "--help"],
        env=dict(os.environ, COLUMNS="200"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    for option in re.findall(r"(?<= )--[a-z-]+", command):
        assert option in done.stdout, f"{command}: there is no {option}"


class Page:
    """A page that is read once, from top to bottom.

    Args:
        name: what to call it in failures; no other page of this process has it.
        markdown: its text.
        folder: an empty one, in which its reader works.
    """

    def __init__(self, name: str, markdown: str, folder: Path) -> None:
        self.name = name
        self.blocks = blocks_of(markdown)
        self._folder = folder
        self._module = types.ModuleType("page_" + re.sub(r"\W", "_", name))
        self._printed = io.StringIO()
        self._environment = dict(
            os.environ,
            PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            PYTHONUNBUFFERED="1",
            NO_COLOR="1",
            COLUMNS="120",
        )

    def run(self) -> None:
        """Run all of its blocks; what is wrong with one is an AssertionError that names its line."""
        sys.modules[self._module.__name__] = self._module
        before = Path.cwd()
        os.chdir(self._folder)
        try:
            for block in self.blocks:
                self._run_block(block)
        finally:
            os.chdir(before)
            del sys.modules[self._module.__name__]

    def _run_block(self, block: Block) -> None:
        where = f"{self.name}, line {block.line}"
        title = _TITLE.search(block.options)
        if block.language == "python" and title:
            Path(title["title"]).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            self._run_python(block, where)
        elif block.language == "text":
            _assert_same(block.text, self._printed.getvalue(), where)
            self._printed = io.StringIO()
        elif block.language == "console":
            for command, output in _dialogue(block.text):
                _assert_same(output, self._run_command(command, where), f"{where}, $ {command}")
        elif block.language == "sh":
            for command in commands_of([block]):
                self._run_command(command, where)
        else:
            raise AssertionError(f"{where}: nothing runs a block of {block.language or 'no language'!r}")

    def _run_python(self, block: Block, where: str) -> None:
        code = compile("\n" * block.line + block.text, str(self.name), "exec")
        try:
            with contextlib.redirect_stdout(self._printed):
                exec(code, vars(self._module))
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error

    def _run_command(self, command: str, where: str) -> str:
        if command.startswith("pip install"):
            check_requirement(command)
            return ""
        if command.startswith("export "):
            name, _, value = shlex.split(command)[1].partition("=")
            self._environment[name] = value
            return ""
        done = subprocess.run(
            ["bash", "-c", command], env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )
        killed = done.returncode in (-9, 137)
        assert done.returncode == 0 or killed, f"{where}, $ {command}: exit code {done.returncode}\n{done.stderr}"
        return done.stdout + ("Killed\n" if killed else "")


def _dialogue(text: str) -> list[tuple[str, str]]:
    """The commands of a `console` block, each with the output that follows it."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console block begins with a command, not with {parts[0]!r}"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _assert_same(expected: str, found: str, where: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    same = doctest.OutputChecker().check_output(_without_varying(expected), _without_varying(found), flags)
    assert same, f"{where}: the page says\n{expected}\nbut it is\n{found}"


def _without_varying(text: str) -> str:
    for pattern, replacement in _VARYING:
        text = pattern.sub(replacement, text)
    return text
