"""Histories made of a seed, and the smallest part of one that still breaks a promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from tests.simulation.redis_model import ModelRedis
from tests.simulation.world import Broken, Fault, History, World

KINDS = ("join", "leave", "kill", "freeze", "suspend", "lose", "lose", "lose", "slow", "clock", "stall", "outage")
REPLACED_FROM = 6.0  # seconds; before, the shards of the one that was killed are taken over
CALLS = ("Beat", "Take", "Renew", "Release", "read", "ack")


def make_storm(seed: int) -> History:
    """Anything at any time."""
    random = Random(seed)
    history = _begin(random, seed)
    return replace(history, faults=_order(_any_fault(random, history.seconds) for _ in range(random.randint(1, 10))))


def make_moves(seed: int) -> History:
    """Members come and go as planned, one after another."""
    random = Random(seed)
    history = _begin(random, seed)
    times = [2.0 + 2.0 * position + random.random() for position in range(3)]
    faults = [Fault(at, random.choice(["join", "leave"]), random.randrange(8)) for at in times]
    return replace(history, members=max(history.members, 4), seconds=9.0, faults=tuple(faults))


def make_replacement(seed: int) -> History:
    """One member is killed, and later others come and go as planned."""
    random = Random(seed)
    history = make_moves(seed)
    kill = Fault(1.5, "kill", random.randrange(8))
    later = [replace(fault, at=fault.at + REPLACED_FROM - 1.0) for fault in history.faults]
    return replace(history, members=5, seconds=history.seconds + REPLACED_FROM, faults=(kill, *later))


def make_crash(seed: int) -> History:
    """One member is killed, or frozen for longer than its lease, wherever it is just then."""
    random = Random(seed)
    history = _begin(random, seed)
    kind = random.choice(["kill", "freeze", "suspend"])
    where = random.choice(["", "listener", *CALLS])
    fault = Fault(2.0 + random.random(), kind, random.randrange(8), where, seconds=8.0)
    return replace(history, members=max(history.members, 2), seconds=9.0, faults=(fault,))


def make_silence(seed: int) -> History:
    """Redis answers nobody for a while, and its clock goes on."""
    random = Random(seed)
    history = _begin(random, seed)
    kind = random.choice(["stall", "outage"])
    fault = Fault(2.0 + random.random(), kind, seconds=random.choice([0.5, 2.0, 4.0, 6.0]))
    return replace(history, seconds=11.0, faults=(fault,))


def make_lost(seed: int) -> History:
    """Calls get no reply; some arrive much later."""
    random = Random(seed)
    history = _begin(random, seed)
    faults = (_any_fault(random, history.seconds, "lose") for _ in range(random.randint(1, 6)))
    return replace(history, faults=_order(faults))


def _begin(random: Random, seed: int) -> History:
    shards = random.randint(1, 4)
    return History(seed, random.randint(1, 4), shards, shards + random.randint(0, 3), random.uniform(4.0, 10.0), ())


def _any_fault(random: Random, seconds: float, kind: str = "") -> Fault:
    at, member = random.uniform(0.0, seconds), random.randrange(8)
    kind = random.choice(
        ["join", "leave", "kill", "freeze", "suspend", "lose", "lose", "lose", "slow", "clock", "stall"]
    )
    if kind in ("kill", "freeze", "suspend"):
        where = random.choice(["", "listener", *CALLS])
        return Fault(at, kind, member, where, seconds=random.choice([0.5, 2.0, 4.0, 6.0]))
    if kind == "lose":
        how = random.choice(["request", "reply", "late"])
        return Fault(at, kind, member, random.choice(CALLS), how, random.choice([1.1, 2.0, 4.0]))
    if kind == "clock":
        return Fault(at, kind, seconds=random.choice([-3600.0, -5.0, -1.0, 1.0, 5.0, 3600.0]))
    return Fault(at, kind, member, seconds=random.choice([0.5, 2.0, 4.0]))


def _order(faults: object) -> tuple[Fault, ...]:
    return tuple(sorted(faults, key=lambda fault: fault.at))  # type: ignore[call-overload]


Redis = Callable[[int, int], ModelRedis]
Check = Callable[[World], None]


def check_nothing(world: World) -> None:
    """Check no more than what every run is checked for."""


def find_broken(history: History, redis: Redis = ModelRedis, check: Check = check_nothing) -> Broken | None:
    """Play a history; return the promise that it broke."""
    return _play(World(history, redis), check)


def shrink(history: History, redis: Redis = ModelRedis, check: Check = check_nothing) -> History:
    """Return a history that breaks as well, and of which no fault, member, shard or key can be left out."""

    def smaller() -> list[History]:
        faults = history.faults
        fewer = [replace(history, faults=faults[:at] + faults[at + 1 :]) for at in range(len(faults))]
        counts = {name: getattr(history, name) for name in ("members", "shards", "keys")}
        return fewer + [replace(history, **{name: count - 1}) for name, count in counts.items() if count > 1]

    while found := next((each for each in smaller() if find_broken(each, redis, check)), None):
        history = found
    return history


def describe(history: History, redis: Redis = ModelRedis, check: Check = check_nothing) -> str:
    """Tell what happens in a history that breaks."""
    world = World(history, redis)
    _play(world, check)
    return "\n".join([f"{history}", *world.log])


def _play(world: World, check: Check) -> Broken | None:
    try:
        world.run()
        check(world)
    except Broken as broken:
        return broken
    return None
