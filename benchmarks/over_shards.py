"""Scenarios of an address with 16 shards: over 1, 2 and 3 nodes of a Redis Cluster, and with 1 to 4 consumers.

What counts is the processor time of all programs together, silbo's and the servers': it is what more nodes or more consumers cost.
How much faster they are depends on the cores, and this machine may have fewer cores than there are programs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from time import perf_counter, process_time
from typing import Any, Final, TypeAlias

from benchmarks.at_redis import in_tasks
from benchmarks.scenario import Contenders, Scenario
from benchmarks.shard_consumers import ShardConsumers, open_consumers
from benchmarks.shard_servers import KEYS, MEETING_JOINED, MeetingJoined, ShardServers, make_streams
from benchmarks.timing import Contender, Measured
from silbo import AsyncEventDispatcher, Bridge
from tools.redis_cluster import ClusterServers
from tools.redis_server import RedisServer

__all__ = ["SCENARIOS"]

NODES: Final = (1, 2, 3)
CONSUMERS: Final = (1, 2, 3, 4)
TASKS: Final = 1_000
"""Tasks that publish one message after another: some 60 for each shard."""
PUBLISHED: Final = 10_000
BACKLOG: Final = 10_000
SAME: Final = 0.9
"""Three nodes take at most a tenth more processor time than one."""
BY_THE_CLOCK: Final = f"by the clock, {os.cpu_count()} cores"

Open: TypeAlias = Callable[[], AbstractAsyncContextManager[Contenders]]


def name_nodes(nodes: int) -> str:
    """Return the name of a contender."""
    return f"silbo, {nodes} node{'s' if nodes > 1 else ''}"


def name_consumers(consumers: int) -> str:
    """Return the name of a contender."""
    return f"silbo, {consumers} consumer{'s' if consumers > 1 else ''}"


def start(servers: Sequence[RedisServer | ClusterServers], stack: AsyncExitStack) -> list[ShardServers]:
    """Start servers side by side: a cluster takes two seconds."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(stack.enter_context, servers))
    return [stack.enter_context(ShardServers(each).connected()) for each in servers]


def publishing(servers: ShardServers, dispatcher: AsyncEventDispatcher) -> Contender:
    """Many tasks that publish over all shards."""

    async def publish(number: int) -> None:
        await dispatcher.adispatch(MEETING_JOINED, MeetingJoined(next_key()))

    def next_key() -> int:
        nonlocal key
        key = (key + 1) % KEYS
        return key

    key = 0
    run_tasks = in_tasks(TASKS, publish)

    async def run(times: int) -> Measured:
        redis, began_at, cpu = servers.read_cpu(), perf_counter(), process_time()
        await run_tasks(times)
        cpu, clock = process_time() - cpu, perf_counter() - began_at
        redis = servers.read_cpu() - redis
        servers.empty()
        return Measured(
            (cpu + redis) / times, {"of silbo": cpu / times, "of Redis": redis / times, BY_THE_CLOCK: clock / times}
        )

    return run


def draining(consumers: ShardConsumers) -> Contender:
    """Consumers that handle a backlog; it is the whole one, whatever the repetitions."""

    async def run(times: int) -> Measured:
        drain = await consumers.drain()
        further = {"of silbo": drain.consumers, "of Redis": drain.redis, BY_THE_CLOCK: drain.clock}
        return Measured(drain.consumers + drain.redis, further)

    return run


@asynccontextmanager
async def open_publish() -> AsyncGenerator[Contenders]:
    """One publisher at clusters of 1, 2 and 3 nodes."""
    async with AsyncExitStack() as stack:
        found: dict[str, Contender] = {}
        clusters = start([ClusterServers(masters=nodes) for nodes in NODES], stack)
        for nodes, servers in zip(NODES, clusters, strict=True):
            client = await stack.enter_async_context(servers.client())
            streams = await stack.enter_async_context(make_streams(client))
            dispatcher = AsyncEventDispatcher()
            dispatcher.add_subscriber(Bridge(streams))
            found[name_nodes(nodes)] = publishing(servers, dispatcher)
        yield found


@asynccontextmanager
async def open_consume() -> AsyncGenerator[Contenders]:
    """One consumer at clusters of 1, 2 and 3 nodes."""
    async with AsyncExitStack() as stack:
        clusters = start([ClusterServers(masters=nodes) for nodes in NODES], stack)
        groups = [await stack.enter_async_context(open_consumers(servers, BACKLOG, 1)) for servers in clusters]
        await asyncio.gather(*(group.settle() for group in groups))
        yield {name_nodes(nodes): draining(group) for nodes, group in zip(NODES, groups, strict=True)}


@asynccontextmanager
async def open_consumers_of_one() -> AsyncGenerator[Contenders]:
    """1 to 4 consumers, each number at a Redis of its own."""
    async with AsyncExitStack() as stack:
        found = start([RedisServer(port=True) for _ in CONSUMERS], stack)
        groups = [
            await stack.enter_async_context(open_consumers(servers, BACKLOG, number))
            for number, servers in zip(CONSUMERS, found, strict=True)
        ]
        await asyncio.gather(*(group.settle() for group in groups))
        yield {name_consumers(number): draining(group) for number, group in zip(CONSUMERS, groups, strict=True)}


def over_shards_row(name: str, opened: Open, contenders: Sequence[str], **options: Any) -> Scenario:
    """Return a row of processor time, whose first contender is compared with the last."""
    return Scenario(
        name=name,
        group="shards",
        open=opened,
        reference=contenders[0],
        subject=contenders[-1],
        unit="messages",
        measures="cpu seconds",
        more_is_better=True,
        notes={
            "of silbo, of Redis": "messages for each second of processor time of all processes of silbo's, of all servers",
            BY_THE_CLOCK: "messages a second; the cores are the limit of what runs side by side",
        },
        **options,
    )


SCENARIOS = [
    over_shards_row(
        "publish over 1, 2, 3 cluster nodes",
        open_publish,
        [name_nodes(nodes) for nodes in NODES],
        targets={name_nodes(1): SAME},
        times=PUBLISHED,
        rounds=11,
        in_quick=True,
    ),
    over_shards_row(
        "consume over 1, 2, 3 cluster nodes",
        open_consume,
        [name_nodes(nodes) for nodes in NODES],
        targets={name_nodes(1): SAME},
        times=BACKLOG,
        rounds=9,
    ),
    over_shards_row(
        "1 to 4 consumers over shards",
        open_consumers_of_one,
        [name_consumers(number) for number in CONSUMERS],
        times=BACKLOG,
        rounds=9,
    ),
]
