"""The delays between attempts, and the waiting of loops that try again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from random import random

from silbo._checks import check_count, check_seconds

__all__ = ["Backoff", "pause"]


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that grow with each attempt, with a random part, so that clients that failed together don't return together.

    Attributes:
        initial: Seconds after the first failed attempt.
        factor: Each further delay is the last one times this; 1 or more.
        cap: The longest delay, in seconds.
        jitter: The random share of a delay, 0 to 1: with 0.5 a delay is between half of its length and all of it.
        attempts: The attempts after which to give up; None to never give up.
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
        """Return the seconds to wait after a failed attempt, counted from 1; None to give up."""
        if self.attempts is not None and attempt >= self.attempts:
            return None
        try:
            full = min(self.cap, self.initial * self.factor ** (attempt - 1))
        except OverflowError:
            full = self.cap
        return full * (1 - self.jitter * random())


async def pause(seconds: float | None, stopping: asyncio.Event) -> None:
    """Sleep for some seconds, or until the stop if that comes first; None sleeps until the stop."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
