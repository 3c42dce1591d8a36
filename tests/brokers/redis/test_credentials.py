"""Credentials that are renewed while connections live: nothing is interrupted, lost or unknown."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.auth.token import SimpleToken
from redis.credentials import CredentialProvider, StreamingCredentialProvider

from silbo import AsyncEventDispatcher, Outbox
from silbo.brokers.redis import RedisPubSub, RedisStreams, credentials
from silbo.errors import Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from silbo.stores.sqlite import SQLiteStore
from tests.support.consumer import USER_JOINED, Consumer, UserJoined, joined
from tests.support.redis_streams import eventually, has_connections, message, number, opened
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis


class Tokens(CredentialProvider):
    """Credentials as of a service that gives each token a user of its own, so that Redis can end what a token has opened."""

    def __init__(self) -> None:
        self.generation = 0
        self.fails = False

    @property
    def user(self) -> str:
        return f"user-{self.generation}"

    def get_credentials(self) -> tuple[str, str]:
        if self.fails:
            raise RuntimeError("the service of tokens is away")
        return self.user, f"token-{self.generation}"

    async def renew(self, admin: Redis) -> str:
        """From now on there are other credentials; return the former user, whose connections Redis still serves."""
        former = self.user
        await self.allow(admin, self.generation + 1)
        self.generation += 1
        return former

    async def allow(self, admin: Redis, generation: int) -> None:
        user = ["on", f">token-{generation}", "~*", "&*", "+@all"]
        await admin.execute_command("ACL", "SETUSER", f"user-{generation}", *user)


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

    async def renew(self, admin: Redis) -> str:
        former = await super().renew(admin)
        assert self.callback is not None, "the program's client has lost its callback"
        await self.callback(SimpleToken(f"token-{self.generation}", -1, 0, {"oid": self.user}))
        return former


@pytest.fixture(params=[Tokens, AsynchronousTokens, StreamedTokens])
async def tokens(request: pytest.FixtureRequest, admin: Redis, monkeypatch: pytest.MonkeyPatch) -> Tokens:
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.05)
    found: Tokens = request.param()
    await found.allow(admin, 0)
    return found


def make_client(own_redis: RedisServer, tokens: Tokens) -> Redis:
    """A client that registers itself with a streaming provider: one of `from_url` does not."""
    path = own_redis.url.removeprefix("unix://").partition("?")[0]
    return Redis(unix_socket_path=path, credential_provider=tokens)


async def test_tokens_are_renewed_under_publishing_relaying_and_consuming(
    tokens: Tokens, admin: Redis, own_redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each former user is deleted as soon as no connection is its own, which ends all that it has opened; three times."""
    caplog.set_level(logging.INFO, "silbo")
    heard: Counter[int] = Counter()
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(USER_JOINED)
    async def hear(event: UserJoined) -> None:
        heard[event.user_id] += 1

    numbers = iter(range(1_000_000))
    published: list[int] = []
    async with make_client(own_redis, tokens) as client:
        relayed_to = RedisStreams(client, app="outbox")
        async with (
            RedisStreams(client, app="web") as streams,
            Outbox(SQLiteStore(tmp_path / "outbox.db"), relayed_to) as outbox,
            Consumer(dispatcher, streams.group("g", start="oldest"), events=[USER_JOINED], own="handle") as consumer,
        ):
            consuming = asyncio.create_task(consumer.run())
            stopping = asyncio.Event()

            async def publish(to: RedisStreams | Outbox) -> None:
                while not stopping.is_set():
                    n = next(numbers)
                    await to.publish(joined(n))
                    published.append(n)
                    await asyncio.sleep(0.002)

            publishing = [asyncio.create_task(publish(to)) for to in (streams, outbox)]
            for _ in range(3):
                await asyncio.sleep(0.1)  # some traffic, and no wait for something
                former = await tokens.renew(admin)
                await has_connections(admin, former, 0)
                await admin.execute_command("ACL", "DELUSER", former)
            stopping.set()
            await asyncio.gather(*publishing)
            await eventually(lambda: all_are_in(heard, published))
            consumer.stop()
            await consuming
    assert set(heard.values()) == {1}
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def all_are_in(heard: Counter[int], published: list[int]) -> bool:
    return len(heard) == len(published)


