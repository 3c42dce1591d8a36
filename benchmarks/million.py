"""A million events a minute: from `adispatch` through an outbox and Redis to a listener in another process.

    python -m benchmarks.million [--seconds 600] [--rate EVENTS_A_SECOND] [--json FILE]

Two processes of silbo's and Redis:

* the producer dispatches to `Bridge(Outbox(SQLiteStore(...), RedisStreams(...)))`; SQLite flushes each commit
  (`synchronous=FULL`), and the relay runs in the same process;
* Redis keeps an append-only file, `appendfsync everysec`;
* the consumer reads as a group, with a `RedisInbox`, and notes for each event how long the way took.

First the highest rate is looked for at which the consumer keeps up; then events are dispatched at 90 % of it for the rest of
the time. At the end everything is drained, and each event is counted: none may be lost, none may come twice. The process whose
share of a core is highest is the next limit; where all have time left, it is the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from array import array
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, monotonic_ns, process_time
from typing import Any

from redis.asyncio import Redis
from rich.console import Console

from benchmarks.run import describe_setting
from silbo import AsyncEventDispatcher, Bridge, Consumer, EventName, NotificationEvent, Outbox, Quota
from silbo.brokers.redis import RedisInbox, RedisStreams
from silbo.stores.sqlite import SQLiteStore
from tools.redis_server import RedisServer

PREFIX = "silbo-million"
GROUP = "readers"
TICK = 0.005
"""The producer dispatches every 5 milliseconds what is due."""
IN_FLIGHT = 5_000
"""Dispatches that wait for their commit at most: with more, the producer is behind its rate."""
KEEP = 60.0
"""Seconds that sent rows, entries and publications are kept: as long as a redelivery may take."""
STAGE = 8.0
"""Seconds for which a rate is tried."""
FIRST_RATE = 2_000
GOAL = 1_000_000 / 60
LATEST = 0.05
"""The goal for the 99th percentile, in seconds."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)


@dataclass
class Happened(NotificationEvent):
    """An event with its number, and the nanoseconds of the monotonic clock when it was dispatched."""

    number: int
    sent_at: int


HAPPENED = EventName("million.happened", Happened)


def say(**line: object) -> None:
    """Print one line for the parent."""
    print(json.dumps(line), flush=True)


# -- the producer ---------------------------------------------------------------------------------------------


async def produce(url: str, folder: str) -> None:
    """Dispatch at the rate of the last line of the standard input; end with it, when all is sent."""
    rates: asyncio.Queue[float | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def read_rates() -> None:
        async for line in reader:
            rates.put_nowait(float(line))
        rates.put_nowait(None)

    reading = asyncio.ensure_future(read_rates())
    dispatcher, number, failed = AsyncEventDispatcher(), 0, 0
    in_flight: set[asyncio.Task[Any]] = set()

    def note(task: asyncio.Task[Any]) -> None:
        nonlocal failed
        in_flight.discard(task)
        if task.exception() is not None:
            failed += 1

    async with Redis.from_url(url) as client:
        broker = RedisStreams(client, app="producer", prefix=PREFIX, retain=KEEP)
        quota = Quota(rows=10_000_000, size=1 << 40)
        store = SQLiteStore(Path(folder, "outbox.db"))
        async with Outbox(store, broker, quota=quota, keep_sent=KEEP, drain=120.0) as outbox:
            dispatcher.add_subscriber(Bridge(outbox))
            rate: float | None = 0.0
            begun, base, said_at = monotonic(), 0, monotonic()
            say(ready=True)
            while rate is not None:
                while not rates.empty():
                    rate = rates.get_nowait()
                    begun, base = monotonic(), number
                if rate is None:
                    break
                due = base + int((monotonic() - begun) * rate) - number
                for _ in range(min(due, IN_FLIGHT - len(in_flight))):
                    event = Happened(number, monotonic_ns())
                    task = asyncio.ensure_future(dispatcher.adispatch(HAPPENED, event))
                    in_flight.add(task)
                    task.add_done_callback(note)
                    number += 1
                if monotonic() - said_at > 0.5:
                    said_at = monotonic()
                    say(dispatched=number, failed=failed, behind=max(0, due), cpu=process_time())
                await asyncio.sleep(TICK)
            if in_flight:
                await asyncio.wait(in_flight)
        await broker.aclose()
    reading.cancel()
    say(dispatched=number, failed=failed, behind=0, cpu=process_time(), done=True)


# -- the consumer ---------------------------------------------------------------------------------------------


class Latencies:
    """Counts of latencies in buckets that grow by 2 %, from a microsecond on."""

    GROWTH = 1.02

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * 1200))

    def note(self, seconds: float) -> None:
        """Count one."""
        from math import log

        bucket = int(log(max(seconds, 1e-6) * 1e6, self.GROWTH))
        self.counts[min(bucket, len(self.counts) - 1)] += 1

    def percentile(self, part: float) -> float:
        """Return the latency that so many of all are below, in seconds."""
        wanted, seen = part * sum(self.counts), 0
        for bucket, many in enumerate(self.counts):
            seen += many
            if many and seen >= wanted:
                return self.GROWTH ** (bucket + 1) / 1e6
        return 0.0

    def figures(self) -> dict[str, float]:
        """The percentiles, by name."""
        return {"p50": self.percentile(0.5), "p99": self.percentile(0.99), "p99.9": self.percentile(0.999)}


