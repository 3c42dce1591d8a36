"""The application of Diator's pages: users join and read meetings, with commands, a query and three kinds of events.

The broker is one argument; `diator_redis` and `diator_azure` each give one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import rodi

from silbo import (
    Bridge,
    DomainEvent,
    ECSTEvent,
    Event,
    EventHandler,
    EventMap,
    Mediator,
    NotificationEvent,
    Publisher,
    Request,
    RequestHandler,
    RequestMap,
    Response,
)
from silbo.containers.rodi import register_dispatcher

# -- commands and queries -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JoinMeetingCommand(Request[None]):
    """A command without a response."""

    meeting_id: int
    user_id: int


@dataclass(frozen=True, kw_only=True)
class RenameUserCommand(Request[None]):
    """A command that changes data of which other programs keep a copy."""

    user_id: int
    username: str


@dataclass(frozen=True, kw_only=True)
class ReadMeetingQueryResult(Response):
    """The response to the query."""

    meeting_id: int
    link: str


@dataclass(frozen=True, kw_only=True)
class ReadMeetingQuery(Request[ReadMeetingQueryResult]):
    """A query: it changes nothing."""

    meeting_id: int


# -- three kinds of events ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UserJoinedDomainEvent(DomainEvent):
    """An event that stays in the process."""

    user_id: int
    meeting_id: int
    timestamp: datetime


@dataclass(frozen=True, kw_only=True)
class UserJoinedNotificationEvent(NotificationEvent):
    """An event that leaves, with the id of the user alone."""

    user_id: int


@dataclass(frozen=True, kw_only=True)
class UserChangedECSTEvent(ECSTEvent):
    """An event that leaves with the new state."""

    user_id: int
    new_username: str


# -- handlers -----------------------------------------------------------------------------------------------


class MeetingAPI:
    """A replacement for the service that the pages use."""

    def __init__(self) -> None:
        self._members: dict[int, list[int]] = {}

    async def join(self, meeting_id: int, user_id: int) -> None:
        self._members.setdefault(meeting_id, []).append(user_id)

    async def get_link(self, meeting_id: int) -> str:
        return f"https://meet.example/{meeting_id}"

    async def notify(self, meeting_id: int, text: str) -> None:
        print(f"meeting {meeting_id}: {text}")

    async def count(self, meeting_id: int) -> int:
        return len(self._members[meeting_id])


class JoinMeetingCommandHandler(RequestHandler[JoinMeetingCommand, None]):
    """A handler whose events are dispatched when it has succeeded, in this order."""

    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: JoinMeetingCommand) -> None:
        await self._meeting_api.join(request.meeting_id, request.user_id)
        now = datetime.now(UTC)
        self._events += [
            UserJoinedDomainEvent(user_id=request.user_id, meeting_id=request.meeting_id, timestamp=now),
            UserJoinedNotificationEvent(user_id=request.user_id),
        ]


class RenameUserCommandHandler(RequestHandler[RenameUserCommand, None]):
    """A handler with one event, which carries the state."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: RenameUserCommand) -> None:
        self._events.append(UserChangedECSTEvent(user_id=request.user_id, new_username=request.username))


class ReadMeetingQueryHandler(RequestHandler[ReadMeetingQuery, ReadMeetingQueryResult]):
    """A handler without events: it declares none."""

    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, request: ReadMeetingQuery) -> ReadMeetingQueryResult:
        link = await self._meeting_api.get_link(request.meeting_id)
        return ReadMeetingQueryResult(meeting_id=request.meeting_id, link=link)


class UserJoinedDomainEventHandler(EventHandler[UserJoinedDomainEvent]):
    """The first of two handlers."""

    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserJoinedDomainEvent) -> None:
        await self._meeting_api.notify(event.meeting_id, "New user joined!")


class AnotherUserJoinedDomainEventHandler(EventHandler[UserJoinedDomainEvent]):
    """The second handler."""

    def __init__(self, meeting_api: MeetingAPI) -> None:
        self._meeting_api = meeting_api

    async def handle(self, event: UserJoinedDomainEvent) -> None:
        members = await self._meeting_api.count(event.meeting_id)
        await self._meeting_api.notify(event.meeting_id, f"{members} in the room")


# -- all of it together -------------------------------------------------------------------------------------


def build(broker: Publisher, middlewares: Iterable[Any] = ()) -> Mediator:
    """Return a mediator on a rodi container; events that leave go to the broker."""
    container = rodi.Container()
    container.add_singleton(MeetingAPI)
    for handler in (
        JoinMeetingCommandHandler,
        RenameUserCommandHandler,
        ReadMeetingQueryHandler,
        UserJoinedDomainEventHandler,
        AnotherUserJoinedDomainEventHandler,
    ):
        container.register(handler)

    request_map = RequestMap()
    request_map.bind(JoinMeetingCommand, JoinMeetingCommandHandler)
    request_map.bind(RenameUserCommand, RenameUserCommandHandler)
    request_map.bind(ReadMeetingQuery, ReadMeetingQueryHandler)

    event_map = EventMap()
    event_map.bind(UserJoinedDomainEvent, UserJoinedDomainEventHandler)
    event_map.bind(UserJoinedDomainEvent, AnotherUserJoinedDomainEventHandler)

    dispatcher = register_dispatcher(container)  # with its bridge it replaces Diator's EventEmitter
    dispatcher.add_subscriber(Bridge(broker))
    return Mediator(request_map=request_map, event_map=event_map, dispatcher=dispatcher, middlewares=middlewares)