@pytest.mark.parametrize("sharded", [False, True])
async def test_a_subscription_goes_on_over_a_new_connection(
    tokens: Tokens, sharded: bool, admin: Redis, own_redis: RedisServer
) -> None:
    """The old connection is read to its end, and the new one is subscribed before: nothing is missed."""
    if sharded and own_redis.binary.version.startswith("6."):
        return  # sharded channels came with Redis 7
    async with make_client(own_redis, tokens) as client:
        async with (
            RedisPubSub(client, app="web", sharded=sharded) as pubsub,
            opened(pubsub.subscribe("user.joined", *([] if sharded else ["order.*"]))) as receiver,
        ):
            got: list[Delivery | Gap] = []
            stopping = asyncio.Event()
            count = 0

            async def publish() -> None:
                nonlocal count
                while not stopping.is_set():
                    await pubsub.publish(message(count))
                    count += 1

            publishing = asyncio.create_task(publish())
            for _ in range(3):
                former = await tokens.renew(admin)
                async with asyncio.timeout(30):
                    while any(row["user"] == former for row in await admin.client_list()):
                        got += await receiver.receive(100)
                await admin.execute_command("ACL", "DELUSER", former)
            stopping.set()
            await publishing
            await pubsub.publish(message(-1))
            await read_until(receiver, -1, got)
    numbers = [number(item) for item in got]
    assert set(numbers) == {*range(count), -1}
    assert len(numbers) < len(set(numbers)) + 500  # only what came in the moment of the change comes twice


@pytest.mark.parametrize("sharded", [False, True])
async def test_a_subscription_whose_renewed_credentials_are_refused_goes_on(
    sharded: bool,
    admin: Redis,
    own_redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if sharded and own_redis.binary.version.startswith("6."):
        return  # sharded channels came with Redis 7
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.0)
    tokens = Tokens()
    await tokens.allow(admin, 0)
    async with make_client(own_redis, tokens) as client, Redis.from_url(own_redis.url) as others:
        async with (
            RedisPubSub(client, app="web", sharded=sharded) as pubsub,
            RedisPubSub(others, app="others", sharded=sharded) as publisher,
            opened(pubsub.subscribe("user.joined")) as receiver,
        ):
            tokens.generation = 1
            await publisher.publish(message(1))
            got: list[Delivery | Gap] = []
            await read_until(receiver, 1, got)
            assert len(got) == 1
            assert "renewed credentials were refused" in caplog.text


async def read_until(receiver: Receiver, last: int, got: list[Delivery | Gap]) -> None:
    async with asyncio.timeout(30):
        while not got or isinstance(got[-1], Gap) or number(got[-1]) != last:
            got += await receiver.receive(100)


async def test_refused_or_unknown_credentials_leave_the_former_ones(
    admin: Redis, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A token that Redis does not know yet, or a provider that fails, is told in the log; then it is tried again."""
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.0)
    tokens = Tokens()
    await tokens.allow(admin, 0)
    async with make_client(own_redis, tokens) as client:
        async with RedisStreams(client, app="web") as streams:
            await streams.publish(message(0))
            tokens.generation = 1
            await streams.publish(message(1))
            assert "renewed credentials were refused, and a connection goes on" in caplog.text
            tokens.fails = True
            await streams.publish(message(2))
            assert "the credential provider failed" in caplog.text
            assert "RuntimeError: the service of tokens is away" in caplog.text
            await has_connections(admin, "user-0", 1)
            tokens.fails = False
            await tokens.allow(admin, 1)
            await streams.publish(message(3))
            await has_connections(admin, "user-0", 0)
    assert "token-" not in caplog.text


async def test_an_idle_connection_that_an_expired_token_has_opened_is_replaced(
    admin: Redis, own_redis: RedisServer
) -> None:
    """Redis has ended it meanwhile: the next publish goes over a new one, and is not unknown."""
    tokens = Tokens()
    await tokens.allow(admin, 0)
    async with make_client(own_redis, tokens) as client:
        async with RedisStreams(client, app="web") as streams:
            await streams.publish(message(0))
            former = await tokens.renew(admin)
            await admin.execute_command("ACL", "DELUSER", former)
            await has_connections(admin, former, 0)
            await streams.publish(message(1))
            await has_connections(admin, "user-1", 1)
