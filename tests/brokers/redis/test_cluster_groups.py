"""Consumer groups on a Redis Cluster: streams in different slots, slots that move under a read, nodes that die."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count

import pytest
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from silbo.brokers.redis import DeadLetters, RedisStreams
from silbo.brokers.redis.streams import build_stream_key
from silbo.message import Delivery, Message
from silbo.protocols import Receiver
from tests.support.redis_streams import eventually, message, number, opened, receive
from tools.redis_cluster import ClusterNode, ClusterServers

pytestmark = pytest.mark.cluster


def spread(cluster: ClusterServers, prefix: str) -> list[str]:
    """Addresses whose streams are on different masters, one for each."""
    found: dict[int, str] = {}
    masters = {node.port for node in cluster.nodes if node.run("ROLE")[0] == "master"}
    for each in count():
        address = f"orders-{each}"
        _ = found.setdefault(cluster.node_of(build_stream_key(address, prefix)).port, address)
        if len(found) == len(masters):
            return list(found.values())
    raise AssertionError


_sequences = count(1)


async def publish(streams: RedisStreams, *messages: Message) -> None:
    """As a relay does, which repeats what it had no answer for."""
    numbered = [(next(_sequences), each) for each in messages]

    async def is_published() -> bool:
        return not (await streams.publish_sequenced("outbox", 1, numbered)).unsent

    await eventually(is_published)


async def take(receiver: Receiver, many: int) -> list[Delivery]:
    items = await receive(receiver, many)
    assert all(isinstance(item, Delivery) for item in items), items
    return [item for item in items if isinstance(item, Delivery)]


@pytest.fixture
async def own_streams(own_cluster: ClusterServers) -> AsyncIterator[RedisStreams]:
    async with own_cluster.client() as client, RedisStreams(client, app="web") as streams:
        yield streams


async def test_streams_on_all_nodes_are_one_group(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """Each stream in its order; nothing is left pending, and the lag is that of all."""
    addresses = spread(cluster, prefix)
    async with RedisStreams(cluster_client, app="web", prefix=prefix) as streams:
        group = streams.group("billing", start="oldest", streams=addresses)
        await publish(streams, *[message(each, to=address) for each in range(50) for address in addresses])
        async with opened(group) as receiver:
            assert await group.read_lag() == 150
            got = await take(receiver, 150)
            assert await group.read_lag() == 0
            await receiver.ack(*got[1:])
            assert await receiver.count(got[0], error="broken") == 1
            assert await receiver.bury(got[0], error="broken", attempts=1) is True
        for address in addresses:
            key = build_stream_key(address, prefix)
            assert [number(item) for item in got if item.address == key] == list(range(50))
            assert (await cluster_client.xpending(key, "billing"))["pending"] == 0


async def test_one_stream_needs_one_connection(cluster_client: RedisCluster, prefix: str) -> None:
    async with RedisStreams(cluster_client, app="web", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="oldest")) as receiver:
            await publish(streams, message(1))
            (item,) = await take(receiver, 1)
            await receiver.ack(item)


async def test_dead_letters_are_given_back_while_their_slot_moves(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """The call waits for the rest of its keys; it is not refused, whatever has moved and whatever does not exist."""
    key = build_stream_key("events", prefix)
    slot, target = key_slot(key.encode()), next(node for node in cluster.nodes if node is not cluster.node_of(key))
    async with (
        RedisStreams(cluster_client, app="web", prefix=prefix) as streams,
        DeadLetters(cluster_client, prefix=prefix, timeout=30.0) as dead,
        opened(streams.group("billing", start="oldest")) as receiver,
    ):
        await publish(streams, message(1))
        (item,) = await take(receiver, 1)
        assert await receiver.bury(item, error="broken", attempts=1)
        (letter,) = await dead.list()
        source = cluster.begin_move(slot, target)
        before = cluster.count_errors("TRYAGAIN")
        retrying = asyncio.create_task(dead.retry([letter.id]))

        async def waits() -> bool:  # its attempts are in no key
            return retrying.done() or cluster.count_errors("TRYAGAIN") > before

        await eventually(waits)
        cluster.move_keys(slot, source, target)
        cluster.end_move(slot, target)
        assert (await retrying).returned == 1
        assert await dead.list() == []


async def test_a_slot_that_moves_under_a_read_loses_nothing(
    own_cluster: ClusterServers, own_streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does anything come twice that was acknowledged; it is no outage, and no gap. Also while the keys are on their way."""
    addresses = spread(own_cluster, "silbo")
    moving = build_stream_key(addresses[0], "silbo")
    slot = key_slot(moving.encode())
    source, target, _ = (own_cluster.node_of(build_stream_key(address, "silbo")) for address in addresses)
    got: Counter[int] = Counter()
    async with opened(own_streams.group("billing", start="oldest", streams=addresses)) as receiver:

        async def handle(many: int) -> None:
            while got.total() < many:
                items = await receiver.receive(10)
                got.update(map(number, items))
                await receiver.ack(*[item for item in items if isinstance(item, Delivery)])

        numbers = count()

        async def publish_all() -> None:
            await publish(own_streams, *[message(next(numbers), to=address) for address in addresses])

        async with asyncio.timeout(60):
            await publish_all()
            await handle(3)
            reading = asyncio.create_task(handle(6))  # blocked
            await asyncio.to_thread(own_cluster.begin_move, slot, target)
            await asyncio.to_thread(own_cluster.move_keys, slot, source, target)
            await asyncio.gather(publish_all(), asyncio.to_thread(own_cluster.end_move, slot, target))
            await reading
            for node in (source, target):
                await asyncio.gather(publish_all(), asyncio.to_thread(own_cluster.move, slot, node), publish_all())
            await handle(18)
    assert got == Counter(range(18))
    assert target.run("XPENDING", moving, "billing")["pending"] == 0
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.long
async def test_a_killed_node_holds_up_no_other_and_its_replica_goes_on(
    own_cluster: ClusterServers, own_streams: RedisStreams
) -> None:
    """Deliveries in hand of it come again, acknowledged ones do not; the other nodes are read all the time."""
    addresses = spread(own_cluster, "silbo")
    keys = [build_stream_key(address, "silbo") for address in addresses]
    victim = own_cluster.node_of(keys[0])
    async with opened(own_streams.group("billing", start="oldest", streams=addresses)) as receiver:
        await publish(own_streams, *[message(each, to=addresses[0]) for each in range(10)])
        first = await take(receiver, 10)
        await receiver.ack(*first[:5])
        await asyncio.to_thread(await_replica, victim)
        victim.kill()
        for each in range(10, 30):
            await publish(own_streams, message(each, to=addresses[1]))
            (item,) = await take(receiver, 1)
            assert number(item) == each
            await receiver.ack(item)
        again = await take(receiver, 5)
        assert [(number(item), item.attempt) for item in again] == [(each, 2) for each in range(5, 10)]
        await publish(own_streams, message(30, to=addresses[0]))
        (last,) = await take(receiver, 1)
        assert number(last) == 30
        await receiver.ack(*again, last)
        assert own_cluster.node_of(keys[0]).run("XPENDING", keys[0], "billing")["pending"] == 0


