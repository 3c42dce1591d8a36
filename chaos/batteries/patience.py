"""Listeners that take longer than the silence after which others take over, and fail at first: each event has one effect."""

from __future__ import annotations

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, given, unfinished
from chaos.ledger import read
from chaos.stage import Stage

CLAIM_AFTER = 1.0
SLOW = 2.5
EACH = 2


async def patience(stage: Stage, *, events: int = 320, concurrency: int = 32, slow: float = SLOW) -> None:
    """See above."""
    server = stage.redis()
    lanes = EACH * concurrency
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger("producer")),
        lanes=lanes,
        each=events // lanes,
    )
    await producer.wait(30.0)
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=server.url,
            ledger=str(stage.ledger(f"consumer-{number}")),
            claim_after=CLAIM_AFTER,
            concurrency=concurrency,
            slow=slow,
            flaky=2,
        )
        for number in range(EACH)
    ]

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return not await unfinished(client, "readers")

    await stage.settled("all events handled", finished, 60.0)
    for consumer in consumers:
        await consumer.stop()
    ledgers = [stage.ledger(consumer.name) for consumer in consumers]
    handled = check_handled(stage, given([stage.ledger("producer")]), ledgers)
    stage.zero("handled twice", sum(handled.values()) - len(handled))
    stage.must("failed at first", failed := sum(one.figures["failed"] for one in consumers), failed > 0, "some")
    inversions = 0
    for ledger in ledgers:
        last: dict[str, int] = {}
        for lane, number, _ in read(ledger):
            inversions += int(number) < last.get(lane, 0)
            last[lane] = int(number)
    stage.zero("inversions within a consumer", inversions)
    await check_groups(stage, server.url)
