"""Billing: another program, which learns of the meetings from the stream and from nothing else.

Its listeners are added under the same names as the host's. It reads as a consumer of the group `billing`, and an event is
acknowledged after its listeners ran: what it had in hand when it was killed comes again.
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
    """Nobody would pay."""


@dataclass
class Account:
    """One meeting, as far as billing cares."""

    title: str = ""
    cost_centre: str | None = None
    members: list[int] = field(default_factory=list)
    seats_taken: int = 0


class Accounts:
    """The read model: an account for each meeting, by its id.

    A client that got no answer asks again, so somebody may join who is in: the listeners say what is true from now on,
    and twice is harmless.
    """

    def __init__(self) -> None:
        self.by_meeting: dict[int, Account] = {}

    @on(MEETING_JOINED)
    async def joined(self, event: MeetingJoined) -> None:
        """A seat is taken, and paid for once."""
        account = self._account(event.meeting_id)
        if event.user_id not in account.members:
            account.members.append(event.user_id)
            account.seats_taken += 1

    @on(MEETING_LEFT)
    async def left(self, event: MeetingLeft) -> None:
        """It is free again."""
        account = self._account(event.meeting_id)
        if event.user_id in account.members:
            account.members.remove(event.user_id)

    @on(MEETING_RENAMED)
    async def renamed(self, event: MeetingRenamed) -> None:
        """Also tells who pays, which a plugin of the host found out.

        Raises:
            UnknownCostCentre: that is not for billing to mend. After three attempts the event becomes a dead letter, which
                somebody looks at; `silbo dead retry` brings it back.
        """
        if event.cost_centre not in COST_CENTRES:
            raise UnknownCostCentre(event.cost_centre)
        account = self._account(event.meeting_id)
        account.title, account.cost_centre = event.title, event.cost_centre

    def _account(self, meeting_id: int) -> Account:
        return self.by_meeting.setdefault(meeting_id, Account())


def application(settings: Settings) -> Starlette:
    """The consumer, and an endpoint that answers for it."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(accounts := Accounts())

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        async with Redis.from_url(settings.redis_url) as client:
            streams = RedisStreams(client, app="billing", prefix=settings.prefix)
            # One billing at a time, so it has a name: under it a restart goes on at once with what was in hand, in order.
            # Several would share the stream without; then they take over from one that is silent for `claim_after`.
            group = streams.group("billing", start="oldest", consumer="billing-1")
            with closing(Ledger(settings.folder / "billing.ledger")) as ledger:
                await ledger.replay(dispatcher)
                dispatcher.add_subscriber(ledger)
                async with (
                    Consumer(
                        dispatcher,
                        group,
                        events=EVENTS,
                        concurrency=8,  # meetings side by side; what is about one meeting stays in order
                        max_attempts=3,
                        backoff=Backoff(initial=0.1),
                    ) as consumer,
                    asyncio.TaskGroup() as tasks,
                ):
                    tasks.create_task(consumer.run())
                    yield
                    consumer.stop()

    async def answer(request: Request) -> JSONResponse:
        """`GET /accounts`."""
        return JSONResponse({str(meeting_id): asdict(account) for meeting_id, account in accounts.by_meeting.items()})

    return Starlette(routes=[Route("/accounts", answer)], lifespan=lifespan)


if __name__ == "__main__":
    serve(application(Settings.from_environment()))
