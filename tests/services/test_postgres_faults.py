"""A PostgreSQL that is killed, frozen, locked, or set up in another way."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from silbo import Outbox
from silbo.errors import DeliveryUnknown, StoreInvalid, StoreUnavailable
from silbo.outbox.rows import pack
from silbo.stores.sqlalchemy import SQLAlchemyStore, metadata, status
from silbo.stores.sqlalchemy import store as module
from tests.support.session_conformance import Recorder
from tests.support.store_conformance import LONG, PLENTY, leader, message, numbers, packed, send
from tools.postgres import PostgresServer

pytestmark = pytest.mark.postgresql


@pytest.fixture
async def store(engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
    store = SQLAlchemyStore(engine)
    await store.open()
    yield store
    await store.aclose()


@pytest.fixture
async def own_engine(own_postgres: PostgresServer) -> AsyncIterator[AsyncEngine]:
    """On a server that the test may kill."""
    engine = create_async_engine(own_postgres.url)
    await SQLAlchemyStore(engine).create()
    yield engine
    await engine.dispose()


@pytest.fixture
async def own_store(own_engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
    store = SQLAlchemyStore(own_engine)
    await store.open()
    yield store
    await store.aclose()


def when(engine: AsyncEngine, what: str, act: Callable[[], object]) -> None:
    """Do something once, just before the next BEGIN or COMMIT is sent."""
    event.listen(engine.sync_engine, what, lambda _: act(), once=True)


async def back(store: SQLAlchemyStore) -> None:
    """Wait until the server takes connections again."""
    async with asyncio.timeout(10):
        while True:
            try:
                await store.status()
            except StoreUnavailable:
                await asyncio.sleep(0.05)
            else:
                return


async def test_commit_that_is_not_answered_is_unknown(
    own_engine: AsyncEngine, own_postgres: PostgresServer, own_store: SQLAlchemyStore
) -> None:
    """Killed before the commit came or after it: the caller can't tell."""
    await own_store.add(packed(1), PLENTY)
    when(own_engine, "commit", own_postgres.kill)
    with pytest.raises(DeliveryUnknown, match="the commit was not answered"):
        await own_store.add(packed(2), PLENTY)
    with pytest.raises(StoreUnavailable, match="nothing was stored"):
        await own_store.add(packed(3), PLENTY)
    own_postgres.restart()
    await back(own_store)
    await own_store.add(packed(4), PLENTY)
    assert numbers(await own_store.rows("pending")) == [1, 4]


