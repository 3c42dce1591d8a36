"""Retention by need: what every group has acknowledged goes, a cap holds, and programs agree on the policy."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster

from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.brokers.redis.retention import Retention, RetentionPolicy
from silbo.errors import BrokerUnavailable, Gap, RetentionConflict
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import eventually, message, number, opened, receive, stored
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"
POLICY = "silbo:{events}:retention"


@pytest.fixture(autouse=True)
def _trim_with_each_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silbo.brokers.redis.retention.TRIM_EVERY", 0.0)


def by_need(client: Redis, **policy: Any) -> RedisStreams:
    return RedisStreams(client, app="web", trim="acknowledged", **policy)


async def counts(admin: Redis) -> bool:
    """Return True if this Redis counts what a group has read."""
    return int((await admin.info("server"))["redis_version"].split(".")[0]) >= 7


async def read(receiver: Receiver, many: int, *, ack: bool = True) -> list[Delivery]:
    items = [item for item in await receive(receiver, many) if isinstance(item, Delivery)]
    assert len(items) == many, "there was a gap"
    if ack:
        await receiver.ack(*items)
    return items


async def receive_all(receiver: Receiver, last: int) -> tuple[list[int], list[int | None]]:
    """Return the numbers up to the last one, and the counts of the gaps; wait for one gap at least."""
    items: list[Delivery | Gap] = []
    async with asyncio.timeout(30):
        while not (any(isinstance(item, Gap) for item in items) and last in _numbers(items)):
            items += await receiver.receive(100)
        for _ in range(2):
            items += await receiver.receive(100)
    return _numbers(items), [item.count for item in items if isinstance(item, Gap)]


def _numbers(items: list[Delivery | Gap]) -> list[int]:
    return [number(item) for item in items if isinstance(item, Delivery)]


# -- what is acknowledged -----------------------------------------------------------------------------------


async def test_what_every_group_has_acknowledged_goes(admin: Redis, streams_client: Redis) -> None:
    """The slowest group decides, and what one has in hand stays with all behind it. The last one given stays as well."""
    async with by_need(streams_client) as streams:
        billing, mail = streams.group("billing", start="new"), streams.group("mail", start="new")
        async with opened(billing) as fast, opened(mail) as slow:
            await streams.publish(*map(message, range(10)))
            await read(fast, 10)
            await read(slow, 4)
            await streams.publish(message(10))
            assert await stored(admin) == [3, 4, 5, 6, 7, 8, 9, 10]
            in_hand = await read(slow, 3, ack=False)
            await slow.ack(*in_hand[1:])
            await streams.publish(message(11))
            assert await stored(admin) == [4, 5, 6, 7, 8, 9, 10, 11]
            await slow.ack(in_hand[0])
            await read(slow, 5)
            await streams.publish(message(12))
            assert await stored(admin) == [9, 10, 11, 12]  # the fast group was given 9 last
            assert [number(item) for item in await read(fast, 3)] == [10, 11, 12]


async def test_without_a_group_only_time_removes(admin: Redis, streams_client: Redis) -> None:
    async with by_need(streams_client, retain=0.3) as streams:
        await streams.publish(*map(message, range(5)))
        await streams.publish(message(5))
        assert await stored(admin) == [0, 1, 2, 3, 4, 5]
        await asyncio.sleep(0.4)
        await streams.publish(message(6))
        assert await stored(admin) == [6]


async def test_acknowledged_entries_are_kept_for_those_who_come_late(admin: Redis, streams_client: Redis) -> None:
    async with by_need(streams_client, keep_at_least=0.5) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*map(message, range(3)))
            await read(receiver, 3)
            await streams.publish(message(3))
            assert await stored(admin) == [0, 1, 2, 3]
            await asyncio.sleep(0.6)
            await streams.publish(message(4))
            assert await stored(admin) == [2, 3, 4]


async def test_group_that_comes_late_gets_what_is_left_and_no_gap(admin: Redis, streams_client: Redis) -> None:
    """Also one that begins at an entry from before the retention."""
    async with by_need(streams_client) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*map(message, range(10)))
            await read(receiver, 10)
            await streams.publish(message(10))
            assert await stored(admin) == [9, 10]
        for start in ("oldest", "1-1"):
            async with opened(streams.group(f"late-{start}", start=start)) as receiver:
                assert [number(item) for item in await read(receiver, 2)] == [9, 10]
                assert await receiver.receive(10) == []


async def test_group_that_was_set_back_gets_what_is_left_and_no_gap(admin: Redis, streams_client: Redis) -> None:
    async with by_need(streams_client) as streams:
        group = streams.group("billing", start="new")
        async with opened(group) as receiver:
            await streams.publish(*map(message, range(5)))
            first = (await read(receiver, 5))[0]
            await streams.publish(message(5))
            await read(receiver, 1)
        await admin.xgroup_setid(KEY, "billing", first.id)
        async with opened(group) as receiver:
            assert [number(item) for item in await read(receiver, 2)] == [4, 5]
            assert await receiver.receive(10) == []


async def test_consumer_trims_for_publishers_of_an_older_version(admin: Redis, streams_client: Redis) -> None:
    """Which only add entries: each third of ``claim_after``."""
    async with by_need(streams_client) as streams:
        await streams.publish(message(0))
        rows: Any = await admin.xrange(KEY)
        raw = rows[0][1]
        async with opened(streams.group("billing", start="oldest", claim_after=0.3)) as receiver:
            for _ in range(4):
                await admin.xadd(KEY, raw)
            await read(receiver, 5)

            async def trimmed() -> bool:
                await receiver.receive(1)
                return bool(await admin.xlen(KEY) == 1)

            await eventually(trimmed)


async def test_relay_trims(admin: Redis, streams_client: Redis) -> None:
    async with by_need(streams_client) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish_sequenced("box/0", 1, [(n, message(n)) for n in range(1, 6)])
            await read(receiver, 5)
            await streams.publish_sequenced("box/0", 1, [(6, message(6))])
            assert await stored(admin) == [5, 6]


async def test_dead_letter_keeps_its_message_though_the_entry_is_gone(admin: Redis, streams_client: Redis) -> None:
    """It holds back nothing; without its entry it can be given back to everybody alone."""
    async with by_need(streams_client) as streams, DeadLetters(streams_client) as dead:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(message(0), message(1))
            first, second = await read(receiver, 2, ack=False)
            assert await receiver.bury(first, error="it always fails", attempts=3)
            await receiver.ack(second)
            await streams.publish(message(2))
            assert await stored(admin) == [1, 2]
            (letter,) = await dead.list()
            assert letter.message().payload["n"] == 0
            assert (await dead.retry([letter.id])).returned == 0
            assert (await dead.retry([letter.id], everybody=True)).returned == 1
            assert [number(item) for item in await read(receiver, 2)] == [2, 0]


async def test_small_redis_takes_more_than_it_holds_as_long_as_all_is_acknowledged(
    admin: Redis, streams_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 MB go through 20 MB of memory, and no publish is refused. A publisher trims after each 4 MiB, not only by time."""
    monkeypatch.setattr("silbo.brokers.redis.retention.TRIM_EVERY", 3600.0)
    await admin.config_set("maxmemory", "20mb")
    async with by_need(streams_client) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            for _ in range(60):
                await streams.publish(*[message(n, blob="x" * 10_000) for n in range(100)])
                await read(receiver, 100)
    assert await admin.xlen(KEY) < 1000


