"""What an outbox sends is added once, in order, and never by an old leader."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, Fenced, MessageRefused, PublishError
from silbo.message import Message
from silbo.protocols import Sequenced, SequencedPublisher
from silbo.wire.encode import MAX_SIZE
from tests.support.redis_streams import has_connections, message, stored
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis

OUTBOX = "silbo:{events}:outbox"
LARGE = 1_790_000_000_123_456
"""A sequence as stores give them: microseconds of a clock. Lua's own way to write it loses its last digits."""


def numbered(*numbers: int, to: str | None = None) -> list[tuple[int, Message]]:
    return [(n, message(n, to=to)) for n in numbers]


async def test_what_was_added_is_not_added_again(admin: Redis, streams: RedisStreams) -> None:
    assert isinstance(streams, SequencedPublisher)
    first = await streams.publish_sequenced("box/0", 1, numbered(1, 2, 3))
    assert (set(first.known), first.refused, first.last) == (set(), {}, 0)
    second = await streams.publish_sequenced("box/0", 1, numbered(2, 3, 4, 7))
    assert (set(second.known), second.last) == ({2, 3}, 3)
    third = await streams.publish_sequenced("box/0", 1, numbered(5, 7))
    assert (set(third.known), third.last) == ({5, 7}, 7)
    assert await stored(admin) == [1, 2, 3, 4, 7]
    assert await admin.hgetall(OUTBOX) == {b"box/0": b"1:7"}


async def test_sequences_of_sixteen_digits_are_exact(admin: Redis, streams: RedisStreams) -> None:
    await streams.publish_sequenced("box/0", LARGE, numbered(LARGE, LARGE + 1))
    again = await streams.publish_sequenced("box/0", LARGE, numbered(LARGE + 1, LARGE + 2, 2**53))
    assert (set(again.known), again.last) == ({LARGE + 1}, LARGE + 1)
    with pytest.raises(Fenced):
        await streams.publish_sequenced("box/0", LARGE - 1, numbered(2**53))
    assert set((await streams.publish_sequenced("box/0", LARGE, numbered(2**53 - 1, 2**53))).known) == {
        2**53 - 1,
        2**53,
    }
    assert await stored(admin) == [LARGE, LARGE + 1, LARGE + 2, 2**53]
    assert await admin.hget(OUTBOX, "box/0") == b"%d:%d" % (LARGE, 2**53)


@pytest.mark.parametrize("record", ["1:99999999999999999", "99999999999999999:5", "1:x"])
async def test_damaged_record_is_named_and_changes_nothing(admin: Redis, streams: RedisStreams, record: str) -> None:
    """No message counts as sent, and no epoch of a damaged record gets into a store. Mended, it serves again."""
    await admin.hset(OUTBOX, "box/0", record)
    with pytest.raises(BrokerUnavailable, match=r"not a record of an outbox: silbo:\{events\}:outbox box/0"):
        await streams.publish_sequenced("box/0", 1, numbered(1))
    assert await admin.hget(OUTBOX, "box/0") == record.encode()
    await admin.hset(OUTBOX, "box/0", "1:0")
    await streams.publish_sequenced("box/0", 1, numbered(1))
    assert await stored(admin) == [1]


async def test_old_leader_changes_nothing(admin: Redis, streams: RedisStreams) -> None:
    await streams.publish_sequenced("box/0", 2, numbered(1))
    with pytest.raises(Fenced) as caught:
        await streams.publish_sequenced("box/0", 1, numbered(2))
    assert caught.value.epoch == 2
    await streams.publish_sequenced("box/0", 3, numbered(2))
    assert await stored(admin) == [1, 2]


async def test_new_leader_is_remembered_where_it_adds_nothing(admin: Redis, streams: RedisStreams) -> None:
    """Its first batch may be one that the old one has sent; the old one must not add the next."""
    await streams.publish_sequenced("box/0", 1, numbered(1))
    assert set((await streams.publish_sequenced("box/0", 2, numbered(1))).known) == {1}
    with pytest.raises(Fenced):
        await streams.publish_sequenced("box/0", 1, numbered(2))
    assert await stored(admin) == [1]


async def test_sources_do_not_know_of_each_other(admin: Redis, streams: RedisStreams) -> None:
    await streams.publish_sequenced("box/0", 7, numbered(5))
    assert (await streams.publish_sequenced("box/1", 1, numbered(1, 2))).last == 0
    assert await stored(admin) == [5, 1, 2]


