"""What a dispatcher does beside its callers: spawned dispatches, and those who wait for an event."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, TypeVar

from silbo.dispatch.listeners import LAST, take_back
from silbo.errors import DispatcherClosed

__all__ = ["Background"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_lineage: ContextVar[tuple[asyncio.Task[Any], ...]] = ContextVar("silbo_spawned", default=())
"""The spawned tasks that this code runs in, the outermost first; child tasks inherit it."""


class Background:
    """Spawned tasks, strongly held, with a wait for their end that can be called from inside of one; and ears."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._draining: Counter[asyncio.Task[Any]] = Counter()
        self._changed: set[asyncio.Future[None]] = set()
        self._ears: set[asyncio.Future[Any]] = set()
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start it; a failure is logged, and raised to whoever awaits the task."""
        if self._closed:
            work.close()
            raise DispatcherClosed
        task = asyncio.get_running_loop().create_task(_run(work))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def drain(self, timeout: float | None) -> None:
        """Wait until nothing spawned runs; called from spawned work, but for the tasks that are waiting here too.

        Raises:
            TimeoutError: something still runs after ``timeout`` seconds; it goes on running.
        """
        lineage = _lineage.get()
        self._draining.update(lineage)
        self._notify()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while running := {
                    task for task in self._tasks if task.get_loop() is loop and not (lineage and self._draining[task])
                }:
                    changed = loop.create_future()
                    self._changed.add(changed)
                    try:
                        await asyncio.wait({*running, changed}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        self._changed.discard(changed)
        finally:
            self._draining.subtract(lineage)
            self._draining += Counter()  # forget those at zero

    def ear(
        self, where: Callable[[_T], object] | None
    ) -> tuple[asyncio.Future[_T], Callable[[_T], Coroutine[Any, Any, None]]]:
        """A future, and the listener that fulfils it with the first event for which ``where`` is true."""
        if self._closed:
            raise DispatcherClosed
        heard: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._ears.add(heard)
        heard.add_done_callback(self._ears.discard)

        async def hear(event: _T) -> None:
            if heard.done():
                return
            try:
                if where is None or where(event):
                    heard.set_result(event)
            except Exception as error:  # noqa: BLE001  # the waiter's own
                heard.set_exception(error)

        return heard, hear

    async def wait_for(
        self, dispatcher: Any, name: Any, where: Callable[[_T], object] | None, timeout: float | None
    ) -> _T:
        """Wait for an event, as a listener of the dispatcher that runs last."""
        heard, hear = self.ear(where)
        place = dispatcher.add_listener(name, hear, priority=LAST)
        try:
            async with asyncio.timeout(timeout):
                return await heard
        except TimeoutError as error:
            if not heard.cancelled():  # where() raised it
                raise
            raise TimeoutError(f"no event {name!r} within {timeout:g} s") from error
        finally:
            heard.cancel()
            take_back(dispatcher, name, hear, place)

    async def aclose(self) -> None:
        """Refuse new work, end the waits, and wait for the spawned tasks."""
        self._closed = True
        for heard in tuple(self._ears):
            if not heard.done():
                heard.set_exception(DispatcherClosed())
        await self.drain(None)

    def _notify(self) -> None:
        """Another task began to wait here: who waits for it has to look again."""
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("spawned dispatch failed", exc_info=error)


async def _run(work: Coroutine[Any, Any, _T]) -> _T:
    task = asyncio.current_task()
    assert task is not None
    running = (one for one in _lineage.get() if not one.done())  # else a chain of tasks would keep all its links
    _lineage.set((*running, task))  # the task's own context: nobody else sees it
    return await work
