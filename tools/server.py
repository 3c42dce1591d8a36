"""A server of one's own for the tests, the demo and the benchmarks: started in a temporary folder, gone with its owner.

    with RedisServer() as server:               # or PostgresServer, RabbitMQServer
        client = Redis.from_url(server.url)
        server.kill(); server.restart()         # faults on demand
        server.pause(); server.resume()

A supervisor process holds a pipe to the owner: when the owner ends, even by `kill -9`, the supervisor ends the server and
removes the folder. Loopback only, never port 6379.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol, Self

from tools.supervisor import LOG, Program

__all__ = ["ROOT", "Server", "ServerFailed", "free_port", "in_foreground"]

ROOT: Final = Path(__file__).resolve().parent.parent
LONGEST_FOLDER: Final = 60
"""With it a socket's path stays below the kernel's limit: 108 bytes on Linux, 104 on macOS."""

TAKEN: Final = re.compile("in use|eaddrinuse|port_already_used")
"""What a server says whose port another process has taken since we looked: it is tried on the next."""


class ServerFailed(RuntimeError):
    """The server did not start, or was asked for what cannot be done; the text says why."""


class Server(ABC):
    """A server of one's own. Entering the `with` starts it; leaving ends it and drops its data."""

    users: ClassVar[tuple[str, ...]] = ()
    """Who runs it for root: the first of them that there is. Without any, root does."""

    def __init__(self) -> None:
        self._supervisor: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._port = 0
        self.name = ""
        """What runs, once it is started."""
        self.pid = 0
        """The server's first process; changes with `restart()`."""

    @property
    @abstractmethod
    def url(self) -> str:
        """For its clients; the same before and after a `restart()`."""

    @abstractmethod
    def _program(self) -> Program:
        """What to run, in `folder`, and on `_port` if on any."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        """Where data, log and socket are, until `stop()`."""
        if self._folder is None:
            raise ServerFailed("the server is not running: use it inside its `with`, or call start()")
        return self._folder

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return (self.folder / LOG).read_text(errors="replace")

    def start(self) -> None:
        """Start it, and return when it answers."""
        if self._supervisor is not None:
            raise ServerFailed("the server is started already; after kill() it is restart()")
        for attempt in range(5):
            try:
                self._start()
            except BaseException as error:  # Ctrl-C too
                self.stop()
                if not isinstance(error, ServerFailed) or not TAKEN.search(str(error)) or attempt == 4:
                    raise
            else:
                return

    def _start(self) -> None:
        self._folder = _temporary_folder(self.users if os.geteuid() == 0 else ())
        self._port = self._choose_port()
        # -S and -E: no site packages and no PYTHON* variables, so it starts in 20 ms and is not measured.
        supervisor = [sys.executable, "-S", "-E", "-m", "tools.supervisor", str(self._folder)]
        program = self._program()
        self.name = program.name
        self._supervisor = subprocess.Popen(
            [*supervisor, json.dumps(program)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the owner, who ends us in good order
        )
        self.pid = self._ask("start")

    def _choose_port(self) -> int:
        """A free port for the next attempt to start."""
        return free_port()

    def stop(self) -> None:
        """End it and remove its folder. May be called twice."""
        supervisor, self._supervisor = self._supervisor, None
        folder, self._folder = self._folder, None
        if supervisor is not None:
            assert supervisor.stdin
            assert supervisor.stdout
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
            supervisor.wait()
            supervisor.stdout.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # of one that had no supervisor yet

    def kill(self) -> None:
        """End all its processes, as a crash would, and return when they are gone. The folder stays."""
        self._ask("kill")

    def restart(self) -> None:
        """Start it again on the same address and data; killed first if it still runs."""
        self.pid = self._ask("start")

    def pause(self) -> None:
        """Freeze all its processes: connections stay open, nothing is answered (SIGSTOP)."""
        self._ask("pause")

    def resume(self) -> None:
        """End a `pause()`."""
        self._ask("resume")

    def _ask(self, order: str) -> int:
        supervisor = self._supervisor
        if supervisor is None:
            raise ServerFailed("the server is not running: use it inside its `with`, or call start()")
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(order + "\n")
            supervisor.stdin.flush()
        answer = supervisor.stdout.readline()
        if not answer:
            raise ServerFailed(f"the supervisor of {self.name} is gone")
        failed, pid = json.loads(answer)
        if failed:
            raise ServerFailed(failed)
        return int(pid)


def _temporary_folder(users: tuple[str, ...]) -> Path:
    """One whose path is short, and that belongs to the first of the users that there is."""
    parent = tempfile.gettempdir()
    if users or len(os.fsencode(parent)) > LONGEST_FOLDER:
        parent = "/tmp"  # short, and open to another user
    folder = Path(tempfile.mkdtemp(prefix="silbo-server-", dir=parent))
    for name in users:
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            return folder
    if users:
        folder.rmdir()
        raise ServerFailed(f"it does not run as root, and there is no user {' or '.join(users)} to run it as")
    return folder


def free_port() -> int:
    """One of 127.0.0.1 that nobody has now, and never 6379."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port != 6379:
            return port


class InForeground(Protocol):
    """A server that `in_foreground` runs."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, *_: object) -> None: ...


def in_foreground(server: InForeground) -> int | str:
    """Run it, print its URL, and end it with Ctrl-C: the exit code, or why it does not run."""
    try:
        with server:
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # who has read the URL may send one at once
            print(f"{server.name}, until Ctrl-C:", file=sys.stderr)
            print(server.url, flush=True)
            signal.sigwait(ends)
    except ServerFailed as error:
        return str(error)
    except KeyboardInterrupt:
        return 130
    return 0
