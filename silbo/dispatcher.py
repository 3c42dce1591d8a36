"""The dispatcher: Whistle's contract exactly, then more that is free when unused."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self, TypeVar

from silbo._whistle import WhistleDispatcher
from silbo.errors import DispatcherClosed, NameInvalid
from silbo.event import Event, admit, mark, running, set_running
from silbo.guard import ErrorPolicy, Listener, Options, Wrapper, check_policy
from silbo.listeners import CACHED_NAMES, LAST, ListenerRegistry, ListenerRow, Registration
from silbo.names import EventName, is_pattern
from silbo.observers import Dispatch, Observer, watch
from silbo.spawned import SpawnedTasks
from silbo.subscriber import subscriptions

__all__ = ["AsyncEventDispatcher"]

_L = TypeVar("_L", bound=Listener)
_OVERRIDABLE = ("get_listeners", "_adispatch")


class AsyncEventDispatcher(WhistleDispatcher):
    """Runs the listeners of a name, in order of priority, in the caller's task.

    Args:
        on_error: What an error of a listener does. ``"raise"`` (as in Whistle): it goes to the caller unwrapped and later
            listeners do not run. ``"collect"``: all run, then the errors are raised as one ``ExceptionGroup``. A
            callable ``(error, event, listener)``, sync or async: it gets the error and the dispatch goes on.
        observers: Told about every dispatch and listener.
    """

    def __init__(self, *, on_error: ErrorPolicy = "raise", observers: Sequence[Observer] = ()) -> None:
        check_policy(on_error)
        # What adispatch may run without asking anybody; empty where get_listeners or _adispatch is overridden.
        self._ready: dict[Hashable, tuple[Listener, ...]] = {}
        self._observers = tuple(observers)
        self._listeners = ListenerRegistry(policy=on_error, on_change=self._ready.clear)
        self._spawned = SpawnedTasks()
        self._waiting: set[asyncio.Future[Any]] = set()
        self._subscribers: list[tuple[object, list[tuple[Hashable, Listener]]]] = []
        self._closed = False

    # -- listeners ------------------------------------------------------------------------------------------

    def add_listener(
        self,
        name: Any,
        listener: Listener,
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
            listener: An async callable that takes the event.
            priority: Lower runs first; ties in order of registration; see FIRST and LAST.
            once: Remove it when it runs first; it runs once even under concurrent dispatches.
            timeout: Seconds after which it is cancelled, with a :class:`~silbo.errors.ListenerTimeout`.
            concurrent: Run it beside its neighbours of equal priority that say so too.
            on_error: For this listener, in place of the dispatcher's.

        Returns:
            Its place: ``remove()`` takes back this registration, no other.

        Raises:
            TypeError: the listener is not async, or the priority is no number.
            NameInvalid: a ``*`` that is not a whole segment.
        """
        if isinstance(name, EventName):
            _warn_deprecated(name)
        return self._listeners.add(
            name,
            listener,
            priority=priority,
            options=Options(once=once, timeout=timeout, concurrent=concurrent, on_error=on_error),
        )

    def listen(self, name: Any, /, **options: Any) -> Callable[[_L], _L]:
        """Register the decorated function; the options are those of :meth:`add_listener`."""

        def register(listener: _L) -> _L:
            self.add_listener(name, listener, **options)
            return listener

        return register

    def remove_listener(self, name: Any, listener: Listener, /) -> None:
        """Remove every copy of a listener from a name, compared by ``==``.

        Raises:
            ValueError: nothing was ever registered for this name.
        """
        self._listeners.remove(name, listener)

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
        found = list(subscriptions(subscriber))
        if not found:
            raise TypeError(f"{type(subscriber).__qualname__} has no method marked with @silbo.on(...)")
        for name, listener, options in found:
            self.add_listener(name, listener, **options)
        self._subscribers.append((subscriber, [(name, listener) for name, listener, _ in found]))
        return Registration(lambda: self._forget(subscriber))

    def remove_subscriber(self, subscriber: object, /) -> None:
        """Remove the listeners of an object.

        Raises:
            ValueError: it was not added.
        """
        if not self._forget(subscriber):
            raise ValueError(f"{subscriber!r} is no subscriber of this dispatcher")

    def _forget(self, subscriber: object) -> bool:
        mine = [entry for entry in self._subscribers if entry[0] is subscriber]
        for entry in mine:
            self._subscribers.remove(entry)
            for name, listener in entry[1]:
                self.remove_listener(name, listener)
        return bool(mine)

    # -- dispatch -------------------------------------------------------------------------------------------

    async def adispatch(self, name: Any, event: Any = None, /) -> Any:
        """Run the listeners of a name on an event, one after another, until one stops it.

        Args:
            name: Any hashable; a string without ``*``.
            event: The envelope; a new :class:`~silbo.Event` where none is given.

        Returns:
            The same event.

        Raises:
            NameInvalid: the name has a ``*``.
            EnvelopeConflict: the event's class declares a field that belongs to the envelope.
            NotAnEvent: the event accepts no attributes.
            Exception: under ``on_error="raise"`` whatever a listener raised; under ``"collect"`` an ``ExceptionGroup``.
        """
        if event is None:
            event = Event()
        listeners = self._ready.get(name)
        try:
            direct = listeners is not None and event._silbo_direct is event.__class__ and not event._silbo_running
        except AttributeError:  # not silbo's
            direct = False
        if not direct:
            return await self._dispatch(name, event)
        event.name, event.dispatcher, event.propagation_stopped = name, self, False
        if listeners:
            event._silbo_running = True
            try:
                for listener in listeners:
                    await listener(event)
                    if event.propagation_stopped:
                        break
            finally:
                event._silbo_running = False
        return event

    async def _dispatch(self, name: Hashable, event: Any) -> Any:
        """The same with everything: overrides, observers, options, nesting, foreign events."""
        if is_pattern(name):
            raise NameInvalid(str(name), "a name with '*' is a pattern; dispatch a name")
        if isinstance(name, EventName):
            _warn_deprecated(name)
        admit(event)
        listeners = self.get_listeners(name)
        self._make_ready(name, listeners)
        outer = running(event)
        before = (event.name, event.dispatcher, event.propagation_stopped) if outer else ()
        mark(event, name, self, stopped=False)
        errors: list[Exception] = []
        set_running(event, errors)
        try:
            if self._observers:
                seen = Dispatch(name=name, event=event, listeners=listeners)
                await watch(self._observers, seen, self._adispatch)
            else:
                await self._adispatch(listeners, event)
        except Exception as error:
            if not errors:
                raise
            errors.append(error)
        finally:
            set_running(event, outer)
            if before:
                mark(event, before[0], before[1], stopped=before[2])
        if errors:
            raise ExceptionGroup(f"{len(errors)} listeners of {name!r} failed", errors)
        return event

    async def _adispatch(self, listeners: Sequence[Listener], event: Any, /) -> None:
        """Run these listeners on an event. A host may override it, to log or to filter."""
        for beside in _side_by_side(tuple(listeners)):
            if len(beside) == 1:
                await beside[0](event)
            else:
                await _run_together(beside, event)
            if event.propagation_stopped:
                break

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

    def spawn(self, name: Any, event: Any = None, /) -> asyncio.Task[Any]:
        """Dispatch in a task of its own, which is held until it is done.

        An error goes to ``on_error`` where that isolates, else to the log and to whoever awaits the task.

        Raises:
            DispatcherClosed: after :meth:`aclose`.
        """
        self._check_open()
        return self._spawned.spawn(self.adispatch(name, event))

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # a deadline for several waits
        """Wait until no spawned dispatch runs; one that waits here itself is not waited for.

        Raises:
            TimeoutError: some still run after ``timeout`` seconds; they go on.
        """
        await self._spawned.drain(timeout)

    async def wait_for(
        self,
        name: Any,
        /,
        *,
        where: Callable[[Any], object] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Any:
        """Wait for an event: its next dispatch for which ``where(event)`` is true, after its other listeners.

        Args:
            name: A name or pattern.
            where: Told every such event; an error in it is raised here, not in the dispatch.
            timeout: Seconds.

        Raises:
            TimeoutError: none came in time.
            DispatcherClosed: the dispatcher is closed, or was while waiting.
        """
        self._check_open()
        heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def hear(event: Any) -> None:
            if heard.done():
                return
            try:
                if where is None or where(event):
                    heard.set_result(event)
            except Exception as error:
                heard.set_exception(error)

        place = self.add_listener(name, hear, priority=LAST)
        self._waiting.add(heard)
        try:
            async with asyncio.timeout(timeout):
                return await heard
        finally:
            self._waiting.discard(heard)
            if isinstance(place, Registration):
                place.remove()
            else:  # a host's add_listener gave Whistle's answer, None
                self.remove_listener(name, hear)

    async def aclose(self) -> None:
        """End every ``wait_for``, refuse new ones and new spawns, and wait for what is spawned. Twice is fine."""
        self._closed = True
        for heard in self._waiting:
            if not heard.done():
                heard.set_exception(DispatcherClosed())
        await self.drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise DispatcherClosed


def _side_by_side(listeners: Sequence[Listener]) -> Iterator[Sequence[Listener]]:
    """The listeners in turns: neighbours of equal rank that are all concurrent take theirs together."""
    if not any(isinstance(listener, Wrapper) and listener.concurrent for listener in listeners):
        yield from zip(listeners, strict=True)
        return
    for (_, together), turn in groupby(enumerate(listeners), key=_turn):
        beside = [listener for _, listener in turn]
        if together:
            yield beside
        else:
            yield from ([listener] for listener in beside)


def _turn(numbered: tuple[int, Listener]) -> tuple[object, bool]:
    listener = numbered[1]
    together = isinstance(listener, Wrapper) and listener.concurrent
    return (listener.rank if together else None), together  # type: ignore[attr-defined]


async def _run_together(listeners: Sequence[Listener], event: Any) -> None:
    """Run them at once; all have ended when this returns or raises, also when it is cancelled."""
    results = await asyncio.gather(*(listener(event) for listener in listeners), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if len(errors) > 1:
        raise BaseExceptionGroup(f"{len(errors)} concurrent listeners failed", errors)
    for error in errors:
        raise error


def _warn_deprecated(name: EventName[Any]) -> None:
    if name.deprecated is not None:
        warnings.warn(f"event {name!s} is deprecated: {name.deprecated}", DeprecationWarning, stacklevel=4)
