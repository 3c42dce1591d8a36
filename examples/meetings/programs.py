"""Starts the other programs, waits until they are ready, kills them, and ends them."""

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
LINES_OF_LOG = 20


class ProgramFailed(Exception):
    """A program failed. The text is for the user who started the demo."""


class Program:
    """A running program. Its log goes into a file, which is shown if the program fails."""

    def __init__(self, module: str, settings: Settings) -> None:
        self._module, self._settings = module, settings
        self._log = settings.folder / f"{module.rpartition('.')[2]}.log"
        self.url = ""
        """Where it answers, once it is ready; another one after each start."""
        self._run()

    async def ready(self) -> None:
        """Wait until the program says that it is ready.

        Raises:
            ProgramFailed: it ended instead, or said nothing in time.
        """
        self.url = (await self._read(self._output.readline, SECONDS_TO_START)).get("url", "")

    async def report(self) -> dict[str, Any]:
        """Return the report that the program prints when it ends by itself.

        Raises:
            ProgramFailed: it ended without a report, or said nothing in time.
        """
        return await self._read(self._output.read, SECONDS_TO_REPORT)

    def check(self) -> None:
        """Raise if the program has ended, and not because of :meth:`kill`.

        Raises:
            ProgramFailed: it has ended.
        """
        if self._process.poll() is not None and not self._killed:
            raise ProgramFailed(self._told("ended too early"))

    def kill(self) -> None:
        """Kill the program as `kill -9` does. Returns when it is gone."""
        self._killed = True
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()

    async def start_again(self) -> None:
        """Start the program again after :meth:`kill`, and wait until it is ready."""
        self._run()
        await self.ready()

    async def end(self) -> None:
        """Close the program's input, which ends it, and wait until it is gone. May be called twice."""
        self._input.close()
        try:
            await asyncio.to_thread(self._process.wait, SECONDS_TO_END + 1)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()

    def _run(self) -> None:
        self._killed = False
        settings = self._settings
        addresses = {"SILBO_REDIS_URL": settings.redis_url, "MEETINGS_PREFIX": settings.prefix}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                cwd=ROOT,
                env={**os.environ, **addresses, "MEETINGS_FOLDER": str(settings.folder)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C in a terminal is for the demo alone, which ends the others
            )
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout

    async def _read(self, read: Callable[[], str], seconds: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(seconds):
                said = await asyncio.to_thread(read)  # comes to its end with the program, at the latest
        except TimeoutError:
            raise ProgramFailed(self._told(f"said nothing within {seconds:g} s")) from None
        if not said:
            raise ProgramFailed(self._told("ended too early"))
        answer: dict[str, Any] = json.loads(said)
        return answer

    def _told(self, what: str) -> str:
        logged = self._log.read_text(errors="replace").splitlines()[-LINES_OF_LOG:]
        return "\n".join([f"{self._module} {what}", *logged])


@asynccontextmanager
async def running(module: str, settings: Settings) -> AsyncGenerator[Program]:
    """Start a program, and end it with the block: in good order, or at once if something else has failed."""
    program = Program(module, settings)
    try:
        yield program
        await program.end()
    finally:
        program.kill()
