"""The count of what a group was given: right after a restart of Redis, and a gap only where something was missed.

Until 7.4, Redis forgets a part of that count when it comes back from its append-only file, and a replica never has it. The
``stale`` tests put Redis into that state.
"""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis import group as reading
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import eventually, message, number, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read without messages ends soon."""
    monkeypatch.setattr(reading, "BLOCK", 0.05)


async def counts(admin: Redis) -> bool:
    """Return True if this Redis counts what a group has read."""
    return int((await admin.info("server"))["redis_version"].split(".")[0]) >= 7


async def lag(admin: Redis) -> int | None:
    (group,) = await admin.xinfo_groups(KEY)
    found: int | None = group.get("lag")
    return found


async def read(receiver: Receiver, many: int) -> list[int]:
    items = await receive(receiver, many)
    await receiver.ack(*[item for item in items if isinstance(item, Delivery)])
    return [number(item) for item in items]


async def restart(own_redis: RedisServer, admin: Redis) -> None:
    await admin.connection_pool.disconnect()
    own_redis.kill()
    own_redis.restart()


async def forget_count(admin: Redis) -> None:
    """Make Redis show what 7.0 shows after a restart: the place of the group, and a number from long ago."""
    (group,) = await admin.xinfo_groups(KEY)
    await admin.execute_command("XGROUP", "SETID", KEY, "billing", group["last-delivered-id"], "ENTRIESREAD", 0)


async def idle(receiver: Receiver, times: int = 3) -> list[Gap | Delivery]:
    """Return the deliveries that come while nothing is published, over several reads."""
    return [item for _ in range(times) for item in await receiver.receive(10)]


@pytest.mark.parametrize("start", ["oldest", "new"])
@pytest.mark.parametrize("what", ["restart", "stale"])
async def test_lag_is_right_again_after_the_next_read(
    what: str, start: str, own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """KEDA and alarms read it: with a wrong one a group that has read everything would look behind for ever."""
    if not await counts(admin):
        return
    async with RedisStreams(streams_client, app="web") as streams:
        await streams.publish(*map(message, range(2)))
        group = streams.group("billing", start=start)
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(5)))
            await read(receiver, 5 + 2 * (start == "oldest"))
    await (restart(own_redis, admin) if what == "restart" else forget_count(admin))
    async with (
        RedisStreams(streams_client, app="web") as streams,
        opened(streams.group("billing", start=start)) as receiver,
    ):
        await streams.publish(*map(message, range(5, 8)))
        assert await read(receiver, 3) == [5, 6, 7]
        assert await idle(receiver) == []
        assert await lag(admin) == 0
        await streams.publish(message(8))
        assert await lag(admin) == 1
        assert await read(receiver, 1) == [8]


async def test_lag_is_right_again_for_a_consumer_that_lives_on(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    if not await counts(admin):
        return
    async with (
        RedisStreams(streams_client, app="web") as streams,
        opened(streams.group("billing", start="new")) as receiver,
    ):
        await streams.publish(*map(message, range(5)))
        await read(receiver, 5)
        await restart(own_redis, admin)
        await forget_count(admin)

        async def is_back() -> bool:
            await receiver.receive(10)
            return True

        with pytest.raises(BrokerUnavailable):
            await receiver.receive(10)
        await eventually(is_back, 30)
        assert await idle(receiver) == []
        assert await lag(admin) == 0


@pytest.mark.parametrize("what", ["restart", "stale"])
async def test_group_that_was_given_everything_is_told_no_gap(
    what: str, own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """Although all of that is trimmed by the time the next message comes."""
    async with RedisStreams(streams_client, app="web") as streams:
        group = streams.group("billing", start="oldest")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(10)))
            await read(receiver, 10)
    if what == "restart":
        await restart(own_redis, admin)
    elif await counts(admin):
        await forget_count(admin)
    await admin.xtrim(KEY, maxlen=0, approximate=False)
    async with (
        RedisStreams(streams_client, app="web") as streams,
        opened(streams.group("billing", start="oldest")) as receiver,
    ):
        await streams.publish(message(10))
        assert await read(receiver, 1) == [10]
        assert await idle(receiver) == []


async def test_gap_is_told_where_something_was_missed_while_the_count_is_stale(
    admin: Redis, streams_client: Redis
) -> None:
    """With the count: where the group stood was noted beside the stream."""
    async with RedisStreams(streams_client, app="web", retain=0.4) as streams:
        group = streams.group("billing", start="oldest")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(10)))
            await read(receiver, 3)
        if is_counted := await counts(admin):
            await forget_count(admin)
        await asyncio.sleep(0.5)
        await streams.publish(message(10))
        async with opened(group) as receiver:
            gap, ten = await receive(receiver, 2)
            assert isinstance(gap, Gap)
            assert (gap.count, number(ten)) == (7 if is_counted else None, 10)
            assert await idle(receiver) == []
            assert await lag(admin) == (0 if is_counted else None)


async def test_count_that_is_in_doubt_names_no_number(admin: Redis, streams_client: Redis) -> None:
    """The group went on after the last note, and its count went back: what it missed can't be known."""
    async with RedisStreams(streams_client, app="web", retain=0.4) as streams:
        group = streams.group("billing", start="oldest")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(10)))
            await read(receiver, 3)
        ((_, entries),) = await admin.xreadgroup("billing", "other", {KEY: ">"}, count=2)
        await admin.xack(KEY, "billing", *[entry_id for entry_id, _ in entries])
        if await counts(admin):
            await forget_count(admin)
        await asyncio.sleep(0.5)
        await streams.publish(message(10))
        async with opened(group) as receiver:
            gap, ten = await receive(receiver, 2)
            assert isinstance(gap, Gap)
            assert (gap.count, number(ten)) == (None, 10)
            assert await idle(receiver) == []


