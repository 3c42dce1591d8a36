"""Commands and queries, what answers them, and the classes that handle them or an event."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

__all__ = ["EventHandler", "HandlesRequest", "Request", "RequestHandler", "Response"]

Req = TypeVar("Req", contravariant=True)
Res = TypeVar("Res", covariant=True)
E = TypeVar("E", contravariant=True)


if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    Answer = TypeVarWithDefault("Answer", covariant=True, default=Any)

    class Request(Generic[Answer]):
        """A command or a query. See the run-time class below."""

else:

    class Request:
        """A command or a query: says what is to be done or known, and has one handler.

        A dataclass, attrs class, pydantic model or msgspec Struct derives from it, frozen or not. ``Request[Meeting]`` tells
        type checkers that ``send`` gives a ``Meeting`` for it, ``Request[None]`` that it gives nothing; at run time it is
        ``Request``.
        """

        __slots__ = ()

        def __class_getitem__(cls, _item):
            return cls


class Response:
    """What a query answers: a mark for readers. A handler may answer with anything."""

    __slots__ = ()


class HandlesRequest(Protocol[Req, Res]):
    """A class whose objects handle a request."""

    def handle(self, request: Req, /) -> Awaitable[Res]:
        """Do it, and answer."""
        ...


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

    @property
    def events(self) -> Sequence[object]:
        """What has happened, in order. A list is emptied when its events are taken; none by default."""
        return ()

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
