"""The consumer groups of streams: how far each is behind, what it has in hand, and who its consumers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from silbo._checks import check_seconds
from silbo._process import Process, find_process
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.dead_letters import RETRY_CONSUMER
from silbo.brokers.redis.in_hand import build_attempts_key, build_given_key, build_offered_key
from silbo.brokers.redis.lag import PAGE, count_lag
from silbo.brokers.redis.leases import build_lease_key
from silbo.brokers.redis.shard_receiver import LEADER
from silbo.brokers.redis.signs_of_life import build_signs_key
from silbo.errors import MessageInvalid
from silbo.operations.formatting import format_age
from silbo.operations.redis import AwayHook, choose_streams, opened, read_clock, read_each, time_of_entry
from silbo.operations.scripts import COUNT_DEAD, READ_OFFERED
from silbo.wire.formats import CLOUDEVENTS, JSON

__all__ = [
    "NEWER_VERSION_WAIT",
    "SILENT_AFTER",
    "ConsumerStatus",
    "GroupStatus",
    "Hanging",
    "LeftToNewer",
    "OldestInHand",
    "describe_desertion",
    "find_hang",
    "read_fields",
    "read_groups",
    "read_offered",
    "read_stream_groups",
    "split_attempts",
]

SILENT_AFTER: Final = 30.0
"""A consumer without a sign for 30 seconds counts as silent: the default ``claim_after``, after which others take over."""
STUCK_AFTER: Final = 60.0
"""A message whose first attempt runs for more than 60 seconds may have a listener that hangs."""
NOTICED_WITHIN: Final = 10.0
"""Two live consumers of one name notice each other each second; after 10 seconds without that one is gone."""
SIGNS: Final = 3
"""A consumer keeps what it has in hand three times in its ``claim_after``."""
LOOKED_AT: Final = 10_000
"""Of the oldest 10,000 entries in hand it is counted how many are retried, and how many wait for a newer consumer."""
NEWER_VERSION_WAIT: Final = 300.0
"""A consumer leaves a message of a newer version to others for 300 seconds, by default, before it becomes a dead letter."""


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """One consumer of a group.

    Attributes:
        name: Its name in the group.
        process: Its host and pid; None where neither its name nor its sign of life tells them.
        in_hand: The number of messages that it has in hand.
        seen_at: The time of its last call, by Redis's clock. A consumer that lives makes one at least every third of its
            ``claim_after``: every 10 seconds by default.
        is_silent: True if that was more than ``silent_after`` seconds ago: it was killed, or it can't reach Redis. The leader of a shard
            is silent if its lease is over.
        epoch: The epoch in which it leads the stream, which is a shard; None if it is none.
        name_taken_twice: The processes of two live consumers that both have this name: each gets what the other has in hand, and
            handles it twice. Empty if the name is one consumer's own.
    """

    name: str
    process: Process | None
    in_hand: int
    seen_at: datetime
    is_silent: bool
    epoch: int | None = None
    name_taken_twice: Sequence[Process] = ()


@dataclass(frozen=True, slots=True)
class OldestInHand:
    """The oldest message that a group has in hand.

    Attributes:
        entry: The id of its entry.
        added_at: The time at which it was added to the stream.
        consumer: The name of the consumer that has it.
        kept_at: The time at which this consumer last said that it still works on it; None for a dead letter that was given back.
        attempts: The attempts that have failed, or did not end.
        error: The error of the last one; None where none is known.
    """

    entry: str
    added_at: datetime
    consumer: str
    kept_at: datetime | None
    attempts: int
    error: str | None


@dataclass(frozen=True, slots=True)
class Hanging:
    """A message whose first attempt has run for more than a minute, at a consumer that lives: perhaps a listener hangs.

    Attributes:
        entry: The id of its entry.
        consumer: The name of the consumer that has it.
        process: The consumer's host and pid; None where they are not known.
        since: The time since which it is the oldest that this consumer has in hand; a third of ``silent_after`` exact.
    """

    entry: str
    consumer: str
    process: Process | None
    since: datetime

    @property
    def where(self) -> str:
        """The consumer's host and pid, or else its name."""
        return f"{self.process.host}, pid {self.process.pid}" if self.process else self.consumer


