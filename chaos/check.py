"""What must be there afterwards: ledgers against the stream, the groups, the dead letters."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from chaos.client import make_client
from chaos.events import STREAM
from chaos.ledger import read
from chaos.stage import Stage

__all__ = [
    "Entry",
    "Given",
    "check_effects",
    "check_groups",
    "check_handled",
    "check_stream",
    "dead_letters",
    "entries",
    "given",
]

PAGE = 2_000

Given = dict[str, tuple[str, int]]
"""Event id -> lane and number."""


class Entry(NamedTuple):
    """What the stream has of one event."""

    id: str
    event: str
    publication: str
    name: str
    lane: str
    number: int


def given(ledgers: Iterable[Path]) -> Given:
    """What producers were told to be safe."""
    return {event: (lane, int(number)) for path in ledgers for lane, number, event in read(path)}


async def entries(url: str, stream: str = STREAM, *, foreign: Container[bytes] = ()) -> list[Entry]:
    """All that is in the stream, in its order, but for `foreign` entries, by their ids."""
    async with make_client(url) as client:
        return [_entry(id_, fields) async for id_, fields in _pages(client, stream) if id_ not in foreign]


async def dead_letters(url: str) -> list[str]:
    """The ids of the events that are dead letters, in their order; empty for what is no event."""
    async with Redis.from_url(url) as client:
        return [_event(entry_id, fields) async for entry_id, fields in _pages(client, f"{STREAM}:dead")]


def _event(entry_id: bytes, fields: dict[bytes, bytes]) -> str:
    try:
        return _entry(entry_id, fields).event
    except (KeyError, msgspec.DecodeError):
        return ""


async def _pages(client: Any, stream: str) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
    after = "-"
    while page := await client.xrange(stream, min=after, count=PAGE):
        for entry in page:
            yield entry
        after = f"({page[-1][0].decode()}"


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> Entry:
    message: Any = msgspec.json.decode(fields[b"message"])
    payload = message["payload"]
    return Entry(
        entry_id.decode(),
        message["message_id"],
        message["headers"]["publication"],
        message["message_name"],
        payload["lane"],
        payload["number"],
    )


def check_stream(stage: Stage, given: Given, found: Sequence[Entry], *, ordered: bool = True) -> None:
    """Nothing is lost, doubled, or out of its lane's order."""
    events = {entry.event for entry in found}
    publications = Counter(entry.publication for entry in found)
    stage.note("given", len(given))
    stage.note("in the stream", len(found))
    stage.zero("lost", len(given.keys() - events))
    if not ordered:  # after a replay
        return
    stage.zero("duplicates", sum(publications.values()) - len(publications))
    last: dict[str, int] = {}
    inversions = 0
    for entry in found:
        inversions += entry.number < last.get(entry.lane, 0)
        last[entry.lane] = entry.number
    stage.zero("inversions", inversions)


def check_handled(stage: Stage, wanted: Iterable[str], ledgers: Iterable[Path]) -> Counter[str]:
    """Everything that was to be handled was; how often each was."""
    handled = Counter(event for path in ledgers for _, _, event in read(path))
    stage.note("handled", len(handled))
    stage.zero("not handled", len(set(wanted) - handled.keys()))
    stage.note("redelivered", sum(handled.values()) - len(handled))
    return handled


async def check_groups(stage: Stage, url: str) -> None:
    """Nothing is stuck: every group has read all of it, and nothing is pending."""
    async with Redis.from_url(url) as client:
        waiting = {
            group["name"].decode(): await unfinished(client, group["name"])
            for group in await client.xinfo_groups(STREAM)
        }
    many = sum(waiting.values())
    stage.must("stuck pending", many, many == 0, f"0, by group {waiting}")


async def unfinished(client: Any, group: bytes | str, stream: str = STREAM) -> int:
    """What is pending in a group, and 1 if there is something that it has not read."""
    name = group if isinstance(group, str) else group.decode()
    for info in await client.xinfo_groups(stream):
        if info["name"].decode() == name:
            unread = await client.xrange(stream, min=f"({info['last-delivered-id'].decode()}", count=1)
            return int(info["pending"]) + len(unread)
    return 1


def check_effects(stage: Stage, wanted: set[str], database: Path) -> None:
    """Each event has its row, and no two."""
    connection = sqlite3.connect(database)
    try:
        had = Counter(event for (event,) in connection.execute("SELECT event FROM effect"))
    finally:
        connection.close()
    stage.note("effects in a database", len(had))
    stage.zero("without their effect", len(wanted - had.keys()))
    stage.zero("double effects", sum(had.values()) - len(had))
