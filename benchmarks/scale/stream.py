"""One publisher, one consumer, on one stream and on others: the processor time that a message takes in each program.

    python -m benchmarks.scale.stream

Starts a Redis of its own, then a Redis Cluster. Measured are three sizes of message; publishes one at a time; a listener that waits; an
inbox; 16 shards; and the shards on one and on three nodes of a cluster. Processor time carries over to a busy machine, and to
another number of cores; seconds do not. The medians go to ``points.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster

from benchmarks.outbox import message
from benchmarks.scale.points import find_point, write_points
from benchmarks.scale.processor import cpu_of
from silbo import AsyncEventDispatcher, Consumer, EventName, Message, NotificationEvent
from silbo.brokers.redis import RedisInbox, RedisStreams
from tools.redis_cluster import ClusterServers
from tools.redis_server import RedisServer

SIZES: Final = (100, 1000, 10_000)
"""Bytes of text that an event has, beside its two numbers."""
KEYS: Final = 1000
COSTS: Final = {
    "publisher": "publisher",
    "add": "Redis, to add",
    "consumer": "consumer",
    "read": "Redis, for each group",
}
"""The measured costs, in a reader's words."""


@dataclass
class Joined(NotificationEvent):
    """The event of the benchmarks, with a text."""

    meeting_id: int
    user_id: int
    text: str = ""


JOINED = EventName("meeting.joined", Joined, key="user_id")


@dataclass(frozen=True)
class Case:
    """One way to use a stream.

    Attributes:
        size: Bytes of text in each event.
        messages: How many.
        together: Messages that are published at once, as by so many requests.
        live: True if the consumer runs while messages are published, each after the one before was handled.
        wait: Seconds that the listener waits; 0 if it does nothing.
        nodes: The masters of a cluster; 0 for one Redis.
    """

    size: int = 100
    messages: int = 30_000
    together: int = 100
    live: bool = False
    wait: float = 0.0
    inbox: bool = False
    shards: int = 0
    nodes: int = 0


CASES: Final[Mapping[str, Case]] = {
    **{f"{size} bytes": Case(size=size, messages=8_000 if size > 1000 else 30_000) for size in SIZES},
    "4000 bytes": Case(size=4000, messages=15_000),
    "10 together": Case(messages=15_000, together=10),
    "alone": Case(messages=3_000, together=1),
    "trickle": Case(messages=2_000, together=1, live=True),
    "listener that waits": Case(messages=15_000, wait=0.001),
    "inbox": Case(messages=20_000, inbox=True),
    "inbox, listener that waits": Case(messages=15_000, inbox=True, wait=0.001),
    "16 shards, listener that waits": Case(shards=16, messages=15_000, wait=0.001),
    "16 shards": Case(shards=16),
    "16 shards, 10 together": Case(shards=16, messages=15_000, together=10),
    "all of it": Case(
        size=1000, messages=10_000, together=10, shards=16, inbox=True, wait=0.001
    ),  # checks that the model may add up
    "16 shards, 1 node": Case(shards=16, nodes=1),
    "16 shards, 3 nodes": Case(shards=16, nodes=3),
}


def make_message(number: int, size: int, key: int | None = None) -> Message:
    """Return a message with a text of so many bytes; its key is one of a thousand if none is given."""
    made = message(number)
    headers = {**made.headers, "key": str(number % KEYS if key is None else key)}
    return replace(made, payload={**made.payload, "text": "x" * size}, headers=headers)


@dataclass
class Used:
    """Processor time of this process and of Redis, since the last look."""

    servers: Collection[int]
    _before: tuple[float, float] = field(default=(0.0, 0.0))

    def take(self, messages: int) -> tuple[float, float]:
        """Return the microseconds of processor time for each message: of this process, and of Redis."""
        now = process_time(), cpu_of(self.servers)
        mine, of_redis = (1e6 * (after - before) / messages for after, before in zip(now, self._before, strict=True))
        self._before = now
        return mine, of_redis


async def read_memory(client: Any, nodes: int) -> int:
    """Return the bytes that Redis has in use, over all nodes."""
    if not nodes:
        return int((await client.info("memory"))["used_memory"])
    infos = await client.info("memory", target_nodes=RedisCluster.PRIMARIES)
    return sum(int(info["used_memory"]) for info in (infos.values() if nodes > 1 else [infos]))


