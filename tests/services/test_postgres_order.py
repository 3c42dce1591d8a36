"""On PostgreSQL the order of one key is the order of commit, whatever order the ids were given in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from sqlalchemy import insert, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from silbo import Outbox, Quota
from silbo.message import Message
from silbo.outbox.rows import pack
from silbo.stores.sqlalchemy import SQLAlchemyStore
from tests.support.session_conformance import Recorder
from tests.support.store_conformance import PLENTY, leader, message, numbers, send

pytestmark = pytest.mark.postgresql


class Base(DeclarativeBase): ...


class Stock(Base):
    __tablename__ = "stock"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
def sessions(engine: AsyncEngine) -> Sessions:
    return async_sessionmaker(engine)


@pytest.fixture
async def store(engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
    store = SQLAlchemyStore(engine)
    await store.open()
    yield store
    await store.aclose()


async def add(store: SQLAlchemyStore, session: AsyncSession, number: int, key: str | None) -> None:
    await store.add_in(session, [pack(message(number, key), 1)], PLENTY)


async def test_transaction_that_commits_later_comes_later(store: SQLAlchemyStore, sessions: Sessions) -> None:
    """Though it stored first; and it is not lost, though the relay was past its first id already."""
    lead = await leader(store)
    async with sessions() as slow, sessions() as quick:
        await add(store, slow, 1, "a")
        await add(store, quick, 2, "a")
        await quick.commit()
        assert numbers(await send(store, lead)) == [2]
        await add(store, quick, 3, "b")
        await quick.commit()
        await slow.commit()
    first, second = await send(store, lead)
    assert numbers([first, second]) == [3, 1]
    assert first.id < second.id


async def test_message_without_a_key_that_is_committed_late_is_not_lost(
    store: SQLAlchemyStore, sessions: Sessions
) -> None:
    lead = await leader(store)
    async with sessions() as slow, sessions() as quick:
        await add(store, slow, 1, None)
        await add(store, quick, 2, None)
        await quick.commit()
        assert numbers(await send(store, lead)) == [2]
        await slow.commit()
        assert numbers(await send(store, lead)) == [1]


async def test_nobody_waits_for_a_transaction_that_is_not_committing(
    store: SQLAlchemyStore, sessions: Sessions
) -> None:
    """One that has stored a message, and then waits for something slow, holds back no other message of that key."""
    async with sessions() as slow:
        async with slow.begin_nested():  # neither does the end of a savepoint
            await add(store, slow, 1, "a")
        async with asyncio.timeout(20):
            async with sessions() as quick:
                await add(store, quick, 2, "a")
                await quick.commit()
            await store.add([pack(message(3, "a"), 1)], PLENTY)
        await slow.commit()
    assert numbers(await store.rows("pending")) == [2, 3, 1]


async def test_keys_in_different_orders_do_not_deadlock(store: SQLAlchemyStore, sessions: Sessions) -> None:
    async def transaction(keys: str, number: int) -> None:
        async with sessions() as session:
            for key in keys:
                await add(store, session, number, key)
                await stored.wait()
            await session.commit()

    for round_ in range(5):
        stored = asyncio.Barrier(2)
        await asyncio.gather(transaction("ab", round_), transaction("ba", round_))
    assert len(await store.rows("pending")) == 20


async def test_row_of_the_host_and_key_do_not_deadlock(
    engine: AsyncEngine, store: SQLAlchemyStore, sessions: Sessions
) -> None:
    """One stores, then writes the row, the other writes the row, then stores; as where an ORM flushes late."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE stock (id int PRIMARY KEY, n int)"))
        await connection.execute(text("INSERT INTO stock VALUES (1, 0)"))
    write = text("UPDATE stock SET n = n + 1 WHERE id = 1")

    async with sessions() as one, sessions() as other:
        await add(store, one, 1, "a")
        await other.execute(write)
        await add(store, other, 2, "a")

        async def first() -> None:
            await one.execute(write)
            await one.commit()

        async with asyncio.timeout(5):
            waiting = asyncio.create_task(first())
            await other.commit()
            await waiting
    assert numbers(await store.rows("pending")) == [2, 1]


async def test_what_the_session_still_has_to_write_comes_before_the_lock(
    engine: AsyncEngine, store: SQLAlchemyStore, sessions: Sessions
) -> None:
    """An ORM writes at the commit. With the lock of a key in its hands it would wait for whoever waits for that lock."""
    async with engine.begin() as connection:
        await connection.run_sync(Stock.metadata.create_all)
        await connection.execute(insert(Stock).values(id=1, n=0))
    async with sessions() as one, sessions() as other:
        stock = await one.get_one(Stock, 1)
        await add(store, one, 1, "a")
        stock.n = 5
        await other.execute(update(Stock).values(n=7))
        await add(store, other, 2, "a")
        committing = asyncio.create_task(one.commit())
        await somebody_waits(engine)
        await other.commit()
        await committing
    assert numbers(await store.rows("pending")) == [2, 1]


