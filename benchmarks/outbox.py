"""The outbox and the consumer group, against what one would write by hand.

    python -m benchmarks.outbox [--rounds 8] [--messages 100000] [--folder FOLDER] [publish] [drain] [consume]

One Redis on loopback, one process of ours, an SQLite file in a temporary folder. Three tables:

* publish, by one caller and by 100 at once: silbo's outbox; the smallest outbox that one would write by hand, an INSERT
  and a COMMIT for each message in a thread, with the same settings (`journal_mode=PERSIST`, `synchronous=FULL`); and, for
  what storing costs, `RedisStreams.publish` without an outbox, which stores nothing;
* drain: how fast a relay brings stored messages to Redis, against redis-py's pipelines of 500 XADDs of the same bytes,
  which is the most that one connection of redis-py can do;
* consume: a consumer of a group with one listener, against XREADGROUP, json.loads and XACK for 100 entries at a time.

Without a name all three are printed. What a COMMIT takes is the disk's affair, so put `--folder` where the outbox is to be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import statistics
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from benchmarks.redis_publish import INSTANCE, by_hand
from benchmarks.timing import Contender, Result, compare, machine
from silbo import AsyncEventDispatcher, Consumer, Message, NotificationEvent, Outbox, Quota
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore
from tools.redis_server import open_redis

PREFIX = "silbo-benchmark"
STREAM = f"{PREFIX}:{{events}}"
PUBLISHES = {1: 200, 100: 2000}
"""By the number of callers: how many of each contender in a round."""
CONSUMED = 20_000
TABLES = ("publish", "drain", "consume")
QUOTA = Quota(rows=10_000_000, size=1 << 40)


def message(number: int) -> Message:
    """The message of which `by_hand` makes the text."""
    event_id = str(uuid4())
    when = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    payload = {"event_id": event_id, "event_timestamp": when, "meeting_id": 17, "user_id": number}
    headers = {"publication": f"{INSTANCE}-{number}", "version": "1"}
    return Message("notification_event", "meeting.joined", event_id, payload, headers)


class ByHand:
    """An outbox as one writes it at first: a row and a commit for each message."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=PERSIST")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, raw BLOB NOT NULL)")

    async def publish(self, raw: str) -> None:
        """Returns when it is committed."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._insert, raw)

    def _insert(self, raw: str) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("INSERT INTO message (raw) VALUES (?)", (raw,))
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
        self._connection.close()


def callers(count: int, publish: Any) -> Contender:
    """So many tasks that publish one message after another."""

    async def run(times: int) -> None:
        async def task(share: int) -> None:
            for number in range(share):
                await publish(number)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(task(times // count + (number < times % count)))

    return run


def show(title: str, results: Sequence[Result], against: str) -> None:
    """A table of messages each second, and times the reference's."""
    print(f"\n{title:<28}  {'messages/s':>10}  {f'times {against}':>28}")
    for result in results:
        faster = f"{1 / result.ratio:.2f} ({1 / result.high:.2f}-{1 / result.low:.2f})"
        print(f"{result.name:<28}  {1 / result.each:>10,.0f}  {faster:>28}", flush=True)


async def publish(client: Redis, folder: Path, rounds: int) -> None:
    """The first table: what it takes until a message is stored."""
    async with AsyncExitStack() as stack:
        peer = ByHand(folder / "by-hand.db")
        stack.callback(peer.close)
        streams = await stack.enter_async_context(RedisStreams(client, app="benchmark", prefix=PREFIX))
        storing, sending = [
            await stack.enter_async_context(
                Outbox(
                    SQLiteStore(folder / f"relay-{relay}.db"),
                    RedisStreams(client, app="benchmark", prefix=f"{PREFIX}-{relay}"),
                    relay=relay,
                    quota=QUOTA,
                )
            )
            for relay in (False, True)
        ]
        for count, times in PUBLISHES.items():
            contenders: dict[str, Contender] = {
                "by hand, SQLite": callers(count, lambda number: peer.publish(by_hand(number))),
                "silbo, SQLite": callers(count, lambda number: storing.publish(message(number))),
                "silbo, SQLite, and its relay": callers(count, lambda number: sending.publish(message(number))),
                "RedisStreams, not stored": callers(count, lambda number: streams.publish(message(number))),
            }
            title = f"publish, {count} {'caller' if count == 1 else 'callers'}"
            show(title, await compare(contenders, times=times, rounds=rounds), "by hand")
    await client.delete(STREAM, *[f"{PREFIX}-True:{{events}}{key}" for key in ("", ":outbox")])