@dataclass(frozen=True, slots=True)
class LeftToNewer:
    """Messages in hand whose version no consumer of the group knows: they wait for a newer one, and then become dead letters.

    Attributes:
        count: Their number, with the messages of the same keys behind them; of the oldest 10,000 in hand.
        entry: The id of the one that has waited longest.
        since: The time since which it waits.
        name: The name of its event; None if its message can't be read.
        version: The version of its message; None if it can't be read.
    """

    count: int
    entry: str
    since: datetime
    name: str | None
    version: int | None

    @property
    def wanted(self) -> str:
        """The consumer that they wait for: one that knows a version of an event."""
        if self.name is None or self.version is None:
            return "a consumer that knows a newer version"
        return f"a consumer that knows version {self.version} of {self.name}"


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group of one stream.

    Attributes:
        stream: The stream's key.
        group: The group's name.
        lag: The number of messages that it has not been given yet.
        lag_is_at_least: True if there are more than ``lag``, and they were not counted.
        waiting_since: The time at which the oldest of them was added; None if there is none.
        in_hand: The number of messages that its consumers were given and have not acknowledged: Redis's "pending".
        oldest: The oldest of them.
        retrying: The number of those that an attempt has failed for, and that wait for the next or are at it; of the oldest
            10,000.
        dead: The number of its dead letters.
        consumers: Its consumers, by name.
        read_at: The time at which this was read, by Redis's clock, as the other times.
        newer: Those in hand that wait for a consumer of a newer version; None if none does.
        hanging: The one in hand whose first attempt has run longest, if for more than a minute; else None.
    """

    stream: str
    group: str
    lag: int
    lag_is_at_least: bool
    waiting_since: datetime | None
    in_hand: int
    oldest: OldestInHand | None
    retrying: int
    dead: int
    consumers: Sequence[ConsumerStatus]
    read_at: datetime
    newer: LeftToNewer | None = None
    hanging: Hanging | None = None

    @property
    def is_stuck(self) -> bool:
        """True if the first attempt of one of its messages has run for more than a minute: a listener may hang."""
        return self.hanging is not None

    @property
    def is_deserted(self) -> bool:
        """True if no consumer of the group gives a sign of life."""
        return all(consumer.is_silent for consumer in self.consumers)


def describe_desertion(group: GroupStatus) -> str:
    """Return how a group without a live consumer came to it: it has no consumer, or its consumers are silent."""
    if not group.consumers:
        return "it has no consumer"
    silent = "its consumer is" if len(group.consumers) == 1 else f"its {len(group.consumers)} consumers are"
    last = max(consumer.seen_at for consumer in group.consumers)
    return f"{silent} silent, the last sign {format_age(last, group.read_at)} ago"


async def read_groups(
    client: Client,
    *,
    prefix: str = "silbo",
    stream: str | None = None,
    silent_after: float = SILENT_AFTER,
    timeout: float = 5.0,
    on_away: AwayHook | None = None,
) -> Sequence[GroupStatus]:
    """Return the groups of a stream, or of all streams under a prefix.

    Nothing is written. The figures are right on a replica too, and after a restart of Redis, where ``XINFO GROUPS`` has no lag.

    Args:
        client: The program's client.
        prefix: The broker's prefix.
        stream: The stream's address; None looks for all, which reads the names of all keys of the database.
        silent_after: Seconds without a sign after which a consumer counts as silent: the groups' ``claim_after``.
        timeout: Seconds in which each step is answered.
        on_away: Called with each node of a cluster that can't be reached; the other nodes' groups are returned. None raises the
            error.

    Raises:
        StreamMissing: there is no such stream, or none under the prefix.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    async with opened(client, timeout) as connection:
        keys = await choose_streams(connection, prefix, stream, on_away)

        async def read(key: bytes) -> Sequence[GroupStatus]:
            return await read_stream_groups(connection, key, silent_after)

        return [group for groups in await read_each(connection, keys, read, on_away) for group in groups]


async def read_stream_groups(connection: CallConnection, key: bytes, silent_after: float) -> list[GroupStatus]:
    """Return the groups of one stream, by its key."""
    check_seconds("silent_after", silent_after, zero=True)
    now = await read_clock(connection)
    info, groups = await ask(connection, Command(b"XINFO", b"STREAM", key), Command(b"XINFO", b"GROUPS", key))
    dead = await _count_dead(connection, key + b":dead") if groups else {}
    stream = to_mapping(info)
    return [await _read_group(connection, key, stream, to_mapping(row), dead, now, silent_after) for row in groups]


