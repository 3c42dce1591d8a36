"""Credentials that are renewed while a cluster of several nodes is used, also over shards: nothing is interrupted, lost or unknown."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import RedisCluster
from redis.auth.token import SimpleToken
from redis.credentials import CredentialProvider, StreamingCredentialProvider

from silbo import AsyncEventDispatcher, Outbox
from silbo.brokers.redis import RedisInbox, RedisPubSub, RedisStreams, credentials
from silbo.errors import Gap
from silbo.message import Delivery
from silbo.stores.sqlite import SQLiteStore
from tests.support.consumer import USER_JOINED, Consumer, UserJoined, joined
from tests.support.redis_streams import eventually, message, number, opened
from tools.redis_cluster import ClusterServers

pytestmark = [pytest.mark.cluster, pytest.mark.every_redis, pytest.mark.long]

TURNS = 3


class Tokens(CredentialProvider):
    """Each token has a user of its own on every node, so that the service can end what it has opened."""

    def __init__(self, cluster: ClusterServers, prefix: str) -> None:
        self._cluster = cluster
        self._prefix = prefix
        self.generation = 0
        self._allow()

    @property
    def user(self) -> str:
        return f"{self._prefix}-{self.generation}"

    def get_credentials(self) -> tuple[str, str]:
        return self.user, f"token-{self.generation}"

    async def renew(self) -> str:
        """From now on there are other credentials; return the former user."""
        former = self.user
        self.generation += 1
        self._allow()
        return former

    def _allow(self) -> None:
        for node in self._cluster.nodes:
            node.run("ACL", "SETUSER", self.user, "on", f">token-{self.generation}", "~*", "&*", "+@all")

    def has_connections_in_use(self, user: str) -> bool:
        """One that was not used for three seconds is asked for nothing: it shows the new token when it is used again."""
        rows = "".join(node.run("CLIENT", "LIST") for node in self._cluster.nodes).splitlines()
        return any(f" user={user} " in row and re.search(r" idle=[012] ", row) for row in rows)

    def revoke(self, user: str) -> None:
        """Every connection that it still has is closed."""
        for node in self._cluster.nodes:
            node.run("ACL", "DELUSER", user)


class AsynchronousTokens(Tokens):
    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(0)
        return self.get_credentials()


class StreamedTokens(AsynchronousTokens, StreamingCredentialProvider):
    """As redis-entraid's: it keeps one callback, the last."""

    callback: Callable[[Any], Any] | None = None

    def on_next(self, callback: Callable[[Any], Any]) -> None:
        self.callback = callback

    def on_error(self, callback: Callable[[Exception], Any]) -> None:
        return

    def is_streaming(self) -> bool:
        return True

    async def renew(self) -> str:
        former = await super().renew()
        assert self.callback is not None, "the program's client has lost its callback"
        await self.callback(SimpleToken(f"token-{self.generation}", -1, 0, {"oid": self.user}))
        return former


@pytest.fixture(params=[Tokens, AsynchronousTokens, StreamedTokens])
def tokens(
    request: pytest.FixtureRequest, cluster: ClusterServers, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tokens]:
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.05)
    found: Tokens = request.param(cluster, prefix)
    yield found
    found.revoke(found.user)


@pytest.mark.parametrize("shards", [0, 6])
async def test_tokens_are_renewed_under_publishing_relaying_and_consuming(
    shards: int, tokens: Tokens, cluster: ClusterServers, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each former user is deleted as soon as no connection that is in use is its own; three times. No publish fails or is unknown, and no shard moves."""
    caplog.set_level(logging.INFO, "silbo")
    heard: Counter[int] = Counter()
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(USER_JOINED)
    async def hear(event: UserJoined) -> None:
        heard[event.user_id] += 1

    numbers = count()
    published: list[int] = []
    addresses = None if shards else [f"orders-{each}" for each in range(6)]
    client = RedisCluster("127.0.0.1", cluster.nodes[0].port, credential_provider=tokens)
    if isinstance(tokens, StreamedTokens):
        await client.initialize()  # before that it does not register with the provider
    settings: dict[str, Any] = {"prefix": prefix, "shards": shards}
    async with (
        RedisStreams(client, app="web", **settings) as streams,
        Outbox(SQLiteStore(tmp_path / "outbox.db"), RedisStreams(client, app="outbox", **settings)) as outbox,
        RedisInbox(client, prefix=prefix) as inbox,
        Consumer(
            dispatcher,
            streams.group("g", start="oldest", **({"streams": addresses} if addresses else {})),
            events=[USER_JOINED],
            own="handle",
            inbox=inbox,
        ) as consumer,
    ):
        consuming = asyncio.create_task(consumer.run())
        stopping = asyncio.Event()

        async def publish(to: RedisStreams | Outbox) -> None:
            while not stopping.is_set():
                n = next(numbers)
                address = addresses[n % len(addresses)] if addresses else None
                await to.publish(replace(joined(n), to=address))
                published.append(n)
                await asyncio.sleep(0.002)

        publishing = [asyncio.create_task(publish(to)) for to in (streams, outbox)]
        try:
            for _ in range(TURNS):
                many = len(published)
                await eventually(lambda many=many: is_more(published, many + 50))  # type: ignore[misc]  # no type for many
                former = await tokens.renew()
                await eventually(lambda former=former: is_left(tokens, former))  # type: ignore[misc]
                tokens.revoke(former)
        finally:
            stopping.set()
            await asyncio.gather(*publishing)
        await eventually(lambda: is_more(list(heard), len(published)))
        consumer.stop()
        await consuming
    await client.aclose()
    assert set(heard) == set(published)
    assert set(heard.values()) == {1}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_sharded_channels_of_all_nodes_are_heard_while_tokens_are_renewed(
    tokens: Tokens, cluster: ClusterServers, prefix: str
) -> None:
    """At each node a new connection is subscribed before the former one is left: there is no gap, and nothing is missed."""
    if cluster.nodes[0].binary.version.startswith("6."):
        return  # sharded channels came with Redis 7
    names = [f"order.{each}" for each in range(10)]
    client = RedisCluster("127.0.0.1", cluster.nodes[0].port, credential_provider=tokens)
    if isinstance(tokens, StreamedTokens):
        await client.initialize()
    async with (
        RedisPubSub(client, app="web", prefix=prefix, sharded=True) as pubsub,
        opened(pubsub.subscribe(*names)) as receiver,
    ):
        got: list[Delivery | Gap] = []
        stopping = asyncio.Event()
        many = 0

        async def publish() -> None:
            nonlocal many
            while not stopping.is_set():
                await pubsub.publish(message(many, name=names[many % len(names)]))
                many += 1
                await asyncio.sleep(0)

        publishing = asyncio.create_task(publish())
        try:
            for _ in range(TURNS):
                former = await tokens.renew()
                async with asyncio.timeout(30):
                    while tokens.has_connections_in_use(former):
                        got += await receiver.receive(100)
                tokens.revoke(former)
        finally:
            stopping.set()
            await publishing
        await pubsub.publish(*[message(-1 - each, name=name) for each, name in enumerate(names)])
        async with asyncio.timeout(30):
            while not {-1 - each for each in range(len(names))} <= {number(item) for item in got[-5000:]}:
                got += await receiver.receive(100)
    await client.aclose()
    assert {number(item) for item in got} == {*range(-len(names), many)}


async def is_more(numbers: list[int], many: int) -> bool:
    return len(numbers) >= many


async def is_left(tokens: Tokens, user: str) -> bool:
    return not tokens.has_connections_in_use(user)
