"""Every block of code in the docs runs, every page has its place on the site, and every public name its entry."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import ebbs_and_flows
from ebbs_and_flows import schema
from tests.pages import ROOT, Page, blocks_of, check_understood, commands_of

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}

HERE = "tests/integration/test_docs.py"
README = "tests/integration/test_readme.py"
DATABASES = "tests/integration/test_databases_docs.py"
EMBEDDING = "tests/integration/test_embedding_docs.py"
HOST_ALEMBIC = "tests/acceptance/test_host_alembic.py"
OPERATIONS = "tests/acceptance/test_operations.py"

RUN_BY: dict[str, dict[str, str]] = {
    "README.md": {"python": README, "sh": README, "sql": README},
    "docs/databases.md": {"python": DATABASES, "sh": DATABASES, "sql": DATABASES},
    "docs/embedding.md": {"python": EMBEDDING, "text": EMBEDDING},
    "docs/migrations.md": {"ini": HOST_ALEMBIC, "python": HOST_ALEMBIC, "sh": HERE},
    "docs/operations.md": dict.fromkeys(("console", "ini", "python", "sh", "sql", "yaml"), OPERATIONS),
    "docs/performance.md": {"console": HERE},
    "docs/reliability.md": {"": HERE},
    "docs/scaling.md": {"python": README, "sql": README, "yaml": HERE},
}
"""Pages whose blocks have tests of their own: by language, the file that has it. All others run from top to bottom."""

TAKE_BLOCKS_BY_FIRST_LINE = {HOST_ALEMBIC}
"""Those of the files that do not go through a page's blocks, but pick them: each block's first line stands there, or
here."""

READ_FROM_TOP_TO_BOTTOM = [name for name, text in PAGES.items() if name not in RUN_BY and blocks_of(text)]


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="the pages speak to a POSIX shell")
@pytest.mark.parametrize("name", READ_FROM_TOP_TO_BOTTOM)
def test_each_block_of_the_page_runs_and_says_what_the_page_says(name: str, tmp_path: Path) -> None:
    Page(name, PAGES[name], tmp_path).run()


@pytest.mark.parametrize("name", RUN_BY)
def test_each_block_of_a_page_with_tests_of_its_own_has_one(name: str) -> None:
    assert {block.language for block in blocks_of(PAGES[name])} == set(RUN_BY[name])
    for file in set(RUN_BY[name].values()):
        assert Path(name).name in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not read {name}"
    for block in blocks_of(PAGES[name]):
        file, first_line = RUN_BY[name][block.language], block.text.partition("\n")[0]
        if file in TAKE_BLOCKS_BY_FIRST_LINE:
            picking = (ROOT / file).read_text(encoding="utf-8") + Path(__file__).read_text(encoding="utf-8")
            assert first_line in picking, f"{file} does not run the block in line {block.line} of {name}"


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\nprint(1 / 0)\n```", "ZeroDivisionError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "the page says"),
        ("```console\n$ echo 1\n2\n```", "the page says"),
        ("```sh\nfalse\n```", "exit code 1"),
        ("```sh\nebbs no-such-command\n```", "exit code 2"),
        ("```sh\npip install 'ebbs-and-flows[postgress]'\n```", "the extras are"),
        ("```toml\n[a]\n```", "nothing runs a block of 'toml'"),
        ("```\nx\n```", "nothing runs a block of 'no language'"),
        ("1. an item\n\n    ```python\n    print(x)\n    ```", "NameError"),
    ],
)
def test_a_block_that_is_wrong_is_noticed(page: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        Page("wrong", page, tmp_path).run()


def test_times_workers_and_what_is_left_out_may_differ(tmp_path: Path) -> None:
    (tmp_path / "said").write_text("took 17ms ╸ by vm:1:00ff00ff\nmore\nend\n", encoding="utf-8")
    page = "```console\n$ cat said\ntook 5.3s ━━━━━  by web-1:24350:d9e8f331\n...\nend\n```"
    Page("varying", page, tmp_path).run()


def test_the_script_in_the_docs_on_migrations_brings_a_database_up_to_date(empty_database_url: str) -> None:
    url = empty_database_url.replace("postgresql://", "postgresql+psycopg://")
    [script] = [block.text for block in blocks_of(PAGES["docs/migrations.md"]) if "# deploy.py" in block.text]
    namespace = {"DATABASE_URL": url}
    exec(script, namespace)
    namespace["engine"].dispose()
    schema.check(url)


def test_the_commands_in_the_docs_on_migrations_are_understood() -> None:
    commands = commands_of(blocks_of(PAGES["docs/migrations.md"]))
    ours = [command for command in commands if command.split()[0] in ("alembic", "ebbs")]
    assert len(ours) > 5
    for command in ours:
        check_understood(command)


def test_a_command_that_is_not_understood_is_noticed() -> None:
    check_understood("ebbs worker --app shop.flows:runner --until-idle > log")
    for command in ("ebbs work --app shop.flows:runner", "ebbs worker --application shop.flows:runner"):
        with pytest.raises(AssertionError, match=re.escape(command)):
            check_understood(command)


def test_the_trigger_in_the_docs_on_scaling_counts_workers_one_by_one() -> None:
    [block] = [block for block in blocks_of(PAGES["docs/scaling.md"]) if block.language == "yaml"]
    [trigger] = yaml.safe_load(block.text)["triggers"]
    assert trigger["type"] == "postgresql"
    assert trigger["metadata"]["targetQueryValue"] == "1"


@pytest.mark.parametrize("name", ["docs/performance.md", "docs/reliability.md"])
def test_the_long_runs_that_the_docs_report_can_be_started_like_that(name: str) -> None:
    text = "".join(block.text for block in blocks_of(PAGES[name])) + "\n".join(
        re.findall(r"`(python .*?)`", PAGES[name])
    )
    commands = re.findall(r"^(?:\$ )?python (benchmarks/\w+\.py)([^#\n]*)", text, re.MULTILINE)
    assert commands
    for script, arguments in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        for option in re.findall(r"--[a-z-]+", arguments):
            assert f'"{option}"' in source, f"{name}: {script} has no {option}"


# --- the site -----------------------------------------------------------------------------------------------------


def test_each_page_has_one_place_in_the_navigation() -> None:
    configuration = (ROOT / "docs" / "site" / "zensical.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([\w/-]+\.md)"', configuration)
    here = [name.removeprefix("docs/") for name in PAGES if name != "README.md"]
    assert sorted(name for name in listed if not name.startswith("benchmarks/")) == sorted(here)


def test_the_reference_has_each_public_name_once() -> None:
    entries = [
        name
        for page, text in PAGES.items()
        if page.startswith("docs/api/")
        for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    ]
    public = [*ebbs_and_flows.__all__, "preflight"]  # which is a module of its own: what calls it is no service
    assert sorted(entries) == sorted(f"ebbs_and_flows.{name}" for name in public)


def test_each_public_name_has_a_docstring() -> None:
    silent = [name for name in ebbs_and_flows.__all__ if not (getattr(ebbs_and_flows, name).__doc__ or "").strip()]
    assert silent == []


@pytest.fixture
def checker(monkeypatch: pytest.MonkeyPatch) -> str:
    """The script that looks through a built site."""
    monkeypatch.chdir(ROOT / "docs" / "site")
    return "import sys, pathlib, check; print(*check.problems_of(pathlib.Path(sys.argv[1])), sep='\\n')"


def test_what_is_wrong_with_a_site_is_found(checker: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        """
        <link rel="stylesheet" href="https://fonts.example.com/a.css"><script src="//cdn.example.com/a.js"></script>
        <h1 id="top">Top</h1> <a href="#top">fine</a> <a href="other.html#there">fine</a>
        <a href="https://example.com">fine</a> <a href="mailto:a@example.com">fine</a> <img src="a.png">
        <a href="#nowhere">no</a> <a href="gone.html">no</a> <a href="other.html#gone">no</a>
        <pre class="mermaid"></pre>
        """
    )
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "a.css").write_text("@font-face { src: url('https://fonts.example.com/a.woff') }")
    done = subprocess.run(
        [sys.executable, "-c", checker, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        "index.html has a mermaid diagram, whose code is fetched from elsewhere: draw an SVG",
        "index.html fetches https://fonts.example.com/a.css",
        "index.html fetches //cdn.example.com/a.js",
        "index.html links to a.png, which is not there",
        "index.html links to #nowhere, but that page has no such anchor",
        "index.html links to gone.html, which is not there",
        "index.html links to other.html#gone, but that page has no such anchor",
        "a.css fetches https://fonts.example.com/a.woff",
    ]
