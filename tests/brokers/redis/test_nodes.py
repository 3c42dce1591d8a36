"""A Redis Cluster: each key's node is found, also after its slot has moved or its node has died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode as Startup
from redis.cluster import LoadBalancingStrategy
from redis.cluster import RedisCluster as SyncRedisCluster
from redis.crc import key_slot

from silbo.brokers.redis import RedisStreams, nodes
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall
from silbo.brokers.redis.failures import Lost, Unreached
from silbo.brokers.redis.nodes import ClusterNodes, connect_to, nodes_of
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable
from tests.support.redis_streams import eventually, message, opened
from tools.redis_cluster import ClusterNode, ClusterServers
from tools.redis_server import RedisServer

pytestmark = [pytest.mark.cluster, pytest.mark.every_redis]

ONE_OF_MANY = r"one of the nodes of a Redis Cluster.*[gG]ive (a )?redis\.asyncio\.RedisCluster"
ADD = Script("redis.call('XADD', KEYS[1], '*', 'message', ARGV[1]) return {}")
ADD_AND_COUNT = Script(
    "redis.call('XADD', KEYS[1], '*', 'message', 'x') return redis.call('HINCRBY', KEYS[2], 'many', 1)"
)


def keys_of_each_node(cluster: ClusterServers, prefix: str) -> list[bytes]:
    """A key for each of the masters, in the order of the nodes."""
    found: dict[int, bytes] = {}
    for number in count():
        key = f"{prefix}:{{{prefix}{number}}}"
        found.setdefault(cluster.nodes.index(cluster.node_of(key)), key.encode())
        if len(found) == 3:
            return [found[node] for node in sorted(found)]
    raise AssertionError


@asynccontextmanager
async def calls_at(client: Any, timeout: float = 5.0) -> AsyncIterator[CallConnection]:
    calls = CallConnection(client, timeout)
    try:
        yield calls
    finally:
        await calls.aclose()


def add(key: bytes, raw: bytes) -> ScriptCall:
    return ScriptCall.of(ADD, [key], raw)


async def entries(client: RedisCluster, key: bytes) -> list[bytes]:
    return [fields[b"message"] for _, fields in await client.xrange(key)]


def test_synchronous_clients_are_refused() -> None:
    with pytest.raises(TypeError, match=r"not redis\.client\.Redis"):
        RedisStreams(SyncRedis(), app="web")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="RedisCluster"):
        RedisStreams(object.__new__(SyncRedisCluster), app="web")  # type: ignore[arg-type]


async def test_each_call_goes_to_the_node_of_its_key(cluster: ClusterServers, prefix: str) -> None:
    """Also in one go; and the program's client opens nothing."""
    keys = keys_of_each_node(cluster, prefix)
    client = cluster.client()
    async with calls_at(client) as calls:
        assert await calls.run_all(*[add(key, key) for key in keys]) == [[], [], []]
    assert not client.nodes_manager.nodes_cache
    for node, key in zip(cluster.nodes, keys, strict=True):
        assert node.run("KEYS", f"*{prefix}*") == [key.decode()]


async def test_command_without_key_goes_to_any_node_or_to_each(cluster_client: RedisCluster) -> None:
    async with calls_at(cluster_client) as calls:
        assert await calls.run_command(b"PING") == b"PONG"
        ports = [await node.run_command(b"CONFIG", b"GET", b"port") for node in await calls.each_node()]
        assert len({port for _, port in ports}) == 3


async def test_moved_slot_is_followed(cluster: ClusterServers, cluster_client: RedisCluster, prefix: str) -> None:
    """The client's nodes know it from then on: no second call goes astray."""
    key, other, _ = keys_of_each_node(cluster, prefix)
    slot = key_slot(key)
    async with calls_at(cluster_client) as calls:
        await calls.run_all(add(key, b"1"), add(other, b"1"))
        cluster.move(slot, cluster.nodes[1])
        assert await calls.run_all(add(key, b"2"), add(other, b"2")) == [[], []]
        assert cluster.nodes[1].run("XLEN", key) == 2
        assert await nodes_of(cluster_client).find(key) == ("127.0.0.1", cluster.nodes[1].port)
        assert await calls.run(add(key, b"3")) == []
    assert await entries(cluster_client, key) == [b"1", b"2", b"3"]


async def test_slot_on_its_way_is_asked_for(cluster: ClusterServers, cluster_client: RedisCluster, prefix: str) -> None:
    """The node that has the slot answers ASK for keys that are gone; the other one must be told ASKING."""
    key, _, _ = keys_of_each_node(cluster, prefix)
    slot, target = key_slot(key), cluster.nodes[2]
    async with calls_at(cluster_client) as calls:
        await calls.run(add(key, b"1"))
        source = cluster.begin_move(slot, target)
        await calls.run(add(key, b"2"))  # still here
        cluster.move_keys(slot, source, target)
        target.run("SCRIPT", "FLUSH")  # NOSCRIPT at the target: the repeat needs an ASKING of its own
        assert await calls.run_all(add(key, b"3"), Command(b"XLEN", key)) == [[], 3]
        assert await calls.run(add(key, b"4")) == []
        cluster.end_move(slot, target)
        assert await calls.run(add(key, b"5")) == []
    assert await entries(cluster_client, key) == [b"1", b"2", b"3", b"4", b"5"]


