"""Whoever wants the same thing in the same moment: there is one outcome, and both sides agree on it."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from ebbs_and_flows import (
    Failure,
    FlowExecution,
    FlowFilter,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    TaskExecution,
    TransitionError,
    Worker,
    task,
)
from ebbs_and_flows.checkpoints import Claim
from ebbs_and_flows.executions import RUNNABLE_STATUSES
from ebbs_and_flows.outcomes import Failed, Success
from ebbs_and_flows.verdicts import checkpoint_of, judge
from tests.integration.flows import Outside, Step, abc
from tests.waiting import PATIENCE_SECONDS, wait_until

pytestmark = pytest.mark.usefixtures("sound_history")

ROUNDS = 20
"""How often the two meet: which of them comes first is chance."""

LEASE_SECONDS = 600.0


@pytest.fixture
def services(service: FlowService, database_url: str) -> Iterator[list[FlowService]]:
    """Four services on one database, each with connections of its own, as in four processes."""
    with ExitStack() as stack:
        yield [service, *(stack.enter_context(FlowService(database_url)) for _ in range(3))]


def at_once(calls: Sequence[Callable[[], object]]) -> list[Any]:
    """Make all these calls in the same moment, each in a thread: what each returned, or the refusal it got."""
    barrier = threading.Barrier(len(calls))

    def make(call: Callable[[], object]) -> object:
        barrier.wait(PATIENCE_SECONDS)
        try:
            return call()
        except TransitionError as refusal:
            return refusal

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(make, calls))


def refusals(outcomes: Sequence[object]) -> int:
    """How many of them were refused."""
    return sum(isinstance(each, TransitionError) for each in outcomes)


class Claimed:
    """An execution of one task that a worker has just claimed."""

    def __init__(self, service: FlowService, *, tasks: int = 1) -> None:
        outside = Outside()
        self.template = FlowTemplate("t", [Step(outside, f"task {number}") for number in range(tasks)])
        self.templates = {"t": self.template}
        self.execution_id = service.schedule("t")
        [self.claim] = claim(service, self.templates, "first")

    def succeed(self, service: FlowService) -> bool:
        """Write that its task has succeeded; whether that was accepted."""
        context = self.claim.context
        return self._write(service, Success(context.copy(done=True).delta_from(context)))

    def fail(self, service: FlowService) -> bool:
        """Write that its task has failed; whether that was accepted."""
        return self._write(service, Failed(ValueError("no")))

    def _write(self, service: FlowService, outcome: Success | Failed) -> bool:
        assert self.claim.attempt is not None
        verdict = judge(self.template.tasks[0], outcome, self.claim.counts_of(self.claim.attempt.name))
        recorded = service.checkpoint(checkpoint_of(self.claim, self.template, verdict, LEASE_SECONDS))
        return recorded is not None


def claim(service: FlowService, templates: dict[str, FlowTemplate], worker: str, limit: int = 1) -> list[Claim]:
    return service.claim(templates, RUNNABLE_STATUSES, worker, lease_seconds=LEASE_SECONDS, limit=limit)


def let_leases_expire(service: FlowService) -> None:
    with service.engine.begin() as connection:
        connection.execute(
            text("UPDATE ebbs_flow_executions SET lease_expires_at = '2001-01-01' WHERE status = 'RUNNING'")
        )


def runner_on(service: FlowService, *templates: FlowTemplate) -> FlowRunner:
    runner = FlowRunner(service)
    for template in templates:
        runner.register_flow_template(template)
    return runner


def all_of(service: FlowService) -> list[FlowExecution]:
    return service.find_flow_executions(FlowFilter(limit=1000), with_contexts=False)


# --- who may end it -----------------------------------------------------------------------------------------------


def test_either_the_cancel_or_the_completion_is_refused(services: list[FlowService]) -> None:
    for _ in range(ROUNDS):
        held = Claimed(services[0])
        completed, cancelled = at_once(
            [partial(held.succeed, services[1]), partial(services[2].cancel, held.execution_id)]
        )
        status = services[0].get_flow_execution(held.execution_id).status
        assert status is (FlowStatus.SUCCEEDED if completed is True else FlowStatus.CANCELLED)
        assert isinstance(cancelled, TransitionError) == (completed is True)


def test_what_a_transactional_task_wrote_is_there_if_and_only_if_the_cancel_came_too_late(
    services: list[FlowService],
) -> None:
    with services[0].engine.begin() as connection:
        connection.execute(text("CREATE TABLE effects (number INTEGER)"))
    meeting = threading.Barrier(2)

    @task
    def write(number: int, session: Session) -> None:
        session.execute(text("INSERT INTO effects VALUES (:number)"), {"number": number})
        meeting.wait(PATIENCE_SECONDS)
        for _ in range(number):  # a little longer in each round, so that either side comes first now and then
            session.execute(text("SELECT 1"))

    def cancel_in_its_task(execution_id: int) -> FlowExecution:
        meeting.wait(PATIENCE_SECONDS)
        return services[1].cancel(execution_id)

    runner = runner_on(services[0], FlowTemplate("write", [write]))
    succeeded = []
    for number in range(ROUNDS):
        execution_id = runner.schedule_flow("write", {"number": number})
        ran, cancelled = at_once([runner.run_flow, partial(cancel_in_its_task, execution_id)])
        assert isinstance(ran, FlowExecution)
        assert ran.status is (FlowStatus.SUCCEEDED if refusals([cancelled]) else FlowStatus.CANCELLED)
        if ran.status is FlowStatus.SUCCEEDED:
            succeeded.append(number)
    with services[0].engine.connect() as connection:
        assert sorted(connection.scalars(text("SELECT number FROM effects"))) == succeeded


def test_no_task_starts_once_a_cancel_was_acknowledged(services: list[FlowService], outside: Outside) -> None:
    flows, tasks = 40, 4
    at_work: queue.SimpleQueue[int] = queue.SimpleQueue()
    tried = [threading.Event() for _ in range(flows)]

    def body_of(index: int) -> Callable[[int], None]:
        def body(number: int) -> None:
            outside.call(f"{number} {index}")
            if number % tasks == index:  # each is cancelled at one of its tasks, the next one with the next
                at_work.put(number)
                if number % 8 < 4:  # the others race with their cancel
                    tried[number].wait(PATIENCE_SECONDS)

        return body

    template = FlowTemplate("t", [task(name=f"task {index}")(body_of(index)) for index in range(tasks)])
    runner = runner_on(services[0], template)
    ids = [runner.schedule_flow("t", {"number": number}) for number in range(flows)]
    acknowledged: dict[int, list[TaskExecution]] = {}
    with Worker(runner, concurrency=8, poll_seconds=0.05).running():
        for _ in range(flows):
            number = at_work.get(timeout=PATIENCE_SECONDS)
            try:
                services[1].cancel(ids[number])
                acknowledged[number] = services[1].get_task_executions(ids[number])
            except TransitionError:  # it had succeeded already
                assert number % 8 >= 4
            finally:
                tried[number].set()
        wait_until(lambda: all(each.status.is_final for each in all_of(services[1])), "the end of all")
    assert len(acknowledged) >= flows // 2
    for number, attempts in acknowledged.items():
        assert services[1].get_task_executions(ids[number]) == attempts
        started = [each for each in outside.calls if each.split()[0] == str(number)]
        assert len(started) <= len(attempts), f"{started} for {attempts}"


def test_of_two_who_reschedule_one_is_told_that_it_is_done_already(services: list[FlowService]) -> None:
    for _ in range(ROUNDS):
        held = Claimed(services[0])
        held.fail(services[0])
        outcomes = at_once([partial(each.reschedule, held.execution_id) for each in services[:2]])
        assert refusals(outcomes) == 1
        execution = services[0].cancel(held.execution_id)
        statuses = [each.to_status for each in services[0].get_flow_status_history(execution.execution_id)]
        assert statuses.count(FlowStatus.RESCHEDULED) == 1


# --- who may begin it ---------------------------------------------------------------------------------------------


def test_an_idempotency_key_that_twenty_callers_use_at_once_makes_one_execution(services: list[FlowService]) -> None:
    for number in range(3):
        calls = [
            partial(services[caller % 4].schedule, "t", {"caller": caller}, idempotency_key=f"order-{number}")
            for caller in range(20)
        ]
        ids = at_once(calls)
        assert len(set(ids)) == 1
    assert len(all_of(services[0])) == 3


def test_no_execution_of_a_backlog_is_claimed_twice(services: list[FlowService]) -> None:
    templates = {"t": FlowTemplate("t", [Step(Outside(), "a")])}
    backlog = {services[0].schedule("t") for _ in range(120)}

    def claim_all(service: FlowService, worker: str) -> list[int]:
        found: list[int] = []
        while claims := claim(service, templates, worker, limit=7):
            found += [each.execution.execution_id for each in claims]
        return found

    found = at_once([partial(claim_all, each, f"worker {number}") for number, each in enumerate(services)])
    claimed = [execution_id for each in found for execution_id in each]
    assert sorted(claimed) == sorted(backlog)


def test_several_workers_run_each_execution_of_a_backlog_once(services: list[FlowService], outside: Outside) -> None:
    runners = [runner_on(each, abc(outside)) for each in services]
    for _ in range(60):
        runners[0].schedule_flow("abc")
    workers = [Worker(each, concurrency=8, poll_seconds=0.05) for each in runners]
    at_once([partial(each.run, until_idle=True) for each in workers])
    executions = all_of(services[0])
    assert {each.status for each in executions} == {FlowStatus.SUCCEEDED}
    assert {each.epoch for each in executions} == {1}
    assert Counter(outside.calls) == {"a": 60, "b": 60, "c": 60}
    assert sum(each.health().claimed for each in workers) == 60


def test_a_lease_that_has_expired_is_taken_over_by_one(services: list[FlowService]) -> None:
    def take_over(service: FlowService, held: Claimed) -> tuple[int, int]:
        recovered = service.recover_expired(held.templates)
        return len(recovered), len(claim(service, held.templates, f"worker {id(service)}"))

    for _ in range(ROUNDS):
        held = Claimed(services[0])
        let_leases_expire(services[0])
        outcomes = at_once([partial(take_over, each, held) for each in services])
        assert sum(recovered for recovered, _ in outcomes) == 1
        assert sum(claimed for _, claimed in outcomes) == 1
        assert services[0].cancel(held.execution_id).epoch == 2


def test_of_several_workers_one_runs_what_a_lost_one_has_left(services: list[FlowService], outside: Outside) -> None:
    runners = [runner_on(each, abc(outside)) for each in services]
    ids = [runners[0].schedule_flow("abc") for _ in range(20)]
    assert len(claim(services[0], {"abc": abc(outside)}, "lost", limit=20)) == 20
    let_leases_expire(services[0])
    workers = [Worker(each, concurrency=8, poll_seconds=0.02) for each in runners]
    with ExitStack() as stack:
        for each in workers:
            stack.enter_context(each.running())
        wait_until(lambda: {each.status for each in all_of(services[0])} == {FlowStatus.SUCCEEDED}, "success")
    for execution_id in ids:
        attempts = services[0].get_task_executions(execution_id)
        assert [each.failure for each in attempts] == [Failure.LOST, None, None, None]
        assert len({each.worker for each in attempts[1:]}) == 1
        assert services[0].get_flow_execution(execution_id).epoch == 2
    assert Counter(outside.calls) == {"a": 20, "b": 20, "c": 20}


def test_either_the_late_worker_writes_or_the_one_that_takes_over_from_it(services: list[FlowService]) -> None:
    for _ in range(ROUNDS):
        held = Claimed(services[0], tasks=2)
        let_leases_expire(services[0])
        written, recovered = at_once(
            [partial(held.succeed, services[1]), partial(services[2].recover_expired, held.templates)]
        )
        assert bool(written) != bool(recovered)
        execution = services[0].cancel(held.execution_id)
        assert execution.current_task_index == (1 if written else 0)


# --- how many may run ---------------------------------------------------------------------------------------------


def test_those_who_claim_at_once_keep_within_one_bound(services: list[FlowService]) -> None:
    templates = {"t": FlowTemplate("t", [Step(Outside(), "a")], max_in_flight=3)}
    for _ in range(ROUNDS):
        ids = [services[0].schedule("t") for _ in range(6)]
        claimed = at_once(
            [partial(claim, each, templates, f"worker {number}", limit=6) for number, each in enumerate(services)]
        )
        assert sum(len(each) for each in claimed) == 3
        for execution_id in ids:
            services[0].cancel(execution_id)


class Crowd:
    """Counts who is in it at once. Everybody stays until it is as full as it may be, or for a moment."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.most = 0
        self._now = 0
        self._condition = threading.Condition()

    def join(self) -> None:
        """Go in, and out again."""
        with self._condition:
            self._now += 1
            self.most = max(self.most, self._now)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._now >= self.bound, timeout=0.05)
            self._now -= 1


def test_bounds_are_kept_over_all_workers_and_all_that_waits_runs(services: list[FlowService]) -> None:
    of_template, of_queue = Crowd(2), Crowd(3)
    each_count = 15

    def template(name: str, crowd: Crowd, **options: Any) -> FlowTemplate:
        @task
        def first() -> None:
            crowd.join()

        @task
        async def second() -> None:
            return None

        return FlowTemplate(name, [first, second], **options)

    runners = [
        runner_on(each, template("narrow", of_template, max_in_flight=2), template("wide", of_queue))
        for each in services
    ]
    for _ in range(each_count):
        runners[0].schedule_flow("narrow")
        runners[0].schedule_flow("wide", queue="slow")
    workers = [
        Worker(each, concurrency=8, queues=["default", "slow"], max_in_flight={"slow": 3}, poll_seconds=0.02)
        for each in runners
    ]
    at_once([partial(each.run, until_idle=True) for each in workers])
    assert Counter(each.status for each in all_of(services[0])) == {FlowStatus.SUCCEEDED: 2 * each_count}
    assert 1 < of_template.most <= of_template.bound
    assert 1 < of_queue.most <= of_queue.bound
