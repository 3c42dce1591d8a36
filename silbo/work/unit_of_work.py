"""A unit of work: one scope of a container, the events that its handlers collect, and the messages that wait for its end.

A dispatch that has a class among its listeners is a unit of work, together with the dispatches inside of it. A command is a unit
of work, together with the events that come of it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from silbo.errors import FollowUpsExceeded
from silbo.names import name_of
from silbo.work.collected_events import CollectedEvents, declares_events

if TYPE_CHECKING:
    from silbo.protocols import Container, Scope

__all__ = [
    "MAX_FOLLOW_UPS",
    "Unit",
    "call_within_units",
    "check_container",
    "current_unit",
    "deferred_sends",
    "unit_of_work",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FOLLOW_UPS: Final = 1000
"""Most events that may come of the first events of a unit of work. With more, two handlers are taken to answer each other for ever."""

DeferredSend: TypeAlias = Callable[[], Awaitable[object]]
"""Sends a message. It is called when the unit of work that the message comes of has succeeded."""

_units: ContextVar[tuple[Unit, ...]] = ContextVar("silbo_units", default=())
"""The units around this code, the outermost first. A task inherits it, so a unit also knows its tasks and its end."""


def unit_of_work(
    container: Container, *, command: bool = False, max_follow_ups: int = MAX_FOLLOW_UPS
) -> AbstractAsyncContextManager[Unit]:
    """Begin a unit of work, or a part of the unit of the same container that is open in this task.

    A part that succeeds hands its events to the unit around it. At the end of the whole unit its events are dispatched in the
    order in which they were collected; what their handlers collect follows behind. Then the scope is closed, after an error
    or a cancellation too. An error of the closing is logged where there is another error, and else raised. Last of all, the
    outermost unit sends the messages that waited; a unit that fails sends none of them.

    Args:
        container: Makes the objects of the unit.
        command: If true, every message that a bridge has to send waits for the end. Else only messages of events that were
            collected wait.
        max_follow_ups: Most events that may come of the events that are dispatched first.

    Raises:
        FollowUpsExceeded: There were more.
        Exception: A message could not be sent. Several errors of one class are raised as the first of them, with a note;
            errors of several classes as an ExceptionGroup.
    """
    return _UnitOfWork(container, command, max_follow_ups)


class _UnitOfWork(AbstractAsyncContextManager["Unit", None]):
    """The block of a unit of work. A class, for the event loop keeps a list of async generators: that takes longer than the rest."""

    def __init__(self, container: Container, command: bool, max_follow_ups: int) -> None:
        self._container = container
        self._command = command
        self._max_follow_ups = max_follow_ups

    async def __aenter__(self) -> Unit:
        # A task may have inherited units that are over.
        self._around = around = tuple([unit for unit in _units.get() if unit.scope.members])
        self._enclosing = enclosing = current_unit() if around else None
        self._outer = outer = current_unit(self._container) if around else None
        scope = LazyScope(self._container, self._max_follow_ups) if outer is None else outer.scope
        self._unit = unit = Unit(scope, defers=self._command or (enclosing is not None and enclosing.defers))
        _units.set((*self._around, unit))
        return unit

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unit = self._unit
        try:
            if self._outer is None:
                if error is None and (unit.collected or unit.scope.collected_events.may_grow()):
                    await _dispatch_last(unit)
                await unit.scope.close(error)
            elif error is None:
                self._outer.collected += unit.collected
        finally:
            _units.set(self._around)
        if error is None:
            if self._enclosing is not None:  # perhaps of another container
                self._enclosing.deferred += unit.deferred
            elif unit.deferred:
                await _send_all(unit.deferred)


async def _dispatch_last(unit: Unit) -> None:
    """Dispatch what a unit has collected by its end; close its scope if that fails."""
    unit.defers = True
    try:
        await unit.dispatch_collected(last=True)
    except BaseException as failure:
        await unit.scope.close(failure)
        raise


def current_unit(container: Container | None = None) -> Unit | None:
    """Return the innermost unit of work that is open in this task; with a container, the innermost of that container."""
    found = _units.get()
    if found:
        task = asyncio.current_task()
        for unit in reversed(found):
            if container in (None, unit.scope.container) and task in unit.scope.members:
                return unit
    return None


def deferred_sends() -> list[DeferredSend] | None:
    """Return the list for messages that wait until the unit of work around this code has succeeded.

    None if messages are to be sent at once.
    """
    unit = current_unit()
    return unit.deferred if unit is not None and unit.defers else None


def call_within_units(listener: Callable[[Any], Awaitable[T]], event: Any) -> Awaitable[T]:
    """Call a listener for a new task that this task waits for: the new task belongs to the units that are open here."""
    task = asyncio.current_task()
    scopes = [unit.scope for unit in _units.get() if task in unit.scope.members]
    return _call_as_member(scopes, listener, event) if scopes else listener(event)


async def _call_as_member(scopes: list[LazyScope], listener: Callable[[Any], Awaitable[T]], event: Any) -> T:
    task = asyncio.current_task()
    for scope in scopes:
        scope.members.add(task)
    return await listener(event)


class Unit:
    """A unit of work, or a part of one: a part has the same scope, and hands on what it has when it succeeds.

    Attributes:
        defers: True if messages wait for the end: in a command, and while collected events are dispatched.
        collected: Events to be dispatched, each behind its dispatcher, in the order in which they were collected.
        deferred: Messages to be sent when the outermost unit has succeeded, those of units inside of this one included.
    """

    def __init__(self, scope: LazyScope, *, defers: bool = False) -> None:
        self.scope = scope
        self.defers = defers
        self.collected: deque[tuple[Any, Any]] = deque()
        self.deferred: list[DeferredSend] = []

    async def resolve(self, cls: type[T], /) -> T:
        """Return an object of a class from the unit's scope; the first call opens the scope.

        Raises:
            Unresolvable: The container can't make one.
        """
        return await self.scope.resolve(cls)

    def add_current_task(self) -> None:
        """Let the current task belong to the unit: a middleware may call the handler in another task, with a time limit."""
        if self.scope.members:
            self.scope.members.add(asyncio.current_task())

    @contextmanager
    def collecting(self, handler: object, dispatcher: object, *, attribute: bool = False) -> Generator[None]:
        """Collect the events that a handler puts into its ``events`` in this block, unless the block fails.

        Args:
            handler: An object of the unit's scope.
            dispatcher: Gets the events. With None they are left where they are.
            attribute: If true, a mere attribute ``events`` of the object counts. Else its class has to declare ``events``,
                for a listener may well keep there what it has heard.

        Raises:
            HandlerShared: The same handler or list was in use twice at the same time, and there were events.
            TypeError: ``events`` is not a list or tuple of events, or can't be emptied for another use.
        """
        if dispatcher is None or not (attribute or declares_events(type(handler))):
            yield
            return
        with self.scope.collected_events.collect(handler, dispatcher) as events:
            yield
        self.collected.extend((dispatcher, event) for event in events)

    async def dispatch_collected(self, *, at_once: int = 1, last: bool = False) -> None:
        """Dispatch the collected events, and behind them what is collected meanwhile, until none is left.

        Args:
            at_once: With more than 1, the events that are there are dispatched side by side, at most so many at a time; if
                some fail, the others are waited for. Then the events that came of them follow.
            last: If true, the unit ends: events that were added to lists of handlers later are dispatched too.

        Raises:
            FollowUpsExceeded: More events came of the first events than the scope allows.
            ExceptionGroup: Several of the events side by side failed. The error of a single event is raised as it is.
        """
        take_late = self.scope.collected_events.take_late if last else list
        self.collected += take_late()
        uncounted = len(self.collected)
        outermost = not self.scope.dispatching
        self.scope.dispatching = True
        try:
            while self.collected:
                wave = [self.collected.popleft() for _ in range(len(self.collected) if at_once > 1 else 1)]
                for _, event in wave:
                    if outermost and uncounted:
                        uncounted -= 1
                    else:
                        self.scope.count_follow_up(event)
                if len(wave) == 1:
                    await _dispatch(*wave[0])
                else:
                    await self._dispatch_together(wave, at_once)
                if not self.collected:
                    self.collected += take_late()
        finally:
            self.scope.dispatching = not outermost

    async def _dispatch_together(self, wave: Sequence[tuple[Any, Any]], at_once: int) -> None:
        limit = asyncio.Semaphore(at_once)
        parts = [Unit(self.scope, defers=self.defers) for _ in wave]

        async def dispatch_part(part: Unit, dispatcher: Any, event: Any) -> None:
            _units.set((*_units.get(), part))  # the task's own context: no other task sees it
            async with limit:
                await _dispatch(dispatcher, event)

        errors = await _await_all(
            [
                call_within_units(partial(dispatch_part, part, dispatcher), event)
                for part, (dispatcher, event) in zip(parts, wave, strict=True)
            ]
        )
        if len(errors) > 1:
            raise BaseExceptionGroup(f"{len(errors)} events of one command failed", errors)
        for error in errors:
            raise error
        for part in parts:  # in the order of the events, not of their ends
            self.collected += part.collected
            self.deferred += part.deferred


class LazyScope:
    """A scope that is opened when it is first needed, for the task that made it and the tasks that it waits for.

    Attributes:
        members: These tasks; empty once the scope is over.
        collected_events: The events that handlers of the scope collect.
        dispatching: True while collected events are dispatched.
    """

    def __init__(self, container: Container, max_follow_ups: int) -> None:
        self.container = container
        self.collected_events = CollectedEvents()
        self.dispatching = False
        self.members = {asyncio.current_task()}
        self._follow_ups = 0
        self._max_follow_ups = max_follow_ups
        self._manager: AbstractAsyncContextManager[Scope] | None = None
        self._scope: Scope | None = None
        self._resolving: asyncio.Task[Any] | None = None
        self._resolved: asyncio.Event | None = None  # set when the task that resolves is done, where others wait for it

    def resolver(self) -> Scope | LazyScope:
        """Return what a member resolves the next class with: the open scope itself if there is no other member, else this object."""
        return self if self._scope is None or len(self.members) > 1 else self._scope

    async def resolve(self, cls: type[T]) -> T:
        """Return an object of a class; the first call opens the scope. One member at a time resolves."""
        task = asyncio.current_task()
        if self._resolving is task:  # a factory that dispatches an event would wait for itself
            return await (self._scope or await self._open()).resolve(cls)
        while self._resolving is not None:  # two concurrent listeners would get two objects of a scoped class
            if self._resolved is None:
                self._resolved = asyncio.Event()
            await self._resolved.wait()
        self._resolving = task
        try:
            return await (self._scope or await self._open()).resolve(cls)
        finally:
            self._resolving = None
            if self._resolved is not None:
                self._resolved.set()
                self._resolved = None

    async def _open(self) -> Scope:
        manager = self.container.scope()
        self._scope = await manager.__aenter__()
        self._manager = manager
        return self._scope

    def count_follow_up(self, event: object) -> None:
        """Count an event that came of another event.

        Raises:
            FollowUpsExceeded: The event is one too many.
        """
        if self._follow_ups >= self._max_follow_ups:
            raise FollowUpsExceeded(self._max_follow_ups, name_of(event))
        self._follow_ups += 1

    async def close(self, error: BaseException | None) -> None:
        """Close the scope if it is open, and hand it the error that ended the unit. Beside that error its own is only logged."""
        self.members.clear()
        try:
            if self._manager is not None:
                # The answer of __aexit__ is ignored: a finalizer must not swallow a cancellation.
                trace = error.__traceback__ if error else None
                await self._manager.__aexit__(type(error) if error else None, error, trace)
        except Exception as failure:
            if error is None:
                raise
            if failure is not error:
                logger.exception("scope failed to close", extra={"container": repr(self.container)})
        finally:
            self.collected_events.close()


async def _dispatch(dispatcher: Any, event: Any) -> None:
    name = name_of(event)
    _warn_if_unhandled(dispatcher, name, event)
    await dispatcher.adispatch(name, event)


MAX_WARNED: Final = 10_000
"""Most names of a dispatcher that a warning is logged for: a program can make new ones without end."""
_warned: WeakKeyDictionary[Any, set[Any]] = WeakKeyDictionary()


def _warn_if_unhandled(dispatcher: Any, name: Any, event: object) -> None:
    """Log a warning, once for a name on a dispatcher, if no listener would hear the event and no bridge would send it."""
    if any(_would_act(listener, event, name) for listener in dispatcher.get_listeners(name)):
        return
    warned = _warned.setdefault(dispatcher, set())
    if name not in warned and len(warned) < MAX_WARNED:
        warned.add(name)
        logger.warning(
            "nobody handles %s: no listener is registered for it, and no bridge sends it",
            name,
            extra={"event_name": name, "event_class": type(event).__qualname__},
        )


def _would_act(listener: Any, event: object, name: Any) -> bool:
    """Return True if the listener is not a bridge, or a bridge that would send the event."""
    bridge = getattr(inspect.unwrap(listener), "__self__", None)
    sends = getattr(bridge, "__silbo_sends__", None)  # silbo.bridge imports this module, so its class is not known here
    return sends is None or bool(sends(type(event), name))


async def _send_all(deferred: Sequence[DeferredSend]) -> None:
    errors = await _await_all([send() for send in deferred])
    if len({type(error) for error in errors}) > 1:
        raise BaseExceptionGroup(f"{len(errors)} of {len(deferred)} messages failed", errors)
    for error in errors:
        others = [text for text in dict.fromkeys(map(str, errors)) if text != str(error)]
        error.add_note("\n".join([f"{len(errors)} of {len(deferred)} messages failed", *others]))
        raise error


async def _await_all(work: Sequence[Awaitable[object]]) -> list[BaseException]:
    """Await all at once and return their errors. All have ended when this returns or raises, also when it is cancelled."""
    if len(work) == 1:
        await work[0]
        return []
    results = await asyncio.gather(*work, return_exceptions=True)
    return [result for result in results if isinstance(result, BaseException)]


def check_container(container: object) -> None:
    """Refuse a container that is not an adapter, as the object of a library.

    Raises:
        TypeError: The text names the object that was given.
    """
    if container is None:
        return
    if isinstance(container, type) or not callable(getattr(container, "scope", None)):
        raise TypeError(
            f"container is an adapter from silbo.containers, as RodiContainer(your_container), not {container!r}"
        )
