"""What an outbox stores: messages as rows, their states, and who leads a partition; and what a store has to offer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args, runtime_checkable
from zlib import crc32

import msgspec

from silbo.message import Message
from silbo.wire.formats import to_json

__all__ = [
    "NOTHING",
    "STATES",
    "Lead",
    "OutboxStatus",
    "OutboxStore",
    "Packed",
    "Quota",
    "Row",
    "SessionStore",
    "State",
    "pack",
    "partition_of",
    "unpack",
]

State: TypeAlias = Literal["pending", "sending", "sent", "dead"]
"""``pending`` waits, ``sending`` is in a relay's hands, ``sent`` is kept for a replay, ``dead`` was refused for good."""

STATES: Final[tuple[State, ...]] = get_args(State)
"""All states, in the order of a row's way."""

NOTHING: Final[Mapping[int, str]] = MappingProxyType({})

_FIELDS: Final = tuple(field.name for field in fields(Message))
_decode: Final = msgspec.json.Decoder(Message).decode


@dataclass(frozen=True, slots=True)
class Packed:
    """One message as a store gets it."""

    partition: int
    key: str | None
    raw: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """A stored message.

    Attributes:
        id: The store's own; ascending in the order of commit, for one key.
        attempts: How often a relay has taken it, since it was stored or was made to be sent again.
        error: Why the last attempt failed.
        sequence: Its place in what is sent of its partition, given when a relay first takes it.
        owner: The relay that took it last.
        epoch: That relay's.
        stored_at: When it was stored: aware, UTC, as the others.
        state_at: Since when it is in its state.
        next_attempt_at: Not to be taken before; None where it needn't wait.
    """

    id: int
    partition: int
    state: State
    message: Message
    attempts: int
    error: str | None
    sequence: int | None
    owner: str | None
    epoch: int | None
    stored_at: datetime
    state_at: datetime
    next_attempt_at: datetime | None


@dataclass(frozen=True, slots=True)
class Lead:
    """The right to send a partition's rows, as long as nobody has a greater epoch."""

    partition: int
    owner: str
    epoch: int
    until: datetime


@dataclass(frozen=True, slots=True)
class Quota:
    """How much may wait to be sent: pending, sending and dead rows. Past either bound a publish is refused.

    What was sent is kept for a replay in the room that is left: where it is needed, the oldest of it goes before ``retain``
    is over, so that a file never outgrows its quota. An hour of 1,000 messages a second are 3,600,000 rows. In a database of
    the host's (``SQLAlchemyStore``) what was sent takes no room of the quota's and stays for all of ``retain``.
    """

    rows: int = 1_000_000
    size: int = 1 << 30
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.rows} messages or {self.size} bytes"


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """What an outbox holds.

    Attributes:
        counts: Rows in each state.
        size: Bytes of the rows that count for the quota.
        oldest_at: When the oldest row was stored that is neither sent nor dead.
        oldest_sent_at: When the oldest row was sent of those that are kept: no replay reaches back further.
        next_attempt_at: When the first waiting row is tried again.
        leads: Who leads, by partition.
    """

    counts: Mapping[State, int]
    size: int
    oldest_at: datetime | None
    oldest_sent_at: datetime | None
    next_attempt_at: datetime | None
    leads: Mapping[int, Lead]


def partition_of(key: str | None, partitions: int) -> int:
    """Which partition keeps the messages of a key; those without one are in the first."""
    return 0 if key is None else crc32(key.encode()) % partitions


