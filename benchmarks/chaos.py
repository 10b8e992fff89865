"""Does anything get lost or done twice when workers are killed and stopped and the server crashes, all the time?

Run it as `python benchmarks/chaos.py`: on a PostgreSQL server of its own, which it crashes; `--sqlite` on a file.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.chaos_report import (
    Disturbance,
    check,
    database_time,
    make_tables,
    report,
    show_histories,
    write_disturbances,
)
from benchmarks.chaos_worker import FLOW, Notes, Pace, flow
from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, schema
from tests.integration.invariants import process_of
from tests.postgres import CrashingServer, crashing_server

WORKER = Path(__file__).with_name("chaos_worker.py")

TICK_SECONDS = 0.02
LOOK_SECONDS = 0.1
"""How often it looks how many executions have finished."""

END_SECONDS = 30
"""How long workers may take to end once they are told to."""

POOL = 15
"""Connections that a worker's engine may open: SQLAlchemy's default of 5, and 10 more at need."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chaos, check what it has left, and print the report; 1 where anything is wrong."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that no server and no worker is left
    counts = (f"--{name} {getattr(options, name)}" for name in COUNTS)
    print("python benchmarks/chaos.py", *["--sqlite"] * options.sqlite, *counts, flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        server = None
        url = options.database_url
        if options.sqlite:
            url = f"sqlite:///{folder / 'flows.db'}"
        elif url is None:
            server = stack.enter_context(crashing_server())
            url = server.url.render_as_string(hide_password=False)
        schema.upgrade(url)
        # A worker that is stopped may hold SQLite's write lock, and goes on only if nobody here waits for that.
        patience = {"timeout": LOOK_SECONDS} if url.startswith("sqlite") else {}
        engine = create_engine(url, pool_pre_ping=True, connect_args=patience)
        stack.callback(engine.dispose)
        make_tables(engine)
        chaos = Chaos(options, engine, server, folder)
        try:
            chaos.run()
        finally:
            chaos.end()
        bound_seconds = options.lease_seconds + options.poll_seconds + options.slack_seconds
        print(f"{engine.dialect.name}, {chaos.seconds:.0f} s, {chaos.workers.started} workers started")
        report(engine, chaos.acknowledged, bound_seconds)
        if engine.dialect.name == "postgresql":
            print(f"connections: at most {chaos.most_connections} of one worker, whose pool has {POOL}")
        print(f"refused:     {chaos.workers.refusals()} times a worker was told that it no longer held what it ran")
        violations = [*chaos.violations, *check(engine, chaos.acknowledged, bound_seconds)]
        print(f"violations:  {len(violations)}")
        for violation in violations[:100]:
            print(f"  {violation}")
        show_histories(engine, violations)
    return 1 if violations else 0


COUNTS = ("executions", "workers", "kills", "restarts", "zombies", "seed")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and choose a seed where it has none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--database-url", metavar="URL", help="an empty database; its server is not crashed")
    where.add_argument("--sqlite", action="store_true", help="a file in a temporary folder")
    parser.add_argument("--executions", type=int, default=2000, help="of five tasks each, at least; default 2000")
    parser.add_argument("--workers", type=int, default=4, help="processes, at least 2; default 4")
    parser.add_argument("--kills", type=int, default=100, help="of workers, by SIGKILL; default 100")
    parser.add_argument("--restarts", type=int, help="of the server, as after a crash; default 20 where it is its own")
    parser.add_argument("--zombies", type=int, default=20, help="workers stopped past their lease; default 20")
    parser.add_argument("--seed", type=int, help="of what is done, and when; default another one each time")
    parser.add_argument("--concurrency", type=int, default=16, help="executions in flight, a worker; default 16")
    parser.add_argument("--lease-seconds", type=float, default=2.0)
    parser.add_argument("--poll-seconds", type=float, default=0.2)
    parser.add_argument("--slack-seconds", type=float, default=1.0, help="beyond lease and poll, to recover; default 1")
    parser.add_argument("--task-seconds", type=float, default=0.3, help="that a task takes on average; default 0.3")
    parser.add_argument("--pause-seconds", type=float, default=1.0, help="between disturbances on average; default 1")
    parser.add_argument("--deadline-seconds", type=float, help="for all; default by what there is to do")
    options = parser.parse_args(arguments)
    owns_server = options.database_url is None and not options.sqlite
    if options.restarts is None:
        options.restarts = 20 if owns_server else 0
    if options.restarts and not owns_server:
        parser.error("--restarts needs a server of its own: leave out --database-url and --sqlite")
    if options.workers < 2:
        parser.error("--workers is at least 2: while one is dead, another one has to be there")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1_000_000)
    if options.deadline_seconds is None:
        disturbances = options.kills + options.restarts + options.zombies
        options.deadline_seconds = 120 + 8 * disturbances + 0.5 * options.executions
    return options


