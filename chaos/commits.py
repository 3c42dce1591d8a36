"""Processes that are killed around the commits of an outbox: forked, because a new one takes a hundred times as long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from chaos import producer
from chaos.worker import end_with_starter, ready

SHORTEST: Final = 0.04
LONGEST: Final = 5.0
"""Seconds that a child may live once it is ready: long enough for some of its commits to be answered, and no longer."""


@dataclass(frozen=True)
class Settings:
    """How many are killed, and of what."""

    producer: dict[str, Any]
    seed: int
    kills: int


def main() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no thread here: it would be gone in the forked
    random = Random(settings.seed)
    ledger = Path(settings.producer["ledger"])
    answered, within = 0, SHORTEST
    ready()
    for _ in range(settings.kills):
        out, into = os.pipe()
        if not (child := os.fork()):
            end_with_starter()
            os.dup2(into, 1)
            asyncio.run(producer.main(producer.Settings(**settings.producer), asyncio.Event()))
            os._exit(3)  # it was to be killed before
        os.close(into)
        os.read(out, 16)  # it is ready
        os.close(out)
        time.sleep(random.uniform(0.0, within))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # On a busy machine a child needs longer to its first commit: one that was killed before it gives the next more time.
        before, answered = answered, ledger.stat().st_size if ledger.exists() else 0
        within = max(SHORTEST, within / 2) if answered > before else min(LONGEST, within * 2)
    print("{}", flush=True)


if __name__ == "__main__":
    main()
