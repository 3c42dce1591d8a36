"""The page on scale has the tables that the commands of `benchmarks/scale` print."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from benchmarks.scale import model, relays, simulate, stream, trial

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "scale.md"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("stream", stream.table),
        ("relays", relays.table),
        ("trial", trial.table),
        ("model", model.table),
        pytest.param("simulate", simulate.table, marks=pytest.mark.long),
    ],
)
def test_table_is_what_the_command_prints(name: str, table: Callable[[], Iterable[str]]) -> None:
    """Else: put what `python -m benchmarks.scale.<name> --table` prints between the page's two comments."""
    shown = PAGE.read_text().partition(f"<!-- {name} -->\n")[2].partition(f"<!-- /{name} -->")[0]
    assert shown.splitlines() == list(table())
