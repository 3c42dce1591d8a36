"""Scenarios of readers: Pub/Sub messages as fast as they come, and the way from another process at 5,000 messages a second.

A feeder in a process of its own publishes; the contenders read. Each makes an event of its class of every message, and awaits a
listener: by hand with `json.loads` and a dataclass of the same fields.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic_ns
from typing import Any, NamedTuple
from uuid import UUID

from redis.asyncio import Redis

from benchmarks.feeder import Feeder, open_feeder
from benchmarks.scenario import Contenders, Scenario, load_peer
from benchmarks.timing import Contender, Measured
from silbo import AsyncEventDispatcher, Consumer, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from tools.redis_server import RedisServer

__all__ = ["SCENARIOS"]

PREFIX = "silbo-benchmark"
CHANNEL = f"{PREFIX}:notification_event:meeting.joined"
STREAM = f"{PREFIX}:{{events}}"
MESSAGES = 20_000
RATE = 5_000
LATENCIES = 5_000
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
UNLIMITED = {"client-output-buffer-limit": "pubsub 0 0 0"}
"""A reader that is slower than the feeder is not cut off: the figure is its own speed."""


@dataclass
class MeetingJoined(NotificationEvent):
    """A small notification, as they are."""

    meeting_id: int
    user_id: int


@dataclass
class Joined:
    """The same by hand."""

    event_id: UUID
    event_timestamp: datetime
    meeting_id: int
    user_id: int


def rebuild(raw: bytes) -> Joined:
    """Make an event of a message, as one would write it by hand."""
    return make_event(json.loads(raw)["payload"])


def make_event(payload: dict[str, Any]) -> Joined:
    """Make an event of its payload."""
    when = datetime.fromisoformat(payload["event_timestamp"])
    return Joined(UUID(payload["event_id"]), when, payload["meeting_id"], payload["user_id"])


MEETING_JOINED = EventName("meeting.joined", MeetingJoined)


class Counter:
    """The listener of every contender: counts, or notes how long the way took, until all have come."""

    def __init__(self, wanted: int, *, is_latency: bool) -> None:
        self.left = wanted
        self.done = asyncio.Event()
        self.taken: list[int] = []
        if is_latency:
            self.listen = self.note

    async def listen(self, event: Any) -> None:
        """Count."""
        self.left -= 1
        if self.left == 0:
            self.done.set()

    async def note(self, event: Any) -> None:
        """Note, and count."""
        self.taken.append(monotonic_ns() - event.user_id)
        self.left -= 1
        if self.left == 0:
            self.done.set()

    def measured(self) -> Measured | None:
        """The latencies in seconds, if they were noted."""
        if not self.taken:
            return None
        self.taken.sort()
        figures = {key: self.taken[int(part * len(self.taken))] / 1e9 for key, part in PERCENTILES.items()}
        return Measured(figures["p50"], figures)


class Setting(NamedTuple):
    """The things that a reader needs.

    Attributes:
        rate: Messages a second; 0 as fast as they go.
    """

    url: str
    client: Redis
    feeder: Feeder
    rate: int


Reader = Callable[[Setting, Counter, asyncio.Event], Awaitable[None]]
"""Subscribes, sets the event, and reads until it is cancelled or the counter is done."""


def reading(setting: Setting, read: Reader) -> Contender:
    """Return the contender: subscribe, feed, and wait until the listener had all."""

    async def run(times: int) -> Measured | None:
        counter, ready = Counter(times, is_latency=bool(setting.rate)), asyncio.Event()
        task = asyncio.create_task(read(setting, counter, ready))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        setting.feeder.start(times, setting.rate)
        await counter.done.wait()
        await setting.feeder.wait()
        while not task.done():  # redis-py swallows some cancellations on Python 3.11
            task.cancel()
            await asyncio.wait([task], timeout=0.5)
        return counter.measured()

    return run


# -- by hand, with redis-py -----------------------------------------------------------------------------------


async def listen(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
    """redis-py's `listen()`."""
    async with setting.client.pubsub() as pubsub:
        await pubsub.subscribe(CHANNEL)
        async for message in pubsub.listen():
            if message["type"] != "message":
                ready.set()
                continue
            await counter.listen(rebuild(message["data"]))


