"""Tasks of a dispatcher: spawned dispatches and pending ``wait_for`` calls, until the dispatcher is closed."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

from silbo._checks import check_seconds
from silbo.dispatch.listeners import LAST, undo_registration
from silbo.dispatch.options import is_async
from silbo.dispatch.received_event import received
from silbo.errors import DispatcherClosed, LoopConflict

__all__ = ["BackgroundTasks", "background_of", "finish_spawned"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_lineage: ContextVar[tuple[asyncio.Task[Any], ...]] = ContextVar("silbo_spawned", default=())
"""The spawned tasks that this code runs in, the outermost first; child tasks inherit it."""


class BackgroundTasks:
    """Holds spawned tasks and pending ``wait_for`` calls. ``drain()`` may be called from a spawned task.

    Event loops in several threads may use it: a task runs in the loop that spawned it, a wait is woken in the loop that waits,
    and a drain that would wait for another loop is refused.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._plugins: dict[asyncio.Task[Any], str] = {}  # that have spawned tasks, by task
        self._draining: Counter[asyncio.Task[Any]] = Counter()
        self._drains_changed: set[asyncio.Future[None]] = set()
        self._waits: dict[asyncio.Future[Any], Any] = {}  # each with the dispatcher, or the view of it, that waits
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Start a task. An error is logged, and raised to the code that awaits the task.

        Raises:
            DispatcherClosed: After :meth:`aclose`.
        """
        try:
            if self._closed:
                raise DispatcherClosed
            loop = asyncio.get_running_loop()
        except RuntimeError:
            work.close()
            raise
        task = loop.create_task(_run(work))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def name_plugin(self, task: asyncio.Task[Any], plugin: str) -> None:
        """Name the plugin that has spawned a task, for the log."""
        if task in self._tasks:
            self._plugins[task] = plugin

    async def drain(self, timeout: float | None) -> None:
        """Wait until no spawned task of this event loop runs.

        If a spawned task calls it, it does not wait for tasks that wait in ``drain()`` too: they would wait for each other.

        Raises:
            TimeoutError: Some still run after ``timeout`` seconds; they go on.
            LoopConflict: Some run in another event loop, in another thread.
        """
        if timeout is not None:
            check_seconds("timeout", timeout, zero=True)
        lineage = _lineage.get()
        loop = asyncio.get_running_loop()
        self._tasks_of(loop)  # refuse before anything else has changed
        self._draining.update(lineage)
        for changed in tuple(self._drains_changed):  # other drains have to look again
            if changed.get_loop() is loop and not changed.done():
                changed.set_result(None)
        try:
            async with asyncio.timeout(timeout):
                while running := {task for task in self._tasks_of(loop) if not (lineage and self._draining[task])}:
                    changed = loop.create_future()
                    self._drains_changed.add(changed)
                    try:
                        await _wait_for_all(running, changed)
                    finally:
                        self._drains_changed.discard(changed)
        finally:
            for task in lineage:
                self._draining[task] -= 1
                if not self._draining[task]:
                    del self._draining[task]

    async def finish(self) -> None:
        """Wait for the spawned tasks of this event loop, and for those that they spawn, whatever runs in other loops."""
        loop = asyncio.get_running_loop()
        while own := [task for task in tuple(self._tasks) if task.get_loop() is loop]:
            await asyncio.wait(own)

    async def wait_for(
        self, dispatcher: Any, name: Any, where: Callable[[_T], object] | None, timeout: float | None
    ) -> _T:
        """Wait for the next event of a name for which ``where`` is true, heard after all other listeners.

        Raises:
            TimeoutError: No such event came within ``timeout`` seconds.
            DispatcherClosed: The dispatcher is closed, or was while waiting.
            TypeError: ``where`` is async.
            Exception: An error of ``where``.
        """
        if is_async(where):
            raise TypeError(f"where= is a plain function of the event, not the async {where!r}: nobody would await it")
        if timeout is not None:
            check_seconds("timeout", timeout, zero=True)
        if self._closed:
            raise DispatcherClosed
        heard: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waits[heard] = dispatcher
        heard.add_done_callback(self._forget_wait)

        async def hear(event: _T) -> None:
            if heard.done():
                return
            try:
                if where is None or where(event):
                    _settle(heard, partial(heard.set_result, event))
            except Exception as error:  # noqa: BLE001  # raised to the code that waits
                _settle(heard, partial(heard.set_exception, _as_future_error(error)))

        marked: Any = hear
        marked.__silbo_waits__ = True  # it runs after a bridge, too
        registration = dispatcher.add_listener(name, hear, priority=LAST)
        try:
            async with asyncio.timeout(timeout):
                return await heard
        except TimeoutError as error:
            if not heard.cancelled():  # heard in the same turn of the loop; or where() raised a TimeoutError
                return heard.result()
            raise TimeoutError(f"no event {name!r} within {timeout:g} s") from error
        finally:
            heard.cancel()
            undo_registration(dispatcher, name, hear, registration)

    def end_waits(self, dispatcher: Any, error: Exception) -> None:
        """End the waits of one view of the dispatcher with an error."""
        for heard, waiting in tuple(self._waits.items()):
            if waiting is dispatcher:
                _settle(heard, partial(heard.set_exception, error))

    async def aclose(self) -> None:
        """Refuse new tasks and waits, end the pending waits with DispatcherClosed, and wait for the spawned tasks.

        Raises:
            LoopConflict: Tasks run in another event loop; nothing is closed.
        """
        self._tasks_of(asyncio.get_running_loop())
        self._closed = True
        for heard in tuple(self._waits):
            _settle(heard, partial(heard.set_exception, DispatcherClosed()))
        await self.drain(None)

    def _tasks_of(self, loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
        """Return the spawned tasks of a loop.

        Raises:
            LoopConflict: Another loop runs that has spawned tasks, too. A loop that has ended will never finish its tasks.
        """
        own: list[asyncio.Task[Any]] = []
        for task in tuple(self._tasks):
            if (other := task.get_loop()) is loop:
                own.append(task)
            elif other.is_running():
                raise LoopConflict("drain()", loop, other)
        return own

    def _forget_wait(self, heard: asyncio.Future[Any]) -> None:
        self._waits.pop(heard, None)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        plugin = self._plugins.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            extra = None if plugin is None else {"plugin": plugin}
            logger.error("spawned dispatch failed", exc_info=error, extra=extra)


def background_of(dispatcher: Any) -> BackgroundTasks:
    """Return the background tasks of one of silbo's dispatchers."""
    background: BackgroundTasks = dispatcher._background  # noqa: SLF001  # for this package alone
    return background


