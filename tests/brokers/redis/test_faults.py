"""Redis killed, frozen, restarted, read-only, full: every publish is answered in time, and truly."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from statistics import median

import pytest
from redis.asyncio import Redis

from silbo.brokers import _sender
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable, DeliveryUnknown, PublishError
from tests.support.redis_streams import TOLERANCE, eventually, has_connections, message, number, opened, receive, stored
from tools.redis_binary import Binary
from tools.redis_server import RedisServer


class Ledger:
    """What became of each publish."""

    def __init__(self, broker: RedisStreams | RedisPubSub, timeout: float) -> None:
        self._broker, self._timeout, self._numbers = broker, timeout, count()
        self.outcomes: dict[int, type[PublishError] | None] = {}
        self.slowest = 0.0

    async def publish(self) -> type[PublishError] | None:
        """One more message; what became of it."""
        n = next(self._numbers)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        try:
            await self._broker.publish(message(n))
            outcome = None
        except PublishError as error:
            outcome = type(error)
        self.outcomes[n] = outcome
        self.slowest = max(self.slowest, loop.time() - begin)
        return outcome

    async def grows(self, by: int) -> float:
        """Seconds until so many more publishes have succeeded."""
        goal = len(self.numbers(None)) + by

        async def is_there() -> bool:
            return len(self.numbers(None)) >= goal

        return await eventually(is_there)

    @asynccontextmanager
    async def load(self, publishers: int = 20) -> AsyncIterator[None]:
        """So many publish one after another for as long as the block runs."""
        running = True

        async def publisher() -> None:
            while running:
                if await self.publish() is not None:
                    await asyncio.sleep(0.005)  # as a host would, that got an error

        tasks = [asyncio.ensure_future(publisher()) for _ in range(publishers)]
        try:
            yield
        finally:
            running = False
            await asyncio.gather(*tasks)

    def check(self, arrived: list[int]) -> None:
        """What was told is true: sent is there, not sent is not, nothing is there twice, all within the deadline."""
        assert max(Counter(arrived).values(), default=1) == 1
        there = set(arrived)
        assert self.numbers(None) <= there
        assert not self.numbers(BrokerUnavailable) & there
        assert there <= self.numbers(None) | self.numbers(DeliveryUnknown)
        assert self.slowest < self._timeout + TOLERANCE

    def numbers(self, outcome: type[PublishError] | None) -> set[int]:
        return {n for n, what in self.outcomes.items() if what is outcome}


@pytest.mark.every_redis
async def test_redis_killed_and_restarted_under_load(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """What waits survives the reconnection; only what was under way is unknown."""
    async with RedisStreams(streams_client, app="web", timeout=3) as streams:
        ledger = Ledger(streams, timeout=3)
        async with ledger.load():
            for _ in range(3):
                await ledger.grows(500)
                await asyncio.to_thread(own_redis.kill)
                await asyncio.to_thread(own_redis.restart)
            await ledger.grows(500)
        ledger.check(await stored(admin))
        assert len(ledger.numbers(DeliveryUnknown)) <= 3 * 20
        assert not ledger.numbers(BrokerUnavailable)  # it was back in time
        await has_connections(admin, "streams", 1)


@pytest.mark.every_redis
async def test_redis_frozen_under_load(own_redis: RedisServer, admin: Redis, streams_client: Redis) -> None:
    """After the first missed deadline publishes fail at once; when Redis goes on, so do they, without a restart."""
    async with RedisStreams(streams_client, app="web", timeout=0.5) as streams:
        ledger = Ledger(streams, timeout=0.5)
        async with ledger.load():
            await ledger.grows(500)
            own_redis.pause()
            while not ledger.numbers(DeliveryUnknown):
                await asyncio.sleep(0.01)
            loop = asyncio.get_running_loop()
            took: list[float] = []
            for _ in range(20):
                begin = loop.time()
                assert await ledger.publish() is BrokerUnavailable
                took.append(loop.time() - begin)
                await asyncio.sleep(0.05)
            assert median(took) < 0.25  # half of the deadline: they did not wait for it
            own_redis.resume()
            await ledger.grows(500)
        ledger.check(await stored(admin))
        await has_connections(admin, "streams", 1)


async def test_half_sent_message_does_not_arrive_later(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    """Its connection is gone before Redis goes on reading."""
    async with RedisStreams(streams_client, app="web", timeout=0.5) as streams:
        await streams.publish(message(0))
        own_redis.pause()
        with pytest.raises(DeliveryUnknown):
            await streams.publish(message(1, blob="x" * 1_000_000))  # more than a unix socket holds
        own_redis.resume()
        ledger = Ledger(streams, timeout=0.5)

        async def is_sent() -> bool:
            return await ledger.publish() is None

        await eventually(is_sent)
        await has_connections(admin, "streams", 1)
        assert len(await stored(admin)) == 2  # the first, and the ledger's


async def test_dead_redis_holds_up_the_first_publish_only(own_redis: RedisServer, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", timeout=0.4) as streams:
        own_redis.kill()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        results = await asyncio.gather(*[streams.publish(message(n)) for n in range(5)], return_exceptions=True)
        assert 0.3 < loop.time() - begin < 0.4 + TOLERANCE
        assert {type(result) for result in results} == {BrokerUnavailable}
        took: list[float] = []
        for n in range(5, 14):
            begin = loop.time()
            with pytest.raises(BrokerUnavailable, match=r"has not answered since \d\d:\d\d:\d\d UTC \(.*\); not sent"):
                await streams.publish(message(n))
            took.append(loop.time() - begin)
        assert median(took) < 0.2  # half of the deadline
        own_redis.restart()

        async def publishes() -> bool:
            await streams.publish(message(20))
            return True

        await eventually(publishes)


@pytest.mark.long
async def test_dead_redis_is_not_looked_for_for_ever(
    own_redis: RedisServer, streams_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When nobody publishes the search ends; then the next publish waits for Redis itself."""
    monkeypatch.setattr(_sender, "PROBE_FOR", 0.2)
    before = asyncio.all_tasks()
    async with RedisStreams(streams_client, app="web", timeout=1) as streams:
        await asyncio.to_thread(own_redis.kill)
        with pytest.raises(BrokerUnavailable):
            await streams.publish(message(1))
        (search,) = asyncio.all_tasks() - before
        async with asyncio.timeout(0.2 + TOLERANCE):
            await asyncio.wait([search])
        publishing = asyncio.ensure_future(streams.publish(message(2)))
        await asyncio.to_thread(own_redis.restart)
        await publishing


