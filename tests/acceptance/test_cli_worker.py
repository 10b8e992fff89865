"""`ebbs worker` as it is used: a process of its own that runs an app's flows, is stopped by signals, is looked at."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ebbs_and_flows import FlowFilter, FlowService, FlowStatus
from tests.integration.invariants import check_invariants
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals and terminals on Windows")

APP = '''
"""An application: its flows, and what makes its runner."""

import logging
import os
import subprocess
import time
from multiprocessing import parent_process

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, task

log = logging.getLogger("shop")

@task(outputs="doubled")
def double(number: int) -> int:
    log.warning("doubling %s", number)
    return 2 * number

@task(outputs="ran_in")
def note(doubled: int) -> str:
    return "child" if parent_process() else "worker"

@task
def sleep(seconds: float) -> None:
    print("sleeping \\x1b[31mfor long", flush=True)
    subprocess.run(["echo", "from a child of the task"], check=True)
    time.sleep(seconds)

def runner():
    runner = FlowRunner(FlowService(os.environ["SHOP_URL"]))
    runner.register_flow_template(FlowTemplate("double", [double, note]))
    runner.register_flow_template(FlowTemplate("sleep [bold]\\u202e", [sleep]))
    return runner
'''


@pytest.fixture(scope="module", autouse=True)
def _hang_up_is_heard() -> Iterator[None]:
    """Under `nohup` the tests' own process ignores SIGHUP, and so would each that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) if sys.platform != "win32" else None
    yield
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, before)


SLEEP = "sleep [bold]\u202e"


