"""The division of the partitions among relays: the shares, and the choice of each relay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from silbo.brokers.memory import MemoryBroker
from silbo.errors import StoreUnavailable
from silbo.outbox import division
from silbo.outbox import relay as relaying
from silbo.outbox.division import Division, choose_partitions, share_of
from silbo.outbox.relay import Relay
from silbo.outbox.rows import Lead, Roster, SharedStore, View
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlalchemy import SQLAlchemyStore


def roster_of(relays: Iterable[str], leads: dict[int, str]) -> Roster:
    now = datetime.now(UTC)
    return Roster(tuple(relays), {number: Lead(number, owner, 1, now) for number, owner in leads.items()})


@pytest.mark.parametrize("partitions", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("relays", [1, 2, 3, 5, 8, 9, 70])
def test_shares_are_even_and_leave_nothing_over(partitions: int, relays: int) -> None:
    """They add up to all partitions, and differ by one at most, also with more relays than partitions."""
    shares = [share_of(rank, relays, partitions) for rank in range(relays)]
    assert sum(shares) == partitions
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("relays", range(1, 10))
def test_later_relay_takes_from_others_and_gives_back_to_them(relays: int) -> None:
    """No share grows when a relay joins, and none shrinks when any one leaves: no partition moves without need."""
    before = [share_of(rank, relays, 8) for rank in range(relays)]
    joined = [share_of(rank, relays + 1, 8) for rank in range(relays)]
    assert all(after <= share for share, after in zip(before, joined, strict=True))
    for gone in range(relays):
        left = [share_of(rank, relays - 1, 8) for rank in range(relays - 1)]
        stayed = before[:gone] + before[gone + 1 :]
        assert all(after >= share for share, after in zip(stayed, left, strict=True))


def test_relay_keeps_what_it_leads_and_fills_up_with_free_partitions() -> None:
    """Partitions of others are left alone, whatever they lead."""
    roster = roster_of(["a", "b"], {5: "a", 6: "a", 0: "b", 1: "b", 2: "b"})
    wanted = choose_partitions("a", roster, 8)
    assert {5, 6} <= wanted
    assert len(wanted) == 4
    assert wanted - {5, 6} <= {3, 4, 7}


def test_relay_gives_up_what_is_above_its_share() -> None:
    """It keeps as many of its own as its share says."""
    wanted = choose_partitions("a", roster_of(["a", "b", "c"], dict.fromkeys(range(8), "a")), 8)
    assert len(wanted) == 3
    assert choose_partitions("c", roster_of(["a", "b", "c"], dict.fromkeys(range(8), "a")), 8) == set()


def test_relay_that_is_not_counted_wants_nothing() -> None:
    """It was frozen for longer than its lease: the others have divided its partitions."""
    assert choose_partitions("a", roster_of(["b"], {}), 8) == set()


def test_relays_begin_with_different_free_partitions() -> None:
    """Two relays that look at the same moment seldom want the same ones."""
    choices = [choose_partitions(owner, roster_of(["a", "b", "c", "d"], {}), 64) for owner in "abcd"]
    assert all(first != second for first, second in pairwise(choices))
    assert len(frozenset().union(*choices)) > 32


# -- on a store ----------------------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SQLAlchemyStore]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}")
    store = SQLAlchemyStore(engine)
    await store.create()
    await store.open(8)
    yield store
    await store.aclose()
    await engine.dispose()


class Host:
    """A relay that only leads. It looks when it is told to."""

    def __init__(self, store: SQLAlchemyStore, name: str) -> None:
        self.store, self.name = store, name
        self.division = Division(store, name, lease=60.0)
        self.leads: dict[int, Lead] = {}

    async def look(self) -> None:
        await self.division.look()
        for number in self.division.wanted - self.leads.keys():
            if (lead := await self.store.lead(number, self.name, lease=60.0)) is not None:
                self.leads[number] = lead
        for number in self.leads.keys() - self.division.wanted:
            await self.store.resign(self.leads.pop(number))


async def settle(*hosts: Host) -> list[int]:
    """Let each host look three times. Return the numbers of their partitions."""
    for _ in range(3):
        for host in hosts:
            await host.look()
    assert sum(len(host.leads) for host in hosts) == len(frozenset().union(*(host.leads for host in hosts)))
    return [len(host.leads) for host in hosts]


async def test_partitions_move_to_relays_that_come_and_from_those_that_leave(store: SQLAlchemyStore) -> None:
    """Within three looks, and without waiting for a lease."""
    one, two, three = Host(store, "one"), Host(store, "two"), Host(store, "three")
    assert await settle(one) == [8]
    assert await settle(one, two) == [4, 4]
    assert await settle(one, two, three) == [3, 3, 2]
    stayed = set(two.leads)
    await one.division.leave()
    for lead in one.leads.values():
        await store.resign(lead)
    assert await settle(two, three) == [4, 4]
    assert stayed <= set(two.leads)


async def test_relay_whose_time_is_over_counts_no_longer(store: SQLAlchemyStore) -> None:
    """Its partitions are led by the others; when it looks again it is the last that has joined."""
    one, two = Host(store, "one"), Host(store, "two")
    await settle(one, two)
    async with store._engine.begin() as connection:
        for table in ("silbo_relay", "silbo_partition"):
            await connection.execute(
                text(f"UPDATE {table} SET until = '2026-01-01 00:00:00.000000' WHERE owner = 'one'")
            )
    lost = list(one.leads.values())
    assert await settle(two) == [8]
    view = await store.look(lost)
    assert (sorted(view.due), view.relays, view.free) == (sorted(one.leads), 1, 0)
    roster = await store.join("one", lease=60.0)
    assert list(roster.relays) == ["two", "one"]


async def test_lease_of_a_clock_that_was_ahead_is_cut(store: SQLAlchemyStore) -> None:
    """A dead relay counts, and leads, for one lease of those that live, not for a day."""
    await store.join("dead", lease=86400.0)
    await store.lead(0, "dead", lease=86400.0)
    await store.join("alive", lease=0.1)
    async with asyncio.timeout(30):
        while list((roster := await store.join("alive", lease=0.1)).relays) != ["alive"] or roster.leads:
            await asyncio.sleep(0.02)


async def test_idle_partition_is_renewed_and_woken(store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look serves all partitions that have no rows."""
    clock = 1000.0
    monkeypatch.setattr(division, "_now", lambda: clock)
    one = Host(store, "one")
    await one.look()
    lead = one.leads[3]
    resting = asyncio.ensure_future(one.division.rest(lead, woken := asyncio.Event(), has_sent=False))
    await asyncio.sleep(0)
    clock += 30.0
    assert not await one.division.look()
    assert one.division.renewed_at(3) == clock
    assert (await store.status()).leads[3].until > lead.until
    await store.resign(lead)
    await store.lead(3, "other", lease=60.0)
    assert await one.division.look() == {3}
    woken.set()
    await resting