async def test_group_made_again_begins_with_a_new_count(admin: Redis, streams: RedisStreams) -> None:
    """A note of the deleted group of that name does not count."""
    for start in ("oldest", "new"):
        async with opened(streams.group("billing", start=start)) as receiver:
            await streams.publish(*map(message, range(3)))
            await read(receiver, 3)
            assert await idle(receiver) == []
        await admin.delete(KEY)
    async with opened(streams.group("billing", start="oldest")) as receiver:
        await streams.publish(message(1))
        assert await read(receiver, 1) == [1]
        assert await admin.hvals(f"{KEY}:given") == []
        if await counts(admin):
            assert await lag(admin) == 0


async def test_group_behind_the_retention_gets_one_gap_and_then_what_is_left(
    admin: Redis, streams_client: Redis
) -> None:
    """Also if that is old, too, as after a quiet time: it is there, and is read."""
    async with RedisStreams(streams_client, app="web", retain=0.4) as streams:
        group = streams.group("billing", start="oldest")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(4)))
            await read(receiver, 4)
        await streams.publish(*map(message, range(4, 8)))
        await asyncio.sleep(0.5)
        await streams.publish(message(8), message(9))
        await asyncio.sleep(0.5)
        async with opened(group) as receiver, opened(group) as other:
            gap, *rest = await receive(receiver, 3)
            assert isinstance(gap, Gap)
            assert [number(item) for item in rest] == [8, 9]
            assert await idle(receiver) == await idle(other) == []


async def test_gap_that_redis_can_not_note_is_told_once(admin: Redis, streams_client: Redis) -> None:
    """Redis 6.2 moves no group above maxmemory. What is left is read all the same."""
    async with RedisStreams(streams_client, app="web", retain=0.4) as streams:
        group = streams.group("billing", start="oldest")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(4)))
            await read(receiver, 4)
            await streams.publish(*map(message, range(4, 8)))
            await asyncio.sleep(0.5)
            await streams.publish(message(8))
            await admin.config_set("maxmemory", 1)
            gap, eight = await receive(receiver, 2)
            assert isinstance(gap, Gap)
            assert number(eight) == 8
            assert await idle(receiver) == []


async def test_idle_group_notes_where_it_is(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its consumer is killed, which notes nothing at its end."""
    if not await counts(admin):
        return
    monkeypatch.setattr(reading, "IDLE_LOOK_EVERY", 0.0)
    async with opened(streams.group("billing", start="new", claim_after=60)) as receiver:
        await streams.publish(message(1), message(2))
        await read(receiver, 2)
        assert await idle(receiver, 2) == []
        ((last, _),) = await admin.xrevrange(KEY, count=1)
        assert await admin.hgetall(f"{KEY}:given") == {b"billing": last + b":2"}
