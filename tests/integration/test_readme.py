"""What the README shows runs, and says what it prints."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

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
