"""Everything at once: producers, relays, consumers and Redis are killed, relays freeze, and nothing is lost or doubled."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import RedisError

from chaos.check import check_effects, check_groups, check_handled, check_stream, entries, given, unfinished
from chaos.events import CHARGED, STREAM
from chaos.ledger import Reading, read
from chaos.stage import Stage, Worker
from tools.redis_server import RedisServer

LEASE = 1.0
PAUSE = 2.0
"""Seconds that a relay is frozen: longer than its lease."""
SLOW = 0.3
"""Seconds that some listeners take, so that a kill finds them at it: longer than an acknowledgement waits for others."""
EACH = 2
"""Of each program."""


async def storm(
    stage: Stage, *, events: int = 100_000, lanes: int = 100, kills: int = 20, pauses: int = 10, within: float = 400.0
) -> None:
    """See above; so many kills of each program and of Redis, which come as the events do, whatever the machine's speed."""
    server, store, effects = stage.redis(), str(stage.folder / "outbox.db"), stage.folder / "effects.db"
    numbers = range(EACH)
    given_ledgers = [stage.ledger(f"producer-{number}") for number in numbers]
    handled_ledgers = [stage.ledger(f"consumer-{number}") for number in numbers]
    consumers = [
        await stage.start(
            f"consumer-{number}",
            "consumer",
            url=server.url,
            ledger=str(handled_ledgers[number]),
            name="named" if number == 0 else "",  # one that has a name, and one that is another after each start
            slow=SLOW,
            slow_one_in=50,
            effects=str(effects),
        )
        for number in numbers
    ]
    relays = [
        await stage.start(
            f"relay-{number}",
            "relay",
            url=server.url,
            store=store,
            ledger=str(stage.ledger(f"relay-{number}")),
            lease=LEASE,
        )
        for number in numbers
    ]
    producers = [
        await stage.start(
            f"producer-{number}",
            "producer",
            name=f"p{number}",
            url=server.url,
            ledger=str(given_ledgers[number]),
            lanes=lanes,
            each=events // EACH // lanes,
            store=store,
            charges=10,
        )
        for number in numbers
    ]

    sent = StreamLength(server)
    watching = stage.spawn(sent.watch())
    counted_given, counted_handled = Progress(given_ledgers), Progress(handled_ledgers)
    faults = Faults(stage, events)
    tasks = [
        *(faults.plan("producers killed", kills, counted_given, partial(faults.kill, one)) for one in producers),
        *(faults.plan("relays killed", kills, sent, partial(faults.kill, one)) for one in relays),
        faults.plan("relays frozen", pauses, sent, lambda: faults.freeze(relays)),
        *(faults.plan("consumers killed", kills, counted_handled, partial(faults.kill, one)) for one in consumers),
        faults.plan("kills of Redis", kills, counted_handled, lambda: faults.kill_redis(server)),
    ]

    def told() -> str:
        return f"{counted_given()} given, {sent()} sent, {counted_handled()} handled; {faults}"

    async with stage.saying(told):
        for producer in producers:  # a killed one is started again, by its own fault
            await stage.until("all events given", lambda one=producer: one.ended == 0, within)  # type: ignore[misc]
        await stage.until("all faults done", lambda: all(task.done() for task in tasks), within)
        await stage.settled(
            "all events handled", lambda: _is_finished(server, sum(1 for _ in given(given_ledgers))), 180.0
        )
    watching.cancel()
    for worker in [*relays, *consumers]:
        await worker.stop()

    safe, found = given(given_ledgers), await entries(server.url)
    for name, many in faults.done.items():
        stage.note(name, many)
    reported = Counter(word for relay in relays for (word,) in read(stage.ledger(relay.name)))
    stage.note("batches of unknown outcome", reported["DeliveryUnknown"])
    stage.note("refused leaders", reported["Fenced"])
    check_stream(stage, safe, found)
    check_handled(stage, {entry.event for entry in found}, handled_ledgers)
    await check_groups(stage, server.url)
    check_effects(stage, {entry.event for entry in found if entry.name == str(CHARGED)}, effects)


async def _is_finished(server: RedisServer, events: int) -> bool:
    async with Redis.from_url(server.url) as client:
        return await client.xlen(STREAM) >= events and not (
            await unfinished(client, "readers") or await unfinished(client, "effects")
        )


class Progress:
    """How many lines some ledgers have."""

    def __init__(self, ledgers: Sequence[Path]) -> None:
        self._readings = [Reading(ledger) for ledger in ledgers]

    def __call__(self) -> int:
        return sum(reading.count() for reading in self._readings)


class StreamLength:
    """How many entries there are; the last that is known while Redis is away."""

    def __init__(self, server: RedisServer) -> None:
        self._server, self._length = server, 0

    def __call__(self) -> int:
        return self._length

    async def watch(self) -> None:
        while True:
            async with Redis.from_url(self._server.url) as client:
                try:
                    self._length = await client.xlen(STREAM)
                except RedisError:
                    pass
            await asyncio.sleep(0.1)


class Faults:
    """Strikes when so much is done; what was struck is running again before the next of its kind."""

    def __init__(self, stage: Stage, events: int) -> None:
        self._stage, self._events = stage, events
        self._turns: dict[int, asyncio.Lock] = {}
        self.done: dict[str, int] = {}

    def __str__(self) -> str:
        return ", ".join(f"{many} {name}" for name, many in self.done.items())

    def plan(
        self, name: str, many: int, progress: Callable[[], int], strike: Callable[[], Awaitable[None]]
    ) -> asyncio.Task[None]:
        """So many strikes, at points of the progress that chance chooses."""
        points = sorted(self._stage.random.uniform(0.02, 0.9) * self._events for _ in range(many))
        self.done.setdefault(name, 0)
        return self._stage.spawn(self._strike(name, points, progress, strike))

    async def _strike(
        self, name: str, points: Sequence[float], progress: Callable[[], int], strike: Callable[[], Awaitable[None]]
    ) -> None:
        for point in points:
            while progress() < point:  # what other processes write
                await asyncio.sleep(0.02)
            await strike()
            self.done[name] += 1

    def _turn(self, worker: Worker) -> asyncio.Lock:
        return self._turns.setdefault(id(worker), asyncio.Lock())

    async def kill(self, worker: Worker) -> None:
        """As a crash would; then it is started again."""
        async with self._turn(worker):
            await worker.ready()
            await asyncio.sleep(self._stage.random.uniform(0.0, 0.3))  # not always right after its start
            await worker.kill()
            await worker.start()

    async def freeze(self, workers: Sequence[Worker]) -> None:
        """One of them, for longer than a lease."""
        worker = self._stage.random.choice(workers)
        async with self._turn(worker):
            await worker.ready()
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(PAUSE)
            worker.signal(signal.SIGCONT)

    async def kill_redis(self, server: RedisServer) -> None:
        """Then it starts from its append-only file."""
        await asyncio.sleep(self._stage.random.uniform(0.0, 0.3))
        await asyncio.to_thread(server.restart)
