"""Which scope of a container is open here: one for each unit of work, shared by the dispatches inside of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from silbo.protocols import Container, Scope

__all__ = ["beside", "check_container", "current_scope", "scoped"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_scopes: ContextVar[tuple[_LazyScope, ...]] = ContextVar("silbo_scopes", default=())
"""Those around this code, the outermost first. Tasks inherit it, so each scope knows whose it is and when it is over."""


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


def current_scope(container: Container) -> Scope | None:
    """The scope of this container that is open in this task."""
    found = _scopes.get()
    if found:
        task = asyncio.current_task()
        for scope in reversed(found):
            if scope.container is container and task in scope.members:
                return scope
    return None


@asynccontextmanager
async def scoped(container: Container) -> AsyncGenerator[Scope]:
    """Around a unit of work: the scope that is open in this task, else a new one, which ends with the block.

    A new one is opened when it is first asked for something. It is closed also on an error and on a cancellation, which
    then go on: an error of the closing itself is logged beside them, and raised where there is none.
    """
    scope = current_scope(container)
    if scope is not None:
        yield scope
        return
    opened = _LazyScope(container)
    around = _scopes.get()
    _scopes.set((*around, opened))
    try:
        yield opened
    except BaseException as error:
        await opened.close(error)
        raise
    else:
        await opened.close(None)
    finally:
        _scopes.set(around)


def beside(listener: Callable[[Any], Awaitable[T]], event: Any) -> Awaitable[T]:
    """Call a listener for a task that this one waits for: there it shares the scopes that are open here."""
    task = asyncio.current_task()
    mine = [scope for scope in _scopes.get() if task in scope.members]
    return _as_member(mine, listener, event) if mine else listener(event)


async def _as_member(scopes: list[_LazyScope], listener: Callable[[Any], Awaitable[T]], event: Any) -> T:
    task = asyncio.current_task()
    for scope in scopes:
        scope.members.add(task)
    return await listener(event)


class _LazyScope:
    """A scope that is opened when it is first needed, for the task that made it and those that it waits for."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.members = {asyncio.current_task()}  # empty once it is over
        self._manager: AbstractAsyncContextManager[Scope] | None = None
        self._scope: Scope | None = None
        self._lock = asyncio.Lock()
        self._resolving: asyncio.Task[Any] | None = None

    async def resolve(self, cls: type[T], /) -> T:
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

    async def close(self, error: BaseException | None) -> None:
        self.members.clear()
        if self._manager is None:
            return
        try:  # what __aexit__ answers is no matter: a finalizer must not swallow a cancellation
            await self._manager.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                logger.exception("scope failed to close", extra={"container": repr(self.container)})
