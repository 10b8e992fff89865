"""What docs/databases.md shows works."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import ProgrammingError

from ebbs_and_flows import FlowService, FlowStatus, FlowTemplate, schema, task
from ebbs_and_flows.persistence.databases import create_engine_for
from tests.pages import blocks_of

PAGE = (Path(__file__).parents[2] / "docs" / "databases.md").read_text(encoding="utf-8")


@pytest.fixture
def database() -> str:
    """The page is about PostgreSQL, but for its last part."""
    return "postgresql"


@pytest.fixture
def roles(empty_database_url: str) -> Iterator[tuple[Engine, dict[str, str]]]:
    """Names for the page's roles that no other test has, and who may make them."""
    admin = create_engine_for(empty_database_url)
    names = {name: f"{name}_{uuid4().hex[:8]}" for name in ("shop_migrator", "analyst", "shop")}
    yield admin, names
    with admin.begin() as connection:
        for name in names.values():
            connection.exec_driver_sql(f"DROP OWNED BY {name} CASCADE")
            connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()


def test_the_python_on_the_page_runs(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engines = []
    namespace: dict[str, object] = {"DATABASE_URL": create_engine_for(database_url).url}
    for block in blocks_of(PAGE):
        if block.language != "python":
            continue
        exec(compile(block.text, f"docs/databases.md:{block.line}", "exec"), namespace)
        service, engine = namespace["service"], namespace["engine"]
        assert isinstance(service, FlowService)
        assert isinstance(engine, Engine)
        service.cancel(service.schedule("any"))
        engines.append(engine)
    assert len(engines) == 5
    with engines[-1].connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    for engine in engines:
        engine.dispose()


def test_the_worker_behind_a_pooler_works(database_url: str) -> None:
    [block] = [each.text for each in blocks_of(PAGE) if "prepare_threshold" in each.text]
    namespace: dict[str, object] = {"DATABASE_URL": create_engine_for(database_url).url}
    exec("from sqlalchemy import create_engine\nfrom ebbs_and_flows import *\n" + block, namespace)
    worker, engine = namespace["worker"], namespace["engine"]
    runner = worker.runner  # type: ignore[attr-defined]  # a Worker
    runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
    execution_id = runner.schedule_flow("t")
    worker.run(until_idle=True)  # type: ignore[attr-defined]  # a Worker
    assert runner.service.get_flow_execution(execution_id).status is FlowStatus.SUCCEEDED
    engine.dispose()  # type: ignore[attr-defined]  # an Engine


def test_the_three_steps_with_roles_lead_there(roles: tuple[Engine, dict[str, str]], tmp_path: Path) -> None:
    admin, names = roles

    def named(code: str) -> str:
        for name, unique in names.items():
            code = code.replace(f"{name} ", f"{unique} ").replace(f"{name}\n", f"{unique}\n")
        return code

    [roles_sql] = [each.text for each in blocks_of(PAGE) if each.language == "sql"]
    [command] = [each.text for each in blocks_of(PAGE) if each.language == "sh"]
    words = shlex.split(named(command))
    assert words[0] == "ebbs"
    arguments, target = words[1 : words.index(">")], words[words.index(">") + 1]
    program = [sys.executable, "-c", "from ebbs_and_flows.cli import main; main()", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EBBS_")}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60, check=True)
    (tmp_path / target).write_text(done.stdout)
    with admin.begin() as connection:
        connection.exec_driver_sql(named(roles_sql))
        for name in names.values():  # the page leaves passwords to its reader
            connection.exec_driver_sql(f"ALTER ROLE {name} PASSWORD 'p'")
        connection.exec_driver_sql((tmp_path / "grants.sql").read_text())
    schema.upgrade(admin.url.set(username=names["shop_migrator"], password="p"), schema="ebbs")
    with admin.begin() as connection:
        connection.exec_driver_sql((tmp_path / "grants.sql").read_text())
    with FlowService(admin.url.set(username=names["shop"], password="p"), schema="ebbs") as service:
        service.schedule("any")
    with FlowService(admin.url.set(username=names["analyst"], password="p"), schema="ebbs") as service:
        assert len(service.find_flow_executions()) == 1
        with pytest.raises(ProgrammingError, match="permission denied"):
            service.schedule("any")
