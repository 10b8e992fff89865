"""What the databases say about the durability of a commit."""

from __future__ import annotations

from collections.abc import Callable

POSTGRESQL_SETTINGS = (
    "fsync",
    "synchronous_commit",
    "full_page_writes",
    "wal_sync_method",
    "wal_level",
    "commit_delay",
    "shared_buffers",
    "max_wal_size",
    "max_connections",
)
SQLITE_SETTINGS = ("journal_mode", "synchronous", "wal_autocheckpoint")

SYNCHRONOUS = {"0": "OFF", "1": "NORMAL", "2": "FULL", "3": "EXTRA"}


def postgresql_settings(scalar: Callable[[str], object]) -> dict[str, str]:
    """Read the settings that decide what a commit costs."""
    return {name: str(scalar(f"SHOW {name}")) for name in POSTGRESQL_SETTINGS}


def sqlite_settings(scalar: Callable[[str], object]) -> dict[str, str]:
    """Read the settings that decide what a commit costs."""
    settings = {name: str(scalar(f"PRAGMA {name}")) for name in SQLITE_SETTINGS}
    settings["synchronous"] = SYNCHRONOUS[settings["synchronous"]]
    return settings


def is_durable(settings: dict[str, str]) -> bool:
    """Whether what is committed survives a power cut, as far as the database goes."""
    if "fsync" in settings:
        return settings["fsync"] == "on" and settings["synchronous_commit"] == "on"
    return settings["synchronous"] in ("FULL", "EXTRA")
