"""A Redis that is away while a host goes on publishing: the disk takes it, not the memory, and it arrives afterwards."""

from __future__ import annotations

import asyncio
import subprocess
import time

from redis.asyncio import Redis

from chaos.check import check_stream, entries, given
from chaos.events import STREAM
from chaos.ledger import Reading
from chaos.stage import Stage

RATE = 1_000.0
WARM = 8.0
MEMORY = 20.0
"""Megabytes that a host may grow by."""
RECOVERY = 30.0
"""Seconds after which what was stored first is on its way, however busy the machine is."""
SHARE = 0.95
"""Of the rate, that the host goes on with."""


async def outage(stage: Stage, *, seconds: float = 60.0, rate: float = RATE, within: float = 300.0) -> None:
    """See above; on a machine that is too busy for the rate, Redis is away until as much is stored."""
    server, store = stage.redis(), stage.folder / "outbox.db"
    quota = max(16 << 20, int(seconds * rate * 1024))
    wanted = int(SHARE * rate * seconds)
    host = await stage.start(
        "host",
        "producer",
        name="h",
        url=server.url,
        ledger=str(stage.ledger("host")),
        lanes=200,
        each=10_000_000,
        rate=rate,
        store=str(store),
        relay=True,
        quota_size=quota,
    )
    reading = Reading(stage.ledger("host"))
    await host.ready()
    await asyncio.sleep(min(WARM, seconds))
    before, stored = _megabytes(host.pid), reading.count()
    grown, said, began = 0.0, 0.0, time.monotonic()
    await asyncio.to_thread(server.kill)
    while (gone := time.monotonic() - began) < seconds or (
        reading.count() - stored <= wanted and gone < 10 * seconds + within
    ):
        await asyncio.sleep(0.5)
        grown = max(grown, _megabytes(host.pid) - before)
        if gone > said + 10.0:
            said = gone
            stage.say(f"away for {gone:.0f} s, {reading.count() - stored} stored, {grown:+.1f} MB")
    stored = reading.count() - stored
    await asyncio.to_thread(server.restart)
    back, waiting = time.monotonic(), reading.count()
    async with Redis.from_url(server.url) as client:
        had = await client.xlen(STREAM)
        while await client.xlen(STREAM) == had and time.monotonic() - back < RECOVERY:
            await asyncio.sleep(0.02)
        first = time.monotonic() - back
        while (length := await client.xlen(STREAM)) < waiting and time.monotonic() - back < within:
            await asyncio.sleep(0.05)
            grown = max(grown, _megabytes(host.pid) - before)
        drained = time.monotonic() - back
    size = sum(file.stat().st_size for file in stage.folder.glob("outbox.db*"))
    await host.stop()
    stage.note("away for, s", gone)
    stage.must("stored meanwhile", stored, stored > wanted, f"more than {wanted}")
    stage.same("publishes that failed", sum(host.figures["errors"].values()), 0)
    stage.note("slowest publish, s", host.figures["slowest"])
    stage.below("memory grew by, MB", grown, MEMORY)
    stage.below("file, MB", size / 2**20, quota / 2**20)
    stage.below("sending again after, s", first, RECOVERY)
    stage.must("all sent after, s", drained, length >= waiting, f"within {within:g}")
    stage.note("sent a second", int((length - had) / drained))
    check_stream(stage, given([stage.ledger("host")]), await entries(server.url))


def _megabytes(pid: int) -> float:
    """Of memory that a process has now."""
    told = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(told) / 1024
