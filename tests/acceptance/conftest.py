"""What is left out where a program is not installed; the head of the run says so."""

from __future__ import annotations

from tests import pgbouncer

collect_ignore = [] if pgbouncer.PROGRAM else ["test_pgbouncer.py"]
