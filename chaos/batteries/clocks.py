"""Relays whose clock is an hour ahead or behind, killed in the middle of an outage: the next goes on as if it were right."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from chaos.check import check_stream, entries, given
from chaos.events import STREAM
from chaos.faketime import wound
from chaos.stage import Stage

LEASE: Final = 1.0
WITHIN: Final = 120.0
"""Seconds that a take-over may last on a busy machine: far less than the hour, and than the wait for a wrong time."""
HOURS: Final = ("+1h", "", "-1h", "+1h", "-1h", "")
"""The faketime setting of each relay, one after the other; empty for a clock that goes right."""


async def clocks(stage: Stage, *, rounds: int = 4) -> None:
    """See above; each round has every clock once."""
    stage.note("rounds of wound clocks", rounds)
    if wound("+1h") is None:
        stage.note("left out, for want of `faketime`:", "clocks that are wrong")
        must = os.environ.get("SILBO_LEAVE_OUT") == "nothing"
        stage.must("rounds left out", rounds, not must, "0; install it: apt-get install faketime")
        return
    server, path = stage.redis(), stage.folder / "outbox.db"
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger("producer")),
        lanes=20,
        each=1_000_000,
        rate=100.0,
        store=str(path),
    )
    await producer.ready()
    slowest, wound_clocks = 0.0, HOURS * rounds

    async def all_sent() -> bool:
        async with Redis.from_url(server.url) as client:
            return bool(await client.xlen(STREAM) >= many)

    for number, clock in enumerate(wound_clocks):
        relay = await stage.start(
            f"relay-{number}",
            "relay",
            environment=wound(clock) if clock else None,
            url=server.url,
            store=str(path),
            ledger=str(stage.ledger(f"relay-{number}")),
            lease=LEASE,
        )
        many = len(given([stage.ledger("producer")])) + 1
        took = await stage.until(f"relay {number}, whose clock is {clock or 'right'}, sends", all_sent, WITHIN)
        slowest = max(slowest, took)
        await asyncio.to_thread(server.kill)
        await stage.until("its rows are postponed", lambda: _postponed(path) > 0, WITHIN)
        await relay.kill()
        await asyncio.to_thread(server.restart)
        stage.say(f"{number + 1} of {len(wound_clocks)} relays")
    await producer.stop()
    last = await stage.start(
        "relay", "relay", url=server.url, store=str(path), ledger=str(stage.ledger("relay")), lease=LEASE
    )
    many = len(safe := given([stage.ledger("producer")]))
    await stage.settled("all events sent", all_sent, WITHIN)
    await last.stop()
    stage.note("relays killed that had postponed rows", len(wound_clocks))
    stage.below("slowest take-over, s", slowest, WITHIN)
    check_stream(stage, safe, await entries(server.url))


def _postponed(path: Path) -> int:
    """Rows that wait for a next attempt, by whatever clock."""
    connection = sqlite3.connect(path)
    try:
        told = connection.execute("SELECT count(*) FROM message WHERE state < 2 AND next_attempt_at IS NOT NULL")
        return int(told.fetchone()[0])
    finally:
        connection.close()
