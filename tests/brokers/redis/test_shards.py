"""Shards: a key's messages are on one of an address's streams, and their number is fixed beside them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge, EventName, Route
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.brokers.redis.retention import RetentionPolicy
from silbo.errors import BrokerUnavailable, Fenced, ShardAddressed, ShardsMismatch
from silbo.event import ECSTEvent
from silbo.message import Message, new_publication
from silbo.operations.retention import set_retention
from silbo.operations.shards import change_shards
from silbo.outbox.outbox import Outbox
from silbo.outbox.rows import pack, unpack
from silbo.protocols import Sequenced
from silbo.shards import MOST_SHARDS, place
from silbo.stores.sqlite import SQLiteStore
from tests.support.redis_streams import eventually, opened

pytestmark = pytest.mark.every_redis


def keyed(key: str | None, number: int = 0, to: str | None = None) -> Message:
    headers = {"publication": new_publication(), "version": "1"} | ({} if key is None else {"key": key})
    return Message("ecst_event", "order.paid", "9f62e977-73f7-462b-92cb-8ea658d3bcb5", {"n": number}, headers, to)


@pytest.fixture
async def sharded(streams_client: Redis) -> AsyncIterator[RedisStreams]:
    async with RedisStreams(streams_client, app="web", shards=4) as broker:
        yield broker


async def lengths(admin: Redis, address: str = "events", shards: int = 4) -> list[int]:
    return [int(await admin.xlen(f"silbo:{{{address}.{shard}}}")) for shard in range(shards)]


async def test_key_has_one_shard(admin: Redis, sharded: RedisStreams) -> None:
    """And its messages are there in the order of publishing, also those of publishes at once, the first of all among them."""
    await asyncio.gather(*[sharded.publish(keyed("a", number)) for number in range(40)])
    shard = crc32(b"a") % 4
    assert (await lengths(admin))[shard] == 40
    entries: Any = await admin.xrange(f"silbo:{{events.{shard}}}")
    numbers = [sharded.format.decode(fields[b"message"]).payload["n"] for _, fields in entries]
    assert numbers == list(range(40))


async def test_without_key_by_publication(admin: Redis, sharded: RedisStreams) -> None:
    await sharded.publish(*[keyed(None) for _ in range(200)])
    assert min(await lengths(admin)) > 20


async def test_other_number_is_refused_and_nothing_added(
    admin: Redis, sharded: RedisStreams, streams_client: Redis, streams: RedisStreams
) -> None:
    """A program that says 8 shards would write keys where others write other keys, and one that says none where nobody reads."""
    await sharded.publish(keyed("a"))
    before = await admin.keys()
    async with RedisStreams(streams_client, app="web", shards=8) as other:
        for broker, said in ((other, 8), (streams, 1)):
            with pytest.raises(ShardsMismatch, match="'events' has 4 shards in Redis") as caught:
                await broker.publish(*[keyed(f"k{number}") for number in range(20)])
            assert (caught.value.address, caught.value.fixed, caught.value.wanted) == ("events", 4, said)
    assert {*await admin.keys()} == {*before}
    assert sum(await lengths(admin)) == 1


async def test_relay_sends_to_the_number_that_is_fixed(
    admin: Redis, sharded: RedisStreams, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever number its rows say: programs of before and after a change may have stored them."""
    await sharded.publish(keyed("b"))
    saying = [
        keyed("a"),
        place(keyed("a"), "events", 8),
        place(keyed("a"), "events", 4),
        place(keyed("a"), "events", 2),
    ]
    rows = [(number, replace(each, payload={"n": number})) for number, each in enumerate(saying, 1)]
    assert await streams.publish_sequenced("box/0", 1, rows[:1]) == Sequenced(known=set())
    assert not (await streams.publish_sequenced("box/0", 1, rows)).unsent
    entries: Any = await admin.xrange(f"silbo:{{events.{crc32(b'a') % 4}}}")
    numbers = [sharded.format.decode(fields[b"message"]).payload["n"] for _, fields in entries]
    assert [number for number in numbers if number] == [1, 2, 3, 4]
    assert sum(await lengths(admin, shards=8)) == 5
    assert "say no shards, and Redis has 4" in caplog.text


