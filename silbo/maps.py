"""Which class handles what: one for a request, any number for an event."""

from __future__ import annotations

from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from silbo.errors import AlreadyBound, RequestUnbound
from silbo.guard import is_async
from silbo.handlers import Calls, ClassListener, Handles, handling_method
from silbo.names import EventName, name_of
from silbo.protocols import Container
from silbo.requests import HandlesRequest

__all__ = ["EventMap", "RequestMap"]

E = TypeVar("E")
R = TypeVar("R")


class RequestMap:
    """The handler of each class of requests."""

    def __init__(self) -> None:
        self._handlers: dict[type, type[HandlesRequest[Any, Any]]] = {}

    def bind(self, request_type: type[R], handler_type: type[HandlesRequest[R, object]]) -> None:
        """Let a class handle a class of requests; requests of derived classes are bound on their own.

        Raises:
            TypeError: one is no class, or the handler has no async ``handle``.
            AlreadyBound: the request has a handler.
        """
        both: tuple[Any, ...] = (request_type, handler_type)
        for given in both:
            if not isinstance(given, type):
                raise TypeError(f"bind takes two classes, bind(JoinMeeting, JoinMeetingHandler), not {given!r}")
        if not is_async(getattr(handler_type, "handle", None)):
            raise TypeError(
                f"{handler_type.__qualname__} has no async handle(self, request), so it handles no request; "
                "write 'async def handle'"
            )
        if request_type in self._handlers:
            raise AlreadyBound(request_type.__qualname__, self._handlers[request_type], handler_type)
        self._handlers[request_type] = cast("Any", handler_type)

    def handler_of(self, request_type: type[object]) -> type[HandlesRequest[Any, Any]]:
        """What handles requests of this class.

        Raises:
            RequestUnbound: nothing does.
        """
        try:
            return self._handlers[request_type]
        except KeyError:
            raise RequestUnbound(request_type, tuple(self._handlers)) from None


class EventMap:
    """The handlers of events: listeners by another way, registered with the dispatcher of each mediator that has the map."""

    def __init__(self) -> None:
        self._bound: list[tuple[Any, type[Any]]] = []
        self._listening: WeakKeyDictionary[Any, Container] = WeakKeyDictionary()

    def bind(self, event: type[E] | EventName[E], handler_type: type[Handles[E] | Calls[E]]) -> None:
        """Let a class handle events; several handle one in the order in which they are bound.

        Args:
            event: A class of events, which go by its :class:`~silbo.EventName`, or by the class's name where it has none; or
                an EventName.
            handler_type: Has an async ``handle`` or ``__call__``, as a listener class.

        Raises:
            TypeError: it has neither.
            AlreadyBound: this class handles them already.
            NameInvalid: the class of events has several EventNames: bind one of these.
        """
        if not isinstance(event, type | EventName):
            raise TypeError(f"bind takes a class of events or an EventName, not {event!r}")
        if not isinstance(cast("object", handler_type), type):
            raise TypeError(f"bind takes a class of handlers, bind(UserJoined, Welcome), not {handler_type!r}")
        handling_method(handler_type)
        name = event if isinstance(event, EventName) else name_of(event)
        if (name, handler_type) in self._bound:
            raise AlreadyBound(str(name), handler_type, handler_type)
        self._bound.append((name, handler_type))
        for dispatcher, container in self._listening.items():
            _listen(dispatcher, container, name, handler_type)

    def listen(self, dispatcher: Any, container: Container) -> None:
        """Register all of it, and what is bound later, with a dispatcher: once, however often it is asked for.

        Raises:
            ValueError: it is registered there with another container.
        """
        if dispatcher in self._listening:
            if self._listening[dispatcher] is not container:
                raise ValueError(
                    "this EventMap is registered with the dispatcher already, and with another container: make one "
                    "Mediator and keep it, or give each the same container"
                )
            return
        self._listening[dispatcher] = container
        for name, handler_type in self._bound:
            _listen(dispatcher, container, name, handler_type)


def _listen(dispatcher: Any, container: Container, name: Any, handler_type: type[Any]) -> None:
    # In these clothes, so that dispatchers without a container take it, Whistle's own too.
    dispatcher.add_listener(name, ClassListener(handler_type, container))
