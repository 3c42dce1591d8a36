"""A group that falls behind the retention is told, once, and how many messages it missed."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import message, number, opened, receive

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"
RETAIN = 0.4


async def counts(admin: Redis) -> bool:
    """Return True if this Redis counts what a group has read."""
    return int((await admin.info("server"))["redis_version"].split(".")[0]) >= 7


async def read(receiver: Receiver, many: int) -> list[int]:
    items = await receive(receiver, many)
    await receiver.ack(*[item for item in items if isinstance(item, Delivery)])
    return [number(item) for item in items]


@pytest.mark.long
async def test_group_behind_the_retention_gets_a_gap_once_with_the_count(admin: Redis, streams_client: Redis) -> None:
    """Exactly where Redis counts; and the entries that are left."""
    async with RedisStreams(streams_client, app="web", retain=RETAIN) as streams:
        for start in ("new", "oldest"):
            await admin.delete(KEY)
            group = streams.group("billing", start=start)
            async with opened(group) as receiver, opened(group) as other:
                await streams.publish(*map(message, range(10)))
                assert await read(receiver, 3) == [0, 1, 2]
                await asyncio.sleep(RETAIN + 0.1)
                await streams.publish(message(10), message(11))
                gap, *rest = await receive(receiver, 3)
                assert isinstance(gap, Gap)
                assert (gap.address, gap.count) == (KEY, 7 if await counts(admin) else None)
                assert [number(item) for item in rest] == [10, 11]
                await receiver.ack(*[item for item in rest if isinstance(item, Delivery)])
                for consumer in (receiver, other):
                    assert await consumer.receive(10) == []
                # And again.
                await streams.publish(*map(message, range(5)))
                await asyncio.sleep(RETAIN + 0.1)
                await streams.publish(message(5))
                gap, five = await receive(receiver, 2)
                assert isinstance(gap, Gap)
                assert (gap.count, number(five)) == (5 if await counts(admin) else None, 5)


async def test_count_is_exact_for_a_group_that_began_in_the_middle(admin: Redis, streams_client: Redis) -> None:
    """What was there before it is not what it missed."""
    async with RedisStreams(streams_client, app="web", retain=RETAIN) as streams:
        await streams.publish(*map(message, range(5)))
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*map(message, range(10)))
            assert await read(receiver, 3) == [0, 1, 2]
            await asyncio.sleep(RETAIN + 0.1)
            await streams.publish(message(10))
            gap, ten = await receive(receiver, 2)
            assert isinstance(gap, Gap)
            assert (gap.count, number(ten)) == (7 if await counts(admin) else None, 10)


async def test_group_that_was_away_too_long_learns_so_when_it_comes_back(admin: Redis, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", retain=RETAIN) as streams:
        group = streams.group("billing", start="new")
        async with opened(group) as receiver:
            await streams.publish(message(0))
            assert await read(receiver, 1) == [0]
        await streams.publish(*map(message, range(1, 5)))
        await asyncio.sleep(RETAIN + 0.1)
        await streams.publish(message(5))
        async with opened(group) as receiver:
            gap, five = await receive(receiver, 2)
            assert isinstance(gap, Gap)
            assert (gap.count, number(five)) == (4 if await counts(admin) else None, 5)


async def test_everything_trimmed_is_a_gap_too(admin: Redis, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", retain=RETAIN) as streams:
        group = streams.group("billing", start="new")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(3)))
            assert await read(receiver, 1) == [0]
            await asyncio.sleep(RETAIN + 0.1)
            await admin.xtrim(KEY, maxlen=0, approximate=False)
            (gap,) = await receive(receiver, 1)
            assert isinstance(gap, Gap)
            assert gap.count == (2 if await counts(admin) else None)
            assert await receiver.receive(10) == []


@pytest.mark.long
async def test_quiet_group_that_missed_nothing_is_told_nothing(streams_client: Redis) -> None:
    """What was trimmed it had been given; a stream without traffic is no gap."""
    async with RedisStreams(streams_client, app="web", retain=RETAIN) as streams:
        async with opened(streams.group("billing", start="new", claim_after=0.8)) as receiver:
            for n in range(3):
                await streams.publish(message(n))
                assert await read(receiver, 1) == [n]
                for _ in range(3):  # longer than it is kept
                    assert await receiver.receive(10) == []


async def test_group_that_begins_at_the_oldest_of_a_trimmed_stream_has_missed_nothing(
    admin: Redis, streams: RedisStreams
) -> None:
    await streams.publish(*map(message, range(10)))
    await admin.xtrim(KEY, maxlen=4, approximate=False)
    async with opened(streams.group("billing", start="oldest")) as receiver:
        assert await read(receiver, 4) == [6, 7, 8, 9]


async def test_group_near_the_retention_is_reported(streams_client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """While there is time to do something: when the next message has used four fifths of it."""
    async with RedisStreams(streams_client, app="web", retain=2) as streams:
        async with opened(streams.group("billing", start="new", claim_after=0.03)) as receiver:
            await streams.publish(*map(message, range(4)))
            with caplog.at_level(logging.WARNING):
                assert await read(receiver, 1) == [0]
                assert not caplog.records
                await asyncio.sleep(1.7)
                assert await read(receiver, 2) == [1, 2]
    (record,) = caplog.records
    told: Any = record
    assert "falls behind" in record.message
    assert (told.address, told.group, told.retain) == (KEY, "billing", 2)
    assert 1.6 < told.age < 2
