"""What the README and the docs show runs, and says what it prints."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from ebbs_and_flows import FlowRunner, FlowService, FlowStatus, FlowTemplate, task
from tests.pages import blocks_of, check_requirement, commands_of

ROOT = Path(__file__).parents[2]


class SqlParser(CodeBlockParser):
    language = "sql"

    def evaluate(self, example: object) -> None:
        """Collect the statements; the test runs them on both databases."""
        example.namespace.setdefault("sql", []).append(example.parsed)  # type: ignore[attr-defined]  # a Sybil example


def test_the_code_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], database_url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    readme = Sybil([PythonCodeBlockParser(), SqlParser()], path=str(ROOT), pattern="README.md")
    document = readme.parse(ROOT / "README.md")
    examples = list(document.examples())
    assert len(examples) == 6
    for example in examples:
        example.evaluate()
    assert capsys.readouterr().out == "FAILED\npaid 42\n"
    with closing(sqlite3.connect("shop.db")) as connection:
        assert connection.execute("SELECT * FROM rates").fetchall() == [("USD", 1.09), ("EUR", 1.0)]
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        for statement in "".join(document.namespace["sql"]).split(";"):
            if statement.strip():
                connection.execute(text(statement)).all()
    engine.dispose()


SHOP = """
import os

from ebbs_and_flows import FlowRunner, FlowService, FlowTemplate, task

@task
def charge() -> None:
    raise ConnectionError("the bank does not answer")

runner = FlowRunner(FlowService(os.environ["EBBS_DATABASE_URL"]))
runner.register_flow_template(FlowTemplate("order", [charge]))
"""


def test_the_commands_in_the_readme_do_what_it_says(tmp_path: Path, service: FlowService, database_url: str) -> None:
    @task
    def charge() -> None:
        raise ConnectionError("the bank does not answer")

    runner = FlowRunner(service)
    runner.register_flow_template(FlowTemplate("order", [charge]))
    runner.schedule_flows("order", [{}] * 17)
    runner.run_until_idle()
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "flows.py").write_text(SHOP)
    environment = dict(
        os.environ,
        EBBS_DATABASE_URL=database_url,
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    )
    run: list[str] = []
    for command in commands_of(blocks_of((ROOT / "README.md").read_text(encoding="utf-8"))):
        if command.startswith("pip install"):
            check_requirement(command)
        elif "nox -s" in command:
            [session] = re.findall(r"nox -s (\w+)", command)
            assert f"\ndef {session}(session" in (ROOT / "noxfile.py").read_text(encoding="utf-8")
        elif not command.startswith("export EBBS_DATABASE_URL="):
            until_idle = " --until-idle" if command.startswith("ebbs worker") else ""
            done = subprocess.run(
                f"{command}{until_idle}",
                shell=True,
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stderr}"
            run.append(command.split("--")[0].strip())
    assert run == [
        "ebbs db upgrade",
        "ebbs worker",
        "ebbs doctor",
        "ebbs runs list",
        "ebbs runs show 17",
        "ebbs runs reschedule 17",
    ]
    assert service.get_flow_execution(17).status is FlowStatus.RESCHEDULED


def test_each_program_in_the_docs_on_scaling_runs_by_itself(tmp_path: Path) -> None:
    document = Sybil([PythonCodeBlockParser()], path=str(ROOT), pattern="docs/*.md").parse(ROOT / "docs" / "scaling.md")
    printed = []
    for number, example in enumerate(document.examples()):
        program = tmp_path / f"program_{number}.py"
        program.write_text(str(example.parsed))
        done = subprocess.run(
            [sys.executable, program.name], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed == ["", "1229\n", "55\n", "10\n"]


@pytest.mark.parametrize("database", ["postgresql"])
def test_the_query_for_autoscaling_counts_workers_from_the_partial_indexes(service: FlowService) -> None:
    document = Sybil([SqlParser()], path=str(ROOT), pattern="docs/*.md").parse(ROOT / "docs" / "scaling.md")
    for example in document.examples():
        example.evaluate()
    [query] = document.namespace["sql"]
    for _ in range(33):
        service.schedule("any")
    service.schedule("any", delay=3600)
    service.schedule("any", queue="other")
    service.update_flow_status(1, FlowStatus.RUNNING)
    finished = (
        "INSERT INTO ebbs_flow_executions (template_name, status, execution_step, current_task_index, epoch, priority, "
        "queue, run_at, created_at, updated_at) SELECT 'any', 'SUCCEEDED', 5, 1, 1, 0, 'default', now(), now(), now() "
        "FROM generate_series(1, 20000)"
    )
    with service.engine.connect() as connection:
        connection.execute(text(finished))
        connection.execute(text("ANALYZE ebbs_flow_executions"))
        assert connection.execute(text(query)).scalar_one() == 2
        connection.execute(text("SET enable_seqscan = off"))
        plan = "\n".join(connection.execute(text(f"EXPLAIN {query}")).scalars())
    assert "ix_ebbs_flow_executions_due" in plan
    assert "ix_ebbs_flow_executions_running" in plan
    assert "Seq Scan" not in plan