def await_replica(master: ClusterNode) -> None:
    """Wait until the replica has everything."""
    with_replica = master.run("WAIT", 1, 30_000)
    assert with_replica == 1


@pytest.mark.long
async def test_a_replica_that_is_promoted_by_hand_is_followed(
    own_cluster: ClusterServers, own_streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """The read that waits at the former master ends; nothing is lost, nothing comes twice, and it is no outage."""
    addresses = spread(own_cluster, "silbo")
    key = build_stream_key(addresses[0], "silbo")
    master = own_cluster.node_of(key)
    replica = own_cluster.replica_of(master)
    async with opened(own_streams.group("billing", start="oldest", streams=addresses)) as receiver:
        await publish(own_streams, message(1, to=addresses[0]))
        (first,) = await take(receiver, 1)
        await receiver.ack(first)
        reading = asyncio.create_task(take(receiver, 1))
        await asyncio.to_thread(await_replica, master)
        replica.run("CLUSTER", "FAILOVER")

        async def is_promoted() -> bool:
            return bool(replica.run("ROLE")[0] == "master" and master.run("ROLE")[0] == "slave")

        await eventually(is_promoted)
        await publish(own_streams, message(2, to=addresses[0]))
        (second,) = await reading
        assert number(second) == 2
        await receiver.ack(second)
        assert replica.run("XPENDING", key, "billing")["pending"] == 0
    assert not [record.getMessage() for record in caplog.records if "can't be read" in record.getMessage()]
