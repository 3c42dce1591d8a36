"""A Redis that refuses, freezes, dies or is not heard: whatever is repeated, each message is added once."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Sequence

import pytest
from redis.asyncio import Redis

from chaos.proxy import Link, Proxy, Rule
from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis.calls import CallConnection
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Fenced, PublishError
from silbo.message import Message
from tests.support.redis_streams import TOLERANCE, has_connections, message, stored
from tools.redis_server import RedisServer

OUTBOX = "silbo:{events}:outbox"
LAST_IDS = "18446744073709551615-18446744073709551613"
"""After this one there are two more entry ids, and then no more: a stream that fails in the middle of a batch."""


def numbered(*numbers: int, to: str | None = None) -> list[tuple[int, Message]]:
    return [(n, message(n, to=to)) for n in numbers]


class LoseReplies(Rule):
    """Redis carries out a script; its answer goes nowhere, and the connection is cut now or stays open."""

    def __init__(self, *, cut: bool) -> None:
        self._cut, self.wanted, self.lost = cut, 0, 0

    async def request(self, data: bytes, link: Link) -> None:
        link.armed = b"EVALSHA" in data[:32]

    async def reply(self, data: bytes, link: Link) -> None:
        if not link.armed:
            return
        link.armed = False
        if self.lost < self.wanted:
            self.lost += 1
            if self._cut:
                link.cut()
            else:
                await asyncio.sleep(30)


async def until_sent(streams: RedisStreams, epoch: int, batch: Sequence[tuple[int, Message]]) -> list[PublishError]:
    """What a relay does: repeat until it is told; the errors on the way."""
    errors: list[PublishError] = []
    async with asyncio.timeout(20):
        while True:
            try:
                await streams.publish_sequenced("box/0", epoch, batch)
            except (BrokerUnavailable, DeliveryUnknown) as error:
                errors.append(error)
                await asyncio.sleep(0.02)
            else:
                return errors


# -- Redis refuses ------------------------------------------------------------------------------------------


@pytest.mark.one_server
@pytest.mark.every_redis
@pytest.mark.parametrize(
    ("text", "break_it", "mend_it"),
    [
        ("READONLY", ["REPLICAOF 127.0.0.1 1"], ["REPLICAOF NO ONE"]),
        ("OOM", ["CONFIG SET maxmemory 1"], ["CONFIG SET maxmemory 0"]),
        ("NOREPLICAS", ["CONFIG SET min-replicas-to-write 1"], ["CONFIG SET min-replicas-to-write 0"]),
        (
            "MASTERDOWN",
            ["CONFIG SET replica-serve-stale-data no", "REPLICAOF 127.0.0.1 1"],
            ["REPLICAOF NO ONE"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_whole_server_refuses(
    text: str, break_it: list[str], mend_it: list[str], admin: Redis, streams: RedisStreams
) -> None:
    """Redis's own text, at once; nothing is added, and the record says so."""
    await streams.publish_sequenced("box/0", 1, numbered(1))
    for line in break_it:
        await admin.execute_command(*line.split())
    with pytest.raises(BrokerUnavailable, match=text) as caught:
        await streams.publish_sequenced("box/0", 1, numbered(2, 3))
    for line in mend_it:
        await admin.execute_command(*line.split())
    assert "not sent" in str(caught.value)
    assert await admin.hget(OUTBOX, "box/0") == b"1:1"
    assert set((await streams.publish_sequenced("box/0", 1, numbered(2, 3))).known) == set()
    assert await stored(admin) == [1, 2, 3]


@pytest.mark.one_server
async def test_server_that_takes_no_writes_any_more_is_left(admin: Redis, streams: RedisStreams) -> None:
    """Behind a name or a proxy, another connection may lead to the new master."""
    await streams.publish_sequenced("box/0", 1, numbered(1))
    made = (await admin.info("stats"))["total_connections_received"]
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BrokerUnavailable, match="READONLY"):
        await streams.publish_sequenced("box/0", 1, numbered(2))
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    await streams.publish_sequenced("box/0", 1, numbered(2))
    assert (await admin.info("stats"))["total_connections_received"] == made + 1


