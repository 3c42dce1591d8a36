"""The rows that an outbox stores, and the protocol of its store."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from itertools import product
from types import MappingProxyType, NoneType
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, get_args, runtime_checkable
from zlib import crc32

import msgspec

from silbo.message import Message
from silbo.shards import spread
from silbo.wire.formats import make_encoded_message, to_json

__all__ = [
    "FOUND_AT_MOST",
    "LARGEST_ATTEMPTS",
    "LARGEST_NUMBER",
    "LEASE",
    "NOTHING",
    "NO_SEQUENCE",
    "STATES",
    "ColumnCheck",
    "Lead",
    "OutboxStatus",
    "OutboxStore",
    "Packed",
    "Quota",
    "Roster",
    "Row",
    "SessionStore",
    "SharedStore",
    "State",
    "UnreadableMessage",
    "View",
    "has_to_wait",
    "mark_unreadable",
    "pack",
    "partition_of",
    "to_number",
    "unpack",
]

State: TypeAlias = Literal["pending", "sending", "sent", "dead"]
"""``pending`` waits, ``sending`` was taken by a relay, ``sent`` is kept for a replay, ``dead`` was refused for good."""

Time = TypeVar("Time", datetime, int)
"""A time as a store has it."""

STATES: Final[tuple[State, ...]] = get_args(State)
"""All states, in the order of a row's way."""

NO_SEQUENCE: Final = 1 << 62
"""The stored sequence of a row that has none yet: greater than every sequence, so that one index has the rows in the order
in which they are taken."""
LARGEST_NUMBER: Final = 1 << 53
"""No sequence and no epoch is greater: they would be no exact numbers for a broker's Lua."""
LARGEST_ATTEMPTS: Final = (1 << 31) - 2
"""No row is taken more often: a database's integer has room for one more."""

NOTHING: Final[Mapping[int, str]] = MappingProxyType({})
"""No dead rows: the immutable default of ``take(dead=...)``."""

_FIELDS: Final = tuple(field.name for field in fields(Message) if field.name != "shards")
"""The fields of every stored message. The number of shards, the last one, is stored where there is one."""
_decode: Final = msgspec.json.Decoder(Message).decode


FOUND_AT_MOST: Final = 100
"""A search for a message's id finds 100 rows at most."""

LEASE: Final = 10.0
"""A relay leads for 10 seconds, by default, and renews that after a third of them."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A message as :func:`pack` makes it for a store."""

    partition: int
    key: str | None
    raw: bytes


class Row(NamedTuple):
    """A stored message. A named tuple: a frozen dataclass takes four times as long to make, a twentieth of a relay's time.

    Attributes:
        id: Given by the store; ascending in the order of commit, for one key.
        partition: From 0.
        message: An :class:`UnreadableMessage` if the store was damaged.
        attempts: How often a relay has taken the row since it was stored, or since a retry or replay.
        error: The text of the error of the last attempt.
        sequence: The row's place in the order of sending of its partition; given when a relay first takes it.
        owner: The relay that took the row last.
        epoch: The epoch of that relay's lead.
        stored_at: The time of storing: aware, UTC, as the others.
        state_at: The time of the last change of state.
        next_attempt_at: The row is not taken before this time; None if it need not wait.
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
    """The right to send a partition's rows, as long as no other lead has a greater epoch.

    Attributes:
        partition: From 0.
        owner: The relay.
        epoch: Grows by each take-over from another relay.
        until: The end of the lease by the store's clock: aware, UTC.
    """

    partition: int
    owner: str
    epoch: int
    until: datetime


@dataclass(frozen=True, slots=True)
class Roster:
    """The relays that divide a store's partitions among them, and their leads.

    Attributes:
        relays: Their names, in the order in which they joined.
        leads: The leads whose lease runs, by partition.
    """

    relays: Sequence[str]
    leads: Mapping[int, Lead]


@dataclass(frozen=True, slots=True)
class View:
    """The state of a store that relays share, as one query tells it.

    Attributes:
        due: The partitions of the given leads in which rows are to be taken, or which another relay leads by now.
        relays: The number of relays.
        free: The number of partitions that no relay leads.
    """

    due: Collection[int]
    relays: int
    free: int


@dataclass(frozen=True, slots=True)
class Quota:
    """The most that may wait in an outbox: pending, sending and dead rows. Past either bound a publish is refused.

    Sent rows are kept for a replay in the room that is left: the oldest are deleted before ``keep_sent`` is over if their room
    is needed, so that a file never outgrows its quota. An hour of 1,000 messages a second are 3,600,000 rows. In a database
    of the host's (``SQLAlchemyStore``) sent rows do not count for the quota and stay for all of ``keep_sent``.
    """

    rows: int = 1_000_000
    size: int = 1 << 30
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.rows} messages or {self.size} bytes"


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """The state of an outbox. All times are aware, UTC.

    Attributes:
        counts: The number of rows in each state.
        size: Bytes of the rows that count for the quota.
        oldest_at: The time when the oldest row was stored that is neither sent nor dead.
        oldest_sent_at: The time when the oldest kept row was sent: no replay reaches back further.
        next_attempt_at: The time when the first waiting row is tried again.
        leads: The leads by partition.
        estimated: The states whose counts are the database's estimates, because there are too many rows to count them each time.
    """

    counts: Mapping[State, int]
    size: int
    oldest_at: datetime | None
    oldest_sent_at: datetime | None
    next_attempt_at: datetime | None
    leads: Mapping[int, Lead]
    estimated: Collection[State] = ()

    @property
    def unsent(self) -> int:
        """The number of rows that are neither sent nor dead."""
        return self.counts["pending"] + self.counts["sending"]


def partition_of(key: str | None, partitions: int) -> int:
    """Return the partition of a key, from 0: crc32 modulo ``partitions``; 0 without a key."""
    return 0 if key is None else spread(key, partitions)


def has_to_wait(state_at: Time, next_attempt_at: Time | None, now: Time) -> bool:
    """Return True if a row waits for its next attempt: one delay at most, even if a clock that was ahead postponed it."""
    return next_attempt_at is not None and state_at <= now < next_attempt_at


class OutboxStore(Protocol):
    """Holds the messages of an outbox. All times are by the store's own clock.

    Every method raises :class:`~silbo.errors.StoreUnavailable` if the store can't be used at the moment, and a RuntimeError
    if it has to be opened and is not.
    """

    @property
    def id(self) -> str:
        """The store's id, given when it was made; part of the source's name for the broker. Known once opened."""
        ...

    @property
    def partitions(self) -> int:
        """The number of partitions. Known once opened."""
        ...

    async def open(self, partitions: int | None = None, *, lease: float = LEASE) -> None:
        """Connect; make the schema if there is none, or bring an older one up to date.

        Args:
            partitions: The number of partitions that the store is to have; None takes the present number, or 1.
            lease: Seconds that the relays lead for. If the number has to change, and a relay still leads for longer than that,
                by a clock that was ahead, it leads for so many seconds from now on; then another call succeeds.

        Raises:
            StoreInvalid: no store, a newer schema, or another number of partitions while rows wait or a relay leads.
        """
        ...

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store all or none of the messages, in this order; returns when they are committed.

        Raises:
            OutboxFull: they would go past the quota; nothing was stored.
            StoreInvalid: the number of partitions has changed; nothing was stored.
            DeliveryUnknown: the commit was not answered: they may be stored.
        """
        ...

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """Take or renew the lead of a partition, for ``lease`` seconds.

        Args:
            partition: From 0.
            owner: Names the relay; another name in each process.
            lease: Seconds.
            above: The epoch has to be greater than this one: the broker has seen it.

        Returns:
            None while another owner's lease runs. The same epoch for a renewal, a greater one for a take-over. A running
            lease that would end more than ``lease`` seconds from now, given by a clock that was ahead, is cut to them.
        """
        ...

    async def resign(self, lead: Lead) -> None:
        """End the lease, so that another relay need not wait for it. Does nothing if it is lost already."""
        ...

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """Take the rows to send next: those that have a sequence already, then the oldest pending ones, which now get one.

        They are ``sending`` from then on, with one more attempt, under this lead. Empty while the first of them waits
        for its next attempt (see :func:`has_to_wait`). A new sequence is above the last one and not below the store's clock in microseconds, so
        that a store that was restored from an older copy gives none for a second time.

        Args:
            lead: Of their partition.
            limit: The most rows; a store may give fewer if they are large.
            sent: Rows to :meth:`settle` as sent before, in the same transaction.
            dead: Rows to :meth:`settle` as dead, likewise.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """Mark rows, by their id, as ``sent``; or as ``dead``, with the error.

        Changes only rows that are ``sending`` and were taken under this very lead.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """Put rows back to ``pending``, their sequences kept, for another attempt after ``delay`` seconds.

        Changes only rows that :meth:`settle` would change.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """Give new sequences above this one to rows that were taken once, and to all later ones: the broker was ahead.

        That happens if a store was restored from an older copy and its clock was set back, too.

        Raises:
            LeadLost: another relay leads.
        """
        ...

    async def forget(self, *, keep_sent: float, limit: int = 1000) -> int:
        """Delete the oldest rows that were sent more than ``keep_sent`` seconds ago. Return their number, at most ``limit``."""
        ...

    async def read_clock(self) -> datetime:
        """Return the time of the store's clock: aware, UTC."""
        ...

    async def status(self) -> OutboxStatus:
        """Return the counts, size, ages and leads as they are now."""
        ...

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """Return rows in a state, ordered by id, with ids above ``after``: at most ``limit``, fewer if they are large.

        Empty only if there are no more.
        """
        ...

    async def find(self, message_id: str) -> Sequence[Row]:
        """Return the rows of a message's id, by their ids, at most 100. Reads all rows: a second for a million or two."""
        ...

    async def retry(self, rows: Collection[int] | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[int]:
        """Make dead rows pending again, as if never taken.

        Args:
            rows: Their ids, at most 1,000; None for all.
            after: Only rows with ids above this one.
            limit: The most rows, those with the smallest ids.

        Returns:
            Their ids, ascending.
        """
        ...

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """Make rows pending again that were sent from ``since`` on and before ``before``.

        They get new sequences, as if never taken, and are sent again before rows that have not been taken yet.

        Returns:
            Their number, at most ``limit``.
        """
        ...

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """Delete rows that have been in a state since before this time. Return their number, at most ``limit``."""
        ...

    async def aclose(self) -> None:
        """Close everything that was opened. May be called twice."""
        ...


@runtime_checkable
class SessionStore(OutboxStore, Protocol):
    """A store in the host's own database, which can store in the host's own transaction.

    Attributes:
        on_commit: Called, in the loop's thread, when such a transaction was committed.
    """

    on_commit: Callable[[], object] | None

    @property
    def in_session(self) -> bool:
        """True if messages that this task adds now are stored in a session of the host's."""
        ...

    async def add_in(self, session: Any, messages: Sequence[Packed], quota: Quota) -> None:
        """Store in the transaction of a session, and do not commit it.

        Raises:
            OutboxFull: the messages would go past the quota; nothing was stored.
        """
        ...


@runtime_checkable
class SharedStore(OutboxStore, Protocol):
    """A store whose partitions the relays of several hosts divide evenly. On another store one relay may lead them all.

    Attributes:
        notifies: True if a relay should :meth:`listen`.
    """

    notifies: bool

    async def join(self, owner: str, *, lease: float, idle: Collection[int] = ()) -> Roster:
        """Count a relay among those that divide the partitions, for ``lease`` seconds. Return all of them.

        A lease that would end more than ``lease`` seconds from now, given by a clock that was ahead, is cut to them.

        Args:
            owner: Names the relay.
            lease: Seconds.
            idle: Partitions whose leases are renewed too, if this relay has them.
        """
        ...

    async def leave(self, owner: str) -> None:
        """Count a relay no longer among those that divide the partitions. Its leads stay."""
        ...

    async def look(self, leads: Collection[Lead]) -> View:
        """Return the state of the partitions, and which of these leads have rows to take. Changes and locks nothing."""
        ...

    async def listen(self, heard: Callable[[], object]) -> None:
        """Call ``heard`` now and after each commit of messages, without an end. For a store that ``notifies``.

        Raises:
            StoreUnavailable: commits are not heard of any more.
        """
        ...


def pack(message: Message, partitions: int) -> Packed:
    """Return a message as it is stored: all of its fields, the address and the class name too.

    Its first fields are those of the format JSON, in the same order. A checksum at the end says that these bytes may go to a
    broker of that format; a message without an origin has none.

    Raises:
        MessageRefused: something in the message can't be written, or it is larger than 1 MiB.
    """
    values = {name: getattr(message, name) for name in _FIELDS}
    if message.shards:
        values["shards"] = message.shards
    raw = to_json(message, values)
    if "app" in message.headers and "instance" in message.headers:
        head = raw[:-1]
        raw = head + _write_checksum(head)
    return Packed(partition_of(message.key, partitions), message.key, raw)


def _write_checksum(head: bytes) -> bytes:
    """Return the end of a stored message, which proves that ``head``, the bytes in front of it, are as :func:`pack` wrote them."""
    return b',"checksum":"%08x"}' % crc32(head)


_END: Final = len(_write_checksum(b""))
"""Bytes of the end with the checksum."""


class _End(msgspec.Struct):
    """The fields of a stored message that the format JSON does not have."""

    to: str | None
    class_name: str
    shards: int = 0


@lru_cache(1024)  # addresses and classes are few
def _read_end(raw: bytes) -> tuple[str | None, str, int]:
    """Return the address, the class name and the number of shards that the end of a stored message tells."""
    end = _decode_end(b'{"to":%b}' % raw)
    return end.to, end.class_name, end.shards


_decode_end: Final = msgspec.json.Decoder(_End).decode


@dataclass(frozen=True, slots=True)
class UnreadableMessage(Message):
    """Stands for a message whose row can't be read: a relay puts the row aside as dead.

    It has what can be read of the message, if only another column of its row can't.
    """

    problem: str = ""


def unpack(raw: bytes | str) -> Message:
    """Return the message of :func:`pack`'s bytes; an UnreadableMessage if the store gives other ones.

    If the checksum is right, the message is not read now: a broker with the format JSON sends its bytes as they are.
    """
    if type(raw) is bytes:
        # Reading and writing a small message takes 5.4 us, this 1.3: a fifth of a relay's time.
        head = raw[:-_END]
        if raw.endswith(_write_checksum(head)):
            json, _, end = head.rpartition(b',"to":')
            return make_encoded_message(json + b"}", *_read_end(end))
    try:
        message: Any = _decode(raw)
    # A byte that is no UTF-8 is a UnicodeError before msgspec 0.23.
    except (msgspec.DecodeError, UnicodeError, RecursionError, TypeError) as error:
        return UnreadableMessage("", "(unreadable)", "", {}, problem=str(error))
    return message  # type: ignore[no-any-return]


def mark_unreadable(message: Message, problem: str) -> Message:
    """Return the message as an UnreadableMessage if there is a problem with its row."""
    if not problem or isinstance(message, UnreadableMessage):
        return message
    return UnreadableMessage(
        **{name: getattr(message, name) for name in _FIELDS}, shards=message.shards, problem=problem
    )


class ColumnCheck:
    """Finds values of another type than that of their column, and numbers out of range: SQLite keeps whatever a program writes there.

    Args:
        time: The type of a stored time.
        unknown: Stands for a time that can't be read.
    """

    def __init__(self, time: type, unknown: object) -> None:
        self._columns: Sequence[tuple[str, tuple[type, ...], object]] = (
            ("attempts", (int,), 0),
            ("error", (str, NoneType), None),
            ("sequence", (int,), NO_SEQUENCE),
            ("owner", (str, NoneType), None),
            ("epoch", (int, NoneType), None),
            ("stored_at", (time,), unknown),
            ("state_at", (time,), unknown),
            ("next_attempt_at", (time, NoneType), None),
        )
        self._right = set(product(*(types for _, types, _ in self._columns)))

    def mend(self, values: Sequence[Any]) -> tuple[Sequence[Any], str]:
        """Return the values of a row from ``attempts`` on, others in the place of the wrong ones, and the problem with them."""
        attempts, _, sequence, _, epoch, *_ = values
        if (
            tuple(map(type, values)) in self._right
            and 0 <= attempts <= LARGEST_ATTEMPTS
            and (0 <= sequence <= LARGEST_NUMBER or sequence == NO_SEQUENCE)
            and (epoch is None or 0 <= epoch <= LARGEST_NUMBER)
        ):
            return values, ""
        mended: list[Any] = []
        wrong: list[str] = []
        for value, (name, types, instead) in zip(values, self._columns, strict=True):
            is_right = type(value) in types and _is_in_range(name, value)
            mended.append(value if is_right else instead)
            if not is_right:
                wrong.append(f"its column {name} has the value {value!r:.100}")
        return mended, " and ".join(wrong)


def to_number(value: Any) -> int:
    """Return the number in a column of a partition; 0 for a value that is no sequence and no epoch, or that is negative.

    A broker knows the newest epoch, and new sequences are never below the clock.
    """
    return value if type(value) is int and 0 <= value <= LARGEST_NUMBER else 0


def _is_in_range(column: str, value: Any) -> bool:
    if type(value) is not int or column not in ("attempts", "sequence", "epoch"):
        return True
    largest = LARGEST_ATTEMPTS if column == "attempts" else LARGEST_NUMBER
    return 0 <= value <= largest or (column == "sequence" and value == NO_SEQUENCE)
