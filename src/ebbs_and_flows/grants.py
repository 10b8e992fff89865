"""Grants: what the roles that migrate, work and read may do on PostgreSQL, as SQL for a DBA to read and run."""

from __future__ import annotations

from ebbs_and_flows.errors import InvalidArgumentError, InvalidNameError
from ebbs_and_flows.persistence.databases import check_schema_name
from ebbs_and_flows.schema import VERSION_TABLE

MIGRATOR, WORKER, READER = "ebbs_migrator", "ebbs_worker", "ebbs_reader"
"""The roles where none is named."""

WRITTEN_BY_WORKERS = {
    "ebbs_flow_executions": ("INSERT", "UPDATE"),
    "ebbs_task_executions": ("INSERT", "UPDATE"),
    "ebbs_flow_transitions": ("INSERT",),
    VERSION_TABLE: (),
}
"""Every table and view, and what a worker does to it besides reading. It deletes nothing, and needs no privilege on a
sequence: ids are identities (https://www.postgresql.org/docs/current/sql-createtable.html).
"""

LATER = ("INSERT", "UPDATE")
"""What a worker may do to a table that a later migration makes, besides reading, until the SQL is run again."""

LONGEST_ROLE = 63
"""In bytes (https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS)."""


def sql(
    *,
    migrator: str | None = None,
    worker: str | None = None,
    reader: str | None = None,
    schema: str | None = None,
    default_privileges: bool | None = None,
) -> str:
    """The SQL that gives roles what they need and no more. Needs no database; may be run any number of times.

    Args:
        migrator: who runs `ebbs db upgrade` and owns the tables.
        worker: what schedules and runs flows: the service, `ebbs worker`, and who cancels or re-runs by hand.
        reader: who may look at everything, contexts included.
        schema: the named schema that holds the tables or will; default `public`.
        default_privileges: whether to give the worker and the reader also what the migrator will create later in this
            schema. Default where a schema is named. Elsewhere the migrator may make tables of others, which would be
            given away with ours; there the SQL is to be run again after each upgrade.

        Without any role all three, as `ebbs_migrator`, `ebbs_worker` and `ebbs_reader`; else those that are named. The
        roles themselves are not made here.

    Raises:
        InvalidNameError: a role name that PostgreSQL does not take.
        InvalidArgumentError: one role for two of them, or default privileges without a migrator.
        DatabaseUrlError: a schema name that cannot be used.
    """
    if migrator is worker is reader is None:
        migrator, worker, reader = MIGRATOR, WORKER, READER
    named = {"migrator": migrator, "worker": worker, "reader": reader}
    roles = {kind: _valid_role(kind, name) for kind, name in named.items() if name is not None}
    for kind, name in roles.items():
        if list(roles.values()).count(name) > 1:
            raise InvalidArgumentError(kind, name, "a role of its own for each of migrator, worker and reader")
    check_schema_name(schema, "postgresql")
    if default_privileges is None:
        default_privileges = schema is not None and migrator is not None
    if default_privileges and migrator is None:
        raise InvalidArgumentError("default_privileges", True, "a migrator with it, whose tables they are for")
    quoted = {kind: _quoted(name) for kind, name in roles.items()}
    parts = [_head(quoted), _on_schema(quoted, schema)]
    if len(quoted) > 1 or migrator is None:
        if default_privileges:
            parts.append(_on_later_tables(quoted, schema))
        parts.append(_on_tables(quoted, schema, are_covered=default_privileges))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _head(roles: dict[str, str]) -> list[str]:
    return [
        "-- What roles may do with the tables of Ebbs and Flows. A superuser, or who owns the database or the tables,",
        "-- may run it any number of times. The roles have to be there:",
        *(f"--   CREATE ROLE {name} LOGIN;" for name in roles.values()),
    ]


def _on_schema(roles: dict[str, str], schema: str | None) -> list[str]:
    name, lines = _quoted(schema or "public"), []
    if "migrator" in roles:
        if schema is not None:
            lines.append(f"CREATE SCHEMA IF NOT EXISTS {name} AUTHORIZATION {roles['migrator']};")
        lines.append(f"GRANT USAGE, CREATE ON SCHEMA {name} TO {roles['migrator']};")
    if users := _users(roles):
        lines.append(f"GRANT USAGE ON SCHEMA {name} TO {users};")
    return lines


def _on_later_tables(roles: dict[str, str], schema: str | None) -> list[str]:
    later = f"ALTER DEFAULT PRIVILEGES FOR ROLE {roles['migrator']} IN SCHEMA {_quoted(schema or 'public')}"
    lines = [
        "-- What the migrator will create.",
        f"{later} GRANT SELECT ON TABLES TO {_users(roles)};",
    ]
    if "worker" in roles:
        lines.append(f"{later} GRANT {', '.join(LATER)} ON TABLES TO {roles['worker']};")
    return lines


def _on_tables(roles: dict[str, str], schema: str | None, *, are_covered: bool) -> list[str]:
    """What is there already, in one step, so that a worker that runs meanwhile lacks nothing.

    Args:
        are_covered: whether default privileges give it before it is there, which to the worker is more than it needs.
    """
    name = _quoted(schema or "public")
    again = "to take from the worker what it does not need" if are_covered else "or nobody may use them"
    body = [
        "BEGIN",
        f"    IF to_regclass('{name}.{VERSION_TABLE}') IS NULL THEN",
        f"        RAISE WARNING 'no tables yet: run this again after \"ebbs db upgrade\", {again}';",
        "        RETURN;",
        "    END IF;",
    ]
    for table, written in WRITTEN_BY_WORKERS.items():
        if "worker" in roles:
            body.append(f"    GRANT {', '.join(('SELECT', *written))} ON {name}.{table} TO {roles['worker']};")
        if "worker" in roles and (beyond := [each for each in LATER if each not in written]):
            body.append(f"    REVOKE {', '.join(beyond)} ON {name}.{table} FROM {roles['worker']};")
        if "reader" in roles:
            body.append(f"    GRANT SELECT ON {name}.{table} TO {roles['reader']};")
    body.append("END")
    quote = "$grants$"
    while any(quote in line for line in body):  # a role may be called anything
        quote = f"{quote[:-1]}_$"
    return ["-- What is there already.", f"DO {quote}", *body, f"{quote};"]


def _users(roles: dict[str, str]) -> str:
    return ", ".join(name for kind, name in roles.items() if kind != "migrator")


def _valid_role(kind: str, name: object) -> str:
    if not isinstance(name, str):
        raise InvalidNameError(f"{kind} role", name, f"must be a str, not {type(name).__name__}")
    if not name.strip() or not name.isprintable() or len(name.encode()) > LONGEST_ROLE:
        raise InvalidNameError(
            f"{kind} role", name, f"must be printable, not blank, and have at most {LONGEST_ROLE} bytes"
        )
    if name in ("public", "none") or name.startswith("pg_"):
        raise InvalidNameError(f"{kind} role", name, "is PostgreSQL's own: name one that CREATE ROLE has made")
    return name


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'
