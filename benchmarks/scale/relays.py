"""An outbox in PostgreSQL with several relays: how fast they drain it, and how long a message takes from its commit to the stream.

    python -m benchmarks.scale.relays

Starts a PostgreSQL and a Redis of its own, and relays in processes of their own (`silbo relay`). The drain is compared in interleaved
rounds; what counts are the ratios, and the processor time that the relays, PostgreSQL and Redis took for a message. The medians
go to ``points.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.outbox import message
from benchmarks.scale.points import find_point, write_points
from benchmarks.scale.processor import cpu_of
from silbo.outbox.rows import Packed, Quota, pack
from silbo.stores.sqlalchemy import SQLAlchemyStore
from tools.postgres import PostgresServer
from tools.redis_server import RedisServer

PARTITIONS: Final = 8
TOGETHER: Final = 100
"""Messages in one commit, as by so many requests at once."""
KEYS: Final = 1000
RELAYS: Final = (1, 2, 4)
RATES: Final = (2, 20, 200)
"""Commits a second, for the latency."""
QUOTA: Final = Quota(rows=10_000_000, size=1 << 40)
PREFIX: Final = "silbo-scale"
STREAM: Final = f"{PREFIX}:{{events}}"
ROOT: Final = Path(__file__).resolve().parents[2]


def a_message(number: int) -> Packed:
    """A message of 430 bytes, with one of a thousand keys."""
    made = message(number)
    headers = {**made.headers, "app": "scale", "instance": "a", "key": str(number % KEYS)}
    return pack(replace(made, headers=headers), PARTITIONS)


class Scene:
    """A database, a Redis, and the store that the relays share."""

    def __init__(self, postgres: PostgresServer, redis: RedisServer, client: Redis, store: SQLAlchemyStore) -> None:
        self.postgres, self.redis, self.client, self.store = postgres, redis, client, store

    @asynccontextmanager
    async def relays(self, number: int, *options: str) -> AsyncGenerator[list[int]]:
        """Start so many relays, and wait until they have divided the partitions. Yields their pids."""
        command = [sys.executable, "-m", "silbo", "relay", "--store", self.postgres.url, "--redis", self.redis.url]
        command += options
        processes = [
            await asyncio.create_subprocess_exec(
                *command, "--prefix", PREFIX, cwd=ROOT, stderr=asyncio.subprocess.DEVNULL
            )
            for _ in range(number)
        ]
        try:
            async with asyncio.timeout(60):
                while True:
                    leads = (await self.store.status()).leads.values()
                    counts = Counter(lead.owner for lead in leads)
                    if len(leads) == PARTITIONS and len(counts) == number and set(counts.values()) == {8 // number}:
                        break
                    await asyncio.sleep(0.05)
            yield [process.pid for process in processes]
        finally:
            for process in processes:
                process.terminate()
                await process.wait()

    async def drain(self, relays: int, messages: int) -> tuple[float, dict[str, float]]:
        """Commit messages while no relay runs, then let so many send them. Return the rate, and processor time by program."""
        await self.client.delete(STREAM)
        mine, of_postgres = process_time(), cpu_of([self.postgres.pid])
        for start in range(0, messages, TOGETHER):
            await self.store.add([a_message(number) for number in range(start, start + TOGETHER)], QUOTA)
        stored = {"publisher": process_time() - mine, "postgres, to add": cpu_of([self.postgres.pid]) - of_postgres}
        async with AsyncExitStack() as stack:
            # The relays divide the partitions while they drain: what is measured is the second half of the backlog.
            pids = await stack.enter_async_context(self.relays(relays))
            parts = {"relays": pids, "postgres": [self.postgres.pid], "redis": [self.redis.pid]}
            begun_with = await self.client.xlen(STREAM)
            before = {name: cpu_of(its) for name, its in parts.items()}
            began = perf_counter()
            await self._until_sent(messages)
            seconds = perf_counter() - began
            used = {name: cpu_of(its) - before[name] for name, its in parts.items()}
            done = messages - begun_with
        of_postgres = cpu_of([self.postgres.pid])
        while await self.store.forget(keep_sent=0.0):
            pass
        stored["postgres, to delete"] = cpu_of([self.postgres.pid]) - of_postgres
        added = {name: 1e6 * taken / messages for name, taken in stored.items()}
        return done / seconds, added | {name: 1e6 * taken / done for name, taken in used.items()}

    async def _until_sent(self, messages: int) -> None:
        async with asyncio.timeout(300):
            while await self.client.xlen(STREAM) < messages:  # noqa: ASYNC110  # Redis tells nobody
                await asyncio.sleep(0.01)

    async def latencies(self, store: SQLAlchemyStore, rate: float, seconds: float) -> list[float]:
        """Commit messages to a store at random moments. Return the milliseconds from each commit to its entry in the stream."""
        await self.client.delete(STREAM)
        committed: list[float] = []
        dice = random.Random(1)
        until = perf_counter() + seconds
        while perf_counter() < until:
            await asyncio.sleep(dice.expovariate(rate))
            await store.add([a_message(len(committed))], QUOTA)
            committed.append(1000 * time.time())
        await self._until_sent(len(committed))
        entries: Any = await self.client.xrange(STREAM)
        added = sorted(float(place.partition(b"-")[0]) for place, _ in entries)
        return [max(0.0, at - moment) for at, moment in zip(added, committed, strict=True)]


def describe(values: Sequence[float]) -> str:
    """Return the median and the 99th percentile of some milliseconds."""
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered):.0f} ms, p99 {ordered[int(0.99 * (len(ordered) - 1))]:.0f} ms"


async def run(rounds: int, messages: int, seconds: float) -> None:
    """Measure the latencies for so many seconds each, then the drains."""
    with PostgresServer() as postgres, RedisServer() as redis:
        engine = create_async_engine(postgres.url)
        store = SQLAlchemyStore(engine)
        await store.create()
        await store.open(PARTITIONS)
        async with Redis.from_url(redis.url) as client:
            scene = Scene(postgres, redis, client, store)
            for notify in (False, True) if seconds else ():
                other = SQLAlchemyStore(engine, notify=notify)
                await other.open()
                async with scene.relays(1, *(["--notify"] if notify else [])):
                    for rate in RATES:
                        taken = describe(await scene.latencies(other, rate, seconds))
                        print(f"{rate} commits a second{', NOTIFY' if notify else ''}: {taken}", flush=True)
                await other.aclose()
            figures: dict[int, list[float]] = {relays: [] for relays in RELAYS}
            costs: dict[int, list[dict[str, float]]] = {relays: [] for relays in RELAYS}
            for round_ in range(rounds):
                for relays in random.Random(round_).sample(RELAYS, len(RELAYS)):
                    drained, used = await scene.drain(relays, messages)
                    figures[relays].append(drained)
                    costs[relays].append(used)
            points: dict[str, dict[str, float]] = {}
            for relays in RELAYS:
                ratio = statistics.median(
                    mine / one for mine, one in zip(figures[relays], figures[RELAYS[0]], strict=True)
                )
                names = costs[relays][0]
                medians = {name: round(statistics.median(each[name] for each in costs[relays]), 2) for name in names}
                points[f"{relays} relays"] = medians
                cost = ", ".join(f"{name} {taken:.0f} us" for name, taken in medians.items())
                print(
                    f"{relays} relays: {statistics.median(figures[relays]):,.0f} messages a second, {ratio:.2f} of one; {cost} each",
                    flush=True,
                )
            write_points("relays", points)
        await store.aclose()
        await engine.dispose()


PROGRAMS: Final = {
    "publisher": "publisher, a hundred messages in a commit",
    "postgres, to add": "PostgreSQL, to add it",
    "relays": "relay",
    "postgres": "PostgreSQL, to take and to settle it",
    "redis": "Redis",
    "postgres, to delete": "PostgreSQL, to delete it later",
}
"""The measured costs, in a reader's words."""


def table() -> Iterator[str]:
    """Return the lines of the page's table of measured points, in Markdown."""
    yield f"| processor time of a message | {' | '.join(f'{relays} relays' for relays in RELAYS)} |".replace(
        "1 relays", "1 relay"
    )
    yield f"|---|{'---|' * len(RELAYS)}"
    for name, words in PROGRAMS.items():
        costs = (find_point("relays", f"{relays} relays")[name] for relays in RELAYS)
        yield f"| {words} | {' | '.join(f'{cost:.0f} us' for cost in costs)} |"


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.relays", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=60_000, help="in each drain")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the latencies; 0 leaves them out")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the points that were measured")
    options = parser.parse_args()
    if options.table:
        print("\n".join(table()))
        return
    asyncio.run(run(options.rounds, options.messages, options.seconds))


if __name__ == "__main__":
    main()