class Chaos:
    """One run: schedules executions, disturbs the workers and the server, and waits until all have finished.

    Args:
        options: of the command line.
        engine: the database, with its schema.
        server: where it is our own.
        folder: for the workers' logs.
    """

    def __init__(
        self, options: argparse.Namespace, engine: Engine, server: CrashingServer | None, folder: Path
    ) -> None:
        self._options = options
        self._engine = engine
        self._server = server
        self._random = random.Random(options.seed)
        self._clock_offset = database_time(engine) - time.time()
        self.workers = Workers(options, engine.url.render_as_string(hide_password=False), folder, self._random)
        self.acknowledged: dict[str, int] = {}
        """By idempotency key the id that was returned."""
        self.violations: list[str] = []
        """What was seen while it ran."""
        self.most_connections = 0
        """Of one worker, whenever it was looked at."""
        self.seconds = 0.0
        self._done: list[Disturbance] = []
        self._plan = self._planned()
        self._steps = len(self._plan) + 1
        self._finished = 0
        self._trouble: SQLAlchemyError | None = None
        self._down_since: float | None = None
        self._up_at = self._next_at = self._next_look_at = 0.0
        self._service = FlowService(engine)
        self._runner = FlowRunner(self._service)
        self._runner.register_flow_template(flow(Notes(engine), Pace(0, 0, 0, seed=0)))

    def run(self) -> None:
        """Disturb, until all that was planned is done and every execution has finished, or the deadline has passed."""
        began = time.monotonic()
        while not self._is_over():
            if time.monotonic() > began + self._options.deadline_seconds:
                self.violations.append(
                    f"deadline: after {self._options.deadline_seconds:.0f} s {self._finished} of "
                    f"{self._options.executions} executions have finished, {len(self._plan)} disturbances were to "
                    f"come, the last error here was {self._trouble}"
                )
                break
            self.violations += self.workers.ended_by_themselves()
            self.workers.fill_up()
            self._let_zombies_go_on()
            self._restore_server()
            self._schedule()
            if self._plan and time.monotonic() >= self._next_at and self._disturb(self._plan[-1]):
                self._plan.pop()
                pause = self._random.expovariate(1 / self._options.pause_seconds)
                self._next_at = time.monotonic() + min(pause, 5 * self._options.pause_seconds)
            time.sleep(TICK_SECONDS)
        self.seconds = time.monotonic() - began

    def end(self) -> None:
        """Stop the workers in good order, note what was done to them, and leave nothing running."""
        try:
            self._let_zombies_go_on(at_once=True)
            self._restore_server(at_once=True)
            self.violations += self.workers.ended_by_themselves()
            self._check_connections()
            self.violations += self.workers.end()
            write_disturbances(self._engine, self._done)
        finally:
            self.workers.kill_all()

    def _is_over(self) -> bool:
        return (
            not self._plan
            and self._down_since is None
            and not any(each.is_stopped for each in self.workers.processes)
            and self._finished >= max(self._options.executions, len(self.acknowledged))
        )

    def _planned(self) -> list[str]:
        """The disturbances, the last one first. Half of the crashes come with a kill, while the server is down."""
        options = self._options
        both = min((options.restarts + 1) // 2, options.kills)
        plan = [
            *["kill"] * (options.kills - both),
            *["restart and kill"] * both,
            *["restart"] * (options.restarts - both),
            *["zombie"] * options.zombies,
        ]
        self._random.shuffle(plan)
        return plan

    def _schedule(self) -> None:
        """Schedule what is due: spread over the disturbances, and no more at once than one worker can hold.

        A disturbance that finds nothing in flight gets some more executions, in the end more than were asked for.
        """
        now = time.monotonic()
        if now < self._next_look_at:
            return
        self._next_look_at = now + LOOK_SECONDS
        done = self._steps - len(self._plan)
        due = self._options.executions * done // self._steps
        room = self._options.concurrency
        try:
            self._finished = count_finished(self._engine)
            if self._plan and now >= self._next_at and self._finished == len(self.acknowledged):
                due = max(due, self._finished + room // 2)
            while len(self.acknowledged) < min(due, self._finished + room):
                # Where the answer was lost this is a second call, and the key says that it is about the same one.
                key = f"chaos-{self._options.seed}-{len(self.acknowledged)}"
                context = ExecutionContext(key=key, received="")
                self.acknowledged[key] = self._runner.schedule_flow(FLOW, context, idempotency_key=key)
        except SQLAlchemyError as error:
            self._trouble = error

    # --- disturbances ---

    def _disturb(self, kind: str) -> bool:
        """Do what is planned next; False where this is not the moment for it."""
        if self._down_since is not None:
            return False
        victim = None
        if kind != "restart":
            victim = self._victim()
            if victim is None:
                return False
        self._look_at_connections()
        if kind.startswith("restart"):
            self._crash_server()
        if victim is None:
            return True
        if kind == "restart and kill":
            time.sleep(self._random.uniform(0.0, 0.2))
        began_at = self._now()
        if kind == "zombie":
            victim.stop(began_at, self._options.lease_seconds * self._random.uniform(1.2, 2.5))
        else:
            self.workers.kill(victim)
            self._done.append(Disturbance("kill", victim.pid, began_at, began_at))
        return True

    def _victim(self) -> WorkerProcess | None:
        """A worker that holds executions, where another one is there to take them over."""
        awake = [each for each in self.workers.processes if each.is_awake]
        if len(awake) < 2:
            return None
        try:
            holders = holding_processes(self._engine)
        except SQLAlchemyError:
            return None
        candidates = [each for each in awake if each.pid in holders]
        return self._random.choice(candidates) if candidates else None

    def _let_zombies_go_on(self, *, at_once: bool = False) -> None:
        for each in self.workers.processes:
            if each.stopped_at is not None and (at_once or time.monotonic() >= each.goes_on_at):
                self._done.append(Disturbance("zombie", each.pid, each.stopped_at, self._now()))
                each.go_on()

    def _crash_server(self) -> None:
        assert self._server is not None, "crashes are planned for a server of our own only"
        self._down_since = self._now()
        self._up_at = time.monotonic() + self._random.uniform(0.0, 2.0)
        self._server.crash()

    def _restore_server(self, *, at_once: bool = False) -> None:
        if self._down_since is not None and (at_once or time.monotonic() >= self._up_at):
            assert self._server is not None, "it was crashed"
            self._server.start()
            self._done.append(Disturbance("restart", None, self._down_since, self._now()))
            self._down_since = None

    def _now(self) -> float:
        """The database's clock, also while it is down."""
        return time.time() + self._clock_offset

    # --- connections ---

    def _look_at_connections(self) -> None:
        if self._engine.dialect.name != "postgresql":
            return
        try:
            self.most_connections = max(self.most_connections, most_connections(self._engine))
        except SQLAlchemyError:
            return

    def _check_connections(self) -> None:
        """Now that no task runs, no connection is in a transaction for longer than some statements take."""
        self._look_at_connections()
        if self.most_connections > POOL:
            self.violations.append(f"connections: one worker had {self.most_connections}, its pool has {POOL}")
        if self._engine.dialect.name == "postgresql" and (idle := count_idle_in_transaction(self._engine)):
            self.violations.append(f"connections: {idle} were idle in a transaction for more than a second")


class WorkerProcess:
    """A worker process that has been started."""

    def __init__(self, process: subprocess.Popen[bytes], ready: Path, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self._ready = ready
        self._log = log
        self.stopped_at: float | None = None
        """When it was stopped with SIGSTOP, by the database's clock; `None` while it runs."""
        self.goes_on_at = 0.0
        """When it is to go on, on `time.monotonic`."""

    @property
    def is_ready(self) -> bool:
        """Whether it has begun to work."""
        return self._ready.exists()

    @property
    def is_stopped(self) -> bool:
        """Whether it is stopped just now."""
        return self.stopped_at is not None

    @property
    def is_awake(self) -> bool:
        """Whether it works."""
        return self.is_ready and not self.is_stopped and self.process.poll() is None

    def stop(self, at: float, seconds: float) -> None:
        """Stop it for so long."""
        self.stopped_at = at
        self.goes_on_at = time.monotonic() + seconds
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        self.stopped_at = None
        self.process.send_signal(signal.SIGCONT)

    def last_words(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-2000:]


class Workers:
    """The worker processes: as many as there are to be, whatever becomes of them."""

    def __init__(self, options: argparse.Namespace, url: str, folder: Path, randomness: random.Random) -> None:
        self.processes: list[WorkerProcess] = []
        self.started = 0
        self._options = options
        self._url = url
        self._folder = folder
        self._random = randomness

    def fill_up(self) -> None:
        """Start as many as are missing."""
        while len(self.processes) < self._options.workers:
            self.processes.append(self._start())

    def kill(self, worker: WorkerProcess) -> None:
        """Kill one, as a power cut would."""
        worker.process.kill()
        worker.process.communicate()
        self.processes.remove(worker)

    def ended_by_themselves(self) -> list[str]:
        """Those that nobody has told to end: a worker never does that."""
        ended = [each for each in self.processes if each.process.poll() is not None]
        self.processes = [each for each in self.processes if each not in ended]
        return [f"worker: process {each.pid} has ended by itself: {each.last_words()}" for each in ended]

    def end(self) -> list[str]:
        """Ask all to end with SIGTERM, and wait for it; which have not done so in good order."""
        for each in self.processes:
            each.process.terminate()
        violations = []
        for each in self.processes:
            try:
                status = each.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                violations.append(f"worker: process {each.pid} has not ended {END_SECONDS} s after SIGTERM")
                continue
            if status != 0 and each.is_ready:
                violations.append(f"worker: process {each.pid} ended with {status}: {each.last_words()}")
        return violations

    def kill_all(self) -> None:
        """Leave none running."""
        for each in list(self.processes):
            self.kill(each)

    def refusals(self) -> int:
        """How often they have logged that they were refused: what they did, not what is checked."""
        logs = (log.read_text(errors="replace") for log in self._folder.glob("*.log"))
        return sum(log.count("no longer held here") for log in logs)

    def _start(self) -> WorkerProcess:
        self.started += 1
        ready, log = (self._folder / f"worker-{self.started}.{kind}" for kind in ("ready", "log"))
        options = self._options
        values = {
            "seed": self._random.randrange(1_000_000),
            "concurrency": options.concurrency,
            "lease-seconds": options.lease_seconds,
            "poll-seconds": options.poll_seconds,
            "task-seconds": options.task_seconds,
            # SQLite has one writer at a time: a transaction that takes long is one that all others wait for.
            "transaction-seconds": options.task_seconds / (100 if self._url.startswith("sqlite") else 1),
        }
        command = [sys.executable, str(WORKER), self._url, str(ready)]
        for name, value in values.items():
            command += [f"--{name}", str(value)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        return WorkerProcess(process, ready, log)


# --- what is looked at meanwhile --------------------------------------------------------------------------------------


def count_finished(engine: Engine) -> int:
    """How many executions have succeeded."""
    return int(scalar(engine, "SELECT count(*) FROM ebbs_flow_executions WHERE status = 'SUCCEEDED'"))


def holding_processes(engine: Engine) -> set[int]:
    """The processes of the workers that hold executions."""
    with engine.connect() as connection:
        owners = connection.execute(text("SELECT lease_owner FROM ebbs_flow_executions WHERE status = 'RUNNING'"))
        return {process_of(owner) for owner in owners.scalars()}


def most_connections(engine: Engine) -> int:
    """How many connections the one worker has that has most of them."""
    by_worker = (
        "SELECT count(*) AS connections FROM pg_stat_activity WHERE application_name LIKE 'chaos worker %'"
        " GROUP BY application_name"
    )
    return int(scalar(engine, f"SELECT coalesce(max(connections), 0) FROM ({by_worker}) AS by_worker"))


def count_idle_in_transaction(engine: Engine) -> int:
    """How many of the workers' connections are idle in a transaction."""
    return int(
        scalar(
            engine,
            "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
            " AND application_name LIKE 'chaos %' AND state_change < clock_timestamp() - INTERVAL '1 second'",
        )
    )


def scalar(engine: Engine, sql: str) -> Any:
    """The one value that a statement gives."""
    with engine.connect() as connection:
        return connection.execute(text(sql)).scalar_one()


if __name__ == "__main__":
    sys.exit(main())
