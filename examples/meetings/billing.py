"""Billing: another program, which knows the meetings only from the stream.

Its listeners are added under the same names as the host's. It reads as a consumer of the group `billing`. An event is
acknowledged after its listeners ran: events that it had in hand when it was killed are delivered again.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, field

from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.meetings.events import (
    EVENTS,
    MEETING_JOINED,
    MEETING_LEFT,
    MEETING_RENAMED,
    MeetingJoined,
    MeetingLeft,
    MeetingRenamed,
)
from examples.meetings.ledger import Ledger
from examples.meetings.process import Settings, serve
from silbo import AsyncEventDispatcher, Backoff, Consumer, on
from silbo.brokers.redis import RedisStreams

COST_CENTRES = frozenset({"legal", "people", "r&d", "sales"})


class UnknownCostCentre(LookupError):
    """A cost centre that billing does not know."""


@dataclass
class Account:
    """The part of a meeting that billing needs."""

    title: str = ""
    cost_centre: str | None = None
    members: list[int] = field(default_factory=list)
    seats_taken: int = 0


class Accounts:
    """The read model: an account for each meeting, by its id.

    A client that got no answer repeats its request, so a member may join a second time. The listeners write state instead
    of adding to it, so a repeat has no effect.
    """

    def __init__(self) -> None:
        self.by_meeting: dict[int, Account] = {}

    @on(MEETING_JOINED)
    async def joined(self, event: MeetingJoined) -> None:
        """Add the member; the seat is paid for once."""
        account = self._account(event.meeting_id)
        if event.user_id not in account.members:
            account.members.append(event.user_id)
            account.seats_taken += 1

    @on(MEETING_LEFT)
    async def left(self, event: MeetingLeft) -> None:
        """Remove the member; the seat is free again."""
        account = self._account(event.meeting_id)
        if event.user_id in account.members:
            account.members.remove(event.user_id)

    @on(MEETING_RENAMED)
    async def renamed(self, event: MeetingRenamed) -> None:
        """Set the title, and the cost centre that a plugin of the host has added.

        Raises:
            UnknownCostCentre: billing can't repair that. After three attempts the event becomes a dead letter;
                `silbo dead retry` sends it again when somebody has found the cause.
        """
        if event.cost_centre not in COST_CENTRES:
            raise UnknownCostCentre(event.cost_centre)
        account = self._account(event.meeting_id)
        account.title, account.cost_centre = event.title, event.cost_centre

    def _account(self, meeting_id: int) -> Account:
        return self.by_meeting.setdefault(meeting_id, Account())


def application(settings: Settings) -> Starlette:
    """Return the consumer, and an application with an endpoint that shows its accounts."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(accounts := Accounts())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with Redis.from_url(settings.redis_url) as client:
            streams = RedisStreams(client, app="billing", prefix=settings.prefix)
            # One billing runs at a time, so it has a name: a restart continues at once with the events in hand, in order.
            # Several billings would run without a name; they take over from one that is silent for `claim_after`.
            group = streams.group("billing", start="oldest", consumer="billing-1")
            with closing(Ledger(settings.folder / "billing.ledger")) as ledger:
                await ledger.replay(dispatcher)
                dispatcher.add_subscriber(ledger)
                async with (
                    Consumer(
                        dispatcher,
                        group,
                        events=EVENTS,
                        concurrency=8,  # meetings side by side; events of one meeting stay in order
                        max_attempts=3,
                        backoff=Backoff(initial=0.1),
                    ) as consumer,
                    asyncio.TaskGroup() as tasks,
                ):
                    tasks.create_task(consumer.run())
                    yield
                    consumer.stop()

    async def answer(request: Request) -> JSONResponse:
        """Answer `GET /accounts`."""
        return JSONResponse({str(meeting_id): asdict(account) for meeting_id, account in accounts.by_meeting.items()})

    return Starlette(routes=[Route("/accounts", answer)], lifespan=lifespan)


if __name__ == "__main__":
    serve(application(Settings.from_environment()))
