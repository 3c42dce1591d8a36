"""The program: `python -m small_proxy http://localhost:8001 --plugin tenant --plugin gate`."""

import argparse
import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from silbo import AsyncEventDispatcher
from small_proxy.plugins import load_plugins
from small_proxy.proxy import Proxy

METHODS = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]


def make_app(upstream_url: str, *, allow: Sequence[str]) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream_url: The server that requests go to.
        allow: The names of the plugins to load.
    """
    dispatcher = AsyncEventDispatcher()
    upstream = httpx.AsyncClient(base_url=upstream_url, trust_env=False)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with upstream, dispatcher, load_plugins(dispatcher, allow):
            yield

    async def listeners(_: Request) -> Response:
        rows = dispatcher.describe()
        return JSONResponse([{"name": str(row.name), "plugin": row.plugin, "at": row.defined_at} for row in rows])

    proxy = Proxy(dispatcher, upstream)
    routes = [Route("/-/listeners", listeners), Route("/{path:path}", proxy.pass_on, methods=METHODS)]
    return Starlette(routes=routes, lifespan=lifespan)


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
    options = arguments.parse_args()
    app = make_app(options.upstream, allow=options.plugin)
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
    with socket.create_server(("127.0.0.1", options.port)) as listening, suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


if __name__ == "__main__":
    main()