async def test_messages_wait_for_a_redis_that_comes_back_in_time(
    own_redis: RedisServer, admin: Redis, streams_client: Redis
) -> None:
    async with RedisStreams(streams_client, app="web") as streams:
        await streams.publish(message(0))
        await asyncio.to_thread(own_redis.kill)
        publishes = [asyncio.ensure_future(streams.publish(message(n))) for n in range(1, 50)]
        await asyncio.to_thread(own_redis.restart)
        await asyncio.gather(*publishes)
        assert sorted(await stored(admin)) == list(range(50))


async def test_message_is_not_sent_when_its_time_is_nearly_over(admin: Redis, streams_client: Redis) -> None:
    """As after a host has blocked its loop: better surely not sent than unknown, and Redis is not to blame."""
    async with RedisStreams(streams_client, app="web", timeout=1) as streams:
        await streams.publish(message(0))
        publishing = asyncio.ensure_future(streams.publish(message(1)))
        await asyncio.sleep(0)
        time.sleep(0.97)
        with pytest.raises(BrokerUnavailable, match="took longer than 1 s for the messages before it; not sent"):
            await publishing
        await streams.publish(message(2))
        assert await stored(admin) == [0, 2]


async def test_idle_connection_that_was_cut_is_replaced_without_an_error(admin: Redis, streams: RedisStreams) -> None:
    """As by Redis's own ``timeout``, or a proxy."""
    for n in range(20):
        await streams.publish(message(n))
        await admin.client_kill_filter(_type="normal", skipme=True)
    assert await stored(admin) == list(range(20))


