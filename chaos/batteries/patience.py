"""Listeners that take longer than the silence after which others take over, and fail at first: each event has one effect."""

from __future__ import annotations

from typing import Final

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, given, unfinished
from chaos.ledger import read
from chaos.stage import Stage, Worker
from tools.redis_server import RedisServer

CLAIM_AFTER: Final = 1.0
SLOW: Final = 2.5
EACH: Final = 2
SLOWEST: Final = 16
"""The most that it is slowed down, as a factor. Where the machine itself holds up heartbeats for so long that others must take over,
nothing is proved by a second effect: then it is played again, slower."""


async def patience(stage: Stage, *, events: int = 320, concurrency: int = 32, slow: float = SLOW) -> None:
    """See above."""
    slower = 1
    while True:
        server = stage.redis()
        consumers = await _play(stage, server, events, concurrency, slow, slower)
        ledgers = [stage.ledger(consumer.name) for consumer in consumers]
        lines = [event for ledger in ledgers for _, _, event in read(ledger)]
        stalled = max(consumer.figures["stalled"] for consumer in consumers)
        if len(lines) == len(set(lines)) or stalled < CLAIM_AFTER * slower / 4 or slower == SLOWEST:
            break
        stage.say(f"a consumer came {stalled:.2g} s too late to a timer")
        slower *= 4
    handled = check_handled(stage, given([stage.ledger(f"producer-{slower}")]), ledgers)
    stage.zero("handled twice", handled.total() - len(handled))
    stage.must("failed at first", failed := sum(one.figures["failed"] for one in consumers), failed > 0, "some")
    inversions = 0
    for ledger in ledgers:
        last: dict[str, int] = {}
        for lane, number, _ in read(ledger):
            inversions += int(number) < last.get(lane, 0)
            last[lane] = int(number)
    stage.zero("inversions within a consumer", inversions)
    await check_groups(stage, server.url)


async def _play(
    stage: Stage, server: RedisServer, events: int, concurrency: int, slow: float, slower: int
) -> list[Worker]:
    """The consumers, when all is handled."""
    lanes = EACH * concurrency
    producer = await stage.start(
        f"producer-{slower}",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger(f"producer-{slower}")),
        lanes=lanes,
        each=events // lanes,
    )
    await producer.wait(120.0)
    consumers = [
        await stage.start(
            f"consumer-{slower}-{number}",
            "consumer",
            url=server.url,
            ledger=str(stage.ledger(f"consumer-{slower}-{number}")),
            claim_after=CLAIM_AFTER * slower,
            concurrency=concurrency,
            slow=slow * slower,
            flaky=2,
        )
        for number in range(EACH)
    ]

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return not await unfinished(client, "readers")

    await stage.settled("all events handled", finished, 180.0 * slower)
    for consumer in consumers:
        await consumer.stop()
    return consumers
