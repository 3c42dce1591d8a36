"""The lag of a group: what it was not given yet, over all of its streams."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable
from tests.support.redis_streams import message, opened, receive


async def test_lag_is_what_the_group_was_not_given(redis: Redis, prefix: str) -> None:
    """In hand is not behind; another group's lag is its own; several streams count together."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", streams=["events", "orders"], start="new")
        async with opened(group) as receiver:
            assert await group.read_lag() == 0
            await streams.publish(*(message(number) for number in range(5)))
            await receive(receiver, 5)
            assert await group.read_lag() == 0
        await streams.publish(*(message(number, to="orders") for number in range(3)), message(9))
        assert await group.read_lag() == 4
        assert await streams.group("mailing", start="new").read_lag() == 0


@pytest.mark.one_server
async def test_lag_that_cannot_be_read_is_none(redis: Redis, prefix: str) -> None:
    """Not the one of the last look: an alarm on it would be about the past."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", start="new")
        with pytest.raises(BrokerUnavailable, match="no such key"):
            await group.read_lag()
        consumer = Consumer(AsyncEventDispatcher(), group, own="handle")
        async with opened(group):
            pass
        await consumer.refresh_health()
        assert consumer.health().lag == 0
        await redis.delete(f"{prefix}:{{events}}")
        await consumer.refresh_health()
        assert consumer.health().lag is None
