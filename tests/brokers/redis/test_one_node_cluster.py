"""A service that speaks cluster alone, as managed ones do: one node with all slots, reached by a name, and tokens that expire."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.credentials import CredentialProvider

from silbo import AsyncEventDispatcher, Outbox
from silbo.brokers.redis import DeadLetters, RedisInbox, RedisPubSub, RedisStreams, credentials
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import silbo
from tests.support.consumer import USER_JOINED, Consumer, UserJoined, joined
from tests.support.redis_streams import eventually, message, number, opened, receive
from tools.redis_cluster import ClusterServers

pytestmark = pytest.mark.cluster

HOST = "localhost"
RIGHTS = ("~*", "&*", "+@all", "-@admin")  # of the commands for operators none, as CONFIG


class Tokens(CredentialProvider):
    """Each token has a user of its own, so that the service can end what it has opened."""

    generation = 0

    async def get_credentials_async(self) -> tuple[str, str]:
        return f"user-{self.generation}", f"token-{self.generation}"


@pytest.fixture(scope="module")
def service() -> Iterator[ClusterServers]:
    config = {"cluster-announce-hostname": HOST, "cluster-preferred-endpoint-type": "hostname"}
    with ClusterServers(masters=1, config=config) as servers:
        yield servers


@pytest.fixture
async def admin(service: ClusterServers) -> AsyncIterator[Redis]:
    async with Redis(port=service.nodes[0].port, protocol=2) as client:
        for generation in (0, 1):
            rules = ("on", f">token-{generation}", *RIGHTS)
            await client.execute_command("ACL", "SETUSER", f"user-{generation}", *rules)
        yield client


async def test_everything_works_and_a_renewed_token_interrupts_nothing(
    service: ClusterServers,
    admin: Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Outbox, relay, group, inbox, retries, dead letters; and then the same with the second token, after the first is void."""
    monkeypatch.setattr(credentials, "LOOK_EVERY", 0.05)
    caplog.set_level(logging.INFO, "silbo")
    tokens = Tokens()
    heard: Counter[int] = Counter()
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(USER_JOINED)
    async def hear(event: UserJoined) -> None:
        heard[event.user_id] += 1
        if event.user_id == 13:
            raise ValueError("no")

    async with RedisCluster(HOST, service.nodes[0].port, credential_provider=tokens) as client:
        async with (
            Outbox(SQLiteStore(tmp_path / "outbox.db"), RedisStreams(client, app="web")) as outbox,
            RedisInbox(client) as inbox,
            Consumer(
                dispatcher,
                RedisStreams(client, app="billing").group("g", start="oldest"),
                events=[USER_JOINED],
                inbox=inbox,
            ) as consumer,
            DeadLetters(client) as dead,
        ):
            consuming = asyncio.create_task(consumer.run())
            for turn in range(3):
                if turn == 1:
                    tokens.generation = 1
                    await eventually(lambda: reads_as(admin, "user-1"))
                elif turn == 2:
                    await admin.execute_command(
                        "ACL", "DELUSER", "user-0"
                    )  # and its connections that were idle are gone
                for n in range(20):
                    await outbox.publish(joined(100 * turn + n))
                await eventually(lambda many=20 * (turn + 1): has_heard(heard, many))  # type: ignore[misc]  # no type for many
            await eventually(lambda: has_dead(dead, 1))
            consumer.stop()
            await consuming
    assert heard == {100 * turn + n: 1 for turn in range(3) for n in range(20)} | {13: 5}
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in told if "ValueError: no" not in text] == []


async def reads_as(admin: Redis, user: str) -> bool:
    return [row["user"] for row in await admin.client_list() if row["cmd"] == "xreadgroup"] == [user]


async def has_heard(heard: Counter[int], many: int) -> bool:
    return len(heard) == many


async def has_dead(dead: DeadLetters, many: int) -> bool:
    return await dead.count() == many


@pytest.mark.parametrize("sharded", [False, True])
async def test_pubsub_works(sharded: bool, service: ClusterServers, admin: Redis) -> None:
    async with RedisCluster(HOST, service.nodes[0].port, credential_provider=Tokens()) as client:
        async with (
            RedisPubSub(client, app="web", sharded=sharded) as pubsub,
            opened(pubsub.subscribe("user.joined")) as listener,
        ):
            await pubsub.publish(message(1))
            assert [number(item) for item in await receive(listener, 1)] == [1]


async def test_the_command_line_looks_at_it(service: ClusterServers, admin: Redis) -> None:
    """Without the commands for operators, too: what could not be looked at is told."""
    where = ("--redis", f"redis://user-0:token-0@{HOST}:{service.nodes[0].port}", "--cluster")
    sent = await silbo("send", "order.paid", "{}", *where)
    assert sent.code == 0, sent
    groups = await silbo("groups", *where)
    assert groups.code == 0, groups
    doctor = await silbo("doctor", *where)
    assert "config" in doctor.out.lower(), doctor
