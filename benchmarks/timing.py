"""Contenders side by side: interleaved rounds in one process, and medians of ratios.

Machines are noisy, so no figure stands alone: each round runs every contender once, in another order, and what is
reported is the median over the rounds of a contender's time divided by the reference's in the same round.
"""

from __future__ import annotations

import gc
import platform
import random
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from time import perf_counter

Contender = Callable[[int], Awaitable[object]]
"""Does its work so many times."""


@dataclass(frozen=True)
class Result:
    """One contender.

    Attributes:
        each: Median seconds for one repetition.
        ratio: Median of its time divided by the reference's in the same round; 1 for the reference.
        low: The quartile below.
        high: The quartile above.
    """

    name: str
    each: float
    ratio: float
    low: float
    high: float


async def compare(
    contenders: dict[str, Contender], *, times: int, rounds: int, reference: str | None = None
) -> list[Result]:
    """Measure them; the reference is the first one unless named."""
    reference = reference or next(iter(contenders))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for contender in contenders.values():
        await contender(max(1, times // 10))  # caches, connections, specialised bytecode
    for _ in range(rounds):
        random.shuffle(order)
        gc.collect()
        for name in order:
            started = perf_counter()
            await contenders[name](times)
            taken[name].append((perf_counter() - started) / times)
    results = []
    for name, seconds in taken.items():
        ratios = [one / other for one, other in zip(seconds, taken[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results.append(Result(name, statistics.median(seconds), middle, low, high))
    return results


def machine() -> str:
    """What the figures were measured with."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("silbo", "whistle", "redis", "msgspec"))
    return f"Python {platform.python_version()} on {platform.machine()}; {libraries}"
