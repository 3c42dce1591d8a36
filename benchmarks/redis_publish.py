"""Publishing through the bridge, against redis-py.

Each contender sends the same small notification, made anew each time, with an id and a time of its own, as JSON of the same keys.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from benchmarks.timing import Contender
from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.message import Message, Origin, instance
from silbo.protocols import Promises, Publisher
from silbo.wire.formats import JSON

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


def made_by_hand(make: Callable[[int], object]) -> Contender:
    """Make messages by hand."""

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
