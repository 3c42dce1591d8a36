"""The tests of every store, on a store in the host's database: on SQLite, and on PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncEngine

from silbo import _read_budget
from silbo.message import Message
from silbo.outbox.rows import pack
from silbo.stores.sqlalchemy import SQLAlchemyStore, metadata
from tests.support.store_conformance import PLENTY, Conformance, Make, leader, numbers, packed, send


class SQLAlchemyConformance(Conformance):
    """The fixture ``engine`` is a host's, with silbo's tables."""

    @pytest.fixture
    def make(self, engine: AsyncEngine) -> Make:
        self.engine = engine
        return lambda: SQLAlchemyStore(engine)

    async def change_row(self, row: int, **values: Any) -> None:
        message = metadata.tables["silbo_message"]
        async with self.engine.begin() as connection:
            await connection.execute(update(message).where(message.c.id == row).values(values))

    async def damage(self, store: Any, row: int, raw: bytes) -> None:
        if self.engine.dialect.name == "sqlite":
            async with self.engine.begin() as connection:
                statement = text("UPDATE silbo_message SET message = CAST(:raw AS TEXT) WHERE id = :row")
                await connection.execute(statement, {"raw": raw, "row": row})
        else:  # PostgreSQL keeps no damaged UTF-8 in a text
            await self.change_row(row, message=raw.decode("latin-1"))

    async def damage_column(self, store: Any, row: int, column: str, value: str) -> None:
        async with self.engine.begin() as connection:
            await connection.execute(text(f"UPDATE silbo_message SET {column} = {value} WHERE id = {row}"))

    async def move_times(self, store: Any, ahead: timedelta) -> None:
        for row in await store.rows("pending"):
            due = None if row.next_attempt_at is None else row.next_attempt_at + ahead
            await self.change_row(row.id, state_at=row.state_at + ahead, next_attempt_at=due)

    async def test_large_messages_are_read_in_small_numbers(
        self, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """About 4 MiB with one call; after a slow call fewer, but always one."""
        large = [pack(Message("ecst_event", "counted", "id", {"n": n, "text": "x" * 1_000_000}), 1) for n in range(7)]
        await store.add(large, PLENTY)
        lead = await leader(store)
        assert numbers(await store.rows("pending")) == [0, 1, 2, 3, 4]
        assert numbers(await store.take(lead, 100)) == [0, 1, 2, 3, 4]
        assert numbers(await store.take(lead, 2)) == [0, 1]
        monkeypatch.setattr(_read_budget, "SLOW", 0.0)
        await store.rows("pending")
        assert numbers(await store.take(lead, 100)) == [0]
        monkeypatch.undo()
        async with asyncio.timeout(30):
            while len(await store.take(lead, 100)) < 5:
                pass
        sent = await send(store, lead)
        assert numbers(sent) == [0, 1, 2, 3, 4]
        assert numbers(await send(store, lead)) == [5, 6]

    @pytest.mark.parametrize("value", [-1, (1 << 63) - 1])
    @pytest.mark.parametrize("column", ["epoch", "sequence"])
    async def test_number_of_a_partition_out_of_range_stops_nothing(
        self, store: SQLAlchemyStore, column: str, value: int
    ) -> None:
        """A broker knows the newest epoch, and the clock a new sequence."""
        await store.add(packed(1), PLENTY)
        await leader(store)
        async with self.engine.begin() as connection:
            await connection.execute(update(metadata.tables["silbo_partition"]).values({column: value}))
        await store.status()
        lead = await leader(store, owner="a")
        (row,) = await store.take(lead, 10)
        assert row.sequence is not None and 10**15 < row.sequence < 1 << 53
        assert 0 < lead.epoch < 1 << 53
