"""The whereabouts of one event, found by its id: in the outbox, in the streams, with each group, among the dead letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.dead_letters import RETRY_CONSUMER, DeadLetter, parse_letter
from silbo.brokers.redis.in_hand import build_attempts_key
from silbo.brokers.redis.scripts import COUNT_AFTER
from silbo.errors import MessageInvalid, StreamMissing
from silbo.message import Format
from silbo.operations.groups import SILENT_AFTER, find_hang, read_offered, split_attempts
from silbo.operations.redis import (
    AwayHook,
    AwayNode,
    choose_streams,
    opened,
    read_clock,
    read_each,
    time_of_entry,
)
from silbo.operations.scripts import FIND
from silbo.outbox.rows import OutboxStore, Row
from silbo.wire.formats import JSON

__all__ = ["FoundEntry", "PlaceInGroup", "Whereabouts", "find_event", "find_event_id", "time_of_event"]

PAGE: Final = 500
"""A call searches 500 entries: Redis does nothing else meanwhile, for about 2 milliseconds."""
NEAR_PAGES: Final = 10
"""After 10 pages without a hit, the entries before the event's time are searched too."""
CLOCKS: Final = 60.0
"""The clock of a sender may be ahead of Redis's by 60 seconds."""
UUID_WITH_TIME: Final = 7
"""The version of UUIDs that begin with their time."""

PlaceState: TypeAlias = Literal["waiting", "in hand", "newer", "dead", "done"]
"""``waiting``: the group was not given it yet. ``in hand``: a consumer has it. ``newer``: it waits for a consumer that knows its
version, or behind a message of its key that does. ``dead``: the group gave it up. ``done``: acknowledged,
or it came before the group began."""


@dataclass(frozen=True, slots=True)
class PlaceInGroup:
    """The place of an entry with one group.

    Attributes:
        group: The group's name.
        state: See :data:`PlaceState`.
        consumer: The name of the consumer that has it in hand; :data:`~silbo.brokers.redis.dead_letters.RETRY_CONSUMER`
            for a dead letter that was given back and waits for a consumer.
        kept_at: The time at which that consumer last said that it still works on it; None for one that was given back.
        attempts: The attempts that have failed, or did not end.
        error: The error of the last one.
        letter: The id of the dead letter.
        left_at: The time since which the consumers leave it to newer ones.
        hanging_since: The time since which its first attempt runs, if for more than a minute by the default ``claim_after``: a listener
            may hang. None otherwise.
        behind: For one that waits: the number of messages before it that the group was not given either; 5,000 at most are counted.
    """

    group: str
    state: PlaceState
    consumer: str | None = None
    kept_at: datetime | None = None
    attempts: int = 0
    error: str | None = None
    letter: str | None = None
    left_at: datetime | None = None
    hanging_since: datetime | None = None
    behind: int | None = None


@dataclass(frozen=True, slots=True)
class FoundEntry:
    """An entry of a stream that holds the event.

    Attributes:
        stream: The stream's key.
        entry: The entry's id.
        added_at: The time at which it was added, by Redis's clock.
        name: The event's name; None for a message that can't be decoded.
        groups: Its place with each group.
    """

    stream: str
    entry: str
    added_at: datetime
    name: str | None
    groups: Sequence[PlaceInGroup]


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """All that is known of an event.

    Attributes:
        event_id: The event's id.
        rows: Its rows in the outbox: one for each sending.
        entries: Its entries in streams: the first one that is found in each.
        letters: Its dead letters.
        streams: The streams that were searched.
        searched: The number of entries that were looked at.
        searched_since: The time from which on entries were looked at, by Redis's clock; None if all were, from the newest back.
        away: The nodes of a cluster that can't be reached: their streams were not searched.
        read_at: The time at which this was read, by Redis's clock; None if Redis has no such stream.
    """

    event_id: str
    rows: Sequence[Row] = ()
    entries: Sequence[FoundEntry] = ()
    letters: Sequence[DeadLetter] = ()
    streams: Sequence[str] = ()
    searched: int = 0
    read_at: datetime | None = None
    searched_since: datetime | None = None
    away: Sequence[AwayNode] = ()

    @property
    def is_found(self) -> bool:
        """True if something is known of the event."""
        return bool(self.rows or self.entries or self.letters)


