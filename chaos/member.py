"""A consumer of a group over shards, whose listener is done when the keeper has its effect."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from random import random
from typing import Any

from redis.asyncio import Redis

from chaos.events import APP, CHARGED, COUNTED, Counted
from chaos.keeper import KeeperClient
from chaos.worker import ready, serve
from silbo import AsyncEventDispatcher, Backoff, Consumer, EventName
from silbo.brokers.redis import RedisStreams
from silbo.shards import spread


@dataclass(frozen=True)
class Settings:
    """The settings of one member.

    Attributes:
        keeper: The socket of the keeper.
        slow: Seconds that a slow listener takes, before its effect and after it.
        slow_one_in: How many of them are.
        effects: A database in which a second group with an inbox has its effects.
    """

    name: str
    url: str
    keeper: str
    shards: int
    slow: float = 0.0
    slow_one_in: int = 1
    effects: str = ""


async def main(settings: Settings, stopping: asyncio.Event) -> dict[str, Any]:
    errors: Counter[str] = Counter()

    def report(error: Exception, delivery: Any) -> None:
        errors[type(error).__name__] += 1

    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(settings.url))
        streams = await stack.enter_async_context(RedisStreams(client, app=f"{APP}-reader", shards=settings.shards))
        keeper = await KeeperClient.connect(settings.keeper)
        stack.push_async_callback(keeper.aclose)

        async def hear(event: Counted) -> None:
            pause = settings.slow / 2 if settings.slow and random() * settings.slow_one_in < 1.0 else 0.0
            if pause:
                await asyncio.sleep(pause)
            assert event.origin
            assert event.origin.epoch
            shard = spread(event.lane, settings.shards)
            await keeper.have(event, shard, event.origin.epoch, settings.name)
            if pause:
                await asyncio.sleep(pause)

        async def consume(group: str, events: list[EventName[Counted]], heard: Any, **more: Any) -> Consumer:
            dispatcher = AsyncEventDispatcher()
            for name in events:
                dispatcher.add_listener(name, heard)
            backoff = Backoff(initial=0.05, cap=0.2)
            subscription = streams.group(group, start="oldest")
            consumer = Consumer(dispatcher, subscription, events=events, backoff=backoff, on_error=report, **more)
            return await stack.enter_async_context(consumer)

        consumers = [await consume("readers", [COUNTED, CHARGED], hear, concurrency=64)]
        if settings.effects:
            from chaos.effects import Effects  # not every Python that plays here has SQLAlchemy

            effects = await stack.enter_async_context(Effects(settings.effects))
            consumers.append(await consume("effects", [CHARGED], effects.have, inbox=effects.inbox))
        ready()
        running = [asyncio.create_task(consumer.run()) for consumer in consumers]
        await asyncio.wait([*running, asyncio.create_task(stopping.wait())], return_when=asyncio.FIRST_COMPLETED)
        for consumer in consumers:
            consumer.stop()
        await asyncio.gather(*running)
    return asdict(consumers[0].stats) | {"errors": errors}


if __name__ == "__main__":
    serve(Settings, main)
