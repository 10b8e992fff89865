"""What `--app module:name` names: found, imported, and told apart from what it could be mistaken for."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from sqlalchemy.exc import DBAPIError

from ebbs_and_flows.cli.terminal import safe_lines, say
from ebbs_and_flows.errors import EbbsError, SchemaError
from ebbs_and_flows.runner import FlowRunner
from ebbs_and_flows.worker import Worker

EXPECTED = "a FlowRunner, a Worker, or a function that returns one of them"

NOT_THE_APPLICATION = (__file__, str(importlib.__file__), "<frozen importlib")
"""The files of the frames between here and the application's own code."""


class AppError(EbbsError, ValueError):
    """What `--app` names cannot be run; nothing was run."""


def load_app(given: str) -> FlowRunner | Worker:
    """The runner or worker that is named, whose module is imported with the current folder first on the path.

    Args:
        given: `"module:name"`; the name may be dotted, and may be that of a function, which is called.

    Raises:
        AppError: there is none; where the fault is within the application, after its traceback on stderr.
        SchemaError, DBAPIError: what its database said when the application opened it.
    """
    module_name, colon, name = given.partition(":")
    if not (colon and module_name and name):
        raise AppError(f"--app {given!r} is not MODULE:NAME, for example shop.flows:runner")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise AppError(f"{module_name!r} is not a module's name: write it as Python imports it, for example shop.flows")
    folder = str(Path.cwd())
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    found = _attribute(_imported(module_name, folder), name)
    if callable(found) and not isinstance(found, (type, FlowRunner, Worker)):
        found = _called(found, given)
    if isinstance(found, (FlowRunner, Worker)):
        return found
    if inspect.iscoroutine(found):
        found.close()
    raise AppError(f"{given} is {_described(found)}: expected {EXPECTED}")


def _imported(module_name: str, folder: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except (SchemaError, DBAPIError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and _is_or_holds(error.name, module_name):
            hint = "; leave out .py" if module_name.endswith(".py") else ""
            raise AppError(f"there is no module {error.name!r} in {folder} or on PYTHONPATH{hint}") from error
        _print_traceback(error)
        raise AppError(
            f"module {module_name} is there, but cannot be imported: {_said(error)}; the traceback stands above"
        ) from error


def _attribute(module: ModuleType, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            where = f"module {module.__name__}" if found is module else f"{_described(found)} in {module.__name__}"
            there = [each for each, value in vars(module).items() if isinstance(value, (FlowRunner, Worker))]
            hint = f": it has {', '.join(there)}" if there else f", nor any FlowRunner or Worker: expected {EXPECTED}"
            raise AppError(f"{where} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _called(function: Callable[..., Any], given: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise AppError(f"{given} is called without arguments, which does not do: {error}") from error
    except ValueError:  # it does not say what it takes
        pass
    try:
        return function()
    except (SchemaError, DBAPIError):
        raise
    except (Exception, SystemExit) as error:
        _print_traceback(error)
        raise AppError(f"{given} was called and raised {_said(error)}; the traceback stands above") from error


def _is_or_holds(missing: str | None, module_name: str) -> bool:
    """Whether the module that is missing is the application's own, or a package that was to hold it."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _print_traceback(error: BaseException) -> None:
    """Print the traceback to stderr, without what stands before the application's own code."""
    own: TracebackType | None = error.__traceback__
    while own is not None and own.tb_frame.f_code.co_filename.startswith(NOT_THE_APPLICATION):
        own = own.tb_next
    for line in safe_lines("".join(traceback.format_exception(type(error), error, own))):
        say(line)


def _said(error: BaseException) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name


def _described(found: object) -> str:
    if isinstance(found, ModuleType):
        return f"the module {found.__name__}"
    if isinstance(found, type):
        return f"the class {found.__name__}"
    name = type(found).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
