"""Two live consumers under one name of a group are noticed, and both tell; a restart is not told."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams, signs_of_life
from silbo.brokers.redis import group as reading
from silbo.protocols import Receiver
from tests.support.redis_streams import message, opened, receive

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign with each read, and reads that end soon."""
    monkeypatch.setattr(signs_of_life, "SIGN_EVERY", 0.0)
    monkeypatch.setattr(reading, "BLOCK", 0.05)


async def read(*receivers: Receiver, times: int = 3) -> None:
    """Read in turn: each has given its sign between two of the others."""
    for _ in range(times):
        for receiver in receivers:
            await receiver.receive(1)


def told(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if "two live consumers" in record.getMessage()]


async def test_two_live_consumers_of_one_name_both_tell_once(
    streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """With the name, and with what to do about it; not again at each sign."""
    group = streams.group("billing", start="new", consumer="pod-1", claim_after=0.4)
    async with opened(group) as one, opened(group) as other:
        await read(one)
        assert not told(caplog)
        await read(one, other)
        assert [(record.address, record.group, record.consumer) for record in told(caplog)] == [
            (KEY, "billing", "pod-1")
        ] * 2
        assert "a name of its own" in told(caplog)[0].getMessage()
        assert {record.levelno for record in told(caplog)} == {logging.WARNING}


async def test_consumer_without_room_is_noticed_too(streams: RedisStreams, caplog: pytest.LogCaptureFixture) -> None:
    """It does not read while its listeners are slow, but it keeps what it has in hand."""
    group = streams.group("billing", start="new", consumer="pod-1", claim_after=0.4)
    async with opened(group) as one, opened(group) as other:
        await one.receive(1)
        await other.receive(1)
        await one.keep()
        assert len(told(caplog)) == 1
        await other.keep()
        assert len(told(caplog)) == 2


@pytest.mark.parametrize("how", ["killed", "closed"])
async def test_restart_under_the_same_name_is_not_told(
    how: str, admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """However quick: the sign of the one before is there, but no new one comes."""
    group = streams.group("billing", start="new", consumer="pod-1", claim_after=0.4)
    for _ in range(3):
        receiver: Any = await group.open()
        await read(receiver)
        if how == "killed":  # it says no goodbye
            await receiver._drop()
            await receiver._in_hand.aclose()
        else:
            await receiver.aclose()
            assert await admin.exists(f"{KEY}:live:billing") == 0
    assert not told(caplog)


async def test_lost_connection_is_not_told(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """The same consumer comes back."""
    async with opened(streams.group("billing", start="new", consumer="pod-1")) as receiver:
        for _ in range(3):
            await read(receiver)
            await receiver._drop()  # type: ignore[attr-defined]
    assert not told(caplog)


async def test_sign_that_a_failover_brings_back_is_not_told(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """The new master may know the consumer before, and not this one yet."""
    async with opened(streams.group("billing", start="new", consumer="pod-1")) as receiver:
        await read(receiver)
        seconds, _ = await admin.time()
        await admin.hset(f"{KEY}:live:billing", "pod-1", f"another {seconds * 1000 - 10_000}")
        await read(receiver)
    assert not told(caplog)


async def test_one_name_in_two_groups_or_streams_is_two_consumers(
    streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        opened(streams.group("billing", start="new", consumer="pod-1", claim_after=0.4)) as one,
        opened(streams.group("audit", start="new", consumer="pod-1", claim_after=0.4)) as two,
        opened(streams.group("billing", start="new", consumer="pod-1", claim_after=0.4, streams=["other"])) as three,
    ):
        await read(one, two, three)
    assert not told(caplog)


async def test_consumers_without_a_name_leave_no_sign(admin: Redis, streams: RedisStreams) -> None:
    """Their names never meet, and each would leave a sign for ever."""
    async with opened(streams.group("billing", start="new", claim_after=0.4)) as receiver:
        await read(receiver)
        await receiver.keep()
        assert await admin.exists(f"{KEY}:live:billing") == 0


async def test_full_redis_does_not_matter(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes no signs; then nothing is noticed, and reading goes on."""
    async with opened(streams.group("billing", start="new", consumer="pod-1", claim_after=0.4)) as receiver:
        await read(receiver)
        await streams.publish(message(1))
        await admin.config_set("maxmemory", 1)
        assert len(await receive(receiver, 1)) == 1
        await read(receiver)
        await admin.config_set("maxmemory", 0)
    assert not told(caplog)


async def test_signs_go_with_the_consumers(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names from outside (of pods, of hosts) do not pile up."""
    monkeypatch.setattr(reading, "FORGET_AFTER", 0.2)
    group = streams.group("billing", start="new", consumer="old", claim_after=0.01)
    receiver: Any = await group.open()
    await read(receiver)
    await receiver._drop()
    await receiver._in_hand.aclose()
    await admin.hset(f"{KEY}:live:billing", mapping={"!old": "1", "! old": "1 web-1:12:0f web-2:13:0f"})
    async with opened(streams.group("billing", start="new", consumer="me", claim_after=0.01)) as living:
        async with asyncio.timeout(30):
            while b"old" in await admin.hkeys(f"{KEY}:live:billing"):
                await living.receive(1)
        assert await admin.hkeys(f"{KEY}:live:billing") == [b"me"]
