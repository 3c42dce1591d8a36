"""A clock that a test moves by hand, in place of the time of its event loop."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["IDLE", "Clock"]

IDLE: Final = 0.1
"""Seconds of real time in which nothing happens and the test waits, after which the clock goes on to the next timer."""


class Clock:
    """The time of the running event loop, which stands still until the test moves it.

    Whatever asyncio measures goes by this clock: the pauses of a :class:`~silbo.Backoff`, the attempts of a consumer, time limits
    of listeners, ``asyncio.sleep``, all of :class:`~silbo.brokers.memory.MemoryBroker`. The clock is also a function that returns
    the seconds since 1970, for ``MemoryStore(clock=clock)``. After the ``with`` block time flows again, from where it stands.

    Where the test itself waits for something that takes time (the end of a consumer, a ``wait_for(timeout=...)``), the clock does not
    block it: after IDLE seconds of real time in which nothing happens, it goes on to the next timer. So use it for what happens in
    one process; the answers of a server take real time.

    Raises:
        TypeError: The running loop is not asyncio's own: uvloop's time can't be stopped.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._start = 0.0
        self._wall = 0.0
        self._loop: Any = None
        self._selector: Any = None  # the loop forgets it when it is closed, perhaps before the clock is left
        self._real_select: Any = None

    def __enter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("a clock is entered once; make another")
        loop: Any = asyncio.get_running_loop()
        if not hasattr(loop, "_selector"):
            raise TypeError(f"the time of {loop!r} can't be stopped: run the test on asyncio's own event loop")
        selector = loop._selector  # noqa: SLF001  # asyncio offers no other way to wait for a clock
        if "select" in vars(selector):
            raise RuntimeError("the time of this loop stands still already; use the clock that stopped it")
        self._loop = loop
        self._now = self._start = loop.time()
        self._wall = time.time()
        self._selector = selector
        self._real_select = selector.select
        loop.time = self._time
        selector.select = self._select
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = self._loop
        del self._selector.select
        real = type(loop).time
        ahead = self._now - real(loop)
        loop.time = lambda: real(loop) + ahead  # timers that are set go on from here

    def __call__(self) -> float:
        """Return the seconds since 1970: the time at which it was stopped, and what it was moved since."""
        return self._wall + self._now - self._start

    def advance(self, seconds: float) -> None:
        """Move the time on. What is due by then runs when the test awaits next, as in ``await silbo_events.settle()``.

        All of it runs at the new time. For several steps of which each sets a timer for the next, move several times.
        """
        if not seconds >= 0:
            raise ValueError(f"time is moved on, by 0 seconds or more, not by {seconds!r}")
        self._now += seconds

    @property
    def next_timer(self) -> float | None:
        """Seconds until the next timer of the loop is due; None if there is none."""
        timers = [handle.when() for handle in self._loop._scheduled if not handle.cancelled()]  # noqa: SLF001
        return max(0.0, min(timers) - self._now) if timers else None

    def _time(self) -> float:
        return self._now

    def _select(self, timeout: float | None) -> Any:
        """Wait for files and sockets as the loop asks, but for at most IDLE seconds; then let the next timer be due."""
        if timeout is None or timeout <= 0:
            return self._real_select(timeout)
        began = time.monotonic()
        events = self._real_select(min(timeout, IDLE))
        if not events and time.monotonic() - began >= min(timeout, IDLE):  # not woken by a signal
            self._now += timeout
        return events
