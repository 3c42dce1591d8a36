"""The retention policy of streams: which one is kept beside each, and changing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from silbo._checks import check_address
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.retention import RetentionPolicy, build_retention_key
from silbo.brokers.redis.shards import FixedShards, build_shard_key
from silbo.brokers.redis.streams import build_stream_key
from silbo.operations.redis import AwayHook, choose_streams, opened, read_each, read_shards
from silbo.operations.scripts import SET_POLICY

__all__ = ["StreamRetention", "read_policy", "read_retentions", "set_retention"]


@dataclass(frozen=True, slots=True)
class StreamRetention:
    """The retention of one stream.

    Attributes:
        stream: The stream's key.
        policy: The policy that is kept beside the stream; None if there is none: each program goes by its own.
        before: The policy that was kept before; programs that state it are not refused.
        messages: The number of entries of the stream.
        size: The bytes of memory that it takes, as Redis estimates it; None where the user may not ask.
    """

    stream: str
    policy: RetentionPolicy | None
    before: RetentionPolicy | None
    messages: int
    size: int | None


async def read_retentions(
    client: Client,
    *,
    prefix: str = "silbo",
    stream: str | None = None,
    timeout: float = 5.0,
    on_away: AwayHook | None = None,
) -> Sequence[StreamRetention]:
    """Return the retention of a stream, or of all streams under a prefix. Nothing is written.

    Args:
        client: The program's client.
        prefix: The broker's prefix.
        stream: The stream's address; None looks for all.
        timeout: Seconds in which each step is answered.
        on_away: Called with each node of a cluster that can't be reached; the other nodes' streams are returned. None raises the
            error.

    Raises:
        StreamMissing: there is no such stream, or none under the prefix.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    async with opened(client, timeout) as connection:
        keys = await choose_streams(connection, prefix, stream, on_away)
        return await read_each(connection, keys, partial(_read, connection), on_away)


async def set_retention(
    client: Client, policy: RetentionPolicy, *, prefix: str = "silbo", stream: str = "events", timeout: float = 5.0
) -> Sequence[StreamRetention]:
    """Keep another policy beside a stream, or beside each shard of an address. It holds within ten seconds, for all programs.

    Programs that state the policy of before go on, and may be started again. A stream that does not exist yet has the policy from
    its first message on. Safe to repeat.

    Args:
        client: The program's client, of a user that may write.
        policy: The new policy.
        prefix: The broker's prefix.
        stream: The stream's address.
        timeout: Seconds in which each step is answered.

    Returns:
        The streams as they were.

    Raises:
        ShardAddressed: the stream is a shard of another address.
        BrokerUnavailable: Redis can't be reached, or refuses; of several shards, the first ones may have it.
    """
    key = build_stream_key(stream, check_address(prefix, "a prefix")).encode()
    async with opened(client, timeout) as connection:
        await FixedShards(connection, lambda each: build_stream_key(each, prefix).encode()).refuse_shard(stream)
        number = await read_shards(connection, key)
        keys = [build_shard_key(key, shard) for shard in range(number)] if number > 1 else [key]
        found = [await _read(connection, each) for each in keys]
        for each in keys:
            await ask(connection, ScriptCall.of(SET_POLICY, [build_retention_key(each)], policy.to_text()))
        return found


async def read_policy(connection: CallConnection, key: bytes) -> tuple[RetentionPolicy | None, RetentionPolicy | None]:
    """Return the policy that is kept beside a stream, and the one before; None for what is not there, or is none of silbo's."""
    (texts,) = await ask(connection, Command(b"HMGET", build_retention_key(key), b"policy", b"before"))
    policy, before = map(_parse, texts)
    return policy, before


async def _read(connection: CallConnection, key: bytes) -> StreamRetention:
    policy, before = await read_policy(connection, key)
    messages, size = await connection.run_all(Command(b"XLEN", key), Command(b"MEMORY", b"USAGE", key))
    return StreamRetention(
        stream=key.decode(),
        policy=policy,
        before=before,
        messages=messages if isinstance(messages, int) else 0,
        size=size if isinstance(size, int) else None,
    )


def _parse(text: bytes | None) -> RetentionPolicy | None:
    try:
        return None if text is None else RetentionPolicy.of_text(text)
    except ValueError:
        return None
