"""The chaos run in short: workers are killed and stopped, the server crashes, and nothing is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"

SHORT = {
    "postgresql": ["--executions", "40", "--kills", "4", "--restarts", "1", "--zombies", "1"],
    "sqlite": ["--sqlite", "--executions", "40", "--kills", "3", "--zombies", "1"],
}
DONE = {
    "postgresql": "4 workers killed, 1 crashes of the server, 1 workers stopped past their lease",
    "sqlite": "3 workers killed, 0 crashes of the server, 1 workers stopped past their lease",
}

PACE = ["--workers", "3", "--task-seconds", "0.1", "--pause-seconds", "0.3", "--lease-seconds", "1"]
# Recovery takes lease + poll + 1 s; a machine that is busy with other tests is given more before it counts as late.
PATIENCE = ["--slack-seconds", "10", "--deadline-seconds", "90"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no SIGSTOP on Windows")
@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost_or_doubled_while_workers_and_server_are_killed(kind: str) -> None:
    run = subprocess.run(
        [sys.executable, str(CHAOS), *SHORT[kind], *PACE, *PATIENCE],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert DONE[kind] in run.stdout
    assert "violations:  0" in run.stdout
