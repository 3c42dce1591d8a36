"""A relay hears of each commit through PostgreSQL's NOTIFY, where that was chosen. Here it would look by itself in minutes only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from silbo.brokers.memory import MemoryBroker
from silbo.errors import StoreInvalid
from silbo.outbox import division
from silbo.outbox.relay import Relay
from silbo.outbox.rows import Quota
from silbo.stores.sqlalchemy import SQLAlchemyStore, notifications
from tests.support.command_line import silbo
from tests.support.store_conformance import packed

pytestmark = pytest.mark.postgresql

MakeEngine = Callable[..., AsyncEngine]


@pytest.fixture
async def store(engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
    """The program's that stores; the relay has another, and nothing wakes it in this process."""
    store = SQLAlchemyStore(engine, notify=True)
    await store.open(1)
    yield store
    await store.aclose()


@pytest.fixture
async def relay(
    store: SQLAlchemyStore, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Relay]:
    """It looks twice when it begins, and then every 200 seconds; its connection is not asked if it still stands."""
    monkeypatch.setattr(notifications, "CHECK_EVERY", 600.0)
    monkeypatch.setattr(division, "LOOK_GROWTH", 1e6)
    monkeypatch.setattr(division, "LONGEST_LOOK", 1e6)
    theirs = SQLAlchemyStore(make_engine(), notify=True)
    async with Relay(theirs, MemoryBroker("shop"), lease=600.0) as relay:
        running = asyncio.ensure_future(relay.run())
        await until_sent(store, 0)
        yield relay
        relay.stop()
        await running


async def until_sent(store: SQLAlchemyStore, number: int) -> None:
    """Wait until so many messages are sent; those that are stored first let the relay lead and rest."""
    async with asyncio.timeout(30):
        if not number:
            await store.add(packed(1), Quota())
            number = 1
        while len(await store.rows("sent")) < number:
            await asyncio.sleep(0.02)


async def test_commit_is_heard_of_at_once(store: SQLAlchemyStore, relay: Relay) -> None:
    """One after another, each when the relay rests."""
    for number in range(2, 8):
        await store.add(packed(number), Quota())
        await until_sent(store, number)
        await asyncio.sleep(3 * division.SHORTEST_LOOK)  # the look after a sending, which finds nothing
    assert relay.health().is_connected


async def test_commit_of_a_session_is_heard_of(store: SQLAlchemyStore, relay: Relay, engine: AsyncEngine) -> None:
    """A transaction that is rolled back tells nothing."""
    await asyncio.sleep(3 * division.SHORTEST_LOOK)
    async with AsyncSession(engine) as session:
        await store.add_in(session, packed(2), Quota())
        await session.rollback()
        await store.add_in(session, packed(3), Quota())
        await session.commit()
    await until_sent(store, 2)


async def test_relay_listens_again_when_its_connection_was_ended(
    store: SQLAlchemyStore, relay: Relay, engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """What was committed in between is found; the relay's health does not suffer, for it looks as well."""
    async with engine.begin() as connection:
        ended = await connection.scalar(
            text("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
        )
    assert ended == 1
    await store.add(packed(2), Quota())
    await until_sent(store, 2)
    assert relay.health().is_connected
    assert "notifications of commits" in caplog.text
    await store.add(packed(3), Quota())
    await until_sent(store, 3)


async def test_connection_that_brings_nothing_is_asked(
    store: SQLAlchemyStore, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, engine: AsyncEngine
) -> None:
    monkeypatch.setattr(notifications, "CHECK_EVERY", 0.05)
    listening = asyncio.ensure_future(store.listen(lambda: None))
    async with asyncio.timeout(30):
        while not await _count(engine, "query = 'SELECT 1'"):
            await asyncio.sleep(0.02)
    listening.cancel()
    await asyncio.wait([listening])
    async with asyncio.timeout(30):
        while await _count(engine, "query = 'SELECT 1'"):  # its connection is closed, and not given to others
            await asyncio.sleep(0.02)


async def _count(engine: AsyncEngine, where: str) -> int:
    async with engine.connect() as connection:
        found = await connection.scalar(text(f"SELECT count(*) FROM pg_stat_activity WHERE {where}"))
    return int(found or 0)


async def test_store_that_does_not_notify_costs_nothing(engine: AsyncEngine, make_engine: MakeEngine) -> None:
    """No NOTIFY, and no connection that listens."""
    heard: list[str] = []
    store = SQLAlchemyStore(engine)
    await store.open(1)
    async with make_engine().connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver
        await driver.add_listener(notifications.CHANNEL, lambda *_: heard.append("store"))
        async with Relay(store, MemoryBroker("shop")) as relay:
            running = asyncio.ensure_future(relay.run())
            await until_sent(store, 0)
            assert await _count(engine, "query LIKE 'LISTEN%'") == 1  # this test's own
            relay.stop()
            await running
        await driver.fetchval("SELECT 1")
    assert not heard


async def test_engine_that_can_not_be_listened_on_is_refused(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    with pytest.raises(StoreInvalid, match=r"notify=True needs PostgreSQL, and an engine of postgresql\+asyncpg"):
        SQLAlchemyStore(engine, notify=True)
    await engine.dispose()


async def test_command_says_what_it_needs(tmp_path: Path) -> None:
    done = await silbo("relay", "--notify", "--store", f"{tmp_path}/outbox.db", "--redis", "redis://127.0.0.1:1")
    assert done.code == 2
    assert "--notify needs an outbox in PostgreSQL" in done.err
