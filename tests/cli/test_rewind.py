"""`silbo rewind`: one group is given its messages again, on real groups."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import Gap, GroupInUse
from silbo.message import Delivery, Origin
from silbo.operations.groups import read_groups
from silbo.operations.rewind import find_rewinds, rewind_group
from silbo.wire.formats import JSON
from tests.support.command_line import message, silbo
from tests.support.redis_streams import opened, receive
from tools.redis_server import RedisServer


async def numbers(streams: RedisStreams, group: str, many: int) -> list[int]:
    """The numbers of the next messages of a group, in order; they are acknowledged."""
    async with opened(streams.group(group, start="oldest")) as receiver:
        items = await receive(receiver, many)
        await receiver.ack(*(item for item in items if isinstance(item, Delivery)))
    return [item.message().payload["number"] for item in items if isinstance(item, Delivery)]


@pytest.mark.every_redis
async def test_group_gets_its_messages_again_and_no_other(redis: Redis, redis_url: str, prefix: str) -> None:
    """From the first one since the time on, all that it was given; then what comes new. No gap is reported, and the lag is right."""
    where = ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(*(message(number) for number in range(3)))
        assert await numbers(streams, "billing", 3) == [0, 1, 2]
        seconds, microseconds = await redis.time()
        since = datetime.fromtimestamp(seconds + microseconds / 1e6, UTC) + timedelta(milliseconds=1)
        while datetime.fromtimestamp((await redis.time())[0] + (await redis.time())[1] / 1e6, UTC) < since:
            pass  # a millisecond
        await streams.publish(*(message(number) for number in range(3, 8)))
        assert await numbers(streams, "billing", 5) == [3, 4, 5, 6, 7]
        assert await numbers(streams, "mail", 8) == [*range(8)]
        await streams.publish(message(8))
        done = await silbo("rewind", "billing", "--since", since.isoformat(), *where, "--yes", "--json")
        assert done.code == 0, done.err
        assert (done.object["group"], done.object["messages"]) == ("billing", 5)
        assert done.object["stream"] == f"{prefix}:{{events}}"
        lags = {group.group: group.lag for group in await read_groups(redis, prefix=prefix)}
        assert lags == {"billing": 6, "mail": 1}
        assert await numbers(streams, "billing", 6) == [3, 4, 5, 6, 7, 8]
        assert await numbers(streams, "mail", 1) == [8]
        again = await silbo("rewind", "billing", "--since", "1h", *where, "--yes")
        assert "billing at" in again.out and ": 9 messages again, from " in again.out
        assert await numbers(streams, "billing", 9) == [*range(9)]
        (billing, _) = await read_groups(redis, prefix=prefix)
        assert (billing.lag, billing.in_hand) == (0, 0)


@pytest.mark.every_redis
async def test_lag_after_a_restart_is_that_of_the_group_as_it_was_set_back(own_redis: RedisServer, prefix: str) -> None:
    """Redis 7.0 would keep a wrong count for ever."""
    async with Redis.from_url(own_redis.url) as client, RedisStreams(client, app="shop", prefix=prefix) as streams:
        await streams.publish(*(message(number) for number in range(20)))
        await numbers(streams, "billing", 20)
        await rewind_group(
            client, await find_rewinds(client, "billing", datetime(2020, 1, 1, tzinfo=UTC), prefix=prefix)
        )
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(own_redis.restart)
        await numbers(streams, "billing", 5)
        (group,) = await read_groups(client, prefix=prefix)
        assert group.lag == 15


async def test_what_the_retention_removes_after_a_rewind_is_a_gap(redis: Redis, prefix: str) -> None:
    """The group was given those entries before, but not again."""
    key = f"{prefix}:{{events}}"
    for number in range(20):
        entry: dict[Any, Any] = {"message": JSON.encode(message(number), Origin("shop", "x"))}
        await redis.xadd(key, entry, id=f"{1000 + number}-0")
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await numbers(streams, "billing", 20)
        found = await find_rewinds(redis, "billing", datetime(1970, 1, 1, tzinfo=UTC), prefix=prefix)
        assert [(each.first, each.messages) for each in found] == [("1000-0", 20)]
        await rewind_group(redis, found)
        await redis.xtrim(key, minid="1005-0", approximate=False)
        async with opened(streams.group("billing", start="new")) as receiver:
            items = await receive(receiver, 16)
    assert [isinstance(item, Gap) for item in items].count(True) == 1


async def test_nothing_is_done_while_a_consumer_lives(redis: Redis, redis_url: str, prefix: str) -> None:
    """Also if it came after the look. What `silbo dead retry` leaves behind is no consumer."""
    where = ("--redis", redis_url, "--prefix", prefix)
    key = f"{prefix}:{{events}}"
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(*(message(number) for number in range(3)))
        await numbers(streams, "billing", 3)
        found = await find_rewinds(redis, "billing", datetime(2020, 1, 1, tzinfo=UTC), prefix=prefix)
        await redis.xgroup_createconsumer(key, "billing", "silbo-retry")
        async with opened(streams.group("billing", start="oldest", consumer="billing-0")) as receiver:
            await streams.publish(message(3))
            assert await receive(receiver, 1)
            refused = await silbo("rewind", "billing", "--since", "1h", *where, "--yes")
            with pytest.raises(GroupInUse, match=r"billing-0\. Stop them"):
                await rewind_group(redis, found)
            (before,) = await redis.xinfo_groups(key)
        assert refused.code == 1 and f"billing at {key} has live consumers: billing-0. Stop" in refused.err
        assert before["last-delivered-id"] != b"0-0" and before["last-delivered-id"].decode() > found[0].first
        await redis.xgroup_delconsumer(key, "billing", "billing-0")
        (group,) = await read_groups(redis, prefix=prefix)
        assert group.consumers == [] and group.is_deserted, "silbo-retry does not count"
        assert (await silbo("rewind", "billing", "--since", "1h", *where, "--yes")).code == 0


async def test_what_can_not_be_is_told(redis: Redis, redis_url: str, prefix: str) -> None:
    """A misspelt group; no message since then; a question that nobody can answer. Nothing is done."""
    where = ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(message(0))
        await numbers(streams, "billing", 1)
    misspelt, later, asked = await asyncio.gather(
        silbo("rewind", "biling", "--since", "1h", *where, "--yes"),
        silbo("rewind", "billing", "--since", "2999-01-01", *where, "--yes"),
        silbo("rewind", "billing", "--since", "1h", *where),
    )
    assert misspelt.code == 1 and f"there is no group biling at {prefix}:{{events}}" in misspelt.err
    assert later.code == 1 and "nothing comes again: billing was given no message since 2999-01-01" in later.err
    assert asked.code == 2 and "Give billing 1 message again, all since 20" in asked.err
    (group,) = await read_groups(redis, prefix=prefix)
    assert group.lag == 0