async def test_connections_cut_under_load(admin: Redis, streams_client: Redis) -> None:
    async with RedisStreams(streams_client, app="web", timeout=2) as streams:
        ledger = Ledger(streams, timeout=2)
        async with ledger.load():
            for _ in range(30):
                await ledger.grows(50)
                await admin.client_kill_filter(_type="normal", skipme=True)
        ledger.check(await stored(admin))
        assert not ledger.numbers(BrokerUnavailable)


async def test_publish_waits_for_room_and_then_fails_in_time(
    own_redis: RedisServer, admin: Redis, streams_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded; those who found no room are told that nothing was sent."""
    monkeypatch.setattr(_sender, "QUEUE_MESSAGES", 1000)
    async with RedisStreams(streams_client, app="web", timeout=1) as streams:
        await streams.publish(message(0))
        own_redis.pause()
        ledger = Ledger(streams, timeout=1)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(2000):
                tasks.create_task(ledger.publish())
        own_redis.resume()
        unknown, unsent = ledger.numbers(DeliveryUnknown), ledger.numbers(BrokerUnavailable)
        assert 0 < len(unknown) <= 500  # the flush that was under way
        assert len(unknown) + len(unsent) == 2000
        assert ledger.slowest < 1 + TOLERANCE


async def test_publishes_past_the_bound_go_out_in_turn(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sender, "QUEUE_MESSAGES", 1000)
    many = 2 * 1000 + 500
    sent = asyncio.gather(*[streams.publish(message(n)) for n in range(many)])
    await asyncio.sleep(0)
    cancelled = asyncio.ensure_future(streams.publish(message(-1)))
    await asyncio.sleep(0)
    cancelled.cancel()
    await sent
    assert await stored(admin) == list(range(many))


async def test_bytes_in_line_are_bounded_too(admin: Redis, streams: RedisStreams) -> None:
    large = "x" * 500_000
    await asyncio.gather(*[streams.publish(message(n, blob=large)) for n in range(60)])
    assert await stored(admin) == list(range(60))


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
    """Redis's own text, at once, and nothing was sent; afterwards all is well."""
    await streams.publish(message(0))
    for command in break_it:
        await admin.execute_command(*command.split())
    results = await asyncio.gather(*[streams.publish(message(n)) for n in range(1, 30)], return_exceptions=True)
    for command in mend_it:
        await admin.execute_command(*command.split())
    assert {type(result) for result in results} == {BrokerUnavailable}
    assert text in str(results[0])
    assert "not sent" in str(results[0])
    await streams.publish(message(30))
    assert await stored(admin) == [0, 30]


@pytest.mark.one_server
async def test_read_only_server_is_left(admin: Redis, streams: RedisStreams) -> None:
    """Behind a name or a proxy, another connection may lead to the new master."""
    await streams.publish(message(0))
    made = (await admin.info("stats"))["total_connections_received"]
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BrokerUnavailable, match="READONLY"):
        await streams.publish(message(1))
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    await streams.publish(message(2))
    assert (await admin.info("stats"))["total_connections_received"] == made + 1


@pytest.mark.every_redis
async def test_disk_trouble_refuses(own_redis: RedisServer, admin: Redis, streams: RedisStreams) -> None:
    """MISCONF; a new connection finds Redis alive all the same, though even PING is refused."""
    (own_redis.folder / "dump.rdb").mkdir()
    await admin.config_set("save", "3600 1")
    await admin.bgsave()
    await eventually(lambda: _has_failed(admin))
    for _ in range(2):
        with pytest.raises(BrokerUnavailable, match="MISCONF"):
            await streams.publish(message(1))
    await admin.config_set("save", "")
    await streams.publish(message(2))
    assert await stored(admin) == [2]


