"""The division of a store's partitions among the relays of several hosts, as one relay sees it. Nobody leads the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from silbo.outbox.rows import Lead, Roster, SharedStore

__all__ = ["LONGEST_LOOK", "SHORTEST_LOOK", "Division", "choose_partitions", "share_of"]

logger = logging.getLogger(__name__)

SHORTEST_LOOK: Final = 0.02
"""Seconds between two looks at the store after rows were found or sent."""
LONGEST_LOOK: Final = 0.5
"""Seconds between two looks at a store in which nothing happens."""
LOOK_GROWTH: Final = 1.5
"""A pause between two looks that find nothing is this many times as long as the one before."""


def share_of(rank: int, relays: int, partitions: int) -> int:
    """Return the number of partitions that a relay leads: all shares add up to ``partitions`` and differ by one at most.

    When a later relay joins, no share grows; when one leaves, no share shrinks. So no partition moves without need.

    Args:
        rank: The number of relays that joined before this one.
        relays: The number of all relays.
        partitions: The number of partitions.
    """
    return -((rank - partitions) // relays)


def choose_partitions(owner: str, roster: Roster, partitions: int) -> frozenset[int]:
    """Return the partitions that a relay should lead: first those that it leads already, then free ones, up to its share."""
    if owner not in roster.relays:
        return frozenset()
    share = share_of(roster.relays.index(owner), len(roster.relays), partitions)
    led = sorted(number for number, lead in roster.leads.items() if lead.owner == owner)
    free = [number for number in range(partitions) if number not in roster.leads]
    free.sort(key=lambda number: hash((owner, number)))  # each relay in another order: they seldom try the same one
    return frozenset([*led, *free][:share])


class Division:
    """Says which partitions a relay should lead, and when rows wait in those that are idle.

    One look at the store, a query, serves all partitions. Looks are frequent while rows come, and rare in a quiet store.

    Args:
        store: The store that the relays share.
        owner: The relay.
        lease: Seconds.

    Attributes:
        wanted: The partitions that this relay should lead.
        is_over: True after the last look: ``wanted`` does not grow any more.
        interval: Seconds until the next look.
        look_now: Set if the next look should not wait for so long.
    """

    def __init__(self, store: SharedStore, owner: str, lease: float) -> None:
        self.wanted: frozenset[int] = frozenset()
        self.is_over = False
        self.interval = SHORTEST_LOOK
        self.look_now = asyncio.Event()
        self._store = store
        self._owner = owner
        self._lease = lease
        self._roster = Roster(relays=(), leads={})
        self._told: frozenset[int] = frozenset()  # the wanted partitions that a look has returned
        self._join_at = float("-inf")  # the loop's time, as the next
        self._renewed_at: dict[int, float] = {}  # by partition
        self._idle: dict[int, Lead] = {}  # by partition
        self._looked_at = float("-inf")
        self._soon: asyncio.TimerHandle | None = None  # the look that look_soon has asked for

    def renewed_at(self, partition: int) -> float:
        """Return the loop's time when the lease of a partition was renewed last while it was idle; minus infinity if never."""
        return self._renewed_at.get(partition, float("-inf"))

    async def rest(self, lead: Lead, woken: asyncio.Event, *, has_sent: bool) -> None:
        """Wait until a partition without rows has some, or is no longer wanted. Meanwhile its lease is renewed."""
        self._idle[lead.partition] = lead
        if has_sent:
            self.interval = SHORTEST_LOOK
            self.look_now.set()
        try:
            await woken.wait()
        finally:
            del self._idle[lead.partition]

    def look_soon(self) -> None:
        """Let the next look come at once, but not before the shortest pause since the last one is over."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_at(self._looked_at + SHORTEST_LOOK, self._look_at_once)

    def _look_at_once(self) -> None:
        self._soon = None
        self.look_now.set()

    async def look(self) -> Collection[int]:
        """Look at the store. Return the partitions to wake: those with rows, and those that are wanted or no longer wanted.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        self.look_now.clear()
        self._looked_at = _now()
        joins = self._looked_at >= self._join_at
        if joins:
            await self._join()
        view = await self._store.look(tuple(self._idle.values()))
        led = sum(lead.owner == self._owner for lead in self._roster.leads.values())
        if not joins and (view.relays != len(self._roster.relays) or (view.free and led < self._share())):
            await self._join()
        changed = self._told ^ self.wanted  # also of an earlier look that failed after it had joined
        self._told = self.wanted
        if view.due or changed:
            self.interval = SHORTEST_LOOK
        else:
            longest = min(LONGEST_LOOK, self._lease / 3)
            self.interval = min(longest, self.interval * LOOK_GROWTH)
        return {*view.due, *changed}

    async def leave(self) -> None:
        """Let the other relays divide the partitions among themselves."""
        await self._store.leave(self._owner)

    def _share(self) -> int:
        relays = self._roster.relays
        if self._owner not in relays:
            return self._store.partitions
        return share_of(relays.index(self._owner), len(relays), self._store.partitions)

    async def _join(self) -> None:
        now = _now()
        idle = tuple(self._idle)
        self._roster = await self._store.join(self._owner, lease=self._lease, idle=idle)
        self._renewed_at.update(dict.fromkeys(idle, now))
        self._join_at = now + self._lease / 3
        wanted = choose_partitions(self._owner, self._roster, self._store.partitions)
        if wanted != self.wanted:
            self.wanted = wanted
            extra = {"partitions": sorted(wanted), "relays": len(self._roster.relays)}
            logger.info("share of the partitions has changed", extra=extra)


def _now() -> float:
    return asyncio.get_running_loop().time()
