"""A real PostgreSQL for the tests, gone when its owner is gone; started from the binaries that this machine has.

    with PostgresServer() as server:            # a server of one's own, on a unix socket
        engine = create_async_engine(server.url)
        server.kill(); server.restart()         # a crash on demand

    python -m tools.postgres                    # one in the foreground, until Ctrl-C

Data and socket live in a temporary folder. A supervisor process holds a pipe to the owner: when the owner ends, even by
`kill -9`, the supervisor ends the server and removes the folder. As root it runs as another user, for PostgreSQL refuses
root.
"""

from __future__ import annotations

import argparse
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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["PostgresFailed", "PostgresNotFound", "PostgresServer", "find_postgres"]

ROOT: Final = Path(__file__).resolve().parent.parent
START_SECONDS: Final = 30.0
INSTALL: Final = "install it: sudo apt-get install postgresql (Debian, Ubuntu), brew install postgresql (macOS)"


class PostgresNotFound(RuntimeError):
    """No PostgreSQL to run; the text says what to install."""


class PostgresFailed(RuntimeError):
    """The server did not start, or was asked for what cannot be done; the text says why."""


def find_postgres() -> Path:
    """The folder of `initdb` and `postgres`: on the PATH, Debian's newest, pg_config's, Homebrew's newest.

    Raises:
        PostgresNotFound: There is none.
    """
    for folder in _folders():
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise PostgresNotFound(f"No PostgreSQL server (initdb and postgres) found here; {INSTALL}")


def _folders() -> Iterator[Path]:
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent  # a link may stand alone on the PATH
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_release, reverse=True)
    if config := shutil.which("pg_config"):
        told = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip()
        if told:
            yield Path(told)
    for cellar in ("/opt/homebrew/opt", "/usr/local/opt"):
        yield from sorted(Path(cellar).glob("postgresql*/bin"), key=_release, reverse=True)
    yield from sorted(Path("/usr").glob("pgsql-*/bin"), key=_release, reverse=True)  # Fedora's, from postgresql.org


def _release(folder: Path) -> float:
    number = re.search(r"\d+(\.\d+)?", folder.parent.name)
    return float(number[0]) if number else 0.0


