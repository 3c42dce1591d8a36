"""The process between a server and its owner: when the owner is gone, even by `kill -9`, so are the server and its folder.

    python -S -E -m tools.supervisor FOLDER PROGRAM     # the fields of a Program, in JSON

Its stdin is a pipe that the owner alone holds. Orders come there, a word a line; each is answered by a line of JSON: what
went wrong, or null, and the server's process. It imports nothing but the standard library, and so starts in no time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["LOG", "Program", "Supervisor"]

LOG: Final = "output.log"
SECONDS: Final = 60.0
"""A server that does not answer by then has not started; RabbitMQ on a busy machine takes many of them."""


class Program(NamedTuple):
    """A server to run in a folder, as the folder's owner, and how to see that it takes clients."""

    name: str
    command: list[str]
    address: int | str
    """A port of 127.0.0.1, or the path of a socket."""
    greeting: str
    """What a client says first."""
    answers: list[str]
    """How it answers that when it is ready: the first characters."""


class Supervisor:
    """What carries out the orders."""

    def __init__(self, folder: Path, program: Program) -> None:
        self._folder, self._program = folder, program
        self._process: subprocess.Popen[bytes] | None = None
        self._held = -1

    @property
    def pid(self) -> int:
        """The server's first process, or 0."""
        return self._process.pid if self._process else 0

    def start(self) -> str | None:
        """None when it answers, else what went wrong. One that runs is killed first."""
        self.kill()
        self._held, hold = os.pipe()
        owner = self._folder.stat()
        root = os.geteuid() == 0
        with (self._folder / LOG).open("ab") as log:
            self._process = server = subprocess.Popen(
                self._program.command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[hold],
                start_new_session=True,  # a group of its own, for the signals
                user=owner.st_uid if root else None,
                group=owner.st_gid if root else None,
                extra_groups=[] if root else None,
            )
        os.close(hold)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(OSError):
                if self._answers():
                    return None
            time.sleep(0.01)
        why = f"no answer within {SECONDS:.0f} s" if server.poll() is None else "it ended at once"
        self.kill()
        lines = (self._folder / LOG).read_text(errors="replace").splitlines()
        return "\n".join([f"{self._program.name} did not start:", why, *lines[-30:]])

    def signal(self, sign: signal.Signals) -> None:
        """Send it to all processes of the server."""
        server = self._process
        if server is None or server.returncode is not None:
            return
        # It is not reaped, so its number is nobody else's. PostgreSQL's children are in groups of their own.
        _send(server.pid, signal.SIGSTOP)  # it starts no other process meanwhile
        for pid in [*_children(server.pid), -server.pid]:
            _send(pid, sign)

    def kill(self) -> None:
        """End it as a crash would, and wait until its last process is gone."""
        if self._process is None:
            return
        self.signal(signal.SIGKILL)
        self._process.wait()
        # All its processes have inherited the other end: this one is at its end when the last has let go of everything.
        select.select([self._held], [], [], SECONDS)
        os.close(self._held)
        self._process = None

    def _answers(self) -> bool:
        """Whether it takes clients."""
        address = self._program.address
        family, where = (
            (socket.AF_UNIX, address) if isinstance(address, str) else (socket.AF_INET, ("127.0.0.1", address))
        )
        with socket.socket(family) as client:
            client.settimeout(1.0)
            client.connect(where)
            client.sendall(self._program.greeting.encode())
            return client.recv(64).decode(errors="replace").startswith(tuple(self._program.answers))


def _send(pid: int, sign: signal.Signals) -> None:
    """To the process, or to a group under its negative number; nothing where there is none left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for one that has ended
        os.kill(pid, sign)


def _children(pid: int) -> list[int]:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    pairs = (line.split() for line in told.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def main(folder: Path, program: Program) -> None:
    """Serve the owner until it closes the pipe or is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    supervisor = Supervisor(folder, program)
    try:
        for order in sys.stdin:
            failed = None
            match order.strip():
                case "start":
                    failed = supervisor.start()
                case "kill":
                    supervisor.kill()
                case "pause":
                    supervisor.signal(signal.SIGSTOP)
                case _:
                    supervisor.signal(signal.SIGCONT)
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([failed, supervisor.pid]), flush=True)
    finally:
        supervisor.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Program(*json.loads(sys.argv[2])))
