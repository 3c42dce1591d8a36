"""The command line on an outbox in the host's own database, through SQLAlchemy."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from silbo import Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlalchemy import SQLAlchemyStore
from silbo.stores.sqlalchemy.urls import describe_url
from tests.support.command_line import message, relay, silbo, stopped, without
from tests.support.redis_streams import eventually


@pytest.fixture
async def url(tmp_path: Path) -> str:
    """Of a database with 3 messages that wait."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}"
    engine = create_async_engine(url)
    store = SQLAlchemyStore(engine)
    await store.create()
    async with Outbox(store, MemoryBroker(app="shop"), relay=False) as outbox:
        await outbox.publish(*map(message, range(3)))
    await engine.dispose()
    return url


@pytest.mark.long
async def test_what_is_in_a_database_is_seen_sent_and_replayed(
    url: str, redis: Redis, redis_url: str, prefix: str
) -> None:
    async def has(many: int) -> bool:
        return int(await redis.xlen(f"{prefix}:{{events}}")) == many

    async def are_sent() -> bool:
        shown = await silbo("outbox", "status", "--store", url, "--json")
        return bool(shown.object["rows"]["sent"] == 3)

    status = await silbo("outbox", "status", "--store", url, "--json")
    assert status.object["rows"] == {"pending": 3, "sending": 0, "sent": 0, "dead": 0}
    async with relay("--store", url, "--redis", redis_url, "--prefix", prefix) as process:
        await eventually(lambda: has(3))
        await eventually(are_sent)  # the relay marks rows after the broker has them
        done = await silbo("outbox", "replay", "--since", "1h", "--yes", "--json", "--store", url)
        assert done.object == {"replayed": 3}
        await eventually(lambda: has(6))
        await stopped(process)
    purged = await silbo("outbox", "purge", "sent", "--before", "now", "--yes", "--json", "--store", url)
    assert purged.object == {"purged": 3}


async def test_database_without_our_tables_is_an_error_and_stays_as_it_is(tmp_path: Path) -> None:
    """They come by the host's migrations, not by looking."""
    path = tmp_path / "shop.db"
    path.touch()
    done = await silbo("outbox", "status", "--store", f"sqlite+aiosqlite:///{path}")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("library", "code", "hint"),
    [("sqlalchemy", 1, "pip install 'silbo[sqlalchemy]'"), ("asyncpg", 2, "pip install asyncpg")],
)
async def test_missing_library_is_named(library: str, code: int, hint: str) -> None:
    place = "postgresql+asyncpg://shop@localhost:1/shop"
    done = await silbo("outbox", "status", "--store", place, command=without(library))
    assert (done.code, done.out) == (code, "") and hint in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("dead", "list", "--redis", "redis://u:4711/x@127.0.0.1:1/0"),
        ("dead", "list", "--redis", "redis://u:secret#x@127.0.0.1:1/0"),
        ("dead", "list", "--redis", "redis://u:p@127.0.0.1:1/0?secret=1"),
        ("outbox", "status", "--store", "postgresql+asyncpg://u:p@127.0.0.1:secret/db"),
    ],
    ids=lambda arguments: arguments[-1],
)
async def test_wrong_url_is_one_line_without_a_part_of_the_password(arguments: tuple[str, ...]) -> None:
    done = await silbo(*arguments)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert "4711" not in done.err
    assert "secret" not in done.err
    assert "%2F for /" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("outbox", "status", "--store", "postgresql:u:secret@h/x"),
        ("outbox", "status", "postgresql+asyncpg://u:secret@h/x"),
        ("dead", "list", "--reddis=redis://:secret@h"),
        ("dead", "list", "--x", "postgresql+asyncpg://h/x?user=u&password=secret&a=1"),
    ],
    ids=lambda arguments: arguments[-1],
)
async def test_url_in_a_wrong_place_is_an_error_without_its_password(arguments: tuple[str, ...]) -> None:
    done = await silbo(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err and "secret" not in done.err


async def test_password_that_is_an_option_of_a_database_is_not_shown() -> None:
    """As drivers take it behind the ``?``; the rest of the URL tells which database is meant."""
    place = "postgresql+asyncpg://127.0.0.1:1/shop?user=u&password=secret"
    done = await silbo("outbox", "status", "--store", place, command=without("asyncpg"))
    assert "secret" not in done.err
    shown = describe_url(make_url(place))
    assert "secret" not in shown and "127.0.0.1:1/shop" in shown and "user=u" in shown
    assert describe_url(make_url("postgresql+asyncpg://u:secret@h/x")) == "postgresql+asyncpg://u:***@h/x"


@pytest.mark.parametrize("mode", ["delete", "wal"])
async def test_file_that_sqlalchemy_made_is_told_with_its_url(url: str, mode: str) -> None:
    """A path stands for silbo's own file; in WAL mode, too, nobody is told to change the host's database."""
    path = url.removeprefix("sqlite+aiosqlite:///")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={mode}")
    done = await silbo("outbox", "status", "--store", path)
    assert done.code == 1 and done.err.endswith(f"is the outbox of a SQLAlchemyStore: its URL is {url}\n"), done.err
    assert (await silbo("outbox", "status", "--store", url, "--json")).object["rows"]["pending"] == 3
