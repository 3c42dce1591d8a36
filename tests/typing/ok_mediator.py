"""Commands, queries, handlers and middlewares type-check. Read by mypy and pyright, never run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, assert_type

import di
import dishka
import msgspec
import pydantic
import rodi
from dependency_injector import containers

from silbo import (
    AsyncEventDispatcher,
    DomainEvent,
    Event,
    EventHandler,
    EventMap,
    EventName,
    LoggingMiddleware,
    Mediator,
    Middleware,
    Publisher,
    Request,
    RequestHandler,
    RequestMap,
    Response,
    bootstrap,
    name_of,
)
from silbo.protocols import Container

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Meeting(Response):
    meeting_id: int
    link: str


@dataclass(frozen=True, kw_only=True)
class Join(Request[None]):
    meeting_id: int


@dataclass(frozen=True, kw_only=True)
class Read(Request[Meeting]):
    meeting_id: int


class Count(Request[int], pydantic.BaseModel):
    meeting_id: int


class Close(Request["bool"], msgspec.Struct, frozen=True):
    meeting_id: int


class Find(Request[T], pydantic.BaseModel, Generic[T]):
    value: T


@dataclass(frozen=True)
class Look(Request[list[T]], Generic[T]):
    value: T


class Untyped(Request):
    """As on Diator's page: what is answered is anything."""


@dataclass(frozen=True, kw_only=True)
class Joined(DomainEvent):
    meeting_id: int


JOINED = EventName("meeting.joined", Joined)


class JoinHandler(RequestHandler[Join, None]):
    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: Join) -> None:
        self._events.append(Joined(meeting_id=request.meeting_id))


class ReadHandler(RequestHandler[Read, Meeting]):
    @property
    def events(self) -> Sequence[Event]:
        return ()

    async def handle(self, request: Read) -> Meeting:
        return Meeting(meeting_id=request.meeting_id, link="")


class PlainHandler:
    async def handle(self, request: Untyped) -> dict[str, Any]:
        return {}


class Notify(EventHandler[Joined]):
    async def handle(self, event: Joined) -> None: ...


class Called:
    async def __call__(self, event: Joined) -> None: ...


class Both(Middleware):
    async def process_request(self, request: Request) -> None: ...

    async def process_response(self, response: Response) -> None: ...


class Around:
    async def __call__(self, request: Request, handle: Any) -> Any:
        return await handle(request)


class Pair:
    async def process_response(self, response: Any) -> str:
        return ""


async def around(request: Join, handle: Callable[[Any], Awaitable[Any]]) -> Any:
    return await handle(request)


class AnyRequest:
    async def handle(self, request: Request[Any]) -> Any: ...


class BoolHandler:
    async def handle(self, request: Count) -> bool:
        return True


def commands(mapper: RequestMap) -> None:
    mapper.bind(Join, JoinHandler)
    mapper.bind(Read, ReadHandler)
    mapper.bind(Untyped, PlainHandler)
    mapper.bind(Join, AnyRequest)
    mapper.bind(Count, BoolHandler)


def events(mapper: EventMap) -> None:
    mapper.bind(Joined, Notify)
    mapper.bind(JOINED, Notify)
    mapper.bind(Joined, Called)


async def sent(mediator: Mediator) -> None:
    meeting = await mediator.send(Read(meeting_id=1))
    assert_type(meeting, Meeting)
    assert_type(await mediator.send(Count(meeting_id=1)), int)
    assert_type(await mediator.send(Close(meeting_id=1)), bool)
    assert_type(await mediator.send(Find[int](value=1)), int)
    assert_type(await mediator.send(Look(1)), list[int])
    assert_type(await mediator.send(Untyped()), Any)
    await mediator.send(Join(meeting_id=1))


def wired(broker: Publisher) -> Mediator:
    return bootstrap(
        di_container=di.Container(),
        commands_mapper=commands,
        domain_events_mapper=events,
        message_broker=broker,
        middlewares=[Both(), Around(), Around, Pair(), Pair, around, LoggingMiddleware()],
    )


async def heard(mediator: Mediator, event: Joined) -> None:
    """The lines of the page."""
    assert_type(mediator.dispatcher, AsyncEventDispatcher)

    @mediator.dispatcher.listen("Joined")
    async def count(event: Joined) -> None: ...

    with mediator.dispatcher.add_listener(JOINED, Notify, concurrent=True):
        mediator.dispatcher.describe()
    await mediator.dispatcher.spawn(JOINED, event)
    await mediator.dispatcher.adispatch(name_of(event), event)


def containers_of_all_libraries(
    services: containers.DeclarativeContainer,
    dynamic: containers.DynamicContainer,
    app: dishka.AsyncContainer,
    adapter: Container,
) -> list[Mediator]:
    return [
        bootstrap(rodi.Container()),
        bootstrap(di.Container()),
        bootstrap(services),
        bootstrap(dynamic),
        bootstrap(app, dispatcher=AsyncEventDispatcher()),
        bootstrap(adapter),
    ]
