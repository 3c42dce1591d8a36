"""All batteries, each in a process of its own, as many at a time as the machine has cores for."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from chaos.batteries import BATTERIES

__all__ = ["play_all"]

ROOT: Final = Path(__file__).resolve().parent.parent


async def play_all(seed: int, *, short: bool = False) -> list[dict[str, Any]]:
    """What each of them found, in their order."""
    cores = Cores(float(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="silbo-chaos-") as folder:

        async def play(name: str) -> dict[str, Any]:
            needed = await cores.take(BATTERIES[name].cores)
            try:
                return await _play(name, seed, Path(folder, name), short=short)
            finally:
                await cores.give(needed)

        async with asyncio.TaskGroup() as tasks:
            playing = [tasks.create_task(play(name)) for name, one in BATTERIES.items() if one.of_all]
    return [task.result() for task in playing]


async def _play(name: str, seed: int, findings: Path, *, short: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "chaos", name, "--seed", str(seed), "--json", str(findings)]
    process = await asyncio.create_subprocess_exec(*command, *(["--short"] if short else []), cwd=ROOT)
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # it ends its programs first
            await process.wait()
        raise
    if not findings.exists():
        return {"battery": name, "seed": seed, "done": {}, "kept": {}, "wrong": [f"it ended with {code}"]}
    found: dict[str, Any] = json.loads(findings.read_text())
    return found


class Cores:
    """How many are free; who needs more than there are takes all, and who came first is served first."""

    def __init__(self, many: float) -> None:
        self._many = self._free = many
        self._changed, self._turn = asyncio.Condition(), asyncio.Lock()

    async def take(self, many: float) -> float:
        needed = min(many, self._many)
        async with self._turn, self._changed:
            await self._changed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        return needed

    async def give(self, many: float) -> None:
        async with self._changed:
            self._free += many
            self._changed.notify_all()
