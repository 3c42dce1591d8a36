"""A program's clock does not decide who has a message: Redis's does, also where it is set back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import Gap
from silbo.message import Delivery
from tests.support.faketime import require_faketime
from tests.support.redis_streams import eventually, message, number, opened, receive
from tools.redis_binary import PACKAGE, Binary, find_binary
from tools.redis_server import RedisServer

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


MANY = 150
"""More entries than one call looks at."""


@dataclass(frozen=True)
class WoundRedis:
    """A Redis whose clock can be set."""

    server: RedisServer
    setting: Path

    def wind(self, by: str) -> None:
        """Set the clock, as in "-1h"."""
        self.setting.write_text(by)


@pytest.fixture
def wound_redis(redis_binary: Binary | None, tmp_path: Path) -> Iterator[WoundRedis]:
    library = require_faketime()
    binary = redis_binary or find_binary()
    if PACKAGE.parts[0] in binary.path.parts:
        pytest.skip("Debian's redis-server 7.0 hangs at its start under faketime")
    setting, program = tmp_path / "clock", tmp_path / "redis-server"
    setting.write_text("+0")
    settings = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": setting,
        "FAKETIME_NO_CACHE": 1,
        "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        "DONT_FAKE_MONOTONIC": 1,
    }
    exports = [f"export {name}='{value}'" for name, value in settings.items()]
    program.write_text("\n".join(["#!/bin/sh", *exports, f"exec '{binary.path}' \"$@\"", ""]))
    program.chmod(0o700)
    with RedisServer(binary=replace(binary, path=program)) as server:
        yield WoundRedis(server, setting)


@pytest.fixture
async def wound_client(wound_redis: WoundRedis) -> AsyncIterator[Redis]:
    async with Redis.from_url(wound_redis.server.url) as client:
        yield client


@pytest.mark.long
@pytest.mark.parametrize("is_open", [True, False], ids=["before", "after"])
async def test_redis_clock_set_back_delays_a_take_over_by_claim_after_at_most(
    wound_redis: WoundRedis, wound_client: Redis, is_open: bool
) -> None:
    """The consumer that takes over was opened before or after; nothing is taken from a consumer that lives."""

    def group(name: str, claim_after: float) -> object:
        return RedisStreams(wound_client, app="shop").group(
            "billing", start="oldest", consumer=name, claim_after=claim_after
        )

    async with AsyncExitStack() as stack:
        streams = await stack.enter_async_context(RedisStreams(wound_client, app="web"))
        silent = await stack.enter_async_context(opened(group("silent", 600.0)))
        alive = await stack.enter_async_context(opened(group("alive", 2.0)))
        await streams.publish(*map(message, range(MANY + 1)))
        assert [number(item) for item in await receive(silent, MANY)] == [*range(MANY)]
        held = await receive(alive, 1)
        assert [number(item) for item in held] == [MANY]
        if is_open:
            heir = await stack.enter_async_context(opened(group("heir", 2.0)))
            assert await heir.receive(10) == []
            assert await heir.receive(10) == []
        wound_redis.wind("-1h")
        await eventually(lambda: is_behind(wound_client))
        if not is_open:
            heir = await stack.enter_async_context(opened(group("heir", 2.0)))
        taken: list[Delivery | Gap] = []
        async with asyncio.timeout(30):
            while len(taken) < MANY:
                assert await alive.keep(*held) == []  # type: ignore[arg-type]
                taken.extend(await heir.receive(1000))
        assert sorted(map(number, taken)) == [*range(MANY)]
        assert await alive.keep(*held) == []  # type: ignore[arg-type]


async def is_behind(client: Redis) -> bool:
    """True if Redis's clock is behind this machine's."""
    return bool((await client.time())[0] < time.time() - 1800)


async def test_redis_clock_set_back_lets_an_offer_begin_anew(wound_redis: WoundRedis, wound_client: Redis) -> None:
    """An offered message is not offered for the time that the clock was set back, too; nor is its time up at once."""
    async with RedisStreams(wound_client, app="web") as streams:
        await streams.publish(message(1))
        group = streams.group("billing", start="oldest", claim_after=600.0)
        async with opened(group) as receiver:
            (delivery,) = await receive(receiver, 1)
            assert isinstance(delivery, Delivery)
            await receiver.offer(delivery)
            wound_redis.wind("-1h")
            await eventually(lambda: is_behind(wound_client))
            await receiver.offer(delivery)

            async def ages() -> bool:
                return bool((await receiver.offer(delivery))[0])

            await eventually(ages)
