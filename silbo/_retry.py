"""When to try again, when to give up, and how a loop that tries again ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from random import random

from silbo._checks import check_count, check_seconds

__all__ = ["Backoff", "end_tasks", "raise_if_cancelled", "pause"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that grow from attempt to attempt, scattered so that many who failed together don't return together.

    Attributes:
        initial: Seconds after the first failed attempt.
        factor: What each further delay is multiplied by.
        cap: No delay is longer, in seconds.
        jitter: The share of a delay that is left to chance, 0 to 1: at 0.5 it is between half of it and all of it.
        attempts: Give up after so many; None never does.
    """

    _: KW_ONLY
    initial: float = 0.1
    factor: float = 2.0
    cap: float = 30.0
    jitter: float = 0.5
    attempts: int | None = None

    def __post_init__(self) -> None:
        for name in ("initial", "cap"):
            check_seconds(name, getattr(self, name))
        for name in ("factor", "jitter"):
            if not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name} is a number, not {getattr(self, name)!r}")
        if not (self.initial > 0 and self.factor >= 1 and self.cap >= self.initial and 0 <= self.jitter <= 1):
            raise ValueError(f"a back-off needs 0 < initial <= cap, factor >= 1 and jitter from 0 to 1, not {self!r}")
        if self.attempts is not None:
            check_count("attempts", self.attempts)

    def delay(self, attempt: int) -> float | None:
        """Seconds to wait after an attempt that failed, counted from 1; None to give up."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        try:
            full = min(self.cap, self.initial * self.factor ** (attempt - 1))
        except OverflowError:
            full = self.cap
        return full * (1 - self.jitter * random())


async def pause(seconds: float | None, stopping: asyncio.Event) -> None:
    """Wait, but not longer than until the stop."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()


def raise_if_cancelled() -> None:
    """Meet a cancellation that something awaited has swallowed, as ``asyncio.wait_for`` can on Python 3.11.

    For the loops of tasks of our own: one that never ends by itself would otherwise run on.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def end_tasks(tasks: Sequence[asyncio.Task[None]], within: float) -> None:
    """Wait for their end, and cancel what lasts longer."""
    _, late = await asyncio.wait(tasks, timeout=max(0.0, within))
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
