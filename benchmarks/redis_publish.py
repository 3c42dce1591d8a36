"""Publishing through the bridge, against redis-py awaited call by call and against its pipelines.

    python -m benchmarks.redis_publish [--rounds 12] [--concurrency 100]

One Redis on loopback, one process of ours. Each contender sends the same small notification, made anew each time, with
an id and a time of its own, as JSON of the same keys. The first table has the packet alone: the dispatch of an event to a
bridge whose publisher makes the bytes and drops them, against a function that makes them with `json` or with `msgspec`. The
others send it:

* redis-py, one by one: the message made by hand, then `await client.publish(...)` or `await client.xadd(...)`;
* redis-py, pipelines: the same, 500 a pipeline, one pipeline after another;
* silbo: `await dispatcher.adispatch(...)` from 100 tasks through `Bridge(RedisPubSub(...))` or
  `Bridge(RedisStreams(...))`; each waits for Redis's answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec
from redis.asyncio import Redis

from benchmarks.timing import Contender, compare, machine
from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.message import Message, Origin, instance
from silbo.protocols import Promises, Publisher
from silbo.wire.formats import JSON
from tools.redis_server import RedisServer, external_url

EVENTS = 3000
PIPELINE = 500
PREFIX = "silbo-benchmark"
INSTANCE = uuid4().hex


def by_hand(user_id: int) -> str:
    """What silbo sends, as one would write it without silbo."""
    return json.dumps(record(user_id), separators=(",", ":"))


def record(user_id: int) -> dict[str, Any]:
    """The message as a dict."""
    event_id = str(uuid4())
    when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    payload = {"event_id": event_id, "event_timestamp": when, "meeting_id": 17, "user_id": user_id}
    headers = {"app": "web", "instance": INSTANCE, "publication": f"{INSTANCE}-{user_id}", "version": "1"}
    return {
        "message_type": "notification_event",
        "message_name": "meeting.joined",
        "message_id": event_id,
        "payload": payload,
        "headers": headers,
    }


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
    """redis-py's pipelines."""

    async def run(times: int) -> None:
        for start in range(0, times, PIPELINE):
            pipeline = client.pipeline(transaction=False)
            for number in range(start, min(start + PIPELINE, times)):
                pipeline.execute_command(*command, by_hand(number))
            await pipeline.execute()

    return run


class Encoding:
    """A publisher that makes the bytes of each message, and drops them."""

    app = "benchmark"
    promises = Promises()

    def __init__(self) -> None:
        self.raw = b""
        self._origin = Origin(self.app, instance())

    async def publish(self, *messages: Message) -> None:
        """Make the bytes."""
        for message in messages:
            self.raw = JSON.encode(message, self._origin)

    async def aclose(self) -> None:
        """Close nothing."""


def packets(make: Callable[[int], object]) -> Contender:
    """Make packets by hand."""

    async def run(times: int) -> None:
        for number in range(times):
            make(number)

    return run


def dispatched(publisher: Publisher | None) -> Contender:
    """Dispatch events, one after another, to a bridge or to nobody."""
    dispatcher = AsyncEventDispatcher()
    if publisher is not None:
        dispatcher.add_subscriber(Bridge(publisher))

    async def run(times: int) -> None:
        for number in range(times):
            await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(17, number))

    return run


async def show(title: str, contenders: dict[str, Contender], rounds: int) -> None:
    """Print one table: the contenders against the first of them and against the second."""
    one, two, *_ = contenders
    print(f"\n{title:<22}  {'each':>8}  {f'times {one}':>27}  {f'times {two}':>27}")
    results = await compare(contenders, times=EVENTS, rounds=rounds)
    seconds = {result.name: result for result in results}
    for result in results:
        against_one, against_two = (
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            for ratios in (
                [other / own for other, own in zip(seconds[name].rounds, result.rounds, strict=True)]
                for name in (one, two)
            )
        )
        print(f"{result.name:<22}  {result.each * 1e6:>5.1f} us  {against_one:>27}  {against_two:>27}", flush=True)


async def main(rounds: int, concurrency: int) -> None:
    """Print a table for the packets, one for Pub/Sub and one for Streams."""
    print(machine())
    encode = msgspec.json.Encoder().encode
    await show(
        "event to packet",
        {
            "json": packets(by_hand),
            "msgspec": packets(lambda number: encode(record(number))),
            "silbo, bridge": dispatched(Encoding()),
            "silbo, nobody hears": dispatched(None),
        },
        rounds,
    )
    with nullcontext() if external_url() else RedisServer(port=True) as server:
        async with Redis.from_url(server.url if server else external_url()) as client:
            stream = f"{PREFIX}:{{plain}}"
            pubsub = RedisPubSub(client, app="benchmark", prefix=PREFIX)
            streams = RedisStreams(client, app="benchmark", prefix=PREFIX)
            channel = f"{PREFIX}:notification_event:meeting.joined"
            tables: dict[str, dict[str, Contender]] = {
                "Pub/Sub": {
                    "one by one": one_by_one(lambda raw: client.publish(channel, raw)),
                    "pipelines of 500": pipelined(client, "PUBLISH", channel),
                    f"silbo, {concurrency} tasks": bridged(pubsub, concurrency),
                },
                "Streams": {
                    "one by one": one_by_one(lambda raw: client.xadd(stream, {"message": raw})),
                    "pipelines of 500": pipelined(client, "XADD", stream, "*", "message"),
                    f"silbo, {concurrency} tasks": bridged(streams, concurrency),
                },
            }
            for title, three in tables.items():
                await show(title, three, rounds)
                await client.delete(stream, f"{PREFIX}:{{events}}")
            await pubsub.aclose()
            await streams.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure publishing through the bridge against redis-py.")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds (default: 12)")
    parser.add_argument("--concurrency", type=int, default=100, help="dispatching tasks (default: 100)")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.rounds, arguments.concurrency))
