"""A process that publishes to Redis Streams: ``python -m tests.support.publisher_process URL PREFIX``.

Publishes until it is killed, and prints each number after its publish returned.
"""

from __future__ import annotations

import asyncio
import sys
from itertools import count

from silbo.brokers.redis import RedisStreams
from silbo.message import Message
from tests.support.redis_at import redis_at


async def main(url: str, prefix: str) -> None:
    numbers = count()
    async with redis_at(url) as client, RedisStreams(client, app="web", prefix=prefix) as streams:

        async def publish() -> None:
            for number in numbers:
                await streams.publish(Message("ecst_event", "counted", str(number), {"n": number}))
                print(number, flush=True)

        await asyncio.gather(*(publish() for _ in range(8)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