class PostgresServer:
    """A PostgreSQL of one's own. Entering the `with` starts it; leaving ends it and drops its data.

    Args:
        port: A free TCP port on 127.0.0.1 instead of a unix socket.
        fsync: Whether what is committed is on the disk. Without it all is faster, and nothing is proved about crashes.
        config: More settings, as in postgresql.conf: `{"max_connections": 20}`.
    """

    def __init__(
        self, *, port: bool = False, fsync: bool = True, config: Mapping[str, str | int] | None = None
    ) -> None:
        self._tcp, self._fsync, self._config = port, fsync, dict(config or {})
        self._supervisor: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._port = 5432  # a part of the socket's name
        self.pid = 0
        """The server's first process; changes with `restart()`."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def folder(self) -> Path:
        """Where data, log and socket are, until `stop()`."""
        if self._folder is None:
            raise PostgresFailed("the server is not running: use it inside its `with`, or call start()")
        return self._folder

    @property
    def url(self) -> str:
        """For `create_async_engine`, with asyncpg; the same before and after a `restart()`."""
        if self._tcp:
            return f"postgresql+asyncpg://silbo@127.0.0.1:{self._port}/postgres"
        return f"postgresql+asyncpg://silbo@/postgres?host={self.folder}&port={self._port}"

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return (self.folder / "postgres.log").read_text(errors="replace")

    def start(self) -> None:
        """Make a database cluster and start it; returns when it answers."""
        if self._supervisor is not None:
            raise PostgresFailed("the server is started already; after kill() it is restart()")
        programs = find_postgres()
        self._folder = Path(tempfile.mkdtemp(prefix="silbo-pg-", dir="/tmp"))  # short, and open to another user
        if self._tcp:
            self._port = _free_port()
        settings = {
            "listen_addresses": "127.0.0.1" if self._tcp else "",
            "port": self._port,
            "unix_socket_directories": self._folder,
            "fsync": "on" if self._fsync else "off",
            "synchronous_commit": "on" if self._fsync else "off",
            "full_page_writes": "on" if self._fsync else "off",
            **self._config,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        supervisor = [sys.executable, "-S", "-E", "-m", "tools.postgres", "--supervise", str(self._folder)]
        self._supervisor = subprocess.Popen(
            [*supervisor, str(programs), str(self._port), *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the owner, who ends us in good order
        )
        try:
            self.pid = self._ask("start")
        except BaseException:
            self.stop()
            raise

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

    def kill(self) -> None:
        """End all its processes, as a crash would, and return when they are gone. The folder stays."""
        self._ask("kill")

    def restart(self) -> None:
        """Start it again on the same address and data; killed first if it still runs."""
        self.kill()
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
            raise PostgresFailed("the server is not running: use it inside its `with`, or call start()")
        assert supervisor.stdin
        assert supervisor.stdout
        with contextlib.suppress(BrokenPipeError):
            supervisor.stdin.write(order + "\n")
            supervisor.stdin.flush()
        answer = supervisor.stdout.readline()
        if not answer:
            raise PostgresFailed("the supervisor of PostgreSQL is gone")
        told = json.loads(answer)
        if "failed" in told:
            raise PostgresFailed(f"PostgreSQL did not start:\n{told['failed']}")
        return int(told["pid"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The supervisor: a process of its own, with nothing but the standard library.


class _Server:
    """The server, as its supervisor sees it."""

    def __init__(self, folder: Path, programs: Path, port: str, options: list[str]) -> None:
        self.folder, self.programs, self.port, self.options = folder, programs, port, options
        self.process: subprocess.Popen[Any] | None = None
        self.user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _ordinary_user()
            self.user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)

    def start(self) -> str | None:
        """None when it answers, else what went wrong."""
        if not (self.folder / "data").exists() and (problem := self._initdb()):
            return problem
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            command = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), *self.options]
            with (self.folder / "postgres.log").open("ab") as log:
                server = subprocess.Popen(
                    command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self.user
                )
            self.process = server
            while time.monotonic() < deadline and server.poll() is None:
                if self._answers():
                    return None
                time.sleep(0.02)
            server.kill()
            server.wait()
            log_text = (self.folder / "postgres.log").read_text(errors="replace")
            if "still in use" not in "".join(log_text.splitlines(keepends=True)[-5:]):
                return "\n".join(log_text.splitlines()[-10:])
            time.sleep(0.1)  # the memory of the one that was killed is not gone yet
        return f"no answer within {START_SECONDS:.0f} s"

    def signal(self, sign: signal.Signals) -> None:
        """Send it to all processes of the server."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)  # it starts no other process meanwhile
        for pid in [*_children(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def _initdb(self) -> str | None:
        command = [str(self.programs / "initdb"), "-D", str(self.folder / "data"), "-U", "silbo", "-A", "trust"]
        made = subprocess.run(
            [*command, "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self.user,
        )
        return made.stdout[-2000:] if made.returncode else None

    def _answers(self) -> bool:
        """Whether it takes queries: the answer of a connection that asks to begin a session."""
        words = b"\0\x03\0\0user\0silbo\0database\0postgres\0\0"
        local = "-c" in self.options and "listen_addresses=" in self.options
        with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as client, contextlib.suppress(OSError):
            client.settimeout(1.0)
            client.connect(str(self.folder / f".s.PGSQL.{self.port}") if local else ("127.0.0.1", int(self.port)))
            client.sendall((len(words) + 4).to_bytes(4, "big") + words)
            return client.recv(1) == b"R"  # authentication: trusted; an E says that it is starting up
        return False


def _ordinary_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise SystemExit("no user 'postgres' or 'nobody' to run PostgreSQL as, which refuses root")


def _children(pid: int) -> list[int]:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False).stdout
    pairs = (line.split() for line in told.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def _supervise(server: _Server) -> None:
    """Serve the owner's orders on stdin, one JSON line each, until the owner closes it or is gone."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for order in sys.stdin:
            failed = None
            if order == "start\n":
                failed = server.start()
            elif order == "kill\n":
                server.kill()
            elif order == "pause\n":
                server.signal(signal.SIGSTOP)
            elif order == "resume\n":
                server.signal(signal.SIGCONT)
            answer = {"failed": failed} if failed else {"pid": server.process.pid if server.process else 0}
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(answer), flush=True)
    finally:
        server.kill()
        shutil.rmtree(server.folder, ignore_errors=True)


def main() -> int | str:
    """Run one server in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.postgres",
        description="Start a PostgreSQL for development, print its URL, and end it with Ctrl-C. Its data are gone then.",
    )
    parser.add_argument("--port", action="store_true", help="a free port on 127.0.0.1 instead of a unix socket")
    options = parser.parse_args()
    try:
        with PostgresServer(port=options.port) as server:
            print(server.url, flush=True)
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            signal.sigwait(ends)
    except (PostgresNotFound, PostgresFailed) as error:
        return str(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--supervise"]:
        _supervise(_Server(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:]))
    else:
        sys.exit(main())
