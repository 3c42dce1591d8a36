"""The dispatcher: Whistle's contract exactly, and more that costs nothing when it is not used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from functools import partial
from time import time_ns
from typing import Any, TypeVar, Unpack, overload

from silbo._causes import cause
from silbo._closing import AsyncCloseable
from silbo._whistle import WhistleDispatcher, overridable, overridable_async
from silbo.dispatch.class_listeners import (
    Calls,
    ClassListener,
    HandlerClass,
    Handles,
    Listens,
    is_listener,
    run_in_unit,
)
from silbo.dispatch.event_cause import EventCause, is_cause, may_leave, run_as_cause
from silbo.dispatch.extension_points import ExtensionPoints, Names, Unknown, find_use, make_event
from silbo.dispatch.listeners import ListenerRegistry, ListenerRow, Registration
from silbo.dispatch.observers import Dispatch, Observer, check_observers, list_observers, observe_dispatch
from silbo.dispatch.options import DEFAULTS, ErrorPolicy, Listener, ListenerOptions, Options, check_policy
from silbo.dispatch.policy_listener import PolicyListener
from silbo.dispatch.received_event import listener_timeout
from silbo.dispatch.running import WrappedListener, limit_listeners, run_dispatch, run_listeners
from silbo.dispatch.subscribers import Subscribers
from silbo.dispatch.sync_callers import Portal
from silbo.dispatch.tasks import BackgroundTasks
from silbo.event import DISPATCHED, UNTIMED, Event, begin_dispatch, end_dispatch, prepare_event
from silbo.names import (
    MAX_NAME_LENGTH,
    E,
    EventName,
    Name,
    check_name,
    check_name_or_pattern,
    find_caller,
    may_be_deprecated,
    warn_if_deprecated,
)
from silbo.protocols import Container
from silbo.work.unit_of_work import check_container

__all__ = ["AsyncEventDispatcher", "count_changes", "has_own_adispatch", "is_heard"]

_L = TypeVar("_L", bound=Listener | HandlerClass)
_OVERRIDABLE = ("get_listeners", "_adispatch")


class AsyncEventDispatcher(AsyncCloseable, WhistleDispatcher):
    """Runs the listeners of a name, in order of priority, in the caller's task.

    Args:
        on_error: Policy for errors of listeners. ``"raise"`` (as in Whistle): the error goes to the caller as it is, and later
            listeners do not run. ``"collect"``: all listeners run, then the errors are raised as one ``ExceptionGroup``. A
            callable ``(error, event, listener)``, sync or async, gets the error, and the dispatch goes on.
        binding: If true, ``on_error`` holds for every listener, and a listener's own ``on_error`` has no effect. If false, the
            listener's own comes first.
        observers: Called around every dispatch and listener.
        container: An adapter from ``silbo.containers``, which makes the objects of listener classes.
        names: The names that the host declares: EventName constants, and modules whose constants they are. An event of another
            class than its declared name's is refused. By default nothing is declared.
        unknown: The answer to a name that is not declared, and to a pattern that matches no declared name, in ``add_listener``
            and in a dispatch: nothing, a :class:`~silbo.errors.NameUnknownWarning`, or a :class:`~silbo.errors.NameUnknown`.

    Attributes:
        names: The declared names.
    """

    def __init__(
        self,
        *,
        on_error: ErrorPolicy = "raise",
        binding: bool = False,
        observers: Sequence[Observer] = (),
        container: Container | None = None,
        names: Names | None = None,
        unknown: Unknown = "warn",
    ) -> None:
        check_policy(on_error)
        check_observers(observers)
        check_container(container)
        self._is_replaced = False  # True if one of these methods is replaced on this object
        self._observations: dict[object, Observer] = {object(): observer for observer in observers}
        self._observers = list_observers(self._observations)
        self._listeners = ListenerRegistry(policy=on_error, binding=binding, container=container)
        # Listeners by name that adispatch may simply call. Empty if get_listeners or _adispatch is overridden.
        self._ready = self._listeners.ready
        if names is None and unknown == "error":
            raise ValueError('unknown="error" needs names=: without it every name would be unknown')
        self._points = None if names is None else ExtensionPoints(names, unknown, self._listeners)
        self.names: tuple[EventName[Any], ...] = () if self._points is None else self._points.names
        for name in self.names:
            self._listeners.set_policy(name)
        self._background = BackgroundTasks()
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
        """Register a listener for a name, or for every name that a pattern matches.

        Args:
            name: An event name, or a pattern: ``*`` is one segment, ``**`` any number.
            listener: An async callable that takes the event; or a class with an async ``handle`` or ``__call__``, of
                which the container makes an object when a dispatch needs it.
            priority: Lower runs first; ties run in order of registration; see FIRST and LAST.
            once: If true, the first run removes the listener; it runs once even under concurrent dispatches. With an event that
                a consumer received, the delivery that is done removes it: it runs again with the next attempt of one that failed.
            timeout: Seconds after which the listener is cancelled and a :class:`~silbo.errors.ListenerTimeout` raised.
            concurrent: If true, the listener runs together with neighbours of equal priority that are concurrent too.
            on_error: Policy for this listener, in place of the dispatcher's, unless that is binding.

        Returns:
            The registration; its ``remove()`` removes this one and no other.

        Raises:
            TypeError: The listener is not async, the priority is not a number, or the name is None.
            ContainerMissing: The listener is a class, and the dispatcher has no container.
            NameInvalid: The name has a ``*`` that is not a whole segment.
            NameUnknown: The name is not declared, under ``unknown="error"``.
        """
        if self._points is not None:
            self._points.check_listener(name, listener)
        if isinstance(name, EventName):
            if self._points is None and name.deprecated is not None:
                warn_if_deprecated(name, find_use(listener, find_caller()))
            if name.policy is not None:
                self._listeners.set_policy(name)
        return self._listeners.add(
            name,
            listener,
            priority,
            Options(once=once, timeout=timeout, concurrent=concurrent, on_error=on_error)
            if once or concurrent or timeout is not None or on_error is not None
            else DEFAULTS,
        )

    @overload
    def listen(self, name: EventName[E], /, **options: Unpack[ListenerOptions]) -> Listens[E]: ...
    @overload
    def listen(self, name: Name, /, **options: Unpack[ListenerOptions]) -> Callable[[_L], _L]: ...
    def listen(self, name: Any, /, **options: Any) -> Callable[[Any], Any]:
        """Register the decorated function or class; the options are those of :meth:`add_listener`."""
        if is_listener(name):
            raise TypeError("listen takes a name first: @dispatcher.listen('user.joined')")
        check_name_or_pattern(name)

        def register(listener: Any) -> Any:
            self.add_listener(name, listener, **options)
            return listener

        return register

    def remove_listener(self, name: Any, listener: Listener | HandlerClass, /) -> None:
        """Remove every registration of a listener for a name, compared by ``==``; there may be none.

        Raises:
            ValueError: No listener was ever registered for this name. A dispatcher that has had more than 1,024 names whose
                registrations are all gone (``once``, ``registration.remove()``) can't tell, and ignores unknown names.
        """
        self._listeners.remove(name, listener)

    @overridable
    def get_listeners(self, name: Any = None, /) -> Any:
        """Return the listeners that a dispatch of a name runs, in order: a tuple. Without a name, a dict of such tuples.

        A listener with options appears as a wrapper, which equals the listener and has it as ``__wrapped__``.
        """
        return dict(self._listeners.items()) if name is None else self._listeners.get(name)

    def has_listeners(self, name: Any = None, /) -> bool:
        """Return True if a dispatch of the name would run a listener; without a name, if any listener is registered."""
        return self._listeners.has(name)

    def describe(self, name: Any = None, /) -> list[ListenerRow]:
        """Return the listeners of a name in running order, those of patterns included; else all listeners, name by name."""
        return self._listeners.rows(name)

    # -- subscribers ----------------------------------------------------------------------------------------

    def add_subscriber(self, subscriber: object, /) -> Registration:
        """Register every ``@on`` method of an object.

        Raises:
            TypeError: The object is a class, or has no such method.
        """
        return self._subscribers.add(self, subscriber)

    def remove_subscriber(self, subscriber: object, /) -> None:
        """Remove the listeners of an object.

        Raises:
            ValueError: The object was not added as a subscriber.
        """
        self._subscribers.remove(subscriber)

    def observe(self, observer: Observer, /) -> Registration:
        """Call an observer around every dispatch that begins from now on, after those given before.

        An observer that is given twice is called once, until each of its registrations is removed; one that was given to the
        constructor is called as long as the dispatcher is used.

        Returns:
            The registration; its ``remove()`` ends the observation, with the next dispatch.

        Raises:
            TypeError: The object is no observer.
        """
        check_observers([observer])
        registered = object()
        self._observations[registered] = observer
        self._observers = list_observers(self._observations)
        self._ready.clear()

        def remove() -> None:
            self._observations.pop(registered, None)
            self._observers = list_observers(self._observations)
            self._ready.clear()

        return Registration(remove)

    # -- dispatch -------------------------------------------------------------------------------------------

    @overridable_async
    async def adispatch(self, name: EventName[E] | Name, event: E | None = None, /) -> E:
        """Run the listeners of a name on an event, one after another, until one stops the event.

        Args:
            name: Any hashable; a string without ``*``.
            event: The event. By default a new one: of the class that belongs to the :class:`~silbo.EventName`, else a plain
                :class:`~silbo.Event`.

        Returns:
            The same event.

        Raises:
            NameInvalid: The name has a ``*``.
            EnvelopeConflict: The event's class declares a field that belongs to the envelope.
            NotAnEvent: The event accepts no attributes.
            NameUnknown: The name is not declared, under ``unknown="error"``.
            EventMismatch: The event is of another class than the declared name's.
            EventMissing: There is no event, and its class can't be made without arguments.
            Exception: Under ``on_error="raise"`` the error of a listener; under ``"collect"`` an ``ExceptionGroup``.
        """
        # Any: a silbo event of a checked class is handled here; everything else goes to _dispatch.
        envelope: Any = make_event(self._points, name) if event is None else event
        try:
            direct = envelope.__silbo_direct__
            listeners = self._ready[name]
        except (AttributeError, KeyError, TypeError):
            direct, listeners = self._find_ready(name, envelope)
        if direct is not type(envelope):
            await self._dispatch(name, envelope)
            return envelope  # type: ignore[no-any-return]  # it is the E that came in
        phase = getattr(envelope, "__silbo_phase__", None)
        if phase is not None:
            if phase is not UNTIMED:
                await self._dispatch(name, envelope)
                return envelope  # type: ignore[no-any-return]
            envelope.__silbo_time__ = time_ns()
            envelope.__silbo_phase__ = None
        envelope.name = name
        envelope.dispatcher = self
        envelope.__silbo_stopped__ = False
        if not listeners:
            return envelope  # type: ignore[no-any-return]
        envelope.__silbo_phase__ = DISPATCHED  # so that a dispatch of the same event by a listener goes to _dispatch
        try:
            for listener in listeners:
                await listener(envelope)
                if envelope.__silbo_stopped__:
                    break
        finally:
            envelope.__silbo_phase__ = None
        return envelope  # type: ignore[no-any-return]

    def dispatch(self, name: Hashable, event: Any = None, /) -> Any:
        """Refuse, as Whistle's async dispatcher does: a dispatch awaits its listeners.

        Raises:
            NotImplementedError: Always; it says what to write.
        """
        raise NotImplementedError(
            "dispatch() can't await the listeners. Write: await dispatcher.adispatch(name, event); in another thread than the "
            "event loop's, portal.dispatch(name, event), with portal = dispatcher.portal() made in the loop; where no loop "
            "runs, silbo.run_sync(dispatcher, name, event)"
        )

    def portal(self) -> Portal:
        """Return the way into this event loop for other threads: ``portal.dispatch(name, event)`` dispatches, and waits.

        Raises:
            RuntimeError: It was not called in the event loop.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "dispatcher.portal() is called in the event loop, and what it returns in other threads; where no loop runs, "
                "write silbo.run_sync(dispatcher, name, event)"
            ) from None
        return Portal(self, loop, self._check_declared)

    async def _dispatch(self, name: Any, event: Any) -> None:
        """Dispatch with everything that may be wanted: overrides, observers, options, nesting, foreign events."""
        if isinstance(name, Event) or getattr(name, "__hash__", None) is None:
            raise TypeError(
                f"adispatch takes a name, then the event: adispatch('user.joined', {type(name).__name__}(...))"
            )
        check_name(name)
        if isinstance(name, EventName):
            if self._points is None:
                warn_if_deprecated(name)
            if name.policy is not None:
                self._listeners.set_policy(name)
        if self._points is None:
            prepare_event(event)
        else:
            self._points.check_dispatch(name, event)
            prepare_event(event)
            self._points.check_event(name, event)
        changes = self._listeners.changes
        listeners = self.get_listeners(name)
        if name not in self._ready and not self._observers and not self._has_overrides():
            self._make_ready(name, listeners, changes, event)
        outer = begin_dispatch(event, name, self)
        as_cause = self._listeners.has_bridges and self._listeners.is_bridged(name) and is_cause(event)
        caused = cause.set(EventCause(event, cause.get())) if as_cause else None
        try:
            timeout = listener_timeout(event)
            if self._observers:
                listeners = tuple(listeners)  # a host's get_listeners may give an iterator
                heard = self._listeners.is_heard(name, listeners)
                if timeout is not None:
                    listeners = limit_listeners(listeners, timeout)
                run_all = None
                if self._has_overrides() or any(isinstance(listener, WrappedListener) for listener in listeners):
                    run_all = partial(run_dispatch, self._adispatch, self._listeners.container)
                dispatch = Dispatch(name=name, event=event, listeners=listeners, heard=heard)
                await observe_dispatch(self._observers, dispatch, run_all)
            else:
                if timeout is not None:
                    listeners = limit_listeners(listeners, timeout)
                await run_dispatch(self._adispatch, self._listeners.container, listeners, event)
        finally:
            if caused is not None:
                cause.reset(caused)
            end_dispatch(event, outer)

    @overridable_async
    async def _adispatch(self, listeners: Iterable[Listener], event: Any, /) -> None:
        """Run listeners on an event. A host may override this method, to log or to filter."""
        await run_listeners(listeners, event)

    def _find_ready(self, name: Any, event: Any) -> tuple[type | None, tuple[Listener, ...]]:
        """Return the class of an event, and the listeners of a name that adispatch may simply call; None and () for _dispatch."""
        cls = type(event)
        if (
            type(name) is str  # an EventName says more, and other names are checked
            and getattr(cls, "__silbo_direct__", None) is cls
            and self._points is None
            and "*" not in name
            and len(name) <= MAX_NAME_LENGTH
            and not self._observers
            and not self._has_overrides()
        ):
            changes = self._listeners.changes
            listeners = self._listeners.look_up(name)
            if (ready := self._make_ready(name, listeners, changes, event)) is not None:
                return cls, ready
        return None, ()

    def _make_ready(self, name: Hashable, listeners: Any, changes: int, event: Any) -> tuple[Listener, ...] | None:
        """Let adispatch itself run the listeners of a name from now on, and return what it runs; None if that would make a difference."""
        if self._listeners.awaits_policy(name):  # a dispatch of the constant must not find the plain text's listeners
            return None
        if self._points is None and may_be_deprecated(name):  # each dispatch of the constant warns
            return None
        has_classes = False
        has_policies = False
        for listener in listeners:
            if isinstance(listener, WrappedListener):
                if not listener.plain:
                    if not isinstance(listener, ClassListener) or listener.container is not self._listeners.container:
                        return None
                    has_classes = True
                has_policies = has_policies or isinstance(listener, PolicyListener)
        if has_policies:
            listeners = tuple(
                listener.run if isinstance(listener, PolicyListener) else listener for listener in listeners
            )
        if has_classes and self._listeners.container is not None:
            listeners = (run_in_unit(self._listeners.container, listeners),)
        # The first event of a name decides: all have one class, and for domain events it would take half as long again.
        if self._listeners.has_bridges and len(listeners) > 1 and may_leave(event) and self._listeners.is_bridged(name):
            listeners = (run_as_cause(listeners),)
        if self._points is not None and (listeners := self._points.guard(name, listeners)) is None:
            return None
        self._listeners.keep(self._ready, name, listeners, changes)
        return listeners  # type: ignore[no-any-return]

    def _has_overrides(self) -> bool:
        """Return True if a host has overridden a method that a dispatch calls, in a class or on this object."""
        cls = type(self)
        return (
            self._is_replaced
            or cls.get_listeners is not AsyncEventDispatcher.get_listeners
            or cls._adispatch is not AsyncEventDispatcher._adispatch
        )

    def __setattr__(self, attribute: str, value: Any) -> None:
        super().__setattr__(attribute, value)
        if attribute in _OVERRIDABLE:
            self._note_replaced()

    def __delattr__(self, attribute: str) -> None:
        super().__delattr__(attribute)
        if attribute in _OVERRIDABLE:
            self._note_replaced()

    def _note_replaced(self) -> None:
        # Here alone, for CPython reads the attributes of an object slower after a look into its __dict__.
        self._is_replaced = not self.__dict__.keys().isdisjoint(_OVERRIDABLE)
        self._ready.clear()

    # -- background tasks and the end -----------------------------------------------------------------------

    def spawn(self, name: EventName[E] | Name, event: E | None = None, /) -> asyncio.Task[E]:
        """Dispatch in a new task, which the dispatcher holds until it is done.

        An error goes to ``on_error`` if that is a callable; else it is logged, and raised to the code that awaits the task.

        Raises:
            DispatcherClosed: After :meth:`aclose`.
            NameUnknown: The name is not declared, under ``unknown="error"``.
            EventMismatch: The event is of another class than the declared name's.
        """
        self._check_declared(name, event)
        return self._background.spawn(self.adispatch(name, event))

    def _check_declared(self, name: Any, event: Any) -> None:
        """Check a dispatch where it is asked for, if it runs elsewhere."""
        if self._points is not None:
            self._points.check_dispatch(name, event)
            if event is not None:
                self._points.check_event(name, event)

    async def drain(self, timeout: float | None = None) -> None:
        """Wait until no spawned dispatch runs. May be called from a spawned dispatch, which does not wait for itself.

        Dispatches that were spawned in another event loop must be waited for there.

        Raises:
            TimeoutError: Some still run after ``timeout`` seconds; they go on.
            LoopConflict: Some run in another event loop, in another thread.
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
        """Wait for the next event for which ``where(event)`` is true, and return it after its other listeners have run.

        The event may be dispatched in another thread.

        Args:
            name: A name or pattern.
            where: Called with every event of the name, in the thread that dispatches it. Its errors are raised here, not in the dispatch.
            timeout: Seconds.

        Raises:
            TimeoutError: No such event came in time.
            DispatcherClosed: The dispatcher is closed, or was closed while waiting.
        """
        return await self._background.wait_for(self, name, where, timeout)

    async def aclose(self) -> None:
        """End every ``wait_for``, refuse new ones and new spawns, and wait for spawned dispatches. May be called twice."""
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


def has_own_adispatch(dispatcher: object) -> bool:
    """Return True if a dispatcher's ``adispatch`` is silbo's own: it returns a coroutine, and nothing else of the host's."""
    adispatch = getattr(dispatcher, "adispatch", None)
    return getattr(adispatch, "__func__", None) is AsyncEventDispatcher.adispatch


def is_heard(dispatcher: object, name: Hashable, listeners: Iterable[Listener]) -> bool:
    """Return True if one of the listeners of a name is meant for the name, as :class:`~silbo.Dispatch` says it.

    Of a foreign dispatcher every listener is taken to be.
    """
    registry = getattr(dispatcher, "_listeners", None)
    return (
        registry.is_heard(name, listeners) if isinstance(registry, ListenerRegistry) else any(True for _ in listeners)
    )
