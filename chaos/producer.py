"""A host that dispatches numbered events, in many lanes side by side, each number when the one before is given.

A number is *given* when the dispatch has returned and the ledger has it: `lane number event_id`. A new process goes on
after the last number of its ledger, so a number may be published twice where that was in doubt; each time as another
event with an id of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import random
from typing import Any

from chaos.client import make_client
from chaos.events import APP, CHARGED, COUNTED, Counted, fate_of
from chaos.ledger import Ledger, read
from chaos.worker import ready, serve, show
from silbo import AsyncEventDispatcher, Bridge, EventName, Outbox, Publisher, Quota, Route
from silbo.brokers.redis import RedisStreams
from silbo.errors import PublishError
from silbo.stores.sqlite import SQLiteStore

AGAIN = 0.05
"""Seconds after a publish that failed, before the same number is published again."""

SCATTER = 0.004
"""Seconds between two of a lane, at most: else all lanes would be in step, and a kill would meet all or none of them."""


@dataclass(frozen=True)
class Settings:
    """How much to dispatch, and where to.

    Attributes:
        lanes: How many keys; each lane waits for its own publishes alone.
        each: Numbers of a lane.
        rate: Events a second in sum; 0 is as fast as it goes.
        store: The outbox's file; without one, directly to Redis.
        relay: Whether the outbox sends too.
        fails: One event in so many always fails at the consumer.
        kills: One event in so many kills the consumer.
        shards: How many streams the events are spread over; 0 is one stream without shards.
        charges: One lane in so many has events of the other name.
        charges_to: The address of those events; empty for the same stream.
    """

    name: str
    url: str
    ledger: str
    lanes: int
    each: int
    rate: float = 0.0
    store: str = ""
    relay: bool = False
    quota_size: int = 1 << 30
    timeout: float = 5.0
    fails: int = 0
    kills: int = 0
    charges: int = 0
    charges_to: str = ""
    shards: int = 0


class Producer:
    """The lanes of one process."""

    def __init__(self, settings: Settings, dispatcher: AsyncEventDispatcher, stopping: asyncio.Event) -> None:
        self._settings, self._dispatcher, self._stopping = settings, dispatcher, stopping
        self._ledger = Ledger(Path(settings.ledger))
        self._next = dict.fromkeys((f"{settings.name}-{lane}" for lane in range(settings.lanes)), 0)
        self.errors: Counter[str] = Counter()
        self.slowest = 0.0
        for lane, number, _ in read(Path(settings.ledger)):
            self._next[lane] = int(number) + 1

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for position, lane in enumerate(self._next):
                tasks.create_task(self._give(position, lane))
        await self._ledger.close()

    async def _give(self, position: int, lane: str) -> None:
        settings, began, first = self._settings, time.monotonic(), self._next[lane]
        name = CHARGED if settings.charges and position % settings.charges == 0 else COUNTED
        every = settings.lanes / settings.rate if settings.rate else 0.0
        for number in range(first, settings.each):
            nth = number * settings.lanes + position
            due = began + (number - first + position / settings.lanes) * every
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            while not self._stopping.is_set():
                event = Counted(lane, number, fate_of(nth, fails=settings.fails, kills=settings.kills))
                if await self._dispatch(name, event):
                    await self._ledger.write(f"{lane} {number} {event.event_id}")
                    await asyncio.sleep(random() * SCATTER)
                    break
                await asyncio.sleep(AGAIN)
            if self._stopping.is_set():
                return

    async def _dispatch(self, name: EventName[Counted], event: Counted) -> bool:
        asked = time.monotonic()
        try:
            await self._dispatcher.adispatch(name, event)
        except PublishError as error:
            self.errors[type(error).__name__] += 1
            if self.errors.total() == 1:
                show({"errors": self.errors})
            return False
        finally:
            self.slowest = max(self.slowest, time.monotonic() - asked)
        return True


@asynccontextmanager
async def publisher(settings: Settings) -> AsyncGenerator[Publisher]:
    async with make_client(settings.url) as client:
        streams = RedisStreams(client, app=APP, timeout=settings.timeout, shards=settings.shards)
        if not settings.store:
            async with streams:
                yield streams
            return
        quota = Quota(size=settings.quota_size)
        async with Outbox(SQLiteStore(settings.store), streams, relay=settings.relay, quota=quota) as outbox:
            yield outbox


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    dispatcher = AsyncEventDispatcher()
    async with publisher(settings) as outlet:
        routes = [Route(CHARGED, to=settings.charges_to)] if settings.charges_to else []
        dispatcher.add_subscriber(Bridge(outlet, routes=routes))
        producer = Producer(settings, dispatcher, stopping)
        ready()
        await producer.run()
    return {"slowest": producer.slowest, "errors": producer.errors}


if __name__ == "__main__":
    serve(Settings, main)
