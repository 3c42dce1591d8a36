"""The store in memory."""

from __future__ import annotations

from datetime import timedelta

import pytest

from silbo.outbox.rows import unpack
from silbo.stores.memory import MemoryStore
from tests.support.store_conformance import Conformance, Make


class TestMemoryStore(Conformance):
    @pytest.fixture
    def make(self) -> Make:
        store = MemoryStore()
        return lambda: store

    async def damage(self, store: MemoryStore, row: int, raw: bytes) -> None:
        store._rows[row] = store._rows[row]._replace(message=unpack(raw))

    async def move_times(self, store: MemoryStore, ahead: timedelta) -> None:
        for row in store._rows.values():
            due = None if row.next_attempt_at is None else row.next_attempt_at + ahead
            store._rows[row.id] = row._replace(state_at=row.state_at + ahead, next_attempt_at=due)
