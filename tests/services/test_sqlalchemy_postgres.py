"""The store in the host's database, on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from hashlib import sha256
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from silbo import AsyncEventDispatcher, Backoff, Consumer, Message
from silbo.brokers.memory import MemoryBroker
from silbo.errors import MessageRefused, OutboxFull
from silbo.outbox.rows import OutboxStore, Packed, Quota, pack
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore, current_session
from tests.support.inbox_conformance import InboxBehaviour, Sessions
from tests.support.session_conformance import InSession
from tests.support.sqlalchemy_store import SQLAlchemyConformance
from tests.support.store_conformance import in_state, leader, packed, send
from tools.postgres import PostgresServer

pytestmark = pytest.mark.postgresql


class TestSQLAlchemyStore(SQLAlchemyConformance):
    DAMAGED_COLUMNS = (
        *((column, "'infinity'") for column in ("stored_at", "state_at", "next_attempt_at")),
        *((column, "'20000-01-01'") for column in ("stored_at", "state_at", "next_attempt_at")),
        ("stored_at", "'-infinity'"),
        ("sequence", "-1"),
        ("sequence", "9223372036854775807"),
        *(("attempts", value) for value in ("-1", "2147483647")),
        *(("epoch", value) for value in ("-1", "9223372036854775807")),
        *(("partition", value) for value in ("7", "-1")),
        *(("state", value) for value in ("'Pending'", "''")),
    )

    async def test_what_was_sent_makes_room_for_new(self, store: OutboxStore) -> None:
        """Here it takes none: the quota is for what waits, and a host's database has room for an hour of the rest."""
        await store.add(packed(1, 2), Quota(rows=2))
        await send(store, await leader(store))
        await store.add(packed(3, 4), Quota(rows=2))
        assert (await in_state(store, "sent"), await in_state(store, "pending")) == ([1, 2], [3, 4])

    async def test_quota_holds_for_concurrent_calls(self, store: OutboxStore, other: OutboxStore) -> None:
        """Approximately here, between processes: what another one stores in the same second is seen after it."""
        quota = Quota(rows=15)
        handles = 10 * [store, other]
        adding = (handle.add(packed(number, number), quota) for number, handle in enumerate(handles))
        answers = await asyncio.gather(*adding, return_exceptions=True)
        assert {type(answer) for answer in answers} == {type(None), OutboxFull}
        assert 14 <= len(await store.rows("pending")) <= 28
        for handle in (store, other):
            with pytest.raises(OutboxFull):
                await handle.add(packed(1, 2), quota)


class TestInSession(InSession):
    pass


class TestInbox(InboxBehaviour):
    async def test_error_that_a_listener_has_swallowed_is_no_success(
        self, inbox: SQLAlchemyInbox, sessions: Sessions
    ) -> None:
        """PostgreSQL rolls such a transaction back at the commit, without a word: the delivery would be lost."""
        with pytest.raises(DBAPIError, match="transaction is aborted"):
            async with inbox.handling("billing", "p-1"):
                await self.order(1)
                with suppress(DBAPIError):
                    await current_session().execute(text("SELECT 1 / 0"))
        assert (await self.effects(sessions), await self.remembered(sessions)) == ([], 0)

    async def test_constraint_that_is_checked_at_the_commit_is_the_listeners_own_error(
        self, inbox: SQLAlchemyInbox, sessions: Sessions
    ) -> None:
        async with sessions.begin() as session:
            later = "ALTER TABLE orders ADD CONSTRAINT once UNIQUE (id) DEFERRABLE INITIALLY DEFERRED"
            await session.execute(text("ALTER TABLE orders DROP CONSTRAINT orders_pkey"))
            await session.execute(text(later))
        with pytest.raises(IntegrityError):
            async with inbox.handling("billing", "p-1"):
                await self.order(1)
                await self.order(1)
        assert await self.remembered(sessions) == 0

    @pytest.mark.parametrize(
        "publication", ["a\0b", "".join(sha256(bytes([n])).hexdigest() for n in range(200))], ids=len
    )
    async def test_publication_that_the_database_refuses_becomes_a_dead_letter(
        self, inbox: SQLAlchemyInbox, publication: str
    ) -> None:
        """It is no outage of the inbox: the others are handled."""
        broker = MemoryBroker()
        dispatcher = AsyncEventDispatcher()
        heard: list[int] = []

        @dispatcher.listen("counted")
        async def hear(event: Any) -> None:
            heard.append(event.payload["n"])

        group = broker.group("billing", start="oldest")
        quick = Backoff(initial=0.01, cap=0.01)
        consumer = Consumer(
            dispatcher, group, inbox=inbox, max_attempts=2, backoff=quick, on_error=lambda error, delivery: None
        )
        for n, name in enumerate([publication, "p-1"]):
            await broker.publish(Message("ecst_event", "counted", str(uuid4()), {"n": n}, {"publication": name}))
        async with consumer, asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(consumer.run())
            while not (consumer.stats.dead and heard):
                await asyncio.sleep(0.005)
            consumer.stop()
        assert (heard, consumer.stats.dead) == ([1], 1)
        assert (consumer.stats.malformed, consumer.stats.failed) == (1, 0)  # given up at once


