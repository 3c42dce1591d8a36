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
    for done in range(rounds):
        stage.say(f"round {done + 1} of {rounds}")
        for rule in rules:
            rule.arm()
        await stage.until("a leader's batch is held", lambda: any(rule.held.is_set() for rule in rules), 10.0)
        old, new = (0, 1) if rules[0].held.is_set() else (1, 0)
        relays[old].signal(signal.SIGSTOP)
        rules[new].disarm()
        rules[new].released.set()
        passed = rules[new].passed
        await stage.until("the other one leads", lambda rule=rules[new], had=passed: rule.passed > had, 10.0)  # type: ignore[misc]
        rules[old].released.set()
        relays[old].signal(signal.SIGCONT)
        await stage.until("the old leader is answered", lambda rule=rules[old]: rule.answered, 10.0)  # type: ignore[misc]
    await producer.stop()
    safe = given([stage.ledger("producer")])

    async def sent() -> bool:
        async with Redis.from_url(server.url) as client:
            return bool(await client.xlen(STREAM) >= len(safe))

    await stage.settled("all events sent", sent, 30.0)
    for relay in relays:
        await relay.stop()
    refused = sum(word == "Fenced" for relay in relays for (word,) in read(stage.ledger(relay.name)))
    stage.note("leaders frozen", rounds)
    stage.must("refusals", refused, refused >= rounds // 2, f"{rounds // 2} at least")
    check_stream(stage, safe, await entries(server.url))
