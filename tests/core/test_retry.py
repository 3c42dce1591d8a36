"""When to try again, when to give up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from silbo._retry import Backoff, pause


def test_delays_grow_by_the_factor_up_to_the_cap() -> None:
    backoff = Backoff(initial=0.1, factor=3, cap=1.0, jitter=0)
    assert [backoff.delay(attempt) for attempt in (1, 2, 3, 4, 100)] == pytest.approx([0.1, 0.3, 0.9, 1.0, 1.0])


def test_delay_after_any_number_of_attempts_is_the_cap() -> None:
    """A message may fail for weeks: the power overflows a float, the delay doesn't."""
    assert Backoff(initial=0.1, factor=2.0, cap=30, jitter=0).delay(1_000_000) == 30


def test_jitter_takes_up_to_its_share_away() -> None:
    """Below the delay, never above: so the cap holds; and scattered, so that those who failed together part."""
    delays = [Backoff(initial=8, cap=8, jitter=0.25).delay(1) for _ in range(500)]
    assert all(delay is not None and 6 <= delay <= 8 for delay in delays)
    assert len(set(delays)) > 400


def test_gives_up_after_the_last_attempt() -> None:
    backoff = Backoff(attempts=3)
    assert [backoff.delay(attempt) is None for attempt in (1, 2, 3, 4)] == [False, False, True, True]


def test_does_not_give_up_by_default() -> None:
    assert Backoff().delay(10**6) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": 0},
        {"initial": -1},
        {"initial": 2, "cap": 1},
        {"factor": 0.5},
        {"jitter": 1.5},
        {"jitter": -0.1},
        {"attempts": 0},
        {"initial": float("nan")},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Backoff(**wrong)


async def test_pause_ends_with_the_stop() -> None:
    """A loop that waits for a broker does not hold a shutdown up."""
    stopping = asyncio.Event()
    waiting = asyncio.create_task(pause(3600, stopping))
    await asyncio.sleep(0)
    stopping.set()
    await asyncio.wait_for(waiting, 5)


async def test_pause_ends_after_its_time() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    await pause(0.02, asyncio.Event())
    assert 0.015 <= loop.time() - before < 5