class TestTriggerOfTheHost:
    """A trigger that refuses messages with the text BAD."""

    @pytest.mark.parametrize("when", ["BEFORE INSERT ON {}", "AFTER INSERT ON {} DEFERRABLE INITIALLY DEFERRED"])
    @pytest.mark.parametrize("code", ["P0001", "23514", "44000"])
    async def test_message_that_it_refuses_is_refused_alone(self, engine: AsyncEngine, when: str, code: str) -> None:
        """It is no outage: those that are committed with it are stored."""
        kind = "CONSTRAINT TRIGGER" if "DEFERRED" in when else "TRIGGER"
        body = f"IF NEW.message LIKE '%BAD%' THEN RAISE 'no BAD here' USING ERRCODE = '{code}'; END IF; RETURN NEW;"
        async with engine.begin() as connection:
            await connection.execute(
                text(f"CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$")
            )
            place = when.format("silbo_message")
            await connection.execute(text(f"CREATE {kind} look {place} FOR EACH ROW EXECUTE FUNCTION look()"))
        store = SQLAlchemyStore(engine)
        await store.open()
        calls = [packed(1), [*packed(2), pack(Message("ecst_event", "told", "id", {"n": "BAD"}), 1)], packed(3)]
        answers = await asyncio.gather(*(store.add(call, Quota()) for call in calls), return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(None), MessageRefused, type(None)]
        assert "'told'" in str(answers[1]) and "no BAD here" in str(answers[1])
        assert await in_state(store, "pending") == [1, 2, 3]
        await store.aclose()


class TestOtherEncoding:
    """A database whose encoding lacks characters that JSON has."""

    @pytest.fixture
    async def store(self, postgres: PostgresServer) -> AsyncIterator[SQLAlchemyStore]:
        name = f"latin_{uuid4().hex[:12]}"
        admin = create_async_engine(postgres.url, isolation_level="AUTOCOMMIT")
        async with admin.connect() as connection:
            await connection.execute(
                text(f"CREATE DATABASE {name} ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
            )
        self.engine = create_async_engine(make_url(postgres.url).set(database=name))
        store = SQLAlchemyStore(self.engine)
        await store.create()
        await store.open()
        yield store
        await store.aclose()
        await self.engine.dispose()
        async with admin.connect() as connection:
            await connection.execute(text(f"DROP DATABASE {name}"))
        await admin.dispose()

    def packed(self, *texts: str) -> list[Packed]:
        return [pack(Message("ecst_event", "told", str(uuid4()), {"text": each}), 1) for each in texts]

    async def stored(self, store: SQLAlchemyStore) -> list[str]:
        return [row.message.payload["text"] for row in await store.rows("pending")]

    async def test_message_that_the_database_refuses_is_refused_alone(self, store: SQLAlchemyStore) -> None:
        """It is no outage: those that are committed with it are stored, of its own call too."""
        calls = [["ü 1"], ["2", "€ 3", "4", "∞ 5"], ["6"], ["→ 7"]]
        answers = await asyncio.gather(
            *(store.add(self.packed(*call), Quota()) for call in calls), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [type(None), MessageRefused, type(None), MessageRefused]
        assert "'told'" in str(answers[1]) and "LATIN1" in str(answers[1]) and len(answers[1].__notes__) == 1
        assert await self.stored(store) == ["ü 1", "2", "4", "6"]

    async def test_full_call_beside_a_refused_one(self, store: SQLAlchemyStore) -> None:
        """Each gets its own error."""
        quotas = [Quota(), Quota(rows=1), Quota()]
        answers = await asyncio.gather(
            *(store.add(self.packed("€", "1"), quota) for quota in quotas), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [MessageRefused, OutboxFull, MessageRefused]
        assert await self.stored(store) == ["1", "1"]

    async def test_message_that_the_database_refuses_in_the_hosts_transaction(self, store: SQLAlchemyStore) -> None:
        async with AsyncSession(self.engine) as session:
            with pytest.raises(MessageRefused, match="LATIN1"):
                await store.add_in(session, self.packed("€"), Quota())

    async def test_text_of_an_error_does_not_stop_a_partition(self, store: SQLAlchemyStore) -> None:
        """A character that the database lacks is written as its escape."""
        await store.add(self.packed("1", "2"), Quota())
        lead = await leader(store)
        first, second = await store.take(lead, 10)
        await store.postpone(lead, [second.id], error="costs 5 €", delay=0)
        await store.settle(lead, [], {first.id: "costs 6 €"})
        (dead,), (waits,) = await store.rows("dead"), await store.rows("pending")
        assert (dead.error, waits.error) == ("costs 6 \\u20ac", "costs 5 \\u20ac")
        again = await store.take(lead, 10)
        await store.take(lead, 10, dead={again[0].id: "costs 7 €"})
        assert sorted(str(row.error) for row in await store.rows("dead")) == ["costs 6 \\u20ac", "costs 7 \\u20ac"]