async def test_mismatch_is_told_of_its_own_rows(streams: RedisStreams, admin: Redis) -> None:
    """A stream without shards takes what says none; what says a number waits for a person, and nothing else waits with it."""
    await streams.publish(keyed("a"))
    rows = [(1, keyed("a")), (2, place(keyed("a"), "events", 4)), (3, keyed("a", to="orders")), (4, keyed("b"))]
    answer = await streams.publish_sequenced("box/0", 1, rows)
    assert [(sequence, type(error)) for sequence, error in answer.unsent.items()] == [(2, ShardsMismatch)]
    await admin.hset("silbo:{places}:shards", "shards", 0)
    rows = [(5, place(keyed("a"), "events", 4)), (6, place(keyed("a"), "places", 4))]
    answer = await streams.publish_sequenced("box/0", 1, rows)
    assert [str(answer.unsent[sequence]).partition("'")[2].partition("'")[0] for sequence in (5, 6)] == [
        "events",
        "places",
    ]


@pytest.mark.parametrize("shards", [2, 8])
async def test_rows_that_waited_for_a_change_are_not_taken_for_known(
    admin: Redis, sharded: RedisStreams, streams: RedisStreams, shards: int
) -> None:
    """A later row of another key may have gone ahead, on a shard that is now the row's own."""
    for number in range(20):
        await streams.publish_sequenced("box/0", 3, [(100 + number, place(keyed(str(number)), "events", 4))])
    await change_shards(admin, "events", shards)
    late = [(number + 1, place(keyed(str(number)), "events", 4)) for number in range(20)]
    answer = await streams.publish_sequenced("box/0", 3, late)
    assert (list(answer.known), answer.unsent) == ([], {})
    assert sum(await lengths(admin, shards=8)) == 40
    with pytest.raises(Fenced):
        await streams.publish_sequenced("box/0", 2, late)


@pytest.mark.one_server  # KEYS of a cluster's client are those of one node
async def test_number_is_checked_inside_of_the_scripts(
    admin: Redis, sharded: RedisStreams, streams_client: Redis
) -> None:
    """Also if it is another by now than when this program looked."""
    async with RedisStreams(streams_client, app="web", shards=4) as relay:
        await sharded.publish(keyed("a"))
        await relay.publish_sequenced("box/0", 1, [(1, keyed("a"))])
        for key in await admin.keys("*:shards"):
            await admin.hset(key, "shards", 8)
        with pytest.raises(BrokerUnavailable, match="has 8 shards in Redis"):
            await sharded.publish(keyed("a"))
        with pytest.raises(ShardsMismatch):
            await sharded.publish(keyed("a"))
        await relay.publish_sequenced("box/0", 1, [(2, keyed("a"))])
    assert sum(await lengths(admin, shards=8)) == 3


@pytest.mark.one_server
async def test_shard_is_no_address(admin: Redis, streams: RedisStreams, sharded: RedisStreams) -> None:
    """What is sent to it, also by an outbox, would lie on a shard that is not that of its key; and a shard has no shards of its own."""
    for key in map(str, range(20)):
        await sharded.publish(keyed(key))
    before = {*await admin.keys()}
    named = keyed("a", to="events.1")
    with pytest.raises(ShardAddressed, match="is one of the 4 shards of 'events': write"):
        await streams.publish(named)
    answer = await streams.publish_sequenced("box/0", 1, [(1, named), (2, keyed("a", to="orders.1"))])
    assert list(answer.unsent) == [1]
    with pytest.raises(ShardAddressed):
        await change_shards(admin, "events.1", 2)
    with pytest.raises(ShardAddressed):
        await set_retention(admin, RetentionPolicy(retain=60), stream="events.1")
    with pytest.raises(BrokerUnavailable, match="is one of the 4 shards of 'events'"):
        await streams.publish(place(named, "events.1", 4))
    assert {*await admin.keys()} - before == {b"silbo:{orders.1}", b"silbo:{orders.1}:outbox"}
    assert sum(await lengths(admin)) == 20


