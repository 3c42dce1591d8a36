"""A relay in a process of its own, ended by a line on stdin. Run by tests/outbox/test_relay_redis.py.

python -m tests.support.relay_process STORE URL PREFIX LEASE

It prints the name under which it leads; in the end, how often it was refused as an old leader.
"""

from __future__ import annotations

import asyncio
import sys

from silbo.brokers.redis import RedisStreams
from silbo.outbox.relay import Relay
from silbo.stores.sqlite import SQLiteStore
from tests.support.redis_at import redis_at


async def main(store: str, url: str, prefix: str, lease: str) -> None:
    async with redis_at(url) as client:
        streams = RedisStreams(client, app="relay", prefix=prefix)
        async with Relay(SQLiteStore(store, create=False), streams, lease=float(lease)) as relay:
            running = asyncio.create_task(relay.run())
            print(relay._owner, flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            relay.stop()
            await running
    print(relay.stats.fenced, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