class OutboxStore(Protocol):
    """Where an outbox keeps its messages. Times are the store's own clock's.

    Every method raises :class:`~silbo.errors.StoreUnavailable` when the store can't be used at the moment. One that was
    not opened is a RuntimeError, where there is something to open.
    """

    @property
    def id(self) -> str:
        """Of the store, given when it was made: part of the source's name for the broker. Known once opened."""

    @property
    def partitions(self) -> int:
        """How many there are. Known once opened."""

    async def open(self, partitions: int | None = None) -> None:
        """Connect; make the schema where there is none, bring an older one up to date.

        Args:
            partitions: How many it is to have; None takes what is there, or 1.

        Raises:
            StoreInvalid: no store, a newer schema, or other partitions while rows wait or a relay leads.
        """

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store all or none, in this order; returns when they are committed.

        Raises:
            OutboxFull: they would go past the quota; nothing was stored.
            StoreInvalid: it has other partitions by now; nothing was stored.
            DeliveryUnknown: the commit was not answered: they may be stored.
        """

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """Take or renew the lead of a partition, for ``lease`` seconds.

        Args:
            partition: From 0.
            owner: Names the relay, another in each process.
            lease: Seconds.
            above: The epoch has to be greater than this one: the broker has seen it.

        Returns:
            None while another owner's lease runs. The same epoch for a renewal, a greater one for a take-over.
        """

    async def resign(self, lead: Lead) -> None:
        """End the lease, so that another relay need not wait for it. Nothing happens where it is lost already."""

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """Rows to send next: those that have a sequence already, then the oldest pending ones, which get theirs now.

        They are ``sending`` from then on, with one more attempt, under this lead. Empty while the first of them waits
        for its next attempt. A new sequence is above the last one and not below the store's clock in microseconds, so
        that a store that was restored from an older copy gives none for a second time.

        Args:
            lead: Of their partition.
            limit: The most rows; a store may give fewer where they are large.
            sent: What to :meth:`settle` before, in the same transaction.
            dead: The same.

        Raises:
            LeadLost: another relay leads.
        """

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """Mark rows, by their id, as ``sent``; or as ``dead``, with the error.

        Only those that are ``sending`` and were taken under this very lead.

        Raises:
            LeadLost: another relay leads.
        """

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """Put rows back to ``pending``, their sequences kept, for another attempt after ``delay`` seconds; as :meth:`settle`.

        Raises:
            LeadLost: another relay leads.
        """

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """Give rows that were taken once, and all later ones, new sequences above this one: the broker was ahead.

        That is where a store was restored from an older copy and its clock was set back, too.

        Raises:
            LeadLost: another relay leads.
        """

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """Delete the oldest rows that were sent more than ``retain`` seconds ago; how many, at most ``limit``."""

    async def status(self) -> OutboxStatus:
        """What there is now."""

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """Rows in a state, by id, above ``after``."""

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """Make dead rows pending again, as if never taken, all of them or these; how many."""

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """Make rows pending again that were sent from ``since`` on and before ``before``; how many, at most ``limit``.

        As if never taken: they get new sequences, so that they are sent again, before what has not been taken yet.
        """

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """Delete rows that have been in a state since before this time; how many, at most ``limit``."""

    async def aclose(self) -> None:
        """Close what was opened. May be called twice."""


@runtime_checkable
class SessionStore(OutboxStore, Protocol):
    """A store in the host's own database, which can store in the host's own transaction.

    Attributes:
        on_commit: Called, in the loop's thread, when such a transaction was committed.
    """

    on_commit: Callable[[], object] | None

    @property
    def in_session(self) -> bool:
        """Whether what this task adds now is stored in a session of the host's."""

    async def add_in(self, session: Any, messages: Sequence[Packed], quota: Quota) -> None:
        """Store in the transaction of a session, which is not committed here.

        Raises:
            OutboxFull: they would go past the quota; nothing was stored.
        """


def pack(message: Message, partitions: int) -> Packed:
    """A message as it is stored: everything of it, the address and the class name too.

    Raises:
        MessageRefused: something in it can't be written, or it is larger than 1 MiB.
    """
    raw = to_json(message, {name: getattr(message, name) for name in _FIELDS})
    return Packed(partition_of(message.key, partitions), message.key, raw)


def unpack(raw: bytes) -> Message:
    """The message in what :func:`pack` made."""
    message: Any = _decode(raw)
    return message  # type: ignore[no-any-return]
