"""The host: an HTTP service about meetings.

Each change is an event. It is dispatched in this process first, where plugins may change or stop it. The bridges
run last and send it to other programs. The bridge to billing goes through an outbox: a client is answered when its event is on
the disk, and every event on the disk arrives.
"""

from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from typing import Any

import msgspec
import rodi
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.meetings import house_rules
from examples.meetings.events import (
    MEETING_JOINED,
    MEETING_LEFT,
    MEETING_RENAMED,
    MeetingJoined,
    MeetingLeft,
    MeetingRenamed,
)
from examples.meetings.ledger import Ledger
from examples.meetings.process import Settings, serve
from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, EventName, IAsyncEventDispatcher, NotificationEvent, Outbox
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.containers.rodi import register_dispatcher
from silbo.errors import PublishError
from silbo.stores.sqlite import SQLiteStore


class Seat(msgspec.Struct):
    """The body of join and leave."""

    user_id: int


class Title(msgspec.Struct):
    """The body of rename."""

    title: str


class Members:
    """The members of each meeting, updated by events."""

    def __init__(self, dispatcher: IAsyncEventDispatcher) -> None:
        self._members: defaultdict[int, set[int]] = defaultdict(set)
        dispatcher.add_listener(MEETING_JOINED, self._joined)
        dispatcher.add_listener(MEETING_LEFT, self._left)

    def has(self, meeting_id: int, user_id: int) -> bool:
        """True if this user is in this meeting."""
        return user_id in self._members[meeting_id]

    async def _joined(self, event: MeetingJoined) -> None:
        self._members[event.meeting_id].add(event.user_id)

    async def _left(self, event: MeetingLeft) -> None:
        self._members[event.meeting_id].discard(event.user_id)


class Endpoints:
    """The HTTP endpoints. The container makes the object and its constructor's arguments."""

    def __init__(self, dispatcher: AsyncEventDispatcher, members: Members) -> None:
        self._dispatcher = dispatcher
        self._members = members

    async def join(self, request: Request) -> JSONResponse:
        """Answer `POST /meetings/7/join {"user_id": 1}`."""
        seat = msgspec.json.decode(await request.body(), type=Seat)
        return await self._happen(MEETING_JOINED, MeetingJoined(request.path_params["meeting_id"], seat.user_id))

    async def leave(self, request: Request) -> JSONResponse:
        """Answer `POST /meetings/7/leave {"user_id": 1}`."""
        seat = msgspec.json.decode(await request.body(), type=Seat)
        event = MeetingLeft(request.path_params["meeting_id"], seat.user_id)
        if not self._members.has(event.meeting_id, event.user_id):
            return JSONResponse({"error": "not in this meeting"}, 409)
        return await self._happen(MEETING_LEFT, event)

    async def rename(self, request: Request) -> JSONResponse:
        """Answer `POST /meetings/7/rename {"title": "Planning"}`."""
        body = msgspec.json.decode(await request.body(), type=Title)
        return await self._happen(MEETING_RENAMED, MeetingRenamed(request.path_params["meeting_id"], body.title))

    async def _happen(self, name: EventName[Any], event: NotificationEvent | ECSTEvent) -> JSONResponse:
        await self._dispatcher.adispatch(name, event)
        if event.propagation_stopped:
            return JSONResponse({"error": "refused"}, 403)
        return JSONResponse({"event_id": str(event.event_id)})


async def bad_json(request: Request, error: Exception) -> JSONResponse:
    """Answer a body that is not JSON."""
    return JSONResponse({"error": str(error)}, 400)


async def wrong_fields(request: Request, error: Exception) -> JSONResponse:
    """Answer a body with wrong fields."""
    return JSONResponse({"error": str(error)}, 422)


async def try_again(request: Request, error: Exception) -> JSONResponse:
    """Answer that the event was not stored (a full disk, say): the bridge's error comes out of `adispatch`."""
    return JSONResponse({"error": str(error)}, 503)


async def nobody_waits(request: Request, error: Exception) -> Response:
    """Answer a client that went away before it had sent everything; nobody receives it."""
    return Response(status_code=400)


def application(settings: Settings) -> Starlette:
    """Return the application, with dispatcher, plugin, bridges and endpoints."""
    container = rodi.Container()
    dispatcher = register_dispatcher(container)
    container.add_singleton(Members)
    container.add_singleton(Endpoints)
    endpoints = container.resolve(Endpoints)
    house_rules.install(dispatcher)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with (
            Redis.from_url(settings.redis_url) as client,
            # An event that is in this file is not lost: not when Redis is away, and not when this process is killed.
            Outbox(
                SQLiteStore(settings.folder / "outbox.db"),
                RedisStreams(client, app="meetings", prefix=settings.prefix),
                lease=2.0,  # seconds; after a kill the next host waits so long before it sends
            ) as outbox,
            # For programs that are connected now. While Redis is away there are none, so no client has to wait for it.
            RedisPubSub(client, app="meetings", prefix=settings.prefix) as pubsub,
            Bridge(pubsub, wait=False, on_error=lambda error, message: None) as live,
            dispatcher,
        ):
            with closing(Ledger(settings.folder / "host.ledger")) as ledger:
                await ledger.replay(dispatcher)
                # With a number, so that the ledger comes later: it runs only if the outbox has the event. And nothing can come
                # between a change of the members and its place in the outbox: what is read from the stream ends in the same
                # state, however many requests run at once.
                dispatcher.add_listener("**", Bridge(outbox).forward, priority=1_000)
                dispatcher.add_subscriber(ledger)
                dispatcher.add_subscriber(live)  # runs last
                yield

    return Starlette(
        routes=[
            Route("/meetings/{meeting_id:int}/join", endpoints.join, methods=["POST"]),
            Route("/meetings/{meeting_id:int}/leave", endpoints.leave, methods=["POST"]),
            Route("/meetings/{meeting_id:int}/rename", endpoints.rename, methods=["POST"]),
        ],
        exception_handlers={
            msgspec.DecodeError: bad_json,
            msgspec.ValidationError: wrong_fields,
            PublishError: try_again,
            ClientDisconnect: nobody_waits,
        },
        lifespan=lifespan,
    )


if __name__ == "__main__":
    serve(application(Settings.from_environment()))