async def _has_failed(admin: Redis) -> bool:
    return (await admin.info("persistence"))["rdb_last_bgsave_status"] != "ok"


@pytest.mark.every_redis
async def test_script_that_can_not_go_on_adds_nothing(own_redis: RedisServer, admin: Redis) -> None:
    """An error in the middle of the script must not leave behind what was told to be not sent."""
    rules = ["on", ">password", "~silbo:*", "+ping", "+eval", "+evalsha", "+xadd", "+xlen", "+hget"]
    await admin.execute_command("ACL", "SETUSER", "poor", *rules)
    async with Redis.from_url(own_redis.url, username="poor", password="password") as client:
        async with RedisStreams(client, app="web") as streams:
            with pytest.raises(BrokerUnavailable, match="refused it.*not sent"):
                await streams.publish(message(1))  # no TIME
        async with RedisStreams(client, app="web", retain=None) as streams:
            await streams.publish(message(2))
    assert await stored(admin) == [2]


@pytest.mark.long
@pytest.mark.every_redis
async def test_publishes_wait_while_redis_is_loading(redis_binary: Binary | None) -> None:
    slow = {"key-load-delay": 400, "rdbcompression": "no", "dbfilename": "slow.rdb"}
    with RedisServer(config=slow, binary=redis_binary) as server:
        async with Redis.from_url(server.url) as client, RedisStreams(client, app="web", timeout=20) as streams:
            async with client.pipeline(transaction=False) as pipeline:
                for n in range(3000):
                    pipeline.set(f"key-{n}", "x" * 3000)  # while it loads, Redis answers after each 2 MiB
                await pipeline.execute()
            await client.save()
            await streams.publish(message(1))  # lost with the kill
            await asyncio.to_thread(server.kill)
            restarted = asyncio.ensure_future(asyncio.to_thread(server.restart))
            await streams.publish(message(2))
            await restarted
            assert "LOADING" in server.log or "Loading" in server.log
            assert await stored(client) == [2]


@pytest.mark.every_redis
async def test_publishes_wait_while_redis_has_too_many_clients(admin: Redis, streams: RedisStreams) -> None:
    await admin.config_set("maxclients", 1)
    publishing = asyncio.ensure_future(streams.publish(message(1)))
    rejected = 0
    while not rejected:
        rejected = (await admin.info("stats"))["rejected_connections"]
    assert not publishing.done()
    await admin.config_set("maxclients", 100)
    await publishing
    assert await stored(admin) == [1]


# -- cancellation -------------------------------------------------------------------------------------------


@pytest.mark.one_server
async def test_cancelled_publishes_leave_no_wrong_answers_behind(admin: Redis, streams_client: Redis) -> None:
    """Cancelled in line it is withdrawn, under way its answer is dropped; nobody gets another's answer."""
    chance = random.Random(4)
    async with RedisStreams(streams_client, app="web", timeout=5) as streams:
        told: set[int] = set()
        cancelled = 0

        async def publish(n: int) -> None:
            await streams.publish(message(n))
            told.add(n)

        for n in range(0, 3000, 10):
            tasks = [asyncio.ensure_future(publish(n + i)) for i in range(10)]
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            await asyncio.sleep(chance.random() * 0.001)
            for task in tasks:
                if chance.random() < 0.7:
                    task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled += sum(isinstance(result, asyncio.CancelledError) for result in results)
            assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        await publish(3000)
        assert cancelled > 200
        arrived = await stored(admin)
        assert len(arrived) == len(set(arrived))
        assert told <= set(arrived)
        await has_connections(admin, "streams", 1)


