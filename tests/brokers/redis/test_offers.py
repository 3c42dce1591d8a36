"""Deliveries that a consumer leaves to the others of its group."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.brokers.redis import group as claiming
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import eventually, message, number, opened, receive

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"
LONG = 30.0
"""Seconds after which a silent consumer's deliveries are claimed: longer than any of these tests."""


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read claims, where it would do so every ten seconds."""
    receive = claiming.StreamReceiver.receive

    async def receive_and_claim(self: claiming.StreamReceiver, limit: int) -> Sequence[Delivery | Gap]:
        for upkeep in self._upkeep.values():
            upkeep._claim_at = float("-inf")
        return await receive(self, limit)

    monkeypatch.setattr(claiming.StreamReceiver, "receive", receive_and_claim)


async def deliveries(receiver: Receiver, many: int) -> list[Delivery]:
    items = await receive(receiver, many)
    return [item for item in items if isinstance(item, Delivery)]


async def test_offered_deliveries_are_for_others_at_once_and_in_order(streams: RedisStreams) -> None:
    """However long a silent consumer is waited for; the one that offered them does not get them back."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(5)))
        taken = await deliveries(one, 5)
        offered = await one.offer(*taken[1:4])
        assert all(seconds is not None for seconds in offered)
        for _ in range(2):  # it claims them itself, for they count as idle, and gives them back
            assert not await one.receive(9)
        assert not await one.keep(taken[0], taken[4])
        got = await deliveries(other, 3)
        assert [(number(item), item.attempt) for item in got] == [(1, 2), (2, 2), (3, 2)]
        assert not await other.receive(9)
        assert list(await one.offer(*taken[1:4])) == [None] * 3
        await other.ack(*got)
        assert await one.keep(*taken) == taken[1:4]


async def test_offers_over_many_pages(streams: RedisStreams) -> None:
    """A call offers a hundred: the answers belong to their deliveries all the same."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(250)))
        taken = await deliveries(one, 250)
        await one.ack(*taken[100:120])
        offered = await one.offer(*taken)
        assert [index for index, seconds in enumerate(offered) if seconds is None] == list(range(100, 120))
        got = await deliveries(other, 230)
        assert [number(item) for item in got] == [*range(100), *range(120, 250)]


async def test_the_wait_is_counted_from_the_groups_first_offer(streams: RedisStreams, admin: Redis) -> None:
    """By Redis's clock, whichever consumer has it; and it ends as a dead letter that may be tried anew."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(message(1))
        (taken,) = await deliveries(one, 1)
        assert await one.offer(taken) == [0.0]
        now = await admin.time()
        await admin.zadd("silbo:{events}:offered:billing", {taken.id: now[0] * 1000 - 60_000})
        (claimed,) = await deliveries(other, 1)
        assert await one.offer(taken) == [None]
        (waited,) = await other.offer(claimed)
        assert waited is not None and 60 <= waited < 600
        assert 0 < await admin.pttl("silbo:{events}:offered:billing") <= 86_400_000
        assert await other.bury(claimed, error="nobody", attempts=0)
        assert await other.offer(claimed) == [None]
        async with DeadLetters(admin) as dead:
            await dead.retry(group="billing")
        (again,) = await deliveries(one, 1)
        (waited,) = await one.offer(again)
        assert waited is not None and waited < 60


async def read_after_a_break(receiver: Receiver, admin: Redis) -> list[int]:
    """Break all connections, and read on over another; the numbers of what comes."""
    await admin.client_kill_filter(_type="normal", skipme=True)
    return await read_again(receiver)


async def read_again(receiver: Receiver) -> list[int]:
    read: list[int] = []

    async def reads() -> bool:
        try:
            items = await receiver.receive(9)
        except BrokerUnavailable:
            return False
        read.extend(map(number, items))
        return True

    await eventually(reads, 30)
    return read


async def test_what_is_kept_again_is_offered_no_more(streams: RedisStreams, admin: Redis) -> None:
    """It is in work here; and what another has done meanwhile is not taken back."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(one, 3)
        await one.offer(*taken)
        assert not await one.keep(taken[2])
        got = await deliveries(other, 2)
        assert [number(item) for item in got] == [0, 1] and not await other.receive(9)
        await other.ack(got[0])
        assert await one.keep(*taken) == taken[:2]
        await read_after_a_break(one, admin)
        await one.receive(9)
        assert 2 not in [*await read_again(other), *map(number, await other.receive(9))]


async def test_lost_connection_brings_no_offered_delivery_again(streams: RedisStreams, admin: Redis) -> None:
    """Pending messages are read again; their consumer has them still, and others may take them."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one:
        await streams.publish(*map(message, range(2)))
        taken = await deliveries(one, 2)
        await one.offer(taken[0])
        assert await read_after_a_break(one, admin) in ([], [1])
        assert 0 not in map(number, await one.receive(9))
        async with opened(group) as other:
            assert [number(item) for item in await deliveries(other, 1)] == [0]
        assert await one.offer(taken[0]) == [None]


async def test_offered_entries_survive_their_group(streams: RedisStreams, admin: Redis) -> None:
    """A group that was deleted and made again has forgotten them: they come back into the hand that had them."""
    group = streams.group("billing", start="new", claim_after=LONG)
    async with opened(group) as one:
        await streams.publish(*map(message, range(2)))
        taken = await deliveries(one, 2)
        await one.offer(taken[0])
        await admin.xgroup_destroy(KEY, "billing")

        async def has_both() -> bool:
            await one.receive(9)
            rows = await admin.xpending_range(KEY, "billing", "-", "+", 10)
            return [row["message_id"].decode() for row in rows] == [item.id for item in taken]

        await eventually(has_both, 30)
        (seconds,) = await one.offer(taken[0])
        assert seconds is not None
        async with opened(group) as other:
            assert [number(item) for item in await deliveries(other, 1)] == [0]
