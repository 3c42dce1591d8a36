"""The short version of `make chaos`: every battery that a minute has room for, on real programs and servers."""

from __future__ import annotations

import random

import pytest

from chaos.__main__ import play

pytestmark = pytest.mark.timeout(120)  # programs start one after another on a busy machine


@pytest.mark.parametrize(
    "battery",
    [
        pytest.param("storm", marks=pytest.mark.long),
        pytest.param("replies", marks=pytest.mark.long),
        pytest.param("clocks", marks=pytest.mark.long),
        pytest.param("restarts", marks=pytest.mark.long),
        pytest.param("data", marks=pytest.mark.long),
        "loops",
        pytest.param("strays", marks=pytest.mark.long),
        "fence",
        pytest.param("poison", marks=pytest.mark.long),
        pytest.param("patience", marks=pytest.mark.long),
        pytest.param("freeze", marks=pytest.mark.long),
        pytest.param("shards", marks=pytest.mark.long),
        pytest.param("cluster", marks=pytest.mark.long),
    ],
)
async def test_promises_hold_under(battery: str) -> None:
    """docs/explanation/reliability.md has the table; `python -m chaos BATTERY --short --seed N` repeats one."""
    found = await play(battery, random.randrange(1_000_000), short=True)
    assert not found["wrong"], found
    assert found["kept"]