async def drain(client: Redis, folder: Path, rounds: int, messages: int) -> None:
    """The second table: what waits in the outbox goes to Redis."""
    seconds: dict[str, list[float]] = {"redis-py, pipelines": [], "silbo's relay": []}
    for number in range(rounds):
        path = folder / f"drain-{number}.db"
        await fill_outbox(client, path, messages)
        seconds["silbo's relay"].append(await run_relay(client, path, messages))
        rows: Any = await client.xrange(STREAM)
        same = [fields[b"message"] for _, fields in rows]
        await client.delete(STREAM, f"{STREAM}:outbox")
        seconds["redis-py, pipelines"].append(await send_in_pipelines(client, same))
        await client.delete(STREAM)
        path.unlink()
    results = []
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["redis-py, pipelines"], strict=True)]
        results.append(
            Result(name, statistics.median(taken) / messages, statistics.median(ratios), min(ratios), max(ratios))
        )
    show(f"drain of {messages:,}", results, "pipelines")


async def fill_outbox(client: Redis, path: Path, messages: int) -> None:
    broker = RedisStreams(client, app="benchmark", prefix=PREFIX)
    async with Outbox(SQLiteStore(path), broker, relay=False, quota=QUOTA) as outbox:
        for start in range(0, messages, 1000):
            await outbox.publish(*map(message, range(start, min(start + 1000, messages))))


async def run_relay(client: Redis, path: Path, messages: int) -> float:
    """Seconds until all is in Redis, and marked as sent."""
    broker = RedisStreams(client, app="benchmark", prefix=PREFIX)
    started = perf_counter()
    async with Outbox(SQLiteStore(path), broker, quota=QUOTA, drain=600.0) as outbox:
        assert outbox.stats is not None
    taken = perf_counter() - started
    assert outbox.stats.sent == messages, outbox.stats
    return taken


async def send_in_pipelines(client: Redis, same: Sequence[bytes]) -> float:
    started = perf_counter()
    for start in range(0, len(same), 500):
        pipeline = client.pipeline(transaction=False)
        for raw in same[start : start + 500]:
            pipeline.execute_command("XADD", STREAM, "*", "message", raw)
        await pipeline.execute()
    return perf_counter() - started


async def consume(client: Redis, rounds: int) -> None:
    """The third table: from the stream to a listener, acknowledged."""
    async with RedisStreams(client, app="benchmark", prefix=PREFIX) as streams:
        await streams.publish(*map(message, range(CONSUMED)))
        contenders: dict[str, Contender] = {
            "redis-py, read and ack": lambda times: _read_and_ack(client, times),
            "silbo's consumer": lambda times: _consumer(streams, client, times),
        }
        show("consume", await compare(contenders, times=CONSUMED, rounds=rounds), "redis-py")
    await client.delete(STREAM)


@asynccontextmanager
async def _group(client: Redis, name: str) -> AsyncGenerator[str]:
    """A group that begins at the beginning."""
    await client.xgroup_create(STREAM, name, "0")
    try:
        yield name
    finally:
        await client.xgroup_destroy(STREAM, name)


async def _read_and_ack(client: Redis, times: int) -> None:
    done = 0
    async with _group(client, "by-hand") as group:
        while done < times:
            reply: Any = await client.xreadgroup(group, "one", {STREAM: ">"}, count=100)
            [[_, entries]] = reply.items() if isinstance(reply, dict) else reply
            for _, fields in entries:
                json.loads(fields[b"message"])
            await client.xack(STREAM, group, *[entry_id for entry_id, _ in entries])
            done += len(entries)


async def _consumer(streams: RedisStreams, client: Redis, times: int) -> None:
    done, dispatcher = 0, AsyncEventDispatcher()

    async def listener(event: NotificationEvent) -> None:
        nonlocal done
        done += 1
        if done == times:
            consumer.stop()

    dispatcher.add_listener("meeting.joined", listener)
    async with _group(client, "silbo") as group:
        async with Consumer(dispatcher, streams.group(group, start="oldest"), own="handle") as consumer:
            await consumer.run()
        assert done >= times
        if times == CONSUMED:
            pending: Any = await client.xpending(STREAM, group)
            assert pending["pending"] == 0, pending


async def main(rounds: int, messages: int, folder: str | None, tables: Sequence[str]) -> None:
    """Print the tables."""
    print(machine(), f"SQLite {sqlite3.sqlite_version}", sep=", ")
    with open_redis(port=True) as server, TemporaryDirectory(prefix="silbo-benchmark-", dir=folder) as temporary:
        async with Redis.from_url(server.url) as client:
            if "publish" in tables:
                await publish(client, Path(temporary), rounds)
            if "drain" in tables:
                await drain(client, Path(temporary), max(3, rounds // 2), messages)
            if "consume" in tables:
                await consume(client, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the outbox and the consumer group against code by hand.")
    parser.add_argument("--rounds", type=int, default=8, help="interleaved rounds (default: 8)")
    parser.add_argument("--messages", type=int, default=100_000, help="stored messages to drain (default: 100000)")
    parser.add_argument("--folder", help="where the files are (default: the system's for temporary ones)")
    parser.add_argument("tables", nargs="*", choices=[[], *TABLES], help="publish, drain, consume (default: all)")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.rounds, arguments.messages, arguments.folder, arguments.tables or TABLES))