async def consume(url: str) -> None:
    """Consume, and tell of it twice a second, until the standard input ends; a line begins the latencies anew."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    seen, handled, doubled, latencies = bytearray(1 << 20), 0, 0, Latencies()
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(HAPPENED)
    async def listener(event: Happened) -> None:
        nonlocal handled, doubled
        number = event.number
        if number >= len(seen):
            seen.extend(bytes(len(seen)))
        if seen[number]:
            doubled += 1
        else:
            seen[number] = 1
            handled += 1
        latencies.note((monotonic_ns() - event.sent_at) / 1e9)

    async def tell() -> None:
        while True:
            say(handled=handled, doubled=doubled, cpu=process_time(), **latencies.figures())
            await asyncio.sleep(0.5)

    async def listen_to_parent() -> None:
        nonlocal latencies
        async for _ in reader:
            latencies = Latencies()
        consumer.stop()

    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(Redis.from_url(url))
        streams = await stack.enter_async_context(RedisStreams(client, app="consumer", prefix=PREFIX))
        inbox = await stack.enter_async_context(RedisInbox(client, prefix=PREFIX, keep=KEEP, limit=10_000_000))
        group = streams.group(GROUP, start="oldest")
        consumer = await stack.enter_async_context(Consumer(dispatcher, group, events=[HAPPENED], inbox=inbox))
        tasks = [asyncio.ensure_future(tell()), asyncio.ensure_future(listen_to_parent())]
        say(ready=True)
        await consumer.run()
        for task in tasks:
            task.cancel()
    say(handled=handled, doubled=doubled, cpu=process_time(), **latencies.figures(), done=True)


# -- the parent -----------------------------------------------------------------------------------------------


class Part:
    """One of the two programs: its last line, and a way to say something to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.last: dict[str, Any] = {}
        self._reading = asyncio.ensure_future(self._read())

    @classmethod
    async def start(cls, *words: str) -> Part:
        """Start `python -m benchmarks.million` with these words."""
        pipe = asyncio.subprocess.PIPE
        root = Path(__file__).parents[1]
        command = [sys.executable, "-m", "benchmarks.million", *words]
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=root))

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.last |= json.loads(line)

    async def wait_for(self, word: str, seconds: float) -> None:
        """Wait until the program has said so."""
        async with asyncio.timeout(seconds):
            while word not in self.last:
                if self.process.returncode is not None:
                    raise RuntimeError(f"a program ended early, with {self.process.returncode}")
                await asyncio.sleep(0.05)

    def tell(self, line: str) -> None:
        """Write a line to it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def end(self) -> None:
        """End its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        self._reading.cancel()


@dataclass
class Stage:
    """A rate that was tried.

    Attributes:
        waiting: Events on the way at its end.
    """

    rate: float
    dispatched: float
    handled: float
    waiting: int
    p50: float
    p99: float
    producer: float
    consumer: float
    redis: float

    @property
    def is_steady(self) -> bool:
        """True if the rate was held, and what is on the way is less than half a second of it."""
        return self.handled > 0.97 * self.rate and self.waiting < 0.5 * self.rate

    def show(self, seconds: float) -> None:
        """Print it."""
        verdict = "[green]steady[/]" if self.is_steady else "[red]too much[/]"
        console.print(
            f"{self.rate:>8,.0f}/s for {seconds:>4.0f} s: handled {self.handled:>8,.0f}/s, {self.waiting:>8,} on the way, p50 "
            f"{self.p50 * 1e3:,.1f} ms, p99 {self.p99 * 1e3:,.1f} ms; of a core: producer {self.producer:.0%}, Redis "
            f"{self.redis:.0%}, consumer {self.consumer:.0%}  {verdict}"
        )


async def run_stage(producer: Part, consumer: Part, client: Redis, rate: float, seconds: float) -> Stage:
    """Try a rate."""
    producer.tell(str(rate))
    await asyncio.sleep(min(2.0, seconds / 4))  # until it runs evenly
    consumer.tell("anew")
    await asyncio.sleep(0.6)
    before, started = await read_state(producer, consumer, client), monotonic()
    await asyncio.sleep(seconds)
    after, taken = await read_state(producer, consumer, client), monotonic() - started
    each = {key: (after[key] - before[key]) / taken for key in before}
    return Stage(
        rate=rate,
        dispatched=each["dispatched"],
        handled=each["handled"],
        waiting=max(0, int(after["dispatched"] - after["handled"])) + producer.last["behind"],
        p50=consumer.last["p50"],
        p99=consumer.last["p99"],
        producer=each["producer"],
        consumer=each["consumer"],
        redis=each["redis"],
    )


