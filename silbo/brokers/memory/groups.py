"""What the groups of a memory broker have in hand."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from silbo.errors import Gap
from silbo.message import Delivery

__all__ = ["DeadLetter", "Group", "GroupReceiver"]

RECEIVE_WAIT: Final = 0.5
"""Seconds that a receive waits for something to come."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A delivery that a group has given up.

    Attributes:
        group: The group's name; others are not concerned.
        error: Why, of its last attempt.
        attempts: How often its listeners ran; 0 for what could not be read.
    """

    delivery: Delivery
    group: str
    error: str
    attempts: int


class Group:
    """What a group has not acknowledged: messages that wait, and those that a receiver has in hand."""

    def __init__(self, name: str, addresses: frozenset[str]) -> None:
        self.name: Final = name
        self._addresses = addresses
        self.waiting: deque[Delivery] = deque()
        self.pending: dict[str, tuple[Delivery, GroupReceiver]] = {}
        self.attempts: dict[str, int] = {}
        self.dropped = 0
        self._sleeping: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.pending)

    def append(self, deliveries: Iterable[Delivery], *, keep: int | None) -> None:
        """Take in what is for this group; drop the oldest of what waits when that is more than ``keep``."""
        self.waiting.extend(delivery for delivery in deliveries if delivery.address in self._addresses)
        while keep is not None and self.waiting and len(self) > keep:
            self.waiting.popleft()
            self.dropped += 1
        self._wake()

    def give_back(self, receiver: GroupReceiver) -> None:
        """What a receiver had in hand waits again, in its old place."""
        returned = [delivery for delivery, holder in self.pending.values() if holder is receiver]
        for delivery in returned:
            del self.pending[delivery.id]
        again = [replace(delivery, attempt=2 + self.attempts.get(delivery.id, 0)) for delivery in returned]
        self.waiting = deque(sorted([*again, *self.waiting], key=lambda delivery: int(delivery.id)))
        self._wake()

    async def something(self) -> None:
        """Return when something waits, or after half a second."""
        if self.waiting or self.dropped:
            return
        woken = asyncio.get_running_loop().create_future()
        self._sleeping.add(woken)
        try:
            await asyncio.wait([woken], timeout=RECEIVE_WAIT)
        finally:
            self._sleeping.discard(woken)

    def _wake(self) -> None:
        for woken in self._sleeping:
            if not woken.done():
                woken.set_result(None)


class GroupReceiver:
    """One consumer of a group. What it has in hand when it is closed goes to the others."""

    skips_own_instance = False
    keep_every: float | None = None  # nobody takes over from a consumer that is open

    def __init__(self, group: Group, make_room: Callable[[], None], dead: deque[DeadLetter]) -> None:
        self._group, self._make_room, self._dead = group, make_room, dead

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        """See :class:`~silbo.protocols.Receiver`."""
        group = self._group
        await group.something()
        taken: list[Delivery | Gap] = []
        if group.dropped:
            reason = "the group fell behind, and its oldest messages were dropped"
            taken.append(Gap(group.name, reason, count=group.dropped))
            group.dropped = 0
        for _ in range(min(limit, len(group.waiting))):
            delivery = group.waiting.popleft()
            group.pending[delivery.id] = delivery, self
            taken.append(delivery)
        return taken

    async def ack(self, *deliveries: Delivery) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        for delivery in deliveries:
            self._group.pending.pop(delivery.id, None)
            self._group.attempts.pop(delivery.id, None)
        self._make_room()

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        """See :class:`~silbo.protocols.Receiver`."""
        return [delivery for delivery in deliveries if not self._holds(delivery)]

    async def count(self, delivery: Delivery) -> int:
        """See :class:`~silbo.protocols.Receiver`."""
        attempts = self._group.attempts[delivery.id] = self._group.attempts.get(delivery.id, 0) + 1
        return attempts

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        """See :class:`~silbo.protocols.Receiver`."""
        if not self._holds(delivery):
            return False
        self._dead.append(DeadLetter(delivery, self._group.name, error, attempts))
        await self.ack(delivery)
        return True

    async def aclose(self) -> None:
        """See :class:`~silbo.protocols.Receiver`."""
        self._group.give_back(self)

    def _holds(self, delivery: Delivery) -> bool:
        _, holder = self._group.pending.get(delivery.id, (None, None))
        return holder is self
