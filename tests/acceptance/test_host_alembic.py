"""A service with an Alembic history of its own: real projects, made by `alembic init` and by docs/migrations.md."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Inspector, inspect, text
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from ebbs_and_flows import ExecutionContext, FlowRunner, FlowService, FlowTemplate, schema, task
from ebbs_and_flows.persistence.databases import create_engine_for
from tests.integration.compatibility import NEXT_REVISION, write_next_release
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "migrations.md"

OURS = {"ebbs_flow_executions", "ebbs_flow_transitions", "ebbs_task_executions"}

MODELS = """
from sqlalchemy import MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s", "ck": "ck_%(table_name)s_%(constraint_name)s", "ix": "ix_%(column_0_label)s"
        }
    )


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    ebbs_note: Mapped[str | None] = mapped_column(String(40), index=True)
"""

ORDERS = """
def upgrade() -> None:
    op.create_table(
        "orders", sa.Column("id", sa.Integer, primary_key=True), sa.Column("ebbs_note", sa.String(40), index=True)
    )


def downgrade() -> None:
    op.drop_table("orders")
"""


def block(first_line: str, language: str = "python") -> str:
    """The block of the docs that begins with this line."""
    document = Sybil([CodeBlockParser(language, lambda example: None)], path=str(DOCS.parent), pattern="*.md").parse(
        DOCS
    )
    [found] = [
        str(each.parsed) for each in document.examples() if str(each.parsed).partition("\n")[0].strip() == first_line
    ]
    return found


class Host:
    """A project with models and migrations of its own, in a folder and on a database of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.engine = create_engine_for(url)
        self._url = self.engine.url.render_as_string(hide_password=False)
        self.set_in_ini("sqlalchemy.url", self._url)
        (folder / "shop.py").write_text(MODELS)
        self.edit_env("target_metadata = None", "from shop import Base\n\ntarget_metadata = Base.metadata")

    def alembic(self, *arguments: str, expect: int = 0, **environment: str) -> str:
        """What a command prints on stdout; on stderr where it is expected to fail."""
        done = self.start(*arguments, **environment)
        out, err = done.communicate(timeout=60)
        assert done.returncode == expect, err
        self.engine.dispose()  # SQLite's pragmas tell what a connection knew of the tables before
        return out if expect == 0 else out + err

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning:__main__", **environment},
        )

    def set_in_ini(self, option: str, value: str) -> None:
        """Set an option, which may be there already, be it as a comment."""
        ini = self.folder / "alembic.ini"
        written, count = re.subn(
            rf"(?m)^{re.escape(option)} = .*$", lambda _: f"{option} = {value.replace('%', '%%')}", ini.read_text()
        )
        assert count == 1
        ini.write_text(written)

    def edit_env(self, old: str, new: str) -> None:
        path = self.folder / "migrations" / "env.py"
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))

    def use_hooks(self) -> None:
        """Put into env.py what the docs show, in the place of what `alembic init` wrote."""
        path = self.folder / "migrations" / "env.py"
        template = path.read_text()
        begin, end = template.index("def run_migrations_online"), template.index("\nif context.is_offline_mode()")
        path.write_text(template[:begin] + block("# migrations/env.py") + template[end:])

    def add_branch(self, folder: str | None = None, named_schema: str | None = None) -> None:
        """Put into alembic.ini what the docs show."""
        lines = block("# alembic.ini", "ini").removeprefix("# alembic.ini\n")
        if folder is not None or not Path(schema.version_locations()).is_relative_to(Path(schema.__file__).parent):
            location = folder or schema.version_locations()  # a checkout
            lines = lines.replace("ebbs_and_flows:migrations/versions", location.replace("%", "%%"))
        if named_schema is not None:
            lines = lines.replace("# ebbs_schema = ebbs", f"ebbs_schema = {named_schema}")
        ini = self.folder / "alembic.ini"
        written, count = re.subn(r"(?m)^path_separator = os$", lambda _: lines, ini.read_text())
        assert count == 1
        ini.write_text(written)

    def write_revision(self, revision: str, body: str, down_revision: str | None = None, more: str = "") -> None:
        """Write a migration by hand, into a history that counts from 0001."""
        (self.folder / "migrations" / "versions" / f"{revision}.py").write_text(
            "import sqlalchemy as sa\nfrom alembic import op\n\n"
            f"revision = {revision!r}\ndown_revision = {down_revision!r}\n{more}\n{body}"
        )

    def versions(self) -> list[str]:
        """What the host's own version table says."""
        with self.engine.connect() as connection:
            return sorted(connection.scalars(text("SELECT version_num FROM alembic_version")))

    def tables(self, named: str | None = None) -> set[str]:
        return set(inspect(self.engine).get_table_names(schema=named))

    def columns_of_orders(self) -> set[str]:
        return {each["name"] for each in inspect(self.engine).get_columns("orders")}

    def flows(self) -> int:
        """How many executions there are."""
        with self.engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM ebbs_flow_executions")).scalar_one())

    def run_a_flow(self, named: str | None = None) -> str:
        """What a worker of the service does."""
        with FlowService(self._url, schema=named) as service:
            runner = FlowRunner(service)
            runner.register_flow_template(FlowTemplate("t", [task(lambda: None)]))
            runner.schedule_flow("t", ExecutionContext(n=1))
            done = runner.run_flow()
        assert done is not None
        return str(done.status)