@pytest.mark.every_redis
async def test_batch_that_fails_in_the_middle_is_recorded_up_to_there(admin: Redis, streams: RedisStreams) -> None:
    """What was added before is not added again, what comes after was not added ahead of what failed."""
    await admin.xadd("silbo:{events}", {"message": "x"}, id=LAST_IDS)
    outcome = await streams.publish_sequenced("box/0", 3, numbered(10, 20, 30, 40))
    assert outcome.unsent.keys() == {30, 40}
    for error in outcome.unsent.values():
        assert re.search("after 2 were sent: .*exhausted", str(error))
    assert await admin.hget(OUTBOX, "box/0") == b"3:20"
    assert await admin.xlen("silbo:{events}") == 3
    with pytest.raises(BrokerUnavailable, match="exhausted.*not sent"):
        await streams.publish_sequenced("box/0", 3, numbered(10, 20, 30, 40))
    await admin.delete("silbo:{events}")
    outcome = await streams.publish_sequenced("box/0", 3, numbered(10, 20, 30, 40))
    assert (set(outcome.known), outcome.last) == ({10, 20}, 20)
    assert await stored(admin) == [30, 40]


@pytest.mark.every_redis
async def test_one_stream_fails_and_another_does_not(admin: Redis, streams: RedisStreams) -> None:
    """The call may be repeated as a whole, and nothing of it comes twice."""
    await admin.set("silbo:{orders}", "a string")
    batch = [*numbered(1), *numbered(2, to="orders"), *numbered(3), *numbered(4, to="orders")]
    for _ in range(2):
        outcome = await streams.publish_sequenced("box/0", 1, batch)
        assert outcome.unsent.keys() == {2, 4}
        assert "silbo:{orders}: WRONGTYPE" in str(outcome.unsent[2])
    assert await stored(admin) == [1, 3]
    await admin.delete("silbo:{orders}")
    assert set((await streams.publish_sequenced("box/0", 1, batch)).known) == {1, 3}
    assert await stored(admin) == [1, 3]
    assert await stored(admin, "silbo:{orders}") == [2, 4]


async def test_old_leader_learns_it_from_any_stream(admin: Redis, streams: RedisStreams) -> None:
    """Before whatever else went wrong: it has to stop."""
    await streams.publish_sequenced("box/0", 2, numbered(1, to="orders"))
    await admin.set("silbo:{events}", "a string")
    with pytest.raises(Fenced):
        await streams.publish_sequenced("box/0", 1, [*numbered(2), *numbered(3, to="orders")])


@pytest.mark.every_redis
@pytest.mark.parametrize("record", [None, "", "7", "1:x", "x:1"], ids=str)
async def test_record_that_is_none_is_found_before_anything_is_added(
    record: str | None, admin: Redis, streams: RedisStreams
) -> None:
    if record is None:
        await admin.set(OUTBOX, "a string")
    else:
        await admin.hset(OUTBOX, "box/0", record)
    with pytest.raises(BrokerUnavailable, match=r"silbo:\{events\}:outbox.*not sent"):
        await streams.publish_sequenced("box/0", 1, numbered(1))
    assert await stored(admin) == []


@pytest.mark.every_redis
async def test_user_who_may_not_write_the_record_adds_nothing(own_redis: RedisServer, admin: Redis) -> None:
    """Entries without a record would come again with every repetition."""
    rules = ["on", ">password", "~silbo:*", "+ping", "+eval", "+evalsha", "+xadd", "+time", "+hget"]
    await admin.execute_command("ACL", "SETUSER", "poor", *rules)
    async with Redis.from_url(own_redis.url, username="poor", password="password") as client:
        async with RedisStreams(client, app="web") as streams:
            with pytest.raises(BrokerUnavailable, match="refused it.*not sent"):
                await streams.publish_sequenced("box/0", 1, numbered(1))
    assert await stored(admin) == []


