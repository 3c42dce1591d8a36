"""A program's clock does not decide who has a message: Redis's does."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from tests.support.redis_streams import message, number, opened, receive

pytestmark = pytest.mark.every_redis


@pytest.fixture(params=[3600.0, -3600.0], ids=["an hour ahead", "an hour behind"])
def wind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Winds the clock of this process."""
    right = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: right() + request.param)


async def test_clock_that_jumps_takes_nothing_from_others_and_leaves_nothing(
    redis: Redis, prefix: str, wind: Callable[[], None]
) -> None:
    """A healthy consumer keeps what it has in hand; the entries of a silent one are taken over after the usual time."""

    def group(name: str, claim_after: float) -> object:
        streams = RedisStreams(redis, app="shop", prefix=prefix)
        return streams.group("billing", start="oldest", consumer=name, claim_after=claim_after)

    streams = RedisStreams(redis, app="web", prefix=prefix)
    async with streams, opened(group("first", 3600.0)) as first:
        await streams.publish(message(1))
        assert [number(item) for item in await receive(first, 1)] == [1]
        wind()
        await streams.publish(message(2))
        async with opened(group("second", 3000.0)) as second:  # less than the hour
            assert [number(item) for item in await receive(second, 1)] == [2]
            assert await second.receive(10) == []
        async with opened(group("third", 0.2)) as third:  # `second` gave up what it had
            taken = await receive(third, 2)
            assert sorted(number(item) for item in taken) == [1, 2]
            await third.ack(*taken)  # type: ignore[arg-type]
