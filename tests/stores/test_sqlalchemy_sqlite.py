"""What SQLite, and how a host has set it up, asks of the store in its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool

from silbo.errors import MessageInvalid, MessageRefused, StoreInvalid, StoreUnavailable
from silbo.outbox.rows import Packed, Quota
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore
from tests.support.store_conformance import LONG, PLENTY, in_state, numbers, packed

Make = Callable[[], AsyncEngine]


@pytest.fixture
async def engines() -> AsyncIterator[list[AsyncEngine]]:
    """Those that the test makes."""
    engines: list[AsyncEngine] = []
    yield engines
    for engine in engines:
        await engine.dispose()


@pytest.fixture(params=["default", "BEGIN", "BEGIN IMMEDIATE", "WAL"])
def make(request: pytest.FixtureRequest, tmp_path: Path, engines: list[AsyncEngine]) -> Make:
    """Engines as hosts set them up; BEGIN is SQLAlchemy's own recipe for transactions that hold for reads too."""

    def make() -> AsyncEngine:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}", connect_args={"timeout": 30})
        engines.append(engine)
        if request.param == "default":
            return engine

        @event.listens_for(engine.sync_engine, "connect")
        def on_connect(connection: Any, _: object) -> None:
            if request.param == "WAL":
                connection.cursor().execute("PRAGMA journal_mode=WAL")
            else:
                connection.isolation_level = None

        if request.param != "WAL":

            @event.listens_for(engine.sync_engine, "begin")
            def on_begin(connection: Any) -> None:
                connection.exec_driver_sql(request.param)

        return engine

    return make


@pytest.mark.long
async def test_those_who_write_at_the_same_time_wait_for_one_another(make: Make) -> None:
    """A transaction that read first, and finds another writer when it wants to write, would fail at once."""
    stores = [SQLAlchemyStore(make()) for _ in range(4)]
    await stores[0].create()
    for store in stores:
        await store.open()

    async def work(store: SQLAlchemyStore, number: int) -> None:
        for step in range(8):
            await store.add(packed(step), PLENTY)
            lead = await store.lead(0, "a", lease=LONG)
            assert lead is not None
            if rows := await store.take(lead, 2):
                await store.settle(lead, [rows[0].id], {})
            await store.forget(keep_sent=0, limit=1)

    await asyncio.gather(*(work(store, number) for number, store in enumerate(stores)))
    status = await stores[0].status()
    assert status.counts["dead"] == 0
    for store in stores:
        await store.aclose()


async def test_deliveries_at_the_same_time_wait_for_one_another(make: Make) -> None:
    inbox = SQLAlchemyInbox(make())
    await inbox.create()

    async def handle(number: int) -> bool:
        async with inbox.handling("billing", f"p-{number % 5}") as new:
            await asyncio.sleep(0.001)
            return new

    assert sum(await asyncio.gather(*map(handle, range(20)))) == 5


async def test_file_that_stays_locked_is_given_up_in_time(tmp_path: Path, engines: list[AsyncEngine]) -> None:
    """That is the driver's timeout, five seconds where the host says nothing else."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}", connect_args={"timeout": 0.1})
    engines.append(engine)
    store = SQLAlchemyStore(engine)
    await store.create()
    await store.open()
    async with async_sessionmaker(engine)() as session:
        await session.execute(text("UPDATE silbo_outbox SET number = 1"))
        with pytest.raises(StoreUnavailable, match="nothing was stored$"):
            await store.add(packed(1), PLENTY)
    await store.add(packed(2), PLENTY)
    assert numbers(await store.rows("pending")) == [2]
    await store.aclose()


async def test_one_connection_for_everybody_is_refused(engines: list[AsyncEngine]) -> None:
    """The relay's commit would be the commit of whatever the host has under way."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
    engines.append(engine)
    with pytest.raises(StoreInvalid, match="each commit is everybody's: use a file"):
        SQLAlchemyStore(engine)


async def test_other_databases_are_refused(engines: list[AsyncEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = create_async_engine("sqlite+aiosqlite://")
    engines.append(engine)
    monkeypatch.setattr(engine.dialect, "name", "mysql")  # its driver is not installed here
    with pytest.raises(StoreInvalid, match="PostgreSQL or SQLite, not in mysql"):
        SQLAlchemyStore(engine)


async def test_message_that_can_not_be_stored_is_refused_alone(tmp_path: Path, engines: list[AsyncEngine]) -> None:
    """It is no outage: those that are committed with it are stored."""
    engines.append(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}"))
    store = SQLAlchemyStore(engines[0])
    await store.create()
    await store.open()
    damaged = Packed(partition=0, key=None, raw=b"\xff")
    calls = [packed(1), [*packed(2), damaged], packed(3)]
    answers = await asyncio.gather(*(store.add(call, Quota()) for call in calls), return_exceptions=True)
    assert [type(answer) for answer in answers] == [type(None), MessageRefused, type(None)]
    assert await in_state(store, "pending") == [1, 2, 3]
    await store.aclose()


async def test_publication_that_can_not_be_stored_is_no_outage_of_the_inbox(
    tmp_path: Path, engines: list[AsyncEngine]
) -> None:
    """It would be tried for ever."""
    engines.append(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}"))
    inbox = SQLAlchemyInbox(engines[0])
    await inbox.create()
    with pytest.raises(MessageInvalid):
        async with inbox.handling("g", "\ud800"):
            pass