async def _read_group(
    connection: CallConnection,
    key: bytes,
    stream: dict[str, Any],
    group: dict[str, Any],
    dead: dict[bytes, int],
    now: datetime,
    silent_after: float,
) -> GroupStatus:
    name: bytes = group["name"]
    attempts_key = build_attempts_key(key, name)
    last: bytes = group["last-delivered-id"]
    rows, oldest, given, waiting = await ask(
        connection,
        Command(b"XINFO", b"CONSUMERS", key, name),
        Command(b"XPENDING", key, name, b"-", b"+", b"1"),
        Command(b"HGET", build_given_key(key), name),
        Command(b"XRANGE", key, b"(" + last, b"+", b"COUNT", b"1"),
    )
    lease = await read_fields(connection, build_lease_key(key, name), (b"owner", b"epoch", b"until"))
    consumers = [each for each in map(to_mapping, rows) if each["name"] != RETRY_CONSUMER]  # nobody runs under it
    names = [consumer["name"] for consumer in consumers]
    signs = await read_fields(connection, build_signs_key(key, name), [*names, *(b"! " + each for each in names)])
    lag, is_at_least = await count_lag(connection, key, stream, group, given)
    hand = await _look_at_hand(connection, key, name, silent_after)
    statuses = [
        _to_leader(consumer, lease, now)
        if lease and consumer["name"] == LEADER
        else _to_consumer(consumer, signs, now, silent_after)
        for consumer in consumers
        if not _has_left(consumer, lease)
    ]
    return GroupStatus(
        stream=key.decode(),
        group=_text(name),
        lag=lag,
        lag_is_at_least=is_at_least,
        waiting_since=time_of_entry(waiting[0][0].decode()) if waiting else None,
        in_hand=group["pending"],
        oldest=await _read_oldest(connection, attempts_key, oldest[0], now) if oldest else None,
        retrying=hand.retrying,
        dead=dead.get(name, 0),
        consumers=statuses,
        read_at=now,
        newer=await _describe_left(connection, key, hand.left) if hand.left else None,
        hanging=_describe_kept(hand.kept, statuses, now, silent_after),
    )


async def _read_oldest(connection: CallConnection, attempts_key: bytes, row: Any, now: datetime) -> OldestInHand:
    entry, consumer, idle, _ = row
    (noted,) = await ask(connection, Command(b"HGET", attempts_key, entry))
    attempts, error = split_attempts(noted)
    return OldestInHand(
        entry=entry.decode(),
        added_at=time_of_entry(entry.decode()),
        consumer=_text(consumer),
        kept_at=None if consumer == RETRY_CONSUMER else now - timedelta(milliseconds=idle),
        attempts=attempts,
        error=error,
    )


def _to_consumer(row: dict[str, Any], signs: dict[bytes, bytes], now: datetime, silent_after: float) -> ConsumerStatus:
    name: bytes = row["name"]
    process = find_process(_text(name)) or find_process(_text(signs.get(name, b"")).partition(" ")[0])
    return ConsumerStatus(
        name=_text(name),
        process=process,
        in_hand=row["pending"],
        seen_at=now - timedelta(milliseconds=row["idle"]),
        is_silent=row["idle"] > silent_after * 1000,
        name_taken_twice=_find_twins(signs.get(b"! " + name, b""), now),
    )


def _find_twins(noticed: bytes, now: datetime) -> Sequence[Process]:
    """Return the two processes that are noted under one name, if that was lately; empty for none."""
    at, *both = _text(noticed).split() or [""]
    if not at.isdigit() or int(at) / 1000 < now.timestamp() - NOTICED_WITHIN:
        return ()
    return sorted(process for process in map(find_process, both) if process is not None)


def _to_leader(row: dict[str, Any], lease: Mapping[bytes, bytes], now: datetime) -> ConsumerStatus:
    """Return the consumer that reads a shard: the process that has its lease, whatever the consumer's name in Redis is."""
    owner = _text(lease[b"owner"])
    until = datetime.fromtimestamp(int(lease[b"until"]) / 1000, UTC)
    return ConsumerStatus(
        name=owner,
        process=find_process(owner),
        in_hand=row["pending"],
        seen_at=now if until > now else now - timedelta(milliseconds=row["idle"]),
        is_silent=until <= now,
        epoch=int(lease[b"epoch"]),
    )


def _has_left(row: dict[str, Any], lease: Mapping[bytes, bytes]) -> bool:
    """Return True if the leader of a shard has released it, and has left nothing in hand for the next one."""
    return lease.get(b"until") == b"0" and row["name"] == LEADER and not row["pending"]


def split_attempts(noted: bytes | None) -> tuple[int, str | None]:
    """Return the number of attempts and the last error that are noted of an entry: ``3 ValueError: no such order``."""
    count, _, error = (noted or b"").partition(b" ")
    return (int(count) if count.isdigit() and len(count) < 10 else 0), _text(error) or None


