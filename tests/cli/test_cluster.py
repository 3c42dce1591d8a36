"""The commands on a Redis Cluster, with streams on different nodes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis, RedisCluster

from silbo import AsyncEventDispatcher
from silbo.brokers.redis import RedisInbox, RedisPubSub, RedisStreams
from silbo.brokers.redis.streams import build_stream_key
from silbo.errors import BrokerUnavailable, ClusterClientNeeded
from silbo.message import Delivery
from silbo.operations.tail import follow_streams
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import Run, message, silbo
from tests.support.redis_streams import opened, receive
from tools.redis_cluster import ClusterServers

pytestmark = pytest.mark.cluster


@pytest.fixture
def addresses(cluster: ClusterServers, prefix: str) -> list[str]:
    """Of streams on different nodes, one for each."""
    return find_addresses(cluster, prefix)


def find_addresses(cluster: ClusterServers, prefix: str) -> list[str]:
    found: dict[int, str] = {}
    for each in count():
        if len(found) == len(cluster.nodes):
            break
        address = f"orders-{each}"
        _ = found.setdefault(cluster.node_of(build_stream_key(address, prefix)).port, address)
    return list(found.values())


async def test_every_command_answers(
    cluster: ClusterServers, cluster_client: RedisCluster, prefix: str, addresses: list[str], tmp_path: Path
) -> None:
    """Streams are found on any node: all masters are asked for streams, and each node for its own."""
    where = ("--redis", cluster.url, "--cluster", "--prefix", prefix)
    keys = [build_stream_key(address, prefix) for address in addresses]
    ids: list[str] = []
    for each, address in enumerate(addresses):
        sent = await silbo("send", f"order.{each}", '{"order": 7}', "--to", address, *where, "--json")
        assert sent.code == 0, sent
        ids.append(sent.objects[0]["event_id"])
    async with RedisStreams(cluster_client, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="oldest", streams=addresses)) as receiver:
            items = [item for item in await receive(receiver, 3) if isinstance(item, Delivery)]
            for item in items:
                assert await receiver.bury(item, error="ValueError: no", attempts=1)
        groups = await silbo("groups", *where, "--json")
        assert [(row["stream"], row["lag"], row["dead"]) for row in groups.objects] == [
            (key, 0, 1) for key in sorted(keys)
        ]
        why = await silbo("why", ids[2], *where, "--json")
        assert why.code == 0 and keys[2] in why.out
        doctor = await silbo("doctor", *where, "--json")
        checks = {row["check"]: row["level"] for row in doctor.objects}
        assert checks["cluster"] == "ok"
        for node in cluster.nodes:
            assert f"Redis at 127.0.0.1:{node.port} persistence" in checks, checks
        assert {f"{key} billing" for key in keys} <= checks.keys()
        for address in addresses:
            listed = await silbo("dead", "list", "--stream", address, *where, "--json")
            assert len(listed.objects) == 1
        retried = await silbo("dead", "retry", "--all", "--yes", "--stream", addresses[0], *where)
        assert retried.code == 0, retried
        rewound = await silbo("rewind", "billing", "--since", "1h", "--yes", *where)
        assert rewound.code == 0, rewound
        page = await silbo("page", "tests.cli.test_cluster:HOST", "--output", str(tmp_path / "page.html"), *where)
        assert page.code == 0, page
        assert all(key in (tmp_path / "page.html").read_text() for key in keys)


async def test_messages_of_all_nodes_are_followed(
    cluster_client: RedisCluster, prefix: str, addresses: list[str]
) -> None:
    """Those from before, and those to come."""
    async with RedisStreams(cluster_client, app="shop", prefix=prefix) as streams:
        for each, address in enumerate(addresses):
            await streams.publish(replace(message(each), to=address))
        seen = follow_streams(cluster_client, prefix=prefix, since="0-0")
        async with asyncio.timeout(30):
            first = {(await anext(seen)).address for _ in addresses}
            await streams.publish(replace(message(9), to=addresses[0]))
            last = await anext(seen)
        await seen.aclose()
    assert first == {build_stream_key(address, prefix) for address in addresses}
    assert last.address == build_stream_key(addresses[0], prefix)


@pytest.mark.long
async def test_what_can_be_reached_is_shown_while_a_node_is_down(prefix: str) -> None:
    """An operator asks most when something is broken. The node is named in one line, and the exit code tells of it."""
    with ClusterServers() as cluster:
        addresses = find_addresses(cluster, prefix)
        keys = [build_stream_key(address, prefix) for address in addresses]
        down, left = cluster.node_of(keys[0]), sorted(keys[1:])
        where = ("--redis", cluster.node_of(keys[1]).url, "--cluster", "--prefix", prefix)
        entries: list[str] = []
        async with cluster.client() as client, RedisStreams(client, app="shop", prefix=prefix) as streams:
            for address in addresses:
                await streams.publish(replace(message(1), to=address, message_id=str(uuid4())))
            async with opened(streams.group("billing", start="new", streams=addresses)):
                pass
            for key in keys:
                ((entry, _),) = await client.xrange(key)
                entries.append(entry.decode())
        down.kill()
        name = f"Redis at 127.0.0.1:{down.port}"

        async def ask(*words: str, code: int = 1) -> list[dict[str, Any]]:
            done = await silbo(*words, *where, "--json")
            assert done.code == code, done
            if words[0] != "doctor" and code:
                assert done.err.count(f"silbo: {name} can't be reached, so its streams are not shown") == 1, done
            return done.objects

        *groups, away = await ask("groups")
        assert [row["stream"] for row in groups] == left
        assert away["away"] == name and away["error"]
        *retentions, away = await ask("retention", "show")
        assert [row["stream"] for row in retentions] == left
        assert away["away"] == name
        (found,) = await ask("why", entries[1])
        assert [entry["stream"] for entry in found["entries"]] == [keys[1]]
        assert [node["away"] for node in found["away"]] == [name]
        assert [row["away"] for row in await ask("why", entries[0])] == [name]
        (look,) = await ask("top", "--limit", "1", code=0)
        assert [row["stream"] for row in look["groups"]] == left
        assert [node["away"] for node in look["away"]] == [name]
        findings = await ask("doctor")
        levels = {row["check"]: row["level"] for row in findings}
        assert levels[name] == "danger"
        assert all(f"{key} billing" in levels for key in left), levels
        assert not any(row["check"].startswith(keys[0]) for row in findings)
        letters = await silbo("dead", "list", "--stream", addresses[0], *where)
        assert letters.code == 1 and str(down.port) in letters.err, letters
        one = await silbo("groups", addresses[0], *where)
        assert one.code == 1 and str(down.port) in one.err, one


@pytest.mark.parametrize(
    "words",
    [
        ("groups",),
        ("groups", "{here}"),
        ("retention", "show"),
        ("retention", "set", "--max-messages", "5", "--stream", "{here}", "--yes"),
        ("why", "01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3"),
        ("tail",),
        ("top", "--limit", "1", "--json"),
        ("doctor",),
        ("rewind", "billing", "--since", "1h", "--yes"),
        ("send", "order.paid", "{}", "--to", "{here}"),
        ("dead", "list", "--stream", "{here}"),
        ("dead", "count", "--stream", "{here}"),
        ("dead", "retry", "--all", "--stream", "{here}", "--yes"),
        ("page", "tests.cli.test_cluster:HOST"),
        ("send", "order.paid", "{}", "--pubsub"),
    ],
    ids=" ".join,
)
def test_a_node_alone_is_refused(run: Run, words: tuple[str, ...], cluster: ClusterServers, prefix: str) -> None:
    """It would show a part as all of it; so also for a stream that it has."""
    here = next(
        address
        for address in find_addresses(cluster, prefix)
        if cluster.node_of(build_stream_key(address, prefix)) is cluster.nodes[0]
    )
    done = run(*(word.replace("{here}", here) for word in words), "--redis", cluster.url, "--prefix", prefix)
    assert done.code == 2 and not done.out, done
    node = cluster.url.replace("redis://", "Redis at ")
    assert done.err == f"silbo: {node} is one of the nodes of a Redis Cluster: add --cluster\n"


async def test_relay_ends_at_a_node_alone(cluster: ClusterServers, prefix: str, tmp_path: Path) -> None:
    """It waits for a Redis that is away, and this one is not."""
    store = SQLiteStore(tmp_path / "outbox.db")
    await store.open()
    await store.aclose()
    async with asyncio.timeout(60):
        done = await silbo("relay", "--store", str(tmp_path / "outbox.db"), "--redis", cluster.url, "--prefix", prefix)
    assert done.code == 2 and done.err.endswith("add --cluster\n"), done


async def test_a_plain_client_at_a_node_learns_it_from_its_first_call(cluster: ClusterServers, prefix: str) -> None:
    """Also where the node has the stream of that call: the next one may be elsewhere."""
    here = next(
        address
        for address in find_addresses(cluster, prefix)
        if cluster.node_of(build_stream_key(address, prefix)) is cluster.nodes[0]
    )
    async with (
        Redis.from_url(cluster.url) as plain,
        RedisStreams(plain, app="shop", prefix=prefix) as streams,
        RedisPubSub(plain, app="shop", prefix=prefix) as pubsub,
        RedisInbox(plain, prefix=prefix) as inbox,
    ):
        with pytest.raises(BrokerUnavailable, match="RedisCluster"):
            await streams.publish(replace(message(1), to=here))
        with pytest.raises(BrokerUnavailable, match="RedisCluster"):
            await pubsub.publish(message(1))
        with pytest.raises(ClusterClientNeeded):
            async with opened(streams.group("billing", start="new", streams=[here])):
                pass
        with pytest.raises(ClusterClientNeeded):
            async with opened(pubsub.subscribe("*")):
                pass
        with pytest.raises(ClusterClientNeeded):
            await inbox.find_handled("billing", [str(uuid4())])


@pytest.mark.parametrize("url", ["unix:///tmp/redis.sock", "http://x"])
def test_what_can_be_no_node_is_refused(run: Run, url: str) -> None:
    done = run("groups", "--redis", url, "--cluster")
    assert done.code == 2 and "redis://" in done.err


HOST = AsyncEventDispatcher()
