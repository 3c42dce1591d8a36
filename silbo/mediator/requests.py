"""Commands and queries, what answers them, and the classes that handle them or an event."""

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
            """So type checkers know what handles a request of this class, and what it has to answer."""

else:

    class Request:
        """A command or a query: says what is to be done or known, and has one handler.

        A dataclass, attrs class, pydantic model or msgspec Struct derives from it, frozen or not. ``Request[Meeting]`` tells
        type checkers that ``send`` gives a ``Meeting`` for it, ``Request[None]`` that it gives nothing; at run time it is
        ``Request``.
        """

        __slots__ = ()

        def __init_subclass__(cls, **keywords):
            pass_class_keywords(cls, keywords, super().__init_subclass__)

        def __class_getitem__(cls, _item):
            return cls


class Response:
    """What a query answers: a mark for readers. A handler may answer with anything."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __init_subclass__(cls, **keywords):
            pass_class_keywords(cls, keywords, super().__init_subclass__)


class HandlesRequest(Protocol[Req, Res]):
    """A class whose objects handle a request."""

    def handle(self, request: Req, /) -> Awaitable[Res]:
        """Do it, and answer."""
        ...


class HandledBy(Protocol[Handler]):
    """To type checkers: requests that a handler of this type handles."""

    def __silbo_handled_by__(self, handler: Handler, /) -> None: ...


class _NoEvents:
    """In place of a property: an object may have an attribute of this name, ``self.events = []``."""

    def __get__(self, handler: object, cls: type) -> Sequence[object]:
        return ()


class RequestHandler(ABC, Generic[Req, Res]):
    """Handles one class of requests; the container makes an object of it for each.

    What it puts into its ``events`` goes out when :meth:`handle` has succeeded, in that order::

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
            """What has happened, in order. A list is emptied when its events are taken; none by default."""
            return ()

    else:
        events = _NoEvents()

    @abstractmethod
    async def handle(self, request: Req, /) -> Res:
        """Do what is asked, and answer. An error goes to the caller of ``send``, and no event goes out."""


class EventHandler(ABC, Generic[E]):
    """Handles one class of events; the container makes an object of it for each. It may collect events, too."""

    @property
    def events(self) -> Sequence[object]:
        """What has happened because of it, in order: these events follow, behind those that wait already."""
        return ()

    @abstractmethod
    async def handle(self, event: E, /) -> None:
        """Hear one event."""


def check_request_handler(request_type: type[Any], handler_type: type[Any]) -> None:
    """Refuse what can't be requests, and what can't handle one.

    Raises:
        TypeError: says what is wrong.
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
    _check_method(handler_type, "handle", "request")


def check_event_handler(event_type: type[Any] | None, handler_type: type[Any]) -> None:
    """Refuse what can't be events, and what can't handle one.

    Raises:
        TypeError: says what is wrong.
    """
    if event_type is not None:
        wrong = issubclass(event_type, Request | Response) and not issubclass(event_type, WhistleEvent)
        if wrong or _is_builtin(event_type):
            raise TypeError(f"{event_type.__qualname__} is no class of events: derive one from silbo.Event")
    if issubclass(handler_type, RequestHandler) and not issubclass(handler_type, EventHandler):
        raise TypeError(f"{handler_type.__qualname__} handles requests: bind it in the RequestMap")
    _check_method(handler_type, handling_method(handler_type), "event")


def _is_builtin(cls: type) -> bool:
    return cls.__module__ == "builtins" and not issubclass(cls, BaseException)


def _is_handler(cls: type) -> bool:
    return issubclass(cls, RequestHandler | EventHandler)


def _check_method(cls: type, name: str, what: str) -> None:
    method = getattr(cls, name)
    if method in (RequestHandler.handle, EventHandler.handle):
        raise TypeError(f"{cls.__qualname__} has no {name} of its own: write 'async def {name}(self, {what})'")
    if not inspect.isfunction(method):  # bound to the class, or an object: nobody knows what it is given
        return
    given = (what,) if isinstance(inspect.getattr_static(cls, name), staticmethod) else ("self", what)
    try:
        inspect.signature(method, follow_wrapped=False).bind(*given)
    except TypeError:
        raise TypeError(
            f"{cls.__qualname__}.{name} can't be called with the {what} alone: write 'async def {name}(self, {what})'"
        ) from None