async def test_frozen_database_is_given_up_in_time(
    own_engine: AsyncEngine, own_postgres: PostgresServer, own_store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    for what, error in [("begin", StoreUnavailable), ("commit", DeliveryUnknown)]:
        when(own_engine, what, own_postgres.pause)
        async with asyncio.timeout(5):  # to break off has its own time
            with pytest.raises(error, match=r"no answer within 0\.3 s"):
                await own_store.add(packed(1), PLENTY)
        own_postgres.resume()
    monkeypatch.undo()
    await back(own_store)
    await own_store.add(packed(2), PLENTY)


async def test_table_that_somebody_has_locked_is_given_up_in_time(
    engine: AsyncEngine, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    async with engine.begin() as connection:
        await connection.execute(text("LOCK TABLE silbo_message"))
        with pytest.raises(StoreUnavailable, match=r"no answer within 0\.3 s; nothing was stored"):
            await store.add(packed(1), PLENTY)
    await store.add(packed(2), PLENTY)
    assert numbers(await store.rows("pending")) == [2]


async def test_pool_without_a_free_connection_is_given_up_in_time(
    make_engine: Callable[..., AsyncEngine], store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_engine(pool_size=1, max_overflow=0, pool_timeout=0.1)
    other = SQLAlchemyStore(small)
    await other.open()
    async with small.connect():
        with pytest.raises(StoreUnavailable, match="nothing was stored") as caught:
            await other.add(packed(1), PLENTY)
        assert isinstance(caught.value.__cause__, NoConnection)
    await other.add(packed(2), PLENTY)


async def test_server_that_is_not_there_is_unavailable() -> None:
    engine = create_async_engine("postgresql+asyncpg://silbo@127.0.0.1:1/postgres")
    with pytest.raises(StoreUnavailable, match="127.0.0.1"):
        await SQLAlchemyStore(engine).open()
    await engine.dispose()


async def test_relay_goes_on_after_a_restart(own_postgres: PostgresServer, own_engine: AsyncEngine) -> None:
    recorder = Recorder()
    async with Outbox(SQLAlchemyStore(own_engine), recorder, on_error=lambda *_: None) as outbox:
        await outbox.publish(message(1))
        await recorder.arrived.wait()
        await asyncio.to_thread(own_postgres.restart)
        async with asyncio.timeout(10):
            while True:
                try:
                    await outbox.publish(message(2))
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
                else:
                    break
            while numbers_of(recorder) != [1, 2]:
                await asyncio.sleep(0.02)


def numbers_of(recorder: Recorder) -> list[int]:
    """Each once: it may get one twice that was under way, for it knows no sequences."""
    return sorted({each.payload["n"] for each in recorder.got})


async def test_what_the_hosts_isolation_is_does_not_matter(
    make_engine: Callable[..., AsyncEngine], engine: AsyncEngine
) -> None:
    """Renewals that wait for one another are no conflict: what was committed meanwhile is seen."""
    store = SQLAlchemyStore(make_engine(isolation_level="SERIALIZABLE", pool_size=10))
    await store.open()
    leads = await asyncio.gather(*(store.lead(0, "a", lease=LONG) for _ in range(30)))
    assert {lead and lead.epoch for lead in leads} == {1}
    await store.aclose()


async def test_partitions_do_not_change_beside_a_transaction_that_stores(
    make_engine: Callable[..., AsyncEngine], engine: AsyncEngine
) -> None:
    """Its messages would be in the partitions of before."""
    store, other = SQLAlchemyStore(engine), SQLAlchemyStore(make_engine())
    await store.open(2)
    async with async_sessionmaker(engine)() as session:
        await store.add_in(session, [pack(message(1, "a"), 2)], PLENTY)
        opening = asyncio.create_task(other.open(3))
        await somebody_waits(engine)
        await session.commit()
    with pytest.raises(StoreInvalid, match="1 messages in 2 partitions"):
        await opening
    lead = await leader(store, partition=1) if (await store.rows("pending"))[0].partition else await leader(store)
    await send(store, lead)
    await store.resign(lead)
    await other.open(3)
    async with async_sessionmaker(engine)() as session:
        with pytest.raises(StoreInvalid, match="has 3 partitions by now"):
            await store.add_in(session, [pack(message(2, "a"), 2)], PLENTY)
        await session.commit()
    assert await store.rows("pending") == []
    for each in (store, other):
        await each.aclose()


async def somebody_waits(engine: AsyncEngine) -> None:
    async with asyncio.timeout(5), engine.connect() as connection:
        while not await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            await asyncio.sleep(0.01)


async def test_deletion_does_not_wait_for_rows_that_somebody_holds(engine: AsyncEngine, store: SQLAlchemyStore) -> None:
    """Two relays forget at the same time, and neither waits for the other."""
    await store.add(packed(1, 2, 3), PLENTY)
    first, *_ = await send(store, await leader(store))
    messages = metadata.tables["silbo_message"]
    async with engine.begin() as connection:
        await connection.execute(select(messages).where(messages.c.id == first.id).with_for_update())
        async with asyncio.timeout(5):
            assert await store.forget(keep_sent=0) == 2
    assert await store.forget(keep_sent=0) == 1


async def fill(engine: AsyncEngine, state: str, rows: int) -> None:
    """Insert rows in a state, and let the database count them."""
    statement = (
        "INSERT INTO silbo_message (partition, state, message, size, attempts, sequence, stored_at, state_at)"
        f" SELECT 0, '{state}', '{{}}', 2, 1, n, now(), now() FROM generate_series(1, {rows}) AS n"
    )
    async with engine.begin() as connection:
        await connection.execute(text(statement))
        await connection.execute(text("ANALYZE silbo_message"))


async def test_millions_of_rows_are_estimated(
    engine: AsyncEngine, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a number of them they are counted, and the status says which are not."""
    await fill(engine, "sent", 5000)
    assert (await store.status()).counts["sent"] == 5000
    assert not (await store.status()).estimated
    monkeypatch.setattr(status, "SUMMED", 100)
    estimate = await store.status()
    assert estimate.estimated == {"sent"}
    assert 4000 < estimate.counts["sent"] < 6000
    assert estimate.oldest_sent_at is not None
    monkeypatch.setattr(status, "COUNTED", 1000)
    await fill(engine, "pending", 3000)
    await fill(engine, "dead", 2000)
    estimate = await store.status()
    assert estimate.estimated == {"sent", "pending", "dead"}
    assert 2400 < estimate.counts["pending"] < 3600
    assert 1600 < estimate.counts["dead"] < 2400
    assert estimate.size == 2 * (estimate.counts["pending"] + estimate.counts["dead"])
    assert estimate.oldest_at is not None


async def test_large_store_is_read_by_its_indexes(engine: AsyncEngine, store: SQLAlchemyStore) -> None:
    """An hour of sent rows slows down neither a poll nor a count."""
    await fill(engine, "sent", 20_000)
    asked: list[tuple[str, object]] = []
    event.listen(
        engine.sync_engine,
        "before_cursor_execute",
        lambda c, cursor, statement, parameters, *_: asked.append((statement, parameters)),
    )
    await store.add(packed(1, 2), PLENTY)
    lead = await leader(store)
    await send(store, lead)
    await store.rows("dead")
    reads = [each for each in asked if "silbo_message" in each[0] and not each[0].startswith("INSERT")]
    assert len(reads) >= 5
    async with engine.connect() as connection:
        raw = (await connection.get_raw_connection()).driver_connection
        await raw.execute("SET plan_cache_mode = force_generic_plan")  # as after five times, when values don't count
        for statement, parameters in reads:
            await raw.execute(f"PREPARE asked AS {statement}")
            values = f"({', '.join(map(literal, parameters))})" if parameters else ""
            plan = "\n".join(row[0] for row in await raw.fetch(f"EXPLAIN EXECUTE asked{values}"))
            await raw.execute("DEALLOCATE asked")
            assert "Seq Scan on silbo_message" not in plan, f"{statement}\n{plan}"


def literal(value: object) -> str:
    if isinstance(value, list):
        return f"'{{{', '.join(map(str, value))}}}'"
    return "NULL" if value is None else f"'{value}'"


async def test_cancelled_calls_leave_nothing_behind(
    make_engine: Callable[..., AsyncEngine], engine: AsyncEngine
) -> None:
    """No connection of the host's pool, no lock, no half of a call."""
    mine = make_engine(pool_size=5, max_overflow=0)
    store = SQLAlchemyStore(mine)
    await store.open()
    lead = await leader(store)
    dice = random.Random(7)
    for number in range(150):
        calls = [
            store.add([pack(message(number, "a"), 1), pack(message(number, "b"), 1)], PLENTY),
            store.take(lead, 10),
            store.status(),
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(dice.random() * 0.006)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await store.add(packed(1000, 1001), PLENTY)
    by_number = Counter(numbers([*await store.rows("pending", limit=1000), *await store.rows("sending", limit=1000)]))
    assert set(by_number.values()) - {2} == {1}
    assert [number for number, times in by_number.items() if times == 1] == [1000, 1001]
    await store.aclose()
    assert mine.pool.checkedout() == 0


async def test_busy_thread_pool_is_named_where_it_keeps_the_database_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host name needs a thread to be looked up; as in test_loops.py."""
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    loop = asyncio.get_running_loop()
    end = threading.Event()
    engine = create_async_engine("postgresql+asyncpg://user@localhost:1/shop")
    with ThreadPoolExecutor(2) as pool:
        loop.set_default_executor(pool)
        hung = [loop.run_in_executor(None, end.wait) for _ in range(2)]
        try:
            with pytest.raises(
                StoreUnavailable, match="'localhost' can't be looked up: all 2 threads of the event loop's"
            ):
                await SQLAlchemyStore(engine).open()
        finally:
            end.set()
        await asyncio.gather(*hung)
    await engine.dispose()
