"""Processes that are killed around the commits of an outbox: forked, because a new one takes a hundred times as long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from random import Random
from typing import Any

from chaos import producer
from chaos.worker import end_with_starter, ready


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
        time.sleep(random.uniform(0.0, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("{}", flush=True)


if __name__ == "__main__":
    main()
