"""The scope of a container that a unit of work has, opened when it is first needed."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from silbo.errors import FollowUpsExceeded
from silbo.names import name_of
from silbo.work.collected_events import Collecting

if TYPE_CHECKING:
    from silbo.protocols import Container, Scope

__all__ = ["LazyScope", "check_container"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


def check_container(container: object) -> None:
    """Refuse what is no adapter, as a library's own container.

    Raises:
        TypeError: says what was given in its place.
    """
    if container is None:
        return
    if isinstance(container, type) or not callable(getattr(container, "scope", None)):
        raise TypeError(
            f"container is an adapter from silbo.containers, as RodiContainer(your_container), not {container!r}"
        )


class LazyScope:
    """A scope that is opened when it is first needed, for the task that made it and those that it waits for.

    Attributes:
        members: Those tasks; none once it is over.
        collecting: The events that handlers record in it.
        following: Whether events follow at the moment.
    """

    def __init__(self, container: Container, max_follow_ups: int) -> None:
        self.container, self.collecting = container, Collecting()
        self.following = False
        self._followed, self._max_follow_ups = 0, max_follow_ups
        self.members = {asyncio.current_task()}
        self._manager: AbstractAsyncContextManager[Scope] | None = None
        self._scope: Scope | None = None
        self._lock = asyncio.Lock()
        self._resolving: asyncio.Task[Any] | None = None

    async def resolve(self, cls: type[T]) -> T:
        """An object of this class; the first call opens the scope."""
        task = asyncio.current_task()
        if self._resolving is task:  # a factory that dispatches an event would wait for itself
            return await self._resolve(cls)
        async with self._lock:  # concurrent listeners: two would make two of what is one
            self._resolving = task
            try:
                return await self._resolve(cls)
            finally:
                self._resolving = None

    async def _resolve(self, cls: type[T]) -> T:
        if self._scope is None:
            manager = self.container.scope()
            self._scope = await manager.__aenter__()
            self._manager = manager
        return await self._scope.resolve(cls)

    def count(self, event: object) -> None:
        """Count one more event that follows.

        Raises:
            FollowUpsExceeded: it is one too many.
        """
        if self._followed >= self._max_follow_ups:
            raise FollowUpsExceeded(self._max_follow_ups, name_of(event))
        self._followed += 1

    async def close(self, error: BaseException | None) -> None:
        """Close it where it is open, telling it of the error that ended it. Its own error is logged beside that one."""
        self.members.clear()
        try:
            if self._manager is not None:
                # What __aexit__ answers is no matter: a finalizer must not swallow a cancellation.
                trace = error.__traceback__ if error else None
                await self._manager.__aexit__(type(error) if error else None, error, trace)
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                logger.exception("scope failed to close", extra={"container": repr(self.container)})
        finally:
            self.collecting.close()
