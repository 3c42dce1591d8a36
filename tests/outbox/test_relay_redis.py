"""Outbox, SQLite and Redis Streams: what was stored is in the stream, once, each key in its order, whoever dies."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest
from redis.asyncio import Redis
from whistle import AsyncEventDispatcher as WhistleDispatcher

from silbo import Bridge, ECSTEvent
from silbo.brokers.redis import RedisStreams
from silbo.errors import BrokerUnavailable, Fenced
from silbo.message import Message, instance
from silbo.outbox import relay as relaying
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay
from silbo.protocols import Sequenced
from silbo.stores.sqlite import SQLiteStore
from silbo.wire.formats import JSON
from tests.support.relay import message, wait_until, wait_until_sent
from tools.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "STANDBY", 0.05)


def streams(client: Redis, prefix: str, **settings: Any) -> RedisStreams:
    return RedisStreams(client, app="web", prefix=prefix, **settings)


@asynccontextmanager
async def client_of(server: RedisServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as client:
        yield client


async def arrived(redis: Redis, prefix: str) -> list[Message]:
    return [JSON.decode(fields[b"message"]) for _, fields in await redis.xrange(f"{prefix}:{{events}}")]


async def arrived_numbers(redis: Redis, prefix: str) -> list[int]:
    return [each.payload["n"] for each in await arrived(redis, prefix)]


class Load:
    """Publishes under four keys, one message after another under each, for as long as the block runs."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.published: list[tuple[str, int]] = []

    async def __aenter__(self) -> Self:
        self._stopping = False
        self._tasks = [asyncio.create_task(self._publish(key)) for key in "abcd"]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _publish(self, key: str) -> None:
        for number in count():
            if self._stopping:
                return
            await self._outbox.publish(message(number, key))
            self.published.append((key, number))
            await asyncio.sleep(0.001)

    async def grows(self, by: int) -> None:
        goal = len(self.published) + by
        await wait_until(lambda: len(self.published) >= goal)


def check(published: Sequence[tuple[str, int]], messages: Sequence[Message]) -> None:
    """Each is there once, and each key in order."""
    found = [(each.key or "", each.payload["n"]) for each in messages]
    assert Counter(found) == Counter(published)
    for key in "abcd":
        its = [number for of, number in found if of == key]
        assert its == sorted(its), key


@pytest.mark.every_redis
async def test_what_is_stored_comes_into_the_stream(redis: Redis, prefix: str, path: Path) -> None:
    async with Outbox(SQLiteStore(path), streams(redis, prefix)) as outbox:
        async with Load(outbox) as load:
            await load.grows(200)
        await wait_until_sent(outbox._store)
    check(load.published, await arrived(redis, prefix))


async def test_host_moves_from_streams_to_the_outbox_by_one_line(redis: Redis, prefix: str, path: Path) -> None:
    """Any host: this one has Whistle's own dispatcher. What arrives is the same."""

    class UserJoined(ECSTEvent):
        def __init__(self, user_id: int) -> None:
            self.user_id = user_id

    async def run(publisher: Any) -> None:
        dispatcher = WhistleDispatcher()
        dispatcher.add_listener("user.joined", Bridge(publisher).forward, priority=1000)
        for user_id in range(3):
            await dispatcher.adispatch("user.joined", UserJoined(user_id))

    async with streams(redis, prefix) as publisher:
        await run(publisher)
    async with Outbox(SQLiteStore(path), streams(redis, prefix)) as publisher:
        await run(publisher)
    messages = await arrived(redis, prefix)
    assert [each.payload["user_id"] for each in messages] == [0, 1, 2, 0, 1, 2]
    for direct, stored in zip(messages[:3], messages[3:], strict=True):
        assert stored.origin == direct.origin == ("web", instance())
        assert (stored.message_name, stored.message_type) == (direct.message_name, direct.message_type)
        assert stored.payload.keys() == direct.payload.keys()
        assert stored.headers.keys() == direct.headers.keys()


# -- Redis fails ---------------------------------------------------------------------------------------------


@pytest.mark.every_redis
async def test_redis_that_is_away_at_the_start_is_waited_for(own_redis: RedisServer, path: Path) -> None:
    """A publish succeeds all the same."""
    own_redis.kill()
    async with client_of(own_redis) as client:
        async with Outbox(SQLiteStore(path), streams(client, "silbo", timeout=0.5)) as outbox:
            await outbox.publish(*map(message, range(100)))
            await wait_until(lambda: outbox.stats.postponed)
            assert (await outbox.status()).counts["dead"] == 0
            own_redis.restart()
            await wait_until_sent(outbox._store)
        assert await arrived_numbers(client, "silbo") == list(range(100))