async def test_keys_on_both_sides_are_waited_for(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """A call of two keys gets TRYAGAIN until both have moved."""
    key, _, _ = keys_of_each_node(cluster, prefix)
    helper, slot, target = key + b":helper", key_slot(key), cluster.nodes[1]
    call = ScriptCall.of(ADD_AND_COUNT, [key, helper])
    async with calls_at(cluster_client, 30) as calls:
        assert await calls.run(call) == 1
        source = cluster.begin_move(slot, target)
        source.run("MIGRATE", "127.0.0.1", target.port, helper, 0, 30_000)
        with pytest.raises(BrokerUnavailable, match="TRYAGAIN|has not answered"):
            await calls.run(call, deadline=asyncio.get_running_loop().time() + 0.3)
        waiting = asyncio.create_task(calls.run(call))
        await asyncio.sleep(0)
        cluster.move_keys(slot, source, target)
        assert await waiting == 2
        cluster.end_move(slot, target)
    assert len(await entries(cluster_client, key)) == 2


async def test_node_that_does_not_serve_its_slots_is_waited_for(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    """CLUSTERDOWN: the slot is nobody's for a moment."""
    key, _, _ = keys_of_each_node(cluster, prefix)
    slot, node = key_slot(key), cluster.nodes[0]
    async with calls_at(cluster_client, 30) as calls:
        await calls.run(add(key, b"1"))
        for each in cluster.nodes:
            each.run("CLUSTER", "DELSLOTS", slot)
        with pytest.raises(BrokerUnavailable, match="CLUSTERDOWN|has not answered"):
            await calls.run(add(key, b"2"), deadline=asyncio.get_running_loop().time() + 0.3)
        waiting = asyncio.create_task(calls.run(add(key, b"2")))
        await asyncio.sleep(0)
        node.run("CLUSTER", "ADDSLOTS", slot)
        assert await waiting == []


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_dead_node_holds_up_only_its_own_keys(own_cluster: ClusterServers, prefix: str) -> None:
    """Lost on a connection that was there, then nothing is done until the replica is promoted; the others are answered."""
    first, second, third = keys_of_each_node(own_cluster, prefix)
    master, healthy, third_node = (own_cluster.node_of(key.decode()) for key in (first, second, third))
    client = own_cluster.client()
    async with calls_at(client, 120) as calls:
        assert await calls.run_all(add(first, b"1"), add(second, b"1"), add(third, b"1")) == [[], [], []]
        master.run("WAIT", 1, 5000)
        master.pause()
        replies = await calls.run_all(
            add(first, b"2"), add(second, b"2"), deadline=asyncio.get_running_loop().time() + 0.5
        )
        assert isinstance(replies[0], Lost)
        assert replies[1] == []
        master.kill()
        replies = await calls.run_all(add(first, b"3"), add(third, b"3"))
        assert isinstance(replies[0], Unreached)
        assert replies[1] == []
        with pytest.raises(BrokerUnavailable, match="nothing was done"):
            await calls.run(add(first, b"4"))

        async def is_added() -> bool:
            return await calls.run(add(first, b"5")) == []

        await eventually(is_added)
        assert own_cluster.node_of(first.decode()) is not master
        assert [await calls.run(Command(b"XLEN", key)) for key in (first, second, third)] == [2, 2, 2]
        # The old master comes back as a replica.
        master.restart()
        assert await calls.run(add(first, b"6")) == []
        third_node.pause()
        soon = asyncio.get_running_loop().time() + 0.5
        assert isinstance((await calls.run_all(add(third, b"4"), add(second, b"4"), deadline=soon))[0], Lost)
        async with asyncio.timeout(30):  # a node that was silent is not waited for as long again
            assert (await calls.run_all(add(third, b"5"), add(second, b"5")))[1] == []
    await slots_are_found_past_a_frozen_node(second, third_node, healthy)


async def slots_are_found_past_a_frozen_node(key: bytes, *nodes: ClusterNode) -> None:
    """It accepts connections, and answers nothing."""
    async with calls_at(RedisCluster(startup_nodes=[Startup("127.0.0.1", node.port) for node in nodes]), 30) as calls:
        assert await calls.run(add(key, b"1")) == []


async def test_connection_to_a_key_is_one_to_its_node(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str
) -> None:
    for node, key in zip(cluster.nodes, keys_of_each_node(cluster, prefix), strict=True):
        connection = await connect_to(cluster_client, key)
        assert await connection.execute(b"CONFIG", b"GET", b"port") == [b"port", b"%d" % node.port]
        await connection.aclose()


async def test_node_that_was_in_trouble_is_not_chosen_by_chance(cluster_client: RedisCluster) -> None:
    """Also when the others have said again that it has slots: a call without a key would be lost one time in three."""
    found = nodes_of(cluster_client)
    away = await found.find_any()
    found.doubt(away)
    assert away not in [await found.find_any() for _ in range(50)]
    await (await found.connect(away)).aclose()
    assert away in [await found.find_any() for _ in range(200)]


async def test_only_node_that_is_known_is_waited_for(cluster: ClusterServers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is far away, or busy: as a command finds it, which knows the node of its URL alone."""
    monkeypatch.setattr(nodes, "ASK_WITHIN", 0.01)
    node = cluster.nodes[0]
    node.pause()
    try:
        async with calls_at(RedisCluster(startup_nodes=[Startup("127.0.0.1", node.port)])) as calls:
            answer = asyncio.ensure_future(calls.run(Command(b"PING")))
            await asyncio.sleep(0.2)
            node.resume()
            assert await answer == b"PONG"
    finally:
        node.resume()


async def test_connections_to_nodes_that_have_left_are_closed(cluster: ClusterServers, prefix: str) -> None:
    """As where nodes come back under other addresses, day after day."""
    host = "127.0.0.1"
    client = cluster.client(address_remap=lambda at: (host, at[1]), client_name=prefix)
    keys = keys_of_each_node(cluster, prefix)

    async def has_one_each() -> bool:
        return all(node.run("CLIENT", "LIST").count(f" name={prefix} ") == 1 for node in cluster.nodes)

    async with calls_at(client) as calls:
        await calls.run_all(*[add(key, b"1") for key in keys])
        assert await has_one_each()
        host = "localhost"
        await nodes_of(client).refresh()
        await calls.run_all(*[add(key, b"2") for key in keys])
        await eventually(has_one_each)


async def test_settings_of_the_client_are_kept(cluster: ClusterServers, prefix: str) -> None:
    """Credentials too; a wrong password is told at once."""
    for node in cluster.nodes:
        node.run("ACL", "SETUSER", prefix, "on", ">secret", "+@all", "~*")
    key, balancing = keys_of_each_node(cluster, prefix)[1], LoadBalancingStrategy.ROUND_ROBIN
    try:
        async with calls_at(
            cluster.client(username=prefix, password="secret", load_balancing_strategy=balancing)
        ) as calls:
            assert await calls.run(add(key, b"1")) == []
            (node,) = [each for each in await calls.each_node() if str(cluster.nodes[1].port) in each.server]
            assert await node.run_command(b"ACL", b"WHOAMI") == prefix.encode()
        async with calls_at(cluster.client(username=prefix, password="wrong")) as calls:
            with pytest.raises(BrokerUnavailable, match="refused the connection: WRONGPASS"):
                await calls.run(add(key, b"1"))
    finally:
        for node in cluster.nodes:
            node.run("ACL", "DELUSER", prefix)


async def test_cluster_client_at_a_single_server_says_so(prefix: str) -> None:
    with RedisServer(port=True) as server:
        async with calls_at(RedisCluster.from_url(server.url)) as calls:
            with pytest.raises(BrokerUnavailable, match="cluster support disabled"):
                await calls.run(add(prefix.encode(), b"1"))


async def test_call_that_looks_for_its_node_while_it_is_closed_opens_nothing(
    cluster_client: RedisCluster, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would close that connection."""
    looks, go_on = asyncio.Event(), asyncio.Event()
    find = ClusterNodes.find

    async def find_later(self: ClusterNodes, key: bytes) -> Any:
        looks.set()
        await go_on.wait()
        return await find(self, key)

    monkeypatch.setattr(ClusterNodes, "find", find_later)
    calls = CallConnection(cluster_client, 30.0)
    call = asyncio.create_task(calls.run(add(prefix.encode(), b"1")))
    await looks.wait()
    await calls.aclose()
    go_on.set()
    with pytest.raises(BrokerUnavailable, match="it is closed"):
        await call


async def test_plain_client_at_a_node_says_so(cluster: ClusterServers, prefix: str) -> None:
    """Whatever key it asks for."""
    keys = keys_of_each_node(cluster, prefix)
    async with Redis(port=cluster.nodes[0].port) as client, calls_at(client) as calls:
        for call in (add(keys[1], b"1"), ScriptCall.of(ADD_AND_COUNT, keys[:2])):
            with pytest.raises(BrokerUnavailable, match=ONE_OF_MANY):
                await calls.run(call)
        async with RedisStreams(client, app="web", prefix=prefix) as streams:
            address = keys[1].decode().partition("{")[2].removesuffix("}")
            with pytest.raises(BrokerUnavailable, match=ONE_OF_MANY):
                await streams.publish(message(1, to=address))
            with pytest.raises(BrokerUnavailable, match=ONE_OF_MANY):
                async with opened(streams.group("g", start="oldest", streams=[address])):
                    pass
