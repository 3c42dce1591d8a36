"""A store in memory: an outbox that outlives its broker's outages, but not its process. For tests, and to begin with."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import islice
from typing import Any, Literal
from uuid import uuid4

from silbo.errors import LeadLost, OutboxFull, StoreInvalid
from silbo.outbox.rows import NOTHING, Lead, OutboxStatus, Packed, Quota, Row, State, unpack

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Partition:
    owner: str | None = None
    epoch: int = 0
    until: float = 0.0
    sequence: int = 0  # the last that was given


class MemoryStore:
    """Keeps messages in this process, for the relay of this process.

    Args:
        clock: Seconds since 1970.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.id = uuid4().hex
        self.partitions = 1
        self._last_id = 0
        self._rows: dict[int, Row] = {}
        self._raw: dict[int, Packed] = {}
        self._waiting: list[list[int]] = [[]]  # by partition: pending, without a sequence; a heap of ids
        self._taken: list[list[int]] = [[]]  # by partition: with a sequence, in their order, not settled
        self._sent: dict[int, None] = {}  # in the order of sending
        self._leads = [_Partition()]
        self._unsent_rows = self._unsent_size = self._size = 0

    async def open(self, partitions: int | None = None) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        if partitions is None or partitions == self.partitions:
            return
        leads = any(its.owner is not None and its.until > self._clock() for its in self._leads)
        in_use = (
            f"{self._unsent_rows} messages wait in it" if self._unsent_rows else "a relay runs on it" if leads else ""
        )
        if in_use:
            problem = (
                f"has {self.partitions} partitions and {in_use}; send them and stop its relay before it has others"
            )
            raise StoreInvalid("MemoryStore", problem)
        self.partitions = partitions
        self._waiting, self._taken = [[] for _ in range(partitions)], [[] for _ in range(partitions)]
        self._leads += [_Partition() for _ in range(partitions - len(self._leads))]

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        size = sum(len(message.raw) for message in messages)
        if self._unsent_rows + len(messages) > quota.rows or self._unsent_size + size > quota.size:
            raise OutboxFull(self._unsent_rows, self._unsent_size, str(quota))
        while self._sent and (len(self._rows) + len(messages) > quota.rows or self._size + size > quota.size):
            self._delete(next(iter(self._sent)))  # what was sent makes room
        now = self._now()
        for message in messages:
            self._last_id += 1
            row = self._last_id
            self._raw[row] = message
            self._rows[row] = Row(
                row, message.partition, "pending", unpack(message.raw), 0, None, None, None, None, now, now, None
            )
            heappush(self._waiting[message.partition], row)
        self._unsent_rows += len(messages)
        self._unsent_size += size
        self._size += size

    # -- the relay's ----------------------------------------------------------------------------------------

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        now, its = self._clock(), self._leads[partition]
        if its.owner not in (None, owner) and its.until > now:
            return None
        if its.owner != owner or its.epoch <= above:
            its.owner, its.epoch = owner, max(its.epoch, above) + 1
        its.until = now + lease
        return Lead(partition, owner, its.epoch, _utc(its.until))

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        its = self._leads[lead.partition]
        if (its.owner, its.epoch) == (lead.owner, lead.epoch):
            its.owner = None

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self.settle(lead, sent, dead)
        its = self._check(lead)
        taken, waiting = self._taken[lead.partition], self._waiting[lead.partition]
        first = next(iter(taken or waiting), None)
        if first is None or ((due := self._rows[first].next_attempt_at) is not None and due > self._now()):
            return ()
        while waiting and len(taken) < limit:
            its.sequence = max(its.sequence + 1, int(self._clock() * 1e6))  # as in stores that can be restored
            row = heappop(waiting)
            self._rows[row] = replace(self._rows[row], sequence=its.sequence)
            taken.append(row)
        for row in taken[:limit]:
            attempts = self._rows[row].attempts + 1
            self._become(row, "sending", attempts=attempts, owner=lead.owner, epoch=lead.epoch, next_attempt_at=None)
        return [self._rows[row] for row in taken[:limit]]

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._check(lead)
        sent, buried = self._taken_by(lead, sent), self._taken_by(lead, dead)
        gone = {*sent, *buried}
        self._taken[lead.partition] = [row for row in self._taken[lead.partition] if row not in gone]
        for row in sent:
            self._become(row, "sent", error=None)
            self._sent[row] = None
            self._count_unsent(-1, row)
        for row in buried:
            self._become(row, "dead", error=dead[row])

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._check(lead)
        due = self._now() + timedelta(seconds=delay)
        for row in self._taken_by(lead, rows):
            self._become(row, "pending", error=error, next_attempt_at=due)

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        its = self._check(lead)
        its.sequence = max(its.sequence, above)
        taken = self._taken[lead.partition]
        once = [row for row in taken if self._rows[row].attempts == 1]
        self._taken[lead.partition] = [row for row in taken if row not in once]
        self._wait_again(once)

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        before, forgotten = self._now() - timedelta(seconds=retain), 0
        while self._sent and forgotten < limit and self._rows[row := next(iter(self._sent))].state_at <= before:
            self._delete(row)
            forgotten += 1
        return forgotten

    # -- to look at and to mend -----------------------------------------------------------------------------

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        counts: dict[State, int] = {"pending": 0, "sending": 0, "sent": 0, "dead": 0}
        for row in self._rows.values():
            counts[row.state] += 1
        waiting = [row for row in self._rows.values() if row.state in ("pending", "sending")]
        oldest = min((row.stored_at for row in waiting), default=None)
        due = min((row.next_attempt_at for row in waiting if row.next_attempt_at is not None), default=None)
        leads = {
            number: Lead(number, its.owner, its.epoch, _utc(its.until))
            for number, its in enumerate(self._leads[: self.partitions])
            if its.owner is not None and its.until > self._clock()
        }
        sent = next((self._rows[row].state_at for row in self._sent), None)
        return OutboxStatus(counts, self._unsent_size, oldest, sent, due, leads)

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return list(islice((row for row in self._rows.values() if row.state == state and row.id > after), limit))

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        dead = [row.id for row in self._rows.values() if row.state == "dead" and (rows is None or row.id in rows)]
        self._wait_again(dead)
        return len(dead)

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        found = (row for row in self._sent if since <= self._rows[row].state_at < before)
        again = list(islice(found, limit))
        for row in again:
            del self._sent[row]
            self._count_unsent(1, row)
        self._wait_again(again)
        return len(again)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        found = (row.id for row in self._rows.values() if row.state == state and row.state_at < before)
        gone = list(islice(found, limit))
        for row in gone:
            self._delete(row)
        return len(gone)

    async def aclose(self) -> None:
        """Nothing to do: it is gone with its process."""

    # -- rows -----------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return _utc(self._clock())

    def _check(self, lead: Lead) -> _Partition:
        its = self._leads[lead.partition]
        if its.epoch != lead.epoch or its.owner != lead.owner:
            raise LeadLost(lead.partition, lead.epoch)
        return its

    def _taken_by(self, lead: Lead, rows: Iterable[int]) -> list[int]:
        """Those that are still being sent under this very lead."""
        found = ((row, self._rows.get(row)) for row in rows)
        return [row for row, its in found if its is not None and (its.state, its.epoch) == ("sending", lead.epoch)]

    def _become(self, row: int, state: State, **changes: Any) -> None:
        self._rows[row] = replace(self._rows[row], state=state, state_at=self._now(), **changes)

    def _wait_again(self, rows: Iterable[int]) -> None:
        """As if never taken, in their old places."""
        for row in rows:
            self._become(row, "pending", attempts=0, sequence=None)
            heappush(self._waiting[self._rows[row].partition], row)

    def _count_unsent(self, sign: int, row: int) -> None:
        self._unsent_rows += sign
        self._unsent_size += sign * len(self._raw[row].raw)

    def _delete(self, row: int) -> None:
        if self._rows[row].state == "sent":
            del self._sent[row]
        else:
            self._count_unsent(-1, row)
        self._size -= len(self._raw[row].raw)
        del self._raw[row], self._rows[row]


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
