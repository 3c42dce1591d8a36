"""One publisher, one stream and one consumer: the processor time that a message takes in each program.

    python -m benchmarks.scale.stream

Starts a Redis of its own. Processor time carries over to a busy machine, and to another number of cores; seconds do not.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from dataclasses import dataclass
from time import process_time

from redis.asyncio import Redis

from benchmarks.outbox import message
from benchmarks.scale.processor import cpu_of
from silbo import AsyncEventDispatcher, Consumer, EventName, NotificationEvent
from silbo.brokers.redis import RedisStreams
from tools.redis_server import RedisServer

BATCH = 100
"""Messages that are published at once, as by a hundred requests."""


@dataclass
class Joined(NotificationEvent):
    """The event of the benchmarks."""

    meeting_id: int
    user_id: int


JOINED = EventName("meeting.joined", Joined)


async def measure(url: str, server: int, messages: int) -> dict[str, float]:
    """Publish messages, then let a consumer handle them. Return microseconds of processor time for each."""
    heard = 0
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(JOINED)
    async def count(event: Joined) -> None:
        nonlocal heard
        heard += 1
        if heard == messages:
            consumer.stop()

    async with Redis.from_url(url) as client:
        await client.flushall()
        made = [message(number) for number in range(messages)]
        streams = RedisStreams(client, app="web")
        before, redis_before = process_time(), cpu_of([server])
        for start in range(0, messages, BATCH):
            await asyncio.gather(*(streams.publish(each) for each in made[start : start + BATCH]))
        published, redis_published = process_time() - before, cpu_of([server]) - redis_before
        await streams.aclose()
        group = RedisStreams(client, app="billing").group("billing", start="oldest")
        before, redis_before = process_time(), cpu_of([server])
        async with Consumer(dispatcher, group, events=[JOINED]) as consumer:
            await consumer.run()
        consumed, redis_consumed = process_time() - before, cpu_of([server]) - redis_before
    return {
        "publisher": 1e6 * published / messages,
        "redis, to add": 1e6 * redis_published / messages,
        "consumer": 1e6 * consumed / messages,
        "redis, to read and acknowledge": 1e6 * redis_consumed / messages,
    }


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.stream", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=50_000)
    options = parser.parse_args()
    with RedisServer() as server:
        found = [asyncio.run(measure(server.url, server.pid, options.messages)) for _ in range(options.rounds)]
    for name in found[0]:
        values = sorted(each[name] for each in found)
        print(f"{name}: {statistics.median(values):.1f} us a message ({values[0]:.1f} to {values[-1]:.1f})", flush=True)


if __name__ == "__main__":
    main()
