"""Write the SQL of each migration for PostgreSQL into a folder, a file a step: `nox -s lint` gives them to squawk.

Each by itself, because a table that is made in the same file may be altered in ways that one with rows may not.
"""

from __future__ import annotations

import sys
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

from ebbs_and_flows import schema


def main(folder: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[1] / "migrations").replace("%", "%%"))
    for script in ScriptDirectory.from_config(config).walk_revisions():
        begin = script.down_revision or "base"
        (folder / f"{script.revision}.sql").write_text(schema.sql("postgresql", f"{begin}:{script.revision}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
