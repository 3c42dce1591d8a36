"""What the model and the simulation say, beside what was measured; and a real run: consumer processes over shards, with keys of which some are hot.

    python -m benchmarks.scale.trial

Starts a Redis of its own and four consumers. The messages come at the moments and with the keys that the simulation has. Their
listeners wait, so that a busy machine matters little. What is found goes to ``points.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.scale.model import Load, SetUp, find_costs
from benchmarks.scale.points import find_point, write_points
from benchmarks.scale.simulate import find_percentiles, make_arrivals, simulate
from benchmarks.scale.stream import COSTS, JOINED, Joined, make_message
from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisStreams
from tools.redis_server import RedisServer

LOAD: Final = Load(rate=40, size=100, groups=1, listener=0.1, keys=200, skew=1.0)
SETUP: Final = SetUp(shards=16, nodes=1, consumers=4)
SEED: Final = 1
READY: Final = "ready"


async def consume(url: str, wait: float, shards: int, consumers: int) -> None:
    """Be one of the consumers: say so when it has its part of the shards; after SIGTERM print the begin and end of each listener."""
    ends: list[tuple[int, float, float]] = []
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(JOINED)
    async def note(event: Joined) -> None:
        began = time.time()
        await asyncio.sleep(wait)
        ends.append((event.user_id, began, time.time()))

    async with Redis.from_url(url) as client:
        group = RedisStreams(client, app="billing").group("billing", start="oldest", shards=shards)
        async with Consumer(dispatcher, group, events=[JOINED], concurrency=100) as consumer:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
            running = asyncio.create_task(consumer.run())
            while len(consumer.health().leads or ()) != shards // consumers:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.05)
            print(READY, flush=True)
            await running
    print(json.dumps(ends))


async def publish(client: Redis, messages: int) -> dict[int, float]:
    """Publish each message at its moment. Return when each was due."""
    due: dict[int, float] = {}
    begins = time.time()
    async with RedisStreams(client, app="web", shards=SETUP.shards) as streams, asyncio.TaskGroup() as tasks:
        for number, (at, key) in enumerate(make_arrivals(LOAD, messages, SEED)):
            await asyncio.sleep(max(0.0, begins + at - time.time()))
            due[number] = time.time()
            tasks.create_task(streams.publish(make_message(number, LOAD.size, key)))
    return due


async def until_handled(client: Redis) -> None:
    """Wait until the group has acknowledged all messages."""
    async with asyncio.timeout(60):
        for shard in range(SETUP.shards):
            while True:
                [info] = await client.xinfo_groups(f"silbo:{{events.{shard}}}")
                if not info["pending"] and info["lag"] == 0:
                    break
                await asyncio.sleep(0.05)


async def run(messages: int) -> dict[str, Any]:
    """Run it, and return what was measured."""
    with RedisServer() as server:
        async with Redis.from_url(server.url) as client:
            async with RedisStreams(client, app="web", shards=SETUP.shards) as streams:
                await streams.publish(make_message(messages, LOAD.size))  # fixes the number of shards
            command = [sys.executable, "-m", "benchmarks.scale.trial", "--consume", server.url]
            processes = [
                await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
                for _ in range(SETUP.consumers)
            ]
            try:
                async with asyncio.timeout(60):
                    for process in processes:
                        assert process.stdout is not None
                        line = await process.stdout.readline()
                        assert line.decode().strip() == READY, line
                due = await publish(client, messages)
                await until_handled(client)
                lengths = [await client.xlen(f"silbo:{{events.{shard}}}") for shard in range(SETUP.shards)]
            finally:
                for process in processes:
                    with suppress(ProcessLookupError):
                        process.terminate()
                answers = [await process.communicate() for process in processes]
    heard = {number: (began, ended) for out, _ in answers for number, began, ended in json.loads(out)}
    del heard[messages]
    assert len(heard) == messages, f"{len(heard)} of {messages} were handled"
    p50, p99 = find_percentiles([1000 * (heard[number][1] - at) for number, at in due.items()])
    return {
        "messages": messages,
        "listener": round(statistics.mean(ended - began for began, ended in heard.values()), 5),
        "p50": round(p50, 1),
        "p99": round(p99, 1),
        "hottest shard": round(max(lengths) / messages, 3),
    }


CHECKS: Final = {
    "4000 bytes": (
        Load(rate=1, size=4000, together=100, listener=0),
        SetUp(),
        ("publisher", "add", "consumer", "read"),
    ),
    "10 together": (Load(rate=1, size=100, together=10, listener=0), SetUp(), ("publisher", "add")),
    "16 shards": (Load(rate=1, size=100, together=100, listener=0), SetUp(16), ("publisher", "add")),
    "all of it": (Load(rate=1, inbox=True), SetUp(16), ("publisher", "add", "consumer", "read")),
}
"""Measured costs that the model does not read, and the loads that they are of."""


def list_checks() -> Iterator[tuple[str, float, float]]:
    """Return each thing that the model or the simulation says, beside what was measured."""
    for case, (load, setup, costs) in CHECKS.items():
        for what in costs:
            yield f"{case}: {COSTS[what]}, us", getattr(find_costs(load, setup), what), find_point("stream", case)[what]
    measured = find_point("trial", "run")
    load = replace(LOAD, listener=measured["listener"])  # as long as its timer really took
    result = simulate(load, SETUP, messages=measured["messages"], seed=SEED)
    yield "simulated: p50, ms", result.p50, measured["p50"]
    yield "simulated: p99, ms", result.p99, measured["p99"]
    yield "simulated: the hottest shard has, %", 100 * result.shard, 100 * measured["hottest shard"]


def table() -> Iterator[str]:
    """Return the lines of the page's table, in Markdown."""
    yield "| | predicted | measured | deviation |"
    yield "|---|---|---|---|"
    for what, predicted, measured in list_checks():
        deviation = f"{measured / predicted - 1:+.0%}".replace("-0%", "+0%")
        yield f"| {what} | {predicted:.3g} | {measured:.3g} | {deviation} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.trial", description=__doc__)
    parser.add_argument("--messages", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3, help="the one on the quietest machine counts")
    parser.add_argument("--table", action="store_true", help="run nothing: print what was predicted and measured")
    parser.add_argument("--consume", metavar="URL", help="be one of the consumers")
    options = parser.parse_args(arguments)
    if options.table:
        print("\n".join(table()))
        return
    if options.consume:
        asyncio.run(consume(options.consume, LOAD.listener, SETUP.shards, SETUP.consumers))
        return
    rounds = [asyncio.run(run(options.messages)) for _ in range(options.rounds)]
    measured = min(rounds, key=lambda each: each["listener"])  # a timer is late where the machine is busy
    write_points("trial", {"load": asdict(LOAD), "setup": asdict(SETUP), "seed": SEED, "run": measured})
    print("\n".join(table()))


if __name__ == "__main__":
    main()