async def test_what_is_known_is_told_for_each_stream(admin: Redis, streams: RedisStreams) -> None:
    await streams.publish_sequenced("box/0", 1, numbered(1) + numbered(2, 3, to="orders"))
    outcome = await streams.publish_sequenced(
        "box/0", 1, [*numbered(1, 2), *numbered(3, to="orders"), *numbered(4, to="new")]
    )
    assert (set(outcome.known), outcome.last) == ({1, 3}, 3)
    assert await stored(admin) == [1, 2]
    assert await stored(admin, "silbo:{orders}") == [2, 3]
    assert await stored(admin, "silbo:{new}") == [4]


async def test_stream_that_is_refused_lets_the_others_go_on(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its messages are unsent, those of the later flushes of the call too, though it is mended by then: none overtakes."""
    run_all = streams._sequenced._connection.run_all

    async def run_and_mend(*calls: Any, **settings: Any) -> Any:
        replies = await run_all(*calls, **settings)
        if any(call.keys[-1].endswith(b":outbox") for call in calls):
            await admin.delete("silbo:{orders}")
        return replies

    monkeypatch.setattr(streams._sequenced._connection, "run_all", run_and_mend)
    await admin.set("silbo:{orders}", "of another type")
    large = [(n, message(n, to="orders" if n % 2 else None, blob="x" * 600_000)) for n in range(3, 7)]
    batch = [*numbered(1), *numbered(2, to="orders"), *large]
    outcome = await streams.publish_sequenced("box/0", 1, batch)
    assert outcome.unsent.keys() == {2, 3, 5}
    assert all(isinstance(error, BrokerUnavailable) and "orders" in str(error) for error in outcome.unsent.values())
    assert await stored(admin) == [1, 4, 6]
    monkeypatch.undo()
    again = await streams.publish_sequenced("box/0", 1, batch)
    assert (set(again.known), again.unsent) == ({1, 4, 6}, {})
    assert await stored(admin, "silbo:{orders}") == [2, 3, 5]


async def test_call_of_which_nothing_was_sent_raises(admin: Redis, streams: RedisStreams) -> None:
    for key in ("silbo:{events}", "silbo:{orders}"):
        await admin.set(key, "of another type")
    for batch in (numbered(1), [*numbered(1), *numbered(2, to="orders"), *numbered(3, to="no address")]):
        with pytest.raises(BrokerUnavailable, match="refused it, for"):
            await streams.publish_sequenced("box/0", 1, batch)


async def test_refused_messages_are_told_and_the_others_go_on(admin: Redis, streams: RedisStreams) -> None:
    large, foreign = message(2, blob="x" * MAX_SIZE), message(3, what=object())
    batch = [*numbered(1), (2, large), (3, foreign), *numbered(4, to="no address"), *numbered(5)]
    outcome = await streams.publish_sequenced("box/0", 1, batch)
    assert outcome.refused.keys() == {2, 3, 4}
    assert all(isinstance(error, MessageRefused) for error in outcome.refused.values())
    assert await stored(admin) == [1, 5]
    nothing = await streams.publish_sequenced("box/0", 1, [(6, large)])
    assert nothing.refused.keys() == {6}


async def test_without_a_message_redis_is_asked_and_takes_the_epoch(
    admin: Redis, streams: RedisStreams, own_redis: RedisServer
) -> None:
    """So that a relay that has nothing to send learns that its Redis is away, or that it is an old leader."""
    await streams.publish_sequenced("box/0", 1, numbered(5))
    assert await streams.publish_sequenced("box/0", 2, []) == Sequenced(set(), last=5)
    assert await stored(admin) == [5]
    with pytest.raises(Fenced) as caught:
        await streams.publish_sequenced("box/0", 1, [])
    assert caught.value.epoch == 2
    own_redis.kill()
    with pytest.raises(PublishError, match="Redis at"):
        await streams.publish_sequenced("box/0", 2, [])


@pytest.mark.one_server
async def test_large_calls_go_out_in_parts_and_in_order(admin: Redis, streams: RedisStreams) -> None:
    """500 messages or 1 MiB at a time; a call that is repeated does not send again what is known of it."""
    many = numbered(*range(1, 1201))
    assert (await streams.publish_sequenced("box/0", 1, many[:700])).last == 0
    await admin.config_resetstat()
    outcome = await streams.publish_sequenced("box/0", 1, many)
    assert (set(outcome.known), outcome.last) == (set(range(1, 701)), 700)
    assert (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] == 2
    large = [(n, message(n, blob="x" * 600_000)) for n in range(2001, 2006)]
    await streams.publish_sequenced("box/0", 1, [*numbered(2000), *large, *numbered(2006)])
    assert (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] == 2 + 5
    assert await stored(admin) == [*range(1, 1201), *range(2000, 2007)]


async def test_old_entries_go_as_others_are_added(admin: Redis, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", retain=0.2) as streams:
        await streams.publish_sequenced("box/0", 1, numbered(1))
        await asyncio.sleep(0.3)
        await streams.publish_sequenced("box/0", 1, numbered(2, 3))
        assert await stored(admin) == [2, 3]
        assert set((await streams.publish_sequenced("box/0", 1, numbered(1))).known) == {1}


async def test_flushed_redis_takes_what_comes(admin: Redis, streams: RedisStreams) -> None:
    """Data and scripts gone: what is sent from then on is there, and an older leader is the newest known."""
    await streams.publish_sequenced("box/0", 5, numbered(1, 2))
    await admin.flushall()
    await admin.script_flush()
    outcome = await streams.publish_sequenced("box/0", 4, numbered(2, 3))
    assert (set(outcome.known), outcome.last) == (set(), 0)
    assert await stored(admin) == [2, 3]


@pytest.mark.one_server
async def test_concurrent_sources_share_a_connection(admin: Redis, streams: RedisStreams) -> None:
    """Each gets its own answers; apart from what is published without sequences."""

    async def send(source: int) -> None:
        for n in range(1, 31):
            first = await streams.publish_sequenced(f"box/{source}", 1, numbered(n * 100 + source))
            again = await streams.publish_sequenced(f"box/{source}", 1, numbered(n * 100 + source))
            assert (set(first.known), set(again.known)) == (set(), {n * 100 + source})
            assert again.last == n * 100 + source

    await asyncio.gather(*map(send, range(8)), streams.publish(message(-1)))
    numbers = await stored(admin)
    assert len(numbers) == 8 * 30 + 1
    for source in range(8):
        assert [n for n in numbers if n % 100 == source] == [n * 100 + source for n in range(1, 31)]
    await has_connections(admin, "streams", 2)


async def test_aclose_closes_the_connection_after_what_is_under_way(admin: Redis, streams_client: Redis) -> None:
    streams = RedisStreams(streams_client, app="web")
    sending = asyncio.ensure_future(streams.publish_sequenced("box/0", 1, numbered(*range(1, 400))))
    while not await admin.exists(OUTBOX):
        await asyncio.sleep(0)
    await streams.aclose()
    await sending
    await has_connections(admin, "streams", 0)
    with pytest.raises(BrokerUnavailable, match="after aclose"):
        await streams.publish_sequenced("box/0", 1, numbered(400))
    await streams.aclose()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the first loop's connection can't be closed any more
def test_one_loop_after_another(own_redis: RedisServer) -> None:
    streams = RedisStreams(Redis.from_url(own_redis.url), app="web")

    async def send(n: int) -> list[int]:
        await streams.publish_sequenced("box/0", 1, numbered(n))
        async with Redis.from_url(own_redis.url, protocol=2) as admin:
            return await stored(admin)

    async def send_and_close() -> list[int]:
        try:
            return await send(2)
        finally:
            await streams.aclose()

    assert asyncio.run(send(1)) == [1]
    assert asyncio.run(send_and_close()) == [1, 2]
    with pytest.raises(BrokerUnavailable, match="after aclose"):
        asyncio.run(send(3))
    gc.collect()  # here, where the warning is expected


@pytest.mark.parametrize("sequences", [[0], [-1], [2, 1], [1, 1], [2**53 + 1]], ids=str)
async def test_what_is_no_sequence_is_a_mistake(sequences: Iterable[int], streams: RedisStreams) -> None:
    with pytest.raises(ValueError, match="ascend"):
        await streams.publish_sequenced("box/0", 1, numbered(*sequences))
    with pytest.raises(ValueError, match="epoch"):
        await streams.publish_sequenced("box/0", -1, [])
