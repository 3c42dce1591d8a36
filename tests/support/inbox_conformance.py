"""The tests that an inbox in the host's database must pass: on SQLite, and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from silbo import AsyncEventDispatcher, Bridge, Consumer, ECSTEvent, EventName, Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.errors import StoreUnavailable
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore, current_session, in_session, metadata
from tests.support.session_conformance import ORDER_PAID, OrderPaid, Recorder, host, orders

Sessions = async_sessionmaker[AsyncSession]


class Broken(Exception):
    pass


class InboxBehaviour:
    """The behaviours; the fixture ``engine`` is a host's, with silbo's tables."""

    @pytest.fixture
    async def sessions(self, engine: AsyncEngine) -> Sessions:
        async with engine.begin() as connection:
            await connection.run_sync(host.create_all)
        return async_sessionmaker(engine, expire_on_commit=False)

    @pytest.fixture
    def inbox(self, sessions: Sessions) -> SQLAlchemyInbox:
        return SQLAlchemyInbox(sessions)

    async def order(self, number: int) -> None:
        """The effect of a listener."""
        await current_session().execute(insert(orders).values(id=number))

    async def effects(self, sessions: Sessions) -> list[int]:
        async with sessions() as session:
            return list(await session.scalars(select(orders.c.id).order_by(orders.c.id)))

    async def remembered(self, sessions: Sessions) -> int:
        async with sessions() as session:
            return await session.scalar(select(func.count()).select_from(metadata.tables["silbo_inbox"])) or 0

    # -- once ---------------------------------------------------------------------------------------------------

    async def test_what_was_handled_is_not_new(self, inbox: SQLAlchemyInbox, sessions: Sessions) -> None:
        async with inbox.handling("billing", "p-1") as new:
            assert new is True
            await self.order(1)
        async with inbox.handling("billing", "p-1") as new:
            assert new is False
        assert await self.effects(sessions) == [1]

    async def test_groups_and_publications_are_apart(self, inbox: SQLAlchemyInbox) -> None:
        for group, publication in [("a", "p-1"), ("a", "p-2"), ("b", "p-1")]:
            async with inbox.handling(group, publication) as new:
                assert new is True

    async def test_effect_and_memory_are_rolled_back_together(self, inbox: SQLAlchemyInbox, sessions: Sessions) -> None:
        with pytest.raises(Broken):
            async with inbox.handling("billing", "p-1"):
                await self.order(1)
                raise Broken
        assert (await self.effects(sessions), await self.remembered(sessions)) == ([], 0)
        async with inbox.handling("billing", "p-1") as new:
            assert new is True

    async def test_nobody_sees_the_effect_before_it_is_remembered(
        self, inbox: SQLAlchemyInbox, sessions: Sessions
    ) -> None:
        async with inbox.handling("billing", "p-1"):
            await self.order(1)
            assert (await self.effects(sessions), await self.remembered(sessions)) == ([], 0)
        assert (await self.effects(sessions), await self.remembered(sessions)) == ([1], 1)

    async def test_cancelled_listener_leaves_nothing(self, inbox: SQLAlchemyInbox, sessions: Sessions) -> None:
        begun = asyncio.Event()

        async def handle() -> None:
            async with inbox.handling("billing", "p-1"):
                await self.order(1)
                begun.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(handle())
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert (await self.effects(sessions), await self.remembered(sessions)) == ([], 0)

    async def test_second_consumer_waits_for_the_first(self, inbox: SQLAlchemyInbox, engine: AsyncEngine) -> None:
        """Then it is handled; or, where the first one failed, new."""
        other = SQLAlchemyInbox(engine)
        for publication, fails in [("p-1", False), ("p-2", True)]:
            waiting: asyncio.Task[bool] | None = None
            with suppress(Broken):
                async with inbox.handling("billing", publication) as new:
                    assert new
                    waiting = asyncio.create_task(self.is_new(other, publication))
                    await asyncio.sleep(0.1)  # it can't be seen waiting: that it isn't done is what is looked at
                    assert not waiting.done()
                    if fails:
                        raise Broken
            assert waiting is not None
            assert await waiting is fails

    async def is_new(self, inbox: SQLAlchemyInbox, publication: str) -> bool:
        async with inbox.handling("billing", publication) as new:
            return new

    async def test_listener_that_commits_is_an_error(self, inbox: SQLAlchemyInbox) -> None:
        """Or what later listeners do would not be remembered with it."""
        with pytest.raises(InvalidRequestError):
            async with inbox.handling("billing", "p-1"):
                await self.order(1)
                await current_session().commit()

    async def test_database_that_is_away_is_no_failure_of_the_listeners(
        self, inbox: SQLAlchemyInbox, engine: AsyncEngine
    ) -> None:
        async with engine.begin() as connection:
            await connection.execute(text("DROP TABLE silbo_inbox"))
        with pytest.raises(StoreUnavailable, match="silbo_inbox"):
            async with inbox.handling("billing", "p-1"):
                raise AssertionError
        await inbox.create()
        async with inbox.handling("billing", "p-1") as new:
            assert new

    # -- memory -------------------------------------------------------------------------------------------------

    async def test_old_publications_are_forgotten_in_steps(self, sessions: Sessions) -> None:
        for number in range(5):
            async with SQLAlchemyInbox(sessions).handling("billing", f"p-{number}"):
                pass
        assert await SQLAlchemyInbox(sessions, keep=60).purge() == 0
        quick = SQLAlchemyInbox(sessions, keep=0.001)
        await asyncio.sleep(0.002)
        assert [await quick.purge(limit=3), await quick.purge(limit=3), await quick.purge(limit=3)] == [3, 2, 0]

    async def test_memory_is_bounded_while_deliveries_come(self, sessions: Sessions) -> None:
        inbox = SQLAlchemyInbox(sessions, keep=0.001)
        for number in range(250):
            async with inbox.handling("billing", f"p-{number}"):
                pass
        assert await self.remembered(sessions) <= 100

    async def test_keep_is_checked(self, sessions: Sessions) -> None:
        for keep in (0, float("inf"), float("nan"), 1e11):
            with pytest.raises(ValueError, match="keep is seconds"):
                SQLAlchemyInbox(sessions, keep=keep)
        assert await SQLAlchemyInbox(sessions, keep=18_262 * 86_400).purge() == 0

    # -- with a consumer and an outbox --------------------------------------------------------------------------

    @pytest.fixture
    async def outbox(self, engine: AsyncEngine) -> AsyncIterator[Outbox]:
        async with Outbox(SQLAlchemyStore(engine), Recorder(), relay=False) as outbox:
            yield outbox

    async def test_what_a_listener_dispatches_is_stored_in_its_transaction(
        self, inbox: SQLAlchemyInbox, sessions: Sessions, outbox: Outbox
    ) -> None:
        """Consumer, listener, effect, and the event that follows from it: all or nothing, each once."""
        broker, dispatcher, failures = MemoryBroker(app="shop"), AsyncEventDispatcher(), 1
        dispatcher.add_subscriber(Bridge(outbox))

        @dispatcher.listen(BOUGHT)
        async def on_bought(event: Bought) -> None:
            nonlocal failures
            await self.order(event.order)
            await dispatcher.adispatch(ORDER_PAID, OrderPaid(event.order))
            if failures:
                failures -= 1
                raise Broken

        sending = AsyncEventDispatcher()
        sending.add_subscriber(Bridge(broker))
        group = broker.group("billing", start="oldest")
        consumer = Consumer(dispatcher, group, events=[BOUGHT], inbox=inbox, own="handle", on_error=lambda *_: None)
        async with consumer:
            running = asyncio.create_task(consumer.run())
            await sending.adispatch(BOUGHT, Bought(7))
            async with asyncio.timeout(10):
                while consumer.stats.handled < 1:
                    await asyncio.sleep(0.01)
            consumer.stop()
            await running
        assert (consumer.stats.failed, await self.effects(sessions), await self.remembered(sessions)) == (1, [7], 1)
        assert (await outbox.status()).counts["pending"] == 1

    async def test_session_of_the_inbox_ends_with_its_delivery(
        self, inbox: SQLAlchemyInbox, sessions: Sessions
    ) -> None:
        async with sessions() as outer:
            with in_session(outer):
                async with inbox.handling("billing", "p-1"):
                    assert current_session() is not outer
                assert current_session() is outer


class Bought(ECSTEvent):
    order: int = 0

    def __init__(self, order: int) -> None:
        self.order = order


BOUGHT = EventName("bought", Bought, key="order")
