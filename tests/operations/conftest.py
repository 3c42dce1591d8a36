"""A folder with a user's programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.app_files import SHOP, imports_undone, write


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with imports_undone(tmp_path):
        yield write(tmp_path, SHOP)
