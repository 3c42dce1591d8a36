"""The page of a running host, as an ASGI application."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from ipaddress import IPv6Address, ip_address
from types import ModuleType
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

from silbo._checks import check_seconds, describe_object
from silbo.brokers.redis.connection import Client
from silbo.dispatch.options import is_async
from silbo.message import Format
from silbo.operations.app import find_app
from silbo.operations.groups import SILENT_AFTER
from silbo.operations.overview import read_overview
from silbo.operations.page import render_page
from silbo.operations.page_style import CONTENT_SECURITY_POLICY
from silbo.outbox.rows import OutboxStore
from silbo.wire.formats import JSON

__all__ = ["PageApp"]

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

FORWARDED: Final = frozenset({b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"})
"""Headers of proxies: whoever is at this machine's own address then stands for somebody else."""
HEADERS: Final = (
    (b"content-security-policy", f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'".encode()),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
"""Headers of every answer."""
_EMPTY: Final = (str, bytes, int, float, type, ModuleType)
"""Classes of objects that are not looked through."""
HTML: Final = b"text/html; charset=utf-8"
TEXT: Final = b"text/plain; charset=utf-8"


class PageApp:
    """The page of a running host, read anew at each request: mount it in the host's ASGI application, or serve it alone.

    It changes nothing: GET and HEAD alone are answered. Without ``permit`` only requests from this machine are, under a name of
    this machine (``localhost``, ``127.0.0.1``), and none that a proxy has passed on.

    Args:
        host: A dispatcher, a consumer, a :class:`~silbo.Plugins`, an outbox; a list of them; or an object that holds one as an
            attribute, in its ``state`` (FastAPI, Starlette) or as an item. It is looked through at each request, so it may be filled
            later. A dispatcher that is a global of a module is given itself.
        title: The title of the page.
        redis: The program's client; None leaves streams, groups and dead letters out.
        prefix: The broker's prefix.
        store: The outbox's store, open; by default that of the first open outbox that the host holds. Without any, the outbox is
            left out.
        format: The format of the broker.
        payloads: If true, payloads are shown. Errors always are, with their text.
        permit: An async function that gets the ASGI scope of a request, and returns True if whoever has sent it may see the page.
        silent_after: Seconds without a sign after which a consumer counts as silent: the groups' ``claim_after``.
        timeout: Seconds in which Redis answers each step.

    Raises:
        TypeError: ``permit`` is not an async function, or the host is an object that can hold no dispatcher.
    """

    def __init__(
        self,
        host: object,
        *,
        title: str = "silbo",
        redis: Client | None = None,
        prefix: str = "silbo",
        store: OutboxStore | None = None,
        format: Format = JSON,  # noqa: A002  # the word of every broker
        payloads: bool = False,
        permit: Callable[[Scope], Awaitable[bool]] | None = None,
        silent_after: float = SILENT_AFTER,
        timeout: float = 5.0,
    ) -> None:
        if permit is not None and not is_async(permit):
            raise TypeError(
                f"permit is an async function that gets the scope and returns True or False, not {permit!r}"
            )
        if host is None or inspect.isroutine(host) or isinstance(host, _EMPTY):
            raise TypeError(
                f"a page is of a dispatcher, PageApp(dispatcher), or of an object that holds one, not of {describe_object(host)}"
            )
        self._host = host
        self._title = title
        self._permit = permit
        self._options: dict[str, Any] = {
            "client": redis,
            "prefix": prefix,
            "store": store,
            "format": format,
            "payloads": payloads,
            "silent_after": check_seconds("silent_after", silent_after, zero=True),
            "timeout": check_seconds("timeout", timeout),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await _follow_lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif not await self._may_see(scope):
            await _answer(
                scope, send, 403, TEXT, b"This page is for this machine alone, or for those whom its host permits.\n"
            )
        elif not _is_root(scope):
            await _answer(scope, send, 404, TEXT, b"There is one page alone, at the root of this application.\n")
        elif scope["method"] not in ("GET", "HEAD"):
            body = b"This page changes nothing: GET and HEAD alone are answered.\n"
            await _answer(scope, send, 405, TEXT, body, [(b"allow", b"GET, HEAD")])
        else:
            overview = await read_overview(find_app(self._host, self._title), **self._options)
            page = await asyncio.to_thread(render_page, overview)  # a large one would hold the host's loop
            await _answer(scope, send, 200, HTML, page.encode())

    async def _may_see(self, scope: Scope) -> bool:
        if self._permit is None:
            return _is_from_this_machine(scope)
        # A coroutine that somebody forgot to await, or another object, is no permission.
        return (await self._permit(scope)) is True


async def _follow_lifespan(receive: Receive, send: Send) -> None:
    """Agree to the start and the end of a server whose only application this is."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _answer(
    scope: Scope, send: Send, status: int, kind: bytes, body: bytes, more: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _is_root(scope: Scope) -> bool:
    """Return True if a request is for the root. Servers and frameworks differ in whether the path has the mount's own part."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) in ("", "/")


def _is_from_this_machine(scope: Scope) -> bool:
    """Return True if a request comes from this machine, and was sent to it.

    A page of another site, whose name was made to lead to this machine (DNS rebinding), sends that name as the host.
    """
    headers = scope["headers"]
    hosts = [value for name, value in headers if name == b"host"]
    client = scope.get("client")
    return (
        client is not None
        and _is_loopback(client[0])
        and len(hosts) == 1
        and _is_name_of_this_machine(hosts[0].decode("latin-1"))
        and not any(name in FORWARDED for name, _ in headers)
    )


def _is_name_of_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        found = ip_address(address)
    except ValueError:
        return False
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_loopback
    return found.is_loopback
