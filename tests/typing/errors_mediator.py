"""Handlers of the wrong class are errors. Read by mypy and pyright, never run; see errors_typos.py."""

from __future__ import annotations

from silbo import DomainEvent, EventHandler, EventMap, EventName, Mediator, Request, RequestHandler, RequestMap


class Join(Request[None]): ...


class Leave(Request[int]): ...


class Joined(DomainEvent): ...


class Left(DomainEvent): ...


class JoinHandler(RequestHandler[Join, None]):
    async def handle(self, request: Join) -> None: ...


class SyncHandler:
    def handle(self, request: Join) -> None: ...


class OnJoined(EventHandler[Joined]):
    async def handle(self, event: Joined) -> None: ...


class WrongRequest(RequestHandler[Join, None]):
    async def handle(self, request: Leave) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]


class WrongEvent(EventHandler[Joined]):
    async def handle(self, event: Left) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]


class WrongAnswer(RequestHandler[Leave, int]):
    async def handle(self, request: Leave) -> str:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        return ""


LEFT = EventName("left", Left)


def bound(requests: RequestMap, events: EventMap) -> None:
    requests.bind(Leave, JoinHandler)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, SyncHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    events.bind(Left, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    events.bind(LEFT, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    events.bind("left", OnJoined)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def answered(mediator: Mediator) -> str:
    return await mediator.send(Leave())  # type: ignore[arg-type]  # pyright: ignore[reportReturnType]