async def finish_spawned(dispatcher: object) -> None:
    """Wait for what one of silbo's dispatchers has spawned in this event loop; of another dispatcher nothing is known."""
    background = getattr(dispatcher, "_background", None)
    if isinstance(background, BackgroundTasks):
        await background.finish()


async def _wait_for_all(tasks: set[asyncio.Task[Any]], changed: asyncio.Future[None]) -> None:
    """Wait until all tasks are done, or ``changed`` is. Tasks that end one by one don't wake the waiting task each."""
    left = len(tasks)

    def count_down(_: object) -> None:
        nonlocal left
        left -= 1
        if not left and not changed.done():
            changed.set_result(None)

    for task in tasks:
        task.add_done_callback(count_down)
    try:
        await changed
    finally:
        for task in tasks:
            task.remove_done_callback(count_down)


def _settle(future: asyncio.Future[Any], settle: Callable[[], None]) -> None:
    """Give a future its outcome, unless it has one, in the thread of its loop: from another thread it would wake nobody."""

    def settle_once() -> None:
        if not future.done():
            settle()

    loop = future.get_loop()
    try:
        is_here = asyncio.get_running_loop() is loop
    except RuntimeError:
        is_here = False
    if is_here:
        settle_once()
    else:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle_once)


def _as_future_error(error: Exception) -> Exception:
    """Return an error that a future takes: a RuntimeError in place of a StopIteration, as a coroutine raises it."""
    if not isinstance(error, StopIteration):
        return error
    replaced = RuntimeError("where= raised StopIteration")
    replaced.__cause__ = error
    return replaced


async def _run(work: Coroutine[Any, Any, _T]) -> _T:
    task = asyncio.current_task()
    assert task is not None
    alive = (ancestor for ancestor in _lineage.get() if not ancestor.done())  # a long chain must not keep all its tasks
    _lineage.set((*alive, task))  # the task's own context: no other task sees it
    if received.get() is not None:
        received.set(None)  # what is spawned is no part of the delivery in which it was spawned
    return await work
