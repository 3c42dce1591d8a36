"""Billing: another program, which learns of the meetings from the stream and from nothing else.

Its listeners are added under the same names as the host's. It reads as one consumer of the group `billing`: what it has
not acknowledged when it ends comes to the next one.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field

from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.meetings.events import (
    MEETING_JOINED,
    MEETING_LEFT,
    MEETING_RENAMED,
    MeetingJoined,
    MeetingLeft,
    MeetingRenamed,
)
from examples.meetings.measure import Heard
from examples.meetings.process import Settings, serve
from silbo import AsyncEventDispatcher, Consumer, on
from silbo.brokers.redis import RedisStreams


@dataclass
class Account:
    """One meeting, as far as billing cares."""

    title: str = ""
    cost_centre: str | None = None
    members: list[int] = field(default_factory=list)
    seats_taken: int = 0


class Ledger:
    """The read model: an account for each meeting, by its id."""

    def __init__(self) -> None:
        self.accounts: dict[int, Account] = {}

    @on(MEETING_JOINED)
    async def joined(self, event: MeetingJoined) -> None:
        """A seat is taken, and paid for once."""
        account = self._account(event.meeting_id)
        account.members.append(event.user_id)
        account.seats_taken += 1

    @on(MEETING_LEFT)
    async def left(self, event: MeetingLeft) -> None:
        """It is free again."""
        self._account(event.meeting_id).members.remove(event.user_id)

    @on(MEETING_RENAMED)
    async def renamed(self, event: MeetingRenamed) -> None:
        """Also tells who pays, which a plugin of the host found out."""
        account = self._account(event.meeting_id)
        account.title, account.cost_centre = event.title, event.cost_centre

    def _account(self, meeting_id: int) -> Account:
        return self.accounts.setdefault(meeting_id, Account())


def application(settings: Settings) -> Starlette:
    """The consumer, and two endpoints that answer for it."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(heard := Heard())
    dispatcher.add_subscriber(ledger := Ledger())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with Redis.from_url(settings.redis_url) as client:
            group = RedisStreams(client, app="billing", prefix=settings.prefix).group("billing", start="oldest")
            async with (
                Consumer(dispatcher, group, events=[MEETING_JOINED, MEETING_LEFT, MEETING_RENAMED]) as consumer,
                asyncio.TaskGroup() as tasks,
            ):
                tasks.create_task(consumer.run())
                yield
                consumer.stop()

    async def accounts(request: Request) -> JSONResponse:
        """`GET /accounts`."""
        return JSONResponse({str(meeting_id): asdict(account) for meeting_id, account in ledger.accounts.items()})

    async def figures(request: Request) -> JSONResponse:
        """For the demo's table."""
        return JSONResponse({"event_ids": heard.event_ids, "milliseconds": heard.milliseconds})

    return Starlette(routes=[Route("/accounts", accounts), Route("/figures", figures)], lifespan=lifespan)


if __name__ == "__main__":
    serve(application(Settings.from_environment()))
