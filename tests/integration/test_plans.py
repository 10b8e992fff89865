"""Every statement finds its rows by an index, however many other rows there are."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, event, text

from ebbs_and_flows import FlowExecution, FlowFilter, FlowService, FlowStatus, FlowTemplate
from ebbs_and_flows.checkpoints import Checkpoint, Claim
from ebbs_and_flows.executions import RUNNABLE_STATUSES
from ebbs_and_flows.outcomes import Failed, Success
from ebbs_and_flows.persistence.inspection import Inspection
from ebbs_and_flows.verdicts import checkpoint_of, judge
from tests.integration.flows import Outside, Step

LEASE_SECONDS = 600.0

TEMPLATE = FlowTemplate("t", [Step(Outside(), "task 0"), Step(Outside(), "task 1")])
TEMPLATES = {"t": TEMPLATE}
LOST_TEMPLATES = {"lost": FlowTemplate("lost", TEMPLATE.tasks)}
"""Of the executions whose leases have expired: what they become is in nobody else's way."""

# --- a large database ---------------------------------------------------------------------------------------------

TABLES = ("ebbs_flow_executions", "ebbs_task_executions", "ebbs_flow_transitions")


@dataclass(frozen=True)
class Kind:
    """Executions that are alike, as the library leaves them behind."""

    count: int
    status: str
    step: int
    template: str = "t"
    queue: str = "default"
    index: int = 0
    due_in_seconds: int = -3600
    lease_seconds: int | None = None
    is_at_rest: bool = False


KINDS = (
    Kind(50_000, "SUCCEEDED", 6, index=2, is_at_rest=True),
    Kind(20_000, "SCHEDULED", 2),
    Kind(1_000, "SCHEDULED", 2, queue="mails", due_in_seconds=-60),
    Kind(300, "FAILED", 5, is_at_rest=True),
    Kind(300, "RESCHEDULED", 5, due_in_seconds=7200),
    Kind(280, "RUNNING", 4, lease_seconds=7200),
    Kind(20, "RUNNING", 4, template="lost", lease_seconds=-60),
)

HAVE_RUN = "status <> 'SCHEDULED'"

TRANSITIONS = (  # step, from, to, when it was, of which executions
    ("1", "NULL", "'CREATED'", "created_at", "1 = 1"),
    ("2", "'CREATED'", "'SCHEDULED'", "created_at", "1 = 1"),
    ("3", "'SCHEDULED'", "'RUNNING'", "started_at", HAVE_RUN),
    ("execution_step", "'RUNNING'", "status", "updated_at", "status NOT IN ('SCHEDULED', 'RUNNING')"),
)
ATTEMPTS = (  # index, how it ended, of which executions
    (0, "CASE WHEN status IN ('SUCCEEDED', 'RUNNING') THEN status ELSE 'FAILED' END", HAVE_RUN),
    (1, "'SUCCEEDED'", "status = 'SUCCEEDED'"),
)


def fill(connection: Connection) -> None:
    """Insert executions of all kinds with their attempts and transitions, each execution with an idempotency key."""
    for kind in KINDS:
        _add_executions(connection, kind)
    for step, before, after, at, which in TRANSITIONS:
        entries = '\'{"n":1}\', \'{"n":"int"}\'' if step == "1" else "NULL, NULL"
        connection.exec_driver_sql(
            "INSERT INTO ebbs_flow_transitions (flow_execution_id, flow_execution_step, from_status, to_status, at, "
            "task_index, entries, entry_types) "
            f"SELECT execution_id, {step}, {before}, {after}, {at}, 0, {entries} FROM ebbs_flow_executions "
            f"WHERE {which}"
        )
    for index, status, which in ATTEMPTS:
        connection.exec_driver_sql(
            "INSERT INTO ebbs_task_executions (flow_execution_id, flow_execution_step, task_index, name, attempt, "
            "epoch, status, failure, entries, entry_types, started_at, finished_at, worker) "
            f"SELECT execution_id, {4 + index}, {index}, 'task {index}', 1, 1, {status}, "
            "CASE WHEN status IN ('FAILED', 'RESCHEDULED') THEN 'EXCEPTION' END, "
            f"CASE WHEN status = 'SUCCEEDED' THEN '{{\"task {index}\":1}}' END{_json(connection)}, "
            f"CASE WHEN status = 'SUCCEEDED' THEN '{{\"task {index}\":\"int\"}}' END{_json(connection)}, "
            "started_at, CASE WHEN status <> 'RUNNING' THEN updated_at END, 'another' "
            f"FROM ebbs_flow_executions WHERE {which}"
        )


