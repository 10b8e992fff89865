"""Names: refused everywhere, or kept exactly."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from ebbs_and_flows import (
    ExecutionContext,
    FlowFilter,
    FlowRunner,
    FlowStatus,
    FlowTemplate,
    FunctionTask,
    TaskDataItem,
    task,
)
from tests.integration.bad_input.suspects import (
    NoRepr,
    Suspect,
    all_refused,
    begin,
    cases,
    nothing,
    schedule,
)

# --- names: refused everywhere, or kept exactly --------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    id: str
    name: Any


BAD_NAMES = [
    Name("empty", ""),
    Name("a space", " "),
    Name("tabs", "\t\t"),
    Name("a no-break space", "\u00a0"),
    Name("256 characters", "n" * 256),
    Name("more than 255 characters once it is normalised", "\u0958" * 128),
    Name("NUL", "a\x00b"),
    Name("a control character", "a\x1bb"),
    Name("a C1 control character", "a\x85b"),
    Name("a line feed at the end", "name\n"),
    Name("a lone surrogate", "a\udc80b"),
    Name("an int", 17),
    Name("an int of 5001 digits", 10**5000),
    Name("a bool", True),
    Name("None", None),
    Name("bytes", b"name"),
    Name("a tuple", ("name",)),
    Name("an object without repr", NoRepr()),
]


@pytest.mark.parametrize("case", cases(BAD_NAMES))
def test_a_bad_name_is_refused_wherever_one_is_given(case: Name, runner: FlowRunner) -> None:
    service, bad = runner.service, case.name
    execution_id = schedule(runner, Suspect(lambda context: None))
    runner.run_until_idle()
    nameless = Suspect(lambda context: context)
    nameless.name = bad
    calls: dict[str, Callable[[], object]] = {
        "entry": lambda: runner.schedule_flow("flow", {"order": 17, bad: 1}),
        "entry, set": lambda: ExecutionContext().set(bad, 1),
        "entry, copy": lambda: ExecutionContext().copy({bad: 1}),
        "entry, create": lambda: service.create_flow_execution("flow", {bad: 1}),
        "entry, update": lambda: service.update_flow_status(execution_id, FlowStatus.RESCHEDULED, {bad: 1}),
        "data item": lambda: TaskDataItem(bad),
        "task": lambda: FlowTemplate("other", [nameless]),
        "template": lambda: FlowTemplate(bad, [begin]),
        "template, schedule": lambda: runner.schedule_flow(bad, {"order": 17}),
        "template, get": lambda: runner.get_flow_template(bad),
        "template, service": lambda: service.schedule(bad, {"order": 17}),
        "template, create": lambda: service.create_flow_execution(bad, {"order": 17}),
        "queue": lambda: runner.schedule_flow("flow", {"order": 17}, queue=bad),
    }
    if bad is not None:  # which means that there is no key, that a function's own name is taken, and so on
        calls |= {
            "idempotency key": lambda: runner.schedule_flow("flow", {"order": 17}, idempotency_key=bad),
            "task, add": lambda: FlowTemplate("other").add_task(begin, name=bad),
            "task, function": lambda: task(name=bad)(begin.function),
            "from_task": lambda: runner.reschedule_flow_execution(execution_id, from_task=bad),
        }
    if isinstance(bad, str):
        calls["output"] = lambda: task(outputs=bad)(begin.function)
    all_refused(service, ValueError, calls)


GOOD_NAMES = [
    Name("quotes", 'it\'s "quoted" `so` \\ and so'),
    Name("dots and slashes", "../shop.orders/[0].price"),
    Name("emoji", "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea"),
    Name("right to left", "\u0637\u0644\u0628 \u202e17\u202c \u05d4\u05d6\u05de\u05e0\u05d4"),
    Name("the tag of the codec", "$type"),
    Name("a percent format", "%s %(name)s 100%"),
    Name("a bound parameter", ":x :new_name ::json $1 ?"),
    Name("a brace format", "{} {0} {name}"),
    Name("SQL", "'; DROP TABLE ebbs_flow_executions; --"),
    Name("JSON", '{"$type": "int", "value": 1}'),
    Name("null", "null"),
    Name("spaces around", "  name  "),
    Name("255 characters", "n" * 255),
    Name("255 characters outside the BMP", "\U0001f30a" * 255),
    Name("255 characters once it is normalised", "e\u0301" * 255),
    Name("ligatures and full-width letters", "\ufb01\uff21"),
]


@pytest.mark.parametrize("case", cases(GOOD_NAMES))
def test_an_odd_name_is_kept_exactly(case: Name, runner: FlowRunner) -> None:
    name, stored = case.name, unicodedata.normalize("NFC", case.name)
    template = FlowTemplate(name)
    template.add_task(Suspect(lambda context: context.copy(copied=context[name])), name=name)
    runner.register_flow_template(template)

    execution_id = runner.schedule_flow(name, {name: 17}, queue=name, idempotency_key=name)
    assert runner.schedule_flow(name, {name: 17}, queue=name, idempotency_key=name) == execution_id
    execution = runner.run_flow()

    assert execution is not None
    assert execution.status is FlowStatus.SUCCEEDED
    assert (execution.template_name, execution.queue, execution.idempotency_key) == (stored, stored, stored)
    assert list(execution.execution_context.items()) == [(stored, 17), ("copied", 17)]
    assert [each.name for each in runner.service.get_task_executions(execution_id)] == [stored]
    wanted = FlowFilter(template_name=name, queue=name, idempotency_key=name)
    assert [each.execution_id for each in runner.service.find_flow_executions(wanted)] == [execution_id]


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def test_two_forms_of_one_name_clash(runner: FlowRunner) -> None:
    runner.register_flow_template(FlowTemplate(COMPOSED, [begin]))
    all_refused(
        runner.service,
        ValueError,
        {
            "entry": lambda: runner.schedule_flow(COMPOSED, {"order": 17, COMPOSED: 1, DECOMPOSED: 2}),
            "entry, set": lambda: ExecutionContext({COMPOSED: 1}).set(DECOMPOSED, 2),
            "task": lambda: FlowTemplate(
                "other", [FunctionTask(nothing, name=each) for each in (COMPOSED, DECOMPOSED)]
            ),
            "template": lambda: runner.register_flow_template(FlowTemplate(DECOMPOSED, [begin])),
            "output": lambda: task(outputs=(COMPOSED, DECOMPOSED))(nothing),
            "input": lambda: FlowTemplate("other", inputs=[TaskDataItem(COMPOSED), TaskDataItem(DECOMPOSED)]),
        },
    )


def test_one_name_is_found_under_both_its_forms(runner: FlowRunner) -> None:
    template = FlowTemplate(DECOMPOSED)
    template.add_task(begin, name=DECOMPOSED)
    runner.register_flow_template(template)

    execution_id = runner.schedule_flow(DECOMPOSED, {"order": 17}, idempotency_key=DECOMPOSED)
    assert runner.schedule_flow(COMPOSED, {"order": 17}, idempotency_key=COMPOSED) == execution_id
    assert runner.get_flow_template(DECOMPOSED) is template
    assert template.index_of(DECOMPOSED) == 0
    wanted = FlowFilter(template_name=DECOMPOSED, idempotency_key=DECOMPOSED)
    assert [each.execution_id for each in runner.service.find_flow_executions(wanted)] == [execution_id]
