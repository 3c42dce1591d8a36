"""Alembic makes silbo's tables in PostgreSQL among the host's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from silbo.stores.sqlalchemy import SQLAlchemyStore
from tests.support.alembic_host import alembic, migrated
from tests.support.store_conformance import PLENTY, leader, numbers, packed, send
from tools.postgres import PostgresServer

pytestmark = pytest.mark.postgresql

INDEXES = text("SELECT indexdef FROM pg_indexes WHERE tablename LIKE 'silbo%' AND schemaname = 'public' ORDER BY 1")


async def test_alembic_makes_the_tables(own_postgres: PostgresServer, tmp_path: Path) -> None:
    """The same ones as ``create()``, with their indexes."""
    await migrated(tmp_path, own_postgres.url)
    engine = create_async_engine(own_postgres.url)
    store = SQLAlchemyStore(engine)
    await store.open()
    await store.add(packed(1, 2), PLENTY)
    assert numbers(await send(store, await leader(store))) == [1, 2]
    await store.aclose()
    code, out = await alembic(tmp_path, "check")
    assert (code, "No new upgrade operations detected" in out) == (0, True), out
    async with engine.connect() as connection:
        migrated_indexes = list(await connection.scalars(INDEXES))
    async with engine.begin() as connection:
        for table in ("outbox", "partition", "message", "inbox"):
            await connection.execute(text(f"DROP TABLE silbo_{table}"))
    await store.create()
    async with engine.connect() as connection:
        assert list(await connection.scalars(INDEXES)) == migrated_indexes
    await engine.dispose()
