"""Contenders side by side: interleaved rounds in one process, and medians of ratios.

Machines are noisy, so no figure stands alone: each round runs every contender once, in another order, and what is
reported is the median over the rounds of a contender's figure divided by the reference's in the same round.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

Contender = Callable[[int], Awaitable[object]]
"""Does its work so many times. It may return a :class:`Measured` in place of being timed."""


TRIED = 4
"""Runs at least, before the repetitions of a round are known."""

Clock = Callable[[], float]
"""`perf_counter`, or `process_time`."""


@dataclass(frozen=True)
class Measured:
    """A figure that a contender took itself in one round, as a latency or bytes.

    Attributes:
        figure: Takes the place of the seconds for one repetition.
        percentiles: Further figures of the round by name, as ``p99``.
    """

    figure: float
    percentiles: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One contender.

    Attributes:
        each: Median seconds for one repetition, or the median of the figures that it took itself.
        ratio: Median of its figure divided by the reference's in the same round; 1 for the reference.
        low: The quartile below.
        high: The quartile above.
        rounds: Its figure in each round.
        percentiles: The medians of the further figures that it took.
    """

    name: str
    each: float
    ratio: float
    low: float
    high: float
    rounds: Sequence[float] = ()
    percentiles: Mapping[str, float] = field(default_factory=dict)


async def compare(
    contenders: Mapping[str, Contender],
    *,
    times: int | Mapping[str, int],
    rounds: int,
    reference: str | None = None,
    clock: Clock = perf_counter,
    on_round: Callable[[int], object] = lambda done: None,
) -> list[Result]:
    """Measure the contenders.

    Args:
        contenders: By name.
        times: Repetitions in each round; or by name, where one contender is much slower than another.
        rounds: Interleaved rounds, 2 at least.
        reference: The contender that the others are divided by; the first one unless named.
        clock: `process_time` for work that waits for nothing: what else runs on the machine counts less.
        on_round: Called with the number of rounds that are done.
    """
    reference = reference or next(iter(contenders))
    taken: dict[str, list[Measured]] = {name: [] for name in contenders}
    order = list(contenders)
    if isinstance(times, int):
        times = dict.fromkeys(contenders, times)
        for contender in contenders.values():
            await contender(max(1, times[order[0]] // 10))  # caches, connections, specialised bytecode
    for done in range(1, rounds + 1):
        random.shuffle(order)
        for name in order:
            gc.collect()  # what another one left behind is not this one's work
            taken[name].append(await measure(contenders[name], times[name], clock))
        on_round(done)
    results = []
    for name, measured in taken.items():
        figures = [one.figure for one in measured]
        low, middle, high = find_ratio(figures, [one.figure for one in taken[reference]])
        percentiles = {
            key: statistics.median(one.percentiles[key] for one in measured) for key in measured[0].percentiles
        }
        results.append(Result(name, statistics.median(figures), middle, low, high, figures, percentiles))
    return results


def find_ratio(figures: Sequence[float], of_reference: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the ratios, round by round: the lower one, the median, the upper one."""
    ratios = [one / other for one, other in zip(figures, of_reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return low, middle, high


async def measure(contender: Contender, times: int, clock: Clock = perf_counter) -> Measured:
    """Run a contender once: its own figure, or else the seconds for one repetition."""
    started = clock()
    returned = await contender(times)
    taken = clock() - started
    return returned if isinstance(returned, Measured) else Measured(taken / times)


async def find_times(contender: Contender, seconds: float, least: int = 1) -> int:
    """Return the number of repetitions that take about so many seconds, or the least; warms up what is measured later."""
    times, each = least, float("inf")
    for runs in count(1):
        started = perf_counter()
        await contender(times)
        each = min(each, max(1e-9, (perf_counter() - started) / times))
        wanted = max(least, round(seconds / each))
        # The first runs fill caches, and one may be interrupted by other programs.
        if runs >= TRIED and times >= wanted / 3:
            return wanted
        times = max(least, min(10 * times, wanted))
    raise AssertionError("never reached")
