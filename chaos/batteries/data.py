"""Data that can't be read or stored: damaged rows in an outbox, foreign entries in a stream, publications that the database of
an inbox refuses. Exactly these are put aside, and the rest goes on."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis

from chaos.check import (
    check_effects,
    check_groups,
    check_handled,
    check_stream,
    dead_letters,
    entries,
    given,
    unfinished,
)
from chaos.events import STREAM
from chaos.stage import ROOT, Stage
from silbo.stores.sqlite import SQLiteStore

LANES: Final = 20
WITHIN: Final = 180.0
DAMAGES: Final = (
    "substr(raw, 2)",
    "substr(raw, 1, length(raw) - 1)",
    "zeroblob(length(raw))",
    "x''",
    "x'ff' || raw",
    "cast('[]' AS BLOB)",
)
"""The damages of a row's message: a byte is gone, all are 0, nothing is left, it is no UTF-8, it is JSON and no message."""
FOREIGN: Final[tuple[dict[Any, Any], ...]] = (
    {"message": ""},
    {"message": "junk"},
    {"message": b"\xff\xfe"},
    {"message": "{}"},
    {"message": '{"message_type": "notification_event"}'},
    {"somebody": "else"},
)
REFUSING: Final = """
CREATE TABLE refused (publication TEXT PRIMARY KEY);
CREATE TRIGGER refuse BEFORE INSERT ON silbo_inbox WHEN NEW.publication IN (SELECT publication FROM refused)
BEGIN SELECT RAISE(ABORT, 'refused'); END;
"""
"""A text that the test's own rule refuses, as PostgreSQL refuses a NUL: SQLite itself refuses no text."""


class Stored(NamedTuple):
    """A row of the outbox, before anything happened to it."""

    id: int
    event: str
    publication: str


async def data(stage: Stage, *, events: int = 2_000, damaged: int = 60, refused: int = 60) -> None:
    """See above; so many events, of which so many can't be read, and so many others can't be remembered."""
    server, store, database = stage.redis(), stage.folder / "outbox.db", stage.folder / "effects.db"
    producer = await stage.start(
        "producer",
        "producer",
        name="p",
        url=server.url,
        ledger=str(stage.ledger("producer")),
        lanes=LANES,
        each=events // LANES,
        store=str(store),
        charges=1,
    )
    await producer.wait(WITHIN)
    safe = given([stage.ledger("producer")])
    rows = [
        Stored(row.id, row.message.message_id, row.message.headers["publication"])
        for row in await _rows(store, "pending")
    ]
    chosen = {
        rows[0],
        *stage.random.sample(rows[1:], damaged + refused - 1),
    }  # the first stops all, where one stops others
    unreadable = {rows[0], *stage.random.sample(sorted(chosen - {rows[0]}), damaged - 1)}
    _damage(stage, store, unreadable)
    await _refuse(database, chosen - unreadable)
    readable = {row.event for row in rows} - {row.event for row in unreadable}
    async with Redis.from_url(server.url) as client:
        foreign = {await _add(client, fields) for fields in FOREIGN}
        relay = await stage.start("relay", "relay", url=server.url, store=str(store), ledger=str(stage.ledger("relay")))
        consumer = await stage.start(
            "consumer",
            "consumer",
            url=server.url,
            ledger=str(stage.ledger("consumer")),
            name="c",
            max_attempts=2,
            effects=str(database),
        )
        foreign |= {await _add(client, fields) for fields in FOREIGN}

        async def finished() -> bool:
            sent = await client.xlen(STREAM) >= len(readable) + len(foreign)
            return sent and not (await unfinished(client, "readers") or await unfinished(client, "effects"))

        await stage.settled("all events handled or dead", finished, WITHIN)
        await relay.stop()
        await consumer.stop()
        stage.note("rows damaged", len(unreadable))
        stage.note("foreign entries", len(foreign))
        stage.note("publications refused", len(chosen - unreadable))
        dead_rows = {row.id for row in await _rows(store, "dead")}
        stage.zero("damaged rows that are not dead", len({row.id for row in unreadable} - dead_rows))
        stage.zero("dead rows of others", len(dead_rows - {row.id for row in unreadable}))
        letters = await dead_letters(server.url)
        named = {row.event for row in chosen - unreadable}
        stage.zero("dead letters of others", sum(event not in named for event in letters if event))
        stage.zero("refused that are no dead letter", len(named - set(letters)))
        stage.same("dead letters", len(letters), len(named) + 2 * len(foreign))  # of both groups
        await client.xadd(f"{STREAM}:dead", {"somebody": "else"})
        stage.same("dead letters listed beside a foreign one", await _list_dead_letters(server.url), len(letters) + 1)
    check_stream(
        stage, {event: safe[event] for event in readable & safe.keys()}, await entries(server.url, foreign=foreign)
    )
    check_handled(stage, readable, [stage.ledger("consumer")])
    check_effects(stage, readable - named, database)
    await check_groups(stage, server.url)


async def _add(client: Any, fields: dict[Any, Any]) -> bytes:
    added: bytes = await client.xadd(STREAM, fields)
    return added


async def _rows(path: Path, state: Any) -> list[Any]:
    store, found = SQLiteStore(path, create=False), list[Any]()
    await store.open()
    try:
        while page := await store.rows(state, after=found[-1].id if found else 0, limit=1_000):
            found += page
    finally:
        await store.aclose()
    return found


def _damage(stage: Stage, path: Path, rows: set[Stored]) -> None:
    connection = sqlite3.connect(path)
    try:
        for row in sorted(rows):
            how = stage.random.choice(DAMAGES)
            connection.execute(f"UPDATE message SET raw = CAST({how} AS BLOB) WHERE id = ?", (row.id,))
        connection.commit()
    finally:
        connection.close()


async def _refuse(database: Path, rows: set[Stored]) -> None:
    from chaos.effects import Effects  # not every Python that plays here has SQLAlchemy

    async with Effects(str(database)):
        connection = sqlite3.connect(database)
        try:
            connection.executescript(REFUSING)
            connection.executemany("INSERT INTO refused VALUES (?)", [(row.publication,) for row in rows])
            connection.commit()
        finally:
            connection.close()


async def _list_dead_letters(url: str) -> int:
    """Count the dead letters that the command line shows, page by page."""
    many, last = 0, ""
    while True:
        options = ["--json", "--limit", "1000", *(["--after", last] if last else [])]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "silbo", "dead", "list", "--redis", url, *options],
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        told, _ = await process.communicate()
        page = [json.loads(line) for line in told.splitlines()]
        if not page:
            return many
        many, last = many + len(page), page[-1]["id"]
