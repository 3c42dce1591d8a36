"""A process of a program that dispatches, bridges and consumes as one app. Run by tests/consumer/test_replicas.py.

    python -m tests.support.replica_process URL PREFIX NUMBER OWN EVENTS

Its listener's effect is an entry in a Redis list, with the process and the event. It dispatches its events, and goes on
consuming until it gets a line on stdin.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from silbo import AsyncEventDispatcher, Bridge, Consumer, EventName, NotificationEvent
from silbo.brokers.redis import RedisStreams
from tests.support.redis_at import redis_at


@dataclass
class Ordered(NotificationEvent):
    number: str


ORDERED = EventName("order.placed", Ordered)


async def main(url: str, prefix: str, number: str, own: Any, events: int) -> None:
    dispatcher = AsyncEventDispatcher()
    async with redis_at(url) as client, RedisStreams(client, app="shop", prefix=prefix) as streams:

        @dispatcher.listen(ORDERED)
        async def effect(event: Ordered) -> None:
            await client.rpush(f"{prefix}:effects", f"{number} {event.number}")

        dispatcher.add_subscriber(Bridge(streams))
        group = streams.group("shop", start="oldest", consumer=f"shop-{number}")
        async with Consumer(dispatcher, group, events=[ORDERED], own=own) as consumer:
            running = asyncio.create_task(consumer.run())
            for count in range(events):
                await dispatcher.adispatch(ORDERED, Ordered(f"{number}-{count}"))
            print("dispatched", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            consumer.stop()
            await running


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:5], events=int(sys.argv[5])))
