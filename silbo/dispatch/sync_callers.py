"""Dispatches from code that is not async: from other threads, and where no event loop runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from silbo._checks import check_seconds
from silbo.dispatch.tasks import finish_spawned
from silbo.errors import LoopBlocked, PortalClosed

if TYPE_CHECKING:
    from silbo._whistle import IAsyncEventDispatcher
    from silbo.names import E, EventName, Name

__all__ = ["Portal", "run_sync"]

LOOK_EVERY: Final = 1.0
"""Seconds between two looks, while a thread waits for a dispatch, if the event loop still runs."""


class Portal:
    """The way from other threads into the event loop of a dispatcher. Made in that loop, by ``dispatcher.portal()``.

    It holds nothing open and needs no closing. Any number of threads may use it at the same time.
    """

    def __init__(
        self, dispatcher: IAsyncEventDispatcher, loop: asyncio.AbstractEventLoop, check: Callable[[Any, Any], object]
    ) -> None:
        self._dispatcher: Any = dispatcher
        self._loop = loop
        self._check = check
        self._process = os.getpid()

    def dispatch(self, name: EventName[E] | Name, event: E | None = None, /, *, timeout: float | None = None) -> E:
        """Dispatch in the event loop, and wait in this thread until the listeners have run.

        Listeners see a copy of this thread's context variables. If the wait ends early, by ``timeout`` or a KeyboardInterrupt, the
        dispatch is cancelled.

        Args:
            name: As for ``adispatch``.
            event: As for ``adispatch``.
            timeout: Seconds.

        Returns:
            The event.

        Raises:
            TimeoutError: The dispatch took longer than ``timeout``, and was cancelled. Some listeners may have run.
            PortalClosed: The event loop has ended, or was ended before the dispatch; or it belongs to another process.
            LoopBlocked: An event loop runs in this thread: it would stand still, and wait for itself if it is the portal's.
            Exception: As from ``adispatch``.
        """
        _refuse_running_loop(
            "portal.dispatch()",
            "await dispatcher.adispatch(name, event), or await asyncio.to_thread(portal.dispatch, name, event) if the "
            "dispatcher belongs to another thread's event loop",
        )
        if timeout is not None:
            check_seconds("timeout", timeout)
        if (problem := self._find_problem()) is not None:
            raise PortalClosed(name, f"nothing was dispatched, for {problem}")
        self._check(name, event)
        work = self._dispatcher.adispatch(name, event)
        try:
            dispatched = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError as error:
            work.close()
            raise PortalClosed(name, "nothing was dispatched, for its event loop is closed") from error
        try:
            self._wait(dispatched, name, timeout)
        except BaseException:
            dispatched.cancel()
            raise
        result: E = dispatched.result()
        return result

    def _wait(self, dispatched: Future[Any], name: Any, timeout: float | None) -> None:
        until = None if timeout is None else monotonic() + timeout
        while True:
            left = LOOK_EVERY if until is None else min(LOOK_EVERY, max(0.0, until - monotonic()))
            try:
                dispatched.exception(left)
            except CancelledError:
                raise PortalClosed(
                    name,
                    "the dispatch was cancelled in its event loop, as at the loop's end; some listeners may have run",
                ) from None
            except TimeoutError:  # of this wait: an error of the dispatch is returned
                problem = self._find_problem()
                is_late = until is not None and monotonic() >= until
                if (problem is None and not is_late) or not dispatched.cancel():  # it has ended in this moment
                    continue
                if problem is not None:
                    raise PortalClosed(name, f"{problem}; some listeners may have run") from None
                raise TimeoutError(
                    f"the dispatch of {name!r} took longer than {timeout:g} s, and was cancelled"
                ) from None
            return

    def _find_problem(self) -> str | None:
        if self._process != os.getpid():
            return (
                "its event loop runs in the process that this one was forked from: make loop and portal after the fork"
            )
        if self._loop.is_closed():
            return "its event loop is closed: make a portal in the loop that runs now"
        if not self._loop.is_running():
            return "its event loop stands still: let it run, or make a portal in the loop that runs now"
        return None


def run_sync(dispatcher: IAsyncEventDispatcher, name: EventName[E] | Name, event: E | None = None, /) -> E:
    """Dispatch where no event loop runs: in an event loop that begins and ends with this call.

    Dispatches that listeners spawn are waited for. Where a loop runs in another thread, use ``dispatcher.portal()`` of that loop:
    brokers, stores and ``Bridge(wait=False)`` belong to one event loop at a time.

    Args:
        dispatcher: Any dispatcher of silbo's or Whistle's.
        name: As for ``adispatch``.
        event: As for ``adispatch``.

    Returns:
        The event.

    Raises:
        LoopBlocked: An event loop runs in this thread.
        Exception: As from ``adispatch``.
    """
    _refuse_running_loop("run_sync()", "await dispatcher.adispatch(name, event)")
    result: E = asyncio.run(_dispatch(dispatcher, name, event))
    return result


async def _dispatch(dispatcher: IAsyncEventDispatcher, name: Any, event: Any) -> Any:
    try:
        result = await dispatcher.adispatch(name, event)
    except Exception:  # a cancellation, as by Ctrl-C, leaves at once
        await finish_spawned(dispatcher)
        raise
    await finish_spawned(dispatcher)
    return result


def _refuse_running_loop(call: str, instead: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise LoopBlocked(call, instead)
