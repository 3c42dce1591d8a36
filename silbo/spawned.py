"""Tasks that run dispatches in the background: strongly held, waited for, never lost."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

__all__ = ["SpawnedTasks"]

logger = logging.getLogger(__name__)

_lineage: ContextVar[tuple[asyncio.Task[Any], ...]] = ContextVar("silbo_spawned", default=())
"""The spawned tasks that this code runs in, the outermost first; child tasks inherit it."""


class SpawnedTasks:
    """Spawned dispatches, and a wait for their end that can be called from inside of one."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._draining: Counter[asyncio.Task[Any]] = Counter()
        self._changed: set[asyncio.Future[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start it; a failure is logged, and raised to whoever awaits the task."""
        task = asyncio.get_running_loop().create_task(_run(work))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def drain(self, timeout: float | None) -> None:  # noqa: ASYNC109  # one deadline for several waits
        """Wait until nothing spawned runs, but for the tasks that are themselves waiting here.

        Raises:
            TimeoutError: something still runs after ``timeout`` seconds; it goes on running.
        """
        lineage = _lineage.get()
        self._draining.update(lineage)
        self._notify()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while running := {t for t in self._tasks if t.get_loop() is loop and not self._draining[t]}:
                    changed = loop.create_future()
                    self._changed.add(changed)
                    try:
                        await asyncio.wait({*running, changed}, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        self._changed.discard(changed)
        finally:
            self._draining.subtract(lineage)
            self._draining += Counter()  # forget those at zero

    def _notify(self) -> None:
        """Another task began to wait here: who waits for it has to look again."""
        for changed in self._changed:
            if not changed.done():
                changed.set_result(None)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("spawned dispatch failed", exc_info=error)


async def _run(work: Coroutine[Any, Any, Any]) -> Any:
    task = asyncio.current_task()
    assert task is not None
    _lineage.set((*_lineage.get(), task))  # the task's own context: nobody else sees it
    return await work
