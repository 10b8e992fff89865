"""SQL expressions that each database spells in its own way; the spelling stands in that database's module."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Float, bindparam
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from ebbs_and_flows.persistence.tables import UtcDateTime


class database_now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock as it is now, not as it was when the transaction began."""

    name = "database_now"
    type = UtcDateTime()
    inherit_cache = True


class statement_now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock at the start of the statement: one value for all rows, so that an index can be searched by
    it.
    """

    name = "statement_now"
    type = UtcDateTime()
    inherit_cache = True


class seconds_from_now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock plus a number of seconds; NULL for NULL."""

    name = "seconds_from_now"
    type = UtcDateTime()
    inherit_cache = True


class latest(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The later of two times: with it a time never goes back, even where the machine's clock is set back."""

    name = "latest"
    type = UtcDateTime()
    inherit_cache = True


def seconds_parameter(name: str) -> ColumnElement[Any]:
    """`seconds_from_now` of a bound number of seconds."""
    return seconds_from_now(bindparam(name, type_=Float()))
