"""Scripts that Redis has forgotten, and groups that were made again: nothing that is handled comes again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import DeadLetters, RedisInbox, RedisPubSub, RedisStreams
from silbo.brokers.redis import group as reading
from silbo.brokers.redis.connection import Connection
from silbo.message import Delivery
from tests.support.redis_streams import message, number, opened, receive

pytestmark = pytest.mark.every_redis
KEY, DEAD = "silbo:{events}", "silbo:{events}:dead"


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read without messages ends soon."""
    monkeypatch.setattr(reading, "BLOCK", 0.05)


@pytest.fixture
def distant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reply takes a moment, in which other calls are made."""
    read = Connection.read

    async def read_later(self: Connection, timeout: float | None = None) -> Any:
        await asyncio.sleep(0.01)
        return await read(self, timeout)

    monkeypatch.setattr(Connection, "read", read_later)


async def pending(admin: Redis, group: str = "billing") -> list[str]:
    return [row["message_id"].decode() for row in await admin.xpending_range(KEY, group, "-", "+", 1000)]


async def deliveries(receiver: Any, many: int) -> list[Delivery]:
    return [item for item in await receive(receiver, many) if isinstance(item, Delivery)]


@pytest.mark.usefixtures("distant")
@pytest.mark.parametrize("later", ["ack", "bury", "count and ack"])
async def test_later_call_does_not_overtake_one_that_is_repeated(
    later: str, admin: Redis, streams: RedisStreams
) -> None:
    """To keep it after it was acknowledged would take it back. The later one is known: another consumer has brought it."""
    groups = [streams.group(name, start="new") for name in ("billing", "audit")]
    async with opened(groups[0]) as receiver, opened(groups[1]) as other:
        for n in range(3):
            await streams.publish(message(n))
            (delivery,) = await deliveries(receiver, 1)
            (its_own,) = await deliveries(other, 1)
            await admin.script_flush()
            await other.count(its_own)
            await other.bury(its_own, error="no", attempts=1)
            await other.ack(its_own)
            keeping = asyncio.ensure_future(receiver.keep(delivery))
            await asyncio.sleep(0)
            if later == "ack":
                await receiver.ack(delivery)
            elif later == "bury":
                await receiver.bury(delivery, error="no", attempts=1)
            else:
                counting = asyncio.ensure_future(receiver.count(delivery))
                await asyncio.sleep(0)
                await receiver.ack(delivery)
                await counting
            assert await keeping == []
            assert await pending(admin) == []


@pytest.mark.parametrize("how", ["ack", "bury"])
async def test_group_made_again_does_not_take_back_what_is_being_done(
    how: str, admin: Redis, streams: RedisStreams
) -> None:
    """The acknowledgement has been carried out, and its answer is on its way, when the group is deleted and made again."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1), message(2))
        one, two = await deliveries(receiver, 2)
        in_hand: Any = receiver._in_hand  # type: ignore[attr-defined]
        run, done, answered = in_hand._run, asyncio.Event(), asyncio.Event()

        async def run_until_answered(*arguments: Any, **options: Any) -> Any:
            replies = await run(*arguments, **options)
            done.set()
            await answered.wait()
            return replies

        in_hand._run = run_until_answered
        call = receiver.ack(one) if how == "ack" else receiver.bury(one, error="no", attempts=1)
        task = asyncio.ensure_future(call)
        await done.wait()
        in_hand._run = run
        await admin.xgroup_destroy(KEY, "billing")
        (gap,) = await receive(receiver, 1)
        assert "made again" in str(gap)
        answered.set()
        await task
        assert await pending(admin) == [two.id]


async def test_what_is_acknowledged_while_it_is_kept_is_in_no_hand(streams: RedisStreams) -> None:
    """Or it would be taken back with the next group that is made again, and never be forgotten."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1), message(2))
        one, two = await deliveries(receiver, 2)
        in_hand: Any = receiver._in_hand  # type: ignore[attr-defined]
        in_hand._confirmed_at[two.address, two.id] = float("-inf")  # kept with a second call
        keep = in_hand._keep

        async def keep_and_acknowledge(*arguments: Any) -> Any:
            lost = await keep(*arguments)
            await receiver.ack(one)
            return lost

        in_hand._keep = keep_and_acknowledge
        assert await receiver.keep(one, two) == []
        assert (one.address, one.id) not in in_hand
        assert (two.address, two.id) in in_hand


async def test_every_script_is_sent_again(
    admin: Redis, streams: RedisStreams, streams_client: Redis, pubsub: RedisPubSub
) -> None:
    """At each step of a delivery, of a dead letter, of an inbox and of a publish."""
    group = streams.group("billing", start="new", consumer="pod-1", claim_after=0.05)
    flush = admin.script_flush
    await flush()
    receiver = await group.open()
    await flush()
    await streams.publish(message(1), message(2), message(3))
    await flush()
    await streams.publish_sequenced("outbox", 1, [(1, message(4))])
    await flush()
    one, two, *rest = await deliveries(receiver, 4)
    assert [number(item) for item in rest] == [3, 4]
    await flush()
    assert await receiver.count(one) == 1
    await flush()
    assert await receiver.keep(one, two, *rest) == []
    await flush()
    assert await receiver.bury(one, error="no", attempts=1)
    await flush()
    async with DeadLetters(streams_client) as dead, RedisInbox(streams_client) as inbox:
        assert (await dead.retry()).returned == 1
        await flush()
        async with inbox.handling("billing", "publication") as is_new:
            assert is_new
        async with inbox.handling("billing", "publication") as is_new:
            assert not is_new
    await flush()
    async with asyncio.timeout(30):
        while one.id not in [item.id for item in await deliveries(receiver, 1)]:
            pass
    await flush()
    await receiver.ack(one, two, *rest)
    assert await pending(admin) == []
    await flush()
    await receiver.aclose()
    await flush()
    await pubsub.publish(message(5))