@pytest.mark.one_server
async def test_full_redis_is_trimmed_before_it_is_asked_for_room(admin: Redis, streams_client: Redis) -> None:
    """Entries that were acknowledged while it was full make room for the next publish."""
    async with by_need(streams_client) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*[message(n, blob="x" * 10_000) for n in range(100)])
            memory = await admin.info("memory")
            used = memory["used_memory"] - memory.get("mem_not_counted_for_evict", 0)
            await admin.config_set("maxmemory", used - 100_000)
            with pytest.raises(BrokerUnavailable):
                await streams.publish(message(100))
            await read(receiver, 100)
            await streams.publish(message(101))
    assert await stored(admin) == [99, 101]


async def test_full_redis_drops_what_is_older_than_retain_first(admin: Redis, streams_client: Redis) -> None:
    """The adding of an entry, which removes old ones too, would be refused."""
    async with by_need(streams_client, retain=0.3) as streams:
        await streams.publish(*[message(n, blob="x" * 10_000) for n in range(100)])
        memory = await admin.info("memory")
        await admin.config_set(
            "maxmemory", memory["used_memory"] - memory.get("mem_not_counted_for_evict", 0) - 100_000
        )
        await asyncio.sleep(0.4)
        await streams.publish(message(100))
    assert await stored(admin) == [100]