async def read_fields(connection: CallConnection, key: bytes, names: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return those fields of a hash that exist, with a command that the documented user of silbo's programs may run."""
    if not names:
        return {}
    (values,) = await ask(connection, Command(b"HMGET", key, *names))
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


async def read_offered(
    connection: CallConnection, key: bytes, group: bytes, ids: Sequence[bytes]
) -> dict[bytes, datetime]:
    """Return since when entries are left to the group's other consumers, for those that are; with a program's rights."""
    if not ids:
        return {}
    (times,) = await ask(connection, ScriptCall.of(READ_OFFERED, [build_offered_key(key, group)], *ids))
    return {
        entry: datetime.fromtimestamp(float(time) / 1000, UTC)
        for entry, time in zip(ids, times, strict=True)
        if time and float(time) > 0  # 0: it was given up meanwhile
    }


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


# -- in hand ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Hand:
    """The oldest 10,000 entries that a group has in hand.

    Attributes:
        retrying: The number of those for which an attempt was counted.
        left: Since when entries are left to newer consumers, and their ids.
        kept: The one that its consumer has most often kept as its oldest: how often, its consumer, its id. It has no attempt.
    """

    retrying: int = 0
    left: list[tuple[datetime, bytes]] = field(default_factory=list)
    kept: tuple[int, bytes, bytes] = (0, b"", b"")


async def _look_at_hand(connection: CallConnection, key: bytes, group: bytes, silent_after: float) -> _Hand:
    hand, begin = _Hand(), b"-"
    for _ in range(LOOKED_AT // PAGE):
        (rows,) = await ask(connection, Command(b"XPENDING", key, group, begin, b"+", b"%d" % PAGE))
        ids = [row[0] for row in rows]
        counted = await read_fields(connection, build_attempts_key(key, group), ids)
        offered = await read_offered(connection, key, group, ids)
        hand.retrying += len(counted)
        hand.left += [(since, entry) for entry, since in offered.items() if entry not in counted]
        for entry, consumer, idle, given in rows:
            if entry not in counted and entry not in offered and idle <= silent_after * 1000:
                hand.kept = max(hand.kept, (given - 1, consumer, entry))
        if len(rows) < PAGE:
            break
        begin = b"(" + rows[-1][0]
    return hand


def _describe_kept(
    kept: tuple[int, bytes, bytes], consumers: Sequence[ConsumerStatus], now: datetime, silent_after: float
) -> Hanging | None:
    """Return what hangs, if a consumer that lives has kept it for long."""
    many, name, entry = kept
    if (since := find_hang(many, now, silent_after)) is None:
        return None
    process = next((consumer.process for consumer in consumers if consumer.name == _text(name)), None)
    return Hanging(entry=entry.decode(), consumer=_text(name), process=process, since=since)


def find_hang(kept: int, now: datetime, silent_after: float) -> datetime | None:
    """Return since when a message that was kept so many times is in work; None if for less than a minute."""
    seconds = kept * silent_after / SIGNS
    return None if seconds < STUCK_AFTER else now - timedelta(seconds=seconds)


async def _describe_left(connection: CallConnection, key: bytes, left: Sequence[tuple[datetime, bytes]]) -> LeftToNewer:
    since, entry = min(
        left, key=lambda each: each[0]
    )  # of several the first in the stream, which the others are behind
    (rows,) = await ask(connection, Command(b"XRANGE", key, entry, entry))
    fields = rows[0][1] if rows else []
    name, version = _read_version(dict(zip(fields[::2], fields[1::2], strict=True)).get(b"message", b""))
    return LeftToNewer(count=len(left), entry=entry.decode(), since=since, name=name, version=version)


def _read_version(raw: bytes) -> tuple[str | None, int | None]:
    """Return the name and the version of a message, if it has a format that tells them."""
    for form in (JSON, CLOUDEVENTS):
        try:
            message = form.decode(raw)
            return message.message_name, message.version
        except MessageInvalid:
            continue
    return None, None


# -- counting -----------------------------------------------------------------------------------------------


async def _count_dead(connection: CallConnection, key: bytes) -> dict[bytes, int]:
    """Return the number of dead letters of each group."""
    counts: dict[bytes, int] = {}
    begin = b"-"
    while True:
        ((last, *page),) = await ask(connection, ScriptCall.of(COUNT_DEAD, [key], begin, b"%d" % PAGE))
        for group, count in zip(page[::2], page[1::2], strict=True):
            counts[group] = counts.get(group, 0) + count
        if not last:
            return counts
        begin = b"(" + last
