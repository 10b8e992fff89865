"""`ebbs worker` within this process: what it takes for an app, what it logs, and what its view shows."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from ebbs_and_flows import FlowService, FlowStatus, InFlight, WorkerHealth
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.cli.live import View
from ebbs_and_flows.cli.logs import JsonFormatter, LogFormat, LogLevel, TextFormatter, logs_on_stderr
from tests.integration.invariants import check_invariants

SHOP = """
import logging
from types import SimpleNamespace

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, Worker, task

log = logging.getLogger("shop")

@task(outputs="receipt")
def charge(total: int) -> str:
    log.info("charging %s\\nin two lines", total)
    if total < 0:
        raise ValueError(f"{total} is no price")
    return f"paid {total}"

service = FlowService(URL)
runner = FlowRunner(service)
runner.register_flow_template(FlowTemplate("order", [charge]))
worker = Worker(runner, concurrency=3, poll_seconds=0.1)
shelf = SimpleNamespace(runner=runner, make=lambda: runner)

def make():
    return runner

def make_worker():
    return worker

def make_nothing():
    return None

async def make_later():
    return runner

def make_for(somebody):
    return runner

def fail():
    raise RuntimeError("the settings are missing")

def leave():
    raise SystemExit(7)
"""

Ebbs = Callable[..., Result]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes modules into the current folder; they are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)

    def write(name: str, code: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)

    yield write
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def ebbs(write: object, monkeypatch: pytest.MonkeyPatch) -> Ebbs:
    """`ebbs worker --until-idle --app ...` in the current folder."""
    for name in ("EBBS_DATABASE_URL", "EBBS_SCHEMA", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(given: str, *options: object) -> Result:
        arguments = ["worker", "--until-idle", "--app", given, *map(str, options)]
        result = CliRunner().invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def shop(write: Callable[[str, str], None], database_url: str) -> None:
    """The module `shop`, on this test's database."""
    write("shop.py", SHOP.replace("URL", repr(database_url)))


