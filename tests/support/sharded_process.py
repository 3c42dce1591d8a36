"""A member of the group "billing" of an address with shards, in a process of its own. Run by tests/consumer/test_sharded_processes.py.

    python -m tests.support.sharded_process URL PREFIX NAME LEASE

What its listeners begin and finish are entries in the Redis list `{prefix}:effects`: "NAME EPOCH begin KEY N", "NAME EPOCH done KEY N". A
message says for how long its listener sleeps. Ends in good order on SIGTERM, and prints how many deliveries it has lost.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import dataclass
from typing import Any

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, EventName
from silbo.brokers.redis import RedisStreams
from tests.support.redis_at import redis_at


@dataclass
class Step(ECSTEvent):
    key: str
    number: int
    sleep: float = 0.0


STEP = EventName("step", Step, key="key")


async def main(url: str, prefix: str, name: str, lease: float) -> None:
    dispatcher = AsyncEventDispatcher()
    async with redis_at(url) as client, RedisStreams(client, app="billing", prefix=prefix, shards=4) as streams:

        @dispatcher.listen(STEP)
        async def work(step: Step) -> None:
            origin: Any = step.origin
            await client.rpush(f"{prefix}:effects", f"{name} {origin.epoch} begin {step.key} {step.number}")
            await asyncio.sleep(step.sleep)
            await client.rpush(f"{prefix}:effects", f"{name} {origin.epoch} done {step.key} {step.number}")

        group = streams.group("billing", start="oldest", claim_after=lease)
        async with Consumer(dispatcher, group, events=[STEP], concurrency=8) as consumer:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
            print("ready", flush=True)
            await consumer.run()
        print(consumer.stats.lost, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], lease=float(sys.argv[4])))