async def read_state(producer: Part, consumer: Part, client: Redis) -> dict[str, float]:
    """Read the counts, and the CPU seconds of the three."""
    info: Any = await client.info("cpu")
    return {
        "dispatched": producer.last["dispatched"],
        "handled": consumer.last["handled"],
        "producer": producer.last["cpu"],
        "consumer": consumer.last["cpu"],
        "redis": float(info["used_cpu_sys"]) + float(info["used_cpu_user"]),
    }


async def wait_until_idle(producer: Part, consumer: Part, seconds: float) -> None:
    """Wait until nothing is on the way."""
    producer.tell("0")
    ends_at = monotonic() + seconds
    while monotonic() < ends_at:
        await asyncio.sleep(0.6)
        if consumer.last["handled"] >= producer.last["dispatched"]:
            return


async def find_rate(producer: Part, consumer: Part, client: Redis, seconds: float) -> float:
    """Return the highest rate at which the consumer keeps up: half as much more, until it does not; then two steps between."""
    rate, highest, lowest_failed = float(FIRST_RATE), 0.0, float("inf")
    while True:
        stage = await run_stage(producer, consumer, client, rate, seconds)
        stage.show(seconds)
        if stage.is_steady:
            highest = rate
        else:
            lowest_failed = rate
            await wait_until_idle(producer, consumer, 60.0)
        if lowest_failed == float("inf"):
            rate *= 1.5
        elif highest == 0.0:
            rate /= 2
            if rate < 100:
                raise RuntimeError("not even a hundred events a second are steady here")
        elif lowest_failed / highest < 1.15:
            return highest
        else:
            rate = (highest + lowest_failed) / 2


async def run(seconds: float, rate: float | None) -> dict[str, Any]:
    """Run the three, and count."""
    with RedisServer(port=True, appendonly="everysec") as server, TemporaryDirectory(prefix="silbo-million-") as folder:
        consumer = await Part.start("consume", server.url)
        producer = await Part.start("produce", server.url, folder)
        try:
            async with Redis.from_url(server.url) as client:
                for part, word in ((producer, "dispatched"), (consumer, "handled")):
                    await part.wait_for(word, 30.0)
                began = monotonic()
                if rate is None:
                    rate = 0.9 * await find_rate(producer, consumer, client, min(STAGE, seconds / 20))
                left = max(10.0, seconds - (monotonic() - began))
                console.print(f"the steady run, {left:.0f} seconds at {rate:,.0f} a second")
                stage = await run_stage(producer, consumer, client, rate, left)
                stage.show(left)
                percentiles = {key: consumer.last[key] for key in ("p50", "p99", "p99.9")}
                producer.end()
                await producer.wait_for("done", 180.0)
                ends_at = monotonic() + 60.0
                while consumer.last["handled"] < producer.last["dispatched"] and monotonic() < ends_at:  # noqa: ASYNC110
                    await asyncio.sleep(0.2)
                consumer.end()
                await consumer.wait_for("done", 60.0)
        finally:
            await producer.kill()
            await consumer.kill()
    shares = {"producer": stage.producer, "Redis": stage.redis, "consumer": stage.consumer}
    busiest = max(shares, key=lambda name: shares[name])
    is_full = shares[busiest] > 0.85 or sum(shares.values()) > 1.8
    return {
        "setting": describe_setting(),
        "seconds": round(left),
        "rate": round(stage.handled),
        "a minute": round(60 * stage.handled),
        "percentiles": percentiles,
        "dispatched": producer.last["dispatched"],
        "failed": producer.last["failed"],
        "lost": producer.last["dispatched"] - producer.last["failed"] - consumer.last["handled"],
        "doubled": consumer.last["doubled"],
        "shares of a core": {name: round(share, 2) for name, share in shares.items()},
        "next limit": f"the core of the {busiest}" if is_full else "not a core: the disk's flushes, or waiting",
    }


def main() -> int:
    """Run, or be one of the two programs."""
    if sys.argv[1:2] == ["produce"]:
        asyncio.run(produce(*sys.argv[2:]))
        return 0
    if sys.argv[1:2] == ["consume"]:
        asyncio.run(consume(*sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(
        description="How many events a minute go through an outbox and Redis to a listener."
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of the whole run (default: 600)")
    parser.add_argument("--rate", type=float, help="events a second; the highest steady rate is looked for by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    options = parser.parse_args()
    found = asyncio.run(run(options.seconds, options.rate))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    p99 = found["percentiles"]["p99"]
    console.print(
        f"\n{found['a minute']:,} events a minute (goal {GOAL * 60:,.0f}), p99 {p99 * 1e3:,.1f} ms (goal "
        f"{LATEST * 1e3:g}), {found['lost']} lost, {found['doubled']} doubled, of {found['dispatched']:,}; "
        f"next limit: {found['next limit']}"
    )
    return int(bool(found["lost"] or found["doubled"]))


if __name__ == "__main__":
    sys.exit(main())