# --- what is an app ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runner", "worker", "make", "make_worker", "shelf.runner", "shelf.make"])
def test_an_app_is_a_runner_or_a_worker_or_what_returns_one(
    name: str, ebbs: Ebbs, shop: None, service: FlowService
) -> None:
    execution_id = service.schedule("order", {"total": 42})
    result = ebbs(f"shop:{name}")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    execution = service.get_flow_execution(execution_id)
    assert execution.execution_context["receipt"] == "paid 42"
    assert check_invariants(service.engine) == []


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("shop", "--app 'shop' is not MODULE:NAME, for example shop.flows:runner"),
        (":runner", "is not MODULE:NAME"),
        ("shop:", "is not MODULE:NAME"),
        ("shop/flows:runner", "'shop/flows' is not a module's name: write it as Python imports it"),
        (".shop:runner", "'.shop' is not a module's name"),
        ("no_such_shop:runner", "there is no module 'no_such_shop' in "),
        ("shop.flows:runner", "there is no module 'shop.flows' in "),
        ("shop.py:runner", "there is no module 'shop.py' in "),
        ("shop:runer", "module shop has no 'runer': it has runner, worker"),
        ("shop:shelf.runer", "a SimpleNamespace in shop has no 'runer'"),
        ("shop:service", "shop:service is a FlowService: expected a FlowRunner, a Worker, or a function that returns"),
        ("shop:FlowRunner", "shop:FlowRunner is the class FlowRunner: expected"),
        ("shop:logging", "shop:logging is the module logging: expected"),
        ("shop:make_nothing", "shop:make_nothing is a NoneType: expected"),
        ("shop:make_later", "shop:make_later is a coroutine: expected"),
        ("shop:make_for", "is called without arguments, which does not do: missing a required argument: 'somebody'"),
    ],
)
def test_what_is_no_app_is_exit_code_2_and_one_line(given: str, said: str, ebbs: Ebbs, shop: None) -> None:
    result = ebbs(given)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert ("leave out .py" in result.stderr) == (given == "shop.py:runner")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("from logging import no_such_name", "ImportError: cannot import name"),
        ("runner = 1 / 0", "ZeroDivisionError: division by zero"),
        ("def runner(:", "SyntaxError: "),
        ("raise SystemExit('only as a script')", "SystemExit: only as a script"),
    ],
)
def test_a_fault_within_the_module_is_shown_with_its_own_traceback(
    code: str, said: str, ebbs: Ebbs, write: Callable[[str, str], None]
) -> None:
    write("broken/__init__.py", "")
    write("broken/flows.py", f"import logging\n{code}\n")
    result = ebbs("broken.flows:runner")
    assert result.exit_code == 2
    *shown, error = result.stderr.splitlines()
    assert error.startswith("error: module broken.flows is there, but cannot be imported: ")
    assert said in error
    assert any("flows.py" in line and "line 2" in line for line in shown)
    assert not any("importlib" in line or "cli/apps.py" in line for line in shown)


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("name", "said"), [("fail", "RuntimeError: the settings are missing"), ("leave", "SystemExit: 7")]
)
def test_a_fault_within_the_function_is_shown_with_its_traceback(name: str, said: str, ebbs: Ebbs, shop: None) -> None:
    result = ebbs(f"shop:{name}")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert result.stderr.splitlines()[-1].startswith(f"error: shop:{name} was called and raised {said}")


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_an_app_whose_schema_is_missing_is_exit_code_3(
    ebbs: Ebbs, write: Callable[[str, str], None], empty_database_url: str
) -> None:
    write("shop.py", SHOP.replace("URL", repr(empty_database_url)))
    result = ebbs("shop:runner")
    assert result.exit_code == 3
    assert 'run "ebbs db upgrade"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_app_whose_database_does_not_answer_is_exit_code_1(ebbs: Ebbs, write: Callable[[str, str], None]) -> None:
    write("shop.py", SHOP.replace("URL", repr("postgresql://user:hunter2@127.0.0.1:1/shop?connect_timeout=5")))
    result = ebbs("shop:runner")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the database: ")
    assert "hunter2" not in result.stderr


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_worker_with_options_of_its_own_takes_no_others(ebbs: Ebbs, shop: None) -> None:
    result = ebbs("shop:worker", "--concurrency", 2, "--queue", "mails", "--no-listen", "--processes", 2)
    assert result.exit_code == 2
    assert "leave out --concurrency, --queue, --no-listen, --processes" in result.stderr


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--concurrency", 0], "concurrency=0 cannot be used"),
        (["--lease-seconds", 0], "lease_seconds=0.0 cannot be used"),
        (["--queue", ""], "queue name ''"),
        (["--processes", 0], "processes=0 cannot be used"),
        (["--max-in-flight", "mails"], "max_in_flight='mails' cannot be used: expected QUEUE=NUMBER"),
        (["--max-in-flight", "mails=x"], "expected QUEUE=NUMBER"),
        (["--max-in-flight", "=5"], "expected QUEUE=NUMBER"),
        (["--max-in-flight", "mails=0"], "max_in_flight=0 cannot be used"),
    ],
)
def test_an_option_that_cannot_be_used_is_exit_code_2(options: list[Any], said: str, ebbs: Ebbs, shop: None) -> None:
    result = ebbs("shop:runner", *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_it_takes_from_the_queues_that_are_named(ebbs: Ebbs, shop: None, service: FlowService) -> None:
    ids = {queue: service.schedule("order", {"total": 1}, queue=queue) for queue in ("default", "mails", "a=b")}
    options = ("--queue", "mails", "--queue", "a=b", "--max-in-flight", "a=b=1", "--max-in-flight", "mails=2")
    assert ebbs("shop:runner", *options).exit_code == 0
    found = {queue: service.get_flow_execution(each).status for queue, each in ids.items()}
    done = FlowStatus.SUCCEEDED
    assert found == {"default": FlowStatus.SCHEDULED, "mails": done, "a=b": done}


def test_a_runner_without_templates_is_worth_a_warning(ebbs: Ebbs, write: Callable[[str, str], None]) -> None:
    write("bare.py", "from ebbs_and_flows import *\nrunner = FlowRunner(FlowService('sqlite://'))")
    result = ebbs("bare:runner")
    assert result.exit_code == 0
    assert "WARNING bare:runner has no templates" in result.stderr


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_worker_that_breaks_is_exit_code_1(ebbs: Ebbs, shop: None, service: FlowService, write: Any) -> None:
    write(
        "breaking.py",
        "from concurrent.futures import Executor\n"
        "from ebbs_and_flows import Worker\n"
        "from shop import runner\n"
        "class Refusing(Executor):\n"
        "    def submit(self, *_, **__): raise RuntimeError('no more')\n"
        "worker = Worker(runner, executor=Refusing())",
    )
    execution_id = service.schedule("order", {"total": 1})
    result = ebbs("breaking:worker")
    assert result.exit_code == 1
    assert re.search(r"^error: worker \S+ has stopped: .*no more", result.stderr.splitlines()[-1])
    assert service.get_flow_execution(execution_id).status is not FlowStatus.RUNNING


def test_help_says_what_an_app_is_and_how_it_stops(ebbs: Ebbs) -> None:
    shown = " ".join(CliRunner().invoke(app, ["worker", "--help"]).stdout.split())
    assert "MODULE:NAME is a FlowRunner, a Worker with options of its own, or a function" in shown
    assert "SIGTERM or Ctrl-C stops it in good order" in shown


# --- log lines --------------------------------------------------------------------------------------------------------


def test_each_record_of_a_task_says_which_attempt_it_is_of(ebbs: Ebbs, shop: None, service: FlowService) -> None:
    execution_id = service.schedule("order", {"total": -1})
    result = ebbs("shop:runner")
    fields = f"execution_id={execution_id} template=order task=charge attempt=1"
    at = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    lines = result.stderr.splitlines()
    assert any(re.fullmatch(rf"{at} INFO charging -1\\nin two lines {fields}", line) for line in lines)
    assert any(
        re.fullmatch(rf"{at} INFO execution {execution_id} of order is FAILED: .* {fields}", line) for line in lines
    )
    assert all(re.match(rf"{at} (INFO|WARNING) ", line) for line in lines)
    assert lines[-1].endswith("1 claimed, 1 failed")


def test_records_are_objects_for_programs(ebbs: Ebbs, shop: None, service: FlowService) -> None:
    execution_id = service.schedule("order", {"total": 1})
    records = [json.loads(line) for line in ebbs("shop:runner", "--log-format", "JSON").stderr.splitlines()]
    (record,) = [each for each in records if each["logger"] == "shop"]
    assert datetime.fromisoformat(record.pop("time").replace("Z", "+00:00")).tzinfo is not None
    assert record == {
        "level": "INFO",
        "logger": "shop",
        "message": "charging 1\nin two lines",
        "execution_id": execution_id,
        "template": "order",
        "task": "charge",
        "attempt": 1,
    }
    assert "execution_id" not in records[0]  # the worker's start is about no attempt


def test_a_level_leaves_the_lower_ones_out(ebbs: Ebbs, shop: None, service: FlowService) -> None:
    service.schedule("order", {"total": -1})
    (line,) = ebbs("shop:runner", "--log-level", "warning").stderr.splitlines()
    assert " WARNING execution 1 of order, task charge, attempt 1: failed with " in line


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_logging_that_the_app_has_set_up_neither_doubles_nor_silences_anything(
    ebbs: Ebbs, shop: None, service: FlowService, write: Any, tmp_path: Path
) -> None:
    write(
        "logged.py",
        "import logging.config\n"
        "from shop import runner\n"
        "logging.config.dictConfig({'version': 1, 'root': {'level': 'WARNING', 'handlers': ['console', 'file']},\n"
        "    'handlers': {'console': {'class': 'logging.StreamHandler'},\n"
        "                 'file': {'class': 'logging.FileHandler', 'filename': 'app.log', 'level': 'WARNING'}}})\n",
    )
    root = logging.getLogger()
    before, level, is_disabled = root.handlers[:], root.level, logging.getLogger("ebbs_and_flows").disabled
    service.schedule("order", {"total": -1})
    try:
        result = ebbs("logged:runner")
        added = [each for each in root.handlers if each not in before]
        assert [type(each).__name__ for each in added] == ["StreamHandler", "FileHandler"]
        assert root.level == logging.WARNING
    finally:
        for each in [each for each in root.handlers if each not in before]:
            each.close()
        root.handlers = before
        root.setLevel(level)
        for name in ("ebbs_and_flows", "shop"):
            logging.getLogger(name).disabled = is_disabled
    assert len([line for line in result.stderr.splitlines() if "failed with" in line]) == 1
    assert "is FAILED" in result.stderr
    assert "failed with" in (tmp_path / "app.log").read_text()


def record(message: str, *, exception: BaseException | None = None, **fields: object) -> logging.LogRecord:
    about = (type(exception), exception, exception.__traceback__) if exception is not None else None
    made = logging.LogRecord("x", logging.ERROR, __file__, 1, message, (), about)
    vars(made).update(fields)
    return made


def test_nothing_in_a_record_can_forge_a_line_or_steer_a_terminal() -> None:
    hostile = 'x\n2026-01-01T00:00:00.000Z ERROR forged \x1b[31m\u202e"'
    try:
        raise ValueError(hostile)
    except ValueError as error:
        shown = TextFormatter().format(record(hostile, exception=error, execution_id=1, task=hostile, template="a b"))
    first, *rest = shown.split("\n")
    assert "\\n2026-01-01T00:00:00.000Z ERROR forged \\x1b[31m\\u202e" in first
    assert first.count("execution_id=1") == 1
    assert ' template="a b" ' in first
    assert all(line.startswith("    ") for line in rest)
    assert any("raise ValueError(hostile)" in line for line in rest)
    assert all(line.isprintable() for line in (first, *rest))


def test_an_object_has_the_traceback_and_is_ascii() -> None:
    try:
        raise ValueError("\u65e5\u202e")
    except ValueError as error:
        line = JsonFormatter().format(record("m", exception=error, attempt=2))
    assert line.isascii()
    document = json.loads(line)
    assert document["attempt"] == 2
    assert document["exception"].endswith("ValueError: \u65e5\u202e")


def test_logging_is_as_it_was_afterwards() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with logs_on_stderr(LogLevel.DEBUG, LogFormat.TEXT):
        assert len(root.handlers) == len(before[0]) + 1
        assert root.level == logging.DEBUG
    assert (root.handlers, root.level) == before


# --- the view ---------------------------------------------------------------------------------------------------------


class ShownWorker:
    """What a view needs of a worker: its health, and what it has in flight."""

    def __init__(self, in_flight: int = 0, **health: Any) -> None:
        self._health = WorkerHealth(
            worker="host:1:abc",
            is_running=True,
            is_stopping=False,
            is_healthy=True,
            started_at=datetime.now(timezone.utc) - timedelta(seconds=184),
            concurrency=32,
            in_flight=in_flight,
            queues=("default", "mails"),
            claimed=1_234_567,
            succeeded=1_190,
            failed=3,
            rescheduled=9,
            refused=0,
            recovered=1,
            attempts=5_000,
            seconds_since_turn=0.1,
            seconds_since_database=0.1,
            outage=None,
            pool="",
        ).model_copy(update=health)
        self._in_flight = [
            InFlight(
                execution_id=number,
                template_name="[red]t\u202e" + "x" * 300,
                task=f"task-{number}",
                attempt=1,
                seconds=None if number == in_flight else 1000.0 - number,
                is_asked_to_stop=number == 1,
            )
            for number in range(1, in_flight + 1)
        ]

    def health(self) -> WorkerHealth:
        return self._health

    def in_flight(self) -> list[InFlight]:
        return self._in_flight


LOG = [
    "2026-11-23T20:15:29.123Z INFO execution 17 of order is SUCCEEDED execution_id=17 template=order task=t attempt=1",
    "2026-11-23T20:15:30.123Z WARNING the parcel is heavy execution_id=18 template=order task=pack attempt=1",
    "2026-11-23T20:15:31.123Z ERROR it burns",
    "a print \x1b[2J of a task",
]


def drawn(worker: ShownWorker, columns: int = 80, lines: int = 24, log: list[str] = LOG) -> str:
    console = Console(width=columns, height=lines, force_terminal=True, color_system="standard", markup=False)
    view = View(worker, log)  # type: ignore[arg-type]  # all of it that is used
    with console.capture() as capture:
        console.print(view.draw(console))
    return capture.get().rstrip("\n")


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).split("\n")


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40), (200, 60), (46, 12), (20, 8)])
@pytest.mark.parametrize("in_flight", [0, 3, 32])
def test_a_view_fits_the_terminal(columns: int, lines: int, in_flight: int) -> None:
    shown = plain(drawn(ShownWorker(in_flight), columns, lines, LOG * 50))
    assert len(shown) == max(lines, 10)
    assert max(len(line) for line in shown) <= columns
    assert all(line.isprintable() for line in shown)


