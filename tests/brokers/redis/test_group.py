"""What consumers of a group do for one another: claim, keep, count, bury, take leave."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.brokers.redis import group as claiming
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import TOLERANCE, eventually, message, number, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY, ATTEMPTS, DEAD = "silbo:{events}", "silbo:{events}:attempts:billing", "silbo:{events}:dead"
SOON = 0.3
"""Seconds after which a silent consumer's deliveries are claimed."""


async def deliveries(receiver: Receiver, many: int) -> list[Delivery]:
    items = await receive(receiver, many)
    assert all(isinstance(item, Delivery) for item in items), items
    return [item for item in items if isinstance(item, Delivery)]


async def owners(admin: Redis, group: str = "billing") -> dict[str, str]:
    """Who has which entry in hand."""
    rows = await admin.xpending_range(KEY, group, "-", "+", 1000)
    return {row["message_id"].decode(): row["consumer"].decode() for row in rows}


async def consumers(admin: Redis) -> set[str]:
    return {row["name"].decode() for row in await admin.xinfo_consumers(KEY, "billing")}


# -- claim --------------------------------------------------------------------------------------------------


async def test_what_a_silent_consumer_had_is_claimed_oldest_first(admin: Redis, streams: RedisStreams) -> None:
    """And before what is new, as another attempt."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(one, 3)
        await asyncio.sleep(SOON + 0.05)
        await streams.publish(message(3))
        got = await deliveries(other, 4)
        assert [(number(item), item.attempt) for item in got] == [(0, 2), (1, 2), (2, 2), (3, 1)]
        assert [item.id for item in got[:3]] == [item.id for item in taken]
        assert len(set((await owners(admin)).values())) == 1


async def test_claiming_follows_the_cursor_past_what_is_kept(streams: RedisStreams) -> None:
    """However many entries of living consumers lie in between, and with little room in hand."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as living, opened(group) as silent, opened(group) as other:
        await streams.publish(*map(message, range(300)))
        kept = await deliveries(living, 280)
        await deliveries(silent, 20)
        got: list[int] = []

        async def has_all() -> bool:
            assert await living.keep(*kept) == []
            got.extend(map(number, await other.receive(3)))
            return len(got) >= 20

        await eventually(has_all)
        assert got == list(range(280, 300))


async def test_what_is_kept_is_never_claimed(admin: Redis, streams: RedisStreams) -> None:
    """Healthy work may take as long as it likes."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(one, 3)
        before = await owners(admin)
        loop = asyncio.get_running_loop()
        end = loop.time() + 4 * SOON
        assert one.keep_every is not None
        while loop.time() < end:
            assert await one.keep(*taken) == []
            assert await other.receive(10) == []
        assert await owners(admin) == before


async def test_keeping_does_not_take_back_what_another_has_taken_over(admin: Redis, streams: RedisStreams) -> None:
    """It tells which those are: those that the other still works on, and those that it has done."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(one, 3)
        await asyncio.sleep(SOON + 0.05)
        claimed = await deliveries(other, 2 + 1)
        await other.ack(claimed[0])
        before = await owners(admin)
        assert await one.keep(*taken) == taken
        assert await owners(admin) == before
        assert await other.keep(*claimed[1:]) == []


async def test_entries_in_hand_survive_their_group(admin: Redis, streams: RedisStreams) -> None:
    """A group that somebody deleted and made again does not know them; keeping puts them in."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(receiver, 3)
        await admin.xgroup_destroy(KEY, "billing")
        await admin.xgroup_create(KEY, "billing", "$")
        await admin.xdel(KEY, taken[1].id)
        assert await receiver.keep(*taken) == []  # what is deleted nobody else can have
        assert list(await owners(admin)) == [taken[0].id, taken[2].id]


async def test_group_that_its_consumer_makes_again_knows_what_is_in_hand_at_once(
    admin: Redis, streams: RedisStreams
) -> None:
    """Or a stop in the next seconds would lose it."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(*map(message, range(3)))
        taken = await deliveries(receiver, 3)
        await admin.xgroup_destroy(KEY, "billing")
        (gap,) = await receive(receiver, 1)
        assert isinstance(gap, Gap)
        assert list(await owners(admin)) == [item.id for item in taken]


