"""The examples do what they say, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SURVIVE_A_KILL = Path(__file__).parents[2] / "examples" / "survive_a_kill.py"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_flow_survives_a_kill_and_goes_on_at_its_task(tmp_path: Path) -> None:
    first, second = (
        subprocess.run(
            [sys.executable, str(SURVIVE_A_KILL)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for _ in range(2)
    )
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.splitlines()[-1] == "serve: the power goes out"
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == [
        "execution 1 was left RUNNING: going on at its task 1",
        "serve: carrying a cup of Yirgacheffe",
        "serve: on the table",
        "SUCCEEDED {'beans': 'Yirgacheffe', 'coffee': 'a cup of Yirgacheffe', 'served': True}",
        "  brew   attempt 1: SUCCEEDED ",
        "  serve  attempt 1: FAILED WorkerLost",
        "  serve  attempt 2: SUCCEEDED ",
    ]