@pytest.fixture(scope="session")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `alembic init` writes."""
    folder = tmp_path_factory.mktemp("project")
    subprocess.run([sys.executable, "-m", "alembic", "init", "migrations"], cwd=folder, check=True, timeout=60)
    return folder


@pytest.fixture
def host(tmp_path: Path, new_project: Path, empty_database_url: str) -> Iterator[Host]:
    host = Host(shutil.copytree(new_project, tmp_path / "host"), empty_database_url)
    yield host
    host.engine.dispose()


def run_script(engine: Engine, script: str) -> None:
    """What psql and sqlite3 do with a file."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        driver: Any = connection.connection.driver_connection
        (driver.executescript if engine.dialect.name == "sqlite" else driver.execute)(script)


# --- from Python --------------------------------------------------------------------------------------------------


def test_the_docs_program_upgrades_together_with_something_of_the_hosts(empty_database_url: str) -> None:
    engine = create_engine_for(empty_database_url)
    program = block("# deploy.py")
    assert "    # ... what else" in program
    failing = program.replace("    # ... what else", "    raise LookupError  # ... what else")
    url = engine.url.render_as_string(hide_password=False)
    for source, outcome in ((failing, pytest.raises(LookupError)), (program, nullcontext())):
        names: dict[str, Any] = {"DATABASE_URL": url}
        assert schema.current(engine) is None
        with outcome:
            exec(source, names)
        names["engine"].dispose()
    assert schema.differences(engine) == []
    engine.dispose()


# --- autogenerate -------------------------------------------------------------------------------------------------


def test_autogenerate_proposes_nothing_of_ours(host: Host, database: str) -> None:
    schemas = [None] if database == "sqlite" else [None, "ebbs"]
    for named in schemas:
        schema.upgrade(host.engine, schema=named)
    host.alembic("revision", "--autogenerate", "-m", "without the hooks")
    [without] = (host.folder / "migrations" / "versions").glob("*.py")
    assert "op.drop_table('ebbs_flow_executions')" in without.read_text()
    without.unlink()

    host.use_hooks()
    host.alembic("revision", "--autogenerate", "-m", "orders")
    [written] = (host.folder / "migrations" / "versions").glob("*.py")
    assert "op.create_table('orders'" in written.read_text()
    assert "ebbs_note" in written.read_text()  # theirs, whatever its name
    assert not re.search("drop|ebbs_flow|ebbs_task|ebbs_alembic", written.read_text().partition("def downgrade")[0])
    host.alembic("upgrade", "head")
    assert "No new upgrade operations detected." in host.alembic("check")
    [revision] = host.versions()
    assert written.name.startswith(revision)
    for named in schemas:
        assert schema.differences(host.engine, schema=named) == []
        assert host.run_a_flow(named) == "SUCCEEDED"
    host.alembic("downgrade", "base")
    assert host.tables() & {"orders", *OURS} == OURS
    assert schema.current(host.engine) == schema.REVISION


