"""A consumer on a Redis that is killed, flushed, replaced by an older copy: it goes on by itself, and says little."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer
from silbo._retry import Backoff
from silbo.brokers.redis import RedisStreams
from silbo.errors import Gap
from tests.support.redis_streams import eventually, message
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY = "silbo:{events}"


class Program:
    """A consumer that runs, and what it has heard and was told."""

    def __init__(self, streams: RedisStreams, **options: Any) -> None:
        self.heard: list[int] = []
        self.gaps: list[Gap] = []
        self.streams = streams
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_listener("user.joined", self._hear)
        group = streams.group("billing", start="oldest", claim_after=1)
        self.consumer = Consumer(dispatcher, group, backoff=Backoff(initial=0.01, cap=0.05), **options)

    async def _hear(self, event: Any) -> None:
        self.heard.append(event.payload["n"])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Program]:
        async with self.consumer:
            task = asyncio.create_task(self.consumer.run())
            yield self
            self.consumer.stop()
            await task

    async def hears(self, *numbers: int) -> None:
        async def has() -> bool:
            return set(numbers) <= set(self.heard)

        await eventually(has)


@pytest.mark.long
async def test_flushed_deleted_and_destroyed_in_mid_run(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is added afterwards is heard, without a restart; and nothing that was heard before comes again."""
    async with Program(streams).running() as program:
        expected: list[int] = []
        for n in range(0, 20, 4):
            await streams.publish(message(n), message(n + 1))
            expected += [n, n + 1]
            await program.hears(*expected)
            if n % 16 == 0:
                await admin.flushall()
            elif n % 16 == 8:
                await admin.delete(KEY)
            else:
                await admin.xgroup_destroy(KEY, "billing")
            await streams.publish(message(n + 2), message(n + 3))
            expected += [n + 2, n + 3]
        await program.hears(*expected)
    assert sorted(program.heard) == expected
    texts = [record.message for record in caplog.records]
    assert len(texts) <= 12  # some seconds, a line a second of each sort at most


async def test_killed_redis_is_waited_for_and_everything_is_heard(
    own_redis: RedisServer, admin: Redis, streams: RedisStreams
) -> None:
    async with Program(streams).running() as program:
        for n in range(3):
            await streams.publish(*[message(10 * n + k) for k in range(10)])
            await asyncio.to_thread(own_redis.restart)
            await program.hears(*range(10 * n + 10))

        async def nothing_pending() -> bool:
            return int((await admin.xpending(KEY, "billing"))["pending"]) == 0

        await eventually(nothing_pending)


async def test_redis_that_comes_back_from_an_older_copy(
    own_redis: RedisServer, admin: Redis, streams: RedisStreams
) -> None:
    """What is in the copy may come again; what is added afterwards is heard."""
    folder = own_redis.folder
    async with Program(streams).running() as program:
        await streams.publish(*map(message, range(5)))
        await program.hears(*range(5))
        await asyncio.to_thread(own_redis.kill)
        copies = [path for path in folder.iterdir() if path.name.startswith("append") and "." not in path.stem[:1]]
        for path in copies:
            saved = folder / f"saved-{path.name}"
            shutil.copytree(path, saved) if path.is_dir() else shutil.copy(path, saved)
        await asyncio.to_thread(own_redis.restart)
        await streams.publish(*map(message, range(5, 10)))
        await program.hears(*range(10))
        await asyncio.to_thread(own_redis.kill)
        for path in copies:
            saved = folder / f"saved-{path.name}"
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            saved.rename(path)
        await asyncio.to_thread(own_redis.restart)
        await streams.publish(*map(message, range(10, 15)))
        await program.hears(*range(15))


@pytest.mark.one_server
async def test_read_only_redis_is_waited_for(admin: Redis, streams: RedisStreams) -> None:
    """As a demoted master is, until the client leads to the new one."""
    async with Program(streams).running() as program:
        await streams.publish(message(1))
        await program.hears(1)
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        await asyncio.sleep(0.5)
        await admin.execute_command("REPLICAOF", "NO", "ONE")
        await streams.publish(message(2))
        await program.hears(2)
