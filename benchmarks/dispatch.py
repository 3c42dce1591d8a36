"""A dispatch to 0, 1, 10 and 100 listeners: silbo, Whistle, and a loop of awaits written by hand.

    python -m benchmarks.dispatch [--rounds 60]

silbo runs with everything present but unused: the listeners under test are plain, while the same dispatcher also has a
pattern that does not match, listeners with options and a subscriber under other names. Every dispatch gets an event of
its own, as hosts do it; the last table dispatches one event again and again.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import whistle

import silbo
from benchmarks.timing import Contender, compare, machine

LISTENERS = (0, 1, 10, 100)
NAME = "meeting.joined"


class WhistleEvent(whistle.Event):
    """The payload is the host's; none is needed here."""


class SilboEvent(silbo.Event):
    """The same on silbo."""


async def listener(event: Any) -> None:
    """Does nothing: what is measured is the way to it."""


def whistle_dispatcher(count: int) -> whistle.AsyncEventDispatcher:
    """Whistle with so many listeners."""
    dispatcher = whistle.AsyncEventDispatcher()
    for number in range(count):
        dispatcher.add_listener(NAME, listener, priority=number % 3)
    return dispatcher


def silbo_dispatcher(count: int) -> silbo.AsyncEventDispatcher:
    """silbo with so many listeners, and with everything else that does not concern them."""
    dispatcher = silbo.AsyncEventDispatcher()
    for number in range(count):
        dispatcher.add_listener(NAME, listener, priority=number % 3)
    dispatcher.add_listener("user.*", listener)
    dispatcher.add_listener("user.left", listener, once=True, timeout=5, on_error="collect")
    dispatcher.add_listener("user.left", listener, concurrent=True)
    return dispatcher


def contenders(count: int, *, fresh: bool) -> dict[str, Contender]:
    """The three, each as a function of how often."""
    theirs, ours, by_hand = whistle_dispatcher(count), silbo_dispatcher(count), [listener] * count
    their_event, our_event = WhistleEvent(), SilboEvent()

    async def run_whistle(times: int) -> None:
        for _ in range(times):
            await theirs.adispatch(NAME, WhistleEvent() if fresh else their_event)

    async def run_silbo(times: int) -> None:
        for _ in range(times):
            await ours.adispatch(NAME, SilboEvent() if fresh else our_event)

    async def loop(event: Any) -> None:
        for one in by_hand:
            await one(event)

    async def run_loop(times: int) -> None:
        for _ in range(times):
            await loop(SilboEvent() if fresh else our_event)

    return {"whistle": run_whistle, "silbo": run_silbo, "loop of awaits": run_loop}


async def main(rounds: int) -> None:
    """Print both tables."""
    print(machine())
    for fresh in (True, False):
        print(f"\n{'a new event for each dispatch' if fresh else 'one event dispatched again and again'}")
        print(f"{'listeners':>9}  {'whistle':>9}  {'silbo':>9}  {'loop':>9}  {'silbo/whistle':>20}  {'silbo/loop':>20}")
        for count in LISTENERS:
            three = contenders(count, fresh=fresh)
            times = max(200, 20_000 // (count + 1))
            first = await compare(three, times=times, rounds=rounds, reference="whistle")
            second = await compare(three, times=times, rounds=rounds, reference="loop of awaits")
            each = "  ".join(f"{result.each * 1e9:6.0f} ns" for result in first)
            against = "  ".join(
                f"{result.ratio:6.2f} ({result.low:.2f}-{result.high:.2f})".rjust(20)
                for result in (first[1], second[1])
            )
            print(f"{count:>9}  {each}  {against}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a dispatch against Whistle and a loop of awaits.")
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds for each line (default: 60)")
    asyncio.run(main(parser.parse_args().rounds))
