"""`silbo shards change`, and what the others say of an address that is closed for a change."""

from __future__ import annotations

import asyncio
import signal
import sys

from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from tests.support.command_line import message, silbo
from tests.support.redis_streams import opened


async def publish(redis: Redis, prefix: str, shards: int, *numbers: int) -> None:
    async with RedisStreams(redis, app="web", prefix=prefix, shards=shards) as streams:
        await streams.publish(*(message(n, key=n) for n in numbers))


async def test_number_is_changed_by_one_command(redis: Redis, redis_url: str, prefix: str) -> None:
    """It asks first; programs that say the new number publish then."""
    await publish(redis, prefix, 4, *range(8))
    arguments = ("shards", "change", "events", "8", "--redis", redis_url, "--prefix", prefix)
    asked = await silbo(*arguments)
    assert asked.code == 2 and "from 4 to 8 shards? Meanwhile publishes to it are refused" in asked.err
    done = await silbo(*arguments, "--yes", "--json")
    assert (done.code, done.object) == (0, {"address": "events", "shards": 8, "before": 4})
    await publish(redis, prefix, 8, 9)


async def test_change_that_is_stopped_says_how_to_go_on(redis: Redis, redis_url: str, prefix: str) -> None:
    """It says what it waits for; the address stays closed, which `groups` and `doctor` can say, and the former number opens it."""
    await publish(redis, prefix, 2, 1)
    async with (
        RedisStreams(redis, app="web", prefix=prefix) as streams,
        opened(streams.group("billing", start="oldest")),
    ):
        options = ("--redis", redis_url, "--prefix", prefix)
        change = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "silbo", "shards", "change", "events", "4", "--yes", *options),
            stderr=asyncio.subprocess.PIPE,
        )
        assert change.stderr is not None
        assert b"waiting for billing at" in await asyncio.wait_for(change.stderr.readline(), 30)
        change.send_signal(signal.SIGINT)
        _, told = await asyncio.wait_for(change.communicate(), 30)
        assert b"'events' stays closed, and publishes to it are refused" in told
        assert b"silbo shards change events 2, which opens it as it was" in told
        groups, doctor = await asyncio.gather(
            silbo("groups", "events", *options, "--json"), silbo("doctor", *options, "--json")
        )
        assert {each["group"] for each in groups.objects} == {"billing"}
        (closed,) = [each for each in doctor.objects if each["check"] == f"{prefix}:{{events}}"]
        assert closed["level"] == "danger" and "closed for a change of its 2 shards" in closed["text"]
        assert "waits for billing at" in closed["text"] and "shards change" in closed["mend"]


async def test_mistakes_are_told(redis: Redis, redis_url: str, prefix: str) -> None:
    await publish(redis, prefix, 2, 1)
    options = ("--redis", redis_url, "--prefix", prefix, "--yes")
    none, shard, many = await asyncio.gather(
        silbo("shards", "change", "orders", "4", *options),
        silbo("shards", "change", "events.1", "4", *options),
        silbo("shards", "change", "events", "2000", *options),
    )
    assert none.code == 1 and "there is no stream" in none.err
    assert shard.code == 1 and "is one of the 2 shards of 'events'" in shard.err
    assert many.code == 2 and "from 2 to 1024" in many.err
