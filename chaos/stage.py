"""Where one battery plays: its Redis, its programs, its folder; and what it finds. Leaving ends everything."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Final, Literal, Self

from chaos.proxy import Proxy, Rule
from tools.redis_binary import Binary
from tools.redis_cluster import ClusterServers
from tools.redis_server import RedisServer

__all__ = ["NotInTime", "Stage", "Worker", "phrase"]

ROOT: Final = Path(__file__).resolve().parent.parent
POLL: Final = 0.1


class NotInTime(Exception):
    """What a battery waits for did not come."""


class Worker:
    """One program: a process that can be killed, frozen and started again, with the same settings."""

    def __init__(
        self,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        folder: Path,
        python: str,
        environment: Mapping[str, str],
    ) -> None:
        self.name, self.figures = name, dict[str, Any]()
        self._environment = environment
        self._command = [python, "-m", f"chaos.{module}", json.dumps(settings)]
        self._log = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    async def start(self) -> None:
        self._ready.clear()
        # Not measured for coverage: it is to be fast, and what is killed measures nothing.
        env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=ROOT,
                env={**env, **self._environment},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self._listening = asyncio.create_task(self._listen(self._process))

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        async for line in process.stdout:
            if line == b"ready\n":
                self._ready.set()
            elif line.endswith(b"}\n"):  # not what a kill has torn
                self.figures = json.loads(line)
        await process.wait()
        self._ready.set()

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    @property
    def ended(self) -> int | None:
        """The exit code; None while it runs."""
        assert self._process
        return self._process.returncode

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return self._log.read_text(errors="replace")

    async def ready(self, within: float = 120.0) -> None:
        """Wait until it says so."""
        async with asyncio.timeout(within):
            await self._ready.wait()
        if self.ended:
            raise NotInTime(f"{self.name} ended with {self.ended}:\n{self.log[-2000:]}")

    async def wait(self, within: float) -> None:
        """Wait until it ends by itself."""
        assert self._listening
        try:
            async with asyncio.timeout(within):
                await asyncio.shield(self._listening)
        except TimeoutError:
            raise NotInTime(f"{self.name} did not end within {within:g} s:\n{self.log[-2000:]}") from None

    def signal(self, sign: signal.Signals) -> None:
        """To a process of ours that is not reaped yet, so the number is no other's."""
        if self.ended is None:
            os.kill(self.pid, sign)

    async def kill(self) -> None:
        """End it as a crash would."""
        self.signal(signal.SIGKILL)
        await self.wait(60.0)

    async def stop(self, within: float = 120.0) -> None:
        """End it in good order; anything but exit code 0 is an error."""
        await self.ready()
        self.signal(signal.SIGTERM)
        await self.wait(within)
        if self.ended:
            raise NotInTime(f"{self.name} ended with {self.ended}:\n{self.log[-2000:]}")


