"""The figures of streams, groups and an outbox, again and again: what moves, and how fast."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from silbo._checks import check_seconds
from silbo.brokers.redis.calls import CallConnection, Command, ask, to_mapping
from silbo.brokers.redis.connection import Client
from silbo.errors import BrokerUnavailable, StoreUnavailable, StreamMissing
from silbo.operations.groups import SILENT_AFTER, GroupStatus, read_stream_groups
from silbo.operations.redis import AwayHook, AwayNode, choose_streams, opened, read_clock, read_each
from silbo.outbox.rows import OutboxStatus, OutboxStore

__all__ = ["GroupFigures", "Snapshot", "watch"]


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """One group at one moment, and its speed since the moment before.

    Attributes:
        status: The group.
        added_rate: Messages a second that were added to its stream; None at first.
        done_rate: Messages a second that it has acknowledged or given up; None at first.
    """

    status: GroupStatus
    added_rate: float | None
    done_rate: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All figures at one moment.

    Attributes:
        at: The time by Redis's clock.
        groups: The groups of all streams.
        outbox: The outbox; None without one.
        outbox_at: The time by the store's clock, which the times of the outbox are by.
        error: The reason why the other figures are those of the moment before; None while all is well.
        missing: The reason why there are no groups: no such stream exists yet. None if there is one.
        outbox_error: The error of the last attempt of the outbox's oldest row, which waits; None for none.
        away: The nodes of a cluster that can't be reached: there are no groups of theirs.
    """

    at: datetime
    groups: Sequence[GroupFigures]
    outbox: OutboxStatus | None = None
    outbox_at: datetime | None = None
    error: str | None = None
    missing: str | None = None
    outbox_error: str | None = None
    away: Sequence[AwayNode] = ()


async def watch(
    client: Client,
    *,
    store: OutboxStore | None = None,
    prefix: str = "silbo",
    stream: str | None = None,
    every: float = 2.0,
    silent_after: float = SILENT_AFTER,
    timeout: float = 5.0,  # of each step
) -> AsyncGenerator[Snapshot]:
    """Yield a snapshot, and another one after each interval. Nothing is written; does not end by itself.

    Redis 6.2 does not count what was added: there the speeds are those of the streams' lengths, too low while old entries are
    removed.

    Args:
        client: The program's client.
        store: The outbox's store, open; None for none.
        prefix: The broker's prefix.
        stream: The stream's address; None takes all streams that are under the prefix when it begins. Where there is none,
            snapshots have no groups until there is one.
        every: Seconds between two snapshots.
        silent_after: Seconds without a sign after which a consumer counts as silent: the groups' ``claim_after``.
        timeout: Seconds in which each step is answered.

    Raises:
        BrokerUnavailable: Redis can't be reached at the beginning; later the snapshot tells.
        StoreUnavailable: likewise the store.
    """
    check_seconds("every", every, zero=True)
    async with opened(client, timeout) as connection:
        keys: Sequence[str] = ()
        before: Snapshot | None = None
        counts: Mapping[str, int] = {}
        while True:
            away: dict[str, AwayNode] = {}

            def on_away(node: AwayNode, away: dict[str, AwayNode] = away) -> None:
                away.setdefault(node.node, node)

            try:
                missing = None
                if not keys or (before and before.away):
                    keys, missing = await _choose_or_none(connection, prefix, stream, on_away)
                snapshot, counts = await _read(connection, keys, store, before, counts, silent_after, on_away)
                before = replace(snapshot, missing=missing, away=tuple(away.values()))
                yield before
            except (BrokerUnavailable, StoreUnavailable) as error:
                if before is None:
                    raise
                yield replace(before, error=str(error))
            await asyncio.sleep(every)


async def _choose_or_none(
    connection: CallConnection, prefix: str, stream: str | None, on_away: AwayHook
) -> tuple[Sequence[str], str | None]:
    """Return the keys of the streams; where there is none, no keys, and the reason."""
    try:
        return await choose_streams(connection, prefix, stream, on_away), None
    except StreamMissing as error:
        return (), str(error)


async def _find_error(store: OutboxStore) -> str | None:
    """Return the error of the last attempt of the first row that is being sent, or waits."""
    for state in ("sending", "pending"):
        for row in await store.rows(state, limit=1):
            if row.error:
                return row.error
    return None


async def _read(
    connection: CallConnection,
    keys: Sequence[str],
    store: OutboxStore | None,
    before: Snapshot | None,
    counts: Mapping[str, int],
    silent_after: float,
    on_away: AwayHook,
) -> tuple[Snapshot, dict[str, int]]:
    """Return the figures now, and the number of messages that were ever added to each stream."""
    now = await read_clock(connection)
    seconds = (now - before.at).total_seconds() if before else 0.0
    done = {_name(each.status): _count_done(each.status, counts) for each in before.groups} if before else {}
    added: dict[str, int] = {}
    groups: list[GroupFigures] = []

    async def read(key: bytes) -> None:
        (reply,) = await ask(connection, Command(b"XINFO", b"STREAM", key))
        info = to_mapping(reply)
        added[key.decode()] = many = int(info["entries-added"] if "entries-added" in info else info["length"])
        for status in await read_stream_groups(connection, key, silent_after):
            rates: tuple[float | None, float | None] = None, None
            if seconds > 0 and _name(status) in done:
                handled = _count_done(status, added) - done[_name(status)]
                rates = max(0.0, (many - counts[key.decode()]) / seconds), max(0.0, handled / seconds)
            groups.append(GroupFigures(status, *rates))

    await read_each(connection, keys, read, on_away)
    outbox = await store.status() if store is not None else None
    outbox_at = await store.read_clock() if store is not None else None
    outbox_error = await _find_error(store) if store is not None else None
    return Snapshot(now, groups, outbox, outbox_at, outbox_error=outbox_error), added


def _name(status: GroupStatus) -> tuple[str, str]:
    return status.stream, status.group


def _count_done(status: GroupStatus, added: Mapping[str, int]) -> int:
    """Return the number of messages that a group has done, of all that were ever added to its stream."""
    return added[status.stream] - status.lag - status.in_hand
