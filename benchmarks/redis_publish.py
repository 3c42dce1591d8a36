"""Publishing through the bridge, against redis-py awaited call by call and against its pipelines.

    python -m benchmarks.redis_publish [--rounds 12] [--concurrency 100]

One Redis, one process of ours. Each contender sends the same number of events:

* redis-py, one by one: `await client.publish(...)` or `await client.xadd(...)` with bytes that are ready to send;
* redis-py, pipelines: the same bytes, 100 a pipeline, one pipeline after another;
* silbo: `await dispatcher.adispatch(...)` from 100 tasks through `Bridge(RedisPubSub(...))` or
  `Bridge(RedisStreams(...))`: it makes the event, encodes it, gives it an id and a time, and waits for Redis's answer.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from benchmarks.timing import Contender, compare, machine
from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from tools.redis_server import open_redis

EVENTS = 3000
PREFIX = "silbo-benchmark"
RAW = (
    b'{"message_type":"notification_event","message_name":"meeting.joined","message_id":"9f62e977-73f7-462b-92cb-8ea658d3'
    b'bcb5","payload":{"event_id":"9f62e977-73f7-462b-92cb-8ea658d3bcb5","event_timestamp":"2026-03-07T09:26:02.588855Z",'
    b'"meeting_id":17,"user_id":123},"headers":{"app":"web","instance":"0123456789abcdef0123456789abcdef","version":"1",'
    b'"publication":"0123456789abcdef0123456789abcdef-123456"}}'
)


@dataclass
class MeetingJoined(NotificationEvent):
    """A small notification, as they are."""

    meeting_id: int
    user_id: int


MEETING_JOINED = EventName("meeting.joined", MeetingJoined)


def bridged(publisher: RedisPubSub | RedisStreams, concurrency: int) -> Contender:
    """So many tasks that dispatch one event after another."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(publisher))

    async def run(times: int) -> None:
        async def task(count: int) -> None:
            for number in range(count):
                await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(17, number))

        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(task(times // concurrency + (number < times % concurrency)))

    return run


def one_by_one(call: Any) -> Contender:
    """redis-py, awaited call by call."""

    async def run(times: int) -> None:
        for _ in range(times):
            await call()

    return run


def pipelined(client: Redis, *command: bytes | str) -> Contender:
    """redis-py's pipelines of 100."""

    async def run(times: int) -> None:
        for start in range(0, times, 100):
            pipeline = client.pipeline(transaction=False)
            for _ in range(min(100, times - start)):
                pipeline.execute_command(*command)
            await pipeline.execute()

    return run


async def main(rounds: int, concurrency: int) -> None:
    """Print a table for Pub/Sub and one for Streams."""
    print(machine())
    with open_redis() as server:
        async with Redis.from_url(server.url) as client:
            stream = f"{PREFIX}:{{plain}}"
            pubsub = RedisPubSub(client, app="benchmark", prefix=PREFIX)
            streams = RedisStreams(client, app="benchmark", prefix=PREFIX)
            channel = f"{PREFIX}:notification_event:meeting.joined"
            tables: dict[str, dict[str, Contender]] = {
                "Pub/Sub": {
                    "redis-py, one by one": one_by_one(lambda: client.publish(channel, RAW)),
                    "redis-py, pipelines": pipelined(client, "PUBLISH", channel, RAW),
                    f"silbo, {concurrency} tasks": bridged(pubsub, concurrency),
                },
                "Streams": {
                    "redis-py, one by one": one_by_one(lambda: client.xadd(stream, {"message": RAW})),
                    "redis-py, pipelines": pipelined(client, "XADD", stream, "*", "message", RAW),
                    f"silbo, {concurrency} tasks": bridged(streams, concurrency),
                },
            }
            for title, three in tables.items():
                print(f"\n{title:<22}  {'messages/s':>10}  {'times redis-py one by one':>26}")
                for result in await compare(three, times=EVENTS, rounds=rounds):
                    faster = f"{1 / result.ratio:.1f} ({1 / result.high:.1f}-{1 / result.low:.1f})"
                    print(f"{result.name:<22}  {1 / result.each:>10,.0f}  {faster:>26}", flush=True)
                await client.delete(stream, f"{PREFIX}:{{events}}")
            await pubsub.aclose()
            await streams.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure publishing through the bridge against redis-py.")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds (default: 12)")
    parser.add_argument("--concurrency", type=int, default=100, help="dispatching tasks (default: 100)")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.rounds, arguments.concurrency))