async def test_partitions_are_told_of_after_a_look_that_failed(
    store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that has joined, and was not answered then, leads its partitions all the same."""
    one = Division(store, "one", lease=60.0)

    async def fail(_: object) -> View:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patched, pytest.raises(StoreUnavailable):
        patched.setattr(store, "look", fail)
        await one.look()
    assert await one.look() == one.wanted == set(range(8))


@pytest.mark.parametrize("leads", [True, False])
async def test_one_relay_cleans_up(store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch, leads: bool) -> None:
    """The one that leads the first partition; the others leave the sent rows alone."""
    monkeypatch.setattr(relaying, "FORGET_EVERY", 0.01)
    if not leads:
        await store.join("other", lease=60.0)
        for number in range(8):
            await store.lead(number, "other", lease=60.0)
    looks = forgets = 0
    look, forget = store.look, store.forget

    async def count_look(leads: Collection[Lead]) -> View:
        nonlocal looks
        looks += 1
        return await look(leads)

    async def count_forget(*, keep_sent: float, limit: int = 1000) -> int:
        nonlocal forgets
        forgets += 1
        return await forget(keep_sent=keep_sent, limit=limit)

    monkeypatch.setattr(store, "look", count_look)
    monkeypatch.setattr(store, "forget", count_forget)
    async with Relay(store, MemoryBroker(app="shop")) as relay:
        running = asyncio.create_task(relay.run())
        async with asyncio.timeout(30):
            while looks < 10 or (leads and not forgets):
                await asyncio.sleep(0.01)
        relay.stop()
        await running
    assert (forgets > 0) is leads


def test_store_without_hosts_is_not_shared() -> None:
    """Its relay leads all partitions, as before."""
    assert not isinstance(MemoryStore(), SharedStore)