async def get_message(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
    """redis-py's `get_message()` with a timeout, as its documentation shows for a loop that can be stopped."""
    async with setting.client.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(CHANNEL)
        await pubsub.get_message(timeout=5)
        ready.set()
        while True:
            message = await pubsub.get_message(timeout=1)
            if message is not None:
                await counter.listen(rebuild(message["data"]))


async def read_group(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
    """XREADGROUP, and XACK."""
    group = f"by-hand-{monotonic_ns()}"
    await setting.client.xgroup_create(STREAM, group, "$", mkstream=True)
    ready.set()
    while counter.left:
        reply: Any = await setting.client.xreadgroup(group, "one", {STREAM: ">"}, count=500, block=1000)
        for _, entries in reply:
            for _, fields in entries:
                await counter.listen(rebuild(fields[b"message"]))
            await setting.client.xack(STREAM, group, *[entry_id for entry_id, _ in entries])


# -- silbo ----------------------------------------------------------------------------------------------------


async def consume_pubsub(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
    """A consumer of `RedisPubSub`."""
    broker = RedisPubSub(setting.client, app="reader", prefix=PREFIX)
    await consume(broker.subscribe("meeting.joined"), counter, ready)


async def consume_streams(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
    """A consumer of `RedisStreams`."""
    broker = RedisStreams(setting.client, app="reader", prefix=PREFIX)
    await consume(broker.group(f"silbo-{monotonic_ns()}", start="new"), counter, ready)


async def consume(subscription: Any, counter: Counter, ready: asyncio.Event) -> None:
    """Run a consumer with the listener."""
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(MEETING_JOINED, counter.listen)
    async with Consumer(dispatcher, subscription, events=[MEETING_JOINED]) as consumer:
        ready.set()
        await consumer.run()


# -- peers ----------------------------------------------------------------------------------------------------


def make_coredis(setting: Setting) -> Contender:
    """coredis's `pubsub()`, read with `async for`."""
    import coredis

    async def read(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
        client = coredis.Redis.from_url(setting.url)
        async with client, client.pubsub(channels=[CHANNEL], ignore_subscribe_messages=True) as pubsub:
            ready.set()
            async for message in pubsub:
                await counter.listen(rebuild(message["data"]))

    return reading(setting, read)


def make_faststream(setting: Setting) -> Contender:
    """A FastStream subscriber, which gets the decoded dict."""
    from faststream.redis import RedisBroker

    async def read(setting: Setting, counter: Counter, ready: asyncio.Event) -> None:
        broker = RedisBroker(setting.url, logger=None)

        @broker.subscriber(CHANNEL)
        async def handle(body: dict[str, Any]) -> None:
            await counter.listen(make_event(body["payload"]))

        async with broker:
            await broker.start()
            ready.set()
            await asyncio.Event().wait()

    return reading(setting, read)


# -- scenarios ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_setting(channel: str, rate: int) -> AsyncGenerator[Setting]:
    """Start Redis and the feeder."""
    async with AsyncExitStack() as stack:
        server = stack.enter_context(RedisServer(port=True, config=UNLIMITED))
        client = await stack.enter_async_context(Redis.from_url(server.url))
        feeder = await stack.enter_async_context(open_feeder(server.url, channel))
        yield Setting(server.url, client, feeder, rate)


@asynccontextmanager
async def open_pubsub() -> AsyncGenerator[Contenders]:
    """As fast as the messages come."""
    async with open_setting(CHANNEL, 0) as setting:
        yield {
            "redis-py, listen()": reading(setting, listen),
            "redis-py, get_message()": reading(setting, get_message),
            "silbo": reading(setting, consume_pubsub),
            "coredis": load_peer(lambda: make_coredis(setting)),
            "FastStream": load_peer(lambda: make_faststream(setting)),
        }


@asynccontextmanager
async def open_pubsub_latency() -> AsyncGenerator[Contenders]:
    """5,000 a second."""
    async with open_setting(CHANNEL, RATE) as setting:
        yield {
            "redis-py, listen()": reading(setting, listen),
            "silbo": reading(setting, consume_pubsub),
            "coredis": load_peer(lambda: make_coredis(setting)),
            "FastStream": load_peer(lambda: make_faststream(setting)),
        }


@asynccontextmanager
async def open_streams_latency() -> AsyncGenerator[Contenders]:
    """5,000 a second."""
    async with open_setting(STREAM, RATE) as setting:
        yield {
            "redis-py, read and ack": reading(setting, read_group),
            "silbo": reading(setting, consume_streams),
        }


SCENARIOS = [
    Scenario(
        name="Pub/Sub consumer",
        group="consumers",
        open=open_pubsub,
        reference="redis-py, listen()",
        unit="messages",
        more_is_better=True,
        targets={"redis-py, listen()": 2.5},
        times=MESSAGES,
        rounds=9,
        fewer={"FastStream": MESSAGES // 10},
        in_quick=True,
    ),
    Scenario(
        name=f"latency, Pub/Sub at {RATE:,} a second",
        group="latency",
        open=open_pubsub_latency,
        reference="redis-py, listen()",
        unit="p50 from another process",
        measures="latency",
        targets={"redis-py, listen()": 1.0},
        times=LATENCIES,
        rounds=9,
    ),
    Scenario(
        name=f"latency, Streams at {RATE:,} a second",
        group="latency",
        open=open_streams_latency,
        reference="redis-py, read and ack",
        unit="p50 from another process",
        measures="latency",
        targets={"redis-py, read and ack": 1.0},
        times=LATENCIES,
        rounds=9,
    ),
]
