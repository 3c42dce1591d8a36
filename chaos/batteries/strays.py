"""Listeners and hooks that leave cancellations on the tasks that run them: consumers and relays go on as if nothing were."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, check_stream, entries, given, unfinished
from chaos.consumer import STRAYS
from chaos.events import STREAM
from chaos.ledger import Reading
from chaos.stage import Stage

EACH: Final = 2
LANES: Final = 20
ONE_IN: Final = 5
NEVER: Final = 600.0
"""Seconds until another consumer takes over: none does, so each has to go on by itself."""
WITHIN: Final = 120.0


async def strays(stage: Stage, *, events: int = 5_000, outages: int = 5) -> None:
    """See above; in each outage of Redis the relay's hook is called."""
    server, store = stage.redis(), str(stage.folder / "outbox.db")
    relay = await stage.start(
        "relay", "relay", url=server.url, store=store, ledger=str(stage.ledger("relay")), strays=True
    )
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=server.url,
            ledger=str(stage.ledger(f"consumer-{number}")),
            name=f"c{number}",
            claim_after=NEVER,
            concurrency=8 if number else 1,
            strays=ONE_IN,
        )
        for number in range(EACH)
    ]
    for worker in (relay, *consumers):
        await worker.ready()
    reported, parts = Reading(stage.ledger("relay")), outages + 1
    ledgers = []
    for part in range(parts):
        ledgers.append(stage.ledger(f"producer-{part}"))
        producer = await stage.start(
            f"producer-{part}",
            "producer",
            name=f"p{part}",
            url=server.url,
            ledger=str(ledgers[-1]),
            lanes=LANES,
            each=events // LANES // parts,
            store=store,
        )
        if part < outages:
            before = reported.count()
            await asyncio.to_thread(server.kill)
            await stage.until("the relay reports the outage", lambda had=before: reported.count() > had, WITHIN)  # type: ignore[misc]
            await asyncio.to_thread(server.restart)
        await producer.wait(WITHIN)
        stage.say(f"{part + 1} of {parts}")
    safe = given(ledgers)

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return await client.xlen(STREAM) >= len(safe) and not await unfinished(client, "readers")

    await stage.settled("all events sent and handled", finished, WITHIN)
    stage.zero("programs that ended by themselves", sum(one.ended is not None for one in (relay, *consumers)))
    for worker in (relay, *consumers):
        await worker.stop()
    left: Counter[str] = Counter()
    for consumer in consumers:
        left.update(consumer.figures["strays"])
    stage.note("hooks of the relay called", reported.count())
    for stray in STRAYS:
        stage.must(stray, left[stray], left[stray] > 0, "some")
    check_stream(stage, safe, await entries(server.url))
    handled = check_handled(stage, safe, [stage.ledger(consumer.name) for consumer in consumers])
    stage.zero("handled twice", handled.total() - len(handled))
    await check_groups(stage, server.url)
