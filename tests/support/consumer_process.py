"""A consumer of the group "billing" in a process of its own. Run by tests/consumer/test_processes.py.

    python -m tests.support.consumer_process URL PREFIX NAME CLAIM_AFTER CONCURRENCY

What it begins and finishes are entries in the Redis list `{prefix}:effects`: "NAME begin N", "NAME done N". A message says
what its listener does: sleep so many seconds, kill the process, fail. Ends in good order on SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import dataclass

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, EventName
from silbo._retry import Backoff
from silbo.brokers.redis import RedisStreams
from tests.support.redis_at import redis_at


@dataclass
class Task(ECSTEvent):
    number: int
    sleep: float = 0.0
    kill: bool = False
    fail: bool = False


TASK = EventName("task", Task, key="number")


async def main(url: str, prefix: str, name: str, claim_after: float, concurrency: int) -> None:
    dispatcher = AsyncEventDispatcher()
    async with redis_at(url) as client, RedisStreams(client, app="billing", prefix=prefix) as streams:

        @dispatcher.listen(TASK)
        async def work(task: Task) -> None:
            await client.rpush(f"{prefix}:effects", f"{name} begin {task.number}")
            if task.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            await asyncio.sleep(task.sleep)
            if task.fail:
                raise ValueError("as told")
            await client.rpush(f"{prefix}:effects", f"{name} done {task.number}")

        group = streams.group("billing", start="oldest", consumer=name, claim_after=claim_after)
        consumer = Consumer(
            dispatcher,
            group,
            events=[TASK],
            concurrency=concurrency,
            max_attempts=3,
            backoff=Backoff(initial=0.01, cap=0.02),
            drain=1.0,
        )
        async with consumer:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
            print("ready", flush=True)
            await consumer.run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], claim_after=float(sys.argv[4]), concurrency=int(sys.argv[5])))
