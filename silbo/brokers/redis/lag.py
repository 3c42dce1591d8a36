"""The lag of a consumer group: the number of entries of a stream that it was not given yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.in_hand import build_given_key
from silbo.brokers.redis.scripts import COUNT_AFTER

__all__ = ["PAGE", "count_lag", "read_lag"]

PAGE: Final = 500
"""A call counts 500 entries: Redis does nothing else meanwhile, for about 2 milliseconds."""
COUNTED_EXACTLY: Final = 10_000
"""Up to 10,000 entries behind are counted one by one; of more, Redis's own count is believed."""
COUNTED_AT_MOST: Final = 100_000
"""At most 100,000 entries are counted if Redis has no count."""


async def read_lag(client: Client, keys: Iterable[str], group: str, timeout: float) -> int:
    """Return the lag of a group over several streams. A stream that has no such group has none.

    Args:
        client: The program's client.
        keys: The streams.
        group: The name of the group.
        timeout: Seconds in which each step is answered.

    Raises:
        BrokerUnavailable: Redis can't be reached, or refuses; a stream may be gone, or be no stream.
    """
    lag = 0
    connection = CallConnection(client, timeout, is_patient=True)
    try:
        for key in map(str.encode, keys):
            info, groups, given = await ask(
                connection,
                Command(b"XINFO", b"STREAM", key),
                Command(b"XINFO", b"GROUPS", key),
                Command(b"HGET", build_given_key(key), group.encode()),
            )
            for row in map(to_mapping, groups):
                if row["name"] == group.encode():
                    lag += (await count_lag(connection, key, to_mapping(info), row, given))[0]
    finally:
        await connection.aclose()
    return lag


async def count_lag(
    connection: CallConnection, key: bytes, stream: dict[str, Any], group: dict[str, Any], noted: bytes | None
) -> tuple[int, bool]:
    """Return the number of entries that a group has not been given, and True if there are more.

    Redis 6.2 has no count, Redis 7 sometimes none or, until 7.4, a wrong one after a restart. So a few are counted one by one.
    """
    last, first = group["last-delivered-id"], stream["first-entry"]
    if first is None or last == stream["last-generated-id"]:
        return 0, False
    if _parse_id(last) < _parse_id(first[0]):
        return stream["length"], False
    counted, last_counted = await _count_after(connection, key, last, COUNTED_EXACTLY)
    if counted < COUNTED_EXACTLY:
        return counted, False
    if (given := _find_given(stream, group, noted)) is not None:
        return max(counted, stream["entries-added"] - given), False
    more, _ = await _count_after(connection, key, last_counted, COUNTED_AT_MOST - COUNTED_EXACTLY)
    return counted + more, counted + more >= COUNTED_AT_MOST


async def _count_after(connection: CallConnection, key: bytes, after: bytes, limit: int) -> tuple[int, bytes]:
    """Return the number of entries behind an id, ``limit`` at most, and the id of the last one."""
    counted = 0
    while counted < limit:
        page = min(PAGE, limit - counted)
        ((many, after),) = await ask(connection, ScriptCall.of(COUNT_AFTER, [key], after, b"%d" % page))
        counted += many
        if many < page:
            break
    return counted, after


def _find_given(stream: dict[str, Any], group: dict[str, Any], noted: bytes | None) -> int | None:
    """Return the number of entries up to the last one that the group was given; None if it is in doubt.

    The note beside the stream is silbo's own (see ``_CHECK_GIVEN`` of the scripts); without it Redis's number is taken.
    """
    added, read = stream.get("entries-added"), group.get("entries-read")
    if added is None:
        return None
    doubt, _, number = (noted or b"0-0:0").rpartition(b":")
    if doubt.startswith(b"?") or not number.isdigit():
        return None
    if doubt == group["last-delivered-id"]:
        return int(number)
    return read if read is not None and read >= int(number) else None


def _parse_id(entry: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)
