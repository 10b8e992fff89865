"""The command `ebbs`. It needs the extra `cli`; importing this package does not."""

from ebbs_and_flows.cli.entry import main

__all__ = ["main"]
