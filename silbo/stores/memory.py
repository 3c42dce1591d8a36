"""A store in memory, for tests and for a first try: messages survive an outage of the broker, but not their process."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from heapq import heappop, heappush
from itertools import islice
from typing import Any, Literal
from uuid import uuid4

from silbo._loops import LoopBinding
from silbo.errors import LeadLost, OutboxFull, StoreInvalid
from silbo.outbox.rows import (
    FOUND_AT_MOST,
    LEASE,
    NOTHING,
    STATES,
    Lead,
    OutboxStatus,
    Packed,
    Quota,
    Row,
    State,
    has_to_wait,
    unpack,
)

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Partition:
    """The lead of a partition, and the last sequence that was given in it."""

    owner: str | None = None
    epoch: int = 0
    until: float = 0.0
    sequence: int = 0


class MemoryStore:
    """Keeps messages in this process, for the relay of this process, in one event loop at a time.

    Args:
        clock: Returns seconds since 1970.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._binding = LoopBinding("MemoryStore")
        self.id = uuid4().hex
        self.partitions = 1
        self._last_id = 0
        self._rows: dict[int, Row] = {}
        self._packed: dict[int, Packed] = {}
        self._waiting: list[list[int]] = [[]]  # for each partition: pending rows without a sequence; a heap of ids
        self._taken: list[list[int]] = [[]]  # for each partition: unsettled rows with a sequence, in its order
        self._sent: OrderedDict[int, None] = OrderedDict()  # in the order of sending; finds its first at once
        self._leads = [_Partition()]
        self._unsent_rows = 0
        self._unsent_size = 0  # bytes
        self._size = 0  # bytes of all rows

    async def open(self, partitions: int | None = None, *, lease: float = LEASE) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("open")
        if partitions is None or partitions == self.partitions:
            return
        now = self._clock()
        for led in self._leads:
            led.until = min(led.until, now + lease)
        leads = any(led.owner is not None and led.until > now for led in self._leads)
        in_use = (
            f"{self._unsent_rows} messages wait in it" if self._unsent_rows else "a relay runs on it" if leads else ""
        )
        if in_use:
            problem = (
                f"has {self.partitions} partitions and {in_use}; send them and stop its relay before it has others"
            )
            raise StoreInvalid("MemoryStore", problem)
        self.partitions = partitions
        self._waiting = [[] for _ in range(partitions)]
        self._taken = [[] for _ in range(partitions)]
        self._leads += [_Partition() for _ in range(partitions - len(self._leads))]

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("add")
        size = sum(len(message.raw) for message in messages)
        if self._unsent_rows + len(messages) > quota.rows or self._unsent_size + size > quota.size:
            raise OutboxFull(self._unsent_rows, self._unsent_size, str(quota))
        while self._sent and (len(self._rows) + len(messages) > quota.rows or self._size + size > quota.size):
            self._delete(next(iter(self._sent)))  # what was sent makes room
        now = self._now()
        for message in messages:
            self._last_id += 1
            row = self._last_id
            self._packed[row] = message
            self._rows[row] = Row(
                id=row,
                partition=message.partition,
                state="pending",
                message=unpack(message.raw),
                attempts=0,
                error=None,
                sequence=None,
                owner=None,
                epoch=None,
                stored_at=now,
                state_at=now,
                next_attempt_at=None,
            )
            heappush(self._waiting[message.partition], row)
        self._unsent_rows += len(messages)
        self._unsent_size += size
        self._size += size

    # -- the relay's ----------------------------------------------------------------------------------------

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("lead")
        now = self._clock()
        led = self._leads[partition]
        if led.owner not in (None, owner) and led.until > now:
            led.until = min(led.until, now + lease)
            return None
        if led.owner != owner or led.epoch <= above:
            led.owner = owner
            led.epoch = max(led.epoch, above) + 1
        led.until = now + lease
        return Lead(partition=partition, owner=owner, epoch=led.epoch, until=_to_datetime(led.until))

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        led = self._leads[lead.partition]
        if (led.owner, led.epoch) == (lead.owner, lead.epoch):
            led.owner = None

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self.settle(lead, sent, dead)
        led = self._check_lead(lead)
        taken = self._taken[lead.partition]
        waiting = self._waiting[lead.partition]
        first = self._rows.get(next(iter(taken or waiting), 0))
        if first is None or has_to_wait(first.state_at, first.next_attempt_at, self._now()):
            return ()
        while waiting and len(taken) < limit:
            led.sequence = max(led.sequence + 1, int(self._clock() * 1e6))  # as in stores that can be restored
            row = heappop(waiting)
            self._rows[row] = self._rows[row]._replace(sequence=led.sequence)
            taken.append(row)
        for row in taken[:limit]:
            attempts = self._rows[row].attempts + 1
            self._change(row, "sending", attempts=attempts, owner=lead.owner, epoch=lead.epoch, next_attempt_at=None)
        return [self._rows[row] for row in taken[:limit]]

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._check_lead(lead)
        sent = self._taken_by(lead, sent)
        buried = self._taken_by(lead, dead)
        gone = {*sent, *buried}
        self._taken[lead.partition] = [row for row in self._taken[lead.partition] if row not in gone]
        for row in sent:
            self._change(row, "sent", error=None)
            self._sent[row] = None
            self._count_unsent(-1, row)
        for row in buried:
            self._change(row, "dead", error=dead[row])

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._check_lead(lead)
        due = self._now() + timedelta(seconds=delay)
        for row in self._taken_by(lead, rows):
            self._change(row, "pending", error=error, next_attempt_at=due)

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        led = self._check_lead(lead)
        led.sequence = max(led.sequence, above)
        taken = self._taken[lead.partition]
        taken_once = [row for row in taken if self._rows[row].attempts == 1]
        self._taken[lead.partition] = [row for row in taken if row not in taken_once]
        self._wait_again(taken_once)

    async def forget(self, *, keep_sent: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        before = self._now() - timedelta(seconds=keep_sent)
        forgotten = 0
        while self._sent and forgotten < limit and self._rows[row := next(iter(self._sent))].state_at <= before:
            self._delete(row)
            forgotten += 1
        return forgotten

    # -- to look at and to mend -----------------------------------------------------------------------------

    async def read_clock(self) -> datetime:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return self._now()

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("status")
        counts = dict.fromkeys(STATES, 0)
        for row in self._rows.values():
            counts[row.state] += 1
        waiting = [row for row in self._rows.values() if row.state in ("pending", "sending")]
        oldest = min((row.stored_at for row in waiting), default=None)
        due = min((row.next_attempt_at for row in waiting if row.next_attempt_at is not None), default=None)
        leads = {
            number: Lead(partition=number, owner=led.owner, epoch=led.epoch, until=_to_datetime(led.until))
            for number, led in enumerate(self._leads[: self.partitions])
            if led.owner is not None and led.until > self._clock()
        }
        sent = next((self._rows[row].state_at for row in self._sent), None)
        return OutboxStatus(
            counts=counts,
            size=self._unsent_size,
            oldest_at=oldest,
            oldest_sent_at=sent,
            next_attempt_at=due,
            leads=leads,
        )

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("rows")
        return list(islice((row for row in self._rows.values() if row.state == state and row.id > after), limit))

    async def find(self, message_id: str) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("find")
        return list(islice((row for row in self._rows.values() if row.message.message_id == message_id), FOUND_AT_MOST))

    async def retry(self, rows: Collection[int] | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[int]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("retry")
        wanted = [row for row in sorted(self._rows if rows is None else set(rows)) if row > after]
        dead = list(islice((row for row in wanted if row in self._rows and self._rows[row].state == "dead"), limit))
        self._wait_again(dead)
        return dead

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("replay")
        found = (row for row in self._sent if since <= self._rows[row].state_at < before)
        again = list(islice(found, limit))
        for row in again:
            del self._sent[row]
            self._count_unsent(1, row)
        self._wait_again(again)
        return len(again)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        self._binding.enter("purge")
        found = (row.id for row in self._rows.values() if row.state == state and row.state_at < before)
        gone = list(islice(found, limit))
        for row in gone:
            self._delete(row)
        return len(gone)

    async def aclose(self) -> None:
        """Do nothing: the messages are gone when the process ends."""

    # -- rows -----------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return _to_datetime(self._clock())

    def _check_lead(self, lead: Lead) -> _Partition:
        """Check that the lead is still the partition's. Return the partition.

        Raises:
            LeadLost: another relay leads the partition.
        """
        led = self._leads[lead.partition]
        if (led.owner, led.epoch) != (lead.owner, lead.epoch):
            raise LeadLost(lead.partition, lead.epoch)
        return led

    def _taken_by(self, lead: Lead, rows: Iterable[int]) -> list[int]:
        """Return those of the rows that are ``sending`` and were taken under this very lead."""
        found = ((row_id, self._rows.get(row_id)) for row_id in rows)
        return [
            row_id for row_id, row in found if row is not None and (row.state, row.epoch) == ("sending", lead.epoch)
        ]

    def _change(self, row_id: int, state: State, **changes: Any) -> None:
        self._rows[row_id] = self._rows[row_id]._replace(state=state, state_at=self._now(), **changes)

    def _wait_again(self, rows: Iterable[int]) -> None:
        """Make rows pending as if they were never taken, ordered by their ids."""
        for row_id in rows:
            self._change(row_id, "pending", attempts=0, sequence=None)
            heappush(self._waiting[self._rows[row_id].partition], row_id)

    def _count_unsent(self, sign: int, row_id: int) -> None:
        self._unsent_rows += sign
        self._unsent_size += sign * len(self._packed[row_id].raw)

    def _delete(self, row_id: int) -> None:
        if self._rows[row_id].state == "sent":
            del self._sent[row_id]
        else:
            self._count_unsent(-1, row_id)
        self._size -= len(self._packed[row_id].raw)
        del self._packed[row_id]
        del self._rows[row_id]


def _to_datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