def _add_executions(connection: Connection, kind: Kind) -> None:
    def moment(seconds: str) -> str:
        if connection.dialect.name == "sqlite":
            return f"strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds') || '000'"
        return f"now() + ({seconds}) * interval '1 second'"

    has_run = kind.status != "SCHEDULED"
    values = {
        "template_name": f"'{kind.template}'",
        "status": f"'{kind.status}'",
        "execution_step": kind.step,
        "current_task_index": kind.index,
        "epoch": 1 if has_run else 0,
        "priority": 0,
        "queue": f"'{kind.queue}'",
        "idempotency_key": f"'{kind.template} {kind.queue} {kind.status} ' || i",
        "run_at": moment(f"{kind.due_in_seconds} + i * 0.001"),
        "created_at": moment("i * 0.001 - 7200"),
        "updated_at": moment("i * 0.001 - 7200"),
        "started_at": moment("i * 0.001 - 7200") if has_run else "NULL",
        "finished_at": moment("i * 0.001 - 7200") if kind.is_at_rest else "NULL",
        "lease_owner": "NULL" if kind.lease_seconds is None else "'another'",
        "lease_expires_at": "NULL" if kind.lease_seconds is None else moment(str(kind.lease_seconds)),
    }
    connection.exec_driver_sql(
        f"INSERT INTO ebbs_flow_executions ({', '.join(values)}) "
        f"WITH RECURSIVE series(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM series WHERE i < {kind.count}) "
        f"SELECT {', '.join(str(value) for value in values.values())} FROM series"
    )


def _json(connection: Connection) -> str:
    return "" if connection.dialect.name == "sqlite" else "::json"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str:
    """The kind of database: here, one for all tests of this module."""
    return str(request.param)