# -- abandoned groups ---------------------------------------------------------------------------------------


@pytest.mark.long
async def test_abandoned_group_is_named_and_loses_what_is_older_than_retain(
    admin: Redis, streams_client: Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the others back no longer; and when it comes back it is told how many it has missed."""
    monkeypatch.setattr("silbo.brokers.redis.retention.DESERTED_AFTER", 0.3)
    async with by_need(streams_client, retain=1.0) as streams:
        abandoned = streams.group("mail", start="new")
        async with opened(abandoned) as receiver:
            await streams.publish(message(0))
            await read(receiver, 1)
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*map(message, range(1, 5)))
            await read(receiver, 4)
            with caplog.at_level(logging.WARNING):
                await streams.publish(message(5))
                assert not caplog.records
                await asyncio.sleep(0.4)
                await read(receiver, 1, ack=False)  # billing is as far behind, and lives
                await streams.publish(message(6))
            assert await stored(admin) == [0, 1, 2, 3, 4, 5, 6]
            (record,) = caplog.records
            told: Any = record
            assert "no consumer is alive of mail at silbo:{events}" in record.message
            assert (told.address, told.groups) == (KEY, ["mail"])
            await asyncio.sleep(0.7)
            await streams.publish(message(7))
            await streams.publish(message(8))
        async with opened(abandoned) as receiver:
            left, counted = await receive_all(receiver, last=8)
            assert left == list(range(left[0], 9))
            assert left[0] > 4
            assert counted == [left[0] - 1 if await counts(admin) else None]


# -- caps ---------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_cap_of_messages_holds_and_the_group_that_loses_unread_ones_gets_a_gap(
    admin: Redis, streams_client: Redis
) -> None:
    """Once, with the count where Redis counts; the other group has read them, and is told nothing."""
    async with RedisStreams(streams_client, app="web", max_messages=4) as streams:
        billing, mail = streams.group("billing", start="new"), streams.group("mail", start="new")
        async with opened(billing) as slow, opened(mail) as fast:
            for receiver in (slow, fast):
                assert await receiver.receive(1) == []  # consumers trim as well, at first
            await streams.publish(*map(message, range(10)))
            await read(slow, 2)
            await read(fast, 10)
            for n in range(10, 13):  # two go with 10, one with 11 and one with 12 each
                await streams.publish(message(n))
            assert await stored(admin) == [8, 9, 10, 11, 12]
            assert await receive_all(slow, last=12) == ([8, 9, 10, 11, 12], [6 if await counts(admin) else None])
            assert [number(item) for item in await read(fast, 3)] == [10, 11, 12]
            assert await fast.receive(10) == []


@pytest.mark.long
async def test_cap_tells_a_group_that_reads_on_before_it_was_looked_at(admin: Redis, streams_client: Redis) -> None:
    """Its loss is noted when the entries are removed, not found out later."""
    async with RedisStreams(streams_client, app="web", max_messages=2) as streams:
        group = streams.group("billing", start="new", claim_after=6.0)
        async with opened(group) as receiver:
            await streams.publish(message(0))
            await read(receiver, 1)
            for _ in range(2):
                await receiver.receive(1)  # it has looked, and will not for a while
            await streams.publish(*map(message, range(1, 6)))
            await streams.publish(message(6))
            assert await receive_all(receiver, last=6) == ([4, 5, 6], [3 if await counts(admin) else None])


async def test_cap_of_bytes_holds(admin: Redis, streams_client: Redis) -> None:
    """As Redis counts the memory; a node of the stream may be too much."""
    async with RedisStreams(streams_client, app="web", max_bytes=100_000) as streams:
        for _ in range(10):
            await streams.publish(*[message(n, blob="x" * 400) for n in range(100)])
        await streams.publish(message(0))
        size = await admin.memory_usage(KEY, samples=0)
        assert size is not None and size <= 110_000
        assert await admin.xlen(KEY) >= 80


# -- the policy ---------------------------------------------------------------------------------------------


async def test_programs_that_disagree_get_an_error_that_shows_both(admin: Redis, streams_client: Redis) -> None:
    """The later one, and nothing of it is sent; through an outbox its messages wait."""
    async with by_need(streams_client) as streams, RedisStreams(streams_client, app="api", retain=60) as other:
        await streams.publish(message(0))
        with pytest.raises(RetentionConflict) as caught:
            await other.publish(message(1))
        text = str(caught.value)
        assert "(retain=604800, trim='acknowledged')" in text
        assert "(retain=60, trim='age')" in text
        with pytest.raises(RetentionConflict):
            await other.publish_sequenced("box/0", 1, [(1, message(1))])
        assert await stored(admin) == [0]
        # Another stream is not affected, and keeps what this program states.
        answer = await other.publish_sequenced("box/0", 1, [(1, message(1)), (2, message(2, to="orders"))])
        assert isinstance(answer.unsent[1], RetentionConflict)
        assert await stored(admin, "silbo:{orders}") == [2]
        # As soon as they agree, it goes on without a restart.
        await admin.delete(POLICY)
        await other.publish(message(1))
        assert await admin.hget(POLICY, "policy") == b"retain=60000 trim=age keep_at_least=0"


async def test_program_that_states_no_policy_follows_the_stream(admin: Redis, streams_client: Redis) -> None:
    async with (
        RedisStreams(streams_client, app="api") as silent,
        RedisStreams(streams_client, app="web", retain=0.2) as streams,
    ):
        await silent.publish(message(0, to="orders"))
        assert await admin.keys("*:retention") == []
        await streams.publish(message(0))
        await asyncio.sleep(0.3)
        await silent.publish(message(1))
        assert await stored(admin) == [1]


@pytest.mark.parametrize("policy", [{"retain": 7 * 86400.0}, {"trim": "age"}, {"keep_at_least": 0.0}])
async def test_program_that_states_the_values_of_the_default_states_a_policy(
    admin: Redis, streams_client: Redis, policy: dict[str, Any]
) -> None:
    """It is refused where another one holds, and is kept where there is none; it gives way to nothing."""
    async with by_need(streams_client) as first, RedisStreams(streams_client, app="mail", **policy) as second:
        await first.publish(message(1))
        with pytest.raises(RetentionConflict):
            await second.publish(message(2))
        assert await stored(admin) == [1]
        await admin.delete(KEY, POLICY)
        await second.publish(message(3))
        assert await admin.hget(POLICY, "policy") == b"retain=604800000 trim=age keep_at_least=0"


async def test_consumer_follows_the_stream_too(streams_client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """It warns by the time that the stream has, and not by its own program's."""
    async with (
        RedisStreams(streams_client, app="web", retain=1.0) as streams,
        RedisStreams(streams_client, app="billing") as silent,
    ):
        async with opened(silent.group("billing", start="new", claim_after=0.03)) as receiver:
            await streams.publish(message(0), message(1))
            await read(receiver, 1)
            await asyncio.sleep(0.85)
            await read(receiver, 1)
    (record,) = [record for record in caplog.records if "falls behind" in record.message]
    told: Any = record
    assert told.retain == 1.0


async def test_policy_may_be_changed_while_programs_run(admin: Redis, streams_client: Redis) -> None:
    """The one before it is accepted as well; a third is not."""
    async with by_need(streams_client) as before, by_need(streams_client, keep_at_least=9) as after:
        await before.publish(message(0))
        await admin.hset(POLICY, mapping={"before": before.retention.to_text(), "policy": after.retention.to_text()})
        async with by_need(streams_client) as started_later:
            for number_, program in enumerate((before, after, started_later), 1):
                await program.publish(message(number_))
        async with by_need(streams_client, keep_at_least=8) as third:
            with pytest.raises(RetentionConflict):
                await third.publish(message(9))
        assert await stored(admin) == [0, 1, 2, 3]


async def test_running_program_follows_a_policy_that_another_has_put_there(
    admin: Redis, streams_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not stopped in the middle: it logs the difference once a minute, and goes by what is kept."""
    async with RedisStreams(streams_client, app="web", max_messages=100) as streams:
        await streams.publish(*map(message, range(10)))
        await admin.hset(POLICY, "policy", "retain=604800000 trim=age keep_at_least=0 max_messages=3")
        await admin.hdel(POLICY, "before")
        with caplog.at_level(logging.WARNING):
            await streams.publish(message(10))
            await streams.publish(message(11))
        (record,) = caplog.records
        assert (
            "max_messages=3), and it is followed; this program states (retain=604800, trim='age', max_messages=100)"
            in record.message
        )
        async with RedisStreams(
            streams_client, app="tool"
        ) as silent:  # those who trim are those who state it, or nothing
            await silent.publish(message(12))
    assert await stored(admin) == [9, 10, 11, 12]


async def test_policy_without_the_rights_for_it_is_told_and_stops_no_publish(
    admin: Redis, own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a user that was made for an older silbo."""
    rules = ["on", ">password", "~silbo:*", "+@all", "-xtrim"]
    await admin.execute_command("ACL", "SETUSER", "older", *rules)
    async with Redis.from_url(own_redis.url, username="older", password="password") as client:
        async with RedisStreams(client, app="web", max_messages=2) as streams:
            with caplog.at_level(logging.WARNING):
                for n in range(5):
                    await streams.publish(message(n))
    assert await stored(admin) == [0, 1, 2, 3, 4]
    assert "the retention of silbo:{events} can't be looked after" in caplog.records[0].message
    assert "xtrim" in caplog.records[0].message


async def test_policies_of_all_shards_are_remembered() -> None:
    """Of some addresses with 1,024 shards: else each publish would ask for a policy first."""
    retention = Retention(RetentionPolicy())
    keys = [b"silbo:{events.%d}" % shard for shard in range(2048)]
    calls = retention.first_calls(keys)
    retention.note(calls, [[0, b""]] * len(calls))
    assert retention.first_calls(keys) == []


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"trim": "always"}, "trim is 'age' or 'acknowledged'"),
        ({"keep_at_least": 5}, "keep_at_least is for trim='acknowledged'"),
        ({"trim": "acknowledged", "retain": 5, "keep_at_least": 6}, "keep_at_least is at most retain, 5 s"),
        ({"max_bytes": 0}, "max_bytes is 1 or more"),
        ({"max_messages": -1}, "max_messages is 1 or more"),
    ],
)
def test_policy_that_makes_no_sense_is_refused_at_once(policy: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RedisStreams(Redis(), app="web", **policy)


async def test_policy_that_is_none_of_silbos_stops_nothing(admin: Redis, streams_client: Redis) -> None:
    await admin.hset(POLICY, "policy", "something else")
    async with RedisStreams(streams_client, app="web") as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(message(0))
            await read(receiver, 1)
    assert await stored(admin) == [0]


@pytest.mark.cluster
async def test_policy_is_beside_each_stream_of_a_cluster(cluster_client: RedisCluster, prefix: str) -> None:
    """On whatever node it is: by a publisher and by a relay."""
    addresses = ["a", "b", "c", "d"]
    blob = "x" * 5_000  # a node of a stream holds one
    async with RedisStreams(cluster_client, app="web", prefix=prefix, trim="acknowledged") as streams:
        async with opened(streams.group("billing", start="new", streams=addresses)) as receiver:
            await streams.publish(*[message(n, to=to, blob=blob) for n in range(5) for to in addresses])
            await read(receiver, 20)
            await streams.publish_sequenced(
                "box/0", 1, [(n, message(n, to=to, blob=blob)) for n, to in enumerate(addresses, 1)]
            )
            for to in addresses:  # the last one that was acknowledged, and the new one
                assert await cluster_client.xlen(f"{prefix}:{{{to}}}") == 2
            await read(receiver, 4)
            await streams.publish(*[message(9, to=to, blob=blob) for to in addresses])
            for to in addresses:
                assert await cluster_client.xlen(f"{prefix}:{{{to}}}") == 2
        async with RedisStreams(cluster_client, app="api", prefix=prefix, retain=60) as other:
            with pytest.raises(RetentionConflict):
                await other.publish(message(0, to="c"))
