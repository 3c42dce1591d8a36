"""The store in the host's database, on SQLite. On PostgreSQL: tests/services/."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from silbo.errors import MessageInvalid
from silbo.outbox.rows import OutboxStore, Quota
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore
from tests.support.inbox_conformance import InboxBehaviour, Sessions
from tests.support.session_conformance import InSession
from tests.support.sqlalchemy_store import SQLAlchemyConformance
from tests.support.store_conformance import in_state, leader, packed, send


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}")
    await SQLAlchemyStore(engine).create()
    yield engine
    await engine.dispose()


class TestSQLAlchemyStore(SQLAlchemyConformance):
    DAMAGED_COLUMNS = (
        *(
            (column, "'abc'")
            for column in ("attempts", "sequence", "epoch", "stored_at", "state_at", "next_attempt_at")
        ),
        *((column, "x'ff00'") for column in ("attempts", "sequence", "stored_at", "next_attempt_at")),
        *((column, "1.5") for column in ("sequence", "stored_at", "next_attempt_at")),
        ("sequence", "-1"),
        *((column, value) for column in ("attempts", "epoch") for value in ("-1", "9223372036854775807")),
        ("stored_at", "CAST(x'ff' AS TEXT)"),
        *(("partition", value) for value in ("'abc'", "7", "-1")),
        *(("state", value) for value in ("'Pending'", "''", "7", "x'ff'", "CAST(x'ff' AS TEXT)")),
    )
    DAMAGED_TEXTS = (("error", "CAST(x'ff' AS TEXT)"), ("owner", "CAST(x'ff' AS TEXT)"))

    async def test_what_was_sent_makes_room_for_new(self, store: OutboxStore) -> None:
        """Here it takes none: the quota is for what waits, and a host's database has room for an hour of the rest."""
        await store.add(packed(1, 2), Quota(rows=2))
        await send(store, await leader(store))
        await store.add(packed(3, 4), Quota(rows=2))
        assert (await in_state(store, "sent"), await in_state(store, "pending")) == ([1, 2], [3, 4])


class TestInSession(InSession):
    pass


class TestInbox(InboxBehaviour):
    @pytest.mark.parametrize("publication", ["a\ud800", "refused"], ids=ascii)
    async def test_publication_that_the_database_refuses_is_no_outage(
        self, inbox: SQLAlchemyInbox, sessions: Sessions, publication: str
    ) -> None:
        """Half of a surrogate pair, and a constraint of the host's; more on PostgreSQL."""
        async with sessions() as session, session.begin():
            refuse = "WHEN NEW.publication = 'refused' BEGIN SELECT RAISE(ABORT, 'refused'); END"
            await session.execute(text(f"CREATE TRIGGER refuse BEFORE INSERT ON silbo_inbox {refuse}"))
        with pytest.raises(MessageInvalid, match="the inbox's database refuses its publication"):
            async with inbox.handling("billing", publication):
                pytest.fail("no listener is to run")
        async with inbox.handling("billing", "p-1") as new:
            assert new is True
