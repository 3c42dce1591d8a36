"""Dispatches under way when a plugin is unloaded: those that began before still have its listeners."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import ReferenceType, finalize

from silbo.dispatch.dispatcher import AsyncEventDispatcher

__all__ = ["DISPATCHES", "wait_for_dispatches"]

DISPATCHES = frozenset(
    method.__code__
    for method in (AsyncEventDispatcher.adispatch, AsyncEventDispatcher._dispatch)  # noqa: SLF001  # the code of a dispatch
)
"""The code that runs a dispatch."""


async def wait_for_dispatches(listeners: Iterable[ReferenceType[Any]], timeout: float) -> None:
    """Wait until no dispatch has the listeners any more, for ``timeout`` seconds at most.

    A dispatch keeps its listeners alive, and counting dispatches would slow every one of them. A call from inside of a dispatch
    does not wait: that dispatch would wait for it.

    Args:
        listeners: The callables of the plugin, which the registry has forgotten.
        timeout: Seconds.
    """
    loop = asyncio.get_running_loop()
    alive = list(filter(None, (weak() for weak in listeners)))
    if not alive or _is_in_dispatch():
        return
    left = len(alive)
    done = loop.create_future()

    def count_down() -> None:
        nonlocal left
        left -= 1
        if not left and not done.done():
            done.set_result(None)

    watches = [finalize(listener, _call_in, loop, count_down) for listener in alive]
    alive.clear()
    try:
        async with asyncio.timeout(timeout):
            await done
    except TimeoutError:
        pass  # an observer may hold on to them for good
    finally:
        for watch in watches:
            watch.detach()


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function)


def _is_in_dispatch() -> bool:
    frame: FrameType | None = sys._getframe()  # noqa: SLF001  # the call stack
    while frame is not None:
        if frame.f_code in DISPATCHES:
            return True
        frame = frame.f_back
    return False
