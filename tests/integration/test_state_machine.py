"""Whatever is done to executions, in whatever order: the store does what a plain model of the rules says.

Hypothesis makes up sequences of calls, also ones that no worker would make: checkpoints of claims that were lost long
ago, leases that expire at any moment, statuses set by hand. After each call the whole store is held against the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from ebbs_and_flows import (
    FlowExecution,
    FlowService,
    FlowStatus,
    TemplateError,
    TransitionError,
)
from ebbs_and_flows.checkpoints import Claim, Recorded
from ebbs_and_flows.executions import ALLOWED_TRANSITIONS, RUNNABLE_STATUSES
from ebbs_and_flows.verdicts import claim_after
from tests.integration.invariants import check_invariants
from tests.integration.rules import (
    EXPECTED,
    HOW,
    LEASE_SECONDS,
    NAMES,
    TEMPLATES,
    End,
    Model,
    ModelAttempt,
)

T = TypeVar("T")

EXAMPLES = {"sqlite": 50, "postgresql": 10}
"""How many sequences are tried: about ten seconds each."""

CALLS = 40
MOST_EXECUTIONS = 4
LONG_AGO = "2001-01-01 00:00:00.000000"
WORKERS = ("alice", "bob")
QUEUES = ("fast", "slow")


class Machine(RuleBasedStateMachine):
    """Does the same to the store and to the model."""

    def __init__(self, service: FlowService) -> None:
        super().__init__()
        self.service = service
        self.models: dict[int, Model] = {}
        self.keys: dict[str, int] = {}
        self.claims: list[Claim] = []
        """All that were ever given out: any of them may come back late."""
        self.successes = 0
        self.renewals = 0
        for table in ("ebbs_flow_transitions", "ebbs_task_executions", "ebbs_flow_executions"):
            self.execute(f"DELETE FROM {table}")

    def teardown(self) -> None:
        assert check_invariants(self.service.engine, EXPECTED) == []

    # --- what there is --------------------------------------------------------------------------------------------

    @initialize(worker=st.sampled_from(WORKERS), done=st.lists(st.integers(0, 2), min_size=2, max_size=2))
    def begin(self, worker: str, done: list[int]) -> None:
        """Begin in the middle: few sequences of calls at random would get as far as the last task."""
        for queue, successes in zip(QUEUES, done, strict=True):
            self.schedule(queue, priority=0, key=None, is_due=True)
            self.claim(worker, 1, RUNNABLE_STATUSES, None, None)
            for _ in range(successes):
                self.write([self.end(self.claims[-1], "succeed")], passes_over=False)

    @precondition(lambda self: len(self.models) < MOST_EXECUTIONS)
    @rule(
        queue=st.sampled_from(QUEUES),
        priority=st.integers(-1, 1),
        key=st.sampled_from([None, "one"]),
        is_due=st.sampled_from([True, True, False]),
    )
    def schedule(self, queue: str, priority: int, key: str | None, is_due: bool) -> None:
        context = {"number": len(self.models)}
        delay = None if is_due else 3600
        execution_id = self.service.schedule(
            "abc", context, queue=queue, priority=priority, idempotency_key=key, delay=delay
        )
        if key is not None and self.keys.setdefault(key, execution_id) in self.models:
            assert execution_id == self.keys[key]
            return
        history = [(1, None, "CREATED"), (2, "CREATED", "SCHEDULED")]
        model = Model(execution_id, FlowStatus.SCHEDULED, queue, priority, [context], history, step=2, is_due=is_due)
        self.models[execution_id] = model

    @precondition(lambda self: len(self.models) < MOST_EXECUTIONS and not self.of_status(FlowStatus.CREATED))
    @rule()
    def create(self) -> None:
        execution_id = self.service.create_flow_execution("abc").execution_id
        model = Model(execution_id, FlowStatus.CREATED, "default", 0, [{}], [(1, None, "CREATED")], step=1)
        self.models[execution_id] = model

    # --- claims ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.due())
    @rule(worker=st.sampled_from(WORKERS))
    def claim_all(self, worker: str) -> None:
        self.claim(worker, len(self.models), RUNNABLE_STATUSES, None, None)

    @precondition(lambda self: self.due())
    @rule(
        worker=st.sampled_from(WORKERS),
        limit=st.integers(1, 3),
        statuses=st.sampled_from([RUNNABLE_STATUSES, {FlowStatus.SCHEDULED}, {FlowStatus.RESCHEDULED}]),
        queues=st.sampled_from([QUEUES, ("fast",), ("slow", "default")]),
        most_slow=st.sampled_from([None, 1, 2]),
    )
    def claim(
        self,
        worker: str,
        limit: int,
        statuses: Collection[FlowStatus],
        queues: Collection[str] | None,
        most_slow: int | None,
    ) -> None:
        expected = self.next_due(statuses, queues, limit, most_slow)
        claims = self.service.claim(
            TEMPLATES,
            statuses,
            worker,
            lease_seconds=LEASE_SECONDS,
            limit=limit,
            queues=queues,
            max_in_flight={} if most_slow is None else {"slow": most_slow},
        )
        assert [each.execution.execution_id for each in claims] == expected
        for claim in claims:
            model = self.models[claim.execution.execution_id]
            model.run(worker)
            model.start()
            self.take(claim)

    def next_due(
        self, statuses: Collection[FlowStatus], queues: Collection[str] | None, limit: int, most_slow: int | None
    ) -> list[int]:
        """What a claim has to give, in this order."""
        due = [self.service.get_flow_execution(each.execution_id) for each in self.due() if each.status in statuses]
        room = limit
        if most_slow is not None:
            room = most_slow - sum(each.queue == "slow" for each in self.of_status(FlowStatus.RUNNING))
        ids: list[int] = []
        for each in sorted(due, key=lambda each: (-each.priority, each.run_at, each.execution_id)):
            if queues is not None and each.queue not in queues:
                continue
            if each.queue == "slow":
                room -= 1
            if len(ids) < limit and (each.queue != "slow" or room >= 0):
                ids.append(each.execution_id)
        return ids

    def take(self, claim: Claim) -> None:
        """Look at a claim that a worker was given, and keep it."""
        model = self.models[claim.execution.execution_id]
        assert claim.attempt is not None
        assert model.open is not None
        assert (claim.attempt.flow_execution_step, claim.attempt.attempt) == (model.open.step, model.open.number)
        assert dict(claim.context) == model.context
        self.claims.append(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def renew(self, data: st.DataObject, worker: str) -> None:
        claims = [choose(data, self.claims) for _ in range(2)]
        held = {each.execution.execution_id: each.execution.epoch for each in claims}
        ends_before = self.lease_ends()
        self.renewals += 1  # no two ends are the same, however short the time between two calls
        lost = self.service.renew(worker, held, lease_seconds=2 * LEASE_SECONDS + self.renewals)
        running = {each.execution_id: each.epoch for each in self.of_status(FlowStatus.RUNNING)}
        assert lost == {each for each in held if running.get(each) != held[each]}
        assert lost == self.service.no_longer_held(held)
        moved = {each for each, end in self.lease_ends().items() if end != ends_before[each]}
        renewed = {each for each, model in self.models.items() if each in held and model.owner == worker}
        assert moved == renewed
        for each in renewed:
            self.models[each].is_expired = False

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        first = choose(data, range(len(self.live())))
        self.write([self.end(each, "succeed") for each in self.live()[first:]], passes_over=True)

    @precondition(lambda self: self.live())
    @rule(data=st.data(), how=st.sampled_from(HOW), goes_on=st.booleans(), passes_over=st.booleans())
    def end_somehow(self, data: st.DataObject, how: str, goes_on: bool, passes_over: bool) -> None:
        ends = [self.end(choose(data, self.live()), how, goes_on=goes_on)]
        others = [each for each in self.claims if execution_of(each) != execution_of(ends[0].claim)]
        if others:  # perhaps one that comes too late, which must not hinder the other one
            ends.append(self.end(choose(data, others), choose(data, HOW)))
        self.write(ends, passes_over)

    @precondition(lambda self: len(self.live()) < len(self.claims))
    @rule(data=st.data(), how=st.sampled_from(HOW), passes_over=st.booleans())
    def come_too_late(self, data: st.DataObject, how: str, passes_over: bool) -> None:
        stale = [each for each in self.claims if not self.is_live(each)]
        self.write([self.end(choose(data, stale), how)], passes_over)

    def end(self, claim: Claim, how: str, *, goes_on: bool = True) -> End:
        """An end of a claim's attempt; a success drops the first entry of three, to have that as well."""
        assert claim.attempt is not None
        self.successes += 1
        received = dict(claim.context)
        kept = dict(list(received.items())[len(received) // 3 :])
        return End(claim, how, {**kept, claim.attempt.name: f"success {self.successes}"}, goes_on)

    def write(self, ends: list[End], passes_over: bool) -> None:
        """Write their checkpoints together; those of claims that are not held any more have to be refused."""
        checkpoints = [each.checkpoint() for each in ends]
        recorded: list[Recorded | None]
        if passes_over:
            by_id, _ = self.service.turn(checkpoints)
            recorded = [by_id[each.execution_id] for each in checkpoints]  # nobody else has locked any
        else:
            recorded = [self.service.checkpoint(each) for each in checkpoints]
        for end, checkpoint, answer in zip(ends, checkpoints, recorded, strict=True):
            assert (answer is not None) == self.is_live(end.claim)
            if answer is None:
                continue
            end.apply(self.models[checkpoint.execution_id])
            read_back = self.service.outcome_of(checkpoint)
            assert read_back is not None, "an answer that was lost can be read back"
            assert (read_back.attempt, read_back.then) == (answer.attempt, answer.then)
            if answer.attempt is not None:
                self.take(claim_after(end.claim, end.verdict(), answer))

    # --- time -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.of_status(FlowStatus.RUNNING))
    @rule(data=st.data())
    def let_lease_expire(self, data: st.DataObject) -> None:
        model = choose(data, self.of_status(FlowStatus.RUNNING))
        self.set_time(model, "lease_expires_at")
        model.is_expired = True

    @precondition(lambda self: any(not each.is_due for each in self.models.values()))
    @rule(data=st.data())
    def come_due(self, data: st.DataObject) -> None:
        model = choose(data, [each for each in self.models.values() if not each.is_due])
        self.set_time(model, "run_at")
        model.is_due = True

    @rule()
    def recover_expired(self) -> None:
        expired = [each for each in self.models.values() if each.is_expired]
        for each in expired:
            each.lose()
        assert self.service.recover_expired(TEMPLATES) == {each.execution_id: each.status for each in expired}

    # --- by hand --------------------------------------------------------------------------------------------------

    @rule(data=st.data(), from_task=st.sampled_from([None, *NAMES, "d"]))
    def reschedule(self, data: st.DataObject, from_task: str | None) -> None:
        model = choose(data, self.of_status(FlowStatus.FAILED) or list(self.models.values()))
        if model.status is not FlowStatus.FAILED:
            with pytest.raises(TransitionError):
                self.service.reschedule(model.execution_id, from_task)
        elif from_task is not None and from_task not in model.reached():
            with pytest.raises(TemplateError):
                self.service.reschedule(model.execution_id, from_task)
        else:
            self.service.reschedule(model.execution_id, from_task)
            model.index = model.index if from_task is None else NAMES.index(from_task)
            model.move(FlowStatus.RESCHEDULED)

    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def recover(self, data: st.DataObject, worker: str) -> None:
        model = choose(data, list(self.models.values()))
        if model.status is not FlowStatus.RUNNING:
            with pytest.raises(TransitionError):
                self.service.recover(model.execution_id, TEMPLATES, worker, lease_seconds=LEASE_SECONDS)
            return
        claim = self.service.recover(model.execution_id, TEMPLATES, worker, lease_seconds=LEASE_SECONDS)
        model.lose()
        if model in self.of_status(FlowStatus.FAILED):
            assert claim.attempt is None
            return
        model.run(worker)
        model.start()
        self.take(claim)

    @rule(data=st.data(), worker=st.sampled_from([None, *WORKERS]), is_mended=st.booleans())
    def update_flow_status(self, data: st.DataObject, worker: str | None, is_mended: bool) -> None:
        model = choose(data, list(self.models.values()))
        allowed = ALLOWED_TRANSITIONS[model.status]
        status = choose(data, [each for each in FlowStatus if each in allowed] or list(FlowStatus))
        context = {**model.context, "mended": model.step} if is_mended else None
        if status not in allowed:
            with pytest.raises(TransitionError):
                self.service.update_flow_status(model.execution_id, status, context)
            return
        if status is FlowStatus.CANCELLED and not is_mended:
            self.service.cancel(model.execution_id)
        else:
            self.service.update_flow_status(
                model.execution_id, status, context, worker=worker, lease_seconds=LEASE_SECONDS
            )
        if context is not None:
            model.contexts[model.index] = context
        if status is FlowStatus.RUNNING:
            model.run(worker or "by hand")
        else:
            model.leave(status)

    # --- what has to hold after each of them ----------------------------------------------------------------------

    @invariant()
    def the_store_is_as_the_model_says(self) -> None:
        found = {each.execution_id: each for each in self.service.find_flow_executions()}
        assert found.keys() == self.models.keys()
        for execution_id, model in self.models.items():
            execution = self.service.get_flow_execution(execution_id)
            assert execution == found[execution_id]
            check_execution(execution, model)
            assert [
                ModelAttempt(
                    each.flow_execution_step,
                    each.task_index,
                    each.name,
                    each.attempt,
                    each.status.value,
                    each.failure.value if each.failure is not None else None,
                )
                for each in self.service.get_task_executions(execution_id)
            ] == model.attempts
            assert [
                (each.flow_execution_step, each.from_status and each.from_status.value, each.to_status.value)
                for each in self.service.get_flow_status_history(execution_id)
            ] == model.transitions

    @invariant()
    def workers_are_told_what_the_model_says(self) -> None:
        for worker in WORKERS:
            held = {each.execution_id for each in self.service.held_by(worker)}
            assert held == {each.execution_id for each in self.models.values() if each.owner == worker}
        seconds = self.service.seconds_until_next(TEMPLATES)
        if self.due():
            assert seconds == 0.0
        elif self.of_status(FlowStatus.RESCHEDULED):
            assert seconds is not None
            assert 0.0 < seconds <= 3600.0
        else:
            assert seconds is None

    # --- for the rules above --------------------------------------------------------------------------------------

    def of_status(self, status: FlowStatus) -> list[Model]:
        return [each for each in self.models.values() if each.status is status]

    def due(self) -> list[Model]:
        return [each for each in self.models.values() if each.status in RUNNABLE_STATUSES and each.is_due]

    def live(self) -> list[Claim]:
        return [each for each in self.claims if self.is_live(each)]

    def is_live(self, claim: Claim) -> bool:
        """Whether this claim holds its execution, and its attempt is the open one."""
        model = self.models[execution_of(claim)]
        assert claim.attempt is not None
        position = (model.status, model.epoch, model.step)
        return position == (FlowStatus.RUNNING, claim.execution.epoch, claim.attempt.flow_execution_step)

    def lease_ends(self) -> dict[int, datetime | None]:
        return {each.execution_id: each.lease_expires_at for each in self.service.find_flow_executions()}

    def set_time(self, model: Model, column: str) -> None:
        self.execute(
            f"UPDATE ebbs_flow_executions SET {column} = '{LONG_AGO}' WHERE execution_id = {model.execution_id}"
        )

    def execute(self, sql: str) -> None:
        with self.service.engine.begin() as connection:
            connection.execute(text(sql))


def choose(data: st.DataObject, options: Sequence[T]) -> T:
    """One of these, drawn by its number: a failure shows what was drawn, and some of these are long."""
    return options[data.draw(st.integers(0, len(options) - 1))]


def execution_of(claim: Claim) -> int:
    return claim.execution.execution_id


def check_execution(execution: FlowExecution, model: Model) -> None:
    """Everything that one row says."""
    assert execution.status is model.status
    assert execution.execution_step == model.step
    assert execution.epoch == model.epoch
    assert execution.current_task_index == model.index
    assert dict(execution.execution_context) == model.context
    assert execution.lease_owner == model.owner
    assert (execution.lease_expires_at is not None) == (model.status is FlowStatus.RUNNING)
    is_expired = execution.lease_expires_at is not None and execution.lease_expires_at < execution.updated_at
    assert is_expired == model.is_expired
    assert (execution.started_at is not None) == (model.epoch > 0)
    is_at_rest = model.status in (FlowStatus.SUCCEEDED, FlowStatus.FAILED, FlowStatus.CANCELLED)
    assert (execution.finished_at is not None) == is_at_rest


# --- the test -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(database: str, request: pytest.FixtureRequest) -> Iterator[FlowService]:
    """SQLite in memory, or PostgreSQL."""
    if database == "postgresql":
        yield request.getfixturevalue("service")
        return
    with FlowService("sqlite://") as service:
        yield service


def test_the_store_does_what_the_rules_say_whatever_is_done_in_whatever_order(
    store: FlowService, database: str
) -> None:
    run_state_machine_as_test(
        lambda: Machine(store),  # type: ignore[arg-type]  # anything that makes one will do, says its documentation
        settings=settings(
            max_examples=EXAMPLES[database],
            stateful_step_count=CALLS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # Shrinking may take five minutes. Who needs a shorter sequence for a failure adds Phase.shrink by hand.
            phases=[Phase.reuse, Phase.generate],
            report_multiple_bugs=False,
        ),
    )
