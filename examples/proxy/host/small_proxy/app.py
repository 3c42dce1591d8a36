"""The proxy as an ASGI application: its dispatcher, its plugins, and pages about them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from silbo import AsyncEventDispatcher, Budget, Plugins, Policy
from silbo.errors import PluginMissing
from small_proxy import events
from small_proxy.proxy import Proxy

__all__ = ["make_app"]

PLUGINS = "small_proxy.plugins"
"""The group of entry points."""

VERSION = "1.0"
METHODS = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]


def make_app(upstream_url: str, *, allow: Sequence[str], settings: Path | None, patience: float) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream_url: The server that requests go to.
        allow: The names of the plugins that are loaded.
        settings: A TOML file with a table for each plugin.
        patience: Seconds that a listener of a plugin may take.
    """
    dispatcher = AsyncEventDispatcher(names=events, unknown="error")
    policy = Policy(timeout=patience, budget=Budget(failures=10))
    plugins = Plugins(dispatcher, policy=policy, settings=settings, host_version=VERSION)
    upstream = httpx.AsyncClient(base_url=upstream_url, trust_env=False)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with upstream, dispatcher, plugins:
            await plugins.load_entry_points(PLUGINS, allow=allow)
            yield

    async def list_plugins(_: Request) -> Response:
        return JSONResponse(
            {
                row.name: {"version": row.version, "state": row.state, "tasks": row.tasks, "failures": row.failures}
                for row in plugins.describe()
            }
        )

    async def list_listeners(_: Request) -> Response:
        rows = dispatcher.describe()
        return JSONResponse([{"name": str(row.name), "plugin": row.plugin, "at": row.defined_at} for row in rows])

    async def reload(request: Request) -> Response:
        await plugins.reload(request.path_params["name"], overlap=True)
        return Response(status_code=204)

    async def unload(request: Request) -> Response:
        await plugins.unload(request.path_params["name"], timeout=0.5)
        return Response(status_code=204)

    async def is_missing(_: Request, error: Exception) -> Response:
        return PlainTextResponse(str(error), 404)

    routes = [
        Route("/-/listeners", list_listeners),
        Route("/-/plugins", list_plugins),
        Route("/-/plugins/{name}", unload, methods=["DELETE"]),
        Route("/-/plugins/{name}/reload", reload, methods=["POST"]),
        Route("/{path:path}", Proxy(dispatcher, upstream).pass_on, methods=METHODS),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={PluginMissing: is_missing})