@pytest.mark.every_redis
async def test_redis_killed_again_and_again_leaves_each_message_once(own_redis: RedisServer, path: Path) -> None:
    async with client_of(own_redis) as client:
        async with Outbox(SQLiteStore(path), streams(client, "silbo", timeout=0.5)) as outbox:
            async with Load(outbox) as load:
                for _ in range(4):
                    await load.grows(60)
                    own_redis.kill()
                    await load.grows(60)
                    own_redis.restart()
            await wait_until_sent(outbox._store)
            assert outbox.stats.postponed
        check(load.published, await arrived(client, "silbo"))


async def test_redis_frozen_for_longer_than_the_timeout_leaves_each_message_once(
    own_redis: RedisServer, path: Path
) -> None:
    """What it carries out when it wakes up was never answered; the same is sent again, and is known."""
    async with client_of(own_redis) as client:
        async with Outbox(SQLiteStore(path), streams(client, "silbo", timeout=0.2)) as outbox:
            async with Load(outbox) as load:
                for _ in range(3):
                    await load.grows(50)
                    postponed = outbox.stats.postponed
                    own_redis.pause()
                    await wait_until(lambda before=postponed: outbox.stats.postponed > before)
                    own_redis.resume()
            await wait_until_sent(outbox._store)
        check(load.published, await arrived(client, "silbo"))


async def test_flushed_redis_goes_on_and_a_replay_brings_everything_back(own_redis: RedisServer, path: Path) -> None:
    """The memory of the sequences is gone with the stream, and nobody has to be told."""
    begin = datetime.now(UTC)
    async with client_of(own_redis) as client:
        async with Outbox(SQLiteStore(path), streams(client, "silbo")) as outbox:
            await outbox.publish(*map(message, range(300)))
            await wait_until(lambda: outbox.stats.sent == 300)
            await client.flushall()
            await outbox.publish(*map(message, range(300, 400)))
            await wait_until(lambda: outbox.stats.sent == 400)
            assert await arrived_numbers(client, "silbo") == list(range(300, 400))
            assert await outbox.replay(since=begin) == 400
            await wait_until(lambda: outbox.stats.sent == 800)
        assert await arrived_numbers(client, "silbo") == [*range(300, 400), *range(400)]


async def test_redis_back_from_an_older_state_is_mended_by_a_replay(own_redis: RedisServer, path: Path) -> None:
    async with client_of(own_redis) as client:
        async with Outbox(SQLiteStore(path), streams(client, "silbo", timeout=0.5)) as outbox:
            await outbox.publish(*map(message, range(100)))
            await wait_until(lambda: outbox.stats.sent == 100)
            kept = shutil.copytree(own_redis.folder, path.with_name("kept"), ignore=shutil.ignore_patterns("*.sock"))
            since = datetime.now(UTC)
            await outbox.publish(*map(message, range(100, 200)))
            await wait_until(lambda: outbox.stats.sent == 200)
            own_redis.kill()
            for name in [each for each in own_redis.folder.iterdir() if "append" in each.name]:
                shutil.rmtree(name) if name.is_dir() else name.unlink()
            shutil.copytree(kept, own_redis.folder, dirs_exist_ok=True)
            own_redis.restart()
            assert await arrived_numbers(client, "silbo") == list(range(100))
            assert await outbox.replay(since=since) == 100
            await wait_until(lambda: outbox.stats.sent == 300)
        assert await arrived_numbers(client, "silbo") == list(range(200))


# -- relays fail ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def relay_process(path: Path, url: str, prefix: str, lease: float = 0.5) -> AsyncIterator[Any]:
    process: Any = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.support.relay_process", str(path), url, prefix, str(lease)],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(20):
            process.owner = (await process.stdout.readline()).decode().strip()
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def leader(outbox: Outbox, among: Sequence[Any]) -> Any:
    """The process that leads, as soon as one of them does."""
    async with asyncio.timeout(20):
        while True:
            lead = (await outbox.status()).leads.get(0)
            for process in among:
                if lead is not None and process.owner == lead.owner:
                    return process
            await asyncio.sleep(0.01)


@pytest.mark.long
@pytest.mark.every_redis
async def test_relays_killed_in_the_middle_leave_each_message_once(
    redis: Redis, redis_url: str, prefix: str, path: Path
) -> None:
    """kill -9 of the leader, again and again; the other one takes over."""
    async with Outbox(SQLiteStore(path), streams(redis, prefix), relay=False) as outbox, Load(outbox) as load:
        async with relay_process(path, redis_url, prefix) as first:
            async with relay_process(path, redis_url, prefix) as second:
                relays = [first, second]
                leading = await leader(outbox, relays)
                await load.grows(100)
                leading.kill()
                await load.grows(100)
                relays.remove(leading)
                assert await leader(outbox, relays) is relays[0]
                async with relay_process(path, redis_url, prefix) as third:
                    await load.grows(50)
                    relays[0].kill()
                    assert await leader(outbox, [third]) is third
                    await load.grows(50)
                    await load.__aexit__()
                    await wait_until_sent(outbox._store)
    check(load.published, await arrived(redis, prefix))


