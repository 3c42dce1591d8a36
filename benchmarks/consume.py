"""Consuming from a group of a Redis stream, against the loop that one would write by hand with redis-py.

A stream has small notifications of ten keys; each contender reads so many of
them as a group of its own, from the oldest on, and rebuilds each as its class for a listener that does nothing:

* redis-py: XREADGROUP 500, `json.loads`, the class, the listener, one XACK for the 500;
* redis-py, 8 tasks: the same; the 500 go to eight tasks by their key, and are acknowledged when all are done;
* redis-py, with a sorted set: the 500 are asked for in one pipeline, and remembered in another;
* silbo: a `Consumer` with `concurrency` 1 or 8, and with a `RedisInbox`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from time import perf_counter
from typing import Any, Final
from uuid import UUID
from zlib import crc32

from redis.asyncio import Redis

from benchmarks.timing import Contender, Measured
from silbo import AsyncEventDispatcher, Bridge, Consumer, EventName, NotificationEvent
from silbo.brokers.redis import RedisInbox, RedisStreams

PREFIX: Final = "silbo-benchmark"
STREAM: Final = f"{PREFIX}:{{events}}"
KEYS: Final = 10
READ: Final = 500
TASKS: Final = 8
MORE: Final = 1000
"""More messages than are waited for, so that no contender waits for new ones when it is to end."""


@dataclass
class MeetingJoined(NotificationEvent):
    """A small notification, as they are."""

    meeting_id: int
    user_id: int


@dataclass
class Joined:
    """The same, as one would write it without silbo."""

    event_id: UUID
    event_timestamp: datetime
    meeting_id: int
    user_id: int


MEETING_JOINED: Final = EventName("meeting.joined", MeetingJoined, key="meeting_id")

_groups = count()


async def listen(event: object) -> None:
    """Do nothing: the way to here is measured."""


def rebuild(raw: bytes) -> tuple[dict[str, Any], Joined]:
    """Return a message's headers and its event."""
    record = json.loads(raw)
    payload = record["payload"]
    when = datetime.fromisoformat(payload["event_timestamp"])
    event = Joined(UUID(payload["event_id"]), when, payload["meeting_id"], payload["user_id"])
    return record["headers"], event


# -- by hand ------------------------------------------------------------------------------------------------


async def read_all(client: Redis, times: int, handle: Any) -> None:
    """Read messages as a new group; give each batch, as pairs of id and fields, to ``handle``, and acknowledge it."""
    group = f"by-hand-{next(_groups)}"
    await client.xgroup_create(STREAM, group, "0")
    done = 0
    while done < times:
        reply = await client.xreadgroup(group, "one", {STREAM: ">"}, count=min(READ, times - done), block=400)
        for _, entries in reply:
            await handle(entries)
            await client.xack(STREAM, group, *[entry_id for entry_id, _ in entries])
            done += len(entries)
    await client.xgroup_destroy(STREAM, group)


def by_hand(client: Redis) -> Contender:
    """One message after another."""

    async def handle(entries: list[Any]) -> None:
        for _, fields in entries:
            _, event = rebuild(fields[b"message"])
            await listen(event)

    return lambda times: read_all(client, times, handle)


def by_hand_in_tasks(client: Redis) -> Contender:
    """Eight tasks, each with the messages of its keys."""

    async def work(events: list[Joined]) -> None:
        for event in events:
            await listen(event)

    async def handle(entries: list[Any]) -> None:
        parts: list[list[Joined]] = [[] for _ in range(TASKS)]
        for _, fields in entries:
            headers, event = rebuild(fields[b"message"])
            parts[crc32(headers["key"].encode()) % TASKS].append(event)
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(work(part))

    return lambda times: read_all(client, times, handle)


def by_hand_once(client: Redis) -> Contender:
    """One message after another, those that a sorted set does not have."""
    inbox = f"{PREFIX}:by-hand"

    async def handle(entries: list[Any]) -> None:
        rebuilt = [rebuild(fields[b"message"]) for _, fields in entries]
        publications = [headers["publication"] for headers, _ in rebuilt]
        known = await client.zmscore(inbox, publications)
        for (_, event), score in zip(rebuilt, known, strict=True):
            if score is None:
                await listen(event)
        await client.zadd(inbox, dict.fromkeys(publications, 1.0))

    async def run(times: int) -> None:
        await read_all(client, times, handle)
        await client.delete(inbox)

    return run


# -- silbo --------------------------------------------------------------------------------------------------


def consuming(client: Redis, *, concurrency: int = 1, once: bool = False) -> Contender:
    """A consumer that stops after the last message."""
    dispatcher = AsyncEventDispatcher()
    running: list[tuple[Consumer, int]] = []

    @dispatcher.listen(MEETING_JOINED)
    async def note(event: MeetingJoined) -> None:
        await listen(event)
        consumer, times = running[0]
        if consumer.stats.handled + 1 >= times:
            consumer.stop()

    async def run(times: int) -> Measured:
        began_at = perf_counter()
        name = f"silbo-{next(_groups)}"
        async with AsyncExitStack() as stack:
            streams = RedisStreams(client, app="benchmark", prefix=PREFIX)
            stack.push_async_callback(streams.aclose)
            inbox = await stack.enter_async_context(RedisInbox(client, prefix=PREFIX)) if once else None
            consumer = await stack.enter_async_context(
                Consumer(
                    dispatcher,
                    streams.group(name, start="oldest"),
                    events=[MEETING_JOINED],
                    own="handle",
                    concurrency=concurrency,
                    inbox=inbox,
                )
            )
            running[:] = [(consumer, times)]
            await consumer.run()
        await client.xgroup_destroy(STREAM, name)
        await client.delete(f"{PREFIX}:inbox:{name}")
        return Measured((perf_counter() - began_at) / consumer.stats.handled)  # it has handled what it had read

    return run


async def fill(client: Redis, messages: int) -> None:
    """Fill the stream."""
    await client.delete(STREAM)
    streams = RedisStreams(client, app="web", prefix=PREFIX)
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(streams))
    for first in range(0, messages, READ):
        async with asyncio.TaskGroup() as group:
            for number in range(first, min(first + READ, messages)):
                event = MeetingJoined(number % KEYS, number)
                group.create_task(dispatcher.adispatch(MEETING_JOINED, event))
    await streams.aclose()