def test_the_hooks_can_be_asked_by_those_of_the_host(host: Host) -> None:
    schema.upgrade(host.engine)
    with host.engine.begin() as connection:
        connection.execute(text("CREATE TABLE legacy_customers (id INTEGER)"))
    host.use_hooks()
    for hook in ("include_name", "include_object"):
        host.edit_env(f"{hook}=ebbs_schema.{hook}", f"{hook}={hook}")
    own_hooks = block("# migrations/env.py: with hooks of your own")
    host.edit_env("def run_migrations_online", f"{own_hooks}\n\ndef run_migrations_online")
    skipped = "\n    skipped: Mapped[str] = mapped_column(info={'skip': True})\n"
    (host.folder / "shop.py").write_text(MODELS + skipped)
    host.write_revision("0001", ORDERS)
    host.alembic("upgrade", "head")
    assert "No new upgrade operations detected." in host.alembic("check")
    host.edit_env("return ebbs_schema.include_name(name, type_, parent_names)", "return True")
    host.edit_env("return ebbs_schema.include_object(object_, name, type_, reflected, compare_to)", "return True")
    assert "ebbs_flow_executions" in host.alembic("check", expect=255)


def test_a_host_may_have_one_of_our_tables_among_its_models(host: Host) -> None:
    schema.upgrade(host.engine)
    host.use_hooks()
    (host.folder / "shop.py").write_text(
        f"{MODELS}"
        "    execution_id: Mapped[int | None] = mapped_column(ForeignKey('ebbs_flow_executions.execution_id'))\n\n\n"
        "Table('ebbs_flow_executions', Base.metadata, Column('execution_id', BigInteger, primary_key=True))\n"
    )
    models = (host.folder / "shop.py").read_text()
    imports = "from sqlalchemy import BigInteger, Column, ForeignKey, MetaData, String, Table"
    (host.folder / "shop.py").write_text(models.replace("from sqlalchemy import MetaData, String", imports))
    host.alembic("revision", "--autogenerate", "-m", "orders")
    host.alembic("upgrade", "head")
    [key] = inspect(host.engine).get_foreign_keys("orders")
    assert key["referred_table"] == "ebbs_flow_executions"
    assert "No new upgrade operations detected." in host.alembic("check")
    assert schema.differences(host.engine) == []


# --- within a migration of the host -------------------------------------------------------------------------------


def in_a_migration(host: Host) -> None:
    """The docs' migration, after another one; and what it does is followed by something of the host's."""
    host.use_hooks()
    host.write_revision("0001", ORDERS)
    written = block("# migrations/versions/...")
    assert 'down_revision = "0001"' in written
    call = '    schema.upgrade(op.get_bind(), "ebbs_0001")\n'
    assert call in written
    written = written.replace(call, f'{call}    op.add_column("orders", sa.Column("price", sa.Integer))\n')
    host.write_revision("0002", f'{written}    op.drop_column("orders", "price")\n')
    (host.folder / "shop.py").write_text(f"{MODELS}    price: Mapped[int | None]\n")


def test_our_upgrade_runs_within_a_migration_of_the_host(host: Host, database: str) -> None:
    in_a_migration(host)
    host.alembic("upgrade", "head")
    assert host.versions() == ["0002"]
    assert host.tables() >= {"orders", *OURS}
    assert "price" in host.columns_of_orders()
    assert schema.current(host.engine) == schema.REVISION
    assert schema.differences(host.engine) == []
    assert host.run_a_flow() == "SUCCEEDED"
    host.alembic("downgrade", "0001")
    assert host.tables() & {"orders", *OURS} == {"orders"}
    assert "price" not in host.columns_of_orders()
    assert host.versions() == ["0001"]

    host.write_revision("0003", "def upgrade():\n    op.execute('SELECT no_such_function()')\n", "0002")
    host.alembic("upgrade", "head", expect=1)
    if database == "postgresql":  # one transaction; Alembic commits each migration by itself on SQLite
        assert host.versions() == ["0001"]
        assert schema.current(host.engine) is None
    else:
        assert host.versions() == ["0002"]
        assert schema.differences(host.engine) == []


def test_the_script_of_a_host_has_our_upgrade_in_it(host: Host) -> None:
    in_a_migration(host)
    script = host.alembic("upgrade", "head", "--sql")
    run_script(host.engine, script)
    assert host.versions() == ["0002"]
    assert host.tables() >= {"orders", *OURS}
    assert "price" in host.columns_of_orders()
    assert schema.current(host.engine) == schema.REVISION
    assert schema.differences(host.engine) == []
    assert "No new upgrade operations detected." in host.alembic("check")
    run_script(host.engine, host.alembic("downgrade", "0002:0001", "--sql"))
    assert host.versions() == ["0001"]
    assert host.tables() & {"orders", *OURS} == {"orders"}
    assert "price" not in host.columns_of_orders()
    assert schema.current(host.engine) is None


