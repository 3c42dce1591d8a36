"""Events that always fail, and events that kill who hears them: exactly those become dead letters."""

from __future__ import annotations

from redis.asyncio import Redis

from chaos.check import check_groups, check_handled, dead_letters, entries, given, unfinished
from chaos.events import fate_of
from chaos.stage import Stage, Worker

FAILS, KILLS = 100, 1_000
EACH = 2
ATTEMPTS = 3


async def poison(stage: Stage, *, events: int = 5_000, fails: int = FAILS, kills: int = KILLS) -> None:
    """See above."""
    server = stage.redis()
    lanes = 50
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger("producer")),
        lanes=lanes,
        each=events // lanes,
        fails=fails,
        kills=kills,
    )
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=server.url,
            ledger=str(stage.ledger(f"consumer-{number}")),
            name="named" if number == 0 else "",
            claim_after=1.0,
            max_attempts=ATTEMPTS,
        )
        for number in range(EACH)
    ]
    deaths = Deaths()
    supervising = [stage.spawn(deaths.supervise(consumer)) for consumer in consumers]

    async def finished() -> bool:
        async with Redis.from_url(server.url) as client:
            return not await unfinished(client, "readers")

    async with stage.saying(lambda: f"{deaths.many} consumers were killed by an event"):
        await producer.wait(180.0)
        await stage.settled("all events handled or dead", finished, 180.0)
    for task in supervising:
        task.cancel()
    for consumer in consumers:
        await consumer.ready()
        await consumer.stop()
    safe = given([stage.ledger("producer")])
    fates = {
        event: fate_of(number * lanes + int(lane.partition("-")[2]), fails=fails, kills=kills)
        for event, (lane, number) in safe.items()
    }
    found, dead = await entries(server.url), await dead_letters(server.url)
    stage.note("given", len(safe))
    stage.zero("lost", len(safe.keys() - {entry.event for entry in found}))
    stage.note("that always fail", sum(fate == "fails" for fate in fates.values()))
    stage.note("that kill", sum(fate == "kills" for fate in fates.values()))
    stage.note("consumers killed by them", deaths.many)
    stage.note("dead letters", len(dead))
    stage.zero("dead letters of others", sum(not fates.get(event) for event in dead))
    stage.zero("poison that is no dead letter", len({event for event, fate in fates.items() if fate} - set(dead)))
    stage.zero("dead letters that came twice", len(dead) - len(set(dead)))
    check_handled(
        stage,
        [event for event, fate in fates.items() if not fate],
        [stage.ledger(consumer.name) for consumer in consumers],
    )
    await check_groups(stage, server.url)


class Deaths:
    """Counts them, and starts who died."""

    def __init__(self) -> None:
        self.many = 0

    async def supervise(self, worker: Worker) -> None:
        while True:
            await worker.wait(3600.0)
            self.many += 1
            await worker.start()
