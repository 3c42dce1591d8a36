"""The owner of listeners: a plugin, as the dispatches of its listeners see it."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections import deque
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

from silbo.dispatch.in_thread import ThreadPool
from silbo.dispatch.source import describe_listener
from silbo.policy import Budget

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import FrameType

    from silbo.dispatch.in_thread import InThread
    from silbo.dispatch.on_loop import OnLoop
    from silbo.dispatch.options import Listener
    from silbo.policy import Policy

__all__ = ["Owner", "Report", "Run", "awaits"]

Kind: TypeAlias = Literal["failed", "long", "switched off", "switched on"]


class Report(Protocol):
    """A function that tells the host about a plugin."""

    def __call__(self, kind: Kind, text: str, /, *, listener: Listener | None, error: Exception | None) -> None:
        """Tell the kind of event, a text, and the listener and error, if there are any."""
        ...


class Run:
    """A run of a listener that waits for something.

    Attributes:
        listener: The listener.
        coroutine: The coroutine of the listener.
        is_expired: True if the owner has ended the run.
    """

    __slots__ = ("_limit", "_loop", "_task", "coroutine", "is_expired", "listener")

    def __init__(
        self,
        listener: Listener,
        coroutine: Coroutine[Any, Any, object],
        limit: asyncio.Timeout,
        task: asyncio.Task[Any],
    ) -> None:
        self.listener: Final = listener
        self.coroutine: Final = coroutine
        self.is_expired = False
        self._task = task
        self._limit = limit
        self._loop = asyncio.get_running_loop()

    def expire(self) -> None:
        """Cancel the run as if its time were over; from any thread."""
        self.is_expired = True

        def end() -> None:
            with suppress(RuntimeError):  # it has ended meanwhile
                self._limit.reschedule(self._loop.time())

        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(end)

    def describe(self) -> str:
        """Return the name of the listener, with its file and line."""
        return describe_listener(self.listener)

    def is_around(self) -> bool:
        """Return True if the code that calls this is a part of the run, or of a task that the run awaits."""
        if awaits(self._task, asyncio.current_task()):  # as wait_for() of Python 3.11, gather() and wait() do
            return True
        frame: FrameType | None = sys._getframe()  # noqa: SLF001  # the call stack
        own = getattr(self.coroutine, "cr_frame", None)
        while frame is not None:
            if frame is own:
                return True
            frame = frame.f_back
        return False


class Owner:
    """A plugin in one of its generations.

    Attributes:
        name: The name of the plugin.
        policy: The policy of the host for this plugin; None for none.
        place: The place of its listeners among others of the same priority, as a number of registration.
        is_active: True if dispatches that begin now get its listeners.
        has_ended: True from its tear-down on: its listeners don't run any more, not even in a dispatch that began before.
        off: The reason why the plugin is switched off; empty if it is on.
        is_off_by_host: True if the host has switched it off by hand.
        off_until: The time on the monotonic clock when it is switched on again.
        on_loop: Marks the listener that holds the event loop.
        held: Seconds for which its listeners have held the event loop, since they were last checked.
        held_limit: Seconds after which they are checked.
        failures: The number of their runs that failed.
        report: Tells the host.
        runs: The runs of its listeners that wait for something.
    """

    def __init__(self, name: str, *, policy: Policy | None, place: float, on_loop: OnLoop, report: Report) -> None:
        self.name: Final = name
        self.policy: Final = policy
        self.place = place
        self.is_active = True
        self.has_ended = False
        self.off = ""
        self.is_off_by_host = False
        self.off_until = 0.0
        self.on_loop: Final = on_loop
        self.budget: Final = Budget() if policy is None or policy.budget is None else policy.budget
        self.held = 0.0
        self.held_limit: Final = min(on_loop.slow_after, self.budget.loop_time or float("inf"))
        self.report: Final = report
        self.runs: Final[set[Run]] = set()
        self._threads: ThreadPool | None = None
        self.failures = 0
        self._held_since = 0.0
        self._failures: deque[float] = deque()
        self._ended: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        return f"<plugin {self.name!r}>"

    # -- on and off -----------------------------------------------------------------------------------------

    def switch_off(self, reason: str, *, pause: float | None = None, by_host: bool = False) -> None:
        """Run none of its listeners from now on, or for ``pause`` seconds."""
        self.off = reason
        self.is_off_by_host = by_host
        self.off_until = float("inf") if pause is None else monotonic() + pause
        self.report("switched off", reason, listener=None, error=None)

    def stay_off(self, before: Owner) -> None:
        """Stay switched off, as the generation before this one was. The host knows of it."""
        self.off = before.off
        self.is_off_by_host = before.is_off_by_host
        self.off_until = before.off_until

    def switch_on(self) -> None:
        """Run its listeners again, with a new budget."""
        if self.off:
            self.off = ""
            self.held = 0.0
            self._failures.clear()
            self.report("switched on", "its listeners run again", listener=None, error=None)

    def is_off(self) -> bool:
        """Return True if the plugin is switched off, or has ended; switch it on if its pause is over."""
        if self.off and monotonic() >= self.off_until:
            self.switch_on()
        return bool(self.off) or self.has_ended

    def seconds_off(self) -> float | None:
        """Return the seconds until the plugin is switched on again; None if its pause has no end."""
        return None if self.off_until == float("inf") else max(0.0, self.off_until - monotonic())

    # -- the budget -----------------------------------------------------------------------------------------

    def check_held(self, listener: Listener, coroutine: object, began: float, took: float, now: float) -> None:
        """Check the time for which its listeners have held the event loop.

        Args:
            listener: The last one.
            coroutine: Its coroutine.
            began: The beginning of its step, on the clock of ``perf_counter``.
            took: Its seconds, without those of the listeners inside of it.
            now: The end of its step.
        """
        if took >= self.on_loop.slow_after:
            self.on_loop.on_slow(listener, coroutine, began, took)
        most = self.budget.loop_time
        if most is None or self.held >= most:
            held, since = self.held, self._held_since
            self.held = 0.0
            self._held_since = now
            if most is not None and (now - since <= 1.0 or took >= most) and not self.off:
                self.switch_off(
                    f"its listeners held the event loop for {held:.3g} s within a second; its budget is {most:g} s",
                    pause=self.budget.pause,
                )

    def count_failure(self) -> None:
        """Count a failed run."""
        self.failures += 1
        most = self.budget.failures
        if most is None:
            return
        now = monotonic()
        self._failures.append(now)
        while self._failures[0] < now - self.budget.window:
            self._failures.popleft()
        if len(self._failures) > most and not self.off:
            self.switch_off(
                f"{len(self._failures)} of its runs failed within {self.budget.window:g} s; its budget is {most}",
                pause=self.budget.pause,
            )

    # -- threads --------------------------------------------------------------------------------------------

    def share_threads(self, listener: InThread[Any]) -> InThread[Any]:
        """Return an ``in_thread`` listener that shares the threads of the plugin."""
        if self._threads is None:
            self._threads = ThreadPool(
                self.budget.threads, report=partial(self.report, "long", listener=None, error=None)
            )
        return listener.with_pool(self._threads)

    def end_threads(self) -> int:
        """End its idle threads, and return the number of those that are not idle: they end when their work does."""
        if self._threads is None:
            return 0
        self._threads.close()
        return self._threads.busy()

    # -- runs -----------------------------------------------------------------------------------------------

    def begin_run(self, run: Run) -> None:
        """Take up a run that waits for something."""
        self.runs.add(run)

    def end_run(self, run: Run) -> None:
        """Forget a run."""
        self.runs.discard(run)
        for ended in tuple(self._ended):
            with suppress(RuntimeError):  # its loop is closed
                ended.get_loop().call_soon_threadsafe(_wake, ended)

    async def wait_for_runs(self, timeout: float) -> list[Run]:
        """Wait until none of its listeners runs, but for those around this call; return those that still do after ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        around = {run for run in self.runs if run.is_around()}
        while left := self.runs - around:
            ended: asyncio.Future[None] = loop.create_future()
            self._ended.add(ended)
            try:
                async with asyncio.timeout_at(until):
                    await ended
            except TimeoutError:
                return sorted(left & self.runs, key=id)
            finally:
                self._ended.discard(ended)
        return []


def awaits(task: object, other: object) -> bool:
    """Return True if a task waits for another, itself or through a function of asyncio."""
    awaited = getattr(task, "_fut_waiter", None)  # nothing public tells it before Python 3.14
    if awaited is None or task is other:
        return False
    callbacks = getattr(other, "_callbacks", None) or ()
    return awaited is other or any(awaited in _held_by(callback) for callback, *_ in callbacks)


def _held_by(callback: Any) -> list[Any]:
    """Return the futures that a callback of a task has at hand, one of which it wakes."""
    held = list(inspect.getclosurevars(callback).nonlocals.values()) if inspect.isfunction(callback) else []
    held += getattr(callback, "args", ())  # of a partial
    held += getattr(getattr(callback, "__self__", None), "__dict__", {}).values()  # of a TaskGroup
    return [one for one in held if asyncio.isfuture(one)]


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
