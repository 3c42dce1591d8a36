"""A scenario: contenders that do the same work, and the ratios that silbo has to reach."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.timing import Contender

__all__ = ["Contenders", "Missing", "Scenario", "Target", "load_peer"]


@dataclass(frozen=True)
class Missing:
    """The reason why a peer can't run a scenario: an empty cell of the table."""

    reason: str


Contenders = Mapping[str, Contender | Missing]
"""By name, in the order of the table."""

Target = float | Mapping[str, float]
"""A ratio; or by the first Python version that has it, as ``{"3.11": 1.6, "3.12": 1.9}``."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One row of the table.

    Attributes:
        name: Unique, as ``dispatch, 10 listeners``.
        group: The plot and the part of the table that the row belongs to.
        open: Gives a context manager, inside of which the contenders can run.
        reference: The contender that the others are divided by.
        subject: silbo's contender that has the targets.
        unit: The plural of what is done so many times; or of the figure that contenders measure themselves.
        more_is_better: The ratio is one of speed (times as fast), not of cost (times as long).
        measures: ``seconds`` or ``cpu seconds`` for one repetition, or what the contenders return. CPU seconds are for work
            that waits for nothing: what else runs on the machine counts less.
        targets: The subject's ratio to a contender, by its name: at the most (cost) or at the least (speed).
        times: Repetitions in each round; None finds a number that takes a slice of time, for each contender its own.
        fewer: Repetitions of contenders that are much slower than the others, by name, where ``times`` is given.
        least: The fewest repetitions that it finds, as one for each of many tasks.
        rounds: The rounds of a full run; None for the runner's.
        in_bench: A row of ``make bench``; the others are for ``make bench-all``.
        in_quick: A row of ``make bench-quick``.
        curve: A point of a plot: the name of its x axis, and the place there.
        seconds: The row's time limit: a contender that hangs fails the row.
        notes: What a reader has to know of a contender.
    """

    name: str
    group: str
    open: Callable[[], AbstractAsyncContextManager[Contenders]]
    reference: str
    subject: str = "silbo"
    unit: str = "repetitions"
    more_is_better: bool = False
    measures: Literal["seconds", "cpu seconds", "latency", "bytes", "exponent"] = "seconds"
    targets: Mapping[str, Target] = field(default_factory=dict)
    times: int | None = None
    fewer: Mapping[str, int] = field(default_factory=dict)
    least: int = 1
    rounds: int | None = None
    in_bench: bool = True
    in_quick: bool = False
    curve: tuple[str, float] | None = None
    seconds: float = 300.0
    notes: Mapping[str, str] = field(default_factory=dict)

    def targets_here(self) -> dict[str, float]:
        """Return the targets for the Python that runs."""
        return {name: _for_this_python(target) for name, target in self.targets.items()}


def _for_this_python(target: Target) -> float:
    if isinstance(target, (int, float)):
        return target
    here = tuple(map(int, platform.python_version_tuple()[:2]))
    known = {tuple(map(int, first.split("."))): ratio for first, ratio in target.items()}
    return known[max(first for first in known if first <= here)]


def load_peer(make: Callable[[], Contender]) -> Contender | Missing:
    """Return a peer's contender, or the reason why the peer can't be imported or set up here."""
    try:
        return make()
    except ImportError as error:
        return Missing(f"can't be imported on Python {platform.python_version()}: {error}")
    except Exception as error:  # noqa: BLE001  # a peer's own failure is a cell of the table
        return Missing(f"{type(error).__name__}: {error}")
