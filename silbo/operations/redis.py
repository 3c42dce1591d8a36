"""Reading from Redis: a connection, its clock, and the streams that exist."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias, TypeVar

from silbo._checks import check_address
from silbo.brokers.redis.calls import CallConnection, Command, ask
from silbo.brokers.redis.connection import Client, Refused, check_client
from silbo.brokers.redis.failures import Unreached
from silbo.brokers.redis.shards import build_shard_key, build_shards_key
from silbo.brokers.redis.streams import DEFAULT_ADDRESS, build_stream_key
from silbo.errors import BrokerUnavailable, StreamMissing

__all__ = [
    "AwayHook",
    "AwayNode",
    "choose_streams",
    "find_streams",
    "is_away",
    "opened",
    "read_clock",
    "read_each",
    "read_shards",
    "time_of_entry",
]

T = TypeVar("T")

SCAN_COUNT: Final = b"1000"
"""Redis looks at 1,000 keys with one call."""
LAST_TIME: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The time of an entry whose id lies beyond what a datetime can hold."""


@dataclass(frozen=True, slots=True)
class AwayNode:
    """A node of a cluster that can't be reached. As text: a line for people.

    Attributes:
        node: The node, as ``Redis at 10.0.0.1:6379``; or the key of a stream that no node serves.
        error: What was tried, and how it ended.
    """

    node: str
    error: str

    def __str__(self) -> str:
        return f"{self.node} can't be reached, so its streams are not shown: {self.error}"


AwayHook: TypeAlias = Callable[[AwayNode], object]
"""Called with each node of a cluster that can't be reached, perhaps more than once; the answer goes on without its streams."""


def is_away(error: BrokerUnavailable) -> bool:
    """Return True if a server can't be reached, or a node does not serve the keys; False if it refuses what was asked."""
    cause = error.__cause__
    return not isinstance(cause, Refused) or isinstance(cause, Unreached) or cause.is_elsewhere


@asynccontextmanager
async def opened(client: Client, timeout: float) -> AsyncGenerator[CallConnection]:
    """Lend a connection with the client's settings; close it at the end of the block."""
    connection = CallConnection(check_client(client), timeout, is_patient=True)
    try:
        yield connection
    finally:
        await connection.aclose()


async def choose_streams(
    connection: CallConnection, prefix: str, stream: str | None, on_away: AwayHook | None = None
) -> list[str]:
    """Return the key of a stream, or of all shards of an address; or, without one, the keys of all streams under a prefix.

    Args:
        connection: Runs the calls.
        prefix: The broker's prefix.
        stream: The stream's address; None looks for all.
        on_away: See :data:`AwayHook`; None raises the error of the first node that can't be reached.

    Raises:
        StreamMissing: there is none; the error names the streams that exist.
        BrokerUnavailable: Redis can't be reached, or refuses; or no node that can be reached has any.
    """
    check_address(prefix, "a prefix")
    if stream is not None:
        key = build_stream_key(stream, prefix)
        (kind,) = await ask(connection, Command(b"TYPE", key.encode()))
        if kind == b"none":
            if shards := await read_shards(connection, key.encode()):
                return [build_shard_key(key.encode(), shard).decode() for shard in range(shards)]
            raise StreamMissing(key, await _find_or_none(connection))
        return [key]
    away: list[AwayNode] = []
    try:
        found = await find_streams(connection, away.append if on_away else None)
    except BrokerUnavailable as error:
        if is_away(error):
            raise
        return await choose_streams(connection, prefix, DEFAULT_ADDRESS)  # the user may not SCAN
    own = [key for key in found if key.startswith(f"{prefix}:{{")]
    if not own and away:
        raise BrokerUnavailable(f"no other node has a stream under {prefix}, and {away[0]}")
    if not own:
        raise StreamMissing(build_stream_key(DEFAULT_ADDRESS, prefix), found)
    if on_away is not None:
        for node in away:
            on_away(node)
    return own


async def find_streams(connection: CallConnection, on_away: AwayHook | None = None) -> list[str]:
    """Return the keys of all streams that are named as silbo's are, ``prefix:{address}``, in order.

    Raises:
        BrokerUnavailable: Redis refuses; or it can't be reached: no node, or with ``on_away=None`` one of them.
    """
    found: set[str] = set()

    async def scan(node: CallConnection) -> None:
        cursor = b"0"
        while True:
            command = Command(b"SCAN", cursor, b"MATCH", b"?*:{?*}", b"COUNT", SCAN_COUNT, b"TYPE", b"stream")
            ((cursor, keys),) = await ask(node, command)
            found.update(key.decode(errors="backslashreplace") for key in keys)
            if cursor == b"0":
                return

    await _do_each([(node.server, node) for node in await connection.each_node()], scan, on_away)
    return sorted(found)


async def read_each(
    connection: CallConnection,
    keys: Sequence[str],
    read: Callable[[bytes], Awaitable[T]],
    on_away: AwayHook | None = None,
) -> list[T]:
    """Read each stream, by its key; return what was read, without the streams of nodes that can't be reached.

    Raises:
        BrokerUnavailable: Redis refuses; or it can't be reached: no stream, or with ``on_away=None`` one of them.
    """
    found: list[T] = []

    async def read_one(key: str) -> None:
        found.append(await read(key.encode()))

    where: list[tuple[str, str]] = []
    for key in keys:
        try:
            where.append(((await connection.node_of(key.encode())).server, key))
        except BrokerUnavailable:  # the reading tells why
            where.append((key, key))
    await _do_each(where, read_one, on_away)
    return found


async def _do_each(work: Sequence[tuple[str, T]], do: Callable[[T], Awaitable[None]], on_away: AwayHook | None) -> None:
    """Do the work at each node but those that are found to be away; ``work`` has the node's name first."""
    away: dict[str, BrokerUnavailable] = {}
    for node, each in work:
        if node in away:
            continue
        try:
            await do(each)
        except BrokerUnavailable as error:
            if on_away is None or not is_away(error):
                raise
            away[node] = error
    if away and away.keys() == {node for node, _ in work}:
        raise next(iter(away.values()))
    if on_away is not None:
        for node, trouble in away.items():
            on_away(AwayNode(node, str(trouble)))


async def _find_or_none(connection: CallConnection) -> Sequence[str]:
    """Return the streams that exist; none where the user may not look for them."""
    try:
        return await find_streams(connection)
    except BrokerUnavailable:
        return ()


async def read_shards(connection: CallConnection, key: bytes) -> int:
    """Return the number of shards of the address that has this key without them, while it is changed that of before; 0 if it has none."""
    ((shards, before),) = await ask(connection, Command(b"HMGET", build_shards_key(key), b"shards", b"was"))
    return int(shards or 0) or int(before or 0)


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
