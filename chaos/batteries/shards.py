"""A group over shards whose members come, leave, are killed and are frozen inside of listeners, under load."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio import Redis

from chaos.check import Given, check_effects, entries, given, unfinished
from chaos.events import CHARGED
from chaos.keeper import Effect, Keeper
from chaos.stage import Stage, Worker
from chaos.worker import Stalls

LEASE = 3.0
FREEZE = 4.5
"""Seconds that a member is frozen: longer than its lease."""
EVERY = 2.0
"""Seconds from one strike to the next."""
CALM = 5.0
"""Seconds before the first strike: what an event takes then is what it may take in a shard that does not move."""
SLOW = 0.05
"""Seconds that some listeners take, so that a kill or a freeze finds a member inside of one."""


async def shards(
    stage: Stage,
    *,
    shards: int = 16,
    members: tuple[int, int, int] = (4, 12, 3),
    seconds: float = 300.0,
    rate: float = 2_000.0,
    lanes: int = 200,
    each: int = 0,
    judges_times: bool = True,
) -> None:
    """See above; the number of members goes from the first to the second in half of the time, then to the third.

    Without ``judges_times`` the times are only told: beside other programs they say more of the machine.
    """
    server, effects = stage.redis(on_disk=False), stage.folder / "effects.db"
    async with Keeper(stage.folder / "keeper") as keeper:
        group = Group(stage, url=server.url, keeper=str(keeper.path), shards=shards, effects=str(effects))
        await group.grow(members[0])
        producer = await stage.start(
            "producer",
            "producer",
            name="p",
            url=server.url,
            ledger=str(stage.ledger("producer")),
            lanes=lanes,
            each=1_000_000,
            rate=rate,
            shards=shards,
            charges=20,
        )

        def told() -> str:
            return f"{len(keeper.effects)} effects, {keeper.refused} refused; {len(group.running)} members, {group}"

        stalls = Stalls()
        watching = stage.spawn(stalls.watch())
        async with stage.saying(told):
            await stage.until("the first effects", lambda: len(keeper.effects) > lanes, 60.0)
            await asyncio.sleep(CALM)
            begins = time.time()
            await group.suffer(members, seconds)
            await producer.stop()
            safe = given([stage.ledger("producer")])

            async def is_finished() -> bool:
                return not await _count_unfinished(server.url, shards)

            await stage.settled("all events handled", is_finished, 120.0)
        watching.cancel()
        for member in group.running:
            await member.stop()
        stuck = await _count_unfinished(server.url, shards)
        streams = [await entries(server.url, _stream(shard)) for shard in range(shards)]

    for name, many in group.done.items():
        stage.note(name, many)
    stage.note("effects of old epochs refused", keeper.refused)
    stage.zero("stuck", stuck)
    _check_ledger(stage, safe, keeper.effects, group.struck, stalls.longest)
    charged = {entry.event for stream in streams for entry in stream if entry.name == str(CHARGED)}
    check_effects(stage, charged, effects)
    check_standstill(stage, keeper.effects, group.struck, begins, stalls.longest, judges_times=judges_times)


def _stream(shard: int) -> str:
    return f"silbo:{{events.{shard}}}"


async def _count_unfinished(url: str, shards: int) -> int:
    async with Redis.from_url(url) as client:
        groups = itertools.product(("readers", "effects"), range(shards))
        return sum([await unfinished(client, group, _stream(shard)) for group, shard in groups])


class Group:
    """The members, and what happens to them.

    Attributes:
        running: Those that live, and are not about to stop.
        done: How often each thing happened.
        struck: When each member was killed or frozen, by its name.
    """

    def __init__(self, stage: Stage, **settings: Any) -> None:
        self._stage = stage
        self._settings = settings
        self._numbers = itertools.count(1)
        self._thawing: list[asyncio.Task[None]] = []
        self._frozen: set[str] = set()
        self.running: list[Worker] = []
        self.done: Counter[str] = Counter()
        self.struck: list[tuple[float, str]] = []

    def __str__(self) -> str:
        return ", ".join(f"{many} {name}" for name, many in self.done.items())

    async def grow(self, many: int) -> None:
        for _ in range(many):
            await self.join()
        for member in self.running:
            await member.ready()

    async def join(self) -> None:
        name = f"m{next(self._numbers)}"
        self.running.append(
            await self._stage.start(name, "member", name=name, slow=SLOW, slow_one_in=10, **self._settings)
        )
        self.done["joined"] += 1

    async def suffer(self, members: tuple[int, int, int], seconds: float) -> None:
        """Strike every now and then: a member comes or leaves where their number is not the wanted one, else chance decides."""
        begins, (first, most, last) = time.monotonic(), members
        while (part := (time.monotonic() - begins) / seconds) < 1.0:
            wanted = first + (most - first) * 2 * part if part < 0.5 else most - (most - last) * (2 * part - 1)
            await self._strike(round(wanted))
            await asyncio.sleep(EVERY)
        await asyncio.gather(*self._thawing)
        while len(self.running) > last:
            await self._stop(self.running[0])

    async def _strike(self, wanted: int) -> None:
        random = self._stage.random
        lively = [member for member in self.running if member.name not in self._frozen]
        what = random.choice(["kill", "freeze", "stop"])
        if len(self.running) < wanted or len(lively) < 2:
            await self.join()
        elif what == "kill":
            member = random.choice(lively)
            await member.ready()
            self.struck.append((time.time(), member.name))
            self.running.remove(member)
            await member.kill()
            self.done["killed"] += 1
        elif what == "freeze":
            member = random.choice(lively)
            await member.ready()
            self.struck.append((time.time(), member.name))
            member.signal(signal.SIGSTOP)
            self._frozen.add(member.name)
            self._thawing.append(self._stage.spawn(self._thaw(member)))
            self.done["frozen"] += 1
        else:
            await self._stop(random.choice(lively))

    async def _thaw(self, member: Worker) -> None:
        await asyncio.sleep(FREEZE)
        member.signal(signal.SIGCONT)
        self._frozen.discard(member.name)

    async def _stop(self, member: Worker) -> None:
        self.running.remove(member)
        await member.stop()
        self.done["stopped"] += 1


# -- what must be there afterwards --------------------------------------------------------------------------


def _check_ledger(
    stage: Stage, safe: Given, effects: Sequence[Effect], struck: Sequence[tuple[float, str]], stalled: float
) -> None:
    """Each event had its effect, and those of a lane in their order. A second effect of one is due to a kill or freeze alone.

    A frozen member goes on when the machine lets it: as late as it let this process wait, twice, for its thawing and for itself.
    """
    first: dict[str, Effect] = {}
    last: dict[str, int] = {}
    inversions = by_move = 0
    for effect in effects:
        if (before := first.setdefault(effect.event, effect)) is effect:
            inversions += effect.number < last.get(effect.lane, -1)
            last[effect.lane] = effect.number
        else:
            by_move += not any(before.at - FREEZE - 2 * stalled < at < effect.at for at, _ in struck)
    stage.note("given", len(safe))
    stage.note("redelivered", len(effects) - len(first))
    stage.zero("redelivered though nobody was killed or frozen", by_move)
    stage.zero("lost", len(safe.keys() - first.keys()))
    stage.zero("inversions", inversions)


def check_standstill(
    stage: Stage,
    effects: Iterable[Effect],
    struck: Sequence[tuple[float, str]],
    begins: float,
    stalled: float,
    *,
    judges_times: bool,
) -> None:
    """A shard stands still from the last effect of one leader to the first of the next one; the others go on meanwhile.

    In a shard that has not moved for a second, and whose leader was not frozen, an event takes no longer than before the first strike.
    A machine that is so busy that this process was late has made the members late, too: that much is granted.
    """
    moves: dict[int, list[float]] = {0: [], 1: [], 2: []}  # by the number of members that were struck meanwhile
    took: dict[bool, list[float]] = {False: [], True: []}  # by whether strikes had begun
    last: dict[int, Effect] = {}
    moved_at: dict[int, float] = {}
    for effect in effects:
        before = last.get(effect.shard)
        last[effect.shard] = effect
        if before is None or before.epoch != effect.epoch:
            moved_at[effect.shard] = effect.at
        if before is not None and before.epoch != effect.epoch:
            near = {name for at, name in struck if before.at - FREEZE < at < effect.at}
            moves[min(len(near), 2)].append(effect.at - before.at)
        elif effect.dispatched_at > moved_at[effect.shard] + 1.0 and not any(
            name == effect.member and effect.dispatched_at - FREEZE < at < effect.at for at, name in struck
        ):
            took[effect.dispatched_at > begins].append(effect.at - effect.dispatched_at)
    longest = {many: max(found, default=0.0) for many, found in moves.items()}
    stage.note("planned moves", len(moves[0]))
    stage.note("moves while one was killed or frozen", len(moves[1]))
    stage.note("moves while several were killed or frozen", len(moves[2]))
    stage.note("longest standstill of those, s", longest[2])
    stage.note("longest time that the machine let this process wait, s", stalled)
    calm, usual = _find_part(took[False], 0.99), _find_part(took[True], 0.99)
    bounds = {
        "longest standstill of a planned move, s": (longest[0], 1.0),
        "longest standstill while one was killed or frozen, s": (longest[1], LEASE + 1.0),
        "the difference, s": (usual - calm, 0.05),
    }
    stage.note("99 of 100 events of shards that did not move took up to, s", usual)
    stage.note("and before the first strike, s", calm)
    for name, (value, bound) in bounds.items():
        if judges_times:
            stage.below(name, value, bound + stalled)
        else:
            stage.note(name, value)


def _find_part(numbers: list[float], part: float) -> float:
    """Return the number that this part of all is not above."""
    return sorted(numbers)[int(len(numbers) * part)] if numbers else 0.0
