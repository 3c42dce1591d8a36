"""Handlers of the wrong class are errors. Read by mypy and pyright, never run; see errors_typos.py."""

from __future__ import annotations

from typing import Any

import rodi

from silbo import (
    DomainEvent,
    EventHandler,
    EventMap,
    EventName,
    Mediator,
    Request,
    RequestHandler,
    RequestMap,
    bootstrap,
)


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


class AnswersText(RequestHandler[Leave, str]):
    async def handle(self, request: Leave) -> str:
        return ""


class SyncPair:
    def process_request(self, request: Join) -> None: ...


async def one_argument(request: Any) -> None: ...


class Frozen(DomainEvent, frozen=True):  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue, reportGeneralTypeIssues]
    pass


LEFT = EventName("left", Left)


def bound(requests: RequestMap, events: EventMap) -> None:
    requests.bind(Leave, JoinHandler)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, SyncHandler)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    requests.bind(Leave, AnswersText)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    requests.bind(Joined, JoinHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(int, JoinHandler)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    requests.bind(Join, JoinHandler())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    events.bind(Left, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    events.bind(LEFT, OnJoined)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]
    events.bind("left", OnJoined)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def answered(mediator: Mediator) -> str:
    return await mediator.send(Leave())  # type: ignore[arg-type]  # pyright: ignore[reportReturnType]


def wired(container: rodi.Container) -> None:
    bootstrap(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bootstrap("container")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    bootstrap(container, middlewares=[3])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    bootstrap(container, middlewares=[lambda request: request])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    bootstrap(container, middlewares=[one_argument])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    bootstrap(container, middlewares=[SyncPair()])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