class Stage:
    """See above.

    Attributes:
        random: What chance decides, by the seed.
        done: What was done: figures that are neither right nor wrong.
        kept: What was promised: figures that must be as they are.
        wrong: The promises that did not hold; empty is a pass.
    """

    def __init__(self, name: str, seed: int, say: Callable[[str], object] | None = None) -> None:
        self.name, self.random = name, Random(f"{name} {seed}")
        self.done: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.wrong: list[str] = []
        self._say, self._began = say, time.monotonic()
        self._ends = AsyncExitStack()
        self.workers: list[Worker] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self.folder = Path()

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix=f"silbo-chaos-{self.name}-"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers:
            await worker.kill()
        await self._ends.aclose()
        if os.environ.get("CHAOS_KEEP"):
            self.say(f"kept: {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    # -- players --------------------------------------------------------------------------------------------

    def redis(self, *, port: bool = False, binary: Binary | None = None, on_disk: bool = True) -> RedisServer:
        """A server that has everything on the disk before it answers; or nothing, where it is not killed."""
        appendonly: Literal["always"] | None = "always" if on_disk else None
        server: RedisServer = self._ends.enter_context(RedisServer(appendonly=appendonly, port=port, binary=binary))
        self.done.setdefault("server", f"{server.binary.product} {server.binary.version}")
        return server

    def cluster(self) -> ClusterServers:
        """Three masters, and a replica of each."""
        servers = self._ends.enter_context(ClusterServers(replicas=True, node_timeout=2.0))
        binary = servers.nodes[0].binary
        self.done.setdefault("server", f"{binary.product} {binary.version}")
        return servers

    async def proxy(self, server: RedisServer, rule: Rule | None = None) -> Proxy:
        """A way to a server that can be disturbed."""
        return await self._ends.enter_async_context(Proxy(server.url, rule))

    async def start(
        self,
        name: str,
        module: str,
        /,
        *,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Worker:
        """Start a program, with a ledger of its name where it has one."""
        worker = Worker(name, module, settings, self.folder, python, environment or {})
        self.workers.append(worker)
        await worker.start()
        return worker

    def ledger(self, name: str) -> Path:
        """The file."""
        return self.folder / f"{name}.ledger"

    def spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        """A task that ends with the stage at the latest."""
        task = asyncio.ensure_future(work)
        self._tasks.append(task)
        return task

    # -- time -----------------------------------------------------------------------------------------------

    async def until(self, what: str, true: Callable[[], bool | Awaitable[bool]], within: float) -> float:
        """Wait for something; the seconds that it took.

        Raises:
            NotInTime: it did not come, or a task of the stage failed.
        """
        began = time.monotonic()
        while True:
            answer = true()
            if answer if isinstance(answer, bool) else await answer:
                return time.monotonic() - began
            for task in self._tasks:
                if task.done() and not task.cancelled():
                    task.result()
            if time.monotonic() - began > within:
                raise NotInTime(f"not within {within:g} s: {what}")
            await asyncio.sleep(POLL)

    async def settled(self, what: str, true: Callable[[], bool | Awaitable[bool]], within: float) -> None:
        """Wait for the end of it all; where it does not come, that is a finding, and the rest is looked at."""
        try:
            await self.until(what, true, within)
        except NotInTime as error:
            self.wrong.append(str(error))

    def say(self, text: str) -> None:
        """Show progress."""
        if self._say is not None:
            self._say(f"{self.name} {time.monotonic() - self._began:5.1f} s  {text}")

    @asynccontextmanager
    async def saying(self, what: Callable[[], str], every: float = 5.0) -> AsyncGenerator[None]:
        """Show progress now and then."""

        async def go_on() -> None:
            while True:
                await asyncio.sleep(every)
                self.say(what())

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- findings -------------------------------------------------------------------------------------------

    def note(self, name: str, value: Any) -> None:
        """A figure that is neither right nor wrong."""
        self.done[name] = value

    def must(self, name: str, value: Any, held: bool, wanted: str) -> None:
        """A figure that keeps a promise or breaks it."""
        self.kept[name] = value
        if not held:
            self.wrong.append(f"{phrase(name, value)}, not {wanted}")

    def zero(self, name: str, value: int) -> None:
        """A figure that must be 0."""
        self.must(name, value, value == 0, "0")

    def same(self, name: str, value: Any, wanted: Any) -> None:
        """A figure that must be exactly this."""
        self.must(name, value, value == wanted, str(wanted))

    def below(self, name: str, value: float, bound: float) -> None:
        """A figure with a bound."""
        self.must(name, value, value < bound, f"below {bound:g}")


def phrase(name: str, value: Any) -> str:
    """A figure for people: `20 relays killed`, and for `slowest answer, s`: `slowest answer 5.01 s`."""
    if isinstance(value, float):
        value = f"{value:.3g}"
    elif isinstance(value, int):
        value = f"{value:,}"
        if ", " not in name:
            return f"{value} {name}"
    name, _, unit = name.partition(", ")
    return f"{name} {value} {unit}".rstrip()
