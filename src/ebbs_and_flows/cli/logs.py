"""Log records as lines on stderr, each with the attempt that it is about: text for people, JSON for programs."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from rich.logging import RichHandler

from ebbs_and_flows.cli.terminal import safe, safe_lines
from ebbs_and_flows.logs import FIELDS, AttemptLogFilter, logger


class LogLevel(str, Enum):
    """From which level on records are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    __str__ = str.__str__


class LogFormat(str, Enum):
    """How a record is written."""

    TEXT = "text"
    """One line of the time in UTC, the level, the message and the fields; a traceback follows, indented."""

    JSON = "json"
    """One object a line: time, level, logger, message, the fields that it has, exception."""

    __str__ = str.__str__


@contextmanager
def logs_on_stderr(level: LogLevel, log_format: LogFormat) -> Iterator[None]:
    """Have all log records written to stderr while the block lasts.

    Handlers that the application has set up stay, but for those that write to stdout or stderr as well: no record
    comes twice.
    """
    root = logging.getLogger()
    handlers, root_level, is_disabled = root.handlers[:], root.level, logger.disabled
    root.handlers = [each for each in handlers if not _writes_to_stdout_or_stderr(each)]
    _add_handler(level, log_format)
    try:
        yield
    finally:
        root.handlers, logger.disabled = handlers, is_disabled
        root.setLevel(root_level)


def log_in_pool_process(level: LogLevel, log_format: LogFormat) -> None:
    """The beginning of a process in which tasks run: log as the worker does, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _add_handler(level, log_format)


def _add_handler(level: LogLevel, log_format: LogFormat) -> None:
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    handler.addFilter(AttemptLogFilter())
    handler.setLevel(level.name)
    root.addHandler(handler)
    root.setLevel(min(handler.level, root.level or handler.level))  # other handlers may want more
    logger.disabled = False  # dictConfig disables the loggers that it does not name, unless it is told not to


class TextFormatter(logging.Formatter):
    """A record as text; nothing in it can break its line or do anything to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback's lines below it, indented."""
        line = f"{_time(record)} {record.levelname} {safe(record.getMessage())}"
        for name, value in _fields(record).items():
            line += f" {name}={_quoted(value)}"
        below = self.formatException(record.exc_info) if record.exc_info else ""
        if record.stack_info:
            below += f"\n{record.stack_info}"
        return "\n".join([line, *(f"    {each}" for each in safe_lines(below.strip("\n")) if each)])


class JsonFormatter(logging.Formatter):
    """A record as an object of JSON, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """The object on one line."""
        document: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def _time(record: logging.LogRecord) -> str:
    return f"{datetime.fromtimestamp(record.created, timezone.utc):%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Those of the attempt's fields that the record has."""
    found = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def _quoted(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and not set(text) & set(' ="') else json.dumps(text)


def _writes_to_stdout_or_stderr(handler: logging.Handler) -> bool:
    if isinstance(handler, RichHandler):
        return True
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams
