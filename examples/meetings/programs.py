"""Starts the other programs, hears when they are ready, and ends them."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from examples.meetings.process import SECONDS_TO_END, Settings

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_START = 20.0
SECONDS_TO_REPORT = 10.0


class ProgramFailed(Exception):
    """A program did not do its part; the text is for whoever started the demo."""


class Program:
    """One of the programs, while it runs."""

    def __init__(self, module: str, process: Process) -> None:
        assert process.stdin
        assert process.stdout
        self._module, self._process = module, process
        self._input, self._output = process.stdin, process.stdout

    async def ready(self) -> dict[str, Any]:
        """What it says when it is ready."""
        said = await self._within(SECONDS_TO_START, self._output.readline())
        return self._read(said)

    async def report(self) -> dict[str, Any]:
        """What it says at its end, which it comes to by itself."""
        return self._read(await self._within(SECONDS_TO_REPORT, self._output.read()))

    async def end(self) -> None:
        """Close its input, which ends it, and wait until it is gone."""
        self._input.close()
        try:
            async with asyncio.timeout(SECONDS_TO_END + 1):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _within(self, seconds: float, reading: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            async with asyncio.timeout(seconds):
                return await reading
        except TimeoutError:
            raise ProgramFailed(f"{self._module} said nothing within {seconds:g} s") from None

    def _read(self, said: bytes) -> dict[str, Any]:
        if not said:
            raise ProgramFailed(f"{self._module} ended too early; what it wrote is above")
        answer: dict[str, Any] = json.loads(said)
        return answer


@asynccontextmanager
async def running(module: str, settings: Settings) -> AsyncGenerator[Program]:
    """Start a program, and end it with the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module),
        cwd=ROOT,
        env={**os.environ, "SILBO_REDIS_URL": settings.redis_url, "MEETINGS_PREFIX": settings.prefix},
        stdin=PIPE,
        stdout=PIPE,
        limit=2**24,
        start_new_session=True,  # a Ctrl-C in the terminal is for the demo alone, which ends the others in good order
    )
    program = Program(module, process)
    try:
        yield program
    finally:
        await program.end()
