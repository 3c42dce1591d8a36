"""Cancellation at any moment, on each Python, with a near Redis and with one that takes its time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from chaos.interpreters import interpreters
from chaos.proxy import Delay
from chaos.stage import Stage, Worker

VERSIONS = ("3.11", "3.12", "3.13")
WAY = 0.001
"""Seconds in each direction: 2 ms there and back."""
SHUTDOWN = 1.0
WHAT = {
    "publish": "publishes cancelled",
    "outbox publish": "publishes to an outbox cancelled",
    "consume": "consumers cancelled",
    "stop": "consumers stopped",
}


async def cancel(stage: Stage, *, many: int = 2_000, versions: Sequence[str] = VERSIONS) -> None:
    """See above."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = await asyncio.to_thread(interpreters, versions or [here])
    stage.note("on Python", ", ".join(version for version, python in found.items() if python))
    if absent := [version for version, python in found.items() if not python]:
        stage.note("not found: Python", ", ".join(absent))
    workers: list[Worker] = []
    for version, python in found.items():
        if python is None:
            continue
        for way in ("direct", "delayed"):
            server = stage.redis()
            url = (await stage.proxy(server, Delay(WAY))).url if way == "delayed" else server.url
            folder = stage.folder / f"{version}-{way}"
            folder.mkdir()
            workers.append(
                await stage.start(
                    f"{version}-{way}",
                    "cancelling",
                    python=python,
                    url=url,
                    direct=server.url,
                    folder=str(folder),
                    seed=stage.random.getrandbits(32),
                    many=many,
                )
            )
    async with stage.saying(lambda: f"{sum(worker.ended is None for worker in workers)} of {len(workers)} at work"):
        for worker in workers:
            await worker.wait(900.0)
    for worker in workers:
        if worker.ended or not worker.figures:
            stage.wrong.append(f"{worker.name} ended with {worker.ended}")
        stage.wrong += [f"{worker.name}: {wrong}" for wrong in worker.figures.get("wrong", ())]
    figures = [worker.figures for worker in workers if worker.figures]
    for what, name in WHAT.items():
        least = min((one["cancelled"].get(what, 0) for one in figures), default=0)
        stage.must(f"{name} in each", least, least >= many, f"{many}")
    for name in ("wrong replies", "leaked connections", "leaked tasks"):
        stage.zero(name, sum(one[name] for one in figures))
    slowest = max((one["slowest shutdown"] for one in figures), default=0.0)
    stalled = max((one["stalled"] for one in figures), default=0.0)
    stage.below("slowest shutdown, s", slowest, SHUTDOWN + 2 * stalled)
