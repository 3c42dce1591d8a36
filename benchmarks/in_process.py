"""Scenarios of one process: a dispatch by silbo, Whistle, every peer, and a loop of awaits written by hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from benchmarks.dispatch import contenders
from benchmarks.peers_in_process import NOTES, PEERS
from benchmarks.scenario import Contenders, Scenario, Target, load_peer

__all__ = ["SCENARIOS"]

BY_HAND = "loop of awaits"


def open_dispatch(count: int) -> Callable[[], AbstractAsyncContextManager[Contenders]]:
    """Return the contenders' context: a new event for each dispatch, to so many listeners."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        three = contenders(count, fresh=True)
        peers = {name: load_peer(partial(make, count)) for name, make in PEERS.items()}
        yield {BY_HAND: three[BY_HAND], "silbo": three["silbo"], "whistle": three["whistle"], **peers}

    return opened


TARGETS: dict[int, Target] = {
    0: {"3.11": 1.6, "3.12": 1.9},
    1: {"3.11": 1.45, "3.12": 1.8},
    10: 1.2,
    100: 1.1,
}
"""Times a loop by hand, by the number of listeners."""

SCENARIOS = [
    Scenario(
        name=f"dispatch, {count} {'listener' if count == 1 else 'listeners'}",
        group="dispatch",
        open=open_dispatch(count),
        reference=BY_HAND,
        unit="dispatches",
        measures="cpu seconds",
        targets={BY_HAND: target, "whistle": 1.0, "aiosignal": 1.0},
        in_quick=count in (1, 10),
        curve=("listeners", count),
        notes=NOTES,
    )
    for count, target in TARGETS.items()
]
