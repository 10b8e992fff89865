"""Where the command `ebbs` begins."""

from __future__ import annotations

import sys

EXTRA = frozenset({"click", "rich", "shellingham", "typer"})
"""The packages that come with the extra `cli`."""


def main() -> None:
    """Run the command line and exit with its code; without its extra, say so and exit with 2."""
    try:
        from ebbs_and_flows.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        sys.stderr.write("the command line needs its extra: pip install 'ebbs-and-flows[cli]'\n")
        raise SystemExit(2) from None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no reason to fail
    app(prog_name="ebbs")