async def test_cancelled_in_line_is_withdrawn(own_redis: RedisServer, admin: Redis, streams_client: Redis) -> None:
    """Wherever it stands; and a deadline that only withdrawn messages missed makes nobody wait or fail."""
    async with RedisStreams(streams_client, app="web", timeout=1) as streams:
        await asyncio.to_thread(own_redis.kill)
        first = asyncio.ensure_future(streams.publish(message(1)))
        await asyncio.sleep(0.7)
        waiting = [asyncio.ensure_future(streams.publish(message(n))) for n in (2, 3, 4)]
        await asyncio.sleep(0)
        first.cancel()
        waiting[1].cancel()
        await asyncio.sleep(0.5)
        assert not waiting[0].done()
        await asyncio.to_thread(own_redis.restart)
        await asyncio.gather(waiting[0], waiting[2])
        assert await stored(admin) == [2, 4]


async def test_sender_that_is_cancelled_answers_who_waits(own_redis: RedisServer, streams_client: Redis) -> None:
    """As when a host cancels every task of its loop."""
    async with RedisStreams(streams_client, app="web") as streams:
        await streams.publish(message(0))
        own_redis.pause()
        before = asyncio.all_tasks()
        flying = asyncio.ensure_future(streams.publish(message(1)))
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(streams.publish(message(2)))
        await asyncio.sleep(0.05)
        (sender,) = asyncio.all_tasks() - before - {flying, waiting}
        sender.cancel()
        results = await asyncio.gather(flying, waiting, return_exceptions=True)
        own_redis.resume()
        assert [type(result) for result in results] == [DeliveryUnknown, BrokerUnavailable]
        await streams.publish(message(3))


async def test_aclose_of_a_silent_broker_ends_at_once(own_redis: RedisServer, streams_client: Redis) -> None:
    streams = RedisStreams(streams_client, app="web", timeout=0.3)
    own_redis.pause()
    with pytest.raises(BrokerUnavailable):
        await streams.publish(message(1))
    async with asyncio.timeout(0.3 + TOLERANCE):
        await streams.aclose()
    own_redis.resume()


async def test_aclose_answers_what_waits_for_a_frozen_redis(own_redis: RedisServer, streams_client: Redis) -> None:
    streams = RedisStreams(streams_client, app="web", timeout=0.5)
    await streams.publish(message(0))
    own_redis.pause()
    publishes = [asyncio.ensure_future(streams.publish(message(n))) for n in range(600)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(0.5 + TOLERANCE):
        await streams.aclose()
    own_redis.resume()
    assert {type(publish.exception()) for publish in publishes} == {DeliveryUnknown, BrokerUnavailable}


async def test_cancelled_aclose_leaves_at_once(own_redis: RedisServer, streams_client: Redis) -> None:
    streams = RedisStreams(streams_client, app="web", timeout=20)
    await streams.publish(message(0))
    own_redis.pause()
    publish = asyncio.ensure_future(streams.publish(message(1)))
    await asyncio.sleep(0.05)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await streams.aclose()
    with pytest.raises(DeliveryUnknown):
        await publish
    own_redis.resume()


# -- Pub/Sub ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.every_redis
async def test_pubsub_outlives_a_kill_and_a_freeze(own_redis: RedisServer, admin: Redis, pubsub_client: Redis) -> None:
    async with RedisPubSub(pubsub_client, app="web", timeout=0.5) as pubsub:
        ledger = Ledger(pubsub, timeout=0.5)
        async with ledger.load(5):
            for fault, end in ((own_redis.kill, own_redis.restart), (own_redis.pause, own_redis.resume)):
                await ledger.grows(100)
                await asyncio.to_thread(fault)
                await asyncio.sleep(0.8)
                await asyncio.to_thread(end)
            await ledger.grows(100)
        assert ledger.slowest < 0.5 + TOLERANCE
        async with opened(pubsub.subscribe()) as receiver:
            await pubsub.publish(message(-1))
            assert [number(item) for item in await receive(receiver, 1)] == [-1]
    with suppress(BrokerUnavailable):
        await pubsub.aclose()
