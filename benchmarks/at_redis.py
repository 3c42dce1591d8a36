"""Scenarios at Redis: publishing by silbo, redis-py and the other clients, and consuming from a stream.

Every contender that publishes sends the same small message, made anew each time. With a concurrency, so many tasks publish one
message after another; redis-py's pipelines, and its calls one by one, are made by one task.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks import consume
from benchmarks.redis_publish import (
    PIPELINE,
    PREFIX,
    Encoding,
    bridged,
    by_hand,
    dispatched,
    made_by_hand,
    one_by_one,
    pipelined,
    record,
)
from benchmarks.scenario import Contenders, Missing, Scenario, load_peer
from benchmarks.timing import Contender, Measured
from silbo.brokers.redis import RedisPubSub, RedisStreams
from tools.redis_server import RedisServer

__all__ = ["SCENARIOS"]

CHANNEL = f"{PREFIX}:notification_event:meeting.joined"
STREAM = f"{PREFIX}:{{plain}}"
POOL = 50
"""Connections of a pool that many tasks share."""
CONSUMED = 5_000
KEPT = 20_000
"""Entries that a stream keeps: Redis's memory is not what is measured."""


def in_tasks(concurrency: int, publish: Callable[[int], Awaitable[object]]) -> Contender:
    """Return a contender of so many tasks that publish one message after another."""

    async def run(times: int) -> None:
        async def task(share: int) -> None:
            for number in range(share):
                await publish(number)

        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(task(times // concurrency + (number < times % concurrency)))

    return run


# -- peers ----------------------------------------------------------------------------------------------------


def gathered(url: str, concurrency: int, *, is_stream: bool, stack: AsyncExitStack) -> Contender:
    """redis-py's calls from many tasks, over a pool that blocks while all its connections are in use."""
    pool = BlockingConnectionPool.from_url(url, max_connections=min(POOL, concurrency), timeout=60)
    client = Redis.from_pool(pool)
    stack.push_async_callback(client.aclose)
    if is_stream:
        return in_tasks(concurrency, lambda number: client.xadd(STREAM, {"message": by_hand(number)}))
    return in_tasks(concurrency, lambda number: client.publish(CHANNEL, by_hand(number)))


async def add_coredis(
    found: dict[str, Contender | Missing], url: str, concurrency: int, *, is_stream: bool, stack: AsyncExitStack
) -> None:
    """coredis's calls from many tasks, and its pipelines."""
    try:
        import coredis

        client = await stack.enter_async_context(coredis.Redis.from_url(url))
    except Exception as error:  # noqa: BLE001  # a peer's own failure is a cell of the table
        found["coredis"] = Missing(f"{type(error).__name__}: {error}")
        return

    def call(target: Any, number: int) -> Any:
        if is_stream:
            return target.xadd(STREAM, {"message": by_hand(number)})
        return target.publish(CHANNEL, by_hand(number))

    async def publish(number: int) -> None:
        await call(client, number)

    async def pipelines(times: int) -> None:
        for start in range(0, times, PIPELINE):
            async with client.pipeline(transaction=False) as pipeline:
                for number in range(start, min(start + PIPELINE, times)):
                    call(pipeline, number)

    found["coredis"] = in_tasks(concurrency, publish)
    found["coredis, pipelines"] = pipelines


async def add_faststream(
    found: dict[str, Contender | Missing], url: str, concurrency: int, *, is_stream: bool, stack: AsyncExitStack
) -> None:
    """FastStream's `broker.publish` from many tasks."""
    try:
        from faststream.redis import RedisBroker

        broker = RedisBroker(url, logger=None)
        await stack.enter_async_context(broker)
    except Exception as error:  # noqa: BLE001  # a peer's own failure is a cell of the table
        found["FastStream"] = Missing(f"{type(error).__name__}: {error}")
        return
    where = {"stream": STREAM} if is_stream else {"channel": CHANNEL}
    found["FastStream"] = in_tasks(concurrency, lambda number: broker.publish(record(number), **where))


def make_diator(url: str, concurrency: int, stack: AsyncExitStack) -> Contender:
    """diator's event emitter from many tasks."""
    from dataclasses import dataclass

    import rodi
    from diator.container.rodi import RodiContainer
    from diator.events import EventEmitter, EventMap, NotificationEvent
    from diator.message_brokers.redis import RedisMessageBroker

    @dataclass(frozen=True, kw_only=True)
    class MeetingJoined(NotificationEvent):
        meeting_id: int
        user_id: int

    container = RodiContainer()
    container.attach_external_container(rodi.Container())
    # Two connections for each publish: it subscribes to the channel first.
    pool = BlockingConnectionPool.from_url(url, max_connections=2 * concurrency, timeout=60)
    client = Redis.from_pool(pool)
    stack.push_async_callback(client.aclose)
    emitter = EventEmitter(EventMap(), container, RedisMessageBroker(client))
    return in_tasks(concurrency, lambda number: emitter.emit(MeetingJoined(meeting_id=17, user_id=number)))


def make_limit(url: str, concurrency: int, *words: str) -> Contender | Missing:
    """redis-benchmark: what the server takes from a client in C, with pipelines of 500."""
    program = shutil.which("redis-benchmark") or shutil.which("valkey-benchmark")
    if program is None:
        return Missing("there is no redis-benchmark on the PATH")
    address = urlsplit(url)
    fixed = [program, "-h", str(address.hostname), "-p", str(address.port), "-c", str(min(concurrency, POOL)), "--csv"]

    async def run(times: int) -> Measured:
        many = max(times, 20_000)
        pipe = asyncio.subprocess.PIPE
        command = [*fixed, "-n", str(many), "-P", str(PIPELINE), *words, by_hand(1)]
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, errors = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{program}: {errors.decode().strip()}")
        # "the command, with quotes of its own","requests a second","average latency",...
        rate = re.findall(r'","([0-9.]+)"', out.decode().splitlines()[-1])[0]
        return Measured(1 / float(rate))

    return run


# -- publish --------------------------------------------------------------------------------------------------


def open_publish(concurrency: int, *, is_stream: bool) -> Callable[[], AbstractAsyncContextManager[Contenders]]:
    """Return the context of everybody who publishes."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        async with AsyncExitStack() as stack:
            url = stack.enter_context(RedisServer(port=True)).url
            client = await stack.enter_async_context(Redis.from_url(url))
            broker_class = RedisStreams if is_stream else RedisPubSub
            broker: Any = await stack.enter_async_context(broker_class(client, app="benchmark", prefix=PREFIX))
            words = ("XADD", STREAM, "*", "message") if is_stream else ("PUBLISH", CHANNEL)

            def call(raw: str) -> Any:
                return client.xadd(STREAM, {"message": raw}) if is_stream else client.publish(CHANNEL, raw)

            found: dict[str, Contender | Missing] = {
                "redis-py, one by one": one_by_one(call),
                "redis-py, gathered": gathered(url, concurrency, is_stream=is_stream, stack=stack),
                "redis-py, pipelines": pipelined(client, *words),
                "silbo": bridged(broker, concurrency),
            }
            await add_coredis(found, url, concurrency, is_stream=is_stream, stack=stack)
            await add_faststream(found, url, concurrency, is_stream=is_stream, stack=stack)
            if is_stream:
                found["diator"] = Missing("has no streams: it publishes over Pub/Sub")
            else:
                found["diator"] = load_peer(lambda: make_diator(url, concurrency, stack))
            found["redis-benchmark"] = make_limit(url, concurrency, *words)
            yield (
                {name: one if isinstance(one, Missing) else emptied(one, client) for name, one in found.items()}
                if is_stream
                else found
            )

    return opened


def emptied(contender: Contender, client: Redis) -> Contender:
    """Trim the streams behind each round; it is one call, and every contender pays it."""

    async def run(times: int) -> object:
        returned = await contender(times)
        for key in (STREAM, f"{PREFIX}:{{events}}"):
            await client.xtrim(key, KEPT, approximate=True)
        return returned

    return run


@asynccontextmanager
async def open_messages() -> AsyncGenerator[Contenders]:
    """From the event to the bytes; nothing is sent."""
    encode = msgspec.json.Encoder().encode
    yield {
        "json": made_by_hand(by_hand),
        "msgspec": made_by_hand(lambda number: encode(record(number))),
        "silbo": dispatched(Encoding()),
        "silbo, nobody hears": dispatched(None),
    }


NOTES = {
    "redis-py, one by one": "one task that awaits each call",
    "redis-py, pipelines": f"one task, {PIPELINE} commands a pipeline, one pipeline after another",
    "coredis, pipelines": f"one task, {PIPELINE} commands a pipeline",
    "diator": "subscribes to the channel before it publishes to it",
    "redis-benchmark": f"the server's limit: a client in C, {PIPELINE} commands a pipeline, one message again and again",
}
TARGETS = {
    "Pub/Sub": {"redis-py, one by one": 10.0, "redis-py, pipelines": 1.4},
    "Streams": {"redis-py, one by one": 11.0, "redis-py, pipelines": 1.7},
}


def publish_row(kind: str, concurrency: int, *, in_bench: bool) -> Scenario:
    """Return the row of so many publishing tasks."""
    return Scenario(
        name=f"publish, {kind}, {concurrency:,} {'task' if concurrency == 1 else 'tasks'}",
        group=f"publish to {kind}",
        open=open_publish(concurrency, is_stream=kind == "Streams"),
        reference="redis-py, one by one",
        unit="messages",
        more_is_better=True,
        targets=TARGETS[kind] if concurrency == 100 else {},
        least=concurrency,
        rounds=7 if concurrency > 100 else None,
        seconds=300.0 if in_bench else 3600.0,
        in_bench=in_bench,
        in_quick=concurrency == 100,
        curve=("concurrency", concurrency),
        notes=NOTES,
    )


# -- consume --------------------------------------------------------------------------------------------------


def open_consume(
    ours: Callable[[Redis], Contender], hand: Callable[[Redis], Contender]
) -> Callable[[], AbstractAsyncContextManager[Contenders]]:
    """Return the context of a stream that is full, and of two that read it."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        with RedisServer(port=True) as server:
            async with Redis.from_url(server.url) as client:
                await consume.fill(client, CONSUMED + consume.MORE)
                yield {"by hand": hand(client), "silbo": ours(client)}

    return opened


def consume_row(name: str, hand: Callable[[Redis], Contender], target: float, **options: Any) -> Scenario:
    """Return the row of a consumer of Streams."""
    return Scenario(
        name=name,
        group="consumers",
        open=open_consume(lambda client: consume.consuming(client, **options), hand),
        reference="by hand",
        unit="messages",
        more_is_better=True,
        targets={"by hand": target},
        times=CONSUMED,
        in_quick=not options,
        notes={"by hand": "XREADGROUP 500, json.loads, the class, XACK"},
    )


SCENARIOS = [
    Scenario(
        name="event to message",
        group="messages",
        open=open_messages,
        reference="json",
        unit="messages",
        measures="cpu seconds",
        in_quick=True,
    ),
    *(
        publish_row(kind, concurrency, in_bench=concurrency < 10_000)
        for kind in TARGETS
        for concurrency in (1, 10, 100, 1_000, 10_000)
    ),
    consume_row("Streams consumer", consume.by_hand, 1.5),
    consume_row("Streams consumer, 8 at a time over 10 keys", consume.by_hand_in_tasks, 1.0, concurrency=8),
    consume_row("Streams consumer, with an inbox in Redis", consume.by_hand_once, 1.0, once=True),
]
