"""What every program of the harness does as a process: settings, ready, figures, and an end in any case.

A program is `python -m chaos.NAME '{"setting": ...}'`. It says `ready`, does its work until that is done or SIGTERM
comes, and prints its figures as one line of JSON. It ends at once when its standard input does: so nothing is left when
the harness is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

__all__ = ["Stalls", "end_with_starter", "ready", "serve", "show"]

_S = TypeVar("_S")
TICK: Final = 0.05
"""Seconds between two looks at the clock."""


def serve(settings: type[_S], main: Callable[[_S, asyncio.Event], Awaitable[Mapping[str, Any]]]) -> None:
    """Run `main(settings, stopping)` as this process's program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the harness, which ends us
    end_with_starter()
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")

    async def run() -> Mapping[str, Any]:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        stalls = Stalls()
        watching = asyncio.create_task(stalls.watch())
        try:
            figures = await main(settings(**json.loads(sys.argv[1])), stopping)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        return {**figures, "stalled": stalls.longest}

    show(asyncio.run(run()))


class Stalls:
    """The longest time that the loop came too late to a timer: what the machine, not silbo, adds to each answer."""

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        while True:
            due = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            self.longest = max(self.longest, time.monotonic() - due)


def show(figures: Mapping[str, Any]) -> None:
    """Tell the starter what was found so far, in place of what was told before."""
    with contextlib.suppress(BrokenPipeError):  # of one that does not listen any more
        print(json.dumps(figures), flush=True)


def ready() -> None:
    """Tell the starter."""
    print("ready", flush=True)


def end_with_starter() -> None:
    """End this process at once when its standard input ends."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
