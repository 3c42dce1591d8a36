"""Changing the number of shards of an address, so that the order of each key is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from silbo._checks import check_seconds
from silbo.brokers.redis.calls import CallConnection, Command, ScriptCall, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.brokers.redis.in_hand import build_given_key
from silbo.brokers.redis.leases import build_lease_key
from silbo.brokers.redis.retention import DEFAULT, RetentionPolicy, build_retention_key
from silbo.brokers.redis.scripts import CREATE
from silbo.brokers.redis.shards import FixedShards, build_shard_key, build_shards_key
from silbo.brokers.redis.streams import build_stream_key
from silbo.errors import ShardsMismatch, StreamMissing
from silbo.operations.redis import opened
from silbo.operations.scripts import SET_POLICY
from silbo.shards import check_shards

__all__ = ["Sharding", "Undrained", "change_shards", "find_undrained", "read_sharding"]

LOOK_EVERY: Final = 0.2
"""Every 0.2 seconds it is looked if the groups have handled everything."""


@dataclass(frozen=True, slots=True)
class Undrained:
    """A group that has not handled everything of a shard yet.

    Attributes:
        stream: The shard's key.
        group: The group's name.
        in_hand: The number of messages that its consumers have in hand.
    """

    stream: str
    group: str
    in_hand: int


@dataclass(frozen=True, slots=True)
class Sharding:
    """The shards of an address.

    Attributes:
        shards: Their number; while it is changed that of before.
        is_closed: True while it is changed, or if a change was given up halfway: publishes are refused.
    """

    shards: int
    is_closed: bool


async def read_sharding(
    client: Client, address: str, *, prefix: str = "silbo", timeout: float = 5.0
) -> Sharding | None:
    """Return the shards of an address; None if it has none.

    Raises:
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    key = build_shards_key(build_stream_key(address, prefix).encode())
    async with opened(client, timeout) as connection:
        ((shards, before),) = await ask(connection, Command(b"HMGET", key, b"shards", b"was"))
    number = int(shards or 0) or int(before or 0)
    return Sharding(number, is_closed=shards == b"0") if number else None


