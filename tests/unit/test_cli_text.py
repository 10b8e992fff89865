"""What the command line makes of texts, durations and attempts before it prints them."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from ebbs_and_flows import TaskExecution, TaskStatus
from ebbs_and_flows.cli.terminal import distance, duration, safe, safe_lines
from ebbs_and_flows.cli.timeline import ASCII, draw

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def attempts(*spans: tuple[float, float | None]) -> list[TaskExecution]:
    """Attempts that started and ended so many seconds after noon."""
    return [
        TaskExecution(
            flow_execution_id=1,
            flow_execution_step=step,
            task_index=0,
            name="t",
            attempt=step,
            status=TaskStatus.RUNNING if end is None else TaskStatus.FAILED,
            started_at=NOON + timedelta(seconds=start),
            finished_at=None if end is None else NOON + timedelta(seconds=end),
        )
        for step, (start, end) in enumerate(spans, start=1)
    ]


def drawn(*spans: tuple[float, float | None], width: int = 20, now: float = 1000) -> list[str]:
    timeline = draw(attempts(*spans), NOON + timedelta(seconds=now), width, ASCII)
    return [f"{bar.indent}{bar.wait}{bar.run}" for bar in timeline.bars]


@pytest.mark.parametrize(
    "character", [*map(chr, range(32)), "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\u2028", "\ud800"]
)
def test_what_is_not_printable_is_escaped(character: str) -> None:
    assert safe(f"a{character}b").isprintable()
    assert safe(f"a{character}b").startswith("a\\")


def test_what_is_printable_stays() -> None:
    text = "Grüße, 日本語, 🚢, C:\\temp [bold]"
    assert safe(text) == text


def test_lines_stay_lines() -> None:
    assert safe_lines("a\r\n\tb\x1b\n\n") == ["a", "    b\\x1b"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0ms"), (-1, "0ms"), (0.0124, "12ms"), (0.9999, "1.0s"), (59.94, "59.9s"), (59.99, "1m00s"), (184, "3m04s"),
     (18_200, "5h03m"), (1_051_200, "12d04h")],
)  # fmt: skip
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_distance_says_its_direction() -> None:
    assert distance(NOON, NOON + timedelta(seconds=5)) == "5.0s ago"
    assert distance(NOON, NOON - timedelta(seconds=5)) == "in 5.0s"


def test_bars_stand_on_one_scale_with_the_waits_between_them() -> None:
    assert drawn((0, 5), (5, 10), (15, 20)) == [
        "=====",
        "     =====",
        "          .....=====",
    ]


def test_the_shortest_attempt_is_seen() -> None:
    assert drawn((0, 10), (10, 10), (10, 10)) == ["=" * 20, " " * 19 + "=", " " * 19 + "="]
    assert drawn((0, 0)) == ["="]


def test_an_attempt_that_runs_reaches_until_now() -> None:
    assert drawn((0, 5), (5, None), now=20) == ["=====", "     ==============="]


def test_a_night_between_two_attempts_leaves_room_for_them() -> None:
    first, second = drawn((0, 10), (36_010, 36_020))
    assert first == "========"
    assert second == "        .//.========"


def test_clocks_that_disagree_do_no_harm() -> None:
    assert all(len(bar) <= 20 for bar in drawn((10, 5), (3, 4), (0, None), now=-5))


def test_no_attempts_are_no_bars() -> None:
    assert draw([], NOON, 20).bars == ()
