"""The store in memory."""

from __future__ import annotations

import pytest

from silbo.stores.memory import MemoryStore
from tests.support.store_conformance import Conformance, Make


class TestMemoryStore(Conformance):
    @pytest.fixture
    def make(self) -> Make:
        store = MemoryStore()
        return lambda: store
