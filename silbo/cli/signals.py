"""The end of a command that runs for long: SIGTERM, or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["stop_at_signals"]


@contextmanager
def stop_at_signals(stop: Callable[[], object]) -> Generator[None]:
    """Call ``stop`` at SIGTERM and SIGINT, within the block.

    More signals do no harm, for ``stop`` may be called again: a wrapper may pass on what the terminal sent already.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
