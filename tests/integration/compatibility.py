"""What a migration may not do to the release before it, whose workers are still at work: expand first, contract later.

A migration that takes away what nothing uses any more says so in its script, with the release since which that is so:
`contracts_since = "0.4.0"`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.types import BigInteger, Integer, SmallInteger, String, TypeEngine

from ebbs_and_flows import schema

MIGRATIONS = Path(__file__).parents[2] / "migrations"

_INTEGERS = (SmallInteger, Integer, BigInteger)
"""From narrow to wide; each of these classes is one of SQLAlchemy's own, of which a dialect's types are subclasses."""


@dataclass(frozen=True)
class Shape:
    """The tables of this library in a database: columns by table and name, and what is unique."""

    columns: dict[str, dict[str, Any]]
    unique: dict[str, set[tuple[str, ...]]]


def shape_of(connection: Connection) -> Shape:
    """What there is now."""
    inspector = inspect(connection)
    tables = [name for name in inspector.get_table_names() if name.startswith("ebbs_") and name != schema.VERSION_TABLE]
    return Shape(
        columns={name: {each["name"]: each for each in inspector.get_columns(name)} for name in tables},
        unique={name: set(_unique(inspector, name)) for name in tables},
    )


def _unique(inspector: Any, table: str) -> Iterator[tuple[str, ...]]:
    for each in inspector.get_unique_constraints(table):
        yield tuple(each["column_names"])
    for each in inspector.get_indexes(table):
        if each["unique"]:
            yield tuple(map(str, each["column_names"]))


def breaks(before: Shape, after: Shape) -> list[str]:
    """What code that was written for the one finds broken in the other. A renaming is a loss of the old name."""
    found = []
    for table, columns in before.columns.items():
        if table not in after.columns:
            found.append(f"table {table} is gone")
            continue
        now = after.columns[table]
        found += [f"column {table}.{name} is gone" for name in columns if name not in now]
        for name, column in now.items():
            old = columns.get(name)
            if _must_be_given(column) and (old is None or not _must_be_given(old)):
                found.append(f"column {table}.{name} has to be given")
            if old is not None and _is_narrower(old["type"], column["type"]):
                found.append(f"column {table}.{name} was {old['type']}, is {column['type']}")
        found += [f"{table} {each} has to be unique" for each in after.unique[table] - before.unique[table]]
    return found


def _must_be_given(column: dict[str, Any]) -> bool:
    return not column["nullable"] and column["default"] is None and not column.get("identity")


def _is_narrower(before: TypeEngine[Any], after: TypeEngine[Any]) -> bool:
    if isinstance(before, String) and isinstance(after, String):
        return after.length is not None and (before.length is None or after.length < before.length)
    if isinstance(before, Integer) and isinstance(after, Integer):
        return _width(after) < _width(before)
    return str(before) != str(after)


def _width(kind: Integer) -> int:
    return max((n for n, each in enumerate(_INTEGERS) if isinstance(kind, each) and each is not Integer), default=1)


def unmarked_breaks(connection: Connection, migrations: Path) -> list[str]:
    """Take each step of a history on an empty database: what breaks the release before, and is not marked."""
    found = []
    for script in scripts_in(migrations):
        if script.down_revision is None:
            schema.upgrade(connection, script.revision)
            continue
        before = shape_of(connection)
        schema.upgrade(connection, script.revision)
        broken = breaks(before, shape_of(connection))
        since = getattr(script.module, "contracts_since", None)
        if broken and not (isinstance(since, str) and re.fullmatch(r"\d+\.\d+\.\d+", since)):
            found += [f"{script.revision}: {each}" for each in broken]
    return found


def scripts_in(migrations: Path) -> list[Script]:
    """The steps of a history, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    return list(reversed(list(ScriptDirectory.from_config(config).walk_revisions())))


NEXT_REVISION = "ebbs_{:04d}".format(int(schema.REVISION.removeprefix("ebbs_")) + 1)
"""What the release after this one needs, in tests."""


def write_next_release(folder: Path, upgrade: str, downgrade: str = "", mark: str = "") -> Path:
    """The migrations of a next release: those of this one, and one more step with this body.

    Args:
        folder: where to write them.
        upgrade: statements, in which `op`, `sa` and `schema`, the named schema, are known.
        downgrade: statements of the way back.
        mark: a line at the head of the script.
    """
    migrations = shutil.copytree(MIGRATIONS, folder / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    body, way_back = (_indented(each) for each in (upgrade, downgrade))
    (migrations / "versions" / f"{NEXT_REVISION}_next.py").write_text(
        f'''"""A step of the next release."""

import sqlalchemy as sa
from alembic import op

from ebbs_and_flows.schema import in_step, named_schema

revision = {NEXT_REVISION!r}
down_revision = {schema.REVISION!r}
{mark}


@in_step(revision, down_revision)
def upgrade():
    schema = named_schema()
{body}


@in_step(revision, down_revision)
def downgrade():
    schema = named_schema()
{way_back}
'''
    )
    return migrations


def _indented(statements: str) -> str:
    return "\n".join(f"    {line.strip()}" for line in statements.strip().splitlines())