async def change_shards(
    client: Client,
    address: str,
    shards: int,
    *,
    prefix: str = "silbo",
    timeout: float = 5.0,
    on_wait: Callable[[Sequence[Undrained]], object] | None = None,
) -> None:
    """Change the number of shards of an address, when all groups have handled what is on the present ones.

    From the first moment on every publish to the address is refused, with :class:`~silbo.errors.ShardsMismatch`, so that no key is on two
    shards; an outbox keeps what waits. Consumers go on, and take part in the new shards by themselves. If it is cancelled or fails the
    address stays closed: call it again, also with the old number. A call that has begun later ends one that still waits.

    The stream of a shard that is no longer used expires when its entries are older than its retention policy keeps them; its dead letters
    stay. Under a policy that keeps entries for ever it stays, too.

    Args:
        client: The program's client; its user may run DEL, HGETALL, PEXPIRE and PERSIST.
        address: As ``orders``.
        shards: The new number.
        prefix: The broker's prefix.
        timeout: Seconds in which each step is answered; there is no limit to the wait for the groups.
        on_wait: Called again and again with what is waited for. A group that nobody needs any more has to be destroyed.

    Raises:
        StreamMissing: the address has no stream.
        ShardAddressed: the address is a shard of another one.
        ShardsMismatch: another call has begun since, or has ended; or the address is a stream without shards.
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    check_shards(shards)
    check_seconds("timeout", timeout)
    root = build_stream_key(address, prefix).encode()
    async with opened(client, timeout) as connection:
        await FixedShards(connection, lambda each: build_stream_key(each, prefix).encode()).refuse_shard(address)
        (fixed,) = await ask(connection, Command(b"HMGET", build_shards_key(root), b"shards", b"was"))
        before = int(fixed[0] or 0) or int(fixed[1] or 0)
        if not before:
            (kind,) = await ask(connection, Command(b"TYPE", root))
            if kind == b"stream":
                raise ShardsMismatch(address, fixed=1, wanted=shards)
            raise StreamMissing(root.decode())
        if before == shards and int(fixed[0]):
            return
        keys = [build_shard_key(root, shard) for shard in range(before)]
        mine = uuid4().hex.encode()
        closed = [b"shards", b"0", b"was", b"%d" % before, b"change", mine]
        await ask(connection, Command(b"HSET", build_shards_key(root), *closed))
        await ask(connection, *[Command(b"HSET", build_shards_key(key), b"shards", b"0") for key in keys])
        while True:
            undrained = [each for key in keys for each in await find_undrained(connection, key)]
            (found,) = await ask(connection, Command(b"HMGET", build_shards_key(root), b"shards", b"change"))
            # Else it would open what another call has closed, or change what that one has opened.
            if found != [b"0", mine]:
                raise ShardsMismatch(address, fixed=int(found[0] or 0), wanted=shards)
            if not undrained:
                break
            if on_wait is not None:
                on_wait(undrained)
            await asyncio.sleep(LOOK_EVERY)
        new = [build_shard_key(root, shard) for shard in range(shards)]
        await _persist(connection, new)
        await _create_groups(connection, keys, new)
        await _begin_sequences(connection, {*keys, *new}, new)
        await _carry_over_policy(connection, keys[0], [key for key in new if key not in keys])
        gone = [Command(b"DEL", build_shards_key(key)) for key in keys[shards:]]
        await _expire(connection, keys[shards:])
        number = b"%d" % shards
        await ask(connection, *gone, *[Command(b"HSET", build_shards_key(key), b"shards", number) for key in new])
        # The last one: programs that say the new number look at this one first.
        await ask(connection, Command(b"HSET", build_shards_key(root), b"shards", number))


async def _create_groups(connection: CallConnection, old: Sequence[bytes], new: Sequence[bytes]) -> None:
    """Make the groups of the old shards on the new ones: one whose consumers come later misses nothing of what is published until then."""
    kinds = await ask(connection, *[Command(b"TYPE", key) for key in old])
    streams = [key for key, kind in zip(old, kinds, strict=True) if kind != b"none"]
    replies = await ask(connection, *[Command(b"XINFO", b"GROUPS", key) for key in streams])
    groups = {to_mapping(row)["name"] for rows in replies for row in rows}
    await ask(
        connection,
        *[ScriptCall.of(CREATE, [key, build_given_key(key)], group, b"$") for key in new for group in sorted(groups)],
    )


async def _begin_sequences(connection: CallConnection, known: Collection[bytes], new: Sequence[bytes]) -> None:
    """Let the sequences of each outbox begin anew on the new shards; its epochs go on.

    Messages that waited meanwhile may have come to a shard that has had later ones of the same outbox, of other keys: it would take them for
    known.
    """
    epochs: dict[bytes, int] = {}
    for flat in await ask(connection, *[Command(b"HGETALL", b"%b:outbox" % key) for key in known]):
        for source, record in zip(flat[::2], flat[1::2], strict=True):
            epoch, _, sequence = record.partition(b":")
            if epoch.isdigit() and sequence.isdigit():
                epochs[source] = max(int(epoch), epochs.get(source, 0))
    words = [word for source, epoch in epochs.items() for word in (source, b"%d:0" % epoch)]
    if words:
        await ask(connection, *[Command(b"HSET", b"%b:outbox" % key, *words) for key in new])


async def _carry_over_policy(connection: CallConnection, old: bytes, new: Sequence[bytes]) -> None:
    """Keep the retention policy of an old shard, if it has one, beside each new one."""
    (policy,) = await ask(connection, Command(b"HGET", build_retention_key(old), b"policy"))
    if policy:
        await ask(connection, *[ScriptCall.of(SET_POLICY, [build_retention_key(key)], policy) for key in new])


async def _persist(connection: CallConnection, keys: Sequence[bytes]) -> None:
    """Keep the streams of shards that an earlier change has let expire, and what is beside them."""
    names = [name for key in keys for name in await _name_parts(connection, key)]
    await ask(connection, *[Command(b"PERSIST", name) for name in names])


async def _expire(connection: CallConnection, keys: Sequence[bytes]) -> None:
    """Let the streams of shards, and what is beside them, expire when the newest entry is older than the policy keeps it."""
    for key in keys:
        (text,) = await ask(connection, Command(b"HGET", build_retention_key(key), b"policy"))
        retain = (RetentionPolicy.of_text(text) if text else DEFAULT).retain
        if retain is not None:
            names = await _name_parts(connection, key)
            await ask(connection, *[Command(b"PEXPIRE", name, b"%d" % (retain * 1000)) for name in names])


async def _name_parts(connection: CallConnection, key: bytes) -> list[bytes]:
    """Return the keys of a shard's stream and of what is beside it, without the dead letters and what expires by itself."""
    names = [key, build_given_key(key), build_retention_key(key), b"%b:outbox" % key]
    (kind,) = await ask(connection, Command(b"TYPE", key))
    if kind != b"none":
        (rows,) = await ask(connection, Command(b"XINFO", b"GROUPS", key))
        names += [build_lease_key(key, to_mapping(row)["name"]) for row in rows]
    return names


async def find_undrained(connection: CallConnection, key: bytes) -> list[Undrained]:
    """Return the groups of a shard that have not handled everything."""
    (kind,) = await ask(connection, Command(b"TYPE", key))
    if kind == b"none":
        return []
    info, rows = await ask(connection, Command(b"XINFO", b"STREAM", key), Command(b"XINFO", b"GROUPS", key))
    last = to_mapping(info)["last-generated-id"]
    groups: list[dict[str, Any]] = [to_mapping(row) for row in rows]
    return [
        Undrained(key.decode(), group["name"].decode(errors="backslashreplace"), group["pending"])
        for group in groups
        if group["pending"] or group["last-delivered-id"] != last
    ]
