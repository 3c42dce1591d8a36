"""Publishing through the bridge, against redis-py awaited call by call and against its pipelines.

    python -m benchmarks.redis_publish [--rounds 12] [--concurrency 100]

One Redis on loopback, one process of ours. Each contender sends the same small notification, made anew each time, with
an id and a time of its own, as JSON of the same keys:

* redis-py, one by one: the message made by hand, then `await client.publish(...)` or `await client.xadd(...)`;
* redis-py, pipelines: the same, 100 a pipeline, one pipeline after another;
* silbo: `await dispatcher.adispatch(...)` from 100 tasks through `Bridge(RedisPubSub(...))` or
  `Bridge(RedisStreams(...))`; each waits for Redis's answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from benchmarks.timing import Contender, compare, machine
from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from tools.redis_server import RedisServer, external_url

EVENTS = 3000
PREFIX = "silbo-benchmark"
INSTANCE = uuid4().hex


def by_hand(user_id: int) -> str:
    """What silbo sends, as one would write it without silbo."""
    event_id = str(uuid4())
    when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    payload = {"event_id": event_id, "event_timestamp": when, "meeting_id": 17, "user_id": user_id}
    headers = {"app": "web", "instance": INSTANCE, "publication": f"{INSTANCE}-{user_id}", "version": "1"}
    message = {
        "message_type": "notification_event",
        "message_name": "meeting.joined",
        "message_id": event_id,
        "payload": payload,
        "headers": headers,
    }
    return json.dumps(message, separators=(",", ":"))


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
        for number in range(times):
            await call(by_hand(number))

    return run


def pipelined(client: Redis, *command: str) -> Contender:
    """redis-py's pipelines of 100."""

    async def run(times: int) -> None:
        for start in range(0, times, 100):
            pipeline = client.pipeline(transaction=False)
            for number in range(start, min(start + 100, times)):
                pipeline.execute_command(*command, by_hand(number))
            await pipeline.execute()

    return run


async def main(rounds: int, concurrency: int) -> None:
    """Print a table for Pub/Sub and one for Streams."""
    print(machine())
    with nullcontext() if external_url() else RedisServer(port=True) as server:
        async with Redis.from_url(server.url if server else external_url()) as client:
            stream = f"{PREFIX}:{{plain}}"
            pubsub = RedisPubSub(client, app="benchmark", prefix=PREFIX)
            streams = RedisStreams(client, app="benchmark", prefix=PREFIX)
            channel = f"{PREFIX}:notification_event:meeting.joined"
            tables: dict[str, dict[str, Contender]] = {
                "Pub/Sub": {
                    "redis-py, one by one": one_by_one(lambda raw: client.publish(channel, raw)),
                    "redis-py, pipelines": pipelined(client, "PUBLISH", channel),
                    f"silbo, {concurrency} tasks": bridged(pubsub, concurrency),
                },
                "Streams": {
                    "redis-py, one by one": one_by_one(lambda raw: client.xadd(stream, {"message": raw})),
                    "redis-py, pipelines": pipelined(client, "XADD", stream, "*", "message"),
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
