"""Pub/Sub on a Redis Cluster: over any node, or in sharded channels that follow their slots."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import count

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.crc import key_slot

from silbo.brokers.redis import RedisPubSub
from silbo.brokers.redis.connection import Connection
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Gap, NameInvalid
from silbo.message import Delivery
from silbo.protocols import Receiver
from silbo.wire.formats import DIATOR
from tests.support.redis_streams import message, number, opened, receive
from tools.redis_binary import WHEELS, fetch
from tools.redis_cluster import ClusterServers
from tools.redis_server import RedisServer

pytestmark = [pytest.mark.cluster, pytest.mark.every_redis]

NAMES = [f"order.n{n}" for n in range(12)]


@pytest.fixture
def has_sharded_channels(request: pytest.FixtureRequest) -> None:
    for name in {"cluster", "own_cluster"} & set(request.fixturenames):
        servers: ClusterServers = request.getfixturevalue(name)
        if servers.nodes[0].binary.version.startswith("6."):
            pytest.skip("Redis 6.2 has no sharded channels")


@pytest.fixture(params=["all at once", "one by one"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read replies with silbo's own parser; or through redis-py, as if it did not give its transport any more."""
    if request.param == "one by one":
        monkeypatch.setattr(Connection, "_current_transport", lambda connection: None)


def channel(prefix: str, name: str) -> str:
    return f"{prefix}:notification_event:{name}"


async def gaps_and_numbers(receiver: Receiver, last: int) -> tuple[list[Gap], list[int]]:
    """Return the items up to the message of this number; errors on the way are passed over, as a consumer does."""
    gaps: list[Gap] = []
    numbers: list[int] = []
    async with asyncio.timeout(30):
        while last not in numbers:
            try:
                for item in await receiver.receive(100):
                    if isinstance(item, Gap):
                        gaps.append(item)
                    else:
                        numbers.append(number(item))
            except BrokerUnavailable:
                await asyncio.sleep(0.01)
    return gaps, numbers


async def gaps_until_heard_again(pubsub: RedisPubSub, name: str, receiver: Receiver) -> list[Gap]:
    """Publish again and again, until something is heard after a gap."""
    ending = asyncio.Event()

    async def publish() -> None:
        for n in count(1000):
            with suppress(BrokerUnavailable, DeliveryUnknown):
                await pubsub.publish(message(n, name))
            await asyncio.sleep(0.01)
            if ending.is_set():
                return

    gaps: list[Gap] = []
    async with asyncio.timeout(40), asyncio.TaskGroup() as tasks:
        tasks.create_task(publish())
        while not ending.is_set():
            try:
                for item in await receiver.receive(100):
                    if isinstance(item, Gap):
                        gaps.append(item)
                    elif gaps:
                        ending.set()
            except BrokerUnavailable:
                await asyncio.sleep(0.01)
    return gaps


async def test_message_reaches_subscribers_at_every_node(cluster_client: RedisCluster, prefix: str) -> None:
    """Classic channels: a cluster's bus carries them to all nodes, in the order of one publisher."""
    async with RedisPubSub(cluster_client, app="web", prefix=prefix) as pubsub:
        subscription = pubsub.subscribe("order.*")
        receivers = [await subscription.open() for _ in range(6)]
        await pubsub.publish(*[message(n, NAMES[n % 12]) for n in range(100)])
        for receiver in receivers:
            assert [number(item) for item in await receive(receiver, 100)] == list(range(100))
            await receiver.aclose()


