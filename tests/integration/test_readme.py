"""What the README and the docs show runs, and says what it prints."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from ebbs_and_flows import FlowService, FlowStatus

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
