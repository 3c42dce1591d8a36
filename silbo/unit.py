"""A unit of work: one scope of a container, and the events that its handlers collect, which follow at its end.

A dispatch that has a class among its listeners is one, with the dispatches inside of it; a command is one, with the events
that come of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from silbo.errors import FollowUpsExceeded, HandlerShared
from silbo.names import name_of

if TYPE_CHECKING:
    from silbo.protocols import Container, Scope

__all__ = ["FOLLOW_UPS", "Unit", "beside", "check_container", "current_unit", "unit_of_work"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLLOW_UPS: Final = 1000
"""Events that may follow of one unit of work: beyond, two handlers are taken to answer each other for ever."""

_units: ContextVar[tuple[Unit, ...]] = ContextVar("silbo_units", default=())
"""Those around this code, the outermost first. Tasks inherit it, so each knows whose it is and when it is over."""


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


class Unit:
    """A unit of work, or a dispatch inside of one: that has the same scope, and gives its events on when it succeeds.

    Attributes:
        collected: The events that are to follow, each with the dispatcher that is to have it, in the order they were collected.
    """

    def __init__(self, scope: _LazyScope) -> None:
        self.scope = scope
        self.collected: deque[tuple[Any, Any]] = deque()

    async def resolve(self, cls: type[T], /) -> T:
        """An object of this class, of the unit's scope; the first call opens it.

        Raises:
            Unresolvable: the container can't make one.
        """
        return await self.scope.resolve(cls)

    @contextmanager
    def handling(self, handler: object, dispatcher: object) -> Generator[None]:
        """Around the work of a handler: what it puts into its ``events`` meanwhile follows, unless it fails.

        Only where its class declares ``events``, as a property: another attribute of that name is the host's own matter.

        Args:
            handler: An object of the unit's scope.
            dispatcher: Is to have the events; None where there is none: then they are left where they are.

        Raises:
            HandlerShared: it collected events while it was at work in another place, too.
        """
        if dispatcher is None or not hasattr(type(handler), "events"):
            yield
            return
        with _at_work(handler) as fresh:
            yield
        self.collected.extend((dispatcher, event) for event in fresh)


def current_unit(container: Container) -> Unit | None:
    """The unit of work with this container that is open in this task."""
    found = _units.get()
    if found:
        task = asyncio.current_task()
        for unit in reversed(found):
            if unit.scope.container is container and task in unit.scope.members:
                return unit
    return None


@asynccontextmanager
async def unit_of_work(container: Container, *, max_follow_ups: int = FOLLOW_UPS) -> AsyncGenerator[Unit]:
    """Around a unit of work, or a part of the one that is open in this task: a part adds its events where it succeeds.

    At the end of the whole its events are dispatched, in the order they were collected; what their handlers collect goes
    behind. Then its scope is closed, also on an error and on a cancellation, which go on: an error of the closing itself is
    logged beside them, and raised where there is none.

    Args:
        container: Where its objects come from.
        max_follow_ups: Most events that may follow.

    Raises:
        FollowUpsExceeded: there were more.
    """
    around = _units.get()
    outer = current_unit(container)
    unit = Unit(_LazyScope(container) if outer is None else outer.scope)
    _units.set((*around, unit))
    try:
        yield unit
        if outer is None:
            await _follow(unit, max_follow_ups)
    except BaseException as error:
        if outer is None:
            await unit.scope.close(error)
        raise
    else:
        if outer is None:
            await unit.scope.close(None)
        else:
            outer.collected += unit.collected
    finally:
        _units.set(around)


async def _follow(unit: Unit, limit: int) -> None:
    for _ in range(limit):
        if not unit.collected:
            return
        dispatcher, event = unit.collected.popleft()
        await dispatcher.adispatch(name_of(event), event)
    if unit.collected:
        raise FollowUpsExceeded(limit, name_of(unit.collected[0][1]))


def beside(listener: Callable[[Any], Awaitable[T]], event: Any) -> Awaitable[T]:
    """Call a listener for a task that this one waits for: there it is in the units that are open here."""
    task = asyncio.current_task()
    mine = [unit.scope for unit in _units.get() if task in unit.scope.members]
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

    async def resolve(self, cls: type[T]) -> T:
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


# -- what a handler collects --------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Work:
    """A handler that collects events, while it is at work: in how many places, and what it had before."""

    stale: list[Any]
    places: int = 0
    shared: bool = False


_working: dict[int, _Work] = {}
"""By ``id``: a handler need not be hashable."""


@contextmanager
def _at_work(handler: Any) -> Generator[list[Any]]:
    """Gives the list in which the handler's new events are afterwards; in the handler itself none are left."""
    work = _working.get(id(handler))
    if work is None:  # what it has now is of a run that failed, or was sent: the container reuses it
        _clear(handler)
        work = _working[id(handler)] = _Work(stale=list(handler.events or ()))
    work.places += 1
    work.shared |= work.places > 1
    fresh: list[Any] = []
    try:
        yield fresh
        counted = Counter(map(id, work.stale))
        for event in handler.events or ():
            if counted[id(event)]:
                counted[id(event)] -= 1  # a property that gives copies can't be cleared
            else:
                fresh.append(event)
    finally:
        work.places -= 1
        if not work.places:
            del _working[id(handler)]
            _clear(handler)
    if fresh and work.shared:
        raise HandlerShared(type(handler))


def _clear(handler: Any) -> None:
    events = handler.events
    if isinstance(events, list):
        events.clear()
