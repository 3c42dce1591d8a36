"""Processes that share shards, and are killed or frozen inside of their listeners."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge
from silbo.brokers.redis import RedisStreams
from silbo.shards import spread
from tests.support.redis_streams import eventually
from tests.support.sharded_process import STEP, Step

pytestmark = pytest.mark.every_redis
LEASE = 1.0


@asynccontextmanager
async def member(url: str, prefix: str, name: str) -> AsyncGenerator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.support.sharded_process", url, prefix, name, str(LEASE)],
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class Ledger:
    """The work of the listeners, in order."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self._redis = redis
        self._key = f"{prefix}:effects"
        self.entries: list[list[str]] = []

    async def read(self) -> None:
        """Read the entries anew."""
        entries: Any = await self._redis.lrange(self._key, 0, -1)
        self.entries = [entry.decode().split() for entry in entries]

    async def find(self, *words: str) -> bool:
        """True if an entry has all these words."""
        await self.read()
        return any(set(words) <= set(entry) for entry in self.entries)

    def fenced(self) -> dict[str, list[int]]:
        """The numbers done by key, first times only, without what was done in an epoch that was over."""
        newest: dict[int, int] = defaultdict(int)
        done: dict[str, list[int]] = defaultdict(list)
        for _, epoch, what, key, number in self.entries:
            shard = spread(key, 4)
            if int(epoch) < newest[shard]:
                continue
            newest[shard] = int(epoch)
            if what == "done" and int(number) not in done[key]:
                done[key].append(int(number))
        return done


@pytest.mark.parametrize("end", [pytest.param(signal.SIGKILL, marks=pytest.mark.long), signal.SIGSTOP])
async def test_shards_of_a_process_that_ends_in_a_listener_are_taken(
    redis: Redis, redis_url: str, prefix: str, end: signal.Signals
) -> None:
    """With what it had in hand, in order; frozen and awake again it settles nothing, and takes its part anew."""
    dispatcher = AsyncEventDispatcher()
    ledger = Ledger(redis, prefix)
    keys = [str(key) for key in range(8)]
    async with RedisStreams(redis, app="web", prefix=prefix, shards=4) as streams:
        dispatcher.add_subscriber(Bridge(streams))

        async def publish(number: int, sleep: float = 0.0) -> None:
            await asyncio.gather(*[dispatcher.adispatch(STEP, Step(key, number, sleep)) for key in keys])

        async with member(redis_url, prefix, "one") as one:
            await publish(0)
            for key in keys:
                await eventually(lambda key=key: ledger.find("one", "done", key, "0"))  # type: ignore[misc]
            await publish(1, sleep=1.0)
            await publish(2)
            for key in keys:
                await eventually(lambda key=key: ledger.find("one", "begin", key, "1"))  # type: ignore[misc]
            one.send_signal(end)
            async with member(redis_url, prefix, "two") as two:
                for key in keys:
                    await eventually(lambda key=key: ledger.find("two", "done", key, "2"))  # type: ignore[misc]
                if end == signal.SIGSTOP:
                    one.send_signal(signal.SIGCONT)
                    await eventually(lambda: ledger.find("one", "done", keys[0], "1"))
                await publish(3)
                # One that lost its lease once more may have done them in an epoch that was over: then they come again.
                await eventually(lambda: _all_done(ledger, keys, 3))
                for key, done in ledger.fenced().items():
                    assert done == [0, 1, 2, 3], key
                await eventually(lambda: _is_zero(redis, prefix))
                if end == signal.SIGSTOP:
                    one.terminate()
                    assert one.stdout is not None
                    async with asyncio.timeout(30):
                        assert int(await one.stdout.readline()) >= len(keys)
                two.terminate()


async def _all_done(ledger: Ledger, keys: list[str], number: int) -> bool:
    """True if each key has this number in an epoch that was not over."""
    await ledger.read()
    done = ledger.fenced()
    return all(number in done[key] for key in keys)


async def _pending(redis: Redis, prefix: str) -> int:
    streams = [f"{prefix}:{{events.{shard}}}" for shard in range(4)]
    return sum([(await redis.xpending(stream, "billing"))["pending"] for stream in streams])


async def _is_zero(redis: Redis, prefix: str) -> bool:
    return await _pending(redis, prefix) == 0
