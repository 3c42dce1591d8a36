"""Consumer processes of one group over 16 shards, as the scenario's process sees them, and their program.

    python -m benchmarks.shard_consumers URL [--cluster]

The program answers each line of its standard input with the shards that it leads, the messages that it has handled, and its
processor time, in JSON; and it writes `{"last": true}` behind the last message of each shard. It ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis, RedisCluster

from benchmarks.shard_servers import MEETING_JOINED, PREFIX, SHARDS, MeetingJoined, ShardServers
from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisStreams

__all__ = ["Drain", "ShardConsumers", "open_consumers"]

GROUP: Final = "readers"
SECONDS: Final = 60.0
"""Seconds after which a drain, or a division of the shards, fails."""
LOOK_EVERY: Final = 0.05


# -- the program ----------------------------------------------------------------------------------------------


def say(**line: object) -> None:
    """Write one line to the scenario's process."""
    print(json.dumps(line), flush=True)


async def consume(url: str, *, is_cluster: bool) -> None:
    """Consume until the standard input ends."""
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    dispatcher, handled = AsyncEventDispatcher(), 0

    @dispatcher.listen(MEETING_JOINED)
    async def note(event: MeetingJoined) -> None:
        nonlocal handled
        handled += 1
        if event.is_last:
            say(last=True)

    client: Any = RedisCluster.from_url(url) if is_cluster else Redis.from_url(url)
    async with client, RedisStreams(client, app="readers", prefix=PREFIX) as streams:
        group = streams.group(GROUP, start="new", shards=SHARDS)
        async with Consumer(dispatcher, group, events=[MEETING_JOINED]) as consumer:
            running = asyncio.create_task(consumer.run())
            async for _ in lines:
                say(leads=len(consumer.health().leads or ()), handled=handled, cpu=process_time())
            consumer.stop()
            await running


# -- the scenario's side --------------------------------------------------------------------------------------


class Drain(NamedTuple):
    """A backlog that was handled, per message.

    Attributes:
        consumers: Seconds of processor time of all consumers.
        redis: Seconds of processor time of all servers.
        clock: Seconds by the clock.
    """

    consumers: float
    redis: float
    clock: float


class ShardConsumers:
    """Running consumer processes of one group.

    Args:
        servers: Where the shards are, with a backlog.
        backlog: The number of its messages.
        processes: The processes.
    """

    def __init__(self, servers: ShardServers, backlog: int, processes: Sequence[asyncio.subprocess.Process]) -> None:
        self._servers = servers
        self._backlog = backlog
        self._processes = processes

    async def settle(self) -> None:
        """Wait until the shards are divided evenly."""
        many = len(self._processes)
        async with asyncio.timeout(SECONDS):
            while True:
                leads = [answer["leads"] for answer in await self._ask()]
                if sum(leads) == SHARDS and max(leads) - min(leads) <= (SHARDS % many > 0):
                    return
                await asyncio.sleep(LOOK_EVERY)

    async def drain(self) -> Drain:
        """Let them handle the backlog once.

        Raises:
            RuntimeError: a message was handled twice, or not at all.
        """
        before = await self._ask()
        redis_before = self._servers.fill()
        began_at = perf_counter()
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*map(_read_last, self._processes, before))
        clock = perf_counter() - began_at
        redis = self._servers.read_cpu() - redis_before
        after = await self._ask()
        handled = _subtract(after, before, "handled")
        if handled != self._backlog:
            raise RuntimeError(f"{handled} messages were handled of {self._backlog}")
        self._servers.empty()
        return Drain(_subtract(after, before, "cpu") / handled, redis / handled, clock / handled)

    async def _ask(self) -> list[dict[str, Any]]:
        for process in self._processes:
            _write(process)
        return [await _read(process) for process in self._processes]


def _write(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a consumer has ended")
    answer: dict[str, Any] = json.loads(line)
    return answer


async def _read_last(process: asyncio.subprocess.Process, before: Mapping[str, Any]) -> None:
    """Read that the last message of each shard was handled."""
    for _ in range(before["leads"]):
        assert await _read(process) == {"last": True}


def _subtract(after: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]], name: str) -> Any:
    return sum(each[name] for each in after) - sum(each[name] for each in before)


@asynccontextmanager
async def open_consumers(servers: ShardServers, backlog: int, number: int) -> AsyncGenerator[ShardConsumers]:
    """Publish a backlog, and start so many processes; end them at the end."""
    await servers.publish_backlog(backlog)
    words = [sys.executable, "-m", "benchmarks.shard_consumers", *servers.words]
    pipe = asyncio.subprocess.PIPE
    async with AsyncExitStack() as stack:
        processes = []
        for _ in range(number):
            process = await asyncio.create_subprocess_exec(
                *words, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[1]
            )
            stack.push_async_callback(_end, process)
            processes.append(process)
        yield ShardConsumers(servers, backlog, processes)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(SECONDS):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Consume from shards; started by a benchmark.")
    parser.add_argument("url")
    parser.add_argument("--cluster", action="store_true", help="the URL is that of a cluster's node")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(consume(options.url, is_cluster=options.cluster))
