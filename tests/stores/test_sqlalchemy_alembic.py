"""Alembic makes silbo's tables among the host's own. On PostgreSQL: tests/services/."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from silbo.stores.sqlalchemy import SQLAlchemyStore
from tests.support.alembic_host import alembic, migrated
from tests.support.store_conformance import PLENTY, leader, numbers, packed, send


@pytest.mark.long
async def test_alembic_makes_the_tables(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'host.db'}"
    assert "sqlite_where=sa.text(\"state IN ('pending', 'sending')\")" in await migrated(tmp_path, url)
    engine = create_async_engine(url)
    store = SQLAlchemyStore(engine)
    await store.open()
    await store.add(packed(1, 2), PLENTY)
    assert numbers(await send(store, await leader(store))) == [1, 2]
    await store.aclose()
    await engine.dispose()
    code, out = await alembic(tmp_path, "check")
    assert (code, "No new upgrade operations detected" in out) == (0, True), out