# --- as a branch of the host's history ----------------------------------------------------------------------------


def as_a_branch(host: Host, **how: Any) -> None:
    host.use_hooks()
    host.write_revision("0001", ORDERS, more='branch_labels = ("shop",)')
    host.add_branch(**how)


def test_our_revisions_are_a_branch_of_the_hosts_history(host: Host) -> None:
    as_a_branch(host)
    host.alembic("upgrade", "heads")
    assert host.versions() == ["0001", schema.REVISION]
    assert schema.current(host.engine) == schema.REVISION
    assert schema.differences(host.engine) == []
    assert names_of_constraints(inspect(host.engine)) == names_without_a_host(host.engine)
    assert "No new upgrade operations detected." in host.alembic("check")
    assert host.run_a_flow() == "SUCCEEDED"
    assert schema.upgrade(host.engine) == schema.REVISION

    models = (host.folder / "shop.py").read_text()
    (host.folder / "shop.py").write_text(f"{models}    price: Mapped[int | None]\n")
    host.alembic("revision", "--autogenerate", "-m", "prices", "--rev-id", "0002", "--head", "shop@head")
    [written] = (host.folder / "migrations" / "versions").glob("0002*.py")
    assert "op.add_column('orders', sa.Column('price'" in written.read_text()
    assert "ebbs_flow" not in written.read_text()
    host.alembic("upgrade", "heads")
    assert host.versions() == ["0002", schema.REVISION]

    host.alembic("downgrade", "ebbs@base")
    assert host.versions() == ["0002"]
    assert host.tables() & {"orders", *OURS} == {"orders"}
    assert schema.current(host.engine) is None
    host.alembic("upgrade", "heads")
    assert schema.differences(host.engine) == []


def names_of_constraints(inspector: Inspector) -> set[str | None]:
    return {
        constraint["name"]
        for table in OURS
        for constraint in (
            *inspector.get_check_constraints(table),
            *inspector.get_foreign_keys(table),
            *inspector.get_indexes(table),
            inspector.get_pk_constraint(table),
        )
    }


def names_without_a_host(engine: Engine) -> set[str | None]:
    """What they are called where a host with a naming convention has no say."""
    with engine.connect() as connection:
        schema.downgrade(connection, "base")
        schema.upgrade(connection)
        found = names_of_constraints(inspect(connection))
        connection.rollback()
    return found


def test_a_migration_of_the_host_may_depend_on_one_of_ours(host: Host) -> None:
    as_a_branch(host)
    notes = """
def upgrade() -> None:
    execution = sa.ForeignKey("ebbs_flow_executions.execution_id")
    op.create_table("notes", sa.Column("execution_id", sa.BigInteger, execution, primary_key=True))


def downgrade() -> None:
    op.drop_table("notes")
"""
    host.write_revision("0002", notes, "0001", more='depends_on = "ebbs_0001"')
    host.alembic("upgrade", "shop@head")
    assert host.tables() >= {"orders", "notes", *OURS}
    assert schema.differences(host.engine) == []
    host.alembic("downgrade", "shop@0001")
    assert host.tables() & {"orders", "notes", *OURS} == {"orders", *OURS}
    assert schema.current(host.engine) == schema.REVISION
    host.alembic("upgrade", "heads")
    assert schema.differences(host.engine) == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_branch_makes_its_tables_in_a_named_schema(host: Host) -> None:
    as_a_branch(host, named_schema="ebbs")
    host.alembic("upgrade", "heads")
    assert host.tables("ebbs") == {*OURS, schema.VERSION_TABLE}
    assert not host.tables() & OURS
    assert schema.differences(host.engine, schema="ebbs") == []
    assert "No new upgrade operations detected." in host.alembic("check")
    assert host.run_a_flow("ebbs") == "SUCCEEDED"
    host.alembic("downgrade", "ebbs@base")
    assert schema.current(host.engine, schema="ebbs") is None
    run_script(host.engine, "DROP SCHEMA ebbs CASCADE")
    script = host.alembic("upgrade", "ebbs@head", "--sql")
    run_script(
        host.engine, script.replace("CREATE TABLE alembic_version", "CREATE TABLE IF NOT EXISTS alembic_version")
    )
    assert schema.differences(host.engine, schema="ebbs") == []
    assert schema.current(host.engine, schema="ebbs") == schema.REVISION


