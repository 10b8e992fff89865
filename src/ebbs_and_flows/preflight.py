"""Preflight: what the templates and types of new code would do to the executions that a database has now. Writes
nothing.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from ebbs_and_flows import schema as database_schema
from ebbs_and_flows.diagnosis import Finding, Verdict, reach
from ebbs_and_flows.errors import InvalidArgumentError, MissingInputError, TemplateMismatchError
from ebbs_and_flows.executions import FlowStatus
from ebbs_and_flows.names import valid_name
from ebbs_and_flows.persistence.databases import said
from ebbs_and_flows.persistence.tables import build_tables
from ebbs_and_flows.persistence.unfinished import Standing, open_unfinished
from ebbs_and_flows.registry import REGISTRY, is_builtin_name
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.templates import FlowTemplate, is_positive_int
from ebbs_and_flows.texts import one_line

LONGEST_TEXT = 500
"""Characters of an advice."""

EXAMPLES = 5
"""How many ids of executions a concern names."""


class Kind(str, Enum):
    """What new code would do to executions."""

    UNKNOWN_TEMPLATE = "unknown template"
    """It has no template of their name, so it takes none of them up."""

    CHANGED_TEMPLATE = "changed template"
    """Its template does not begin with the tasks that they have completed, so it parks them as FAILED with a
    `TemplateMismatchError`, and runs nothing."""

    MISSING_INPUTS = "missing inputs"
    """Their contexts lack entries that the flow, or a task still to come, requires: that task fails."""

    UNKNOWN_TYPE = "unknown type"
    """Their contexts have a value of a type that is not registered: whoever reads that entry fails with an
    `UnknownTypeError`."""

    NOTHING_LEFT = "nothing left"
    """Its template ends with the tasks that they have completed, so they succeed, and run nothing more."""

    __str__ = str.__str__


class When(str, Enum):
    """When it does so."""

    TAKEN_UP = "when taken up"
    """As soon as a worker of the new code takes them up."""

    TASK_ENDED = "once its task has ended"
    """They are RUNNING: if the task that runs now ends before a worker of the new code takes them up, but not else."""

    RE_RUN = "when re-run"
    """They are FAILED, and rest: only if somebody reschedules them."""

    __str__ = str.__str__


class Concern(BaseModel):
    """Executions of one template to which new code would do the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    when: When
    verdict: Verdict
    """PROBLEM where the new code would park, break or strand them; WARNING where it would only if somebody re-runs
    them, and where they would succeed early."""
    template_name: str
    number: int
    """How many executions."""
    statuses: dict[FlowStatus, int]
    """How many of them have which status."""
    examples: tuple[int, ...]
    """The ids of some, the oldest first."""
    completed: tuple[str, ...] | None = None
    """Of a changed template, and where nothing is left: the tasks that they have completed, or will have, in order."""
    tasks: tuple[str, ...] | None = None
    """Of the same: the tasks that the new code's template has, in order."""
    entries: tuple[str, ...] = ()
    """The entries that are missing; of an unknown type, some of those that have it."""
    type_name: str | None = None
    """The type that is not registered."""
    found: str
    """All of this but the lists and ids, in one line of printable characters."""
    advice: str
    """What to do, in one line of printable characters."""


