"""The command line: what it prints where, its exit codes, and that no stored text can do anything to a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from typer.testing import CliRunner, Result

from ebbs_and_flows import (
    ExecutionContext,
    FlowRunner,
    FlowService,
    FlowStatus,
    FlowTemplate,
    RetryPolicy,
    schema,
    task,
)
from ebbs_and_flows.cli.app import app
from ebbs_and_flows.persistence.databases import create_engine_for
from ebbs_and_flows.persistence.tables import build_tables
from tests.integration.flows import AT_ONCE, Outside, Step

HOSTILE = "[bold red]x[/] \x1b[31m\x1b]0;title\x07 \r\n \x9b31m \u202egnp.exe \u2066 \u200b ` $(id)"

Ebbs = Callable[..., Result]


@dataclass
class Parcel:
    weight: Decimal
    note: str


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Ebbs:
    """The command without any database in its environment."""
    for name in ("EBBS_DATABASE_URL", "EBBS_SCHEMA", "COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object, answer: str | None = None, **environment: str) -> Result:
        result = CliRunner().invoke(app, [str(each) for each in arguments], input=answer, env=environment)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture
def ebbs(bare: Ebbs, database_url: str) -> Ebbs:
    """The command with a database that has the schema."""

    def run(*arguments: object, answer: str | None = None, **environment: str) -> Result:
        return bare(*arguments, answer=answer, EBBS_DATABASE_URL=database_url, **environment)

    return run


def failing_at_b(*failures: Exception, retry: RetryPolicy | None = None) -> FlowTemplate:
    """A template of three steps, the second of which raises these, one a time, before it succeeds."""
    outside = Outside()
    outside.failures = list(failures)
    return FlowTemplate("abc", [Step(Outside(), "a"), Step(outside, "b", retry), Step(Outside(), "c")])


def failed_flow(runner: FlowRunner, message: str = "the bank does not answer", **entries: Any) -> int:
    """An execution of a, b, c that failed at b and would succeed now."""
    runner.register_flow_template(failing_at_b(ConnectionError(message)))
    execution_id = runner.schedule_flow("abc", ExecutionContext(entries))
    runner.run_flow()
    return execution_id


def is_harmless(output: str) -> bool:
    """Whether nothing in it could do more than show a character."""
    return all(character.isprintable() or character == "\n" for character in output)


# --- runs list ----------------------------------------------------------------------------------------------------


def test_what_a_deploy_has_parked_is_re_run_from_the_task_that_differs(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner)
    completed = runner.service.get_task_executions(execution_id)[0].name
    changed = FlowRunner(runner.service)
    changed.register_flow_template(FlowTemplate("abc", [Step(Outside(), "weigh again"), Step(Outside(), "b")]))
    changed.reschedule_flow_execution(execution_id)
    changed.re_run_flow()
    command = f"re-run: ebbs runs reschedule {execution_id} --from-task {completed}\n"
    assert command in ebbs("runs", "list").stdout
    assert command in ebbs("runs", "show", execution_id).stdout


def test_one_command_says_what_failed_and_why_and_how_to_re_run_it(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner)
    listed = ebbs("runs", "list")
    assert listed.exit_code == 0
    for expected in ("abc", "FAILED", "2/… b", "ConnectionError: the bank does not answer"):
        assert expected in listed.stdout
    assert f"re-run: ebbs runs reschedule {execution_id}\n" in listed.stdout
    assert listed.stderr == ""


def test_a_list_is_filtered_and_paged(ebbs: Ebbs, service: FlowService) -> None:
    ids = [service.schedule(f"t{number}", queue=f"q{number % 2}") for number in range(4)]
    service.cancel(ids[0])
    service.create_flow_execution("t5")

    def found(*arguments: object) -> list[str]:
        return [run["template_name"] for run in json.loads(ebbs("runs", "list", "--json", *arguments).stdout)]

    assert found() == ["t5", "t3", "t2", "t1", "t0"]
    assert found("--status", "CANCELLED", "--status", "created") == ["t5", "t0"]
    assert found("--template", "t2") == ["t2"]
    assert found("--queue", "q1") == ["t3", "t1"]
    assert found("--limit", 2) == ["t5", "t3"]
    assert found("--before", ids[1]) == ["t0"]
    assert f"--before {ids[3]}" in ebbs("runs", "list", "--limit", 2).stderr


def test_nothing_is_cut_in_a_pipe(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner, "for this and that reason " * 7)
    name = "a-template-with-a-long-name-" * 9
    runner.service.schedule(name)
    listed = ebbs("runs", "list", COLUMNS="40").stdout
    assert name in listed
    failed_row = next(line for line in listed.splitlines() if line.startswith(f" {execution_id} ") or "FAILED" in line)
    assert failed_row.count("for this and that reason") >= 6


def test_an_empty_list_is_said_on_stderr(ebbs: Ebbs) -> None:
    listed = ebbs("runs", "list")
    assert (listed.exit_code, listed.stdout) == (0, "")
    assert "No executions match" in listed.stderr
    assert json.loads(ebbs("runs", "list", "--json").stdout) == []


# --- runs show ----------------------------------------------------------------------------------------------------


def test_a_run_is_shown_with_its_attempts_failure_context_and_way_out(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner, order_id=17)
    shown = ebbs("runs", "show", execution_id)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert any(line.split()[:3] == ["a", "1", "SUCCEEDED"] for line in lines)
    assert any(line.split()[:3] == ["b", "1", "FAILED"] and "━" in line for line in lines)
    assert "Traceback (most recent call last):" in shown.stdout or "more lines with --full" in shown.stdout
    assert "  ConnectionError: the bank does not answer" in lines
    assert any(line.split() == ["order_id", "int", "17"] for line in lines)
    assert f"re-run: ebbs runs reschedule {execution_id}" in lines
    assert "Traceback (most recent call last):" in ebbs("runs", "show", execution_id, "--full").stdout


def test_each_attempt_and_each_wait_has_its_line_on_the_time_scale(ebbs: Ebbs, runner: FlowRunner) -> None:
    retry = RetryPolicy(max_attempts=3, wait=AT_ONCE)
    runner.register_flow_template(failing_at_b(OSError("not yet"), OSError("not yet"), retry=retry))
    execution_id = runner.schedule_flow("abc")
    runner.run_until_idle()
    lines = ebbs("runs", "show", execution_id).stdout.splitlines()
    attempts = [line.split()[:3] for line in lines if line.split()[1:3] and line.split()[1] in "123" and "ms" in line]
    assert attempts == [
        ["a", "1", "SUCCEEDED"],
        ["b", "1", "FAILED"],
        ["b", "2", "FAILED"],
        ["b", "3", "SUCCEEDED"],
        ["c", "1", "SUCCEEDED"],
    ]


def test_what_comes_next_is_said_of_each_status(ebbs: Ebbs, service: FlowService) -> None:
    created = service.create_flow_execution("t").execution_id
    assert "not scheduled yet" in ebbs("runs", "show", created).stdout
    later = service.schedule("t", delay=30_000)
    assert "It is due in 8h" in ebbs("runs", "show", later).stdout
    due = service.schedule("t", queue="mail")
    assert "queue 'mail'" in ebbs("runs", "show", due).stdout
    service.update_flow_status(due, FlowStatus.RUNNING, lease_seconds=30_000)
    assert "the lease expires in 8h" in ebbs("runs", "show", due).stdout
    executions = build_tables().executions
    with service.engine.begin() as connection:
        connection.execute(executions.update().values(lease_expires_at=datetime(2001, 1, 1, tzinfo=timezone.utc)))
    shown = " ".join(ebbs("runs", "show", due).stdout.split())
    assert "any other one that has the template takes over" in shown
    assert f"ebbs runs cancel {due}" in shown


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_a_run_is_printed_as_json_with_the_names_of_the_records_fields(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner, total=Decimal("12.50"), parcel=Parcel(Decimal("3.2"), "x"), many={1, 2})
    shown = json.loads(ebbs("runs", "show", execution_id, "--json").stdout)
    record = runner.service.get_flow_execution(execution_id)
    assert set(type(record).model_fields) <= set(shown)
    assert shown["status"] == "FAILED"
    assert datetime.fromisoformat(shown["created_at"].replace("Z", "+00:00")) == record.created_at
    parcel_type = shown["entry_types"]["parcel"]
    assert shown["execution_context"] == {
        "total": "12.50",
        "parcel": {"$type": parcel_type, "value": {"weight": "3.2", "note": "x"}},
        "many": [1, 2],
        "a": "a done",
    }
    assert "Parcel" in parcel_type
    assert [(each["name"], each["status"]) for each in shown["task_executions"]] == [
        ("a", "SUCCEEDED"),
        ("b", "FAILED"),
    ]
    assert shown["task_executions"][1]["error_type"] == "ConnectionError"
    assert [each["to_status"] for each in shown["flow_transitions"]] == ["CREATED", "SCHEDULED", "RUNNING", "FAILED"]
    (listed,) = json.loads(ebbs("runs", "list", "--json").stdout)
    assert listed["execution_context"] == shown["execution_context"]
    assert (listed["task_name"], listed["reason"]) == ("b", "ConnectionError: the bank does not answer")


def test_no_value_is_too_odd_to_be_shown(ebbs: Ebbs, service: FlowService) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    odd = {
        "nan": float("nan"),
        "huge": 7**20_000,
        "nul": "\x00",
        "surrogate": "\ud800",
        "bytes": b"\xff" * 1000,
        "deep": deep,
        "keys": {1: 2, (3, 4): 5},
        "long": "x" * 200_000,
        HOSTILE.encode("unicode_escape").decode(): HOSTILE,
        "\u65e5\u672c\u8a9e": "\u65e5\u672c\u8a9e",
    }
    execution_id = service.schedule("t", odd)
    for arguments in (("show", execution_id), ("show", execution_id, "--full"), ("list",)):
        result = ebbs("runs", *arguments)
        assert result.exit_code == 0, result.stderr
        assert is_harmless(result.stdout)
        document = ebbs("runs", *arguments, "--json")
        assert document.exit_code == 0, document.stderr
        assert document.stdout.isascii()
        json.loads(document.stdout)
    assert "\u65e5\u672c\u8a9e" in ebbs("runs", "show", execution_id).stdout


# --- hostile text -------------------------------------------------------------------------------------------------


def test_hostile_text_is_shown_and_does_nothing(ebbs: Ebbs, runner: FlowRunner) -> None:
    def fail() -> None:
        raise ValueError(HOSTILE)

    name = "[link=https://evil.example]t[/link] \u202e\u200b"
    runner.register_flow_template(FlowTemplate(name, [task(fail)]))
    execution_id = runner.schedule_flow(name, {"note": HOSTILE}, queue="[blink]q \u202e", idempotency_key="\u2066k")
    runner.run_flow()
    runner.reschedule_flow_execution(execution_id, reason=HOSTILE)
    runner.run_until_idle()
    for arguments in (
        ("list",),
        ("show", execution_id),
        ("show", execution_id, "--full"),
        ("show", execution_id, "--json"),
    ):
        for colours in ({}, {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}):
            result = ebbs("runs", *arguments, **colours)
            assert result.exit_code == 0, result.stderr
            assert is_harmless(result.stdout)
    shown = ebbs("runs", "show", execution_id).stdout
    assert "[bold red]x[/] \\x1b[31m" in shown
    assert "\\u202e" in shown
    assert "[link=https://evil.example]t[/link] \\u202e\\u200b" in ebbs("runs", "list").stdout
    cancelled = ebbs("runs", "reschedule", execution_id)
    assert is_harmless(cancelled.stderr)


def test_a_type_that_nobody_knows_does_no_harm(ebbs: Ebbs, service: FlowService) -> None:
    execution_id = service.schedule("t", {"n": 1})
    types = json.dumps({"n": f"no.such.Type{HOSTILE}"})
    with service.engine.begin() as connection:
        transitions = build_tables().transitions
        connection.execute(transitions.update().where(transitions.c.flow_execution_step == 1).values(entry_types=types))
    shown = ebbs("runs", "show", execution_id)
    assert shown.exit_code == 0
    assert is_harmless(shown.stdout)
    document = json.loads(ebbs("runs", "show", execution_id, "--json").stdout)
    assert document["execution_context"]["n"]["value"] == 1


# --- colours ------------------------------------------------------------------------------------------------------


def test_colours_are_for_terminals_only_and_no_color_turns_them_off(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner)
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    for arguments in (("list",), ("show", execution_id)):
        assert "\x1b[" not in ebbs("runs", *arguments).stdout
        assert "\x1b[1;31mFAILED" in ebbs("runs", *arguments, **terminal).stdout
        assert "\x1b" not in ebbs("runs", *arguments, **terminal, NO_COLOR="1").stdout


@pytest.mark.parametrize("columns", [20, 80, 140])
def test_a_terminal_of_any_width_will_do(columns: int, ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner, "x" * 150)
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)}
    for arguments in (("list",), ("show", execution_id)):
        shown = ebbs("runs", *arguments, **terminal)
        assert shown.exit_code == 0
        assert max(len(line) for line in shown.stdout.splitlines()) <= columns


# --- reschedule and cancel ----------------------------------------------------------------------------------------


def test_a_failed_run_is_rescheduled_and_goes_on_where_it_is_told_to(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner)
    done = ebbs("runs", "reschedule", execution_id, "--reason", "the bank is back")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "RESCHEDULED: goes on at b" in done.stderr
    assert runner.service.get_flow_status_history(execution_id)[-1].reason == "the bank is back"
    finished = runner.re_run_flow()
    assert finished is not None
    assert finished.status is FlowStatus.SUCCEEDED


def test_a_failed_run_is_rescheduled_from_an_earlier_task(ebbs: Ebbs, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner)
    unknown = ebbs("runs", "reschedule", execution_id, "--from-task", "z")
    assert unknown.exit_code == 1
    assert "'a', 'b'" in unknown.stderr
    document = json.loads(ebbs("runs", "reschedule", execution_id, "--from-task", "a", "--json").stdout)
    assert (document["status"], document["current_task_index"]) == ("RESCHEDULED", 0)


def test_a_run_is_cancelled_once(ebbs: Ebbs, service: FlowService) -> None:
    execution_id = service.schedule("t")
    assert ebbs("runs", "cancel", execution_id, "--reason", "not wanted").exit_code == 0
    assert service.get_flow_execution(execution_id).status is FlowStatus.CANCELLED
    again = ebbs("runs", "cancel", execution_id)
    assert again.exit_code == 1
    assert again.stderr.startswith(f"error: execution {execution_id} is CANCELLED")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "reschedule", "cancel"])
@pytest.mark.parametrize("execution_id", [99, 0, 2**63, 10**30])
def test_a_run_that_is_not_there_is_exit_code_1(command: str, execution_id: int, ebbs: Ebbs) -> None:
    result = ebbs("runs", command, execution_id)
    assert result.exit_code == 1
    assert result.stderr == f"error: no flow execution {execution_id} in this database\n"


# --- which database -----------------------------------------------------------------------------------------------


def test_the_database_is_given_before_or_after_the_subcommand_or_in_the_environment(
    bare: Ebbs, database_url: str, service: FlowService
) -> None:
    service.schedule("t")
    wrong = "sqlite:////no/such/file.db"
    for result in (
        bare("runs", "list", EBBS_DATABASE_URL=database_url),
        bare("--database-url", database_url, "runs", "list", EBBS_DATABASE_URL=wrong),
        bare("runs", "list", "--database-url", database_url, EBBS_DATABASE_URL=wrong),
        bare("--database-url", wrong, "runs", "list", "--database-url", database_url),
    ):
        assert result.exit_code == 0, result.stderr
        assert "SCHEDULED" in result.stdout


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_a_named_schema_is_given_before_or_after_the_subcommand_or_in_the_environment(
    bare: Ebbs, empty_database_url: str
) -> None:
    missing = bare("runs", "list", "--schema", "flows", EBBS_DATABASE_URL=empty_database_url)
    assert missing.exit_code == 3
    assert 'run "ebbs db upgrade --schema flows"' in missing.stderr
    assert bare("db", "upgrade", "--schema", "flows", EBBS_DATABASE_URL=empty_database_url).exit_code == 0
    for result in (
        bare("runs", "list", "--schema", "flows", EBBS_DATABASE_URL=empty_database_url),
        bare("--schema", "flows", "runs", "list", EBBS_DATABASE_URL=empty_database_url),
        bare("db", "check", "--deep", EBBS_SCHEMA="flows", EBBS_DATABASE_URL=empty_database_url),
    ):
        assert result.exit_code == 0, result.stderr
    assert bare("runs", "list", EBBS_DATABASE_URL=empty_database_url).exit_code == 3


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "mysql://user:hunter2@host/database",
        "postgresql://user:hunter2@host:port/database",
        "postgresql://user:p@hunter2@host/database",
        "postgresql+asyncpg://user:hunter2@host/database",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
    ],
)
def test_a_url_that_cannot_be_used_is_exit_code_2_and_is_not_repeated(url: str, bare: Ebbs) -> None:
    for command in (("runs", "list"), ("db", "upgrade"), ("db", "check")):
        result = bare(*command, EBBS_DATABASE_URL=url)
        assert result.exit_code == 2, result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert "hunter2" not in result.output


@pytest.mark.parametrize(
    "arguments", [("runs", "show"), ("runs", "show", "x"), ("runs", "list", "--limit", "0"), ("nix",)]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], bare: Ebbs) -> None:
    result = bare(*arguments, EBBS_DATABASE_URL="sqlite:///x.db")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_server_that_does_not_answer_is_exit_code_1_and_no_password_is_shown(bare: Ebbs) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/database?password=hunter2"
    for command in (("runs", "list"), ("db", "upgrade"), ("db", "current"), ("db", "downgrade", "base")):
        result = bare(*command, "--database-url", url)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: postgresql://user:***@127.0.0.1:1/database: ")
        assert result.stderr.count("\n") == 1
        assert "hunter2" not in result.output


def test_a_mistyped_sqlite_path_is_not_created(bare: Ebbs, tmp_path: Path) -> None:
    path = tmp_path / "mistyped.db"
    for url in (f"sqlite:///{path}", f"sqlite:///file:{path}?uri=true"):
        for command, code in (
            (("runs", "list"), 1),
            (("runs", "show", "1"), 1),
            (("runs", "cancel", "1"), 1),
            (("db", "current"), 1),
            (("db", "downgrade", "base"), 1),
            (("db", "check"), 3),
        ):
            result = bare(*command, EBBS_DATABASE_URL=url)
            assert result.exit_code == code
            assert "no such file" in result.stderr
            assert 'run "ebbs db upgrade" to make it' in result.stderr
            assert list(tmp_path.iterdir()) == []


def test_a_sqlite_file_of_another_program_is_left_as_it_is(bare: Ebbs, tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE theirs (n INTEGER)"))
    engine.dispose()
    before = path.read_bytes()
    for command, code in ((("runs", "list"), 3), (("db", "check"), 3), (("db", "current"), 0)):
        assert bare(*command, EBBS_DATABASE_URL=f"sqlite:///{path}").exit_code == code
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_database_is_exit_code_1(bare: Ebbs, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("buy milk\n" * 1000)
    result = bare("runs", "list", EBBS_DATABASE_URL=f"sqlite:///{path}")
    assert result.exit_code == 1
    assert "file is not a database" in result.stderr


# --- the schema ---------------------------------------------------------------------------------------------------


def test_the_schema_is_brought_up_checked_and_taken_back(bare: Ebbs, empty_database_url: str, database: str) -> None:
    def db(*arguments: str, answer: str | None = None) -> Result:
        return bare("db", *arguments, answer=answer, EBBS_DATABASE_URL=empty_database_url)

    behind = db("check")
    assert behind.exit_code == 3
    assert 'run "ebbs db upgrade"' in behind.stderr
    upgraded = db("upgrade")
    assert (upgraded.exit_code, upgraded.stdout) == (0, "")
    assert upgraded.stderr == f"Schema is at {schema.REVISION}.\n"
    assert db("current").stdout == f"{schema.REVISION}\n"
    assert json.loads(db("current", "--json").stdout) == {"revision": schema.REVISION, "needed": schema.REVISION}
    assert db("check", "--deep").exit_code == 0
    assert db("upgrade", schema.REVISION).exit_code == 0

    for answer in ("n\n", None):
        refused = db("downgrade", "base", answer=answer)
        assert refused.exit_code == 1
        assert "nothing was changed" in refused.stderr
        assert "every execution and its history is deleted" in refused.stderr
    assert db("current").stdout == f"{schema.REVISION}\n"
    assert db("downgrade", "base", answer="y\n").exit_code == 0
    assert db("current").stdout == "none\n"
    assert bare("runs", "list", EBBS_DATABASE_URL=empty_database_url).exit_code == 3
    assert db("downgrade", "base", "--yes").exit_code == 0

    unknown = db("upgrade", "9999")
    assert unknown.exit_code == 1
    assert "9999" in unknown.stderr
    assert unknown.stderr.count("\n") == 1


def test_a_table_that_was_altered_is_found_by_a_deep_check(ebbs: Ebbs, database_url: str) -> None:
    engine = create_engine_for(database_url)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_ebbs_flow_executions_due"))
    engine.dispose()
    assert ebbs("db", "check").exit_code == 0
    deep = ebbs("db", "check", "--deep")
    assert deep.exit_code == 3
    assert "ix_ebbs_flow_executions_due" in deep.stdout


def test_an_older_schema_is_exit_code_3(ebbs: Ebbs, database_url: str) -> None:
    engine = create_engine_for(database_url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'"))
    engine.dispose()
    for command in (("runs", "list"), ("db", "check")):
        result = ebbs(*command)
        assert result.exit_code == 3
        assert result.stderr.startswith("error: Schema is at 0000, this release needs ")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (None, "GENERATED BY DEFAULT AS IDENTITY"),
        ("postgresql://user:hunter2@no.such.host.example/database", "GENERATED BY DEFAULT AS IDENTITY"),
        ("sqlite:////no/such/folder/x.db", "AUTOINCREMENT"),
    ],
)
def test_sql_is_printed_without_a_database(url: str | None, told: str, bare: Ebbs) -> None:
    environment = {"EBBS_DATABASE_URL": url} if url is not None else {}
    result = bare("db", "upgrade", "--sql", **environment)
    assert result.exit_code == 0
    assert "CREATE TABLE ebbs_flow_executions" in result.stdout
    assert told in result.stdout
    assert result.stderr == ""


def test_sql_for_a_named_schema_makes_the_schema(bare: Ebbs) -> None:
    assert 'CREATE SCHEMA IF NOT EXISTS "flows"' in bare("db", "upgrade", "--sql", "--schema", "flows").stdout
    for schema_name, url in (("x; DROP", ""), ("flows", "sqlite:///x.db")):
        result = bare("db", "upgrade", "--sql", "--schema", schema_name, EBBS_DATABASE_URL=url)
        assert result.exit_code == 2
        assert result.stdout == ""


# --- the command itself -------------------------------------------------------------------------------------------


def run_main(*arguments: str, before: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    script = f"import sys; {before}; sys.argv[0] = 'ebbs'; from ebbs_and_flows.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


def test_help_lists_the_exit_codes(bare: Ebbs) -> None:
    result = bare("--help")
    assert result.exit_code == 0
    for line in ("0  done", "1  what was asked for failed", "2  usage", "3  the schema is missing"):
        assert f"\n    {line}" in result.stdout


def test_it_tells_its_version(bare: Ebbs) -> None:
    result = bare("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("ebbs ")


def test_it_completes_its_commands_in_a_shell() -> None:
    script = run_main("--show-completion", "bash", SHELL="/bin/bash")
    assert script.returncode == 0, script.stderr
    assert "_EBBS_COMPLETE=complete_bash" in script.stdout
    words = run_main(_EBBS_COMPLETE="complete_bash", COMP_WORDS="ebbs runs re", COMP_CWORD="2")
    assert words.stdout.split() == ["reschedule"]


@pytest.mark.parametrize("package", ["typer", "rich", "rich.table"])
def test_without_its_extra_it_says_what_to_install(package: str) -> None:
    result = run_main("runs", "list", before=f"sys.modules[{package!r}] = None")
    assert result.returncode == 2
    assert result.stderr == "the command line needs its extra: pip install 'ebbs-and-flows[cli]'\n"
    assert result.stdout == ""


def test_the_library_itself_does_not_need_the_extra() -> None:
    script = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; import ebbs_and_flows, ebbs_and_flows.cli"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_error_is_one_line_of_a_real_process_and_its_exit_code() -> None:
    result = run_main("runs", "list", EBBS_DATABASE_URL="sqlite:////no/such/file.db")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no such file '/no/such/file.db'")
    assert result.stderr.count("\n") == 1


def test_a_terminal_without_unicode_is_served_in_ascii(database_url: str, runner: FlowRunner) -> None:
    execution_id = failed_flow(runner, note="\u65e5")
    shown = run_main("runs", "show", str(execution_id), EBBS_DATABASE_URL=database_url, PYTHONIOENCODING="ascii")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.isascii()
    assert "===" in shown.stdout
    assert "\\u65e5" in shown.stdout
