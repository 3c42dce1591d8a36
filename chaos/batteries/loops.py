"""One broker and one outbox, used from a second and a third event loop: these are refused at once, and the first goes on."""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis

from chaos.check import check_stream, entries, given
from chaos.events import STREAM
from chaos.loops import TIMEOUT
from chaos.stage import Stage

THREADS: Final = 3
WAYS: Final = 3
"""Kinds of calls that a thread makes: a dispatch to the broker, one to the outbox, and a question to the outbox."""
AT_ONCE: Final = 0.5


async def loops(stage: Stage, *, each: int = 20, calls: int = 100) -> None:
    """See above; so many loops after one another in each thread, and so many calls of each kind in each loop."""
    server = stage.redis()
    host = await stage.start(
        "host",
        "loops",
        url=server.url,
        store=str(stage.folder / "outbox.db"),
        ledger=str(stage.ledger("host")),
        threads=THREADS,
        each=each,
        calls=calls,
    )
    await host.wait(300.0)
    figures = host.figures
    if host.ended or not figures:
        stage.wrong.append(f"the host ended with {host.ended}")
        return
    many = THREADS * each
    ledgers = [stage.folder / f"host.ledger-t{thread}-{number}" for thread in range(THREADS) for number in range(each)]
    safe = given([stage.ledger("host"), *ledgers])

    async def sent() -> bool:
        async with Redis.from_url(server.url) as client:
            return bool(await client.xlen(STREAM) >= len(safe))

    await stage.settled("all events sent", sent, 60.0)
    slack = 2 * figures["stalled"]
    stage.note("other loops", many)
    stage.note("dispatches in their own loop", figures["done here"])
    stage.same(
        "calls refused elsewhere that named both loops", figures.get("refused elsewhere", 0), many * calls * WAYS
    )
    stage.zero("calls refused here", figures.get("refused here", 0))
    stage.zero("refused without the loops", figures.get("refused without the loops", 0))
    stage.zero("other errors", len(figures["wrong"]))
    stage.wrong += figures["wrong"]
    stage.must("waits woken by another loop", woken := figures.get("waits woken", 0), woken > 0, "some")
    stage.below("slowest refusal, s", figures["slowest"]["elsewhere"], AT_ONCE + slack)
    stage.below("slowest dispatch, s", figures["slowest"]["here"], TIMEOUT + slack)
    check_stream(stage, safe, await entries(server.url))