@pytest.mark.usefixtures("has_sharded_channels", "way_of_reading")
async def test_sharded_channels_are_heard_by_name(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """Those of all nodes, and nothing else; in the order of each channel."""
    assert {cluster.node_of(channel(prefix, name)).port for name in NAMES} == {node.port for node in cluster.nodes}
    async with RedisPubSub(cluster_client, app="web", prefix=prefix, sharded=True) as pubsub:
        async with opened(pubsub.subscribe(*NAMES[1:], channels=("billing",))) as receiver:
            for first in (0, 100):
                await pubsub.publish(*[message(n, NAMES[n % 12]) for n in range(first, first + 100)])
                await pubsub.publish(message(first + 1000, "invoice.paid", to="billing"))
                heard = await receive(receiver, sum(n % 12 != 0 for n in range(first, first + 100)) + 1)
                by_name: dict[str, list[int]] = {}
                for item in heard:
                    assert isinstance(item, Delivery)
                    by_name.setdefault(item.message().message_name, []).append(number(item))
                assert by_name.pop("invoice.paid") == [first + 1000]
                assert by_name == {
                    name: [n for n in range(first, first + 100) if n % 12 == at] for at, name in enumerate(NAMES) if at
                }


@pytest.mark.usefixtures("has_sharded_channels")
async def test_limit_holds_over_all_nodes(cluster: ClusterServers, cluster_client: RedisCluster, prefix: str) -> None:
    """The rest comes with the next calls, in the order of its channel."""
    names = list({cluster.node_of(channel(prefix, name)).port: name for name in NAMES}.values())
    assert len(names) == 3
    async with (
        RedisPubSub(cluster_client, app="web", prefix=prefix, sharded=True) as pubsub,
        opened(pubsub.subscribe(*names)) as receiver,
    ):
        for _ in range(5):
            await pubsub.publish(*[message(n, name) for name in names for n in range(7)])
            heard: dict[str, list[int]] = {}
            async with asyncio.timeout(30):
                while sum(map(len, heard.values())) < 21:
                    items = await receiver.receive(10)
                    assert len(items) <= 10
                    for item in items:
                        assert isinstance(item, Delivery)
                        heard.setdefault(item.message().message_name, []).append(number(item))
            assert heard == {name: [*range(7)] for name in names}


def test_sharded_subscription_takes_no_pattern(cluster: ClusterServers) -> None:
    pubsub = RedisPubSub(cluster.client(), app="web", sharded=True)
    for patterns in (("order.*",), ("**",), ()):
        with pytest.raises(NameInvalid, match="sharded channels have no patterns"):
            pubsub.subscribe(*patterns)
    with pytest.raises(ValueError, match="do not tell the event's name"):
        RedisPubSub(cluster.client(), app="web", sharded=True, format=DIATOR)


async def test_server_that_is_too_old_says_so() -> None:
    """Redis 6.2 has no sharded channels."""
    with RedisServer(port=True, binary=fetch(WHEELS[1])) as server:
        async with Redis.from_url(server.url) as client, RedisPubSub(client, app="web", sharded=True) as pubsub:
            with pytest.raises(BrokerUnavailable, match="sharded channels need Redis 7"):
                await pubsub.publish(message(1))
            with pytest.raises(BrokerUnavailable, match="sharded channels need Redis 7"):
                await pubsub.subscribe("user.joined").open()


async def test_single_server_has_sharded_channels_too() -> None:
    with RedisServer(port=True) as server:
        async with Redis.from_url(server.url) as client, RedisPubSub(client, app="web", sharded=True) as pubsub:
            async with opened(pubsub.subscribe("a", "b")) as receiver:
                await pubsub.publish(message(1, "a"), message(2, "b"), message(3, "c"))
                assert sorted(number(item) for item in await receive(receiver, 2)) == [1, 2]
                await client.client_kill_filter(_type="pubsub")
                gaps = await gaps_until_heard_again(pubsub, "a", receiver)
                assert {gap.address.rpartition(":")[2] for gap in gaps} == {"a", "b"}


@pytest.mark.usefixtures("has_sharded_channels", "way_of_reading")
async def test_sharded_subscription_follows_its_slot(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """With a gap; publishes go on without an error, and in order."""
    name, other = NAMES[:2]
    slot = key_slot(channel(prefix, name).encode())
    async with RedisPubSub(cluster_client, app="web", prefix=prefix, sharded=True) as pubsub:
        async with opened(pubsub.subscribe(name, other)) as receiver:
            await pubsub.publish(message(1, name))
            assert (await gaps_and_numbers(receiver, 1))[1] == [1]
            source = cluster.node_of(slot)
            target = next(node for node in cluster.nodes if node is not source)
            cluster.begin_move(slot, target)
            await pubsub.publish(message(2, name), message(3, name))  # still at the source
            assert (await gaps_and_numbers(receiver, 3)) == ([], [2, 3])
            cluster.end_move(slot, target)
            (gap,) = await receive(receiver, 1)
            assert isinstance(gap, Gap)
            assert gap.address == channel(prefix, name)
            assert "moved to another node" in gap.reason
            await pubsub.publish(message(4, name), message(5, other))
            gaps, numbers = await gaps_and_numbers(receiver, 4)
            assert gaps == []
            assert set(numbers) <= {4, 5}


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["kill", "pause"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "classic"])
async def test_subscription_outlives_its_node(
    request: pytest.FixtureRequest, own_cluster: ClusterServers, prefix: str, how: str, sharded: bool
) -> None:
    """Messages are heard again when the subscription is back, and a gap tells of the time between."""
    if sharded:
        request.getfixturevalue("has_sharded_channels")
    node = own_cluster.node_of(channel(prefix, NAMES[0]))
    async with own_cluster.client() as client:
        async with RedisPubSub(client, app="web", prefix=prefix, sharded=sharded, timeout=2) as pubsub:
            names = NAMES if sharded else ["order.*"]
            async with opened(pubsub.subscribe(*names)) as receiver:
                await pubsub.publish(message(1, NAMES[0]))
                await gaps_and_numbers(receiver, 1)
                if not sharded:
                    nodes = [each for each in own_cluster.nodes if each.run("PUBSUB", "NUMPAT")]
                    (node,) = nodes
                await asyncio.to_thread(getattr(node, how))
                gaps = await gaps_until_heard_again(pubsub, NAMES[0], receiver)
                assert all("is back" in gap.reason for gap in gaps)
                if sharded:
                    assert channel(prefix, NAMES[0]) in {gap.address for gap in gaps}
