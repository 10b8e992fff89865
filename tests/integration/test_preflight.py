"""The preflight: what it says of a change of code is what happens when that code runs."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from sqlalchemy import Connection, create_engine, make_url, text
from typer.testing import CliRunner, Result

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    Task,
    TaskDataItem,
    UnknownTypeError,
    Worker,
    register_type,
    schema,
    task,
)
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.diagnosis import Verdict
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.tables import build_tables
from ebbs_and_flows.persistence.unfinished import Unfinished
from ebbs_and_flows.preflight import Concern, Kind, Preflight, When, preflight
from ebbs_and_flows.registry import REGISTRY
from tests.integration.flows import Gate, Outside, Step

FAILED, RESCHEDULED, RUNNING = FlowStatus.FAILED, FlowStatus.RESCHEDULED, FlowStatus.RUNNING
SCHEDULED, CREATED, SUCCEEDED = FlowStatus.SCHEDULED, FlowStatus.CREATED, FlowStatus.SUCCEEDED
PROBLEM, WARNING, OK = Verdict.PROBLEM, Verdict.WARNING, Verdict.OK

Ebbs = Callable[..., Result]


class Halting(Task):
    """Adds an entry of its name; raises where the flow is to come to rest."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, context: ExecutionContext) -> ExecutionContext:
        if context["halt"] == self.name:
            raise RuntimeError("halted")
        return context.copy({self.name: 1})


def old_code(service: FlowService, names: Iterable[str], tasks: Iterable[str]) -> FlowRunner:
    """A runner with one template for each of these names, all with tasks of these names."""
    runner = FlowRunner(service)
    for name in names:
        runner.register_flow_template(FlowTemplate(name, [Halting(each) for each in tasks]))
    return runner


def new_code(service: FlowService, templates: dict[str, Iterable[str]]) -> FlowRunner:
    """A runner with these templates, whose tasks all succeed."""
    runner = FlowRunner(service)
    for name, tasks in templates.items():
        runner.register_flow_template(FlowTemplate(name, [Step(Outside(), each) for each in tasks]))
    return runner


def halted_at(runner: FlowRunner, template: str, halt: str, *, status: FlowStatus = FAILED) -> int:
    """An execution that came to rest at a task; `then` FAILED, or RESCHEDULED to be taken up."""
    execution_id = runner.schedule_flow(template, {"halt": halt})
    done = runner.run_flow()
    assert done is not None
    assert (done.execution_id, done.status) == (execution_id, FAILED)
    if status is RESCHEDULED:
        runner.reschedule_flow_execution(execution_id)
    return execution_id


def only(found: Preflight) -> Concern:
    (concern,) = found.concerns
    return concern


# --- what it says is what happens -------------------------------------------------------------------------------------

OLD = ("a", "b", "c")
NEW = [None, *(tasks for length in range(5) for tasks in itertools.permutations("abcx", length))]
"""Every way in which tasks can be removed, put in, renamed, moved or left out altogether; and the template gone."""

HALTS = {"at b": "b", "at c": "c", "again": "c", "back to b": "c", "back to a": "c"}
"""Where executions have come to rest; some of them are sent back afterwards."""


def with_histories(service: FlowService, names: Iterable[str]) -> dict[int, str]:
    """Executions of these templates that have got to different places in different ways; their templates by id."""
    old = old_code(service, names, OLD)
    worker = Worker(old, concurrency=32)
    ids = {
        (name, how): old.schedule_flow(name, {"halt": halt}) for name in old.templates for how, halt in HALTS.items()
    }
    worker.run(until_idle=True)
    for (_, how), execution_id in ids.items():
        if how == "again":
            service.reschedule(execution_id, "b")
    worker.run(until_idle=True)
    for (_, how), execution_id in ids.items():
        if how.startswith("back to "):
            service.reschedule(execution_id, how[-1])
    waiting = {old.schedule_flow(name, {"halt": ""}): name for name in old.templates}
    return waiting | {execution_id: name for (name, _), execution_id in ids.items()}