class Preflight(BaseModel):
    """What was found before a deploy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database: tuple[Finding, ...]
    """Whether the database answers, whether its schema fits, and, if so, that the executions cannot be looked at."""
    unfinished: dict[FlowStatus, int] | None
    """How many executions are unfinished, by status; `None` where they could not be looked at."""
    concerns: tuple[Concern, ...]
    """The problems first, those of the most executions first."""

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        found = {each.verdict for each in self.database} | {each.verdict for each in self.concerns}
        return next((each for each in (Verdict.PROBLEM, Verdict.WARNING) if each in found), Verdict.OK)

    @property
    def schema_fits(self) -> bool:
        """Whether the database has the schema that the new code needs, or a newer one."""
        return any(each.check == "schema" and each.verdict is not Verdict.PROBLEM for each in self.database)


def preflight(
    runner: FlowRunner,
    *,
    engine: Engine | None = None,
    schema: str | None = None,
    elsewhere: Collection[str] = (),
    examples: int = EXAMPLES,
) -> Preflight:
    """Say what this runner's templates and this process' types would do to the unfinished executions of a database.

    It reads one state of the database, in one transaction that PostgreSQL knows to be read-only, while workers go on;
    what they do afterwards it cannot know. A role that may read is enough. It writes nothing, raises nothing that the
    database says, and needs memory for what differs, not for each execution.

    A context that was damaged is left out: it is parked whatever is deployed.

    Args:
        runner: with the new code's templates.
        engine: of the database, should that be another one than the runner's; default the runner's.
        schema: the named schema there (PostgreSQL only); default the runner's, or with `engine` the connection's own.
        elsewhere: templates that other applications run on the same database: nothing is said of their executions.
        examples: how many ids a concern names at most; default 5.

    Raises:
        InvalidArgumentError, InvalidNameError: an argument that cannot be used.
        DatabaseUrlError: an engine that is neither PostgreSQL's nor SQLite's.
    """
    if not isinstance(runner, FlowRunner):
        raise InvalidArgumentError("runner", runner, "a FlowRunner")
    if not is_positive_int(examples):
        raise InvalidArgumentError("examples", examples, "an int of at least 1")
    if isinstance(elsewhere, str):
        raise InvalidArgumentError("elsewhere", elsewhere, "a collection of template names")
    left_alone = {valid_name("template", name) for name in elsewhere}
    if engine is None:
        engine, schema = runner.service.engine, schema or runner.service.schema
    database = reach(engine, schema)
    if not _has_tables(engine, schema):
        return Preflight(database=tuple(database), unfinished=None, concerns=())
    try:
        with open_unfinished(engine, build_tables(schema)) as unfinished:
            counts = unfinished.counts()
            concerns = _concerns(
                (each for each in unfinished.standings(examples) if each.template_name not in left_alone),
                runner.templates,
                examples,
            )
    except SQLAlchemyError as error:
        found = one_line(f"cannot be looked at: {said(error)}", LONGEST_TEXT)
        database.append(Finding(check="executions", verdict=Verdict.PROBLEM, found=found))
        return Preflight(database=tuple(database), unfinished=None, concerns=())
    return Preflight(database=tuple(database), unfinished=counts, concerns=tuple(concerns))


def _has_tables(engine: Engine, schema: str | None) -> bool:
    """Whether there is something to look at: also on a schema that is behind, since migrations only add to it."""
    try:
        return database_schema.current(engine, schema=schema) is not None
    except SQLAlchemyError:
        return False


# --- what becomes of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Remark:
    """What there is to say of a standing, without whom it is about."""

    kind: Kind
    when: When
    completed: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    missing: tuple[str, ...] = ()
    type_name: str | None = None


@dataclass
class _Affected:
    """Whom a remark is about."""

    statuses: Counter[FlowStatus] = field(default_factory=Counter)
    examples: list[int] = field(default_factory=list)
    entries: set[str] = field(default_factory=set)

    def add(self, standing: Standing, entries: Iterable[str], examples: int) -> None:
        self.statuses[standing.status] += standing.number
        self.examples = sorted([*self.examples, *standing.examples])[:examples]
        self.entries = set(sorted(self.entries.union(entries))[:examples])


def _concerns(standings: Iterable[Standing], templates: Mapping[str, FlowTemplate], examples: int) -> list[Concern]:
    """What there is to say of them; what is the same is said once."""
    affected: dict[tuple[str, _Remark], _Affected] = {}
    for standing in standings:
        for remark, entries in _remarks(standing, templates.get(standing.template_name)):
            affected.setdefault((standing.template_name, remark), _Affected()).add(standing, entries, examples)
    concerns = [_concern(name, remark, those) for (name, remark), those in affected.items()]
    return sorted(concerns, key=lambda each: (each.verdict is not Verdict.PROBLEM, -each.number, each.template_name))


def _remarks(standing: Standing, template: FlowTemplate | None) -> Iterator[tuple[_Remark, Iterable[str]]]:
    """What becomes of them, decided by what decides it when they are claimed; with the entries that it is about."""
    when = When.RE_RUN if standing.status is FlowStatus.FAILED else When.TAKEN_UP
    if template is None:
        yield _Remark(Kind.UNKNOWN_TEMPLATE, when), ()
        return
    if not _begins_with(template, standing.completed):
        yield _Remark(Kind.CHANGED_TEMPLATE, when, standing.completed, template.task_names), ()
    elif template.get_task(standing.task_index) is None:
        yield _Remark(Kind.NOTHING_LEFT, when, standing.completed, template.task_names), ()
        return
    else:
        if standing.running is not None and not _begins_with(template, (*standing.completed, standing.running)):
            ended = (*standing.completed, standing.running)
            yield _Remark(Kind.CHANGED_TEMPLATE, When.TASK_ENDED, ended, template.task_names), ()
        missing = _missing(template, standing)
        if missing:
            yield _Remark(Kind.MISSING_INPUTS, when, missing=missing), missing
    unknown: dict[str, list[str]] = {}
    for entry, type_names in standing.types.items():
        for type_name in type_names:
            if not _is_known(type_name):
                unknown.setdefault(type_name, []).append(entry)
    for type_name, entries in unknown.items():
        yield _Remark(Kind.UNKNOWN_TYPE, when, type_name=type_name), entries


def _begins_with(template: FlowTemplate, completed: Sequence[str]) -> bool:
    try:
        template.check_completed(completed)
    except TemplateMismatchError:
        return False
    return True


def _missing(template: FlowTemplate, standing: Standing) -> tuple[str, ...]:
    """The entries that the flow requires of one that has not begun, and that the tasks still to come require."""
    missing: dict[str, None] = {}
    if not standing.completed:
        try:
            template.check_inputs(standing.types)
        except MissingInputError as error:
            missing.update(dict.fromkeys(error.missing))
    present = {*standing.types, *missing}
    for task in template.tasks[standing.task_index :]:
        missing.update({item.name: None for item in task.inputs() if item.required and item.name not in present})
        present.update(missing, (item.name for item in task.outputs()))
    return tuple(missing)


def _is_known(type_name: str) -> bool:
    return is_builtin_name(type_name) or REGISTRY.registration_named(type_name) is not None


# --- words ------------------------------------------------------------------------------------------------------------


def _concern(template_name: str, remark: _Remark, affected: _Affected) -> Concern:
    is_certain = remark.when is When.TAKEN_UP and remark.kind is not Kind.NOTHING_LEFT
    number = affected.statuses.total()
    entries = remark.missing or tuple(sorted(affected.entries))
    whom = f"{number:,} {'execution' if number == 1 else 'executions'}"
    return Concern(
        kind=remark.kind,
        when=remark.when,
        verdict=Verdict.PROBLEM if is_certain else Verdict.WARNING,
        template_name=template_name,
        number=number,
        statuses={status: affected.statuses[status] for status in FlowStatus if affected.statuses[status]},
        examples=tuple(affected.examples),
        completed=remark.completed,
        tasks=remark.tasks,
        entries=entries,
        type_name=remark.type_name,
        found=one_line(f"{whom} {_found(remark, entries)}", LONGEST_TEXT),
        advice=one_line(_advice(template_name, remark, affected.examples[0]), LONGEST_TEXT),
    )


def _found(remark: _Remark, entries: Sequence[str]) -> str:
    again = " again" if remark.when is When.RE_RUN else ""
    if remark.kind is Kind.UNKNOWN_TEMPLATE:
        return f"would not be taken up{again}: this code has no template of that name"
    if remark.kind is Kind.MISSING_INPUTS:
        return f"would fail{again} {remark.when}: the context lacks {', '.join(entries)}"
    if remark.kind is Kind.UNKNOWN_TYPE:
        where = ", ".join(entries)
        return f"would fail{again} {remark.when} and {where} is read: type {remark.type_name} is not registered"
    if remark.kind is Kind.NOTHING_LEFT:
        return f"would succeed {remark.when} and run nothing more: the template ends with what they have done"
    assert remark.completed is not None, "a changed template is told by what was completed"
    changed = _change(remark.completed, remark.tasks or ())
    if remark.when is When.TASK_ENDED:
        return f"may be parked, if {remark.completed[-1]} ends under the old code: {changed}"
    return f"would be parked{again} {remark.when}: {changed}"


def _change(completed: Sequence[str], tasks: Sequence[str]) -> str:
    same = common_beginning(completed, tasks)
    if same < len(tasks):
        return f"task {same + 1} was {completed[same]}, and is {tasks[same]} now"
    return f"task {same + 1}, {completed[same]}, is gone"


def _advice(template_name: str, remark: _Remark, example: int) -> str:
    if remark.kind is Kind.UNKNOWN_TEMPLATE:
        return (
            "register it until they are through, or cancel them; if another application runs it: "
            f"--elsewhere {shlex.quote(template_name)}"
        )
    if remark.kind is Kind.MISSING_INPUTS:
        return (
            "give the parameter a default, or let the old code finish these first; what has failed goes on with "
            "service.update_flow_status(id, FlowStatus.RESCHEDULED, context=...)"
        )
    if remark.kind is Kind.UNKNOWN_TYPE:
        return f'register_type(YourClass, name="{remark.type_name}"), or declare it in a template'
    if remark.kind is Kind.NOTHING_LEFT:
        return "right if the tasks that are gone are not needed any more; else let the old code finish these first"
    if remark.when is When.TASK_ENDED:
        return "look again once the old workers have stopped"
    assert remark.completed is not None, "a changed template is told by what was completed"
    return _way_out_of_mismatch(remark.completed, remark.tasks or (), remark.when, example)


def _way_out_of_mismatch(completed: Sequence[str], tasks: Sequence[str], when: When, example: int) -> str:
    same = common_beginning(completed, tasks)
    before = "" if when is When.RE_RUN else "let the old code finish these first, or put new tasks after those done; "
    goes_on = f"goes on at {tasks[same]}" if same < len(tasks) else "goes on to its end"
    command = f"ebbs runs reschedule {example} --from-task {shlex.quote(completed[same])}"
    return f"{before}once parked, each {goes_on} with {command}"


def common_beginning(completed: Sequence[str], tasks: Sequence[str]) -> int:
    """How many tasks at the beginning are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(completed, tasks, strict=False)))