# -- Redis is not heard -------------------------------------------------------------------------------------


@pytest.mark.every_redis
@pytest.mark.parametrize("cut", [True, False], ids=["cut", "silent"])
async def test_lost_answer_is_repeated_without_a_duplicate(cut: bool, own_redis: RedisServer, admin: Redis) -> None:
    """Also where the connection stays open: it is given up, so that no late answer is taken for another's."""
    rule = LoseReplies(cut=cut)
    async with Proxy(own_redis.url, rule) as proxy:
        async with Redis.from_url(proxy.url, username="streams", password="password") as client:
            async with RedisStreams(client, app="web", timeout=5 if cut else 0.2) as streams:
                await streams.publish_sequenced("box/0", 1, numbered(1))
                for n in range(2, 12, 2):
                    rule.wanted += 1
                    with pytest.raises(DeliveryUnknown):
                        await streams.publish_sequenced("box/0", 1, numbered(n, n + 1))
                    outcome = await streams.publish_sequenced("box/0", 1, numbered(n, n + 1))
                    assert (set(outcome.known), outcome.last) == ({n, n + 1}, n + 1)
                assert rule.lost == 5
    assert await stored(admin) == list(range(1, 12))


@pytest.mark.every_redis
async def test_frozen_redis_is_waited_for_no_longer_than_the_deadline(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """What was on its way may have arrived, what came after it has not; afterwards each is there once."""
    async with RedisStreams(streams_client, app="web", timeout=0.5) as streams:
        await streams.publish_sequenced("box/0", 1, numbered(1))
        own_redis.pause()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        first = asyncio.ensure_future(streams.publish_sequenced("box/0", 1, numbered(2)))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(streams.publish_sequenced("box/1", 1, numbered(3)))
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert [type(result) for result in results] == [DeliveryUnknown, BrokerUnavailable]
        with pytest.raises(BrokerUnavailable, match=r"has not answered within 0.5 s; nothing was done"):
            await streams.publish_sequenced("box/0", 1, numbered(2))
        assert loop.time() - begin < 1 + TOLERANCE
        own_redis.resume()
        await until_sent(streams, 1, numbered(2, 4))
        assert await stored(admin) == [1, 2, 4]


async def test_call_does_not_wait_for_its_turn_past_its_deadline(own_redis: RedisServer, streams_client: Redis) -> None:
    """As the second part of a large call, behind one that began later."""
    connection = CallConnection(streams_client, 2 * TOLERANCE)
    await connection.run_command(b"PING")
    own_redis.pause()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    first = asyncio.ensure_future(connection.run_command(b"PING"))
    await asyncio.sleep(0)
    with pytest.raises(BrokerUnavailable, match="nothing was done"):
        await connection.run_all(deadline=begin + 0.2)
    assert loop.time() - begin < 0.2 + TOLERANCE
    own_redis.resume()
    assert await first == b"PONG"
    await connection.aclose()


@pytest.mark.every_redis
async def test_redis_killed_and_restarted_again_and_again(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    async with RedisStreams(streams_client, app="web", timeout=2) as streams:
        errors: list[PublishError] = []
        reached = asyncio.Event()

        async def relay() -> None:
            for n in itertools.count(1, 50):
                errors.extend(await until_sent(streams, 1, numbered(*range(n, n + 50))))
                reached.set()
                if len(killed) == 3 and len(errors) >= 3:
                    return

        killed: list[int] = []
        relaying = asyncio.ensure_future(relay())
        for _ in range(3):
            reached.clear()
            await reached.wait()
            await asyncio.to_thread(own_redis.kill)
            killed.append(own_redis.pid)
            await asyncio.to_thread(own_redis.restart)
        await relaying
        numbers = await stored(admin)
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.every_redis
async def test_redis_killed_within_a_write_and_killed_again(
    own_redis: RedisServer, admin: Redis, streams: RedisStreams
) -> None:
    """What is torn is repeated, and stands in the stream once: as long as the file is rewritten after a kill."""
    await streams.publish_sequenced("box/0", 1, numbered(*range(1, 11)))
    await streams.publish_sequenced("box/0", 1, numbered(*range(11, 31)))
    await asyncio.to_thread(own_redis.kill)
    file = max(own_redis.folder.rglob("*.aof"), key=lambda path: path.stat().st_size)
    written = file.read_bytes()
    file.write_bytes(written[: (written.rindex(b"MULTI") + len(written)) // 2])
    await asyncio.to_thread(own_redis.restart)
    assert await stored(admin) == list(range(1, 11))
    await until_sent(streams, 1, numbered(*range(11, 31)))
    await asyncio.to_thread(own_redis.kill)
    await asyncio.to_thread(own_redis.restart)
    assert await stored(admin) == list(range(1, 31))


async def test_idle_connection_that_was_cut_is_replaced_without_an_error(admin: Redis, streams: RedisStreams) -> None:
    for n in range(1, 20):
        await streams.publish_sequenced("box/0", 1, numbered(n))
        await admin.client_kill_filter(_type="normal", skipme=True)
    assert await stored(admin) == list(range(1, 20))


async def test_dead_redis_is_an_error_at_once(own_redis: RedisServer, streams: RedisStreams) -> None:
    """The relay has a back-off of its own."""
    await asyncio.to_thread(own_redis.kill)
    async with asyncio.timeout(TOLERANCE):
        with pytest.raises(BrokerUnavailable, match="can't be reached.*nothing was done"):
            await streams.publish_sequenced("box/0", 1, numbered(1))


async def test_wrong_password_is_told(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url, username="streams", password="wrong") as client:
        async with RedisStreams(client, app="web") as streams:
            with pytest.raises(BrokerUnavailable, match="refused the connection: WRONGPASS"):
                await streams.publish_sequenced("box/0", 1, numbered(1))


@pytest.mark.one_server
async def test_cancelled_call_leaves_at_once_and_gets_nobody_a_wrong_answer(
    admin: Redis, streams_client: Redis
) -> None:
    """At random points; what follows has its own answer, and what was cancelled can be repeated."""
    chance = random.Random(7)
    cancelled = 0
    async with RedisStreams(streams_client, app="web") as streams:
        for n in range(1, 800, 2):
            sending = asyncio.ensure_future(streams.publish_sequenced("box/0", 1, numbered(n, n + 1)))
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.0005)
            sending.cancel()
            await asyncio.wait([sending])
            cancelled += sending.cancelled()
            outcome = await streams.publish_sequenced("box/0", 1, numbered(n, n + 1))
            assert outcome.last in (n - 1, n + 1)
            assert set(outcome.known) == ({n, n + 1} if outcome.last == n + 1 else set())
        await has_connections(admin, "streams", 1)
    assert cancelled > 100
    assert await stored(admin) == list(range(1, 801))


async def test_cancelled_while_redis_is_frozen(own_redis: RedisServer, admin: Redis, streams: RedisStreams) -> None:
    await streams.publish_sequenced("box/0", 1, numbered(1))
    own_redis.pause()
    sending = asyncio.ensure_future(streams.publish_sequenced("box/0", 1, [(2, message(2, blob="x" * 900_000))]))
    await asyncio.sleep(0.1)
    sending.cancel()
    async with asyncio.timeout(TOLERANCE):
        await asyncio.wait([sending])
    assert sending.cancelled()
    own_redis.resume()
    await streams.publish_sequenced("box/0", 2, numbered(2))
    assert await stored(admin) == [1, 2]
    await has_connections(admin, "streams", 1)
