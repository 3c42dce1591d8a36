"""Publishing to a Redis Cluster: nodes die, replicas are promoted and slots move while messages are on their way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from chaos.proxy import Link, Proxy, Rule
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, ShardsMismatch
from silbo.wire.formats import JSON
from tests.support.redis_streams import ACL, eventually, message
from tools.redis_cluster import ClusterServers

pytestmark = [pytest.mark.cluster, pytest.mark.every_redis]


def addresses_of_each_node(cluster: ClusterServers, prefix: str) -> list[str]:
    """An address for each of the masters, in the order of the nodes."""
    found: dict[int, str] = {}
    for number in count():
        address = f"a{number}"
        found.setdefault(cluster.nodes.index(cluster.node_of(key_of(prefix, address))), address)
        if len(found) == 3:
            return [found[node] for node in sorted(found)]
    raise AssertionError


def key_of(prefix: str, address: str) -> str:
    return f"{prefix}:{{{address}}}"


async def stored(client: RedisCluster, prefix: str, address: str, *, by: str = "") -> list[int]:
    """The numbers of the messages in a stream by one publisher, in order."""
    rows = [JSON.decode(fields[b"message"]).payload for _, fields in await client.xrange(key_of(prefix, address))]
    return [payload["n"] for payload in rows if payload.get("by", "") == by]


async def test_messages_of_one_call_go_to_the_nodes_of_their_streams(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    addresses = addresses_of_each_node(cluster, prefix)
    async with RedisStreams(cluster_client, app="web", prefix=prefix) as streams:
        await streams.publish(*[message(n, to=addresses[n % 3]) for n in range(30)])
        await asyncio.gather(*[streams.publish(message(n, to=addresses[n % 3])) for n in range(30, 600)])
        with pytest.raises(MessageRefused):
            await streams.publish(message(600, to=addresses[0]), message(601, to="no address"))
    for part, address in enumerate(addresses):
        numbers = [n for n in range(600) if n % 3 == part]
        assert await stored(cluster_client, prefix, address) == numbers + [600] * (part == 0)


async def test_sequenced_messages_go_to_the_nodes_of_their_streams(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    addresses = addresses_of_each_node(cluster, prefix)
    numbered = [(n, message(n, to=addresses[n % 3])) for n in range(1, 31)]
    async with RedisStreams(cluster_client, app="web", prefix=prefix) as streams:
        assert not (await streams.publish_sequenced("box/0", 1, numbered)).known
        assert (await streams.publish_sequenced("box/0", 1, numbered)).known == set(range(1, 31))
        assert (await streams.publish_sequenced("box/0", 1, [])).last == 0
    for part, address in enumerate(addresses):
        assert await stored(cluster_client, prefix, address) == [n for n in range(1, 31) if n % 3 == part]


async def test_first_message_of_a_stream_waits_while_its_slot_moves(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """And then finds that others spread the address over shards: that is asked for where the message would go."""
    address, _, _ = addresses_of_each_node(cluster, prefix)
    key, target = key_of(prefix, address), cluster.nodes[1]
    async with RedisStreams(cluster_client, app="web", prefix=prefix, timeout=30.0) as streams:
        await streams.publish(message(0, to=address))
        cluster.nodes[0].run("DEL", key)
        cluster.nodes[0].run("HSET", f"{key}:shards", "shards", 4)
        source = cluster.begin_move(key_slot(key.encode()), target)
        before = cluster.count_errors("TRYAGAIN")
        publishing = asyncio.create_task(streams.publish(message(1, to=address)))

        async def waits() -> bool:
            return publishing.done() or cluster.count_errors("TRYAGAIN") > before

        await eventually(waits)
        cluster.move_keys(key_slot(key.encode()), source, target)
        cluster.end_move(key_slot(key.encode()), target)
        with pytest.raises(ShardsMismatch):
            await publishing
        target.run("DEL", f"{key}:shards")
        await streams.publish(message(2, to=address))
    assert await stored(cluster_client, prefix, address) == [2]


@asynccontextmanager
async def under_way(*publishers: Callable[[asyncio.Event], Coroutine[None, None, None]]) -> AsyncIterator[None]:
    """Run the publishers side by side until the end of the block."""
    ending = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for publisher in publishers:
            tasks.create_task(publisher(ending))
        try:
            yield
        finally:
            ending.set()


class Ledger:
    """The outcome of each message that one publisher sent to one address."""

    def __init__(self, streams: RedisStreams, address: str | None) -> None:
        self.streams, self.address = streams, address
        self.taken: list[int] = []
        self.unknown: list[int] = []
        self.unsent: list[int] = []

    async def publish(self, number: int) -> None:
        try:
            await self.streams.publish(message(number, to=self.address))
        except BrokerUnavailable:
            self.unsent.append(number)
        except DeliveryUnknown:
            self.unknown.append(number)
        else:
            self.taken.append(number)

    async def run(self, ending: asyncio.Event) -> None:
        """Begin a publish, whether or not those before have ended; at most fifty at once."""
        room = asyncio.Semaphore(50)

        async def publish(number: int) -> None:
            try:
                await self.publish(number)
            finally:
                room.release()

        async with asyncio.TaskGroup() as tasks:
            for number in count(1):
                await room.acquire()
                tasks.create_task(publish(number))
                if ending.is_set():
                    return

    @property
    def has_news(self) -> Callable[[], Awaitable[bool]]:
        """A check that becomes true when twenty more messages were taken."""
        before = len(self.taken)
        return lambda: asyncio.sleep(0, len(self.taken) > before + 20)


class Relay:
    """A relay that publishes with sequences, and repeats what it was not told."""

    def __init__(self, streams: RedisStreams, *addresses: str | None) -> None:
        self.streams, self.addresses = streams, addresses
        self.done = 0

    async def run(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            await self.publish(range(self.done + 1, self.done + 31))
            self.done += 30

    async def publish(self, numbers: Iterable[int]) -> None:
        waiting = [(n, message(n, to=self.addresses[n % len(self.addresses)], by="relay")) for n in numbers]
        while waiting:
            try:
                answer = await self.streams.publish_sequenced("box/0", 1, waiting)
            except (BrokerUnavailable, DeliveryUnknown):
                await asyncio.sleep(0.01)
            else:
                waiting = [(n, each) for n, each in waiting if n in answer.unsent]

    @property
    def has_news(self) -> Callable[[], Awaitable[bool]]:
        """A check that becomes true when a hundred more messages were sent."""
        before = self.done
        return lambda: asyncio.sleep(0, self.done > before + 100)


async def test_slot_that_moves_under_load_costs_no_error_and_no_order(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """Every message is in the stream once, in the order in which it was published, at each step of the way."""
    address, other, _ = addresses_of_each_node(cluster, prefix)
    slot = key_slot(key_of(prefix, address).encode())
    async with RedisStreams(cluster_client, app="web", prefix=prefix, timeout=30) as streams:
        plain, beside, relay = Ledger(streams, address), Ledger(streams, other), Relay(streams, address, other)
        async with under_way(plain.run, beside.run, relay.run):
            for target in (cluster.nodes[1], cluster.nodes[2], cluster.nodes[0]):
                await eventually(plain.has_news)
                source = await asyncio.to_thread(cluster.begin_move, slot, target)
                await eventually(plain.has_news)
                await asyncio.to_thread(cluster.move_keys, slot, source, target)
                await eventually(plain.has_news)  # by ASK
                await eventually(relay.has_news)
                await asyncio.to_thread(cluster.end_move, slot, target)
                await eventually(relay.has_news)
    for ledger in (plain, beside):
        assert (ledger.unsent, ledger.unknown) == ([], [])
        assert await stored(cluster_client, prefix, ledger.address) == sorted(ledger.taken)
    for part, each in enumerate(relay.addresses):
        assert await stored(cluster_client, prefix, each, by="relay") == list(range(part or 2, relay.done + 1, 2))


async def test_message_that_was_asked_for_in_vain_is_unknown(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """The ASK said that nothing was done; but then the message went to the other node, which has not answered."""
    address = addresses_of_each_node(cluster, prefix)[0]
    slot, target = key_slot(key_of(prefix, address).encode()), cluster.nodes[1]
    async with RedisStreams(cluster_client, app="web", prefix=prefix, timeout=1) as streams:
        await streams.publish(message(1, to=address))
        source = cluster.begin_move(slot, target)
        cluster.move_keys(slot, source, target)
        await streams.publish(message(2, to=address))
        target.pause()
        try:
            with pytest.raises(DeliveryUnknown):
                await streams.publish(message(3, to=address))
        finally:
            target.resume()
        cluster.end_move(slot, target)
    assert (await stored(cluster_client, prefix, address))[:2] == [1, 2]


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"shards": 4}, {"trim": "acknowledged"}, {"max_bytes": 1 << 30}], ids=str)
async def test_slots_move_key_by_key_under_load(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str, settings: dict[str, Any]
) -> None:
    """The keys beside a stream are at the other node before it, or after it."""
    addresses = [f"events.{shard}" for shard in range(4)] if "shards" in settings else ["events"]
    async with RedisStreams(cluster_client, app="web", prefix=prefix, timeout=30, **settings) as streams:
        plain, relay = Ledger(streams, None), Relay(streams, None)
        async with under_way(plain.run, relay.run):
            await eventually(plain.has_news)
            await eventually(relay.has_news)
            for slot in [key_slot(key_of(prefix, address).encode()) for address in addresses]:
                source = cluster.node_of(slot)
                target = cluster.nodes[cluster.nodes.index(source) - 1]
                await asyncio.to_thread(cluster.begin_move, slot, target)
                while keys := await asyncio.to_thread(source.run, "CLUSTER", "GETKEYSINSLOT", slot, 1):
                    await asyncio.to_thread(cluster.move_key, keys[0], source, target)
                    await asyncio.sleep(0.02)  # for calls between two keys
                await asyncio.to_thread(cluster.end_move, slot, target)
                await eventually(relay.has_news)
    assert (plain.unsent, plain.unknown) == ([], [])
    sent = [await stored(cluster_client, prefix, address) for address in addresses]
    assert all(numbers == sorted(numbers) for numbers in sent)
    assert sorted(n for numbers in sent for n in numbers) == sorted(plain.taken)
    relayed = [await stored(cluster_client, prefix, address, by="relay") for address in addresses]
    assert all(numbers == sorted(set(numbers)) for numbers in relayed)
    assert sorted(n for numbers in relayed for n in numbers) == list(range(1, relay.done + 1))


class LoseReply(Rule):
    """A node carries out what it is told; its answer goes nowhere, and the connection is cut."""

    def __init__(self) -> None:
        self.wanted = 0

    async def reply(self, data: bytes, link: Link) -> None:
        if self.wanted:
            self.wanted -= 1
            link.cut()


async def test_lost_reply_of_a_node_is_unknown_and_not_repeated(cluster: ClusterServers, prefix: str) -> None:
    """For the messages of that node alone; a relay gets to know it for its rows, and repeats them."""
    address, other, _ = addresses_of_each_node(cluster, prefix)
    node, rule = cluster.node_of(key_of(prefix, address)), LoseReply()
    async with Proxy(f"redis://127.0.0.1:{node.port}", rule) as proxy:
        way = ("127.0.0.1", int(proxy.url.rpartition(":")[2].partition("/")[0]))
        client = cluster.client(address_remap=lambda at: way if at[1] == node.port else at)
        async with RedisStreams(client, app="web", prefix=prefix) as streams:
            await streams.publish(message(1, to=address), message(1, to=other))
            rule.wanted = 1
            with pytest.raises(DeliveryUnknown):
                await streams.publish(message(2, to=address), message(2, to=other))
            await streams.publish(message(3, to=address))
            numbered = [(n, message(n, to=to, by="relay")) for n, to in enumerate((address, other) * 2, 1)]
            await streams.publish_sequenced("box/0", 1, numbered[:2])
            rule.wanted = 1
            answer = await streams.publish_sequenced("box/0", 1, numbered[2:])
            assert {n: type(error) for n, error in answer.unsent.items()} == {3: DeliveryUnknown}
            await streams.publish_sequenced("box/0", 1, numbered[:1])  # the connection is back
            rule.wanted = 1
            with pytest.raises(DeliveryUnknown):
                await streams.publish_sequenced("box/0", 1, numbered[2:3])
            assert (await streams.publish_sequenced("box/0", 1, numbered[2:])).known == {3, 4}
        assert await stored(client, prefix, address) == [1, 2, 3]
        assert await stored(client, prefix, other) == [1, 2]
        assert await stored(client, prefix, address, by="relay") == [1, 3]
        assert await stored(client, prefix, other, by="relay") == [2, 4]
        await client.aclose()


async def test_documented_user_may_follow_a_slot(cluster: ClusterServers, prefix: str) -> None:
    """With the two rights that the page on clusters adds."""
    rules = ACL["streams"].replace("~silbo:*", f"~{prefix}:*")
    for node in cluster.nodes:
        node.run("ACL", "SETUSER", prefix, *rules.split(), "+cluster|slots", "+asking")
    address = addresses_of_each_node(cluster, prefix)[0]
    slot, target = key_slot(key_of(prefix, address).encode()), cluster.nodes[1]
    try:
        client = cluster.client(username=prefix, password="password")
        async with RedisStreams(client, app="web", prefix=prefix) as streams:
            await streams.publish(message(1, to=address))
            await streams.publish_sequenced("box/0", 1, [(1, message(2, to=address))])
            source = cluster.begin_move(slot, target)
            cluster.move_keys(slot, source, target)
            await streams.publish(message(3, to=address))
            await streams.publish_sequenced("box/0", 1, [(2, message(4, to=address))])
            cluster.end_move(slot, target)
            await streams.publish(message(5, to=address))
    finally:
        for node in cluster.nodes:
            node.run("ACL", "DELUSER", prefix)
    async with cluster.client() as client:
        assert await stored(client, prefix, address) == [1, 2, 3, 4, 5]


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_node_that_dies_under_load_loses_no_more_than_its_tail(
    own_cluster: ClusterServers, prefix: str, how: str
) -> None:
    """Others go on meanwhile. Beyond what was not replicated, nothing is lost or doubled; a relay's replay mends that, too."""
    address, other, third = addresses_of_each_node(own_cluster, prefix)
    master = own_cluster.node_of(key_of(prefix, address))
    replica = own_cluster.replica_of(master)

    async def is_promoted() -> bool:
        return bool((await asyncio.to_thread(replica.run, "ROLE"))[0] == "master")

    async with own_cluster.client() as client, RedisStreams(client, app="web", prefix=prefix, timeout=2) as streams:
        plain, beside, relay = Ledger(streams, address), Ledger(streams, other), Relay(streams, address, third)
        async with under_way(plain.run, beside.run, relay.run):
            await eventually(plain.has_news)
            await eventually(relay.has_news)
            told, told_beside = len(plain.taken), len(beside.taken)
            pair = [(1, message(1, to=address, by="another relay")), (2, message(2, to=third, by="another relay"))]
            await streams.publish_sequenced("box/1", 1, pair)
            pair = [(3, pair[0][1]), (4, pair[1][1])]
            await asyncio.to_thread(getattr(master, how))
            answer = await streams.publish_sequenced("box/1", 1, pair)
            assert set(answer.unsent) == {3}  # the other stream's message is added, and its relay is told
            async with RedisStreams(client, app="web", prefix=prefix, timeout=30) as patient:
                await patient.publish(message(0, to=address, by="patient"))  # waits for the replica
            await eventually(is_promoted)
            assert len(beside.taken) > told_beside + 200  # more than what was under way
            await eventually(plain.has_news)
            await eventually(relay.has_news)
            if how == "pause":
                await asyncio.to_thread(master.resume)  # it finds that it is a replica now
            else:
                await asyncio.to_thread(master.restart)
            await eventually(plain.has_news)
            await eventually(relay.has_news)
        await relay.publish(range(1, relay.done + 1))  # as the store of an outbox replays what a roll-back took
        assert own_cluster.node_of(key_of(prefix, address)) is not master
        assert (beside.unsent, beside.unknown) == ([], [])
        assert await stored(client, prefix, other) == sorted(beside.taken)
        sent = await stored(client, prefix, address)
        assert len(sent) == len(set(sent))
        assert not set(sent) & set(plain.unsent)
        lost = set(plain.taken) - set(sent)
        assert len(lost) < 1000, "more than the tail"
        assert not lost or min(lost) > told - 1000
        assert set(sent) <= set(plain.taken) | set(plain.unknown)
        for part, each in enumerate(relay.addresses):
            assert await stored(client, prefix, each, by="relay") == list(range(part or 2, relay.done + 1, 2))