def time_of_event(event_id: str) -> datetime | None:
    """Return the time in the id of an event, by the clock of the program that made it; None for an id that tells none."""
    identity = UUID(event_id)
    if identity.version != UUID_WITH_TIME:
        return None
    try:
        return datetime.fromtimestamp((identity.int >> 80) / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return None


async def find_event(
    client: Client,
    event_id: str,
    *,
    store: OutboxStore | None = None,
    prefix: str = "silbo",
    stream: str | None = None,
    format: Format = JSON,  # noqa: A002  # the word of every broker
    since: datetime | None = None,
    timeout: float = 5.0,  # of each step
    progress: Callable[[int], object] | None = None,
) -> Whereabouts:
    """Find an event, by its id. Nothing is written.

    A stream is searched from the time in the id on, to its end: some milliseconds where the event is, and 2 to 10 seconds for each
    million later entries where it is not: an outbox may have sent it late, so no earlier end is right. An id without a time (not of version 7) is searched for from the newest entry back,
    unless the outbox or ``since`` tells a time.

    Args:
        client: The program's client.
        event_id: A UUID as text.
        store: The outbox's store, open; None asks no outbox.
        prefix: The broker's prefix.
        stream: The stream's address; None searches all streams under the prefix.
        format: The format of the broker that sent the message.
        since: The time from which on streams are searched, in place of the time in the id.
        timeout: Seconds in which each step is answered.
        progress: Called with the number of entries searched so far.

    Raises:
        ValueError: the id is no UUID.
        StreamMissing: there is no such stream, and nothing in the outbox either.
        BrokerUnavailable: Redis can't be reached, or refuses.
        StoreUnavailable: the store can't be used at the moment.
    """
    event_id = str(UUID(event_id))
    rows = await store.find(event_id) if store is not None else ()
    began_at = since or time_of_event(event_id) or min((row.stored_at for row in rows), default=None)
    sent_at = min((row.state_at for row in rows if row.state == "sent"), default=None)
    entries_since = since or sent_at or began_at
    async with opened(client, timeout) as connection:
        away: dict[str, AwayNode] = {}

        def on_away(node: AwayNode) -> None:
            away.setdefault(node.node, node)

        try:
            keys = await choose_streams(connection, prefix, stream, on_away)
        except StreamMissing:
            if rows:  # it was never sent anywhere
                return Whereabouts(event_id, rows)
            raise
        read_at = await read_clock(connection)
        search = _Search(connection, event_id, format, progress)
        letters: list[DeadLetter] = []
        entries: list[FoundEntry] = []

        async def look_at(key: bytes) -> str:
            letters.extend(await search.find_letters(key, began_at))
            if found := await search.find_entry(key, entries_since):
                entries.append(await _place_entry(connection, key, found, letters, format))
            return key.decode()

        keys = await read_each(connection, keys, look_at, on_away)
    return Whereabouts(
        event_id=event_id,
        rows=rows,
        entries=entries,
        letters=letters,
        streams=keys,
        searched=search.searched,
        read_at=read_at,
        searched_since=entries_since and entries_since - timedelta(seconds=CLOCKS),
        away=tuple(away.values()),
    )


async def find_event_id(
    client: Client,
    entry: str,
    *,
    prefix: str = "silbo",
    stream: str | None = None,
    format: Format = JSON,  # noqa: A002  # the word of every broker
    timeout: float = 5.0,
    on_away: AwayHook | None = None,
) -> str | None:
    """Return the id of the event in an entry of a stream, or in a dead letter; None if no stream has one that can be read.

    Args:
        client: The program's client.
        entry: The id of the entry or of the dead letter, as ``1700000000000-0``.
        prefix: The broker's prefix.
        stream: The stream's address; None looks into all streams under the prefix.
        format: The format of the broker that sent the message.
        timeout: Seconds in which each step is answered.
        on_away: Called with each node of a cluster that can't be reached; the other nodes' streams are looked into. None raises
            the error.

    Raises:
        StreamMissing: there is no such stream.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    async with opened(client, timeout) as connection:

        async def look_at(key: bytes) -> str | None:
            for place in (key, key + b":dead"):
                (rows,) = await ask(connection, Command(b"XRANGE", place, entry.encode(), entry.encode()))
                try:
                    if rows:
                        return format.decode(_field(rows[0], b"message")).message_id
                except MessageInvalid:
                    continue
            return None

        keys = await choose_streams(connection, prefix, stream, on_away)
        return next(filter(None, await read_each(connection, keys, look_at, on_away)), None)


@dataclass(slots=True)
class _Search:
    """A search for the id of an event, page by page."""

    connection: CallConnection
    event_id: str
    format: Format
    progress: Callable[[int], object] | None
    searched: int = 0
    needle: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.needle = self.event_id.encode()

    async def find_letters(self, key: bytes, since: datetime | None) -> list[DeadLetter]:
        """Return the dead letters of a stream that hold the event; it died after it began."""
        begin, found = b"-" if since is None else _to_id(since, -CLOCKS), []
        while True:
            many, last, hits = await self._page(key + b":dead", b"XRANGE", begin, b"+")
            found += [parse_letter(hit, self.format) for hit in hits if self._is_of_event(_field(hit, b"message"))]
            if many < PAGE:
                return found
            begin = b"(" + last

    async def find_entry(self, key: bytes, since: datetime | None) -> Any:
        """Return the first entry of a stream that holds the event; None if none does."""
        if since is None:
            return await self._walk(key, b"XREVRANGE", b"+", b"-")
        time = _to_id(since)
        found, last = await self._walk_pages(key, b"XRANGE", time, b"+", NEAR_PAGES)
        if found is None:
            found = await self._walk(key, b"XREVRANGE", b"(" + time, _to_id(since, -CLOCKS))
        if found is None and last is not None:
            found = await self._walk(key, b"XRANGE", b"(" + last, b"+")
        return found

    async def _walk(self, key: bytes, command: bytes, begin: bytes, end: bytes) -> Any:
        return (await self._walk_pages(key, command, begin, end))[0]

    async def _walk_pages(
        self, key: bytes, command: bytes, begin: bytes, end: bytes, pages: int | None = None
    ) -> tuple[Any, bytes | None]:
        """Return the first hit, or None and the id behind which to go on, which is None at the end."""
        while pages is None or pages > 0:
            many, last, hits = await self._page(key, command, begin, end)
            for hit in hits:
                if self._is_of_event(_field(hit, b"message")):
                    return hit, None
            if many < PAGE:
                return None, None
            begin = b"(" + last
            pages = None if pages is None else pages - 1
        return None, begin[1:]

    async def _page(self, key: bytes, command: bytes, begin: bytes, end: bytes) -> tuple[int, bytes, list[Any]]:
        call = ScriptCall.of(FIND, [key], command, begin, end, b"%d" % PAGE, self.needle)
        ((many, last, hits),) = await ask(self.connection, call)
        self.searched += many
        if self.progress is not None:
            self.progress(self.searched)
        return many, last, hits

    def _is_of_event(self, raw: bytes) -> bool:
        """Return True if a message is the event, and does not only mention its id."""
        if self.needle not in raw:
            return False
        try:
            return self.format.decode(raw).message_id == self.event_id
        except MessageInvalid:  # the id is all that can be read of it
            return True


def _read_name(raw: bytes, format: Format) -> str | None:  # noqa: A002  # the word of every broker
    try:
        return format.decode(raw).message_name
    except MessageInvalid:
        return None


async def _place_entry(
    connection: CallConnection,
    key: bytes,
    row: Any,
    letters: Sequence[DeadLetter],
    format: Format,  # noqa: A002
) -> FoundEntry:
    """Return an entry with its place in each group."""
    entry: bytes = row[0]
    (groups,) = await ask(connection, Command(b"XINFO", b"GROUPS", key))
    now = await read_clock(connection)
    places = [await _place_in_group(connection, key, to_mapping(group), entry, letters, now) for group in groups]
    return FoundEntry(
        stream=key.decode(),
        entry=entry.decode(),
        added_at=time_of_entry(entry.decode()),
        name=_read_name(_field(row, b"message"), format),
        groups=places,
    )


async def _place_in_group(
    connection: CallConnection,
    key: bytes,
    group: dict[str, Any],
    entry: bytes,
    letters: Sequence[DeadLetter],
    now: datetime,
) -> PlaceInGroup:
    name: bytes = group["name"]
    text = name.decode(errors="backslashreplace")
    pending, noted = await ask(
        connection,
        Command(b"XPENDING", key, name, entry, entry, b"1"),
        Command(b"HGET", build_attempts_key(key, name), entry),
    )
    if pending:
        _, consumer, idle, given = pending[0]
        attempts, error = split_attempts(noted)
        left_at = None if attempts else (await read_offered(connection, key, name, [entry])).get(entry)
        is_kept = not attempts and not left_at and idle <= SILENT_AFTER * 1000 and consumer != RETRY_CONSUMER
        return PlaceInGroup(
            group=text,
            state="newer" if left_at else "in hand",
            consumer=consumer.decode(errors="backslashreplace"),
            kept_at=None if consumer == RETRY_CONSUMER else now - timedelta(milliseconds=idle),
            attempts=attempts,
            error=error,
            left_at=left_at,
            hanging_since=find_hang(given - 1, now, SILENT_AFTER) if is_kept else None,
        )
    for letter in letters:
        if letter.group == text and letter.entry == entry.decode() and letter.stream == key.decode():
            return PlaceInGroup(
                group=text,
                state="dead",
                consumer=letter.consumer,
                attempts=letter.attempts,
                error=letter.error,
                letter=letter.id,
            )
    last: bytes = group["last-delivered-id"]
    if _parse_id(last) < _parse_id(entry):
        return PlaceInGroup(group=text, state="waiting", behind=await _count_before(connection, key, last, entry))
    return PlaceInGroup(group=text, state="done")


async def _count_before(connection: CallConnection, key: bytes, last: bytes, entry: bytes) -> int:
    """Return the number of entries behind ``last`` and before ``entry``, as far as it is counted."""
    counted: int = 0
    limit = PAGE * NEAR_PAGES
    while counted <= limit:
        ((many, last),) = await ask(connection, ScriptCall.of(COUNT_AFTER, [key], last, b"%d" % PAGE, entry))
        counted += many
        if many < PAGE:
            return max(0, counted - 1)  # the entry itself is the last one
    return limit


def _field(row: Any, name: bytes) -> bytes:
    """Return a field of an entry; empty if it has none."""
    return next((value for each, value in zip(row[1][::2], row[1][1::2], strict=True) if each == name), b"")


def _to_id(time: datetime, more: float = 0.0) -> bytes:
    """Return the first id of a time, so many seconds later."""
    return b"%d-0" % max(0, int((time.timestamp() + more) * 1000))


def _parse_id(entry: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)
