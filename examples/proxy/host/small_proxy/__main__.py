"""The program: `python -m small_proxy http://127.0.0.1:8001 --plugin tenant --plugin gate`."""

import argparse
import socket
from contextlib import suppress
from pathlib import Path

import uvicorn

from small_proxy.app import make_app


class Server(uvicorn.Server):
    """Prints its URL when it serves."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or ():
            print("http://{}:{}".format(*listening.getsockname()), flush=True)


def main() -> None:
    """Serve on this machine alone."""
    arguments = argparse.ArgumentParser(prog="python -m small_proxy", description="A small HTTP proxy.")
    arguments.add_argument("upstream", help="the URL of the server behind the proxy")
    arguments.add_argument("--port", type=int, default=0, help="by default a free one")
    arguments.add_argument("--plugin", action="append", default=[], help="the name of a plugin to load; again for more")
    arguments.add_argument("--settings", type=Path, help="a TOML file with a table for each plugin")
    arguments.add_argument("--patience", type=float, default=0.5, help="seconds that a listener of a plugin may take")
    options = arguments.parse_args()
    app = make_app(options.upstream, allow=options.plugin, settings=options.settings, patience=options.patience)
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    with socket.create_server(("127.0.0.1", options.port)) as listening, suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
