"""Isolation: the level that this library's own transactions need, whatever a host's engine has."""

from __future__ import annotations

from sqlalchemy import Connection, Engine

_IS_SET_AGAIN = "ebbs_isolation_is_set_again"


def isolated(engine: Engine, level: str) -> Engine:
    """The same engine and pool with another isolation level, for connections from `connect`."""
    # Options of an engine are applied to its connections after those of an engine made from it.
    is_overruled = "isolation_level" in engine.get_execution_options()
    return engine.execution_options(isolation_level=level, **{_IS_SET_AGAIN: is_overruled})


def connect(engine: Engine) -> Connection:
    """A connection at the level of its engine, also where the host's engine has one among its execution options."""
    connection = engine.connect()
    options = engine.get_execution_options()
    if options.get(_IS_SET_AGAIN, False):
        try:
            connection.execution_options(isolation_level=options["isolation_level"])
        except BaseException:
            connection.close()
            raise
    return connection
