"""A leader that freezes in the middle of a batch, wakes up when another leads, and sends what it had in hand."""

from __future__ import annotations

import signal

from redis.asyncio import Redis

from chaos.check import check_stream, entries, given
from chaos.events import STREAM
from chaos.ledger import read
from chaos.proxy import HoldRequest
from chaos.stage import Stage

LEASE = 1.0
TIMEOUT = 600.0
"""Seconds that a relay waits for an answer: a frozen one is to get the refusal, however long its freeze was."""
TRIES = 3
"""Rounds played for each refusal that is wanted, at most: a lease may end on a busy machine before its holder is frozen."""


async def fence(stage: Stage, *, rounds: int = 10) -> None:
    """See above."""
    server, store = stage.redis(), str(stage.folder / "outbox.db")
    rules = [HoldRequest(), HoldRequest()]
    proxies = [await stage.proxy(server, rule) for rule in rules]
    relays = [
        await stage.start(
            f"relay-{number}",
            "relay",
            url=proxy.url,
            store=store,
            ledger=str(stage.ledger(f"relay-{number}")),
            lease=LEASE,
            timeout=TIMEOUT,
        )
        for number, proxy in enumerate(proxies)
    ]
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger("producer")),
        lanes=20,
        each=1_000_000,
        rate=500.0,
        store=store,
    )

    def refusals() -> int:
        return sum(word == "Fenced" for relay in relays for (word,) in read(stage.ledger(relay.name)))

    frozen = 0
    while refusals() < rounds and frozen < rounds * TRIES:
        frozen += 1
        stage.say(f"{refusals()} of {rounds} refusals")
        for rule in rules:
            rule.arm()
        await stage.until("a leader's batch is held", lambda: any(rule.held.is_set() for rule in rules), 60.0)
        old, new = (0, 1) if rules[0].held.is_set() else (1, 0)
        relays[old].signal(signal.SIGSTOP)
        rules[new].disarm()
        rules[new].released.set()
        passed = rules[new].passed
        await stage.until("the other one leads", lambda rule=rules[new], had=passed: rule.passed > had, 60.0)  # type: ignore[misc]
        rules[old].released.set()
        relays[old].signal(signal.SIGCONT)
        await stage.until("the old leader is answered", lambda rule=rules[old]: rule.answered, 60.0)  # type: ignore[misc]
    await producer.stop()
    safe = given([stage.ledger("producer")])

    async def sent() -> bool:
        async with Redis.from_url(server.url) as client:
            return bool(await client.xlen(STREAM) >= len(safe))

    await stage.settled("all events sent", sent, 120.0)
    for relay in relays:
        await relay.stop()
    stage.note("leaders frozen", frozen)
    stage.must("refusals", refused := refusals(), refused >= rounds, f"{rounds} at least")
    check_stream(stage, safe, await entries(server.url))
