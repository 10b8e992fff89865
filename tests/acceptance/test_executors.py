"""Bodies in executors: process pools of two kinds, a cluster, threads, and executors that go wrong."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import loky
import psutil
import pytest
from distributed import Client
from sqlalchemy import text

from ebbs_and_flows import (
    ExecutionContext,
    Failure,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    Task,
    TemplateError,
    Worker,
    WorkerStateError,
    register_type,
    task,
)
from tests.acceptance.flows_for_processes import (
    PARCEL,
    Interrupt,
    Label,
    Quit,
    SlipTwice,
    Stamp,
    Unstorable,
    be_quick,
    begin,
    frank,
    fulfil,
    produce,
    refuse_to_start,
    register,
    steady,
    wait_a_second_for_file,
    wait_for_file,
    wait_until_told,
)
from tests.integration.invariants import check_invariants
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flows(sqlite_template: Path, tmp_path: Path) -> Iterator[FlowRunner]:
    """A runner on SQLite, for what does not depend on the kind of database."""
    with FlowService(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'flows.db')}") as service:
        yield FlowRunner(service)


def spawned() -> ProcessPoolExecutor:
    """A pool of processes that start afresh: this one has threads, and is not to be forked."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def pool_of(processes: int, **options: Any) -> ProcessPoolExecutor:
    """A pool of processes that start at once: forked from one without threads, which has imported the tasks already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.acceptance.flows_for_processes"])
    return ProcessPoolExecutor(processes, mp_context=context, **options)


@contextmanager
def cluster() -> Iterator[Executor]:
    """A cluster of two processes on this machine."""
    with Client(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as client:
        yield client.get_executor()


@contextmanager
def loky_pool() -> Iterator[Executor]:
    """A pool of loky's. Its processes would end when they have been idle for a while, with a warning."""
    pool = loky.ProcessPoolExecutor(2, timeout=None)
    yield pool
    pool.shutdown()


KINDS: dict[str, Callable[[], Any]] = {"standard library": spawned, "loky": loky_pool, "dask": cluster}