async def somebody_waits(engine: AsyncEngine) -> None:
    async with asyncio.timeout(5), engine.connect() as connection:
        while not await connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            await asyncio.sleep(0.01)


async def test_many_keys_at_once_do_not_deadlock(engine: AsyncEngine) -> None:
    async def work(number: int) -> None:
        store = SQLAlchemyStore(engine)
        await store.open()
        for step in range(10):
            keys = random.Random(100 * number + step).sample(range(200), 100)
            await store.add([pack(message(step, str(key)), 1) for key in keys], PLENTY)
        await store.aclose()

    await asyncio.gather(*map(work, range(8)))


async def test_very_many_keys_fit_into_one_transaction(store: SQLAlchemyStore, sessions: Sessions) -> None:
    """PostgreSQL's table of locks has room for some 6,000, and is everybody's."""
    many = [pack(message(number, f"key-{number}"), 1) for number in range(20_000)]
    await store.add(many, PLENTY)
    async with sessions() as session:
        await store.add_in(session, many, PLENTY)
        await session.commit()
    assert (await store.status()).counts["pending"] == 40_000


async def test_commit_of_a_failed_transaction_is_an_error(store: SQLAlchemyStore, sessions: Sessions) -> None:
    """PostgreSQL would roll it back without a word, where somebody has swallowed the error."""
    async with sessions() as session:
        await add(store, session, 1, "a")
        with pytest.raises(DBAPIError, match="division by zero"):
            await session.execute(text("SELECT 1 / 0"))
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            await session.commit()
    assert await store.rows("pending") == []


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
async def test_order_is_that_of_commit_under_load(
    make_engine: Callable[..., AsyncEngine], engine: AsyncEngine, store: SQLAlchemyStore, isolation: str
) -> None:
    """By the server's own commit times, for transactions of all kinds on few keys; each has its place and none is lost."""
    sessions = async_sessionmaker(make_engine(isolation_level=isolation, pool_size=12))
    dice = random.Random(20)
    done, failed = 0, list[str]()

    async def host(number: int) -> None:
        nonlocal done
        for step in range(15):
            try:
                async with sessions() as session:
                    for _ in range(dice.randint(1, 3)):
                        await add(store, session, number * 100 + step, dice.choice("abc"))
                        await asyncio.sleep(dice.random() * 0.003)
                    await session.commit()
            except DBAPIError as error:
                failed.append(str(error.orig))
            else:
                done += 1

    async def alone(number: int) -> None:
        for step in range(15):
            await store.add([pack(message(number * 100 + step, dice.choice("abc")), 1)], PLENTY)

    await asyncio.gather(*map(host, range(10)), alone(10), alone(11))
    assert all("could not serialize" in error for error in failed)
    assert done > (20 if isolation == "SERIALIZABLE" else 149)  # the more it checks, the more it refuses
    committed = text(
        "SELECT message::json -> 'headers' ->> 'key', pg_xact_commit_timestamp(xmin) FROM silbo_message ORDER BY id"
    )
    async with engine.connect() as connection:
        times = [(key, time) for key, time in await connection.execute(committed)]
    assert len(times) > done
    for key in "abc":
        its = [time for each, time in times if each == key]
        assert its == sorted(its)


async def test_relay_beside_the_hosts_sends_all_in_order(
    make_engine: Callable[..., AsyncEngine], engine: AsyncEngine, sessions: Sessions
) -> None:
    """Two outboxes on one database, as two processes have them; what a host counts in a row comes out as counted."""
    keys = "abcde"
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE counted (key text PRIMARY KEY, n int)"))
        for key in keys:
            await connection.execute(text("INSERT INTO counted VALUES (:key, 0)"), {"key": key})
    recorder = Recorder()

    async def host(outbox: Outbox, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(25):
            async with sessions() as session:
                key = dice.choice(keys)
                count = "UPDATE counted SET n = n + 1 WHERE key = :key RETURNING n"
                n = await session.scalar(text(count), {"key": key})
                await outbox.add(session, message(n, key))
                await (session.rollback if dice.random() < 0.2 else session.commit)()

    first = Outbox(SQLAlchemyStore(engine), recorder, quota=Quota())
    second = Outbox(SQLAlchemyStore(make_engine()), recorder)
    async with first, second:
        await asyncio.gather(*(host(outbox, seed) for seed, outbox in enumerate(4 * [first, second])))
    async with engine.connect() as connection:
        counted = dict(list(await connection.execute(text("SELECT key, n FROM counted"))))
    assert sum(counted.values()) > 100
    assert sent(recorder.got) == {key: list(range(1, n + 1)) for key, n in counted.items()}


def sent(messages: list[Message]) -> dict[str, list[int]]:
    by_key: dict[str, list[int]] = {}
    for each in messages:
        by_key.setdefault(each.key or "", []).append(each.payload["n"])
    return by_key
