"""The dispatcher: Whistle's contract exactly, then more that is free when unused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, Unpack, overload

from silbo._closing import AsyncCloseable
from silbo._whistle import WhistleDispatcher, overridable
from silbo.dispatch.class_listeners import Calls, HandlerClass, Handles, Listens, is_listener
from silbo.dispatch.listeners import CACHED_NAMES, ListenerRegistry, ListenerRow, Registration
from silbo.dispatch.observers import Dispatch, Observer, check_observers, watch
from silbo.dispatch.options import ErrorPolicy, Listener, ListenerOptions, Options, check_policy
from silbo.dispatch.running import Wrapper, run, settle
from silbo.dispatch.subscribers import Subscribers
from silbo.dispatch.tasks import Background
from silbo.event import Event, begin_dispatch, end_dispatch, prepare_event
from silbo.names import E, EventName, Name, check_name, warn_if_deprecated
from silbo.protocols import Container
from silbo.work.unit_of_work import check_container

__all__ = ["AsyncEventDispatcher", "count_changes"]

_L = TypeVar("_L", bound=Listener | HandlerClass)
_OVERRIDABLE = ("get_listeners", "_adispatch")


class AsyncEventDispatcher(AsyncCloseable, WhistleDispatcher):
    """Runs the listeners of a name, in order of priority, in the caller's task.

    Args:
        on_error: What an error of a listener does. ``"raise"`` (as in Whistle): it goes to the caller unwrapped and later
            listeners do not run. ``"collect"``: all run, then the errors are raised as one ``ExceptionGroup``. A
            callable ``(error, event, listener)``, sync or async: it gets the error and the dispatch goes on.
        observers: Told about every dispatch and listener.
        container: An adapter from ``silbo.containers``: makes the objects of listeners that are given as classes.
    """

    def __init__(
        self,
        *,
        on_error: ErrorPolicy = "raise",
        observers: Sequence[Observer] = (),
        container: Container | None = None,
    ) -> None:
        check_policy(on_error)
        check_observers(observers)
        check_container(container)
        # What adispatch may run without asking anybody; empty where get_listeners or _adispatch is overridden.
        self._ready: dict[Any, tuple[Listener, ...]] = {}
        self._observers = tuple(observers)
        self._listeners = ListenerRegistry(policy=on_error, container=container, on_change=self._ready.clear)
        self._background = Background()
        self._subscribers = Subscribers()

    # -- listeners ------------------------------------------------------------------------------------------

    @overridable
    def add_listener(
        self,
        name: EventName[E] | Name,
        listener: type[Handles[E] | Calls[E]] | Callable[[E], Awaitable[object]],
        /,
        *,
        priority: float = 0,
        once: bool = False,
        timeout: float | None = None,
        concurrent: bool = False,
        on_error: ErrorPolicy | None = None,
    ) -> Registration:
        """Let a listener hear a name, or every name that a pattern matches.

        Args:
            name: An event name, or a pattern: ``*`` is one segment, ``**`` any number.
            listener: An async callable that takes the event; or a class with an async ``handle`` or ``__call__``, of
                which the container makes an object when a dispatch needs it.
            priority: Lower runs first; ties in order of registration; see FIRST and LAST.
            once: Remove it when it runs first; it runs once even under concurrent dispatches.
            timeout: Seconds after which it is cancelled, with a :class:`~silbo.errors.ListenerTimeout`.
            concurrent: Run it beside its neighbours of equal priority that say so too.
            on_error: For this listener, in place of the dispatcher's.

        Returns:
            Its place; ``remove()`` takes back this registration, no other.

        Raises:
            TypeError: the listener is not async, or the priority is no number.
            ContainerMissing: it is a class, and there is no container.
            NameInvalid: a ``*`` that is not a whole segment.
        """
        warn_if_deprecated(name)
        return self._listeners.add(
            name,
            listener,
            priority=priority,
            options=Options(once=once, timeout=timeout, concurrent=concurrent, on_error=on_error),
        )

    @overload
    def listen(self, name: EventName[E], /, **options: Unpack[ListenerOptions]) -> Listens[E]: ...
    @overload
    def listen(self, name: Name, /, **options: Unpack[ListenerOptions]) -> Callable[[_L], _L]: ...
    def listen(self, name: Any, /, **options: Any) -> Callable[[Any], Any]:
        """Register the decorated function or class; the options are those of :meth:`add_listener`."""
        if is_listener(name):
            raise TypeError("listen takes a name first: @dispatcher.listen('user.joined')")

        def register(listener: Any) -> Any:
            self.add_listener(name, listener, **options)
            return listener

        return register

    def remove_listener(self, name: Any, listener: Listener | HandlerClass, /) -> None:
        """Remove every copy of a listener from a name, compared by ``==``.

        Raises:
            ValueError: nothing was ever registered for this name.
        """
        self._listeners.remove(name, listener)

    @overridable
    def get_listeners(self, name: Any = None, /) -> Any:
        """What a dispatch of this name runs, in order: a tuple. Without a name a dict of tuples by name and pattern.

        A listener with options is a wrapper that equals it and has it as ``__wrapped__``.
        """
        return dict(self._listeners.items()) if name is None else self._listeners.get(name)

    def has_listeners(self, name: Any = None, /) -> bool:
        """Whether a dispatch of this name would run anything; without a name, whether anything is registered."""
        return self._listeners.has(name)

    def describe(self, name: Any = None, /) -> list[ListenerRow]:
        """What is registered: for one name in running order, patterns included; else everything, name by name."""
        return self._listeners.rows(name)

    # -- subscribers ----------------------------------------------------------------------------------------

    def add_subscriber(self, subscriber: object, /) -> Registration:
        """Register every ``@on`` method of an object.

        Raises:
            TypeError: it has none.
        """
        return self._subscribers.add(self, subscriber)

    def remove_subscriber(self, subscriber: object, /) -> None:
        """Remove the listeners of an object.

        Raises:
            ValueError: it was not added.
        """
        self._subscribers.remove(subscriber)

    # -- dispatch -------------------------------------------------------------------------------------------

    @overridable
    async def adispatch(self, name: EventName[E] | Name, event: E | None = None, /) -> E:
        """Run the listeners of a name on an event, one after another, until one stops it.

        Args:
            name: Any hashable; a string without ``*``.
            event: The envelope. Where none is given, a new one: of the class that the :class:`~silbo.EventName` knows, else a
                plain :class:`~silbo.Event`.

        Returns:
            The same event.

        Raises:
            NameInvalid: the name has a ``*``.
            EnvelopeConflict: the event's class declares a field that belongs to the envelope.
            NotAnEvent: the event accepts no attributes.
            Exception: under ``on_error="raise"`` whatever a listener raised; under ``"collect"`` an ``ExceptionGroup``.
        """
        # Any: a silbo event of a checked class passes; everything else falls through to _dispatch.
        envelope: Any = _new_event(name) if event is None else event
        try:
            listeners = self._ready[name]
            direct = envelope.__silbo_direct__
        except (KeyError, AttributeError, TypeError):  # what can't be hashed is told in _dispatch
            listeners, direct = (), None
        if direct is not type(envelope):
            await self._dispatch(name, envelope)
            return envelope  # type: ignore[no-any-return]  # it is the E that came in
        if envelope.__silbo_outward__:
            _ = envelope.event_timestamp
        envelope.name = name
        envelope.dispatcher = self
        envelope.propagation_stopped = False
        envelope.__silbo_direct__ = None  # a dispatch of the same object from inside is not direct
        try:
            for listener in listeners:
                await listener(envelope)
                if envelope.propagation_stopped:
                    break
        finally:
            envelope.__silbo_direct__ = direct
        return envelope  # type: ignore[no-any-return]

    async def _dispatch(self, name: Any, event: Any) -> None:
        """The same with everything: overrides, observers, options, nesting, foreign events."""
        if isinstance(name, Event) or getattr(name, "__hash__", None) is None:
            raise TypeError(
                f"adispatch takes a name, then the event: adispatch('user.joined', {type(name).__name__}(...))"
            )
        check_name(name)
        prepare_event(event)
        listeners = self.get_listeners(name)
        if name not in self._ready:
            self._make_ready(name, listeners)
        outer = begin_dispatch(event, name, self)
        try:
            if self._observers:
                all_of_them = partial(settle, self._adispatch, self._listeners.container)
                await watch(self._observers, Dispatch(name=name, event=event, listeners=listeners), all_of_them)
            else:
                await settle(self._adispatch, self._listeners.container, listeners, event)
        finally:
            end_dispatch(event, outer)

    @overridable
    async def _adispatch(self, listeners: Iterable[Listener], event: Any, /) -> None:
        """Run these listeners on an event. A host may override it, to log or to filter."""
        await run(listeners, event)

    def _make_ready(self, name: Hashable, listeners: Any) -> None:
        """Let the next dispatch of this name run without asking, where nothing special is wanted."""
        own = all(getattr(type(self), part) is getattr(AsyncEventDispatcher, part) for part in _OVERRIDABLE)
        if self._observers or not own or not self.__dict__.keys().isdisjoint(_OVERRIDABLE):
            return
        if all(listener.plain for listener in listeners if isinstance(listener, Wrapper)):
            if len(self._ready) >= CACHED_NAMES:
                self._ready.clear()
            self._ready[name] = listeners

    def __setattr__(self, attribute: str, value: Any) -> None:
        super().__setattr__(attribute, value)
        if attribute in _OVERRIDABLE:
            self._ready.clear()

    # -- in the background, and the end ---------------------------------------------------------------------

    def spawn(self, name: EventName[E] | Name, event: E | None = None, /) -> asyncio.Task[E]:
        """Dispatch in a task of its own, which is held until it is done.

        An error goes to ``on_error`` where that isolates, else to the log and to whoever awaits the task.

        Raises:
            DispatcherClosed: after :meth:`aclose`.
        """
        return self._background.spawn(self.adispatch(name, event))

    async def drain(self, timeout: float | None = None) -> None:
        """Wait until no spawned dispatch runs; one that waits here itself is not waited for.

        Raises:
            TimeoutError: some still run after ``timeout`` seconds; they go on.
        """
        await self._background.drain(timeout)

    async def wait_for(
        self,
        name: EventName[E] | Name,
        /,
        *,
        where: Callable[[E], object] | None = None,
        timeout: float | None = None,
    ) -> E:
        """Wait for an event: its next dispatch for which ``where(event)`` is true, after its other listeners.

        Args:
            name: A name or pattern.
            where: Told every such event; an error in it is raised here, not in the dispatch.
            timeout: Seconds.

        Raises:
            TimeoutError: none came in time.
            DispatcherClosed: the dispatcher is closed, or was while waiting.
        """
        return await self._background.wait_for(self, name, where, timeout)

    async def aclose(self) -> None:
        """End every ``wait_for``, refuse new ones and new spawns, and wait for what is spawned. Twice is fine."""
        await self._background.aclose()


def count_changes(dispatcher: Any) -> int | None:
    """Return how often listeners were added to or removed from one of silbo's dispatchers.

    None for any other dispatcher, and for one that overrides ``get_listeners``: its listeners may change unnoticed.
    """
    get_listeners = getattr(dispatcher, "get_listeners", None)
    if getattr(get_listeners, "__func__", None) is not AsyncEventDispatcher.get_listeners:
        return None
    registry: ListenerRegistry = dispatcher._listeners  # noqa: SLF001  # of this very class
    return registry.changes


def _new_event(name: object) -> Any:
    return ((isinstance(name, EventName) and name.cls) or Event)()