def test_a_view_shows_who_works_on_what_and_for_how_long() -> None:
    shown = plain(drawn(ShownWorker(3)))
    assert re.fullmatch(r" worker host:1:abc +up 3m04s  running ?", shown[0])
    assert re.fullmatch(r" in flight  ━+─+  3/32  from default, mails *", shown[1])
    assert shown[2].split() == ["database", "ok"]
    assert shown[5].split() == ["1,234,567", "1,190", "3", "9", "0", "1", "0.0"]
    assert shown[8].split() == ["1", "[red]t\\u202exxx…", "task-1", "1", "16m39s", "asked", "to", "stop"]
    assert shown[10].split()[-3:] == ["task-3", "1", "waits"]
    assert shown[-9:-5] == [
        " 20:15:29 execution 17 of order is SUCCEEDED",
        " 20:15:30 the parcel is heavy execution_id=18 template=order task=pack attempt=1",
        " 20:15:31 it burns",
        " a print \\x1b[2J of a task",
    ]


def test_more_than_fits_is_counted() -> None:
    shown = plain(drawn(ShownWorker(32)))
    assert shown[13].split() == ["and", "27", "more"]
    assert [line.split()[0] for line in shown[8:13]] == ["1", "2", "3", "4", "5"]


def test_warnings_are_yellow_and_errors_are_red() -> None:
    shown = drawn(ShownWorker())
    assert "\x1b[33mthe parcel is heavy\x1b[0m" in shown
    assert "\x1b[31mit burns\x1b[0m" in shown