async def measure(case: Case, client: Any, servers: Collection[int]) -> dict[str, float]:
    """Publish messages, then let a consumer handle them. Return microseconds of processor time, and bytes, for each."""
    heard = 0
    published_at = 0.0
    latencies: list[float] = []
    was_heard = asyncio.Event()
    dispatcher = AsyncEventDispatcher()

    async def count(event: Joined) -> None:
        nonlocal heard
        if case.wait:
            await asyncio.sleep(case.wait)
        heard += 1
        if case.live:
            latencies.append(perf_counter() - published_at)
            was_heard.set()
        if heard == case.messages:
            consumer.stop()

    dispatcher.add_listener(JOINED, count)
    async with AsyncExitStack() as stack:
        used = Used(servers)
        await client.flushall()
        made = [make_message(number, case.size) for number in range(case.messages)]
        streams = (
            RedisStreams(client, app="web", shards=case.shards) if case.shards else RedisStreams(client, app="web")
        )
        await stack.enter_async_context(streams)
        group = RedisStreams(client, app="billing").group("billing", start="oldest", shards=case.shards)
        inbox = await stack.enter_async_context(RedisInbox(client)) if case.inbox else None
        consumer = Consumer(dispatcher, group, events=[JOINED], inbox=inbox, concurrency=100 if case.wait else 1)
        if case.live:
            async with consumer:
                running = asyncio.create_task(consumer.run())
                used.take(1)
                for each in made:
                    was_heard.clear()
                    published_at = perf_counter()
                    await streams.publish(each)
                    await was_heard.wait()
                mine, of_redis = used.take(case.messages)
                await running
            return {"all": mine, "redis": of_redis, "latency": 1e3 * statistics.median(latencies)}
        empty = await read_memory(client, case.nodes)
        used.take(1)
        for start in range(0, case.messages, case.together):
            await asyncio.gather(*map(streams.publish, made[start : start + case.together]))
        publisher, add = used.take(case.messages)
        filled = await read_memory(client, case.nodes)
        used.take(1)
        async with consumer:
            await consumer.run()
        consumed, read = used.take(case.messages)
        after = await read_memory(client, case.nodes)
    found = {"publisher": publisher, "add": add, "consumer": consumed, "read": read}
    found["memory"] = (filled - empty) / case.messages
    if case.inbox:
        found["inbox memory"] = (after - filled) / case.messages
    return found


def run_case(case: Case) -> dict[str, float]:
    """Measure one case with servers of its own."""

    async def run(make: Callable[[], Any], servers: Collection[int]) -> dict[str, float]:
        async with make() as client:
            return await measure(case, client, servers)

    if case.nodes:
        with ClusterServers(masters=case.nodes) as cluster:
            return asyncio.run(run(cluster.client, [node.pid for node in cluster.nodes]))
    with RedisServer() as server:
        return asyncio.run(run(lambda: Redis.from_url(server.url), [server.pid]))


def find_medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the rounds."""
    return {name: round(statistics.median(each[name] for each in found), 2) for name in found[0]}


def table() -> Iterator[str]:
    """Return the lines of the page's table of measured points, in Markdown."""
    yield f"| | {' | '.join(COSTS.values())} | bytes in Redis |"
    yield "|---|---|---|---|---|---|"
    for name, case in CASES.items():
        if not case.live:
            point = find_point("stream", name)
            costs = (f"{point[what]:.0f} us" for what in COSTS)
            yield f"| {name} | {' | '.join(costs)} | {point['memory']:,.0f} |"


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.stream", description=__doc__)
    parser.add_argument("--table", action="store_true", help="measure nothing: print the points that were measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all by default")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if options.table:
        print("\n".join(table()))
        return
    names = options.cases or list(CASES)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(options.rounds):  # what else the machine does meets all cases
        for name in random.Random(round_).sample(names, len(names)):
            found[name].append(run_case(CASES[name]))
    points = {name: find_medians(each) for name, each in found.items()}
    for name, point in points.items():
        print(f"{name}: " + ", ".join(f"{what} {value:.1f}" for what, value in point.items()), flush=True)
    write_points("stream", points)


if __name__ == "__main__":
    main()
