"""The maps of handlers: one class for a request, any number of classes for an event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar, cast, get_origin
from weakref import WeakKeyDictionary

from silbo.dispatch.class_listeners import Calls, ClassListener, Handles
from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import AlreadyBound, NameInvalid, RequestUnbound
from silbo.mediator.requests import HandledBy, HandlesRequest, check_event_handler, check_request_handler
from silbo.names import EventName, claim_own_name, generic_class, has_name, name_of
from silbo.protocols import Container

__all__ = ["EventMap", "RequestMap"]

E = TypeVar("E")
H = TypeVar("H")


class RequestMap:
    """The handler of each class of requests."""

    def __init__(self) -> None:
        self._handlers: dict[type, type[HandlesRequest[Any, Any]]] = {}

    def bind(self, request_type: type[HandledBy[H]], handler_type: type[H]) -> None:
        """Let a class handle a class of requests; requests of derived classes are bound on their own.

        Type checkers see if the handler takes this request, and if its answer is that of ``Request[...]``.

        Raises:
            TypeError: An argument is not a class of requests or of handlers, or the handler has no async ``handle`` of its own.
            AlreadyBound: The request has a handler.
        """
        request: type[Any]
        handler: Any
        request, handler = request_type, handler_type
        for given in (request, handler):
            if isinstance(origin := get_origin(given), type):
                raise TypeError(
                    f"{given!r} is no class, and its objects are of {origin.__qualname__}: bind {origin.__qualname__}"
                )
            if not isinstance(cast("object", given), type):
                raise TypeError(f"bind takes two classes, bind(JoinMeeting, JoinMeetingHandler), not {given!r}")
        check_request_handler(request, handler)
        if request in self._handlers:
            raise AlreadyBound(request.__qualname__, self._handlers[request], handler)
        self._handlers[request] = handler

    def handler_of(self, request_type: type[object]) -> type[HandlesRequest[Any, Any]]:
        """Return the class that handles requests of a class. A handler of ``Page`` handles ``Page[int]`` too, if that has none.

        Raises:
            RequestUnbound: No class does.
        """
        for cls in (request_type, generic_class(request_type)):
            if cls in self._handlers:
                return self._handlers[cls]
        raise RequestUnbound(request_type, tuple(self._handlers))

    def __repr__(self) -> str:
        bound = (f"{request.__qualname__} -> {handler.__qualname__}" for request, handler in self._handlers.items())
        return f"<RequestMap: {', '.join(bound) or 'empty'}>"


@dataclass(frozen=True, slots=True)
class _Binding:
    """A class of handlers, bound to a name of events.

    Attributes:
        cls: The class of the events; None for an EventName without a class.
    """

    name: Any
    cls: type[Any] | None
    handler_type: type[Any]

    def check_beside(self, other: _Binding) -> None:
        """Refuse another binding on the same dispatcher that conflicts.

        Raises:
            NameInvalid: Events of two classes have one name.
            AlreadyBound: The other binding is the same.
        """
        if self.name != other.name:
            return
        if self.cls is not None and other.cls is not None and not _same(self.cls, other.cls):
            raise _one_name(self.name, other.cls, self.cls)
        if self.handler_type is other.handler_type:
            raise AlreadyBound(str(self.name), self.handler_type, self.handler_type)

    def __str__(self) -> str:
        return f"{self.name} -> {self.handler_type.__qualname__}"


class EventMap:
    """The handlers of events. Each is registered as a listener with the dispatcher of every mediator that has the map."""

    def __init__(self) -> None:
        self._bound: dict[Any, list[_Binding]] = {}  # by name, in the order in which they were bound
        self._listening: WeakKeyDictionary[AsyncEventDispatcher, Container] = WeakKeyDictionary()

    def bind(self, event: type[E] | EventName[E], handler_type: type[Handles[E] | Calls[E]]) -> None:
        """Let a class handle events. Several handlers of an event run in the order in which they were bound.

        Args:
            event: An EventName; or a class of events, which stands for its :class:`~silbo.EventName`, or for the name of the
                class if there is none.
            handler_type: A class with an async ``handle`` or ``__call__``, as a listener class.

        Raises:
            TypeError: An argument is not a class of events or of handlers, or the handler has no such method.
            AlreadyBound: The class handles these events already, in this map or in another map on the same dispatcher.
            NameInvalid: The class of events has several EventNames: bind one of these. Or another class of events is bound
                under the same name.
        """
        if not isinstance(event, type | EventName):
            raise TypeError(f"bind takes a class of events or an EventName, not {event!r}")
        if not isinstance(cast("object", handler_type), type):
            raise TypeError(f"bind takes a class of handlers, bind(UserJoined, Welcome), not {handler_type!r}")
        check_event_handler(event.cls if isinstance(event, EventName) else event, handler_type)
        name = event if isinstance(event, EventName) else name_of(event)
        own = event if isinstance(event, type) and not isinstance(name, EventName) else None
        binding = _Binding(name, event if isinstance(event, type) else event.cls, handler_type)
        for other in self._bound.get(name, ()):
            binding.check_beside(other)
        for dispatcher in self._listening:
            _check(dispatcher, binding)
        if own is not None:
            claim_own_name(own, self)
        self._bound.setdefault(name, []).append(binding)
        for dispatcher, container in self._listening.items():
            dispatcher.add_listener(name, _BoundListener(binding, container))

    def listen(self, dispatcher: AsyncEventDispatcher, container: Container) -> None:
        """Register the handlers, and those that are bound later, with a dispatcher. A second call does nothing.

        Raises:
            ValueError: The map is registered there with another container.
            AlreadyBound: Another map has registered one of its handlers there, for the same events.
            NameInvalid: Another map has registered handlers there for another class of events, and both classes have one name.
        """
        if dispatcher in self._listening:
            if self._listening[dispatcher] is not container:
                raise ValueError(
                    "this EventMap is registered with the dispatcher already, and with another container: make one "
                    "Mediator and keep it, or give each the same container"
                )
            return
        bound = list(chain.from_iterable(self._bound.values()))
        for binding in bound:
            _check(dispatcher, binding)
        self._listening[dispatcher] = container
        for binding in bound:
            dispatcher.add_listener(binding.name, _BoundListener(binding, container))

    def __repr__(self) -> str:
        return f"<EventMap: {', '.join(map(str, chain.from_iterable(self._bound.values()))) or 'empty'}>"


class _BoundListener(ClassListener):
    """A bound handler among the listeners of a dispatcher, which need not have a container."""

    def __init__(self, binding: _Binding, container: Container) -> None:
        super().__init__(binding.handler_type, container)
        self.binding = binding

    async def __call__(self, event: Any) -> None:
        """Handle the event.

        Raises:
            NameInvalid: The event is of another class that has the same name.
        """
        bound, cls = self.binding.cls, type(event)
        if bound is not None and cls is not bound and has_name(cls, self.binding.name) and not _derived(cls, bound):
            raise _one_name(self.binding.name, bound, cls)
        await super().__call__(event)


def _check(dispatcher: AsyncEventDispatcher, binding: _Binding) -> None:
    for other in _bindings(dispatcher, binding.name):
        binding.check_beside(other)


def _bindings(dispatcher: AsyncEventDispatcher, name: Any) -> Iterator[_Binding]:
    for listener in dispatcher.get_listeners(name):
        target = getattr(listener, "target", listener)  # inside of its options
        if isinstance(target, _BoundListener):
            yield target.binding


def _same(one: type, other: type) -> bool:
    """Return True if both are one class, also if a test or a notebook has defined it again."""
    return one is other or (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def _derived(cls: type, bound: type) -> bool:
    return any(_same(base, bound) for base in cls.__mro__)


def _one_name(name: str, one: type, other: type) -> NameInvalid:
    both = " and ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in (one, other))
    return NameInvalid(
        str(name),
        f"{both} have one name, so handlers of one would hear the events of the other: give each an EventName of its own",
    )