async def test_claimed_entry_that_was_deleted_is_a_gap_once(admin: Redis, streams: RedisStreams) -> None:
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(*map(message, range(4)))
        taken = await deliveries(one, 4)
        await one.count(taken[1])
        await admin.xdel(KEY, taken[1].id, taken[2].id)
        await asyncio.sleep(SOON + 0.05)
        gap, *rest = await receive(other, 3)
        assert isinstance(gap, Gap)
        assert (gap.address, gap.count) == (KEY, 2)
        assert [number(item) for item in rest] == [0, 3]
        assert list(await owners(admin)) == [taken[0].id, taken[3].id]
        assert await admin.exists(ATTEMPTS) == 0


@pytest.mark.one_server
async def test_entry_deleted_while_it_is_in_hand_is_no_gap(admin: Redis, streams: RedisStreams) -> None:
    """After a lost connection it is not there any more, but its consumer has it."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        await admin.xdel(KEY, delivery.id)
        await admin.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(BrokerUnavailable):
            await receiver.receive(1)
        assert await receiver.receive(1) == []
        await receiver.ack(delivery)
        assert await owners(admin) == {}


@pytest.mark.parametrize("when", ["during-the-read", "before-it-is-handed-out"])
async def test_what_is_acknowledged_while_it_is_read_again_does_not_come_twice(
    when: str, admin: Redis, streams: RedisStreams
) -> None:
    """After a lost connection everything in hand is read again, while it is acknowledged over the other one."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1), message(2))
        one, two = await deliveries(receiver, 2)
        reader: Any = receiver
        await reader._drop()
        real = reader._xreadgroup

        async def overtaken(*words: Any) -> Any:
            answer = await real(*words)
            await receiver.ack(two)
            return answer

        if when == "during-the-read":
            reader._xreadgroup = overtaken
            assert [number(item) for item in await receiver.receive(2)] == [1]
        else:
            assert [number(item) for item in await receiver.receive(1)] == [1]
            reader._reread_after[KEY.encode()] = b"0"
            assert [number(item) for item in await receiver.receive(1)] == [1]
            reader._reread_after[KEY.encode()] = b"0"
            async with reader._read_lock, reader._connected("read") as connection:
                await reader._read(connection, 2)
            await receiver.ack(two)
            assert [number(item) for item in await receiver.receive(2)] == [1]
        reader._xreadgroup = real
        assert await receiver.receive(2) == []
        await receiver.ack(one)
        assert await owners(admin) == {}


# -- count and bury -----------------------------------------------------------------------------------------


async def test_last_error_is_noted_beside_the_count(admin: Redis, streams: RedisStreams) -> None:
    """For `silbo why`: an attempt that only begins leaves the error of the one before, and the count counts on."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        assert await receiver.count(delivery, error="ValueError: 2 late\n\udc80") == 1
        assert await admin.hget(ATTEMPTS, delivery.id) == b"1 ValueError: 2 late\n?"
        assert await receiver.count(delivery) == 2
        assert await admin.hget(ATTEMPTS, delivery.id) == b"2 ValueError: 2 late\n?"
        assert await receiver.count(delivery, error="KeyError: " + "x" * 1000) == 3
        assert await admin.hget(ATTEMPTS, delivery.id) == b"3 KeyError: " + b"x" * 490
        await receiver.ack(delivery)
        assert await admin.exists(ATTEMPTS) == 0


async def test_attempts_count_over_consumers_until_it_is_acknowledged(admin: Redis, streams: RedisStreams) -> None:
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(message(1), message(2))
        first, second = await deliveries(one, 2)
        assert [await one.count(first), await one.count(first), await one.count(second)] == [1, 2, 1]
        assert await admin.hgetall(ATTEMPTS) == {first.id.encode(): b"2", second.id.encode(): b"1"}
        assert 6 * 24 * 3600 < await admin.ttl(ATTEMPTS) <= 7 * 24 * 3600
        await asyncio.sleep(SOON + 0.05)
        assert [item.attempt for item in await deliveries(other, 2)] == [4, 3]
        assert await other.count(first) == 3
        await one.ack(first)
        assert await admin.hkeys(ATTEMPTS) == [second.id.encode()]
        await one.ack(second)
        assert await admin.exists(ATTEMPTS) == 0


async def test_count_whose_answer_is_lost_counts_once(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """An outage must not bury an innocent message."""
    async with (
        RedisStreams(streams_client, app="web", timeout=0.3) as streams,
        opened(streams.group("billing", start="new")) as receiver,
    ):
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        assert await receiver.count(delivery) == 1
        for _ in range(3):
            counting = asyncio.ensure_future(receiver.count(delivery))
            await eventually(lambda: _is(admin, delivery.id, 2))
            own_redis.pause()
            await asyncio.wait([counting])
            own_redis.resume()
            if not counting.exception():  # answered before the freeze: so forget that it was
                receiver._in_hand._attempts[delivery.address, delivery.id] = 1  # type: ignore[attr-defined]
        assert await receiver.count(delivery) == 2
        assert await receiver.count(delivery) == 3


async def test_count_of_what_another_takes_over_meanwhile_is_answered(streams: RedisStreams) -> None:
    """A consumer that was slow goes on, whatever others did with what it had in hand."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(message(1))
        (delivery,) = await deliveries(one, 1)
        await asyncio.sleep(SOON + 0.05)
        await deliveries(other, 1)
        assert await asyncio.gather(one.count(delivery), one.keep(delivery)) == [1, [delivery]]