@pytest.fixture(scope="module")
def database_url(
    database: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a database that all tests of this module share."""
    if database == "sqlite":
        template_file: Path = request.getfixturevalue("sqlite_template")
        yield f"sqlite:///{shutil.copy(template_file, tmp_path_factory.mktemp('large') / 'flows.db')}"
    else:
        server = request.getfixturevalue("postgres_server")
        url = server.create_database(template=request.getfixturevalue("postgres_template"))
        yield url.render_as_string(hide_password=False)
        server.drop_database(url)


@pytest.fixture(scope="module")
def service(database_url: str) -> Iterator[FlowService]:
    """A service on a database with many rows, of which the planner has been told."""
    with FlowService(database_url) as service:
        with service.engine.begin() as connection:
            fill(connection)
        if service.engine.dialect.name == "postgresql":  # SQLite makes its plans by rules
            with service.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text(f"VACUUM (ANALYZE) {', '.join(TABLES)}"))
        yield service


# --- the plans ----------------------------------------------------------------------------------------------------

EXECUTIONS, ATTEMPTS_KEY, TRANSITIONS_KEY = (f"{table}_pkey" for table in TABLES)
DUE = "ix_ebbs_flow_executions_due"
QUEUE = "ix_ebbs_flow_executions_queue"
RUNNING = "ix_ebbs_flow_executions_running"
RETRY = "ix_ebbs_flow_executions_retry"
FAILED = "ix_ebbs_flow_executions_failed"
IDEMPOTENCY_KEY = "uq_ebbs_flow_executions_idempotency_key"

PARTIAL = {DUE, QUEUE, RUNNING, RETRY, FAILED}
"""Indexes of what waits, runs or has failed alone: reading one from its beginning does not read the whole table."""

USES = 7
"""How often a statement is planned: PostgreSQL keeps one plan for all parameters after five uses, if it costs no more
(https://www.postgresql.org/docs/current/sql-prepare.html#SQL-PREPARE-NOTES).
"""


@dataclass(frozen=True)
class Plan:
    """How the database finds the rows for one statement."""

    statement: str
    text: str
    searched: frozenset[str]
    """The indexes in which it looks for something."""
    walked: frozenset[str]
    """The indexes, and the tables without any, that it reads from one end on."""
    sorts: bool
    """Whether rows are sorted that an index does not have in the order asked for."""


@contextmanager
def plans_of(service: FlowService) -> Iterator[list[Plan]]:
    """The plans of all statements about the library's tables that the service sends within; there at the end."""
    sent: dict[str, Any] = {}
    plans: list[Plan] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if not statement.lstrip().startswith("CREATE") and any(name in statement for name in (*TABLES, VIEW)):
            sent[statement] = parameters

    event.listen(service.engine, "before_cursor_execute", note)
    try:
        yield plans
    finally:
        event.remove(service.engine, "before_cursor_execute", note)
    assert sent
    explain = _explain_on_sqlite if service.engine.dialect.name == "sqlite" else _explain_on_postgresql
    with service.engine.connect() as connection:  # rolled back
        for statement, parameters in sent.items():
            plans += explain(connection, statement, parameters)


def check(plans: list[Plan], *uses: str, walks: str | None = None, in_order: bool = False) -> None:
    """No plan reads a whole table or the whole of an index that is as large; these indexes are among those used.

    Args:
        walks: the one large index that may be read from one end on, as far as rows are asked for.
        in_order: whether a statement with a LIMIT may not sort first.
    """
    for plan in plans:
        what = f"{plan.statement}\n\n{plan.text}"
        assert plan.walked <= PARTIAL | {walks}, f"reads all of {sorted(plan.walked)}: {what}"
        assert not (in_order and plan.sorts and "LIMIT" in plan.statement), f"sorts: {what}"
    used = {index for plan in plans for index in plan.searched | plan.walked}
    assert set(uses) <= used, "\n\n".join(plan.text for plan in plans)


VIEW = "ebbs_checkpoints"
"""What a batch of checkpoints is inserted into on SQLite."""

GIVEN = {"given", "json_each", "numbers", "CONSTANT", "SUBQUERY"}
"""What SQLite calls rows that come with the statement."""

_SQLITE_STEP = re.compile(
    r"(?P<how>SEARCH|SCAN) (TABLE )?(?P<table>\w+)"
    r"( USING (?P<automatic>AUTOMATIC )?(PARTIAL )?(COVERING )?(INDEX (?P<index>\w+)|INTEGER PRIMARY KEY))?"
)


def _explain_on_sqlite(connection: Connection, statement: str, parameters: Any) -> list[Plan]:
    if VIEW in statement:
        # Of what triggers do, nothing is said: their statements are explained one by one.
        triggers = connection.exec_driver_sql("SELECT sql FROM sqlite_temp_master WHERE type = 'trigger'").scalars()
        bodies = [re.sub(r"NEW\.\w+", "1", trigger.partition("BEGIN")[2]) for trigger in triggers]
        done = [each for body in bodies for each in re.findall(r"(?:UPDATE|INSERT)[^;]+", body)]
        assert len(done) == 6
        return [plan for each in done for plan in _explain_on_sqlite(connection, each, ())]
    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    details = [row.detail for row in rows]
    searched, walked = set(), set()
    for step in filter(None, map(_SQLITE_STEP.match, details)):
        if step["table"] in GIVEN or step["table"].isdigit():
            continue
        # A table with an integer key is that key's index.
        whole = EXECUTIONS if step["table"] in ("ebbs_flow_executions", "execution") else step["table"]
        index = re.sub(r"sqlite_autoindex_(\w+)_1", r"\1_pkey", step["index"] or whole)
        (searched if step["how"] == "SEARCH" and not step["automatic"] else walked).add(index)
    sorts = any(each.startswith("USE TEMP B-TREE FOR") and "ORDER BY" in each for each in details)
    return [Plan(statement, "\n".join(details), frozenset(searched), frozenset(walked), sorts)]


_POSTGRESQL_NODE = re.compile(
    r"(?:Index (?:Only )?Scan (?:Backward )?using (\w+) on|Bitmap Index Scan on (\w+)|Seq Scan on) ?(?:\w+\.)?(\w+)?"
)


def _explain_on_postgresql(connection: Connection, statement: str, parameters: Any) -> list[Plan]:
    """The plans that a connection makes for the statement, as often as it uses it."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    prepared = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", statement).replace("%%", "%")
    given = f"({', '.join(f'%({name})s' for name in names)})" if names else ""
    with psycopg.ClientCursor(connection.connection.driver_connection) as cursor:
        cursor.execute(f"PREPARE planned AS {prepared}")
        texts = []
        for _ in range(USES):
            cursor.execute(f"EXPLAIN (COSTS OFF) EXECUTE planned{given}", parameters)
            texts.append("\n".join(line for (line,) in cursor))
        cursor.execute("DEALLOCATE planned")
    return [_read_postgresql_plan(statement, plan) for plan in dict.fromkeys(texts)]


def _read_postgresql_plan(statement: str, plan: str) -> Plan:
    searched, walked = set(), set()
    nodes = re.split(r"\n(?= *(?:->|CTE |InitPlan|SubPlan))", plan)
    for node in nodes:
        found = _POSTGRESQL_NODE.search(node)
        if found is not None:
            name = found[1] or found[2] or found[3]
            (searched if "Index Cond:" in node else walked).add(name)
    sorts = re.search(r"^ *(->  )?(Incremental )?Sort\b(?! Key)", plan, re.MULTILINE) is not None
    return Plan(statement, plan, frozenset(searched), frozenset(walked), sorts)


# --- what is done -------------------------------------------------------------------------------------------------


def claim(service: FlowService, limit: int, **options: Any) -> list[Claim]:
    claims = service.claim(TEMPLATES, RUNNABLE_STATUSES, "me", lease_seconds=LEASE_SECONDS, limit=limit, **options)
    assert len(claims) == limit
    return claims


def end_of(claim: Claim, outcome: Success | Failed | None = None) -> Checkpoint:
    """The checkpoint with which its attempt ends; by default it has succeeded."""
    assert claim.attempt is not None
    outcome = outcome or Success(claim.context.copy(done=True).delta_from(claim.context))
    verdict = judge(TEMPLATE.tasks[0], outcome, claim.counts_of(claim.attempt.name))
    return checkpoint_of(claim, TEMPLATE, verdict, LEASE_SECONDS)


def one_of(service: FlowService, status: FlowStatus) -> FlowExecution:
    """An execution that is neither the first nor the last of its status."""
    newest = service.find_flow_executions(FlowFilter(statuses={status}), with_contexts=False)
    return newest[len(newest) // 2]


@pytest.mark.parametrize("limit", [1, 100])
def test_a_claim_takes_the_first_due_executions_in_order(service: FlowService, limit: int) -> None:
    with plans_of(service) as plans:
        claim(service, limit)
    check(plans, DUE, EXECUTIONS, in_order=True)


@pytest.mark.parametrize("limit", [1, 100])
def test_a_claim_from_a_queue_does_not_pass_by_what_waits_in_others(service: FlowService, limit: int) -> None:
    with plans_of(service) as plans:
        claim(service, limit, queues=["mails"])
    check(plans, QUEUE, EXECUTIONS, in_order=True)


@pytest.mark.parametrize("limit", [1, 100])
def test_a_claim_from_several_queues_takes_the_first_due_executions_in_order(service: FlowService, limit: int) -> None:
    with plans_of(service) as plans:
        claim(service, limit, queues=["default", "mails"])
    # SQLite takes one queue after the other, each in order, and leaves one once the LIMIT is full of earlier ones.
    check(plans, EXECUTIONS, in_order=service.engine.dialect.name == "postgresql")


def test_a_bound_of_a_queue_counts_what_is_running(service: FlowService) -> None:
    with plans_of(service) as plans:
        claim(service, 1, queues=["default"], max_in_flight={"default": 10_000})
    check(plans, RUNNING, EXECUTIONS, in_order=True)


def test_a_claim_of_one_execution_finds_it_by_its_id(service: FlowService) -> None:
    waiting = one_of(service, FlowStatus.SCHEDULED)
    with plans_of(service) as plans:
        claim(service, 1, only=waiting.execution_id)
    check(plans, EXECUTIONS)


@pytest.mark.parametrize("outcome", [None, Failed(ValueError("no"))], ids=["goes on", "rests"])
def test_a_checkpoint_finds_its_execution_and_attempt(service: FlowService, outcome: Failed | None) -> None:
    [held] = claim(service, 1)
    with plans_of(service) as plans:
        assert service.checkpoint(end_of(held, outcome)) is not None
    check(plans, EXECUTIONS, ATTEMPTS_KEY)


@pytest.mark.parametrize("count", [1, 2, 100, 500])
def test_a_batch_of_checkpoints_finds_their_executions_and_attempts(service: FlowService, count: int) -> None:
    claims = claim(service, count)
    checkpoints = [end_of(each, Failed(ValueError("no")) if n % 2 else None) for n, each in enumerate(claims)]
    with plans_of(service) as plans:
        recorded, _ = service.turn(checkpoints)
    assert len(recorded) == count
    assert None not in recorded.values()
    check(plans, EXECUTIONS, ATTEMPTS_KEY)


@pytest.mark.parametrize("count", [1, 100])
def test_a_renewal_finds_what_is_held(service: FlowService, count: int) -> None:
    held = {each.execution.execution_id: each.execution.epoch for each in claim(service, count)}
    taken = one_of(service, FlowStatus.RUNNING)  # another worker's: it is looked up once more
    with plans_of(service) as plans:
        assert service.renew("me", {**held, taken.execution_id: taken.epoch + 1}, lease_seconds=LEASE_SECONDS)
        assert service.no_longer_held(held) == set()
    check(plans)


def test_what_a_worker_holds_is_found_among_what_is_running(service: FlowService) -> None:
    with plans_of(service) as plans:
        assert service.held_by("another")
    check(plans, RUNNING)


def test_expired_leases_are_found_among_what_is_running(service: FlowService) -> None:
    with plans_of(service) as plans:
        assert service.recover_expired(LOST_TEMPLATES, limit=2)
    check(plans, RUNNING, EXECUTIONS, ATTEMPTS_KEY)


@pytest.mark.parametrize(("queues", "index"), [(None, DUE), (["mails"], QUEUE)], ids=["of all queues", "of a queue"])
def test_the_next_due_execution_is_the_first_in_its_index(
    service: FlowService, queues: list[str] | None, index: str
) -> None:
    with plans_of(service) as plans:
        assert service.seconds_until_next(TEMPLATES, queues) == 0.0
    check(plans, RETRY, index, in_order=True)


@pytest.mark.parametrize("status", [FlowStatus.SCHEDULED, FlowStatus.RESCHEDULED])
def test_the_next_runnable_flow_is_the_first_in_its_index(service: FlowService, status: FlowStatus) -> None:
    with plans_of(service) as plans:
        service.get_runnable_flow(status)
    check(plans, DUE, in_order=True)


def test_an_idempotency_key_is_found_by_its_index(service: FlowService) -> None:
    with plans_of(service) as plans:
        scheduled = service.schedule("t", idempotency_key="t default SUCCEEDED 17")
        assert service.schedule("t", idempotency_key="new") != scheduled
    assert service.get_flow_execution(scheduled).idempotency_key == "t default SUCCEEDED 17"
    check(plans, IDEMPOTENCY_KEY)


def test_a_bulk_of_executions_is_added_by_key(service: FlowService) -> None:
    with plans_of(service) as plans:
        assert len(service.schedule_many("later", [{"n": n} for n in range(100)], delay=3600)) == 100
    check(plans, EXECUTIONS)


def test_a_failed_execution_is_rescheduled_by_its_id(service: FlowService) -> None:
    failed = one_of(service, FlowStatus.FAILED)
    with plans_of(service) as plans:
        service.reschedule(failed.execution_id)
        service.cancel(failed.execution_id)
    check(plans, EXECUTIONS, ATTEMPTS_KEY, TRANSITIONS_KEY)


def test_an_execution_is_read_with_its_context_by_its_id(service: FlowService) -> None:
    execution_id = one_of(service, FlowStatus.SUCCEEDED).execution_id
    with plans_of(service) as plans:
        assert len(service.get_flow_execution(execution_id).execution_context) == 3
    check(plans, EXECUTIONS, ATTEMPTS_KEY, TRANSITIONS_KEY)


def test_the_history_of_an_execution_is_read_by_its_id(service: FlowService) -> None:
    execution_id = one_of(service, FlowStatus.SUCCEEDED).execution_id
    with plans_of(service) as plans:
        assert len(service.get_task_executions(execution_id)) == 2
        assert len(service.get_flow_status_history(execution_id)) == 4
    check(plans, EXECUTIONS, ATTEMPTS_KEY, TRANSITIONS_KEY)


@pytest.mark.parametrize(
    ("status", "index"),
    [(FlowStatus.FAILED, FAILED), (FlowStatus.RUNNING, RUNNING)],
)
def test_executions_are_found_by_status_in_its_index(service: FlowService, status: FlowStatus, index: str) -> None:
    with plans_of(service) as plans:
        assert service.find_flow_executions(FlowFilter(statuses={status}))
    check(plans, index, ATTEMPTS_KEY, TRANSITIONS_KEY)


def test_an_execution_is_found_by_its_idempotency_key(service: FlowService) -> None:
    with plans_of(service) as plans:
        assert len(service.find_flow_executions(FlowFilter(idempotency_key="t default SUCCEEDED 17"))) == 1
    check(plans, IDEMPOTENCY_KEY, ATTEMPTS_KEY, TRANSITIONS_KEY)


@pytest.mark.parametrize(
    "criteria",
    [FlowFilter(), FlowFilter(before_id=20_000), FlowFilter(template_name="t"), FlowFilter(queue="default")],
    ids=["all", "next page", "template", "queue"],
)
def test_the_newest_executions_are_read_from_the_end(service: FlowService, criteria: FlowFilter) -> None:
    with plans_of(service) as plans:
        assert len(service.find_flow_executions(criteria)) == 100
    check(plans, EXECUTIONS, ATTEMPTS_KEY, TRANSITIONS_KEY, walks=EXECUTIONS, in_order=True)


@pytest.mark.parametrize(
    ("ask", "index"),
    [
        (Inspection.expired, RUNNING),
        (Inspection.queues_at_work, RUNNING),
        (Inspection.retries, RETRY),
        (lambda inspection: inspection.failed(86_400), FAILED),
    ],
    ids=["expired", "queues at work", "retries", "failed"],
)
def test_a_diagnosis_reads_what_is_running_waits_for_a_retry_or_has_failed(
    service: FlowService, ask: Callable[[Inspection], object], index: str
) -> None:
    with plans_of(service) as plans, service.inspected() as inspection:
        assert ask(inspection)
    check(plans, index)