def test_a_warning_is_cut_at_the_end_of_its_second_line() -> None:
    long = "2026-11-23T20:15:30.123Z {} execution 18 of order, task charge, attempt 1: failed with " + "words " * 40
    shown = plain(drawn(ShownWorker(), log=[long.format("WARNING"), long.format("INFO")]))
    begins = next(number for number, line in enumerate(shown) if line.startswith(" 20:15:30"))
    assert shown[begins].startswith(" 20:15:30 execution 18 of order, task charge, attempt 1: failed with ")
    assert re.fullmatch(r" {10}words .*…", shown[begins + 1])
    assert re.fullmatch(r" 20:15:30 execution 18 .*…", shown[begins + 2])
    assert shown[begins + 3] == ""


def test_an_outage_is_told_in_red_in_the_words_of_the_database() -> None:
    outage = 'connection to "db" failed:\n\tIs the server\x1b[2J running? ' + "x" * 200
    text = drawn(ShownWorker(outage=outage, seconds_since_database=12.0, is_healthy=False))
    shown = plain(text)
    assert shown[2].startswith(' database   does not answer for 12.0s: connection to "db" failed: Is the')
    assert shown[3].strip().startswith("server\\x1b[2J running?")
    assert len(shown) == 24
    assert "\x1b[1;31mdoes not answer" in text
    assert "not healthy" in shown[0]


