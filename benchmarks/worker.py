"""Measure one scenario in a process of its own: `python -m benchmarks.worker NAME --rounds N --slice SECONDS`.

Started by `benchmarks.run`, so that no peer's settings, caches or crash reach another scenario. Prints JSON lines:
`{"round": 3}` while it runs, then `{"results": [...], "missing": {...}}`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
from dataclasses import asdict
from time import perf_counter, process_time

from benchmarks.registry import SCENARIOS
from benchmarks.scenario import Missing, Scenario
from benchmarks.timing import Contender, compare, find_times

WARM_UP_WITHIN = 60.0
"""A peer that does not finish its first repetitions within 60 seconds is left out, with this as the reason."""


def say(**line: object) -> None:
    """Print one line for the runner."""
    print(json.dumps(line), flush=True)


async def run(scenario: Scenario, rounds: int, slice_seconds: float) -> None:
    """Measure and print."""
    async with scenario.open() as contenders:
        missing = {name: one.reason for name, one in contenders.items() if isinstance(one, Missing)}
        running: dict[str, Contender] = {}
        times: dict[str, int] = {}
        for name, contender in contenders.items():
            if isinstance(contender, Missing):
                continue
            try:
                async with asyncio.timeout(WARM_UP_WITHIN):
                    times[name] = await warm_up(name, contender, scenario, slice_seconds)
            except Exception as error:
                if name in (scenario.reference, scenario.subject):
                    raise
                missing[name] = f"{type(error).__name__}: {error}"
                continue
            running[name] = contender
        gc.collect()
        gc.freeze()  # the libraries' own objects: no collection looks at them
        say(rounds=rounds)
        try:
            results = await compare(
                running,
                times=times,
                rounds=rounds,
                reference=scenario.reference,
                clock=process_time if scenario.measures == "cpu seconds" else perf_counter,
                on_round=lambda done: say(round=done),
            )
        finally:
            gc.unfreeze()  # a test runs this in its own process, where others ask the collector: hypothesis, for one
        say(results=[asdict(result) | {"times": times[result.name]} for result in results], missing=missing)


async def finish(scenario: Scenario, rounds: int, slice_seconds: float) -> None:
    """Measure, and end the process at once: a peer's task may outlive its cancellation, and keep the loop for minutes."""
    await run(scenario, rounds, slice_seconds)
    os._exit(0)


async def warm_up(name: str, contender: Contender, scenario: Scenario, slice_seconds: float) -> int:
    """Run a contender for the first time; return the repetitions for each round."""
    if scenario.times is None:
        return await find_times(contender, slice_seconds, scenario.least)
    times = scenario.fewer.get(name, scenario.times)
    await contender(max(1, times // 10))
    return times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure one scenario; started by benchmarks.run.")
    parser.add_argument("name")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--slice", type=float, required=True)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what a peer logs at each event is no part of its work here
    asyncio.run(finish(SCENARIOS[options.name], options.rounds, options.slice))
