"""Every duration that a user gives is at most fifty years: what is made of a longer one fails far from the cause."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import async_sessionmaker

from silbo import AsyncEventDispatcher, Backoff, Consumer, Event, Outbox, Plugins
from silbo._checks import LONGEST
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisInbox, RedisPubSub, RedisStreams
from silbo.operations.doctor import examine
from silbo.operations.groups import read_groups
from silbo.operations.rewind import find_rewinds, rewind_group
from silbo.operations.top import watch
from silbo.outbox.relay import Relay
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlalchemy import SQLAlchemyInbox
from silbo.web import PageApp
from tests.support.redis_streams import message, number, opened, receive

DURATIONS: dict[str, Callable[[float], Any]] = {
    "Relay.keep_sent": lambda seconds: Relay(MemoryStore(), MemoryBroker(), keep_sent=seconds),
    "Relay.lease": lambda seconds: Relay(MemoryStore(), MemoryBroker(), lease=seconds),
    "Relay.drain": lambda seconds: Relay(MemoryStore(), MemoryBroker(), drain=seconds),
    "Outbox.keep_sent": lambda seconds: Outbox(MemoryStore(), MemoryBroker(), keep_sent=seconds),
    "Outbox.lease": lambda seconds: Outbox(MemoryStore(), MemoryBroker(), lease=seconds, relay=False),
    "Consumer.drain": lambda seconds: _consumer(drain=seconds),
    "Consumer.slow_after": lambda seconds: _consumer(slow_after=seconds),
    "Consumer.listener_timeout": lambda seconds: _consumer(listener_timeout=seconds),
    "RedisStreams.retain": lambda seconds: RedisStreams(Redis(), app="web", retain=seconds),
    "RedisStreams.timeout": lambda seconds: RedisStreams(Redis(), app="web", timeout=seconds),
    "RedisStreams.group.claim_after": lambda seconds: RedisStreams(Redis(), app="web").group(
        "g", start="new", claim_after=seconds
    ),
    "RedisPubSub.timeout": lambda seconds: RedisPubSub(Redis(), app="web", timeout=seconds),
    "RedisInbox.keep": lambda seconds: RedisInbox(Redis(), keep=seconds),
    "RedisInbox.timeout": lambda seconds: RedisInbox(Redis(), timeout=seconds),
    "SQLAlchemyInbox.keep": lambda seconds: SQLAlchemyInbox(async_sessionmaker(), keep=seconds),
    "Backoff.cap": lambda seconds: Backoff(cap=seconds),
    "AsyncEventDispatcher.add_listener.timeout": lambda seconds: AsyncEventDispatcher().add_listener(
        "user.joined", _listen, timeout=seconds
    ),
    "MemoryBroker.timeout": lambda seconds: MemoryBroker(timeout=seconds),
    "Plugins.slow_after": lambda seconds: Plugins(AsyncEventDispatcher(), slow_after=seconds),
    "PageApp.silent_after": lambda seconds: PageApp(AsyncEventDispatcher(), silent_after=seconds),
    "PageApp.timeout": lambda seconds: PageApp(AsyncEventDispatcher(), timeout=seconds),
}

CALLS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "wait_for.timeout": lambda seconds: AsyncEventDispatcher().wait_for("user.joined", timeout=seconds),
    "drain.timeout": lambda seconds: AsyncEventDispatcher().drain(seconds),
    "unload.timeout": lambda seconds: Plugins(AsyncEventDispatcher()).unload("spam", timeout=seconds),
    "reload.timeout": lambda seconds: Plugins(AsyncEventDispatcher()).reload("spam", timeout=seconds),
    "find_rewinds.silent_after": lambda seconds: find_rewinds(Redis(), "g", datetime.now(UTC), silent_after=seconds),
    "rewind_group.silent_after": lambda seconds: rewind_group(Redis(), [], silent_after=seconds),
    "watch.every": lambda seconds: anext(watch(Redis(), every=seconds)),
    "read_groups.timeout": lambda seconds: read_groups(Redis(), timeout=seconds),
    "examine.retain": lambda seconds: anext(aiter(examine(Redis(), retain=seconds))),
}


async def _listen(event: Event) -> None: ...


def _consumer(**options: float) -> Consumer:
    return Consumer(AsyncEventDispatcher(), MemoryBroker().group("g", start="new"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("duration", DURATIONS)
def test_duration_of_more_than_fifty_years_is_refused(duration: str) -> None:
    name = duration.rpartition(".")[2]
    make = DURATIONS[duration]
    for seconds in (LONGEST * 1.01, 1e12, 1e300, float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"{name} is seconds, at most .*fifty years"):
            make(seconds)
    with pytest.raises(TypeError, match=f"{name} is a number of seconds"):
        make("1")  # type: ignore[arg-type]
    make(LONGEST)


@pytest.mark.parametrize("call", CALLS)
async def test_duration_that_is_none_is_refused_by_the_call(call: str) -> None:
    """The error names the argument: none of asyncio's own, from deep inside."""
    name = call.rpartition(".")[2]
    for value in ("5", timedelta(seconds=5), True):
        with pytest.raises(TypeError, match=f"{name} is a number of seconds, not "):
            await CALLS[call](value)
    for seconds in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{name} is seconds, "):
            await CALLS[call](seconds)


async def test_wait_of_no_time_is_no_error_of_the_argument() -> None:
    dispatcher = AsyncEventDispatcher()
    await dispatcher.drain(0)
    with pytest.raises(TimeoutError, match="no event 'user.joined' within 0 s"):
        await dispatcher.wait_for("user.joined", timeout=0)


@pytest.mark.every_redis
async def test_longest_durations_work_with_redis(redis: Redis, prefix: str) -> None:
    streams = RedisStreams(redis, app="web", prefix=prefix, retain=LONGEST, timeout=LONGEST)
    async with streams, RedisInbox(redis, prefix=prefix, keep=LONGEST) as inbox:
        await streams.publish(message(1), message(2))
        async with opened(streams.group("g", start="oldest", claim_after=LONGEST)) as first:
            items = await receive(first, 2)
            assert await first.keep(*items) == []  # type: ignore[arg-type]
            assert None not in await first.offer(items[0])  # type: ignore[arg-type]
        async with opened(streams.group("g", start="oldest", claim_after=LONGEST)) as second:
            assert sorted(map(number, await receive(second, 2))) == [1, 2]
        for is_new in (True, False):
            async with inbox.handling("g", "publication") as new:
                assert new is is_new
