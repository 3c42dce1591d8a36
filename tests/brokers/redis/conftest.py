"""Brokers on servers of the tests' own, as users who may do no more than the documentation says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisPubSub, RedisStreams
from tests.support.redis_streams import ACL
from tools.redis_server import RedisServer


@pytest.fixture
def own_redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server of this test's own that knows the documented users, also after a restart."""
    users = tmp_path / "users.acl"
    lines = [f"user {name} {rules}" for name, rules in ACL.items()]
    users.write_text("\n".join(["user default on nopass ~* &* +@all", *lines, ""]))
    config = {"aclfile": str(users), "stream-node-max-entries": 1}
    binary = getattr(request, "param", None)
    with RedisServer(appendonly="always", config=config, binary=binary) as server:
        yield server


@pytest.fixture
async def admin(own_redis: RedisServer) -> AsyncIterator[Redis]:
    """A client that may do everything."""
    async with Redis.from_url(own_redis.url, protocol=2) as client:
        yield client


@pytest.fixture
async def streams_client(own_redis: RedisServer) -> AsyncIterator[Redis]:
    """A client with redis-py's defaults, as the documented user for Streams."""
    async with Redis.from_url(own_redis.url, username="streams", password="password") as client:
        yield client


@pytest.fixture
async def pubsub_client(own_redis: RedisServer) -> AsyncIterator[Redis]:
    """A client with redis-py's defaults, as the documented user for Pub/Sub."""
    async with Redis.from_url(own_redis.url, username="pubsub", password="password") as client:
        yield client


@pytest.fixture
async def streams(streams_client: Redis) -> AsyncIterator[RedisStreams]:
    async with RedisStreams(streams_client, app="web") as broker:
        yield broker


@pytest.fixture
async def pubsub(pubsub_client: Redis) -> AsyncIterator[RedisPubSub]:
    async with RedisPubSub(pubsub_client, app="web") as broker:
        yield broker