@pytest.mark.usefixtures("sound_history")
def test_what_is_said_of_each_change_of_a_template_is_what_happens(service: FlowService) -> None:
    names = [f"{number}: {tasks}" for number, tasks in enumerate(NEW)]
    histories = with_histories(service, names)
    new = new_code(service, {name: tasks for name, tasks in zip(names, NEW, strict=True) if tasks is not None})
    attempts = {each: len(service.get_task_executions(each)) for each in histories}
    said_at_rest = kinds(preflight(new, examples=10_000))
    for execution_id in histories:
        if service.get_flow_execution(execution_id).status is FAILED:
            service.reschedule(execution_id)
    found = preflight(new, examples=10_000)
    said = kinds(found)
    assert said == said_at_rest, "a failed one that is re-run is like any other"
    new.run_until_idle()
    happened = {}
    for execution_id, name in histories.items():
        execution = service.get_flow_execution(execution_id)
        reason = service.get_flow_status_history(execution_id)[-1].reason or ""
        has_run = len(service.get_task_executions(execution_id)) > attempts[execution_id]
        if name.endswith("None"):
            assert execution.status in (SCHEDULED, RESCHEDULED)
            happened[execution_id] = Kind.UNKNOWN_TEMPLATE
        elif execution.status is FAILED:
            assert reason.startswith("TemplateMismatchError")
            assert not has_run
            happened[execution_id] = Kind.CHANGED_TEMPLATE
        else:
            assert execution.status is SUCCEEDED
            if not has_run:
                happened[execution_id] = Kind.NOTHING_LEFT
    assert said == happened
    assert set(happened.values()) == {Kind.UNKNOWN_TEMPLATE, Kind.CHANGED_TEMPLATE, Kind.NOTHING_LEFT}
    assert len(happened) < len(histories)


def kinds(found: Preflight) -> dict[int, Kind]:
    """What is said of each execution."""
    said = {}
    for concern in found.concerns:
        assert concern.number == len(concern.examples) == sum(concern.statuses.values())
        for execution_id in concern.examples:
            assert execution_id not in said
            said[execution_id] = concern.kind
    return said


def test_the_way_out_that_is_advised_leads_out(service: FlowService) -> None:
    """Each parked execution goes on with the command, at the task that is named."""
    changed = [tasks for tasks in NEW if tasks is not None]
    names = [f"t{number}" for number in range(len(changed))]
    old = old_code(service, names, OLD)
    for name in names:
        halted_at(old, name, "c", status=RESCHEDULED)
    new = new_code(service, dict(zip(names, changed, strict=True)))
    found = [each for each in preflight(new).concerns if each.kind is Kind.CHANGED_TEMPLATE]
    assert len(found) > 40
    new.run_until_idle()
    for concern in found:
        _, _, rest = concern.advice.partition("each goes on ")
        where, _, command = rest.partition(" with ")
        ebbs, runs, reschedule, execution_id, option, from_task = command.split()
        assert (ebbs, runs, reschedule, option) == ("ebbs", "runs", "reschedule", "--from-task")
        service.reschedule(int(execution_id), from_task)
        done = new.re_run_flow()
        assert done is not None
        assert (done.execution_id, done.status) == (int(execution_id), SUCCEEDED)
        ran = [each.name for each in service.get_task_executions(int(execution_id))[3:]]
        assert where == ("to its end" if not ran else f"at {ran[0]}")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("halt"), st.sampled_from(OLD)),
        st.tuples(st.just("back"), st.sampled_from(OLD)),
        st.tuples(st.just("mend"), st.sampled_from([{}, {"halt": "", "b": Decimal(1)}, {"new": (1, 2), "halt": ""}])),
    ),
    max_size=6,
)