@pytest.fixture(scope="module", params=KINDS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Each of the three kinds, for all tests of this file that use it."""
    with KINDS[request.param]() as made:
        yield made


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """One pool of processes, for tests that do not break it."""
    with pool_of(2) as made:
        yield made


def run(runner: FlowRunner, executor: Any, *templates: FlowTemplate, **options: Any) -> None:
    """Register templates and run all that is due in a worker's executor."""
    for template in templates:
        runner.register_flow_template(template)
    Worker(runner, concurrency=4, executor=executor, poll_seconds=0.1, **options).run(until_idle=True)


def failures(service: FlowService, execution_id: int) -> list[Failure | None]:
    """How the attempts of an execution ended, `None` for a success."""
    return [each.failure for each in service.get_task_executions(execution_id)]


def is_alive(process: int) -> bool:
    """Whether a process runs, and does not only wait for somebody to ask how it ended."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- what goes well ---------------------------------------------------------------------------------------------------


def test_a_flow_runs_in_an_executor_with_its_context_intact(service: FlowService, executor: Executor) -> None:
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TABLE bookings (weighed VARCHAR(20))"))
    runner = FlowRunner(service)
    runner.register_flow_template(fulfil())
    ids = [runner.schedule_flow("fulfil", ExecutionContext(parcel=PARCEL)) for _ in range(3)]
    run(runner, executor)
    label = Label(f"to {PARCEL.sender.street}", frozenset({b"\x00\xff", b"fragile"}))
    for execution_id in ids:
        execution = service.get_flow_execution(execution_id)
        assert execution.status is FlowStatus.SUCCEEDED
        found = dict(execution.execution_context)
        assert {found.pop("weighed_in"), found.pop("sealed_in")}.isdisjoint({os.getpid()})
        assert found.pop("booked_in") == os.getpid()
        assert found == {
            "parcel": PARCEL,
            "weighed": PARCEL.weight * 2,
            "label": label,
            "seal": (label, "red", label.codes),
        }
        assert type(found["parcel"].sender) is type(PARCEL.sender)
        assert failures(service, execution_id) == [None] * 5
    with service.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM bookings")).scalar_one() == 3
    assert check_invariants(service.engine) == []


def test_what_fails_in_an_executor_is_retried_and_kept_with_its_traceback(
    flows: FlowRunner, executor: Executor, tmp_path: Path
) -> None:
    flows.register_flow_template(FlowTemplate("slip", [SlipTwice()]))
    execution_id = flows.schedule_flow("slip", {"file": tmp_path / "calls"})
    run(flows, executor)
    *failed, last = flows.service.get_task_executions(execution_id)
    assert [each.error_type for each in failed] == ["SlipperyError", "SlipperyError"]
    for number, each in enumerate(failed, 1):
        assert each.output is not None
        assert each.output.startswith("Traceback (most recent call last):\n")
        assert "in run\n    raise SlipperyError(calls, lock=threading.Lock())" in each.output
        assert each.output.rstrip().endswith(f"SlipperyError: slipped at attempt {number}")
    assert last.failure is None
    assert flows.service.get_flow_execution(execution_id).execution_context["calls"] == 3


def test_whatever_a_task_raises_in_an_executor_ends_the_attempt_only(
    flows: FlowRunner, executor: Executor, tmp_path: Path
) -> None:
    bodies = {"SystemExit": Quit(), "KeyboardInterrupt": Interrupt(), "UnserializableValueError": Unstorable()}
    for name, body in bodies.items():
        flows.register_flow_template(FlowTemplate(name, [body]))
    ids = {name: flows.schedule_flow(name, {"file": tmp_path / name}) for name in bodies}
    run(flows, executor)
    for name, execution_id in ids.items():
        assert [each.error_type for each in flows.service.get_task_executions(execution_id)] == [name]
        assert flows.service.get_flow_execution(execution_id).status is FlowStatus.FAILED


def test_a_large_result_comes_back(flows: FlowRunner, pool: Executor) -> None:
    flows.register_flow_template(FlowTemplate("produce", [produce]))
    execution_id = flows.schedule_flow("produce", {"megabytes": 30})
    run(flows, pool)
    assert flows.service.get_flow_execution(execution_id).execution_context["much"] == "x" * (30 << 20)


def test_a_type_has_the_name_in_other_processes_that_it_was_registered_under_here(
    flows: FlowRunner, pool: Executor
) -> None:
    register_type(Stamp, name="post.Stamp")
    flows.register_flow_template(FlowTemplate("frank", [frank]))
    execution_id = flows.schedule_flow("frank", {"stamp": Stamp(60)})
    run(flows, pool)
    assert flows.service.get_flow_execution(execution_id).execution_context["franked"] == [Stamp(60), Stamp(61)]
    with flows.service.engine.connect() as connection:
        stored = connection.execute(text("SELECT entries FROM ebbs_task_executions")).scalar_one()
    assert stored.count("post.Stamp") == 2


def test_a_limit_counts_from_when_the_body_begins(flows: FlowRunner) -> None:
    flows.register_flow_template(FlowTemplate("quick", [be_quick]))
    ids = [flows.schedule_flow("quick") for _ in range(2)]
    with spawned() as fresh:
        run(flows, fresh)
    assert [failures(flows.service, each) for each in ids] == [[None], [None]]


# --- what cannot travel -----------------------------------------------------------------------------------------------


class Locked(Task):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def run(self, context: ExecutionContext) -> ExecutionContext:
        return context.copy(done=True)


def local_task() -> Task:
    @task(outputs="done")
    def local() -> bool:
        return True

    return local


CANNOT_TRAVEL: dict[str, Callable[[], Task]] = {
    "local": local_task,
    "nameless": lambda: task(name="nameless", outputs="done")(lambda: True),
    "Locked": Locked,
}


@pytest.mark.parametrize("name", CANNOT_TRAVEL)
def test_a_task_that_cannot_travel_is_refused_by_the_worker(flows: FlowRunner, pool: Executor, name: str) -> None:
    flows.register_flow_template(FlowTemplate("stays", [begin, CANNOT_TRAVEL[name]()]))
    with pytest.raises(TemplateError, match=f"task '{name}' of template 'stays' cannot run in another process"):
        Worker(flows, executor=pool)


@pytest.mark.parametrize("name", CANNOT_TRAVEL)
def test_a_task_need_not_travel_to_a_thread(flows: FlowRunner, name: str) -> None:
    flows.register_flow_template(FlowTemplate("stays", [CANNOT_TRAVEL[name]()]))
    execution_id = flows.schedule_flow("stays")
    with ThreadPoolExecutor(1) as threads:
        run(flows, threads)
    assert flows.service.get_flow_execution(execution_id).execution_context["done"] is True


def test_a_task_that_is_registered_later_and_cannot_travel_fails_with_the_reason(
    flows: FlowRunner, pool: Executor
) -> None:
    worker = Worker(flows, executor=pool, poll_seconds=0.1)
    flows.register_flow_template(FlowTemplate("stays", [local_task()]))
    flows.register_flow_template(steady())
    stays, goes = flows.schedule_flow("stays"), flows.schedule_flow("steady", {"seconds": 0.0})
    worker.run(until_idle=True)
    [attempt] = flows.service.get_task_executions(stays)
    assert attempt.error_type == "TemplateError"
    assert "cannot run in another process" in str(attempt.output)
    assert flows.service.get_flow_execution(goes).status is FlowStatus.SUCCEEDED


def test_a_task_that_the_other_process_cannot_import_fails_by_itself(
    flows: FlowRunner, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    here_only = types.ModuleType("here_only")
    exec(
        "from ebbs_and_flows import task\n@task(outputs='done')\ndef stay() -> bool:\n    return True",
        here_only.__dict__,
    )
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    flows.register_flow_template(FlowTemplate("stays", [here_only.stay]))
    flows.register_flow_template(steady())
    goes = flows.schedule_flow("steady", {"seconds": 0.2})
    stays = flows.schedule_flow("stays")
    run(flows, executor)
    [attempt] = flows.service.get_task_executions(stays)
    assert attempt.error_type == "ModuleNotFoundError"
    assert str(attempt.output).startswith("The task cannot be imported in the executor's process.")
    assert failures(flows.service, goes) == [None, None, None]


# --- stop -------------------------------------------------------------------------------------------------------------


def test_what_runs_in_a_pool_past_the_grace_period_is_handed_back_and_killed(flows: FlowRunner, tmp_path: Path) -> None:
    note = tmp_path / "note"
    flows.register_flow_template(FlowTemplate("wait", [wait_for_file]))
    execution_id = flows.schedule_flow("wait", {"file": note})
    with pool_of(1) as pool:
        worker = Worker(flows, executor=pool, poll_seconds=0.1)
        with worker.running():
            wait_until(lambda: note.exists() and note.read_text(), "the body")
            process = int(note.read_text())
            assert is_alive(process)
            worker.stop(0.1)
        wait_until(lambda: not is_alive(process), "the end of its process")
    assert flows.service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    assert failures(flows.service, execution_id) == [Failure.STOPPED]


def test_a_task_in_a_thread_of_an_executor_hears_that_its_worker_stops(flows: FlowRunner, tmp_path: Path) -> None:
    note = tmp_path / "note"
    flows.register_flow_template(FlowTemplate("wait", [wait_until_told]))
    execution_id = flows.schedule_flow("wait", {"file": note})
    with ThreadPoolExecutor(1) as threads, Worker(flows, executor=threads).running():
        wait_until(note.exists, "the body")
    assert failures(flows.service, execution_id) == [Failure.STOPPED]


def test_an_execution_that_is_cancelled_leaves_its_process_at_its_limit(flows: FlowRunner, tmp_path: Path) -> None:
    note = tmp_path / "note"
    flows.register_flow_template(FlowTemplate("wait", [wait_a_second_for_file]))
    flows.register_flow_template(steady())
    cancelled = flows.schedule_flow("wait", {"file": note})
    with pool_of(1) as pool, Worker(flows, executor=pool, poll_seconds=0.1).running():
        wait_until(lambda: note.exists() and note.read_text(), "the body")
        flows.cancel_flow_execution(cancelled)
        after = flows.schedule_flow("steady", {"seconds": 0.0})
        wait_until(lambda: flows.service.get_flow_execution(after).status is FlowStatus.SUCCEEDED, "the next one")
        assert not is_alive(int(note.read_text()))
    assert flows.service.get_flow_execution(cancelled).status is FlowStatus.CANCELLED


@contextmanager
def worker_process(service: FlowService, start_method: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with a pool in a process group of its own; what is left of the group is killed at the end."""
    url = service.engine.url.render_as_string(hide_password=False)
    code = f"from tests.acceptance.flows_for_processes import work; work({url!r}, {start_method!r}, **{options!r})"
    # A place of its own for temporary files, since one that is killed leaves some; short enough a path for sockets.
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "TMPDIR": scratch}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def begun_bodies(runner: FlowRunner, notes: list[Path]) -> list[int]:
    """Schedule bodies that wait for their files to go; the processes in which they run, once they do."""
    for note in notes:
        runner.schedule_flow("wait-for-file", {"file": note})
    for note in notes:
        wait_until(lambda note=note: note.exists() and note.read_text(), "the body")
    return [int(note.read_text()) for note in notes]


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_ctrl_c_lets_the_bodies_in_a_pool_end_in_good_order(
    flows: FlowRunner, tmp_path: Path, start_method: str
) -> None:
    runner, notes = register(flows.service), [tmp_path / "one", tmp_path / "two"]
    with worker_process(flows.service, start_method) as process:
        bodies = begun_bodies(runner, notes)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the worker and to all of its pool
        after = runner.schedule_flow("steady", {"seconds": 0.0})
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert all(map(is_alive, bodies))
        for note in notes:
            note.unlink()
        assert process.wait(20) == 0
    assert flows.service.get_flow_execution(after).status is FlowStatus.SCHEDULED
    assert [failures(flows.service, each) for each in (1, 2)] == [[None], [None]]