async def test_change_carries_the_retention_over_and_says_why_it_refuses(
    admin: Redis, streams: RedisStreams, sharded: RedisStreams
) -> None:
    await sharded.publish(keyed("a"))
    await set_retention(admin, RetentionPolicy(retain=60), stream="events")
    await change_shards(admin, "events", 8)
    policies = {await admin.hget(f"silbo:{{events.{shard}}}:retention", "policy") for shard in range(8)}
    assert policies == {RetentionPolicy(retain=60).to_text()}
    await streams.publish(keyed("a", to="orders"))
    with pytest.raises(ShardsMismatch, match="'orders' is one stream without shards"):
        await change_shards(admin, "orders", 8)


async def test_shards_that_are_no_longer_used_expire(
    admin: Redis, sharded: RedisStreams, streams_client: Redis
) -> None:
    """After the policy's time, with what is beside them but for their dead letters; and no more if they are used again."""
    await sharded.publish(*[keyed(str(key)) for key in range(20)])
    await sharded.publish_sequenced("box/0", 1, [(n, place(keyed(str(n)), "events", 4)) for n in range(1, 20)])
    async with opened(sharded.group("billing", start="new")):
        pass
    await set_retention(admin, RetentionPolicy(retain=60), stream="events")
    await admin.hset("silbo:{events.3}:lease:billing", "epoch", 1)
    await admin.xadd("silbo:{events.3}:dead", {"message": b""})
    beside = ["", ":retention", ":outbox", ":lease:billing"]
    expiring = [f"silbo:{{events.3}}{each}" for each in beside]

    await change_shards(admin, "events", 2)
    assert [0 < await admin.pttl(key) <= 60_000 for key in expiring] == [True] * len(expiring)
    assert await admin.pttl("silbo:{events.3}:dead") == -1
    assert await admin.pttl("silbo:{events.1}") == -1

    await change_shards(admin, "events", 4)
    assert [await admin.pttl(key) for key in expiring] == [-1] * len(expiring)


async def test_shards_that_are_kept_for_ever_do_not_expire(admin: Redis, sharded: RedisStreams) -> None:
    await sharded.publish(*[keyed(str(key)) for key in range(20)])
    await set_retention(admin, RetentionPolicy(retain=None), stream="events")
    await change_shards(admin, "events", 2)
    assert await admin.pttl("silbo:{events.3}") == -1


async def test_shards_get_the_retention_that_was_set_before_them(admin: Redis, sharded: RedisStreams) -> None:
    await set_retention(admin, RetentionPolicy(retain=60), stream="events")
    await sharded.publish(keyed("a"))
    policies = {await admin.hget(f"silbo:{{events.{shard}}}:retention", "policy") for shard in range(4)}
    assert policies == {RetentionPolicy(retain=60).to_text()}


async def test_first_publish_to_a_closed_address_is_told_why(admin: Redis, sharded: RedisStreams) -> None:
    await sharded.publish(keyed("a"))
    for key in await admin.keys("*:shards"):
        await admin.hset(key, "shards", 0)
    with pytest.raises(ShardsMismatch, match="is being changed"):
        await sharded.publish(keyed("a"))


async def test_stream_is_not_spread_by_a_program_that_says_so(streams: RedisStreams, streams_client: Redis) -> None:
    """Its groups would never see what goes to the shards."""
    await streams.publish(keyed("a"))
    async with RedisStreams(streams_client, app="web", shards=4) as sharded:
        with pytest.raises(ShardsMismatch, match="is one stream without shards in Redis"):
            await sharded.publish(keyed("a"))
    await streams.publish(keyed("a"))


async def test_mismatch_holds_up_no_other_address(streams_client: Redis, admin: Redis, sharded: RedisStreams) -> None:
    await sharded.publish(keyed("a"))
    async with RedisStreams(streams_client, app="web", shards=8) as other:
        results = await asyncio.gather(
            *[other.publish(keyed("a")), other.publish(keyed("a", to="orders"))], return_exceptions=True
        )
    assert isinstance(results[0], ShardsMismatch)
    assert results[1] is None
    assert await admin.xlen("silbo:{orders}") == 1


