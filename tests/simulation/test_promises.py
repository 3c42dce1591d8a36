"""The promises of a sharded group's members, in thousands of simulated histories; and that the simulation notices each safeguard's absence.

A history that breaks a promise is printed with its seed, and made as short as it can be. SILBO_SIMULATION_SEED=1 begins the
long run with that seed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import pytest

from silbo.brokers.redis import members
from silbo.brokers.redis.members import Membership
from tests.simulation.histories import (
    REPLACED_FROM,
    describe,
    find_broken,
    make_crash,
    make_lost,
    make_moves,
    make_replacement,
    make_silence,
    make_storm,
    shrink,
)
from tests.simulation.redis_model import Lease, ModelRedis
from tests.simulation.world import LEASE, History, World

MAKERS = {
    "storm": make_storm,  # order, nothing lost, nothing settled by another epoch than the newest, all at rest in the end
    "moves": make_moves,  # and nothing has its effect twice, shards that move stand still for less than a second, the others not at all
    "replacement": make_replacement,  # and so it is when one was killed before
    "crash": make_crash,  # and for less than a lease and a second
    "silence": make_silence,  # and no shard moves
    "lost": make_lost,
}


def check(world: World, kind: str) -> None:
    if kind == "moves":
        world.check_doubles()
    if kind == "replacement":
        world.check_standstill(1.0, since=REPLACED_FROM)
    if kind in ("moves", "replacement", "crash", "silence"):
        world.check_moves()
    if kind in ("moves", "crash"):
        world.check_standstill(1.0 if kind == "moves" else LEASE + 1.0)


def play(kind: str, seed: int) -> None:
    """Play a history, and fail with the shortest one that breaks a promise as well."""
    history, checked = MAKERS[kind](seed), Checked(kind)
    if broken := find_broken(history, check=checked):
        shortest = shrink(history, check=checked)
        pytest.fail(f"{kind} {seed}: {broken}\n{describe(shortest, check=checked)}", pytrace=False)


class Checked:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, world: World) -> None:
        check(world, self._kind)


@pytest.mark.parametrize(
    ("kind", "histories"),
    [("storm", 40), ("moves", 8), ("replacement", 8), ("crash", 20), ("silence", 6), ("lost", 15)],
)
def test_promises_hold(kind: str, histories: int) -> None:
    for seed in range(histories):
        play(kind, seed)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "histories"),
    [("storm", 2000), ("moves", 300), ("replacement", 300), ("crash", 500), ("silence", 200), ("lost", 500)],
)
def test_promises_hold_in_thousands_of_histories(kind: str, histories: int) -> None:
    first = int(os.environ.get("SILBO_SIMULATION_SEED") or secrets.randbelow(10**9))
    print(f"SILBO_SIMULATION_SEED={first}")
    for seed in range(first, first + histories):
        play(kind, seed)


# -- without a safeguard ----------------------------------------------------------------------------------------


def without_epoch(*scripts: str) -> type[ModelRedis]:
    """A Redis whose scripts look at the owner alone."""

    class WithoutEpoch(ModelRedis):
        def is_led(self, shard: int, member: str, epoch: int, script: str) -> bool:
            return script in scripts or super().is_led(shard, member, epoch, script)

    return WithoutEpoch


class LeaseIsNoBar(ModelRedis):
    """A shard may be taken at any time."""

    def is_free(self, lease: Lease, member: str, now: int) -> bool:
        return True


class ReadsAnyway(ModelRedis):
    """A read of new entries does not look at what the reader knows of."""

    def is_up_to_date(self, given: int, believed: int) -> bool:
        return True


class EpochStands(ModelRedis):
    """The epoch does not grow."""

    def next_epoch(self, lease: Lease, now: int) -> int:
        return max(lease.epoch, 1)


class EpochForgets(ModelRedis):
    """The epoch is Redis's clock alone."""

    def next_epoch(self, lease: Lease, now: int) -> int:
        return now


class TimesToCome(ModelRedis):
    """A time from before the clock was set back counts as it is."""

    def bound(self, time: int, latest: int) -> int:
        return time


@pytest.mark.parametrize(
    ("redis", "kind", "first"),
    [
        pytest.param(without_epoch("read"), "crash", 0, id="epoch of reads"),
        pytest.param(without_epoch("ack"), "crash", 0, id="epoch of acknowledgements"),
        pytest.param(without_epoch("renew"), "crash", 0, id="epoch of renewals"),
        pytest.param(without_epoch("release"), "storm", 115, id="epoch of releases"),
        pytest.param(ReadsAnyway, "lost", 65, id="late read"),
        pytest.param(LeaseIsNoBar, "moves", 0, id="lease"),
        pytest.param(EpochStands, "crash", 0, id="growing epoch"),
        pytest.param(EpochForgets, "storm", 0, id="epoch above the last"),
        pytest.param(TimesToCome, "storm", 50, id="clock set back"),
    ],
)
def test_simulation_notices_a_script_without_its_safeguard(redis: type[ModelRedis], kind: str, first: int) -> None:
    """The first seed is one before which nothing is noticed: it saves time."""
    assert find_first(kind, redis, first) is not None


def takes_silence_for_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that was silent for a lease is dead, also if Redis was frozen meanwhile."""
    trust_at = property(lambda self: 0.0, lambda self, at: None)
    monkeypatch.setattr(Membership, "_trust_at", trust_at, raising=False)


def keeps_what_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member gives nothing away to one that joins."""
    monkeypatch.setattr(
        Membership,
        "_mine",
        property(lambda self: self.all | self._leases.keys(), lambda self, mine: setattr(self, "all", mine)),
        raising=False,
    )


def beats_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "BEAT_EVERY", 1.2)


def forgets_to_renew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "note_renewed", lambda self, command, is_leading: [])


@pytest.mark.parametrize(
    ("take_out", "kind", "first"),
    [
        (takes_silence_for_death, "silence", 0),
        (keeps_what_is_not_its_own, "moves", 0),
        (beats_seldom, "moves", 0),
        (forgets_to_renew, "moves", 110),
    ],
)
def test_simulation_notices_a_member_without_its_safeguard(
    take_out: Callable[[pytest.MonkeyPatch], None], kind: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_out(monkeypatch)
    assert find_first(kind, ModelRedis, first) is not None


def find_first(kind: str, redis: type[ModelRedis], first: int = 0) -> History | None:
    """Return the first history of a kind that breaks a promise."""
    for seed in range(first, first + 400):
        history = MAKERS[kind](seed)
        if find_broken(history, redis, Checked(kind)):
            print(f"{kind} {seed}")
            return history
    return None


def test_a_broken_history_is_made_short() -> None:
    """The report is a history of which nothing can be left out, with the events in it."""
    redis = without_epoch("read")
    history = find_first("storm", redis)
    assert history is not None
    shortest = shrink(history, redis)
    assert len(shortest.faults) == 1 and shortest.faults[0].kind in ("freeze", "suspend", "lose", "stall", "outage")
    assert "fence: read of shard" in describe(shortest, redis)
