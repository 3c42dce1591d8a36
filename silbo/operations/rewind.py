"""Giving a group messages again that it was given before: all of a stream from a time on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from silbo._checks import check_seconds
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.dead_letters import RETRY_CONSUMER
from silbo.brokers.redis.in_hand import build_given_key
from silbo.brokers.redis.scripts import COUNT_AFTER
from silbo.errors import GroupInUse, GroupMissing
from silbo.operations.groups import SILENT_AFTER
from silbo.operations.redis import choose_streams, opened
from silbo.operations.scripts import REWIND

__all__ = ["Rewind", "find_rewinds", "rewind_group"]

PAGE: Final = 500
"""A call counts 500 entries: Redis does nothing else meanwhile, for about 2 milliseconds."""
LARGEST: Final = (1 << 64) - 1
"""The largest number in the id of an entry."""


@dataclass(frozen=True, slots=True)
class Rewind:
    """The part of one stream that a group can be given again.

    Attributes:
        stream: The stream's key.
        group: The group's name.
        first: The id of the first entry that comes again.
        messages: The number of entries that come again.
    """

    stream: str
    group: str
    first: str
    messages: int


async def find_rewinds(
    client: Client,
    group: str,
    since: datetime,
    *,
    prefix: str = "silbo",
    stream: str | None = None,
    silent_after: float = SILENT_AFTER,
    timeout: float = 5.0,
) -> Sequence[Rewind]:
    """Return what :func:`rewind_group` would give a group again, of each stream; nothing is written.

    Args:
        client: The program's client.
        group: The group's name.
        since: The time of the first message, by Redis's clock; aware.
        prefix: The broker's prefix.
        stream: The stream's address; None takes all streams under the prefix that have the group.
        silent_after: Seconds without a sign after which a consumer counts as gone: the group's ``claim_after``.
        timeout: Seconds in which each step is answered.

    Returns:
        None of a stream from which the group was given nothing since then.

    Raises:
        StreamMissing: there is no such stream, or none under the prefix.
        GroupMissing: no stream has the group.
        GroupInUse: a consumer of the group lives.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    check_seconds("silent_after", silent_after, zero=True)
    found: list[Rewind] = []
    async with opened(client, timeout) as connection:
        keys = await choose_streams(connection, prefix, stream)
        having = 0
        for key in map(str.encode, keys):
            (rows,) = await ask(connection, Command(b"XINFO", b"GROUPS", key))
            for row in map(to_mapping, rows):
                if row["name"] == group.encode():
                    having += 1
                    if (rewind := await _find_rewind(connection, key, row, since, silent_after)) is not None:
                        found.append(rewind)
    if not having:
        raise GroupMissing(group, keys)
    return found


async def rewind_group(
    client: Client, rewinds: Sequence[Rewind], *, silent_after: float = SILENT_AFTER, timeout: float = 5.0
) -> None:
    """Set a group back, so that its next consumers are given messages again. Other groups are not affected.

    An inbox skips the publications that it remembers. Safe to repeat.

    Args:
        client: The program's client.
        rewinds: As :func:`find_rewinds` has returned them.
        silent_after: As for :func:`find_rewinds`.
        timeout: Seconds in which each step is answered.

    Raises:
        GroupInUse: a consumer of the group has come meanwhile; the streams before were set back.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    check_seconds("silent_after", silent_after, zero=True)
    async with opened(client, timeout) as connection:
        for rewind in rewinds:
            key, group = rewind.stream.encode(), rewind.group.encode()
            (live,) = await ask(
                connection,
                ScriptCall.of(
                    REWIND,
                    [key, build_given_key(key)],
                    group,
                    _id_before(rewind.first),
                    b"%d" % int(silent_after * 1000),
                    RETRY_CONSUMER,
                ),
            )
            _refuse_live(rewind.stream, rewind.group, live)


async def _find_rewind(
    connection: CallConnection, key: bytes, row: dict[str, Any], since: datetime, silent_after: float
) -> Rewind | None:
    """Return what a group was given of a stream since a time; None for nothing.

    Raises:
        GroupInUse: a consumer of the group lives.
    """
    last: bytes = row["last-delivered-id"]
    begin = b"%d" % max(0, int(since.timestamp() * 1000))
    consumers, first = await ask(
        connection,
        Command(b"XINFO", b"CONSUMERS", key, row["name"]),
        Command(b"XRANGE", key, begin, last, b"COUNT", b"1"),
    )
    name = row["name"].decode(errors="backslashreplace")
    seen = [
        each["name"]
        for each in map(to_mapping, consumers)
        if each["idle"] <= silent_after * 1000 and each["name"] != RETRY_CONSUMER
    ]
    _refuse_live(key.decode(), name, seen)
    if not first:
        return None
    entry: str = first[0][0].decode()
    messages, after = 0, _id_before(entry)
    while True:
        ((many, after),) = await ask(connection, ScriptCall.of(COUNT_AFTER, [key], after, b"%d" % PAGE, last))
        messages += many
        if many < PAGE:
            return Rewind(key.decode(), name, entry, messages)


def _refuse_live(stream: str, group: str, live: Sequence[bytes]) -> None:
    if live:
        raise GroupInUse(group, stream, [name.decode(errors="backslashreplace") for name in live])


def _id_before(entry: str) -> bytes:
    """Return the largest id below an entry's."""
    milliseconds, _, number = entry.partition("-")
    if int(number):
        return b"%d-%d" % (int(milliseconds), int(number) - 1)
    return b"%d-%d" % (int(milliseconds) - 1, LARGEST)
