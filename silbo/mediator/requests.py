"""Requests (commands and queries), responses, and the classes that handle requests and events."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from silbo._whistle import WhistleEvent
from silbo.dispatch.class_listeners import handling_method
from silbo.dispatch.options import is_async
from silbo.event import pass_class_keywords

__all__ = [
    "EventHandler",
    "HandledBy",
    "HandlesRequest",
    "Request",
    "RequestHandler",
    "Response",
    "check_event_handler",
    "check_method",
    "check_request_handler",
]

Req = TypeVar("Req", contravariant=True)
Res = TypeVar("Res", covariant=True)
E = TypeVar("E", contravariant=True)
Handler = TypeVar("Handler", contravariant=True)


if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    Answer = TypeVarWithDefault("Answer", covariant=True, default=Any)

    class Request(Generic[Answer]):
        """A command or a query. See the run-time class below."""

        def __silbo_handled_by__(self, handler: HandlesRequest[Self, Answer], /) -> None:
            """Tell type checkers which classes handle this request, and with which answer."""

else:

    class Request:
        """A command or a query: data that says what is to be done or known. It has one handler.

        A dataclass, attrs class, pydantic model or msgspec Struct derives from it, frozen or not. ``Request[Meeting]`` tells
        type checkers that ``send`` returns a ``Meeting``, ``Request[None]`` that ``send`` returns None. At run time both are
        ``Request`` itself. A class of requests with type parameters of its own derives from ``Generic`` too.
        """

        __slots__ = ()

        def __init_subclass__(cls, **keywords):
            pass_class_keywords(cls, keywords, super().__init_subclass__)

        def __class_getitem__(cls, item):
            return super().__class_getitem__(item) if Generic in cls.__mro__ else cls


class Response:
    """An answer to a query: a mark for readers. A handler may answer with any object."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __init_subclass__(cls, **keywords):
            pass_class_keywords(cls, keywords, super().__init_subclass__)


class HandlesRequest(Protocol[Req, Res]):
    """A class whose objects handle a request."""

    def handle(self, request: Req, /) -> Awaitable[Res]:
        """Do what the request asks, and return the answer."""
        ...


class HandledBy(Protocol[Handler]):
    """For type checkers: the requests that a handler of this type handles."""

    def __silbo_handled_by__(self, handler: Handler, /) -> None: ...


class _NoEvents:
    """A stand-in for a property without events, which allows the attribute ``self.events = []`` on an object."""

    def __get__(self, handler: object, cls: type) -> Sequence[object]:
        return ()


class RequestHandler(ABC, Generic[Req, Res]):
    """A handler of one class of requests, of which the container makes an object for each request.

    The events that it puts into its ``events`` are dispatched in that order when :meth:`handle` has succeeded::

        class JoinMeetingHandler(RequestHandler[JoinMeeting, None]):
            def __init__(self, meetings: Meetings) -> None:
                self._meetings = meetings
                self._events: list[Event] = []

            @property
            def events(self) -> list[Event]:
                return self._events

            async def handle(self, request: JoinMeeting) -> None:
                await self._meetings.join(request.meeting_id, request.user_id)
                self._events.append(UserJoined(user_id=request.user_id))
    """

    if TYPE_CHECKING:

        @property
        def events(self) -> Sequence[object]:
            """Events to be dispatched, in order: a list, which is then emptied, or a tuple. None by default."""
            return ()

    else:
        events = _NoEvents()

    @abstractmethod
    async def handle(self, request: Req, /) -> Res:
        """Do what the request asks, and return the answer. An error goes to the caller of ``send``, and no event goes out."""


class EventHandler(ABC, Generic[E]):
    """A handler of one class of events, of which the container makes an object for each event. It may collect events, too."""

    @property
    def events(self) -> Sequence[object]:
        """Events that came of the event, in order: dispatched behind the events that wait already. None by default."""
        return ()

    @abstractmethod
    async def handle(self, event: E, /) -> None:
        """Handle one event."""


def check_request_handler(request_type: type[Any], handler_type: type[Any]) -> None:
    """Refuse a class that is not a class of requests, or a handler that can't handle a request.

    Raises:
        TypeError: The text says what is wrong, and what to write.
    """
    if _is_handler(request_type):
        raise TypeError(f"{request_type.__qualname__} is a handler: bind takes the request first, then its handler")
    wrong = issubclass(request_type, WhistleEvent | Response) and not issubclass(request_type, Request)
    if wrong or request_type is Request or _is_builtin(request_type):
        raise TypeError(f"{request_type.__qualname__} is no class of requests: derive one from silbo.Request")
    if issubclass(handler_type, EventHandler) and not issubclass(handler_type, RequestHandler):
        raise TypeError(f"{handler_type.__qualname__} handles events: bind it in the EventMap")
    if inspect.isasyncgenfunction(getattr(handler_type, "handle", None)):
        raise TypeError(
            f"{handler_type.__qualname__}.handle has a 'yield', so it is a generator: a request is answered once, with 'return'"
        )
    if not is_async(getattr(handler_type, "handle", None)):
        raise TypeError(
            f"{handler_type.__qualname__} has no async handle(self, request), so it handles no request; "
            "write 'async def handle'"
        )
    check_method(handler_type, "handle", "request")


def check_event_handler(event_type: type[Any] | None, handler_type: type[Any]) -> None:
    """Refuse a class that is not a class of events, or a handler that can't handle an event.

    Raises:
        TypeError: The text says what is wrong, and what to write.
    """
    if event_type is not None:
        wrong = issubclass(event_type, Request | Response) and not issubclass(event_type, WhistleEvent)
        if wrong or _is_builtin(event_type):
            raise TypeError(f"{event_type.__qualname__} is no class of events: derive one from silbo.Event")
    if issubclass(handler_type, RequestHandler) and not issubclass(handler_type, EventHandler):
        raise TypeError(f"{handler_type.__qualname__} handles requests: bind it in the RequestMap")
    check_method(handler_type, handling_method(handler_type), "event")


def _is_builtin(cls: type) -> bool:
    return cls.__module__ == "builtins" and not issubclass(cls, BaseException)


def _is_handler(cls: type) -> bool:
    return issubclass(cls, RequestHandler | EventHandler)


def check_method(cls: type, name: str, what: str) -> None:
    """Refuse a method that can't be called with one argument, named ``what`` in the error text.

    Raises:
        TypeError: The text says what to write.
    """
    method = getattr(cls, name)
    if method in (RequestHandler.handle, EventHandler.handle):
        raise TypeError(f"{cls.__qualname__} has no {name} of its own: write 'async def {name}(self, {what})'")
    if not inspect.isfunction(method):  # a classmethod or an object: its arguments are not known
        return
    given = (what,) if isinstance(inspect.getattr_static(cls, name), staticmethod) else ("self", what)
    try:
        inspect.signature(method, follow_wrapped=False).bind(*given)
    except TypeError:
        raise TypeError(
            f"{cls.__qualname__}.{name} can't be called with the {what} alone: write 'async def {name}(self, {what})'"
        ) from None
