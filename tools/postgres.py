"""A real PostgreSQL for the tests, gone when its owner is gone; started from the binaries that this machine has.

    with PostgresServer() as server:            # a server of one's own, on a unix socket
        engine = create_async_engine(server.url)
        server.kill(); server.restart()         # a crash on demand

    python -m tools.postgres                    # one in the foreground, until Ctrl-C

How it runs, and that nothing stays behind: tools/server.py. As root it runs as another user, for PostgreSQL refuses root.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tools.server import Server, ServerFailed, in_foreground
from tools.supervisor import Program

__all__ = ["PostgresNotFound", "PostgresServer", "find_postgres"]

INSTALL: Final = "install it: sudo apt-get install postgresql (Debian, Ubuntu), brew install postgresql (macOS)"


class PostgresNotFound(ServerFailed):
    """No PostgreSQL to run; the text says what to install."""


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


class PostgresServer(Server):
    """A PostgreSQL of one's own. Entering the `with` starts it; leaving ends it and drops its data.

    Args:
        port: A free TCP port on 127.0.0.1 instead of a unix socket.
        fsync: Whether what is committed is on the disk. Without it all is faster, and nothing is proved about crashes.
        config: More settings, as in postgresql.conf: `{"max_connections": 20}`.
    """

    users = ("postgres", "nobody")

    def __init__(
        self, *, port: bool = False, fsync: bool = True, config: Mapping[str, str | int] | None = None
    ) -> None:
        super().__init__()
        self._tcp, self._fsync, self._config = port, fsync, dict(config or {})

    @property
    def url(self) -> str:
        """For `create_async_engine`, with asyncpg; the same before and after a `restart()`."""
        if self._tcp:
            return f"postgresql+asyncpg://silbo@127.0.0.1:{self._port}/postgres"
        return f"postgresql+asyncpg://silbo@/postgres?host={self.folder}&port={self._port}"

    def _program(self) -> Program:
        programs = find_postgres()
        settings = {
            "listen_addresses": "127.0.0.1" if self._tcp else "",
            "port": self._port,  # a part of the socket's name, too
            "unix_socket_directories": self.folder,
            "fsync": "on" if self._fsync else "off",
            "synchronous_commit": "on" if self._fsync else "off",
            "full_page_writes": "on" if self._fsync else "off",
            **self._config,
        }
        initdb = [str(programs / "initdb"), "-D", "data", "-U", "silbo", "-A", "trust", "-E", "UTF8", "--locale=C"]
        postgres = [str(programs / "postgres"), "-D", "data"]
        postgres += [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        making = f"{shlex.join(initdb)} --no-sync --no-instructions >/dev/null"
        hello = "\0\x03\0\0user\0silbo\0database\0postgres\0\0"
        return Program(
            name="PostgreSQL",
            command=["sh", "-c", f"{{ test -e data || {making}; }} && exec {shlex.join(postgres)}"],
            address=self._port if self._tcp else str(self.folder / f".s.PGSQL.{self._port}"),
            greeting=f"\0\0\0{chr(len(hello) + 4)}{hello}",  # it asks to begin a session
            answers=["R"],  # authentication: trusted; an E says that it is starting up
        )


def main() -> int | str:
    """Run one server in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.postgres",
        description="Start a PostgreSQL for development, print its URL, and end it with Ctrl-C. Its data are gone then.",
    )
    parser.add_argument("--port", action="store_true", help="a free port on 127.0.0.1 instead of a unix socket")
    return in_foreground(PostgresServer(port=parser.parse_args().port))


if __name__ == "__main__":
    sys.exit(main())
