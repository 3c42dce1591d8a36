"""An outbox: silbo's, and the smallest that one would write by hand.

By hand, a message is an INSERT and a COMMIT in a thread, with the same settings (`journal_mode=PERSIST`, `synchronous=FULL`);
and stored messages go to Redis by redis-py's pipelines of 500 XADDs, which is the most that one connection of redis-py can do.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from uuid import uuid4

from redis.asyncio import Redis

from benchmarks.redis_publish import INSTANCE
from silbo import Message, Outbox, Quota
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore

PREFIX = "silbo-benchmark"
STREAM = f"{PREFIX}:{{events}}"
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
