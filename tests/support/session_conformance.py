"""The tests that a store must pass in the host's own transactions: on SQLite, and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, insert, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent, Outbox, Quota
from silbo.brokers.memory import MemoryBroker
from silbo.errors import OutboxFull, StoreInvalid
from silbo.message import Message
from silbo.outbox import relay
from silbo.stores.sqlalchemy import SQLAlchemyStore, current_session, in_session
from tests.support.store_conformance import message, numbers

Sessions = async_sessionmaker[AsyncSession]

host = MetaData()
orders = Table("orders", host, Column("id", Integer, primary_key=True))


class Base(DeclarativeBase):
    metadata = host


class Order(Base):
    __table__ = orders


class OrderPaid(NotificationEvent):
    def __init__(self, order: int) -> None:
        self.order = order


ORDER_PAID = EventName("order.paid", OrderPaid, key="order")


class Recorder:
    """A broker that takes everything."""

    app = "shop"

    def __init__(self) -> None:
        self.got: list[Message] = []
        self.arrived = asyncio.Event()

    async def publish(self, *messages: Message) -> None:
        self.got += messages
        self.arrived.set()

    async def aclose(self) -> None: ...


class InSession:
    """The behaviours; the fixture ``engine`` is a host's, with silbo's tables."""

    @pytest.fixture
    async def sessions(self, engine: AsyncEngine) -> Sessions:
        async with engine.begin() as connection:
            await connection.run_sync(host.create_all)
        return async_sessionmaker(engine, expire_on_commit=False)

    @pytest.fixture
    async def store(self, engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
        store = SQLAlchemyStore(engine)
        await store.open()
        yield store
        await store.aclose()

    @pytest.fixture
    async def outbox(self, engine: AsyncEngine) -> AsyncIterator[Outbox]:
        async with Outbox(SQLAlchemyStore(engine), Recorder(), relay=False) as outbox:
            yield outbox

    @pytest.fixture
    def dispatcher(self, outbox: Outbox) -> AsyncEventDispatcher:
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_subscriber(Bridge(outbox))
        return dispatcher

    async def there_is(self, sessions: Sessions, store: SQLAlchemyStore, order: list[int], waiting: list[int]) -> None:
        """What another connection sees."""
        async with sessions() as session:
            assert list(await session.scalars(select(orders.c.id).order_by(orders.c.id))) == order
        assert numbers(await store.rows("pending")) == waiting

    # -- whose transaction --------------------------------------------------------------------------------------

    async def test_added_messages_are_committed_with_the_hosts_own_changes(
        self, sessions: Sessions, store: SQLAlchemyStore, outbox: Outbox
    ) -> None:
        """And by the host alone: until then nobody sees them."""
        async with sessions() as session:
            await session.execute(insert(orders).values(id=1))
            await outbox.add(session, message(1), message(2))
            await outbox.add(session, message(3, "a key"))
            await self.there_is(sessions, store, [], [])
            await session.commit()
        await self.there_is(sessions, store, [1], [1, 2, 3])

    async def test_added_messages_are_gone_with_the_hosts_rollback(
        self, sessions: Sessions, store: SQLAlchemyStore, outbox: Outbox
    ) -> None:
        async with sessions() as session:
            await session.execute(insert(orders).values(id=1))
            await outbox.add(session, message(1, "a key"))
            await session.rollback()
            await outbox.add(session, message(2, "a key"))
            await session.commit()
            await outbox.add(session, message(3, "a key"))
        await self.there_is(sessions, store, [], [2])

    async def test_savepoint_takes_its_messages_with_it(
        self, sessions: Sessions, store: SQLAlchemyStore, outbox: Outbox
    ) -> None:
        async with sessions.begin() as session:
            await outbox.add(session, message(1, "a"))
            kept = await session.begin_nested()
            await outbox.add(session, message(2, "b"))
            await kept.commit()
            dropped = await session.begin_nested()
            await outbox.add(session, message(3, "a"))
            await dropped.rollback()
            await outbox.add(session, message(4, "a"))
        await self.there_is(sessions, store, [], [1, 2, 4])

    async def test_dispatch_in_a_session_stores_in_its_transaction(
        self, sessions: Sessions, store: SQLAlchemyStore, dispatcher: AsyncEventDispatcher
    ) -> None:
        async with sessions() as session:
            with in_session(session) as same:
                assert same is session is current_session()
                await session.execute(insert(orders).values(id=1))
                await dispatcher.adispatch(ORDER_PAID, OrderPaid(1))
                assert await store.rows("pending") == []
                await session.rollback()
                await dispatcher.adispatch(ORDER_PAID, OrderPaid(2))
                await session.commit()
        (row,) = await store.rows("pending")
        assert (row.message.key, row.message.payload["order"]) == ("2", 2)

    async def test_dispatches_side_by_side_share_the_session_in_turn(
        self, engine: AsyncEngine, sessions: Sessions, store: SQLAlchemyStore, dispatcher: AsyncEventDispatcher
    ) -> None:
        await engine.dispose()  # the first of them has to connect, while the others want to go on
        async with sessions.begin() as session:
            with in_session(session):
                await asyncio.gather(*(dispatcher.adispatch(ORDER_PAID, OrderPaid(number)) for number in range(10)))
        assert len(await store.rows("pending")) == 10

    async def test_dispatch_outside_of_a_session_commits_by_itself(
        self, sessions: Sessions, store: SQLAlchemyStore, dispatcher: AsyncEventDispatcher
    ) -> None:
        async with sessions() as session:
            with in_session(session):
                pass
            await dispatcher.adispatch(ORDER_PAID, OrderPaid(1))
        assert len(await store.rows("pending")) == 1

    async def test_task_that_outlives_the_block_commits_by_itself(
        self, sessions: Sessions, store: SQLAlchemyStore, dispatcher: AsyncEventDispatcher
    ) -> None:
        """It would store in a transaction that nobody commits any more."""
        left = asyncio.Event()

        async def later() -> None:
            await left.wait()
            await dispatcher.adispatch(ORDER_PAID, OrderPaid(1))

        async with sessions() as session:
            with in_session(session):
                task = asyncio.create_task(later())
            left.set()
            await task
        assert len(await store.rows("pending")) == 1

    async def test_inner_block_ends_in_the_outer_one(self, sessions: Sessions) -> None:
        async with sessions() as outer, sessions() as inner:
            with in_session(outer):
                with in_session(inner):
                    assert current_session() is inner
                assert current_session() is outer
        with pytest.raises(LookupError, match=r"in_session\(session\)"):
            current_session()

    async def test_relay_is_woken_by_the_hosts_commit(
        self, engine: AsyncEngine, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It need not wait until it looks by itself."""
        monkeypatch.setattr(relay, "POLL", 60.0)
        recorder = Recorder()
        async with Outbox(SQLAlchemyStore(engine), recorder, lease=300) as outbox:
            for number in range(3):
                async with sessions() as session:
                    await outbox.add(session, message(number))
                    await session.commit()
                async with asyncio.timeout(10):
                    await recorder.arrived.wait()
                    recorder.arrived.clear()
                    while outbox.stats and outbox.stats.sent <= number:  # then it waits
                        await asyncio.sleep(0.005)
        assert [each.payload["n"] for each in recorder.got] == [0, 1, 2]

    # -- what goes wrong ----------------------------------------------------------------------------------------

    async def test_failed_session_raises_its_own_error(self, sessions: Sessions, outbox: Outbox) -> None:
        async with sessions() as session:
            await session.execute(insert(orders).values(id=1))
            await session.commit()
            session.add(Order(id=1))
            with pytest.raises(IntegrityError):
                await session.flush()
            with pytest.raises(PendingRollbackError):
                await outbox.add(session, message(1))

    async def test_quota_holds_in_a_session(self, sessions: Sessions, engine: AsyncEngine) -> None:
        store = SQLAlchemyStore(engine)
        async with Outbox(store, Recorder(), relay=False, quota=Quota(rows=2)) as outbox, sessions() as session:
            await outbox.add(session, message(1))
            with pytest.raises(OutboxFull):
                await outbox.add(session, message(2), message(3))
            await outbox.add(session, message(4))
            await session.commit()
            assert numbers(await store.rows("pending")) == [1, 4]

    async def test_what_was_rolled_back_does_not_fill_it(self, sessions: Sessions, engine: AsyncEngine) -> None:
        store = SQLAlchemyStore(engine)
        async with Outbox(store, Recorder(), relay=False, quota=Quota(rows=2)) as outbox, sessions() as session:
            for _ in range(3):
                await outbox.add(session, message(1), message(2))
                await session.rollback()

    async def test_session_of_another_database_is_refused(self, outbox: Outbox) -> None:
        """What it stored would never be sent."""
        other = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(other) as session:
            with pytest.raises(ValueError, match="give it a session of its database"):
                await outbox.add(session, message(1))
        await other.dispose()

    async def test_no_session_is_refused(self, outbox: Outbox) -> None:
        with pytest.raises(TypeError, match="AsyncSession"):
            await outbox.add(object(), message(1))

    async def test_closed_store_refuses(self, engine: AsyncEngine, sessions: Sessions) -> None:
        store = SQLAlchemyStore(engine)
        async with sessions() as session:
            with pytest.raises(RuntimeError, match="not open"):
                await store.add_in(session, [], Quota())
        with pytest.raises(RuntimeError, match="not open"):
            await Outbox(store, MemoryBroker()).publish(message(1))

    async def test_engine_stays_open(self, engine: AsyncEngine, sessions: Sessions) -> None:
        async with engine.connect() as connection:
            async with Outbox(SQLAlchemyStore(engine), Recorder()):
                pass
            await connection.execute(text("SELECT 1"))

    # -- the tables ---------------------------------------------------------------------------------------------

    async def test_missing_table_is_an_error_that_says_what_to_do(self, engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE silbo_partition"))
        with pytest.raises(StoreInvalid, match=r"no table silbo_partition(?s:.*)alembic upgrade head(?s:.*)create\(\)"):
            await SQLAlchemyStore(engine).open()
        await SQLAlchemyStore(engine).create()
        await SQLAlchemyStore(engine).open()

    async def test_table_of_another_version_is_an_error_that_says_what_to_do(self, engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE silbo_message ADD COLUMN colour TEXT"))
        with pytest.raises(StoreInvalid, match=r"newer silbo's, with colour: update silbo"):
            await SQLAlchemyStore(engine).open()
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE silbo_message DROP COLUMN colour"))
            await connection.execute(text("ALTER TABLE silbo_message DROP COLUMN error"))
        with pytest.raises(StoreInvalid, match=r"older silbo's, without error: `alembic"):
            await SQLAlchemyStore(engine).open()

    async def test_tables_are_made_once_by_many_at_a_time(self, engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            for table in ("silbo_outbox", "silbo_partition", "silbo_relay", "silbo_message", "silbo_inbox"):
                await connection.execute(text(f"DROP TABLE {table}"))
        stores = [SQLAlchemyStore(engine) for _ in range(4)]
        await asyncio.gather(*(store.create() for store in stores))
        await asyncio.gather(*(store.open() for store in stores))
        assert len({store.id for store in stores}) == 1