async def test_number_is_fixed_again_after_flush(admin: Redis, sharded: RedisStreams) -> None:
    """The next publish is told that nothing was added; from then on it goes on."""
    await sharded.publish(keyed("a"))
    await admin.flushall()
    with pytest.raises(BrokerUnavailable, match="not fixed any more"):
        await sharded.publish(keyed("a"))
    await sharded.publish(keyed("a"))
    assert sum(await lengths(admin)) == 1


class Paid(ECSTEvent):
    def __init__(self, order: str) -> None:
        self.order = order


PAID = EventName("order.paid", Paid, key="order")


async def test_route_says_the_number(admin: Redis, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web") as broker:
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_subscriber(Bridge(broker, routes=[Route("order.**", to="orders", shards=4)]))
        for number in range(40):
            await dispatcher.adispatch(PAID, Paid(str(number)))
    expected = [sum(crc32(str(number).encode()) % 4 == shard for number in range(40)) for shard in range(4)]
    assert await lengths(admin, "orders") == expected
    assert await admin.hget("silbo:{orders}:shards", "shards") == b"4"


@pytest.mark.one_server
async def test_number_goes_through_the_outbox(admin: Redis, streams_client: Redis, tmp_path: Path) -> None:
    """Its rows wait while the number is changed, and then go to the new one."""
    broker = RedisStreams(streams_client, app="web")
    async with Outbox(SQLiteStore(tmp_path / "outbox.db"), broker, partitions=2) as outbox:
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_subscriber(Bridge(outbox, routes=[Route("order.**", to="orders", shards=4)]))
        for number in range(20):
            await dispatcher.adispatch(PAID, Paid(str(number)))

        async def arrived(many: int) -> bool:
            return sum(await lengths(admin, "orders")) == many

        await eventually(lambda: arrived(20))
        for key in await admin.keys("*:shards"):
            await admin.hset(key, "shards", 0)
        await dispatcher.adispatch(PAID, Paid("a"))

        async def refused() -> bool:
            error = outbox.health().last_error
            return error is not None and "is being changed" in error.text

        await eventually(refused)
        for key in await admin.keys("*:shards"):
            await admin.hset(key, "shards", 4)
        await change_shards(admin, "orders", 8)
        await dispatcher.adispatch(PAID, Paid("b"))

        async def all_arrived() -> bool:
            return sum(await lengths(admin, "orders", 8)) == 22

        await eventually(all_arrived)
    await broker.aclose()


def test_rows_of_an_address_without_shards_say_nothing_of_them() -> None:
    assert b"shards" not in pack(keyed("a", to="orders"), 1).raw
    placed = place(keyed("a"), "orders", 16)
    stored = unpack(pack(placed, 1).raw)
    assert (stored.to, stored.shards) == (f"orders.{crc32(b'a') % 16}", 16)


@pytest.mark.parametrize("publisher", [MemoryBroker, RedisPubSub])
async def test_brokers_without_shards_get_the_address(publisher: type, streams_client: Redis) -> None:
    sent: list[Message] = []
    broker = MemoryBroker() if publisher is MemoryBroker else RedisPubSub(streams_client, app="web")

    async def publish(*messages: Message) -> None:
        sent.extend(messages)

    broker.publish = publish  # type: ignore[method-assign, assignment]
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(broker, routes=[Route("order.**", to="orders", shards=4)]))
    await dispatcher.adispatch(PAID, Paid("a"))
    assert [(message.to, message.shards) for message in sent] == [("orders", 0)]


@pytest.mark.parametrize("shards", [-1, 1, MOST_SHARDS + 1, True, "4"])
def test_numbers_that_are_none(shards: int, streams_client: Redis) -> None:
    with pytest.raises((TypeError, ValueError), match="shards is"):
        Route("order.**", to="orders", shards=shards)
    with pytest.raises((TypeError, ValueError), match="shards is"):
        RedisStreams(streams_client, app="web", shards=shards)


def test_route_needs_an_address_for_shards() -> None:
    with pytest.raises(ValueError, match=r"RedisStreams\(..., shards=4\)"):
        Route("order.**", shards=4)