@pytest.mark.parametrize("start_method", ["spawn", "forkserver", "fork"])
def test_the_processes_of_a_pool_end_with_the_worker_that_is_killed(
    flows: FlowRunner, tmp_path: Path, start_method: str
) -> None:
    runner = register(flows.service)
    with worker_process(flows.service, start_method) as process:
        begun_bodies(runner, [tmp_path / "one"])
        # Beside a body that a thread of its process could end, one that holds the interpreter's lock.
        locked = runner.schedule_flow("poison", {"deed": "sleep_with_the_interpreter_locked"})
        wait_until(lambda: flows.service.get_flow_execution(locked).status is FlowStatus.RUNNING, "the claim")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        wait_until(lambda: not any(is_alive(each.pid) for each in family), "the end of the pool", 5.0)


# --- executors that go wrong ------------------------------------------------------------------------------------------


def test_an_executor_that_was_shut_down_stops_the_worker_and_is_nobodys_fault(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    execution_id = flows.schedule_flow("steady", {"seconds": 0.0})
    pool = pool_of(1)
    pool.shutdown()
    with pytest.raises(WorkerStateError, match="cannot schedule new futures after shutdown"):
        run(flows, pool)
    assert flows.service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    assert failures(flows.service, execution_id) == [Failure.STOPPED]


def test_a_pool_whose_processes_cannot_start_stops_the_worker_and_is_nobodys_fault(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    execution_id = flows.schedule_flow("steady", {"seconds": 0.0})
    with pool_of(1, initializer=refuse_to_start) as pool, pytest.raises(WorkerStateError, match="3 times in a row"):
        run(flows, pool)
    assert flows.service.get_flow_execution(execution_id).status is FlowStatus.RESCHEDULED
    assert failures(flows.service, execution_id) == [Failure.STOPPED] * 3


def test_a_function_that_cannot_make_an_executor_stops_the_worker(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    execution_id = flows.schedule_flow("steady", {"seconds": 0.0})
    with pytest.raises(WorkerStateError, match=r"the executor could not be made: .*\[\] is no Executor"):
        run(flows, list)
    assert failures(flows.service, execution_id) == [Failure.STOPPED]


class Fickle(Executor):
    """An executor of a kind that nobody knows: threads, and futures that end as a test has prepared.

    Args:
        ends: for each call in turn, what becomes of it: a call of the future's method, or `None` to run it.
    """

    def __init__(self, *ends: Callable[[Future[Any]], object] | None) -> None:
        self.ends = list(ends)
        self.threads = ThreadPoolExecutor(2)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        end = self.ends.pop(0) if self.ends else None
        if end is None:
            return self.threads.submit(function, *arguments, **options)
        future: Future[Any] = Future()
        end(future)
        return future


def withdrawn(future: Future[Any]) -> None:
    future.cancel()


def broken(future: Future[Any]) -> None:
    future.set_exception(BrokenExecutor("one of us has died"))


def test_a_call_that_the_executor_withdraws_is_made_again(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    execution_id = flows.schedule_flow("steady", {"seconds": 0.0})
    run(flows, Fickle(withdrawn, None, withdrawn, withdrawn))
    assert flows.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    again = Failure.STOPPED
    assert failures(flows.service, execution_id) == [again, None, again, again, None, None]


def test_an_executor_that_withdraws_everything_stops_the_worker(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    execution_id = flows.schedule_flow("steady", {"seconds": 0.0})
    with pytest.raises(WorkerStateError, match="3 times in a row it has not run what it was given"):
        run(flows, Fickle(*[withdrawn] * 10))
    assert failures(flows.service, execution_id) == [Failure.STOPPED] * 3


def test_where_it_is_not_known_who_broke_an_executor_the_suspects_run_alone(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    ids = [flows.schedule_flow("steady", {"seconds": 0.0}) for _ in range(2)]
    first, pending = Fickle(), []
    first.ends = [pending.append, lambda future: [pending.append(future), *map(broken, pending)]]
    made = [first, Fickle(broken), Fickle()]
    run(flows, lambda: made.pop(0))
    assert made == []
    assert all(flows.service.get_flow_execution(each).status is FlowStatus.SUCCEEDED for each in ids)
    # Both are suspected; one of them breaks it again while it is alone.
    assert sorted(map(str, (failures(flows.service, each)[:2] for each in ids))) == sorted(
        map(str, ([Failure.STOPPED, Failure.LOST], [Failure.STOPPED, None]))
    )


def test_an_executor_of_an_unknown_kind_that_breaks_stops_the_worker(flows: FlowRunner) -> None:
    flows.register_flow_template(steady())
    flows.schedule_flow("steady", {"seconds": 0.0})
    with pytest.raises(WorkerStateError, match="pass a function that makes one"):
        run(flows, Fickle(broken))


def test_a_cluster_is_left_at_a_limit_and_its_place_is_free(flows: FlowRunner, tmp_path: Path) -> None:
    note = tmp_path / "note"
    flows.register_flow_template(FlowTemplate("wait", [wait_a_second_for_file]))
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0") as client:
        execution_id = flows.schedule_flow("wait", {"file": note})
        run(flows, client.get_executor())
        note.unlink()  # or it would go on in its thread
    assert failures(flows.service, execution_id) == [Failure.TIMEOUT]
