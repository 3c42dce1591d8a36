"""Brokers on servers of the tests' own, as users who may do no more than the documentation says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisPubSub, RedisStreams
from tests.support.redis_streams import ACL
from tools.redis_cluster import ClusterServers, make_client
from tools.redis_server import RedisServer

CONFIG = {"stream-node-max-entries": 1, "maxmemory": 0}
"""Trimming goes to the entry."""


def configure(cluster: ClusterServers) -> None:
    for node in cluster.nodes:
        for setting, value in CONFIG.items():
            node.run("CONFIG", "SET", setting, value)


@pytest.fixture
def own_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer | ClusterServers]:
    """A server of this test's own that knows the documented users, also after a restart; with --cluster an emptied cluster."""
    if request.config.getoption("cluster"):
        cluster: ClusterServers = request.getfixturevalue("cluster")
        for node in cluster.nodes:
            for name, rules in ACL.items():
                node.run("ACL", "SETUSER", name, "reset", *rules.split(), "+cluster|slots", "+cluster|info")
        configure(cluster)
        for node in cluster.find_masters():
            node.run("FLUSHALL")
        yield cluster
        configure(cluster)  # for those who share it
        return
    users = tmp_path / "users.acl"
    lines = [f"user {name} {rules}" for name, rules in ACL.items()]
    users.write_text("\n".join(["user default on nopass ~* &* +@all", *lines, ""]))
    config = {"aclfile": str(users), **CONFIG}
    binary = getattr(request, "param", None)
    with RedisServer(appendonly="always", config=config, binary=binary) as server:
        yield server


@pytest.fixture
async def admin(own_redis: RedisServer | ClusterServers) -> AsyncIterator[Any]:
    """A client that may do everything."""
    async with make_client(own_redis, protocol=2) as client:
        yield client


@pytest.fixture
async def streams_client(own_redis: RedisServer | ClusterServers) -> AsyncIterator[Any]:
    """A client with redis-py's defaults, as the documented user for Streams."""
    client = make_client(own_redis, username="streams", password="password")
    yield client  # not entered: a client of a cluster would run COMMAND, and silbo does not
    await client.aclose()


@pytest.fixture
async def pubsub_client(own_redis: RedisServer | ClusterServers) -> AsyncIterator[Any]:
    """A client with redis-py's defaults, as the documented user for Pub/Sub."""
    client = make_client(own_redis, username="pubsub", password="password")
    yield client  # not entered: a client of a cluster would run COMMAND, and silbo does not
    await client.aclose()


@pytest.fixture
async def streams(streams_client: Redis) -> AsyncIterator[RedisStreams]:
    async with RedisStreams(streams_client, app="web") as broker:
        yield broker


@pytest.fixture
async def pubsub(pubsub_client: Redis) -> AsyncIterator[RedisPubSub]:
    async with RedisPubSub(pubsub_client, app="web") as broker:
        yield broker
