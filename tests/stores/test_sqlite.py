"""The store in an SQLite file."""

from __future__ import annotations

from pathlib import Path

import pytest

from silbo.stores.sqlite import SQLiteStore
from tests.stores.conformance import Conformance, Make


class TestSQLiteStore(Conformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        return lambda: SQLiteStore(tmp_path / "outbox.db")
