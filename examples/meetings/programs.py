"""Starts the other programs, hears when they are ready, and ends them."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
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
    """One of the programs, running from here on."""

    def __init__(self, module: str, settings: Settings) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, "SILBO_REDIS_URL": settings.redis_url, "MEETINGS_PREFIX": settings.prefix},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the demo alone, which ends the others in good order
        )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    async def ready(self) -> dict[str, Any]:
        """What it says when it is ready.

        Raises:
            ProgramFailed: it ended instead, or says nothing.
        """
        return await self._read(self._output.readline, SECONDS_TO_START)

    async def report(self) -> dict[str, Any]:
        """What it says at its end, to which it comes by itself.

        Raises:
            ProgramFailed: it ended without, or says nothing.
        """
        return await self._read(self._output.read, SECONDS_TO_REPORT)

    def check(self) -> None:
        """Raise where it has ended already.

        Raises:
            ProgramFailed: it has.
        """
        if self._process.poll() is not None:
            raise ProgramFailed(f"{self._module} ended too early; what it wrote is above")

    async def end(self) -> None:
        """Close its input, which ends it, and wait until it is gone."""
        self._input.close()
        try:
            await asyncio.to_thread(self._process.wait, SECONDS_TO_END + 1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    async def _read(self, read: Callable[[], str], seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                said = await asyncio.to_thread(read)  # comes to its end with the program, at the latest
        except TimeoutError:
            raise ProgramFailed(f"{self._module} said nothing within {seconds:g} s") from None
        if not said:
            raise ProgramFailed(f"{self._module} ended too early; what it wrote is above")
        answer: dict[str, Any] = json.loads(said)
        return answer


@asynccontextmanager
async def running(module: str, settings: Settings) -> AsyncGenerator[Program]:
    """Start a program, and end it with the block."""
    program = Program(module, settings)
    try:
        yield program
    finally:
        await program.end()
