"""Tools of the mediator's tests: a mediator with all around it, and handlers that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from silbo import (
    AsyncEventDispatcher,
    DomainEvent,
    Event,
    EventHandler,
    EventMap,
    Mediator,
    Message,
    NotificationEvent,
    Request,
    RequestHandler,
    RequestMap,
)
from tests.support.simple_container import SimpleContainer

Then = Callable[[], Awaitable[object]]


@dataclass(frozen=True, kw_only=True)
class Do(Request[str]):
    """Collects these events, then goes on."""

    events: Sequence[Event] = ()
    then: Then | None = None


@dataclass(frozen=True, kw_only=True)
class Also(Do):
    """Another one, for a command within a command."""


@dataclass(frozen=True)
class Local(DomainEvent):
    label: object
    follow: Sequence[Event] = ()
    then: Then | None = None


@dataclass(frozen=True)
class Leaves(NotificationEvent):
    label: object


class Collects:
    """As Diator's handlers do it."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events


class DoHandler(Collects, RequestHandler[Do, str]):
    async def handle(self, request: Do) -> str:
        self._events.extend(request.events)
        if request.then is not None:
            await request.then()
        return "done"


class AlsoHandler(DoHandler):
    pass


class Recorder:
    """A broker that takes everything, or raises what it is told to."""

    app = "rooms"

    def __init__(self) -> None:
        self.got: list[object] = []
        self.error: Exception | None = None
        self.meanwhile: Then | None = None

    async def publish(self, *messages: Message) -> None:
        for message in messages:
            assert isinstance(message.payload, dict)
            self.got.append(message.payload["label"])
        await asyncio.sleep(0)
        if self.meanwhile is not None:
            await self.meanwhile()
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None: ...


class World:
    """A mediator with all around it. ``heard`` has the labels of the events, in the order in which they were handled."""

    def __init__(self, *, on_error: Any = "raise", **options: Any) -> None:
        self.container = SimpleContainer()
        self.dispatcher = AsyncEventDispatcher(container=self.container, on_error=on_error)
        self.broker = Recorder()
        self.heard: list[object] = []
        heard = self.heard

        class Hears(Collects, EventHandler[Local]):
            async def handle(self, event: Local) -> None:
                heard.append(event.label)
                self._events.extend(event.follow)
                if event.then is not None:
                    await event.then()

        self.hears = Hears
        self.container.transient.add(Hears)
        self.requests, self.events = RequestMap(), EventMap()
        self.requests.bind(Do, DoHandler)
        self.requests.bind(Also, AlsoHandler)
        self.events.bind(Local, Hears)
        self.mediator = Mediator(
            request_map=self.requests, dispatcher=self.dispatcher, event_map=self.events, **options
        )

    async def send(self, *events: Event, then: Then | None = None) -> str:
        return await self.mediator.send(Do(events=events, then=then))

    async def also(self, *events: Event, then: Then | None = None) -> str:
        return await self.mediator.send(Also(events=events, then=then))


async def fail() -> None:
    raise LookupError("handler")