class Ebbs:
    """A running `ebbs worker`, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self._output = output
        self._said = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """All of its stderr; for one on a terminal, all that was sent there."""
        return self._said.decode("utf-8", "backslashreplace")

    def wait_for(self, text: str) -> None:
        """Wait until it has said this."""
        wait_until(lambda: text in self.said or self.process.poll() is not None, f"{text!r} in what it says")
        assert text in self.said, self.said

    def stop(self, *signals: signal.Signals) -> int:
        """Send signals and wait for its exit code."""
        for each in signals:
            self.process.send_signal(each)
        code = self.process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        return code

    def _read(self) -> None:
        while True:
            try:
                read = os.read(self._output, 65536)
            except OSError:  # the end of a terminal on Linux
                return
            if not read:
                return
            self._said += read


Start = Callable[..., Ebbs]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the application in it."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "shop.py").write_text(APP)
    return folder


@pytest.fixture
def start(folder: Path, database_url: str) -> Iterator[Start]:
    """Starts `ebbs worker` in that folder; whatever is left of it after the test is killed."""
    with _starter(folder, database_url) as start:
        yield start


@contextmanager
def _starter(folder: Path, database_url: str) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []
    opened: list[int] = []

    def start(*arguments: object, terminal: tuple[int, int] | None = None) -> Ebbs:
        command = Path(sysconfig.get_path("scripts"), "ebbs")
        mine, theirs = _new_terminal(*terminal) if terminal else os.pipe()
        opened.append(mine)
        process = subprocess.Popen(
            [command, "worker", "--app", "shop:runner", *map(str, arguments)],
            cwd=folder,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs if terminal else subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
            env={**_plain_environment(), "SHOP_URL": database_url, "TERM": "xterm-256color"},
        )
        os.close(theirs)
        started.append(process)
        return Ebbs(process, mine)

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for each in opened:
        os.close(each)


def _plain_environment() -> dict[str, str]:
    names = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in names}


def _new_terminal(columns: int, lines: int) -> tuple[int, int]:
    import fcntl
    import pty
    import termios

    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return mine, theirs


def statuses(service: FlowService) -> dict[int, FlowStatus]:
    return {each.execution_id: each.status for each in service.find_flow_executions(FlowFilter(limit=1000))}


def all_are(service: FlowService, status: FlowStatus) -> bool:
    return set(statuses(service).values()) == {status}


def test_flows_finish_and_sigterm_is_exit_code_0(start: Start, service: FlowService) -> None:
    ids = [service.schedule("double", {"number": number}) for number in range(20)]
    worker = start("--poll-seconds", 0.1)
    wait_until(lambda: all_are(service, FlowStatus.SUCCEEDED), "the end of all flows")
    late = service.schedule("double", {"number": 20})
    wait_until(lambda: all_are(service, FlowStatus.SUCCEEDED), "the end of the late one")
    assert worker.stop(signal.SIGTERM) == 0
    assert {service.get_flow_execution(each).execution_context["ran_in"] for each in (*ids, late)} == {"worker"}
    assert f"execution {late} of double is SUCCEEDED" in worker.said
    assert re.search(
        rf"^\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d\d\dZ WARNING doubling 20 execution_id={late} template=double "
        rf"task=double attempt=1$",
        worker.said,
        re.MULTILINE,
    )
    assert re.search(r"INFO worker \S+ ran for \S+: 21 claimed, 21 succeeded$", worker.said, re.MULTILINE)
    assert check_invariants(service.engine) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_does_not_end_within_the_grace_is_handed_back(
    start: Start, service: FlowService, number: signal.Signals
) -> None:
    execution_id = service.schedule(SLEEP, {"seconds": 600.0})
    worker = start("--grace-seconds", 0.2)
    wait_until(lambda: statuses(service)[execution_id] is FlowStatus.RUNNING, "its start")
    assert worker.stop(number) == 0
    assert statuses(service)[execution_id] is FlowStatus.RESCHEDULED
    assert "left to" not in worker.said
    assert check_invariants(service.engine) == []


def test_a_second_ctrl_c_hands_back_at_once(start: Start, service: FlowService) -> None:
    execution_id = service.schedule(SLEEP, {"seconds": 600.0})
    worker = start("--grace-seconds", 600)
    wait_until(lambda: statuses(service)[execution_id] is FlowStatus.RUNNING, "its start")
    worker.process.send_signal(signal.SIGINT)
    worker.wait_for("is stopping with 1 executions in flight")
    assert worker.process.poll() is None
    assert worker.stop(signal.SIGINT) == 0
    assert statuses(service)[execution_id] is FlowStatus.RESCHEDULED


def test_processes_run_the_functions_and_log_as_the_worker_does(start: Start, service: FlowService) -> None:
    ids = [service.schedule("double", {"number": number}) for number in range(4)]
    worker = start("--processes", 2, "--until-idle", "--log-format", "json")
    assert worker.stop() == 0
    assert all_are(service, FlowStatus.SUCCEEDED)
    assert {service.get_flow_execution(each).execution_context["ran_in"] for each in ids} == {"child"}
    records = [json.loads(line) for line in worker.said.splitlines()]
    ours = [each for each in records if each["logger"] == "shop"]
    assert sorted(each["execution_id"] for each in ours) == ids
    assert {(each["level"], each["task"], each["attempt"]) for each in ours} == {("WARNING", "double", 1)}


def test_a_process_that_runs_for_ever_does_not_hold_up_the_end(start: Start, service: FlowService) -> None:
    execution_id = service.schedule(SLEEP, {"seconds": 600.0})
    worker = start("--processes", 1, "--grace-seconds", 0.2)
    worker.wait_for("takes up to")
    wait_until(lambda: statuses(service)[execution_id] is FlowStatus.RUNNING, "its start")
    service.cancel(execution_id)
    worker.wait_for("cancelled or is no longer held")
    began = time.monotonic()
    assert worker.stop(signal.SIGTERM) == 0
    assert time.monotonic() - began < 10
    assert statuses(service)[execution_id] is FlowStatus.CANCELLED


# --- the live view ----------------------------------------------------------------------------------------------------

HOME, NEW_SCREEN, OLD_SCREEN, HIDE_CURSOR, SHOW_CURSOR = (
    "\x1b[H",
    "\x1b[?1049h",
    "\x1b[?1049l",
    "\x1b[?25l",
    "\x1b[?25h",
)


def frames(said: str) -> list[list[str]]:
    """The screens that were drawn, as lines without colours; the last one may be drawn yet."""
    inside = said.partition(NEW_SCREEN)[2].partition(SHOW_CURSOR)[0]
    screens = [re.sub(r"\x1b\[[0-9;]*m", "", each).split("\r\n") for each in inside.split(HOME)]
    return [screen for screen in screens if len(screen) > 1]


def last_frame(worker: Ebbs) -> str:
    """The latest whole screen, with one space where there are many."""
    drawn = frames(worker.said)
    return re.sub(r" +", " ", "\n".join(drawn[-2])) if len(drawn) > 1 else ""


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 40)])
def test_a_terminal_shows_what_the_worker_does_and_is_left_as_it_was(
    start: Start, service: FlowService, columns: int, lines: int
) -> None:
    done = service.schedule("double", {"number": 2})
    asleep = [service.schedule(SLEEP, {"seconds": 600.0}) for _ in range(2)]
    worker = start("--concurrency", 7, "--grace-seconds", 600, terminal=(columns, lines))
    expected = [
        " in flight ━",
        " 2/7 from default",
        " database ok",
        " claimed succeeded failed rescheduled refused recovered attempts/s",
        " 3 1 0 0 0 0 ",
        *(f" {each} sleep [bold]\\u202e sleep 1 " for each in asleep),
        " sleeping \\x1b[31mfor long",  # what tasks print
        " from a child of the task",
        f" execution {done} of double is SUCCEEDED",
        f" doubling 2 execution_id={done} ",
        " Ctrl-C stops it in good order",
    ]
    wait_until(lambda: all(each in last_frame(worker) for each in expected), "the whole view")

    worker.process.send_signal(signal.SIGINT)
    told = "stopping: waiting for 2 executions, Ctrl-C again to hand them back now"
    wait_until(lambda: told in last_frame(worker), "that it is stopping")
    assert worker.stop(signal.SIGINT) == 0
    assert statuses(service)[asleep[0]] is FlowStatus.RESCHEDULED

    for screen in frames(worker.said)[:-1]:
        assert len(screen) == lines
        assert {len(line) for line in screen} == {columns}
    before, _, rest = worker.said.partition(NEW_SCREEN)
    view, _, after = rest.partition(OLD_SCREEN)
    assert before == ""
    assert view.count(HIDE_CURSOR) == view.count(SHOW_CURSOR) == 1
    assert view.endswith(SHOW_CURSOR)
    assert "\x1b[32mrunning" in view
    assert "\x1b" not in after
    assert "3 claimed, 1 succeeded, 2 rescheduled" in after.splitlines()[-1]


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_view_follows_the_size_of_its_terminal(start: Start) -> None:
    import fcntl
    import termios

    worker = start(terminal=(80, 24))
    worker.wait_for("Ctrl-C stops it")
    fcntl.ioctl(worker._output, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 46, 0, 0))
    wait_until(lambda: {len(line) for line in frames(worker.said)[-1]} == {46}, "narrower lines")
    assert worker.stop(signal.SIGTERM) == 0
    assert len(frames(worker.said)[-1]) == 12


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_a_terminal_that_is_closed_ends_the_worker_in_good_order(
    folder: Path, database_url: str, service: FlowService
) -> None:
    execution_id = service.schedule(SLEEP, {"seconds": 600.0})
    with _starter(folder, database_url) as start:
        worker = start("--grace-seconds", 0.2, terminal=(80, 24))
        worker.wait_for(" 1/32")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, worker._output)  # closes the terminal, and keeps its number
        os.close(nothing)
        assert worker.stop(signal.SIGHUP) == 0
    assert statuses(service)[execution_id] is FlowStatus.RESCHEDULED


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize("option", [["--plain"], ["--log-format", "json"]])
def test_a_terminal_shows_log_lines_where_it_is_told_to(start: Start, service: FlowService, option: list[str]) -> None:
    service.schedule("double", {"number": 1})
    worker = start("--until-idle", *option, terminal=(80, 24))
    assert worker.stop() == 0
    assert "is SUCCEEDED" in worker.said
    assert "\x1b" not in worker.said
