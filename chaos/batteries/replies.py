"""Answers that do not arrive: of flushes, of reads, of the outbox's own commits. Unknown is neither lost nor done twice."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, check_stream, entries, given, unfinished
from chaos.events import STREAM
from chaos.proxy import DropReplies, Proxy
from chaos.stage import Stage, Worker
from silbo.stores.sqlite import SQLiteStore

EACH = 4
"""Programs of each kind, so that their back-off is waited for side by side."""
RATE = 250.0
NEVER = 600.0
"""Seconds until another consumer takes over: none does, so each has to look for its own."""


async def replies(stage: Stage, *, flushes: int = 1_000, reads: int = 1_000, commits: int = 1_000) -> None:
    """See above."""
    await asyncio.gather(_broker(stage, flushes, reads), _commits(stage, commits))


async def _broker(stage: Stage, flushes: int, reads: int) -> None:
    server = stage.redis()

    async def dropping(command: bytes, most: int, counts: Callable[[bytes], bool]) -> Proxy:
        rule = DropReplies(command, stage.random, share=0.5, most=-(-most // EACH), counts=counts)
        return await stage.proxy(server, rule)

    writes = [await dropping(b"EVALSHA", flushes, _was_carried_out) for _ in range(EACH)]
    readers = [await dropping(b"XREADGROUP", reads, _has_entries) for _ in range(EACH)]
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=proxy.url,
            ledger=str(stage.ledger(f"consumer-{number}")),
            name=f"c{number}",
            claim_after=NEVER,
        )
        for number, proxy in enumerate(readers)
    ]
    relays: list[Worker] = []
    wanted_in_stream = 0
    producers = [
        await stage.start(
            f"producer-{number}",
            "producer",
            name=f"p{number}",
            url=proxy.url,
            ledger=str(stage.ledger(f"producer-{number}")),
            lanes=20,
            each=1_000_000,
            rate=RATE,
            store=str(stage.folder / f"outbox-{number}.db"),
            relay=True,
        )
        for number, proxy in enumerate(writes)
    ]

    def dropped(proxies: list[Proxy]) -> int:
        return sum(proxy.rule.dropped for proxy in proxies if isinstance(proxy.rule, DropReplies))

    async def handled() -> bool:
        async with Redis.from_url(server.url) as client:
            return await client.xlen(STREAM) >= wanted_in_stream and not await unfinished(client, "readers")

    async with stage.saying(lambda: f"{dropped(writes)} flushes and {dropped(readers)} reads without an answer"):
        wanted = EACH * -(-flushes // EACH), EACH * -(-reads // EACH)
        await stage.until("all answers dropped", lambda: (dropped(writes), dropped(readers)) == wanted, 600.0)
        for number, producer in enumerate(producers):
            await producer.stop()
            relays.append(  # what a host leaves in its outbox is another's to send
                await stage.start(
                    f"relay-{number}",
                    "relay",
                    url=server.url,
                    store=str(stage.folder / f"outbox-{number}.db"),
                    ledger=str(stage.ledger(f"relay-{number}")),
                )
            )
        wanted_in_stream = len(given(stage.ledger(one.name) for one in producers))
        await stage.settled("all events handled", handled, 120.0)
    for worker in [*relays, *consumers]:
        await worker.stop()
    stage.note("flushes unanswered", dropped(writes))
    stage.note("reads unanswered", dropped(readers))
    safe, found = given(stage.ledger(one.name) for one in producers), await entries(server.url)
    check_stream(stage, safe, found)
    handled_events = check_handled(
        stage, {entry.event for entry in found}, [stage.ledger(one.name) for one in consumers]
    )
    stage.zero("handled twice", sum(handled_events.values()) - len(handled_events))
    await check_groups(stage, server.url)


def _was_carried_out(reply: bytes) -> bool:
    return not reply.startswith(b"-")


def _has_entries(reply: bytes) -> bool:
    return b"message" in reply


async def _commits(stage: Stage, commits: int) -> None:
    workers = []
    for number in range(EACH):
        settings = {
            "name": f"k{number}",
            "url": "redis://127.0.0.1:1/0",  # never asked
            "ledger": str(stage.ledger(f"commits-{number}")),
            "lanes": 20,
            "each": 1_000_000,
            "store": str(stage.folder / f"commits-{number}.db"),
        }
        workers.append(
            await stage.start(
                f"commits-{number}",
                "commits",
                producer=settings,
                seed=stage.random.getrandbits(32),
                kills=-(-commits // EACH),
            )
        )
    for worker in workers:
        await worker.wait(600.0)
    stage.note("commits killed", EACH * -(-commits // EACH))
    stored: Counter[str] = Counter()
    broken = 0
    for number in range(EACH):
        path = stage.folder / f"commits-{number}.db"
        broken += _integrity(path) != "ok"
        stored.update(await _rows(path))
    stage.zero("files damaged", broken)
    answered = given(stage.ledger(worker.name) for worker in workers)
    stage.must("commits answered", len(answered), len(answered) > 0, "above 0")
    stage.note("stored but not answered", len(stored.keys() - answered.keys()))
    stage.zero("answered but not stored", len(answered.keys() - stored.keys()))
    stage.zero("stored twice", sum(stored.values()) - len(stored))


def _integrity(path: Path) -> str:
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


async def _rows(path: Path) -> list[str]:
    store = SQLiteStore(path, create=False)
    await store.open()
    try:
        found: list[str] = []
        after = 0
        while rows := await store.rows("pending", after=after, limit=1_000):
            found += [row.message.message_id for row in rows]
            after = rows[-1].id
        return found
    finally:
        await store.aclose()
