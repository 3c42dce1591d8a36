"""What an outbox stores: messages as rows, their states, and who leads a partition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias
from zlib import crc32

import msgspec

from silbo.formats import write
from silbo.message import Message

__all__ = ["NOTHING", "Lead", "OutboxStatus", "Packed", "Quota", "Row", "State", "pack", "partition_of", "unpack"]

State: TypeAlias = Literal["pending", "sending", "sent", "dead"]
"""``pending`` waits, ``sending`` is in a relay's hands, ``sent`` is kept for a replay, ``dead`` was refused for good."""

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


def pack(message: Message, partitions: int) -> Packed:
    """A message as it is stored: everything of it, the address and the class name too.

    Raises:
        MessageRefused: something in it can't be written, or it is larger than 1 MiB.
    """
    raw = write(message, {name: getattr(message, name) for name in _FIELDS})
    return Packed(partition_of(message.key, partitions), message.key, raw)


def unpack(raw: bytes) -> Message:
    """The message in what :func:`pack` made."""
    message: Any = _decode(raw)
    return message  # type: ignore[no-any-return]