def test_a_database_that_has_been_silent_for_long_is_worth_a_word() -> None:
    assert plain(drawn(ShownWorker(seconds_since_database=42.0)))[2].split()[1:] == ["ok", "answered", "42.0s", "ago"]


@pytest.mark.parametrize(
    ("in_flight", "said"),
    [
        (3, " stopping: waiting for 3 executions, Ctrl-C again to hand them back now"),
        (1, " stopping: waiting for 1 execution, Ctrl-C again to hand it back now"),
        (0, " stopping"),
    ],
)
def test_a_worker_that_stops_says_what_it_waits_for(in_flight: int, said: str) -> None:
    shown = plain(drawn(ShownWorker(in_flight, is_stopping=True)))
    assert shown[-1] == said
    assert shown[0].rstrip().endswith("stopping")
    assert not any("asked to stop" in line for line in shown)  # all of them are


def test_attempts_per_second_are_those_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("ebbs_and_flows.cli.live.time.monotonic", lambda: now[0])
    view = View(ShownWorker(), [])  # type: ignore[arg-type]  # all of it that is used
    rates = []
    for attempts in (0, 50, 100, 100, 100, 100, 100, 100, 100):
        rates.append(view._rate(attempts))
        now[0] += 1.0
    assert rates[:3] == [0.0, 50.0, 50.0]
    assert rates[-1] == 0.0
