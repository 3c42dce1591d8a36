"""The command line, run as users run it: in a process of its own, or in this one if that makes no difference; and stores for it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

from silbo import Message, Outbox, Quota
from silbo.brokers.memory import MemoryBroker
from silbo.cli.main import main
from silbo.message import new_publication
from silbo.stores.sqlite import SQLiteStore
from tests.support.logging_state import logging_as_it_was

ROOT = Path(__file__).resolve().parents[2]
SILBO = (sys.executable, "-W", "error", "-m", "silbo")


def without(library: str) -> Sequence[str]:
    """The command line where a library is not installed."""
    program = f"""
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from silbo.__main__ import main
sys.exit(main())
"""
    return sys.executable, "-W", "error", "-c", program


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def object(self) -> Any:
        (only,) = self.objects
        return only


class Run(Protocol):
    """Runs a command in this process; for those that fail before they do anything."""

    def __call__(self, *arguments: str) -> Done: ...


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The test's own, without what the command line would read."""
    ours = {"SILBO_STORE", "SILBO_REDIS_URL", "SILBO_PREFIX", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONUNBUFFERED"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": str(ROOT), **extra}


async def silbo(*arguments: object, env: Mapping[str, str] | None = None, command: Sequence[str] | None = None) -> Done:
    """Run to the end, without a terminal.

    Args:
        arguments: The command's own.
        env: Added to the environment.
        command: A program that runs the command line, as ``SILBO``; None runs it in a thread of this process, which
            spares the start of one.
    """
    if command is None:
        done = await asyncio.to_thread(_run_here, list(map(str, arguments)), environment(env or {}))
    else:
        process = await asyncio.create_subprocess_exec(
            *(*command, *map(str, arguments)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(env or {}),
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        done = Done(process.returncode, out.decode(), err.decode())
    assert "Traceback" not in done.err, done.err
    return done


_ONE_AT_A_TIME = threading.Lock()
"""The environment and the three streams are the whole process's."""


def _run_here(arguments: Sequence[str], env: Mapping[str, str]) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with (
        _ONE_AT_A_TIME,
        Path(os.devnull).open() as nothing,
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(sys, "stdin", nothing),
        redirect_stdout(out),
        redirect_stderr(err),
        logging_as_it_was(),
    ):
        try:
            code = main(arguments)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


class Terminal:
    """A process at a terminal: what it shows, and what somebody types."""

    def __init__(self, process: asyncio.subprocess.Process, screen: int) -> None:
        self.process, self._screen, self.shown = process, screen, ""

    async def until(self, text: str) -> None:
        """Read until the screen has it."""
        async with asyncio.timeout(20):
            while text not in self.shown:
                assert await self._more(), f"ended without {text!r}:\n{self.shown}"

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    async def end(self) -> int:
        """Its exit code, once it has ended."""
        while await self._more():
            pass
        return await self.process.wait()

    async def _more(self) -> bool:
        try:
            read = await asyncio.to_thread(os.read, self._screen, 4096)
        except OSError:  # nobody holds the other end any more
            return False
        self.shown += read.decode(errors="replace")
        return bool(read)


@asynccontextmanager
async def terminal(*arguments: object, env: Mapping[str, str] | None = None) -> AsyncGenerator[Terminal]:
    """Run with stdin, stdout and stderr on a terminal of 80 columns, where Ctrl-C can be typed."""
    screen, end = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CONTROLLING, *SILBO, *map(str, arguments)),
        stdin=end,
        stdout=end,
        stderr=end,
        env=environment({"TERM": "xterm-256color", "COLUMNS": "80", **(env or {})}),
        start_new_session=True,
    )
    os.close(end)
    try:
        yield Terminal(process, screen)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(screen)


CONTROLLING = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.execv(sys.argv[1], sys.argv[1:])
"""


@asynccontextmanager
async def relay(*arguments: object) -> AsyncGenerator[asyncio.subprocess.Process]:
    """``silbo relay`` while it runs, from its first line on; killed where the test leaves it running."""
    async with started(*arguments) as (process, _):
        yield process


@asynccontextmanager
async def started(*arguments: object) -> AsyncGenerator[tuple[asyncio.subprocess.Process, str]]:
    """The same, with that line."""
    process = await asyncio.create_subprocess_exec(
        *(*SILBO, "relay", *map(str, arguments)), stderr=asyncio.subprocess.PIPE, env=environment({})
    )
    try:
        assert process.stderr is not None
        first = (await process.stderr.readline()).decode()
        assert "relay started" in first, first + (await process.stderr.read()).decode()
        yield process, first
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def stopped(process: asyncio.subprocess.Process, sign: signal.Signals = signal.SIGTERM) -> str:
    """End a relay in good order; what it has told meanwhile."""
    process.send_signal(sign)
    async with asyncio.timeout(20):
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return err.decode()


def message(number: int, key: int = 0) -> Message:
    headers = {"publication": new_publication(), "version": "1", "key": str(key)}
    return Message("notification_event", "order.paid", f"id-{number}", {"number": number}, headers)


async def fill(path: Path, many: int, *, keys: int = 1, partitions: int = 1) -> None:
    """Store so many messages, numbered from 0."""
    quota = Quota(rows=10_000_000)
    broker = MemoryBroker(app="shop")
    async with Outbox(SQLiteStore(path), broker, relay=False, partitions=partitions, quota=quota) as outbox:
        await outbox.publish(*(message(number, number % keys) for number in range(many)))


async def settle(path: Path, *, sent: int = 0, dead: int = 0) -> None:
    """Mark the oldest rows as sent, the next as dead, as a relay does."""
    store = SQLiteStore(path)
    await store.open()
    try:
        lead = await store.lead(0, "test", lease=10)
        assert lead is not None
        taken = [row.id for row in await store.take(lead, sent + dead)]
        await store.settle(lead, taken[:sent], dict.fromkeys(taken[sent:], "too large\x1b[31m for [bold]anybody"))
        await store.resign(lead)
    finally:
        await store.aclose()


async def counts(path: Path) -> dict[Any, int]:
    store = SQLiteStore(path)
    await store.open()
    try:
        return dict((await store.status()).counts)
    finally:
        await store.aclose()
