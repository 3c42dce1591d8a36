"""A Redis that forgets: flushed, its stream or group deleted, started from an older copy. A replay mends it."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from chaos.check import check_handled, given, unfinished
from chaos.events import APP, STREAM
from chaos.ledger import Reading, read
from chaos.stage import Stage
from silbo import Outbox
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore
from tools.redis_server import RedisServer

RATE = 1_000.0
EACH = 2


async def flush(stage: Stage, *, before: int = 2_000, after: int = 1_000) -> None:
    """See above; events go on coming meanwhile."""
    server, store, began = stage.redis(), str(stage.folder / "outbox.db"), datetime.now(UTC)
    common: dict[str, Any] = {"url": server.url}
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        ledger=str(stage.ledger("producer")),
        lanes=20,
        each=1_000_000,
        rate=RATE,
        store=store,
        relay=True,
        **common,
    )
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            ledger=str(stage.ledger(f"consumer-{number}")),
            **common,
        )
        for number in range(EACH)
    ]
    for worker in consumers:
        await worker.ready()
    reading, ledgers = Reading(stage.ledger("producer")), [stage.ledger(one.name) for one in consumers]
    faults: dict[str, Callable[[RedisServer, Reading], Awaitable[None]]] = {
        "FLUSHALL": _flush_all,
        "stream deleted": _delete_stream,
        "group deleted": _delete_group,
        "older copy": _go_back,
    }
    missing_before = 0
    for name, fault in faults.items():
        start = reading.count()
        await stage.until("events come", lambda to=start + before: reading.count() >= to, 120.0)  # type: ignore[misc]
        for consumer in consumers:  # so that there is something that nobody has handled yet
            consumer.signal(signal.SIGSTOP)
        start = reading.count()
        await stage.until("events wait", lambda to=start + after // 2: reading.count() >= to, 120.0)  # type: ignore[misc]
        await stage.until("some of them wait in the stream", lambda: _wait_in_stream(server), 120.0)
        await fault(server, reading)
        for consumer in consumers:
            consumer.signal(signal.SIGCONT)
        start = reading.count()
        await stage.until("events go on", lambda to=start + after: reading.count() >= to, 120.0)  # type: ignore[misc]
        wanted = given([stage.ledger("producer")])
        missing = len(_missing(wanted, ledgers))
        stage.say(f"{name}: {missing} of {len(wanted)} not handled, now a replay")
        missing_before += missing
        async with Redis.from_url(server.url) as client:
            streams = RedisStreams(client, app=APP)
            async with Outbox(SQLiteStore(store, create=False), streams, relay=False) as outbox:
                stage.note(f"replayed after {name}", await outbox.replay(since=began))
        await stage.until(f"nothing missing after {name}", lambda safe=wanted: not _missing(safe, ledgers), 180.0)  # type: ignore[misc]
    await producer.stop()

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return not await unfinished(client, "readers")

    await stage.settled("all events handled", finished, 180.0)
    for consumer in consumers:
        await consumer.stop()
    stage.must("not handled when the replays began", missing_before, missing_before > 0, "some")
    safe = given([stage.ledger("producer")])
    stage.note("given", len(safe))
    check_handled(stage, safe, ledgers)


async def _wait_in_stream(server: RedisServer) -> bool:
    async with Redis.from_url(server.url) as client:
        return bool(await unfinished(client, "readers"))


def _missing(safe: dict[str, tuple[str, int]], ledgers: list[Path]) -> set[str]:
    return safe.keys() - {event for ledger in ledgers for _, _, event in read(ledger)}


async def _flush_all(server: RedisServer, reading: Reading) -> None:
    async with Redis.from_url(server.url) as client:
        await client.flushall()


async def _delete_stream(server: RedisServer, reading: Reading) -> None:
    async with Redis.from_url(server.url) as client:
        await client.delete(STREAM)


async def _delete_group(server: RedisServer, reading: Reading) -> None:
    async with Redis.from_url(server.url) as client:
        try:
            await client.xgroup_destroy(STREAM, "readers")
        except ResponseError:
            pass


async def _go_back(server: RedisServer, reading: Reading) -> None:
    """To the append-only file of some time ago, as after a restore."""
    copy = server.folder / "copy"
    await asyncio.to_thread(server.kill)
    copy.mkdir()
    for path in _data(server.folder):
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, copy / path.name)
    await asyncio.to_thread(server.restart)
    start = reading.count()
    while reading.count() < start + 2_000:  # what another process writes
        await asyncio.sleep(0.1)
    await asyncio.to_thread(server.kill)
    for path in _data(server.folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in copy.iterdir():
        shutil.move(path, server.folder / path.name)
    await asyncio.to_thread(server.restart)


def _data(folder: Path) -> list[Path]:
    """Redis 7 has a folder, 6.2 a file."""
    return list(folder.glob("appendonly*"))
