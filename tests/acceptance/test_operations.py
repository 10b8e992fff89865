"""What docs/operations.md shows works: each block is run, against a shop with executions in every state."""

from __future__ import annotations

import configparser
import doctest
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from sqlalchemy import text

from ebbs_and_flows import FlowRunner, FlowService, FlowStatus, FlowTemplate
from ebbs_and_flows.cli.app import EPILOG
from tests.integration.flows import Outside, Step
from tests.pages import ROOT, blocks_of, check_understood
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the page speaks to a POSIX shell")

PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(PAGE)

Fail = Callable[[], int]

FLOWS = """
import os

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, task

{tasks}

runner = FlowRunner(FlowService(os.environ["EBBS_DATABASE_URL"]))
runner.register_flow_template(FlowTemplate("fulfil-order", [{names}]))
"""


def under(heading: str, language: str) -> str:
    """The one block of a language under a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    [block] = [each for each in blocks_of(section) if each.language == language]
    return block.text


class Shop:
    """A folder with the package `shop`, in which the commands are given."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        (folder / "shop").mkdir()
        (folder / "shop" / "__init__.py").touch()
        self.deploy("reserve", "charge", "ship")
        scripts = str(Path(sys.executable).parent)
        self.environment = {
            name: value for name, value in os.environ.items() if name not in ("EBBS_SCHEMA", "FORCE_COLOR", "NO_COLOR")
        } | {
            "EBBS_DATABASE_URL": database_url,
            "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def deploy(self, *names: str) -> None:
        """Put code there whose template has these tasks."""
        tasks = "\n".join(f"@task\ndef {name}() -> None:\n    pass\n" for name in names)
        (self.folder / "shop" / "flows.py").write_text(FLOWS.format(tasks=tasks, names=", ".join(names)))

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run commands in a shell that ends at the first one that fails."""
        return subprocess.run(
            ["bash", "-euc", script],
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )


@pytest.fixture
def shop(tmp_path: Path, database_url: str) -> Shop:
    return Shop(tmp_path, database_url)


@pytest.fixture
def fail(service: FlowService) -> Fail:
    """Makes an execution that has failed at its last task."""
    outside = Outside()
    runner = FlowRunner(service)
    tasks = [Step(Outside(), "reserve"), Step(Outside(), "charge"), Step(outside, "ship")]
    runner.register_flow_template(FlowTemplate("fulfil-order", tasks))

    def make() -> int:
        outside.failures = [ConnectionError("no truck")]
        runner.schedule_flow("fulfil-order")
        failed = runner.run_flow()
        assert failed is not None
        assert failed.status is FlowStatus.FAILED
        return failed.execution_id

    return make


def test_the_deploy_makes_a_schema_and_finds_that_all_is_well(tmp_path: Path, empty_database_url: str) -> None:
    shop = Shop(tmp_path, empty_database_url)
    done = shop.run(under("Deploy", "sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'run "ebbs db upgrade"' in done.stderr
    assert done.stderr.endswith(": no execution is unfinished\n")


def test_the_deploy_stops_where_executions_would_be_parked(shop: Shop, service: FlowService, fail: Fail) -> None:
    service.reschedule(fail())
    assert shop.run(under("Deploy", "sh")).returncode == 0
    shop.deploy("ship")
    stopped = shop.run(under("Deploy", "sh"))
    assert stopped.returncode != 0
    assert "would be parked" in stopped.stdout
    assert "Schema is at" not in stopped.stderr, "nothing was upgraded"


def test_what_check_says_is_what_the_page_shows(shop: Shop, service: FlowService, fail: Fail) -> None:
    for execution_id in [fail(), fail(), fail()][:2]:
        service.reschedule(execution_id)
    shop.deploy("reserve", "check_fraud", "charge", "ship")
    command, _, expected = under("Deploy", "console").removeprefix("$ ").partition("\n")
    done = shop.run(command, FORCE_COLOR="1", NO_COLOR="1", COLUMNS="118", TERM="xterm")
    assert done.returncode == 4, done.stderr
    assert doctest.OutputChecker().check_output(expected, done.stdout, doctest.ELLIPSIS), done.stdout
    api = shop.run(f"python -c {shlex.quote(under('Deploy', 'python'))}")
    assert api.returncode == 0, api.stderr
    assert "problem [(<Kind.CHANGED_TEMPLATE: 'changed template'>, 'fulfil-order', 2)" in api.stdout


def test_the_commands_for_the_night_do_what_they_say(shop: Shop, service: FlowService, fail: Fail) -> None:
    for _ in range(17):
        fail()
    waiting = service.schedule("fulfil-order", delay=3600)
    done = shop.run(under("At night", "sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 failed at ship: ConnectionError: no truck" in done.stdout
    assert service.get_flow_execution(17).status is FlowStatus.RESCHEDULED
    assert service.get_flow_status_history(17)[-1].reason == "the bank is back"
    assert service.get_flow_execution(waiting).status is FlowStatus.CANCELLED


@pytest.mark.parametrize("database", ["sqlite"])
def test_the_unit_for_systemd_starts_a_worker(shop: Shop, database: str) -> None:
    unit = configparser.ConfigParser(strict=True, comment_prefixes=["#"])
    unit.optionxform = str  # type: ignore[method-assign,assignment]  # as the documentation of configparser does
    unit.read_string(under("systemd", "ini"))
    settings = unit["Service"]
    assert settings["KillMode"] == "mixed"
    assert int(settings["TimeoutStopSec"]) > 10  # the worker's grace
    program, *arguments = shlex.split(settings["ExecStart"])
    assert Path(program).name == "ebbs"
    check_understood(shlex.join(["ebbs", *arguments]))
    done = shop.run(shlex.join(["ebbs", *arguments, "--until-idle"]))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("database", ["sqlite"])
def test_the_probe_for_kubernetes_tells_a_worker_that_turns_from_one_that_does_not(
    shop: Shop, tmp_path: Path, database: str
) -> None:
    alive = tmp_path / "alive"
    code = under("Kubernetes", "python")
    assert code.count("/tmp/ebbs-alive") == code.count("wait(5)") == 1
    (tmp_path / "shop" / "worker.py").write_text(
        code.replace("/tmp/ebbs-alive", str(alive)).replace("wait(5)", "wait(0.1)")
    )
    pod = yaml.safe_load(under("Kubernetes", "yaml"))["spec"]
    assert pod["terminationGracePeriodSeconds"] > 10
    [container] = pod["containers"]
    [*shell, probe] = container["livenessProbe"]["exec"]["command"]
    assert shell == ["sh", "-c"]
    probe = probe.replace("/tmp/ebbs-alive", str(alive))
    assert shop.run(probe).returncode != 0
    worker = subprocess.Popen(
        container["command"],
        cwd=shop.folder,
        env=shop.environment,
        stderr=subprocess.DEVNULL,
        executable=str(Path(sys.executable).parent / container["command"][0]),
    )
    try:
        wait_until(lambda: shop.run(probe).returncode == 0, "the worker turns")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=30) == 0
    finally:
        worker.kill()
        worker.wait()
    long_ago = time.time() - 150
    os.utime(alive, (long_ago, long_ago))
    assert shop.run(probe).returncode != 0


@pytest.mark.parametrize("database", ["postgresql"])
def test_the_queries_to_watch_find_what_is_due_left_behind_and_failed(service: FlowService, fail: Fail) -> None:
    fail()
    service.schedule("fulfil-order", queue="mails")
    service.schedule("fulfil-order", queue="mails", delay=3600)
    left = service.schedule("fulfil-order")
    service.update_flow_status(left, FlowStatus.RUNNING)
    with service.engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE ebbs_flow_executions SET lease_expires_at = now() - interval '2 minutes' "
                "WHERE status = 'RUNNING'"
            )
        )
        due, behind, failed = (
            connection.execute(text(query)).one() for query in under("What to watch", "sql").split(";") if query.strip()
        )
        for query in filter(str.strip, under("What to watch", "sql").split(";")):
            connection.execute(text("SET LOCAL enable_seqscan = off"))
            plan = "\n".join(connection.execute(text(f"EXPLAIN {query}")).scalars())
            assert "ix_ebbs_flow_executions_" in plan
            assert "Seq Scan" not in plan
    assert (due.queue, due.due) == ("mails", 1)
    assert 0 <= due.oldest_seconds < 60
    assert tuple(behind) == ("fulfil-order", 1)
    assert tuple(failed) == ("fulfil-order", 1)


@pytest.mark.parametrize("database", ["postgresql"])
def test_what_is_finished_for_long_is_deleted_with_its_history(service: FlowService) -> None:
    old, young, waiting = (service.schedule("fulfil-order") for _ in range(3))
    for each in (old, young):
        service.cancel(each)
    with service.engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE ebbs_flow_executions SET finished_at = now() - interval '91 days', "
                f"created_at = now() - interval '91 days' WHERE execution_id = {old}"
            )
        )
        connection.execute(text(under("Keep it small", "sql")))
        for table, column in (
            ("ebbs_flow_executions", "execution_id"),
            ("ebbs_flow_transitions", "flow_execution_id"),
        ):
            left = set(connection.execute(text(f"SELECT {column} FROM {table}")).scalars())
            assert left == {young, waiting}


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_backup_has_what_was_committed(shop: Shop, tmp_path: Path, database: str) -> None:
    with FlowService(f"sqlite:///{tmp_path / 'shop.db'}") as service:
        service.schedule("fulfil-order")
        done = shop.run(under("Backups", "sh"))
        assert done.returncode == 0, done.stderr
    with closing(sqlite3.connect(tmp_path / "backup.db")) as connection:
        assert connection.execute("SELECT count(*) FROM ebbs_flow_executions").fetchone() == (1,)


def test_the_commands_in_the_prose_are_understood() -> None:
    commands = set(re.findall(r"`(ebbs [a-z][a-z -]*[a-z])`", PAGE))
    assert len(commands) >= 5
    for command in commands:
        check_understood(command)


def test_the_exit_codes_are_those_that_the_help_lists() -> None:
    section = PAGE.partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    on_the_page = set(re.findall(r"^\| (\d) \|", section, re.MULTILINE))
    assert on_the_page == set(re.findall(r"^  (\d)  ", EPILOG, re.MULTILINE)) == set("01234")


def test_no_block_is_left_out() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "console", "python", "ini", "yaml", "sql"}
    assert len(BLOCKS) == 10
