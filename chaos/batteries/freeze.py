"""A Redis that is frozen: connections stay open, nothing is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from redis.asyncio import Redis

from chaos.check import check_stream, entries, given
from chaos.events import STREAM
from chaos.ledger import Reading
from chaos.stage import Stage

RATE = 200.0
TIMEOUT = 5.0
AGAIN = 30.0
"""Seconds after which publishes go on: by themselves, however busy the machine is."""


async def freeze(stage: Stage, *, seconds: Sequence[float] = (7.0, 65.0), timeout: float = TIMEOUT) -> None:
    """See above: for a publisher that is directly on Redis, and for one with an outbox."""
    server = stage.redis()
    common: dict[str, Any] = {"url": server.url, "lanes": 20, "each": 1_000_000, "rate": RATE, "timeout": timeout}
    direct = await stage.start("direct", "producer", name="d", ledger=str(stage.ledger("direct")), **common)
    outbox = await stage.start(
        "outbox",
        "producer",
        name="o",
        ledger=str(stage.ledger("outbox")),
        store=str(stage.folder / "outbox.db"),
        relay=True,
        **common,
    )
    readings = [Reading(stage.ledger(worker.name)) for worker in (direct, outbox)]
    slowest = 0.0
    for duration in seconds:
        await stage.until("both give", _more(readings), 120.0)
        stage.say(f"frozen for {duration:g} s")
        server.pause()
        await asyncio.sleep(duration)
        await stage.until("a publish is told so", lambda: bool(direct.figures.get("errors")), 120.0)
        server.resume()
        resumed = time.monotonic()
        await stage.until("both give again", _more(readings), 120.0)
        slowest = max(slowest, time.monotonic() - resumed)
    for worker in (direct, outbox):
        await worker.stop()
    safe = given(stage.ledger(worker.name) for worker in (direct, outbox))

    async def sent() -> bool:
        async with Redis.from_url(server.url) as client:
            return bool(await client.xlen(STREAM) >= len(safe))

    await stage.settled("all events sent", sent, 120.0)
    stage.note("frozen for, s", " and ".join(f"{duration:g}" for duration in seconds))
    stage.below("slowest answer, s", direct.figures["slowest"], timeout + 0.5 + 2 * direct.figures["stalled"])
    stage.note("slowest answer of the outbox, s", outbox.figures["slowest"])
    stage.must(
        "publishes that were told so", sum(direct.figures["errors"].values()), bool(direct.figures["errors"]), "some"
    )
    stage.same("publishes to the outbox that failed", sum(outbox.figures["errors"].values()), 0)
    stage.below("giving again after, s", slowest, AGAIN)
    check_stream(stage, safe, await entries(server.url))


def _more(readings: Sequence[Reading]) -> Callable[[], bool]:
    wanted = [reading.count() + 20 for reading in readings]
    return lambda: all(reading.count() >= many for reading, many in zip(readings, wanted, strict=True))
