"""A unit of work: one scope of a container, and the events that its handlers collect, which follow at its end.

A dispatch that has a class among its listeners is one, with the dispatches inside of it; a command is one, with the events
that come of it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from silbo.errors import FollowUpsExceeded
from silbo.names import name_of
from silbo.work.collected_events import Collecting, declares_events

if TYPE_CHECKING:
    from silbo.protocols import Container, Scope

__all__ = [
    "FOLLOW_UPS",
    "Held",
    "LazyScope",
    "Unit",
    "beside",
    "check_container",
    "current_unit",
    "held_back",
    "unit_of_work",
    "warn_if_unhandled",
]

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


_warned: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def warn_if_unhandled(dispatcher: Any, name: Any, event: object) -> None:
    """Log a warning, once for a name on a dispatcher, where nobody would hear the event and no bridge would send it."""
    if any(_reaches(listener, event, name) for listener in dispatcher.get_listeners(name)):
        return
    warned = _warned.setdefault(dispatcher, set())
    if name not in warned:
        warned.add(name)
        logger.warning(
            "nobody handles %s: no listener is registered for it, and no bridge sends it",
            name,
            extra={"event_name": name, "event_class": type(event).__qualname__},
        )


def _reaches(listener: Any, event: object, name: Any) -> bool:
    """Whether it is a listener, other than a bridge that would not send the event."""
    bridge = getattr(inspect.unwrap(listener), "__self__", None)
    sends = getattr(bridge, "__silbo_sends__", None)  # Bridge can't be imported: it imports what imports this
    return sends is None or bool(sends(event, name))


FOLLOW_UPS: Final = 1000
"""Events that may follow of those that follow first: beyond, two handlers are taken to answer each other for ever."""

Held: TypeAlias = Callable[[], Awaitable[object]]
"""Sends a message, when the unit of work that it comes of has succeeded."""

_units: ContextVar[tuple[Unit, ...]] = ContextVar("silbo_units", default=())
"""Those around this code, the outermost first. Tasks inherit it, so each knows whose it is and when it is over."""


class Unit:
    """A unit of work, or a part of one: that has the same scope, and gives what it has on when it succeeds.

    Attributes:
        collected: The events that are to follow, each with the dispatcher that is to have it, in the order they were collected.
        holds: Whether what is to be sent waits: in a command, and in what follows at the end of every unit.
        held: What is to be sent when the outermost unit has succeeded: of itself where it holds, and of those in it.
    """

    def __init__(self, scope: LazyScope, *, holds: bool = False) -> None:
        self.scope, self.holds = scope, holds
        self.collected: deque[tuple[Any, Any]] = deque()
        self.held: list[Held] = []

    async def resolve(self, cls: type[T], /) -> T:
        """An object of this class, of the unit's scope; the first call opens it.

        Raises:
            Unresolvable: the container can't make one.
        """
        return await self.scope.resolve(cls)

    def join(self) -> None:
        """Make the current task one of those that the unit waits for: a middleware may begin another, with a time limit."""
        if self.scope.members:
            self.scope.members.add(asyncio.current_task())

    @contextmanager
    def handling(self, handler: object, dispatcher: object, *, attribute: bool = False) -> Generator[None]:
        """Around the work of a handler: the events that it collects in its ``events`` follow, unless it fails.

        Args:
            handler: An object of the unit's scope.
            dispatcher: Is to have the events; None where there is none: then they are left where they are.
            attribute: Whether a mere attribute ``events`` of the object counts; else its class has to declare it, as a
                property, for a listener may well keep there what it has heard.

        Raises:
            HandlerShared: it collected events while another unit of work did so, in the same place.
            TypeError: its ``events`` are none.
        """
        if dispatcher is None or not (attribute or declares_events(type(handler))):
            yield
            return
        with self.scope.collecting.at_work(handler, dispatcher) as events:
            yield
        self.collected.extend((dispatcher, event) for event in events)

    async def follow(self, *, at_once: int = 1, last: bool = False) -> None:
        """Dispatch what was collected, and what is collected meanwhile behind it, until nothing is left.

        Args:
            at_once: With more than 1, all that is there is dispatched side by side, so many at a time; where some fail,
                the others are waited for. Then what these have collected.
            last: Whether the scope is over then: what others than handlers have put into a list of theirs follows, too.

        Raises:
            FollowUpsExceeded: there were more than may be.
            ExceptionGroup: several of those side by side failed; the error of a single one is raised as it is.
        """
        left = self.scope.collecting.left if last else list
        self.collected += left()
        uncounted, outermost = len(self.collected), not self.scope.following
        self.scope.following = True
        try:
            while self.collected:
                wave = [self.collected.popleft() for _ in range(len(self.collected) if at_once > 1 else 1)]
                for _, event in wave:
                    if outermost and uncounted:
                        uncounted -= 1
                    else:
                        self.scope.count(event)
                if len(wave) == 1:
                    await _dispatch(*wave[0])
                else:
                    await self._follow_together(wave, at_once)
                if not self.collected:
                    self.collected += left()
        finally:
            self.scope.following = not outermost

    async def _follow_together(self, wave: Sequence[tuple[Any, Any]], at_once: int) -> None:
        gate = asyncio.Semaphore(at_once)
        parts = [Unit(self.scope, holds=self.holds) for _ in wave]

        async def one(part: Unit, dispatcher: Any, event: Any) -> None:
            _units.set((*_units.get(), part))  # the task's own context: nobody else sees it
            async with gate:
                await _dispatch(dispatcher, event)

        pairs = zip(parts, wave, strict=True)
        errors = await _all([beside(partial(one, part, dispatcher), event) for part, (dispatcher, event) in pairs])
        if len(errors) > 1:
            raise BaseExceptionGroup(f"{len(errors)} events of one command failed", errors)
        for error in errors:
            raise error
        for part in parts:  # so their order is that of the events, whoever was done first
            self.collected += part.collected
            self.held += part.held


def current_unit(container: Container | None = None) -> Unit | None:
    """The innermost unit of work that is open in this task; of this container, where one is given."""
    found = _units.get()
    if found:
        task = asyncio.current_task()
        for unit in reversed(found):
            if container in (None, unit.scope.container) and task in unit.scope.members:
                return unit
    return None


def held_back() -> list[Held] | None:
    """Where to put what is to be sent when the unit of work around this code has succeeded; None where nothing waits."""
    unit = current_unit()
    return unit.held if unit is not None and unit.holds else None


@asynccontextmanager
async def unit_of_work(
    container: Container, *, command: bool = False, max_follow_ups: int = FOLLOW_UPS
) -> AsyncGenerator[Unit]:
    """Around a unit of work, or a part of the one that is open in this task: a part adds its events where it succeeds.

    At the end of the whole its events are dispatched, in the order they were collected; what their handlers collect goes
    behind. Then its scope is closed, also on an error and on a cancellation, which go on: an error of the closing itself is
    logged beside them, and raised where there is none.

    Args:
        container: Where its objects come from.
        command: What a bridge in it has to send is held back; of any other unit only what it has to send of the events that
            follow. To send all that is the very last that the outermost unit does. One that fails sends none of it.
        max_follow_ups: Most events that may follow of those that follow first.

    Raises:
        FollowUpsExceeded: there were more.
        Exception: what could not be sent. Of several errors of one class the first, with a note; else an ExceptionGroup.
    """
    around = tuple(unit for unit in _units.get() if unit.scope.members)  # a task may have inherited those that are over
    enclosing, outer = current_unit(), current_unit(container)
    scope = LazyScope(container, max_follow_ups) if outer is None else outer.scope
    unit = Unit(scope, holds=command or (enclosing is not None and enclosing.holds))
    _units.set((*around, unit))
    try:
        yield unit
        if outer is None:
            unit.holds = True
            await unit.follow(last=True)
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
    if enclosing is not None:  # perhaps of another container
        enclosing.held += unit.held
    elif unit.held:
        await _send(unit.held)


async def _dispatch(dispatcher: Any, event: Any) -> None:
    name = name_of(event)
    warn_if_unhandled(dispatcher, name, event)
    await dispatcher.adispatch(name, event)


async def _send(held: Sequence[Held]) -> None:
    errors = await _all([send() for send in held])
    if len({type(error) for error in errors}) > 1:
        raise BaseExceptionGroup(f"{len(errors)} of {len(held)} messages failed", errors)
    for error in errors:
        error.add_note("\n".join([f"{len(errors)} of {len(held)} messages failed", *_others(errors)]))
        raise error


def _others(errors: Sequence[BaseException]) -> list[str]:
    """What the others say, where it is something else."""
    return [text for text in dict.fromkeys(map(str, errors)) if text != str(errors[0])]


async def _all(work: Sequence[Awaitable[object]]) -> list[BaseException]:
    """Await them at once, and give their errors; all have ended when this returns or raises, also when it is cancelled."""
    if len(work) == 1:
        await work[0]
        return []
    results = await asyncio.gather(*work, return_exceptions=True)
    return [result for result in results if isinstance(result, BaseException)]


def beside(listener: Callable[[Any], Awaitable[T]], event: Any) -> Awaitable[T]:
    """Call a listener for a task that this one waits for: there it is in the units that are open here."""
    task = asyncio.current_task()
    mine = [unit.scope for unit in _units.get() if task in unit.scope.members]
    return _as_member(mine, listener, event) if mine else listener(event)


async def _as_member(scopes: list[LazyScope], listener: Callable[[Any], Awaitable[T]], event: Any) -> T:
    task = asyncio.current_task()
    for scope in scopes:
        scope.members.add(task)
    return await listener(event)
