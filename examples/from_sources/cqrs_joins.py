"""The example on domain events of python-cqrs: four users join a meeting, and each join is heard once.

python -m examples.from_sources.cqrs_joins
"""

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import di

from silbo import DomainEvent, Event, EventHandler, EventMap, Request, RequestHandler, RequestMap, bootstrap

STORAGE: defaultdict[str, list[str]] = defaultdict(list)
HANDLED_EVENTS: set[DomainEvent] = set()


@dataclass(frozen=True, kw_only=True)
class JoinMeetingCommand(Request[None]):
    """A command. python-cqrs makes a dataclass of each class that derives from its own; silbo needs the decorator."""

    user_id: str
    meeting_id: str


@dataclass(frozen=True)
class UserJoined(DomainEvent):
    """An event; in python-cqrs `class UserJoined(DomainEvent, frozen=True)`."""

    user_id: str
    meeting_id: str


class JoinMeetingCommandHandler(RequestHandler[JoinMeetingCommand, None]):
    """A handler that is not registered: di makes it all the same."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: JoinMeetingCommand) -> None:
        STORAGE[request.meeting_id].append(request.user_id)
        self._events.append(UserJoined(request.user_id, request.meeting_id))
        print(f"User {request.user_id} joined meeting {request.meeting_id}")


class UserJoinedEventHandler(EventHandler[UserJoined]):
    """A handler that runs when the command has succeeded."""

    async def handle(self, event: UserJoined) -> None:
        print(f"Handle user {event.user_id} joined meeting {event.meeting_id} event")
        HANDLED_EVENTS.add(event)


def command_mapper(mapper: RequestMap) -> None:
    """Bind commands to their handlers."""
    mapper.bind(JoinMeetingCommand, JoinMeetingCommandHandler)


def events_mapper(mapper: EventMap) -> None:
    """Bind events to their handlers."""
    mapper.bind(UserJoined, UserJoinedEventHandler)


async def main() -> None:
    """Let four users in."""
    mediator = bootstrap(
        di_container=di.Container(), commands_mapper=command_mapper, domain_events_mapper=events_mapper
    )
    for user_id in ("1", "2", "3", "4"):
        await mediator.send(JoinMeetingCommand(user_id=user_id, meeting_id="1"))
    print(f"There are {len(STORAGE['1'])} users in the room")
    print(f"{len(HANDLED_EVENTS)} events was handled")
    assert len(HANDLED_EVENTS) == 4


if __name__ == "__main__":
    asyncio.run(main())
