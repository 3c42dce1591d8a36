"""Reading from Redis: a connection, its clock, and the streams that exist."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from silbo._checks import check_address
from silbo.brokers.redis.calls import CallConnection, Command, ask
from silbo.brokers.redis.connection import Client, Refused, check_client
from silbo.brokers.redis.shards import build_shard_key, build_shards_key
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.errors import BrokerUnavailable, StreamMissing

__all__ = ["choose_streams", "find_streams", "opened", "read_clock", "time_of_entry"]

SCAN_COUNT: Final = b"1000"
"""Redis looks at 1,000 keys with one call."""
LAST_TIME: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The time of an entry whose id lies beyond what a datetime can hold."""


@asynccontextmanager
async def opened(client: Client, timeout: float) -> AsyncGenerator[CallConnection]:
    """Lend a connection with the client's settings; close it at the end of the block."""
    connection = CallConnection(check_client(client), timeout, is_patient=True)
    try:
        yield connection
    finally:
        await connection.aclose()


async def choose_streams(connection: CallConnection, prefix: str, stream: str | None) -> list[str]:
    """Return the key of a stream, or of all shards of an address; or, without one, the keys of all streams under a prefix.

    Raises:
        StreamMissing: there is none; the error names the streams that exist.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    check_address(prefix, "a prefix")
    if stream is not None:
        key = build_stream_key(stream, prefix)
        (kind,) = await ask(connection, Command(b"TYPE", key.encode()))
        if kind == b"none":
            (shards,) = await ask(connection, Command(b"HGET", build_shards_key(key.encode()), b"shards"))
            if shards is not None and int(shards):
                return [build_shard_key(key.encode(), shard).decode() for shard in range(int(shards))]
            raise StreamMissing(key, await _find_or_none(connection))
        return [key]
    try:
        found = await find_streams(connection)
    except BrokerUnavailable as error:
        if not isinstance(error.__cause__, Refused):
            raise
        return await choose_streams(connection, prefix, DEFAULT_ADDRESS)  # the user may not SCAN
    own = [key for key in found if key.startswith(f"{prefix}:{{")]
    if not own:
        raise StreamMissing(build_stream_key(DEFAULT_ADDRESS, prefix), found)
    return own


async def find_streams(connection: CallConnection) -> list[str]:
    """Return the keys of all streams that are named as silbo's are, ``prefix:{address}``, in order."""
    found: set[str] = set()
    for node in await connection.each_node():
        cursor = b"0"
        while True:
            scan = Command(b"SCAN", cursor, b"MATCH", b"?*:{?*}", b"COUNT", SCAN_COUNT, b"TYPE", b"stream")
            ((cursor, keys),) = await ask(node, scan)
            found.update(key.decode(errors="backslashreplace") for key in keys)
            if cursor == b"0":
                break
    return sorted(found)


async def _find_or_none(connection: CallConnection) -> Sequence[str]:
    """Return the streams that exist; none where the user may not look for them."""
    try:
        return await find_streams(connection)
    except BrokerUnavailable:
        return ()


async def read_clock(connection: CallConnection) -> datetime:
    """Return the time of Redis's clock."""
    ((seconds, microseconds),) = await ask(connection, Command(b"TIME"))
    return datetime.fromtimestamp(int(seconds), UTC) + timedelta(microseconds=int(microseconds))


def time_of_entry(entry: str) -> datetime:
    """Return the time at which an entry was added, by its id: the time of Redis's clock."""
    try:
        return datetime.fromtimestamp(int(entry.partition("-")[0]) / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return LAST_TIME