def test_the_script_of_a_host_has_the_branch_in_it(host: Host) -> None:
    as_a_branch(host)
    run_script(host.engine, host.alembic("upgrade", "heads", "--sql"))
    assert host.versions() == ["0001", schema.REVISION]
    assert schema.current(host.engine) == schema.REVISION
    assert schema.differences(host.engine) == []
    assert "No new upgrade operations detected." in host.alembic("check")
    run_script(host.engine, host.alembic("downgrade", f"{schema.REVISION}:ebbs@base", "--sql"))
    assert schema.current(host.engine) is None
    assert not host.tables() & OURS


def test_a_step_that_was_taken_in_one_way_is_not_taken_again_in_the_other(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = write_next_release(
        tmp_path,
        'op.add_column("ebbs_flow_executions", sa.Column("owner", sa.String(9)), schema=schema)',
        'op.drop_column("ebbs_flow_executions", "owner", schema=schema)',
    )
    as_a_branch(host, folder=str(released / "versions"))
    monkeypatch.setattr(schema, "_migrations", lambda: released)

    def ours(move: Callable[..., str | None], revision: str) -> str | None:
        reached = move(host.engine, revision)
        assert host.flows() == 1
        return reached

    def theirs(*command: str) -> tuple[str | None, list[str]]:
        host.alembic(*command)
        assert host.flows() == 1
        return schema.current(host.engine), host.versions()

    schema.upgrade(host.engine, "ebbs_0001")
    assert host.run_a_flow() == "SUCCEEDED"
    assert theirs("upgrade", "ebbs_0001") == ("ebbs_0001", ["ebbs_0001"])
    assert theirs("upgrade", "shop@head") == ("ebbs_0001", ["0001", "ebbs_0001"])
    assert ours(schema.upgrade, NEXT_REVISION) == NEXT_REVISION
    refused = host.alembic("downgrade", "ebbs@base", expect=1)
    assert f"the database is at {NEXT_REVISION}, and this step begins at ebbs_0001" in refused
    assert theirs("upgrade", "heads") == (NEXT_REVISION, ["0001", NEXT_REVISION])
    assert ours(schema.downgrade, "ebbs_0001") == "ebbs_0001"
    assert theirs("downgrade", "ebbs@ebbs_0001") == ("ebbs_0001", ["0001", "ebbs_0001"])
    assert theirs("upgrade", "heads") == (NEXT_REVISION, ["0001", NEXT_REVISION])
    assert ours(schema.upgrade, NEXT_REVISION) == NEXT_REVISION
    assert theirs("downgrade", "ebbs@ebbs_0001") == ("ebbs_0001", ["0001", "ebbs_0001"])
    assert schema.differences(host.engine) == []


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_the_branch_and_our_own_command_wait_for_each_other(host: Host) -> None:
    as_a_branch(host)
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with host.engine.connect() as ours:
        schema.upgrade(ours)
        theirs = host.start("upgrade", "heads")
        wait_until(lambda: ours.execute(text(waiting)).scalar_one(), "the wait of the host's upgrade")
        ours.commit()
        _, told = theirs.communicate(timeout=60)
    assert theirs.returncode == 0, told
    assert host.versions() == ["0001", schema.REVISION]
    assert schema.differences(host.engine) == []


def test_a_killed_run_of_the_branch_leaves_nothing_half_done(host: Host) -> None:
    as_a_branch(host)
    (host.folder / "shop.py").write_text(
        f"{MODELS}\n"
        "import os, signal\nfrom sqlalchemy import Engine, event\n\n"
        '@event.listens_for(Engine, "after_cursor_execute")\n'
        "def die(connection, cursor, statement, *_):\n"
        '    if "KILLED" in os.environ and "CREATE TABLE ebbs_task_executions" in statement:\n'
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = host.start("upgrade", "heads", KILLED="1")
    died.communicate(timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert not host.tables() & {*OURS, schema.VERSION_TABLE}
    host.alembic("upgrade", "heads")
    assert host.versions() == ["0001", schema.REVISION]
    assert schema.differences(host.engine) == []