@given(histories=st.lists(ACTIONS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_where_executions_stand_is_read_as_their_next_claim_would_read_it(histories: list[Any]) -> None:
    with FlowService("sqlite://") as service:
        runner = old_code(service, ["abc"], OLD)
        ids = [create_history(service, runner, actions) for actions in histories]
        with service._work(writes=False) as work:
            standings = list(Unfinished(work.connection, build_tables()).standings(10))
            executions = [work.executions.get(each) for each in ids]
            progress = work.contexts.progress([each for each in executions if each is not None])
        read = {each: standing for standing in standings for each in standing.examples}
        expected = [each for each in executions if each is not None and not each.status.is_final]
        assert set(read) == {each.execution_id for each in expected}
        for execution in expected:
            standing, decided = read[execution.execution_id], progress[execution.execution_id]
            assert standing.completed == decided.completed
            assert standing.task_index == execution.current_task_index
            assert standing.types == {name: (encoded.type_name,) for name, encoded in decided.context.encode().items()}


def create_history(service: FlowService, runner: FlowRunner, actions: Iterable[tuple[str, Any]]) -> int:
    """An execution that was halted, sent back and mended by hand, as far as its status allowed it."""
    execution_id = runner.schedule_flow("abc", {"halt": "b"})
    runner.run_flow()
    for action, value in actions:
        execution = service.get_flow_execution(execution_id)
        if execution.status is not FAILED:
            break
        if action == "back":
            reached = [each.name for each in service.get_task_executions(execution_id)]
            index = OLD.index(value)
            if value in reached and index <= execution.current_task_index:
                service.reschedule(execution_id, value)
                runner.re_run_flow()
        elif action == "mend":
            service.update_flow_status(execution_id, RESCHEDULED, {"halt": "c", **value})
            runner.re_run_flow()
        else:
            context = {**dict(execution.execution_context), "halt": value}
            service.update_flow_status(execution_id, RESCHEDULED, context)
            runner.re_run_flow()
    return execution_id


# --- a task that is running -------------------------------------------------------------------------------------------


def test_of_what_runs_it_says_what_follows_if_the_task_ends_first(service: FlowService, outside: Outside) -> None:
    gate = Gate("b")
    old = FlowRunner(service)
    old.register_flow_template(FlowTemplate("abc", [Step(outside, "a"), gate, Step(outside, "c")]))
    execution_id = old.schedule_flow("abc")
    renamed = new_code(service, {"abc": ["a", "b2", "c"]})
    with Worker(old, concurrency=2, poll_seconds=0.05).running():
        assert gate.entered.acquire(timeout=30)
        concern = only(preflight(renamed))
        assert (concern.kind, concern.when, concern.verdict) == (Kind.CHANGED_TEMPLATE, When.TASK_ENDED, WARNING)
        assert (concern.completed, concern.tasks) == (("a", "b"), ("a", "b2", "c"))
        assert concern.statuses == {RUNNING: 1}
        assert concern.examples == (execution_id,)
        assert preflight(new_code(service, {"abc": ["a", "b", "x"]})).concerns == ()
        gate.opened.set()


# --- what contexts lack -----------------------------------------------------------------------------------------------


@task(outputs="total")
def add_up(prices: list[int]) -> int:
    return sum(prices)


@task(name="add_up", outputs="total")
def add_up_with_currency(prices: list[int], currency: str) -> int:
    return sum(prices)


@task(name="add_up", outputs=("total", "weight"))
def add_up_with_weight(prices: list[int], rounded: bool = False) -> tuple[int, int]:
    return sum(prices), 1


@task(outputs="receipt")
def charge(total: int) -> str:
    if not total:
        raise ValueError("nothing to pay")
    return "paid"


@task(name="charge", outputs="receipt")
def charge_with_optional(total: int, coupon: str | None = None) -> str:
    return "paid"


@task(outputs="parcel")
def send(weight: int) -> str:
    return "sent"


CHANGES: dict[str, tuple[list[Task], tuple[str, ...], tuple[str, ...]]] = {
    "a new input of the first task": ([add_up_with_currency, charge], ("currency",), ()),
    "a new output that a later task needs": ([add_up_with_weight, charge, send], (), ("weight",)),
    "a new task with an input of its own": (
        [add_up, charge, send],
        ("weight",),
        ("weight",),
    ),
    "a new parameter with a default": ([add_up_with_weight, charge_with_optional], (), ()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_contexts_lack_is_what_their_tasks_fail_for(service: FlowService, change: str) -> None:
    tasks, lacks_at_the_beginning, lacks_half_way = CHANGES[change]
    old = FlowRunner(service)
    old.register_flow_template(FlowTemplate("pay", [add_up, charge]))
    half_way = old.schedule_flow("pay", {"prices": []})
    old.run_flow()
    service.update_flow_status(half_way, RESCHEDULED, {"prices": [1], "total": 1})
    waiting = old.schedule_flow("pay", {"prices": [1]})
    created = service.create_flow_execution("pay", {"prices": [1]}).execution_id
    new = FlowRunner(service)
    declared = [TaskDataItem(name, Any) for name in ("prices", *lacks_at_the_beginning)]
    new.register_flow_template(FlowTemplate("pay", tasks, inputs=declared))
    found = preflight(new)
    said = {each: concern.entries for concern in found.concerns for each in concern.examples}
    expected = {waiting: lacks_at_the_beginning, created: lacks_at_the_beginning, half_way: lacks_half_way}
    assert said == {each: names for each, names in expected.items() if names}
    assert {each.kind for each in found.concerns} <= {Kind.MISSING_INPUTS}
    assert found.verdict is (PROBLEM if said else OK)
    service.update_flow_status(created, SCHEDULED)
    new.run_until_idle()
    for execution_id, names in expected.items():
        execution = service.get_flow_execution(execution_id)
        assert execution.status is (FAILED if names else SUCCEEDED)
        if names:
            assert service.get_task_executions(execution_id)[-1].error_type == "MissingEntryError"


# --- types ------------------------------------------------------------------------------------------------------------


@dataclass
class Parcel:
    weight: int


@dataclass
class Label:
    text: str


PARCEL, LABEL = (f"{__name__}.{cls.__name__}" for cls in (Parcel, Label))


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is not registered for the next one."""
    for name in ("_by_name", "_by_class"):
        monkeypatch.setattr(REGISTRY, name, dict(getattr(REGISTRY, name)))


@pytest.mark.usefixtures("_forgotten")
def test_types_that_are_not_registered_are_found_wherever_they_stand(service: FlowService) -> None:
    old = old_code(service, ["abc"], OLD)
    values = {
        "itself": Parcel(1),
        "listed": [1, {"deep": (Parcel(2), Label("x"))}],
        "plain": '{"$type":"shop.Nothing"}',
        "odd": {'a"$type': "shop.Nothing", "$type": "shop.Nothing"},
        "known": [Decimal(1), {1, 2}, frozenset()],
    }
    old.schedule_flow("abc", {"halt": "b", **values})
    old.run_flow()
    found = preflight(old)
    said = {each.type_name: each for each in found.concerns}
    assert {name: each.entries for name, each in said.items()} == {PARCEL: ("itself", "listed"), LABEL: ("listed",)}
    assert {(each.kind, each.when, each.verdict) for each in found.concerns} == {
        (Kind.UNKNOWN_TYPE, When.RE_RUN, WARNING)
    }
    context = service.get_flow_execution(1).execution_context
    for concern in found.concerns:
        for entry in concern.entries:
            with pytest.raises(UnknownTypeError) as unknown:
                context[entry]
            assert unknown.value.type_name in said
    assert context["plain"]
    service.reschedule(1)
    assert preflight(old).verdict is PROBLEM
    register_type(Parcel)
    assert [each.type_name for each in preflight(old).concerns] == [LABEL]
    register_type(Label)
    assert preflight(old).concerns == ()


@pytest.mark.usefixtures("_forgotten")
def test_what_contexts_have_lost_or_replaced_does_not_count(service: FlowService) -> None:
    old = old_code(service, ["abc"], OLD)
    dropped = old.schedule_flow("abc", {"halt": "b", "parcel": Parcel(1), "label": [Label("x")]})
    old.run_flow()
    assert len(preflight(old).concerns) == 2
    service.update_flow_status(dropped, RESCHEDULED, {"halt": "b", "label": "x"})
    assert preflight(old).concerns == ()
    old.re_run_flow()
    service.reschedule(dropped, "a")  # with the context as it was then
    assert {each.type_name for each in preflight(old).concerns} == {PARCEL, LABEL}


@pytest.mark.usefixtures("_forgotten")
def test_a_template_that_declares_a_type_registers_it(service: FlowService) -> None:
    @task
    def weigh(parcel: Parcel) -> None:
        assert parcel.weight

    service.schedule("weigh", {"parcel": Parcel(1)})
    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("weigh", [weigh]))
    assert preflight(runner).concerns == ()


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_damaged_context_is_left_out_and_in_nobody_s_way(service: FlowService, database: str) -> None:
    old = old_code(service, ["abc"], OLD)
    ids = [halted_at(old, "abc", "b") for _ in range(4)]
    damages = ['{"halt":17}', '{"other":"int"}', "[]", '{"halt":"str"' if database == "sqlite" else "17"]
    transitions = build_tables().transitions
    with service.engine.begin() as connection:
        for execution_id, damage in zip(ids, damages, strict=True):
            is_it = (transitions.c.flow_execution_id == execution_id) & (transitions.c.flow_execution_step == 1)
            connection.execute(transitions.update().where(is_it).values(entry_types=damage))
    well = halted_at(old, "abc", "b")
    found = preflight(new_code(service, {"abc": ["x", "a"]}), examples=10)
    assert only(found).examples == (*ids, well)
    assert preflight(old).concerns == ()


# --- whom it is about -------------------------------------------------------------------------------------------------


def test_what_is_parked_at_once_is_told_from_what_rests_until_it_is_re_run(service: FlowService) -> None:
    old = old_code(service, ["abc", "xyz"], OLD)
    resting = [halted_at(old, "abc", "b") for _ in range(3)]
    waiting = [halted_at(old, "abc", "b", status=RESCHEDULED) for _ in range(2)]
    resting_elsewhere = halted_at(old, "xyz", "b")
    new = new_code(service, {"abc": ["b", "a"]})
    found = preflight(new)
    assert [(each.kind, each.when, each.verdict, each.template_name, each.examples) for each in found.concerns] == [
        (Kind.CHANGED_TEMPLATE, When.TAKEN_UP, PROBLEM, "abc", tuple(waiting)),
        (Kind.CHANGED_TEMPLATE, When.RE_RUN, WARNING, "abc", tuple(resting)),
        (Kind.UNKNOWN_TEMPLATE, When.RE_RUN, WARNING, "xyz", (resting_elsewhere,)),
    ]
    assert [each.statuses for each in found.concerns] == [{RESCHEDULED: 2}, {FAILED: 3}, {FAILED: 1}]
    assert (found.concerns[0].completed, found.concerns[0].tasks) == (("a",), ("b", "a"))
    assert found.verdict is PROBLEM
    assert found.unfinished == {FAILED: 4, RESCHEDULED: 2}
    for each in waiting:
        service.cancel(each)
    assert preflight(new).verdict is WARNING


def test_templates_of_other_applications_are_left_alone(service: FlowService) -> None:
    service.schedule("ours")
    service.schedule("theirs")
    new = new_code(service, {"ours": ["a"]})
    assert only(preflight(new)).template_name == "theirs"
    found = preflight(new, elsewhere=["theirs"])
    assert found.concerns == ()
    assert found.unfinished == {SCHEDULED: 2}


def test_what_is_finished_does_not_count(service: FlowService) -> None:
    old = old_code(service, ["abc"], OLD)
    old.schedule_flow("abc", {"halt": ""})
    old.run_flow()
    service.cancel(old.schedule_flow("abc", {"halt": ""}))
    found = preflight(new_code(service, {}))
    assert (found.unfinished, found.concerns, found.verdict) == ({}, (), OK)


def test_few_of_very_many_are_named_the_oldest_first(service: FlowService) -> None:
    runner = old_code(service, ["abc"], OLD)
    ids = runner.schedule_flows("abc", ({"halt": "", "number": number} for number in range(2000)))
    found = preflight(new_code(service, {}))
    assert only(found).number == 2000
    assert only(found).examples == tuple(ids[:5])
    assert only(preflight(new_code(service, {}), examples=1)).examples == (ids[0],)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0}, "examples=0 cannot be used: expected an int of at least 1"),
        ({"elsewhere": "theirs"}, "elsewhere='theirs' cannot be used: expected a collection of template names"),
        ({"elsewhere": [" "]}, "template name ' ' must not be blank"),
        ({"runner": 17}, "runner=17 cannot be used: expected a FlowRunner"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(runner: FlowRunner, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preflight(**{"runner": runner, **arguments})


# --- the database -----------------------------------------------------------------------------------------------------


def contents(service: FlowService) -> dict[str, list[Any]]:
    tables = build_tables(service.schema).metadata.sorted_tables
    with service.engine.connect() as connection:
        return {table.name: sorted(map(tuple, connection.execute(table.select())), key=repr) for table in tables}


def test_nothing_is_written(service: FlowService) -> None:
    old = old_code(service, ["abc"], OLD)
    halted_at(old, "abc", "b", status=RESCHEDULED)
    service.update_flow_status(service.schedule("abc"), RUNNING)
    before = contents(service)
    assert preflight(new_code(service, {"abc": ["b"]})).verdict is PROBLEM
    assert contents(service) == before


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_role_that_may_only_read_is_enough(service: FlowService, database_url: str) -> None:
    halted_at(old_code(service, ["abc"], OLD), "abc", "b", status=RESCHEDULED)
    with role(service, "ebbs_preflight_reader") as name:
        with service.engine.begin() as connection:
            connection.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}"))
        url = make_url(database_url).set(username=name, password=None)
        engine = create_engine_for(url)
        try:
            with engine.connect() as connection, pytest.raises(Exception, match="permission denied"):
                connection.execute(text("DELETE FROM ebbs_flow_executions"))
            found = preflight(new_code(service, {"abc": ["b"]}), engine=engine)
        finally:
            engine.dispose()
    assert only(found).kind is Kind.CHANGED_TEMPLATE


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_role_that_may_not_read_is_told_so(service: FlowService, database_url: str) -> None:
    with role(service, "ebbs_preflight_nobody") as name:
        with service.engine.begin() as connection:
            connection.execute(text(f"GRANT SELECT ON {schema.VERSION_TABLE} TO {name}"))
        engine = create_engine_for(make_url(database_url).set(username=name, password=None))
        try:
            found = preflight(new_code(service, {}), engine=engine)
        finally:
            engine.dispose()
    assert found.unfinished is None
    assert found.schema_fits
    assert found.database[-1].found.startswith("cannot be looked at: permission denied for table ebbs_")
    assert found.verdict is PROBLEM


@contextmanager
def role(service: FlowService, name: str) -> Iterator[str]:
    with service.engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
    try:
        yield name
    finally:
        with service.engine.begin() as connection:
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_file_that_is_read_only_is_enough(service: FlowService, database_url: str) -> None:
    halted_at(old_code(service, ["abc"], OLD), "abc", "b", status=RESCHEDULED)
    engine = create_engine(f"sqlite:///file:{make_url(database_url).database}?mode=ro&uri=true")
    found = preflight(new_code(service, {"abc": ["b"]}), engine=engine)
    engine.dispose()
    assert only(found).kind is Kind.CHANGED_TEMPLATE


@pytest.mark.parametrize("isolation_level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_the_engine_of_the_host_is_left_as_it_is(service: FlowService, database_url: str, isolation_level: str) -> None:
    halted_at(old_code(service, ["abc"], OLD), "abc", "b", status=RESCHEDULED)
    url = make_url(database_url)
    if url.get_backend_name() == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level=isolation_level, pool_size=1, max_overflow=0)
    with engine.connect() as connection:
        before = settings_of(connection)
    new = new_code(FlowService(engine), {"abc": ["b"]})
    assert only(preflight(new)).kind is Kind.CHANGED_TEMPLATE
    with engine.connect() as connection:  # the very same one
        assert settings_of(connection) == before
    engine.dispose()


def settings_of(connection: Connection) -> list[Any]:
    """How the driver's connection begins transactions."""
    names = ("autocommit", "isolation_level", "read_only")
    return [getattr(connection.connection.driver_connection, name, None) for name in names]


@pytest.mark.parametrize("database", ["postgresql"])
def test_a_named_schema_is_looked_at(database_url: str) -> None:
    schema.upgrade(database_url, schema="flows")
    with FlowService(database_url, schema="flows") as service:
        service.schedule("gone")
        assert only(preflight(new_code(service, {}))).template_name == "gone"
        assert preflight(new_code(FlowService(database_url), {})).unfinished == {}
        assert preflight(new_code(service, {}), engine=service.engine).unfinished == {}
        found = preflight(new_code(service, {}), engine=service.engine, schema="flows")
        assert found.unfinished == {SCHEDULED: 1}
        with service.engine.begin() as connection:
            connection.execute(text("DROP SCHEMA flows CASCADE"))


def test_a_schema_that_is_behind_is_said_and_executions_are_looked_at(service: FlowService) -> None:
    service.schedule("gone")
    new = new_code(service, {})
    set_revision(service, "ebbs_0000")
    found = preflight(new)
    assert not found.schema_fits
    (finding,) = [each for each in found.database if each.check == "schema"]
    assert finding.verdict is PROBLEM
    assert finding.found == f"Schema is at ebbs_0000, this release needs {schema.REVISION}"
    assert finding.advice == 'run "ebbs db upgrade"'
    assert only(found).kind is Kind.UNKNOWN_TEMPLATE


def test_a_newer_schema_is_accepted(service: FlowService) -> None:
    new = new_code(service, {})
    set_revision(service, "ebbs_9999")
    found = preflight(new)
    assert found.schema_fits
    assert (found.verdict, found.unfinished) == (OK, {})


def set_revision(service: FlowService, revision: str) -> None:
    with service.engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = :new"), {"new": revision})


def test_without_a_schema_there_is_nothing_to_look_at(runner: FlowRunner, empty_database_url: str) -> None:
    engine = create_engine_for(empty_database_url)
    found = preflight(runner, engine=engine)
    engine.dispose()
    assert (found.schema_fits, found.unfinished, found.concerns) == (False, None, ())


def test_a_database_that_does_not_answer_is_a_finding(runner: FlowRunner) -> None:
    engine = create_engine_for("postgresql://nobody@127.0.0.1:1/none?connect_timeout=2")
    found = preflight(runner, engine=engine)
    engine.dispose()
    assert [(each.check, each.verdict) for each in found.database] == [("database", PROBLEM)]
    assert (found.schema_fits, found.unfinished, found.concerns) == (False, None, ())


@pytest.mark.usefixtures("sound_history")
def test_workers_go_on_meanwhile(service: FlowService, runner: FlowRunner, outside: Outside) -> None:
    runner.register_flow_template(FlowTemplate("abc", [Step(outside, each) for each in OLD]))
    runner.schedule_flows("abc", ({"number": number} for number in range(300)))
    new = new_code(service, {"abc": ["a", "c", "b"]})
    finished = threading.Event()
    worker = Worker(runner, concurrency=8, poll_seconds=0.05)

    def work() -> None:
        worker.run(until_idle=True)
        finished.set()

    thread = threading.Thread(target=work)
    thread.start()
    looked = 0
    while not finished.is_set():
        found = preflight(new)
        assert {each.kind for each in found.concerns} <= {Kind.CHANGED_TEMPLATE}
        assert found.unfinished is not None
        assert sum(each.number for each in found.concerns) <= sum(found.unfinished.values())
        looked += 1
    thread.join()
    assert looked > 1
    assert preflight(new).unfinished == {}


# --- ebbs check -------------------------------------------------------------------------------------------------------

APP = """
from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, Worker, task
from tests.integration.flows import Outside, Step

print("imported")
runner = FlowRunner(FlowService(URL))
for name, tasks in TEMPLATES.items():
    runner.register_flow_template(FlowTemplate(name, [Step(Outside(), each) for each in tasks]))
worker = Worker(runner)

def make():
    return runner
"""


@pytest.fixture
def ebbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database_url: str) -> Ebbs:
    """`ebbs check --app app:runner`, for an app with the given templates on this test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("EBBS_DATABASE_URL", "EBBS_SCHEMA", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(
        templates: dict[str, Any], *options: object, name: str = "runner", url: str = database_url, **environment: str
    ) -> Result:
        code = APP.replace("URL", repr(url)).replace("TEMPLATES", repr(templates))
        (tmp_path / "app.py").write_text(code)
        arguments = ["check", "--app", f"app:{name}", *map(str, options)]
        result = CliRunner().invoke(app, arguments, env=environment)
        imported = sys.modules.pop("app", None)
        if imported is not None:
            imported.runner.service.close()
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.mark.parametrize("name", ["runner", "worker", "make"])
def test_code_that_can_go_on_with_everything_is_exit_code_0(ebbs: Ebbs, service: FlowService, name: str) -> None:
    halted_at(old_code(service, ["abc"], OLD), "abc", "b", status=RESCHEDULED)
    result = ebbs({"abc": ["a", "b", "c", "d"]}, name=name)
    assert result.exit_code == 0
    assert [line.split("  ")[0] for line in result.stdout.splitlines()] == ["ok", "ok"]
    assert result.stderr.startswith("imported\n")
    assert result.stderr.endswith(": 1 unfinished execution, and this code can go on with all of them\n")


def test_executions_that_would_be_parked_are_exit_code_4(ebbs: Ebbs, service: FlowService) -> None:
    old = old_code(service, ["abc"], OLD)
    first, second = (halted_at(old, "abc", "c", status=RESCHEDULED) for _ in range(2))
    result = ebbs({"abc": ["a", "x", "b", "c"]})
    assert result.exit_code == 4
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    assert line == (
        "problem  abc       2 executions would be parked when taken up: task 2 was b, and is x now; done: a, b; "
        f"now:  a, x, b, c; 2 RESCHEDULED: {first}, {second} -> let the old code finish these first, or put new tasks "
        f"after those done; once parked, each goes on at x with ebbs runs reschedule {first} --from-task b"
    )
    assert result.stderr.endswith(": 2 unfinished executions, 1 problem\n")


def test_what_rests_until_it_is_re_run_is_exit_code_0(ebbs: Ebbs, service: FlowService) -> None:
    halted_at(old_code(service, ["abc"], OLD), "abc", "b")
    result = ebbs({"abc": ["b", "a"]})
    assert result.exit_code == 0
    assert "warning  abc" in result.stdout
    assert "would be parked again when re-run" in result.stdout


def test_a_schema_behind_is_exit_code_3_and_comes_first(ebbs: Ebbs, service: FlowService, database: str) -> None:
    service.schedule("gone")
    other = "sqlite:///other.db"  # the app's own database is another one, and has its schema
    set_revision(service, "ebbs_0000")
    url = service.engine.url.render_as_string(hide_password=False)
    result = ebbs({}, "--database-url", url, url=other)
    assert result.exit_code == 3
    assert 'run "ebbs db upgrade"' in result.stdout
    assert "would not be taken up" in result.stdout
    if database == "postgresql":  # SQLite's is brought up to date when the app opens it
        result = ebbs({})
        assert result.exit_code == 3
        assert 'run "ebbs db upgrade"' in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_file_that_is_not_there_is_exit_code_3_and_is_not_made(ebbs: Ebbs, tmp_path: Path) -> None:
    result = ebbs({}, "--database-url", "sqlite:///missing.db")
    assert result.exit_code == 3
    assert "no such file 'missing.db'" in result.stderr
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("database", ["sqlite"])
def test_what_cannot_be_used_is_exit_code_2(ebbs: Ebbs) -> None:
    for arguments in ({"name": "nothing"}, {"name": ""}):
        assert ebbs({}, **arguments).exit_code == 2
    assert ebbs({}, "--database-url", "mysql://somewhere/flows").exit_code == 2
    assert ebbs({}, "--what").exit_code == 2
    assert CliRunner().invoke(app, ["check"]).exit_code == 2


@pytest.mark.parametrize("database", ["sqlite"])
def test_a_database_that_does_not_answer_is_exit_code_1(ebbs: Ebbs) -> None:
    result = ebbs({}, "--database-url", "postgresql://me:secret@127.0.0.1:1/flows?connect_timeout=2")
    assert result.exit_code == 1
    assert "does not answer" in result.stdout
    assert result.stderr.endswith(
        "postgresql://me:***@127.0.0.1:1/flows?connect_timeout=2: its executions were not looked at\n"
    )


def test_the_database_is_the_one_that_is_given(ebbs: Ebbs, service: FlowService, database_url: str) -> None:
    service.schedule("gone")
    assert ebbs({}, url="sqlite:///other.db").exit_code == 0
    assert ebbs({}, "--database-url", database_url, url="sqlite:///other.db").exit_code == 4
    assert ebbs({}, url="sqlite:///other.db", EBBS_DATABASE_URL=database_url).exit_code == 4
    assert ebbs({}, "--elsewhere", "gone").exit_code == 0
    assert ebbs({}, "--elsewhere", " ").exit_code == 2


@pytest.mark.parametrize("database", ["postgresql"])
def test_the_schema_is_the_one_that_is_given(ebbs: Ebbs, service: FlowService, database_url: str) -> None:
    schema.upgrade(database_url, schema="flows")
    service.schedule("gone")
    assert ebbs({}).exit_code == 4
    for arguments in ((), ("--database-url", database_url)):
        result = ebbs({}, "--schema", "flows", *arguments)
        assert result.exit_code == 0
        assert result.stderr.endswith(": no execution is unfinished\n")
    with service.engine.begin() as connection:
        connection.execute(text("DROP SCHEMA flows CASCADE"))


def test_what_is_found_is_a_record_for_programs(ebbs: Ebbs, service: FlowService) -> None:
    execution_id = halted_at(old_code(service, ["abc"], OLD), "abc", "c", status=RESCHEDULED)
    result = ebbs({"abc": ["a"]}, "--json")
    assert result.exit_code == 4
    assert result.stderr == "imported\n"
    document = json.loads(result.stdout)
    assert document["verdict"] == "problem"
    assert [each["check"] for each in document["database"]] == ["database", "schema"]
    assert document["unfinished"] == {"RESCHEDULED": 1}
    (concern,) = document["concerns"]
    assert concern.pop("found") == "1 execution would be parked when taken up: task 2, b, is gone"
    assert concern.pop("advice").endswith(
        f"each goes on to its end with ebbs runs reschedule {execution_id} --from-task b"
    )
    assert concern == {
        "kind": "changed template",
        "when": "when taken up",
        "verdict": "problem",
        "template_name": "abc",
        "number": 1,
        "statuses": {"RESCHEDULED": 1},
        "examples": [execution_id],
        "completed": ["a", "b"],
        "tasks": ["a"],
        "entries": [],
        "type_name": None,
    }


def test_names_can_do_nothing_to_a_terminal_and_nothing_is_wider_than_it(ebbs: Ebbs, service: FlowService) -> None:
    hostile = "[bold]x[/] \u202egnp " + "long " * 20
    old = old_code(service, [hostile], ["a\u2066", *(f"task-{number}" for number in range(30))])
    halted_at(old, hostile, "task-20", status=RESCHEDULED)
    new = ["a\u2066", *(f"task-{number}" for number in range(15)), "\u202enew", *(f"task-{n}" for n in range(15, 30))]
    result = ebbs({hostile: new}, FORCE_COLOR="1", COLUMNS="80", TERM="xterm-256color")
    assert result.exit_code == 4
    lines = result.stdout.splitlines()
    plain = [line.replace("\x1b[", "\x00").split("\x00") for line in lines]
    shown = ["".join([parts[0], *(part.partition("m")[2] for part in parts[1:])]) for parts in plain]
    assert all(line.isprintable() and len(line) <= 80 for line in shown)
    assert "\x1b[1;31m\\u202enew\x1b[0m" in result.stdout
    said = " ".join(" ".join(shown).split())
    assert "done: 14 alike, task-13, task-14, task-15, task-16, task-17, task-18, task-19" in said
    assert "now: 14 alike, task-13, task-14, \\u202enew, task-15, task-16, task-17, and 12 more" in said
    assert "\u202e" not in ebbs({hostile: new}).stdout
