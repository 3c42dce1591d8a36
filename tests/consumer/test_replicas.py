"""Three replicas of one program, real processes on a real Redis; and what others see of what it sends."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, EventName, NotificationEvent
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.message import Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import DIATOR, JSON

ROOT = Path(__file__).resolve().parents[2]
EVENTS = 40


async def effects(redis: Redis, redis_url: str, prefix: str, own: str) -> Counter[str]:
    """How often each event had its effect, in three replicas that dispatch, and with one event from another app."""
    arguments = [redis_url, prefix]
    processes = [
        await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "tests.support.replica_process", *arguments, str(number), own, str(EVENTS)],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        for number in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"dispatched\n"
        other = NotificationEvent()
        other.__dict__["number"] = "other"
        message = to_message(other, name="order.placed", kind="notification")
        await redis.xadd(f"{prefix}:{{events}}", {"message": JSON.encode(message, Origin("billing", "elsewhere"))})
        stream, group = f"{prefix}:{{events}}", "shop"
        last = (await redis.xinfo_stream(stream))["last-generated-id"]
        async with asyncio.timeout(30):
            while True:
                (info,) = await redis.xinfo_groups(stream)
                if info["last-delivered-id"] == last and info["pending"] == 0 and info["name"] == group.encode():
                    break
                await asyncio.sleep(0.02)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
        codes = [await process.wait() for process in processes]
    assert codes == [0, 0, 0]
    return Counter(line.decode().split()[1] for line in await redis.lrange(f"{prefix}:effects", 0, -1))


@pytest.mark.long
async def test_with_own_skip_each_event_has_its_effect_once(redis: Redis, redis_url: str, prefix: str) -> None:
    """Its listeners ran where it was dispatched; another app's event has its effect in one of the replicas."""
    seen = await effects(redis, redis_url, prefix, "skip")
    everything = [f"{number}-{count}" for number in range(3) for count in range(EVENTS)] + ["other"]
    assert seen == Counter(everything)


@pytest.mark.long
async def test_with_own_handle_the_listeners_run_once_more(redis: Redis, redis_url: str, prefix: str) -> None:
    """A program that is its own background worker: where it was dispatched, and in one replica."""
    seen = await effects(redis, redis_url, prefix, "handle")
    assert {count for number, count in seen.items() if number != "other"} == {2} and seen["other"] == 1


# -- what others see -----------------------------------------------------------------------------------------


@dataclass
class UserChanged(ECSTEvent):
    user_id: int
    name_: str


USER_CHANGED = EventName("user.changed", UserChanged, key="user_id", version=3)


@pytest.fixture
async def listening(redis: Redis, prefix: str) -> AsyncIterator[PubSub]:
    async with redis.pubsub() as pubsub:
        await pubsub.psubscribe(f"{prefix}:*", f"{prefix}-diator:ecst_event:*")
        for _ in range(2):
            await pubsub.get_message(timeout=5)
        yield pubsub


async def test_a_bare_subscriber_and_xrange_show_the_documented_bytes(
    redis: Redis, prefix: str, listening: PubSub
) -> None:
    """No silbo is needed to read what silbo sends: JSON with five keys, in this order."""
    dispatcher = AsyncEventDispatcher()
    async with (
        RedisPubSub(redis, app="web", prefix=prefix) as pubsub,
        RedisStreams(redis, app="web", prefix=prefix) as s,
    ):
        dispatcher.add_subscriber(Bridge(pubsub))
        dispatcher.add_subscriber(Bridge(s))
        event = await dispatcher.adispatch(USER_CHANGED, UserChanged(7, "Ana"))
        message = await listening.get_message(timeout=5)
        ((_, fields),) = await redis.xrange(f"{prefix}:{{events}}")
    assert message["channel"].decode() == f"{prefix}:ecst_event:user.changed"
    when = event.event_timestamp.strftime("%Y-%m-%dT%H:%M:%S")
    documented = (
        rf'{{"message_type":"ecst_event","message_name":"user\.changed","message_id":"{event.event_id}","payload":'
        rf'{{"event_id":"{event.event_id}","event_timestamp":"{when}(\.\d{{1,6}})?Z","user_id":7,"name_":"Ana"}},'
        r'"headers":{"app":"web","instance":"[0-9a-f]{32}","publication":"[0-9a-f]{32}-\d+","version":"3","key":"7"}}'
    )
    for raw in (message["data"], fields[b"message"]):
        assert re.fullmatch(documented, raw.decode()), raw


async def test_a_bare_diator_subscriber_reads_the_diator_format(redis: Redis, prefix: str, listening: PubSub) -> None:
    """Four keys, the class's name, a naive time, a channel for each message."""
    dispatcher = AsyncEventDispatcher()
    diator = type(DIATOR)(prefix=f"{prefix}-diator")
    async with RedisPubSub(redis, app="web", prefix=prefix, format=diator) as pubsub:
        dispatcher.add_subscriber(Bridge(pubsub))
        event = await dispatcher.adispatch(USER_CHANGED, UserChanged(7, "Ana"))
        message = await listening.get_message(timeout=5)
    assert message["channel"].decode() == f"{prefix}-diator:ecst_event:{event.event_id}"
    read = json.loads(message["data"])
    assert list(read) == ["message_type", "message_name", "message_id", "payload"]
    assert read["message_name"] == "UserChanged"
    assert read["payload"]["event_timestamp"] == event.event_timestamp.replace(tzinfo=None).isoformat()
