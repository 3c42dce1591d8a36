"""Messages as they come, or came from a time on: of streams, or of Pub/Sub."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from redis.asyncio import RedisCluster

from silbo.brokers.redis import RedisPubSub
from silbo.brokers.redis.calls import CallConnection, Command, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.errors import BrokerUnavailable, Gap, MessageInvalid
from silbo.message import Delivery, Format, Message
from silbo.names import compile_pattern
from silbo.operations.redis import choose_streams, opened, time_of_entry
from silbo.wire.formats import JSON

__all__ = ["SeenMessage", "follow_pubsub", "follow_streams", "has_values"]

BLOCK: Final = b"400"
"""Redis holds a read back for at most 400 milliseconds."""
PAGE: Final = 100
"""At most 100 messages are read with one call."""
LOOK_EVERY: Final = 0.1
"""Seconds between two reads of a cluster's streams while nothing comes."""
AGAIN_AFTER: Final = 1.0
"""Seconds between two attempts to read while Redis is away."""

OutageHook = Callable[[BrokerUnavailable], object]
"""Called with each error while Redis is away; reading goes on where it was."""


@dataclass(frozen=True, slots=True)
class SeenMessage:
    """A message that was seen.

    Attributes:
        address: The key of its stream, or its channel.
        entry: The id of its entry; None on Pub/Sub.
        at: The time at which it was added, by Redis's clock; on Pub/Sub the time at which it came here.
        raw: Its bytes.
        message: The message; None if it can't be decoded.
    """

    address: str
    entry: str | None
    at: datetime
    raw: bytes
    message: Message | None


async def follow_streams(
    client: Client,
    pattern: str = "**",
    *,
    prefix: str = "silbo",
    stream: str | None = None,
    since: datetime | str | None = None,
    format: Format = JSON,  # noqa: A002  # the word of every broker
    on_outage: OutageHook | None = None,
    timeout: float = 5.0,  # of each step
) -> AsyncGenerator[SeenMessage]:
    """Yield the messages of streams as they come; none is taken from a group. Does not end by itself.

    Messages that can't be decoded are yielded for the pattern ``**`` only.

    Args:
        client: The program's client.
        pattern: Of event names, as in ``add_listener``.
        prefix: The broker's prefix.
        stream: The stream's address; None follows all streams that are under the prefix when it begins.
        since: First yields what was added from a time on, or after an entry's id.
        format: The format of the broker that sends the messages.
        on_outage: See :data:`OutageHook`; None raises the error.
        timeout: Seconds in which each step is answered.

    Raises:
        StreamMissing: there is no such stream, or none under the prefix.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    matches = None if pattern == "**" else compile_pattern(pattern)
    async with opened(client, timeout) as connection:
        keys = await choose_streams(connection, prefix, stream)
        positions = {key.encode(): await _find_position(connection, key.encode(), since) for key in keys}
        read = _read_each if isinstance(client, RedisCluster) else _read_all
        while True:
            try:
                reply = await read(connection, positions)
            except BrokerUnavailable as error:
                await _pause_after(error, on_outage)
                continue
            for key, entries in reply:
                for entry, fields in entries:
                    positions[key] = entry
                    raw = dict(zip(fields[::2], fields[1::2], strict=True)).get(b"message", b"")
                    message = _decode(raw, format)
                    if matches is None or (message is not None and matches.fullmatch(f"{message.message_name}.")):
                        text = entry.decode()
                        yield SeenMessage(key.decode(), text, time_of_entry(text), raw, message)


async def _read_all(connection: CallConnection, positions: Mapping[bytes, bytes]) -> Sequence[Any]:
    """Wait for entries behind these ids, by the keys of their streams."""
    count, where = b"%d" % PAGE, (*positions, *positions.values())
    (reply,) = await ask(connection, Command(b"XREAD", b"COUNT", count, b"BLOCK", BLOCK, b"STREAMS", *where))
    return reply or ()


async def _read_each(connection: CallConnection, positions: Mapping[bytes, bytes]) -> Sequence[Any]:
    """Do so in a cluster, where a read names streams of one slot: without a wait in Redis, for it would hold up the next read."""
    reads = [Command(b"XREAD", b"COUNT", b"%d" % PAGE, b"STREAMS", *each) for each in positions.items()]
    found = [each for reply in await ask(connection, *reads) for each in reply or ()]
    if not found:
        await asyncio.sleep(LOOK_EVERY)
    return found


async def follow_pubsub(
    client: Client,
    pattern: str = "**",
    *,
    prefix: str = "silbo",
    format: Format = JSON,  # noqa: A002  # the word of every broker
    on_outage: OutageHook | None = None,
    on_gap: Callable[[Gap], object] | None = None,
) -> AsyncGenerator[SeenMessage]:
    """Yield the messages of Pub/Sub as they come, but none that a route sent to an address. Does not end by itself.

    Args:
        client: The program's client.
        pattern: Of event names, as in ``add_listener``.
        prefix: The broker's prefix.
        format: The format of the broker that sends the messages.
        on_outage: See :data:`OutageHook`; None raises the error.
        on_gap: Called if messages may have been missed.

    Raises:
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    async with RedisPubSub(client, app="silbo-tail", prefix=prefix, format=format) as broker:
        receiver = await broker.subscribe(pattern).open()
        try:
            while True:
                try:
                    items = await receiver.receive(PAGE)
                except BrokerUnavailable as error:
                    await _pause_after(error, on_outage)
                    continue
                for item in items:
                    if isinstance(item, Delivery):
                        message = _decode(item.raw, format)
                        yield SeenMessage(item.address, None, datetime.now(UTC), item.raw, message)
                    elif on_gap is not None:
                        on_gap(item)
        finally:
            await receiver.aclose()


async def _pause_after(error: BrokerUnavailable, on_outage: OutageHook | None) -> None:
    """Tell the hook of an error, and wait until the next attempt; raise the error if there is no hook."""
    if on_outage is None:
        raise error
    on_outage(error)
    await asyncio.sleep(AGAIN_AFTER)


def has_values(message: Message | None, wanted: Mapping[Sequence[str], str]) -> bool:
    """Return True if a payload has these values.

    Args:
        message: None has no values.
        wanted: The values by their paths, ``("order", "id")``: as JSON, or as plain text.
    """
    return message is not None and all(_has_value(message.payload, path, text) for path, text in wanted.items())


def _has_value(value: Any, path: Sequence[str], text: str) -> bool:
    for name in path:
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isascii() and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return False
    if isinstance(value, str):
        return value == text
    try:
        wanted: object = json.loads(text)
    except ValueError:
        return False
    return type(wanted) is type(value) and wanted == value


async def _find_position(connection: CallConnection, key: bytes, since: datetime | str | None) -> bytes:
    """Return the id after which to read a stream."""
    if isinstance(since, str):
        return since.encode()
    if since is not None:
        return b"%d-%d" % (max(0, int(since.timestamp() * 1000) - 1), (1 << 64) - 1)
    (stream,) = await ask(connection, Command(b"XINFO", b"STREAM", key))
    last: bytes = to_mapping(stream)["last-generated-id"]
    return last


def _decode(raw: bytes, format: Format) -> Message | None:  # noqa: A002  # the word of every broker
    try:
        return format.decode(raw)
    except MessageInvalid:
        return None