async def _is(admin: Redis, entry_id: str, attempts: int) -> bool:
    return bool(await admin.hget(ATTEMPTS, entry_id) == b"%d" % attempts)


async def test_dead_letter_says_everything_and_is_acknowledged(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new", consumer="pod-1")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        await receiver.count(delivery)
        assert await receiver.bury(delivery, error="ValueError: no \udc00", attempts=5)
        ((_, fields),) = await admin.xrange(DEAD)
        seconds, _ = await admin.time()
        assert abs(int(fields.pop(b"time")) / 1000 - seconds) < 5
        assert fields == {
            b"message": delivery.raw,
            b"group": b"billing",
            b"stream": KEY.encode(),
            b"id": delivery.id.encode(),
            b"error": b"ValueError: no ?",
            b"attempts": b"5",
            b"app": b"web",
            b"consumer": b"pod-1",
        }
        assert await owners(admin) == {}
        assert await admin.exists(ATTEMPTS) == 0
        assert not await receiver.bury(delivery, error="again", attempts=5)
        assert await admin.xlen(DEAD) == 1


async def test_what_is_anothers_by_now_is_not_buried(admin: Redis, streams: RedisStreams) -> None:
    """The other may well succeed."""
    group = streams.group("billing", start="new", claim_after=SOON)
    async with opened(group) as one, opened(group) as other:
        await streams.publish(message(1))
        (delivery,) = await deliveries(one, 1)
        await asyncio.sleep(SOON + 0.05)
        (claimed,) = await deliveries(other, 1)
        assert not await one.bury(delivery, error="no", attempts=5)
        assert await admin.exists(DEAD) == 0
        assert await other.bury(claimed, error="no", attempts=5)


@pytest.mark.one_server
async def test_burying_is_one_step(admin: Redis, streams: RedisStreams) -> None:
    """Without room for the dead letter nothing is acknowledged; never is one lost, or parked and given again."""
    async with opened(streams.group("billing", start="new")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        await admin.config_set("maxmemory", 1)
        with pytest.raises(BrokerUnavailable, match="can't add a dead letter"):
            await receiver.bury(delivery, error="no", attempts=5)
        await admin.config_set("maxmemory", 0)
        assert list(await owners(admin)) == [delivery.id]
        assert await admin.exists(DEAD) == 0
        assert await receiver.bury(delivery, error="no", attempts=5)


async def test_dead_letter_that_is_retried_comes_again_and_counts_from_one(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """To one consumer of its group, without waiting, and to no other group."""
    billing, audit = (streams.group(name, start="new", claim_after=SOON) for name in ("billing", "audit"))
    async with opened(billing) as receiver, opened(audit) as auditor, DeadLetters(streams_client) as dead:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        await auditor.ack(*await deliveries(auditor, 1))
        for _ in range(5):
            await receiver.count(delivery)
        await receiver.bury(delivery, error="no", attempts=5)
        (letter,) = await dead.list()
        assert (letter.group, letter.entry, letter.attempts) == ("billing", delivery.id, 5)
        assert (await dead.retry([letter.id])).returned == 1
        (again,) = await deliveries(receiver, 1)
        assert (again.id, again.attempt, await receiver.count(again)) == (delivery.id, 2, 1)
        assert await auditor.receive(10) == []


async def test_scripts_that_redis_has_forgotten_are_sent_again(admin: Redis, streams: RedisStreams) -> None:
    async with opened(streams.group("billing", start="new", claim_after=SOON)) as receiver:
        await streams.publish(message(1))
        (delivery,) = await deliveries(receiver, 1)
        for call in (receiver.keep(delivery), receiver.count(delivery), receiver.ack(delivery)):
            await admin.script_flush()
            await call
        assert await owners(admin) == {}


# -- come and go --------------------------------------------------------------------------------------------


async def test_consumer_without_a_name_leaves_no_trace(admin: Redis, streams: RedisStreams) -> None:
    """Each start has another: they would pile up. A named one comes back."""
    for name in (None, "pod-1"):
        async with opened(streams.group("billing", start="new", consumer=name)) as receiver:
            await streams.publish(message(1))
            await receiver.ack(*await deliveries(receiver, 1))
    assert await consumers(admin) == {"pod-1"}


async def test_what_a_leaving_consumer_has_not_done_is_claimed_at_once(admin: Redis, streams: RedisStreams) -> None:
    """Nobody waits half a minute because of a restart."""
    group = streams.group("billing", start="new", claim_after=60)
    async with opened(group) as one:
        await streams.publish(message(1), message(2))
        taken = await deliveries(one, 2)
        await one.ack(taken[0])
    assert list(await owners(admin)) == [taken[1].id]
    async with opened(group) as other:
        (again,) = await deliveries(other, 1)
        assert (number(again), again.attempt) == (2, 2)


async def test_consumers_that_are_long_silent_and_have_nothing_are_removed(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with entries stay until these are claimed: to remove one of them would lose its entries."""
    monkeypatch.setattr(claiming, "FORGET_AFTER", 0.2)
    async with opened(streams.group("billing", start="new", claim_after=0.01, consumer="me")) as receiver:
        await streams.publish(message(1), message(2))
        await deliveries(receiver, 2)
        for name in ("empty", "busy", "silbo-retry"):
            await admin.xgroup_createconsumer(KEY, "billing", name)
        for entry_id, name in zip(await owners(admin), ("busy", "silbo-retry"), strict=True):
            await admin.xclaim(KEY, "billing", name, 0, [entry_id], justid=True)
        await asyncio.sleep(0.3)
        upkeep = receiver._upkeep[KEY.encode()]  # type: ignore[attr-defined]
        await upkeep.remove_silent_consumers(receiver._connection)  # type: ignore[attr-defined]
        assert await consumers(admin) == {"me", "busy", "silbo-retry"}
        await receive(receiver, 2)  # claimed

        async def only_me() -> bool:
            await receiver.receive(1)
            return await consumers(admin) == {"me"}

        await eventually(only_me)


async def test_frozen_redis_does_not_hold_up_the_closing(own_redis: RedisServer, streams: RedisStreams) -> None:
    receiver = await streams.group("billing", start="new").open()
    await streams.publish(message(1))
    await receiver.ack(*await deliveries(receiver, 1))
    own_redis.pause()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    await receiver.aclose()
    assert loop.time() - begin < 1 + TOLERANCE
    own_redis.resume()


@pytest.mark.every_redis
@pytest.mark.parametrize("text", ["three", "1.5", "-1", "", "9" * 5000, "inf", None])
async def test_attempts_that_are_no_number_are_none(admin: Redis, streams: RedisStreams, text: str | None) -> None:
    """Whoever reads them: a consumer that comes back to its entries, one that claims them, one that counts. None: no hash."""
    mine = streams.group("billing", start="oldest", consumer="me", claim_after=0.2)
    await streams.publish(message(1), message(2))
    async with opened(mine) as receiver:
        got = await deliveries(receiver, 2)
    attempts = f"{KEY}:attempts:billing"
    if text is None:
        await admin.set(attempts, "no hash")
    else:
        await admin.hset(attempts, mapping={one.id: text for one in got})
    async with opened(mine) as receiver:
        assert [(number(one), one.attempt) for one in await deliveries(receiver, 2)] == [(1, 2), (2, 2)]
    async with opened(streams.group("billing", start="oldest", consumer="other", claim_after=0.2)) as receiver:
        claimed = await deliveries(receiver, 2)
        assert [number(one) for one in claimed] == [1, 2]
        if text is not None:
            assert await receiver.count(claimed[0]) == 1
        await receiver.ack(*claimed)
    assert (await admin.xpending(KEY, "billing"))["pending"] == 0


@pytest.mark.every_redis
async def test_attempts_in_a_key_of_another_type_keep_nothing_from_being_acknowledged(
    admin: Redis, streams: RedisStreams
) -> None:
    """Of more entries than one command takes. What is counted there is known again when somebody has mended the key."""
    async with opened(streams.group("billing", start="oldest")) as receiver:
        await streams.publish(*map(message, range(250)))
        got = await deliveries(receiver, 250)
        await admin.set(f"{KEY}:attempts:billing", "not a hash")
        assert await receiver.bury(got.pop(), error="broken", attempts=1)
        await receiver.ack(*got)
        assert (await admin.xpending(KEY, "billing"))["pending"] == 0
        assert await admin.xlen(f"{KEY}:dead") == 1