@pytest.mark.long
async def test_frozen_relay_wakes_up_and_changes_nothing(redis: Redis, redis_url: str, prefix: str, path: Path) -> None:
    """SIGSTOP for longer than its lease; or, where that hits it in the middle of a transaction and so locks the file for
    everybody, for three seconds, in which publishes wait.
    """
    async with Outbox(SQLiteStore(path), streams(redis, prefix), relay=False) as outbox, Load(outbox) as load:
        async with (
            relay_process(path, redis_url, prefix) as first,
            relay_process(path, redis_url, prefix) as second,
        ):
            relays = [first, second]
            for _ in range(3):
                leading = await leader(outbox, relays)
                await load.grows(40)
                leading.send_signal(signal.SIGSTOP)
                with suppress(TimeoutError):
                    async with asyncio.timeout(3):
                        await leader(outbox, [each for each in relays if each is not leading])
                        await load.grows(40)
                leading.send_signal(signal.SIGCONT)
            await load.__aexit__()
            await wait_until_sent(outbox._store)
            for process in relays:
                process.stdin.write(b"\n")
                process.stdin.close()
                assert (await process.stdout.readline()).strip().isdigit()
                assert await process.wait() == 0
    check(load.published, await arrived(redis, prefix))


@pytest.mark.every_redis
async def test_leader_that_wakes_up_in_the_middle_of_a_batch_is_refused(redis: Redis, prefix: str, path: Path) -> None:
    """Its batch was sent by the next leader; Redis has seen that one's epoch, and takes nothing from an older one."""
    held, release = asyncio.Event(), asyncio.Event()

    class Frozen(RedisStreams):
        async def publish_sequenced(
            self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]
        ) -> Sequenced:
            if not release.is_set():
                held.set()
                await release.wait()
            return await super().publish_sequenced(source, epoch, messages)

    errors: list[Exception] = []
    async with Outbox(SQLiteStore(path), streams(redis, prefix), relay=False) as outbox:
        await outbox.publish(*map(message, range(10)))
        old = Relay(
            SQLiteStore(path),
            Frozen(redis, app="web", prefix=prefix),
            lease=0.2,
            on_error=lambda error, _: errors.append(error),
        )
        async with old:
            running = asyncio.create_task(old.run())
            await held.wait()
            async with Relay(SQLiteStore(path), streams(redis, prefix), lease=60) as new:
                also = asyncio.create_task(new.run())
                await wait_until(lambda: new.stats.sent == 10)
                await outbox.publish(message(10))
                await wait_until(lambda: new.stats.sent == 11)
                release.set()
                await wait_until(lambda: old.stats.fenced)
                assert new.stats.known == 0
                new.stop()
                await also
            old.stop()
            await running
    assert [type(error) for error in errors] == [Fenced]
    assert await arrived_numbers(redis, prefix) == list(range(11))


# -- the store fails -----------------------------------------------------------------------------------------


async def test_store_restored_from_an_older_copy_loses_nothing_that_comes_later(
    redis: Redis, prefix: str, path: Path
) -> None:
    """Though Redis has seen more of it than it knows itself."""

    async def run(*numbers: int) -> None:
        async with Outbox(SQLiteStore(path), streams(redis, prefix)) as outbox:
            for number in numbers:
                await outbox.publish(message(number))
            await wait_until_sent(outbox._store)

    await run(1, 2)
    shutil.copy(path, path.with_name("copy"))
    await run(3, 4, 5, 6, 7)
    await run(8)
    shutil.copy(path.with_name("copy"), path)
    await run(9, 10)
    assert await arrived_numbers(redis, prefix) == [*range(1, 11)]


async def test_restored_store_loses_nothing_also_where_its_first_send_has_no_outcome(
    redis: Redis, prefix: str, path: Path
) -> None:
    """A crash, or an outage, between the copy's first sequences and Redis's answer."""
    async with Outbox(SQLiteStore(path), streams(redis, prefix)) as outbox:
        await outbox.publish(message(1))
        await wait_until(lambda: outbox.stats.sent == 1)
    shutil.copy(path, path.with_name("copy"))
    async with Outbox(SQLiteStore(path), streams(redis, prefix)) as outbox:
        await outbox.publish(*map(message, range(2, 12)))
        await wait_until(lambda: outbox.stats.sent == 10)
    shutil.copy(path.with_name("copy"), path)

    class Away(RedisStreams):
        async def publish_sequenced(self, *_: object) -> Sequenced:
            raise BrokerUnavailable("away")

    async with Outbox(SQLiteStore(path), Away(redis, app="web", prefix=prefix)) as outbox:
        await outbox.publish(*map(message, range(20, 25)))
        await wait_until(lambda: outbox.stats.postponed)
    async with Outbox(SQLiteStore(path), streams(redis, prefix)) as outbox:
        await wait_until_sent(outbox._store)
    assert await arrived_numbers(redis, prefix) == [*range(1, 12), *range(20, 25)]
