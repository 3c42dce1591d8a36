"""The page of a running host: who may see it, what it answers, and that it changes nothing."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.routing import Mount

from silbo import AsyncEventDispatcher, EventName, Outbox, Trace
from silbo.brokers.memory import MemoryBroker
from silbo.operations.page_style import CONTENT_SECURITY_POLICY
from silbo.stores.sqlite import SQLiteStore
from silbo.web import PageApp
from tests.support.command_line import ROOT
from tests.support.overviews import Page
from tools.server import free_port

HERE = "http://localhost"


@asynccontextmanager
async def browsing(
    app: Any, client: str | None = "127.0.0.1", base_url: str = HERE
) -> AsyncIterator[httpx.AsyncClient]:
    address: Any = None if client is None else (client, 50000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=address), base_url=base_url) as browser:
        yield browser


@pytest.fixture
def dispatcher() -> AsyncEventDispatcher:
    return AsyncEventDispatcher(names=[EventName("order.paid")], observers=[Trace()])


async def listener(event: Any) -> None: ...


async def test_page_is_read_anew_at_each_reload(dispatcher: AsyncEventDispatcher) -> None:
    async with browsing(PageApp(dispatcher, title="the shop")) as browser:
        before = Page((await browser.get("/")).text).text
        dispatcher.add_listener("order.paid", listener)
        await dispatcher.adispatch("order.paid")
        answer = await browser.get("/")
    after = Page(answer.text).text
    assert "the shop" in before and "No dispatch has ended" in before and before.count("nobody") == 2
    assert after.count("nobody") == 1, "the word in the figures"
    assert f"{listener.__name__} [{__name__}]" in after and "completed, " in after
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"


async def test_page_is_made_beside_the_hosts_event_loop() -> None:
    """A large one takes a second, in which the host would stand still."""
    threads: list[str] = []

    class Name:
        def __repr__(self) -> str:
            threads.append(threading.current_thread().name)
            return "odd"

    dispatcher = AsyncEventDispatcher(observers=[Trace()])
    await dispatcher.adispatch(Name())
    async with browsing(PageApp(dispatcher)) as browser:
        assert "odd" in (await browser.get("/")).text
    assert set(threads) - {threading.main_thread().name}


async def test_host_may_be_filled_later() -> None:
    """By the lifespan of the web application that holds it, and that the page is part of."""
    host = Starlette()
    page = PageApp(host)
    host.router.routes.append(Mount("/silbo", page))
    async with browsing(host) as browser:
        assert "There is no dispatcher here. " in (await browser.get("/silbo/")).text
        host.state.dispatcher = AsyncEventDispatcher(names=[EventName("order.paid")])
        answer = await browser.get("/silbo/")
        assert answer.status_code == 200 and "order.paid" in answer.text
        assert (await browser.get("/silbo/else")).status_code == 404


async def test_browser_is_told_to_load_nothing_and_to_keep_nothing(dispatcher: AsyncEventDispatcher) -> None:
    """Of each answer, also of one that refuses."""
    async with browsing(PageApp(dispatcher)) as browser:
        for path in ("/", "/else"):
            headers = (await browser.get(path)).headers
            assert headers["content-security-policy"] == f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'"
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("192.0.2.7", {}),
        ("2001:db8::7", {}),
        ("::ffff:192.0.2.7", {}),
        ("not an address", {}),
        (None, {}),
        ("127.0.0.1", {"host": "evil.example"}),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}),
        ("127.0.0.1", {"host": "[broken"}),
        ("127.0.0.1", {"host": ""}),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.7"}),
        ("127.0.0.1", {"forwarded": "for=192.0.2.7"}),
        ("127.0.0.1", {"via": "1.1 proxy"}),
    ],
)
async def test_only_this_machine_sees_the_page(
    dispatcher: AsyncEventDispatcher, client: str | None, headers: dict[str, str]
) -> None:
    """Nobody elsewhere, nobody behind a proxy on this machine, and no other site whose name leads here (DNS rebinding)."""
    async with browsing(PageApp(dispatcher), client) as browser:
        answer = await browser.get("/", headers=headers)
    assert answer.status_code == 403 and "order.paid" not in answer.text


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("url", [HERE, "http://127.0.0.1:8000", "http://[::1]:8000"])
async def test_this_machine_has_several_names(dispatcher: AsyncEventDispatcher, client: str, url: str) -> None:
    async with browsing(PageApp(dispatcher), client, url) as browser:
        assert (await browser.get("/")).status_code == 200


async def test_two_hosts_in_one_request_are_refused(dispatcher: AsyncEventDispatcher) -> None:
    async with browsing(PageApp(dispatcher)) as browser:
        answer = await browser.get("/", headers=[("host", "localhost"), ("host", "evil.example")])
    assert answer.status_code == 403


@pytest.mark.parametrize(("answer", "status"), [(True, 200), (False, 403), (None, 403), ("yes", 403)])
async def test_host_permits(dispatcher: AsyncEventDispatcher, answer: Any, status: int) -> None:
    """From everywhere, and for this machine as well; an object that only looks true is no permission."""
    seen: list[str] = []

    async def permit(scope: Any) -> Any:
        seen.append(dict(scope["headers"])[b"cookie"].decode())
        return answer

    for client in ("192.0.2.7", "127.0.0.1"):
        async with browsing(PageApp(dispatcher, permit=permit), client) as browser:
            given = await browser.get("/", headers={"cookie": "session=7", "host": "shop.example"})
        assert given.status_code == status
    assert seen == ["session=7"] * 2


async def test_failed_permission_shows_nothing(dispatcher: AsyncEventDispatcher) -> None:
    async def permit(scope: Any) -> bool:
        raise LookupError("no session")

    async with browsing(PageApp(dispatcher, permit=permit)) as browser:
        with pytest.raises(LookupError):  # the server answers with 500
            await browser.get("/")


def test_permission_is_async(dispatcher: AsyncEventDispatcher) -> None:
    """A sync one would always be true: nobody awaits its answer."""
    permit: Callable[[Any], Awaitable[bool]] = lambda scope: True  # type: ignore[assignment,return-value]  # noqa: E731
    with pytest.raises(TypeError, match="permit is an async function"):
        PageApp(dispatcher, permit=permit)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
async def test_nothing_but_reading_is_answered(dispatcher: AsyncEventDispatcher, method: str) -> None:
    async with browsing(PageApp(dispatcher)) as browser:
        answer = await browser.request(method, "/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert "order.paid" not in answer.text


async def test_head_has_no_body(dispatcher: AsyncEventDispatcher) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "HEAD", "path": "/", "headers": headers, "client": ("127.0.0.1", 50000)}
    await PageApp(dispatcher)(scope, receive, send)
    start, body = sent
    assert start["status"] == 200 and int(dict(start["headers"])[b"content-length"]) > 1000
    assert body == {"type": "http.response.body", "body": b""}


async def test_outage_of_redis_is_told(dispatcher: AsyncEventDispatcher) -> None:
    """The rest of the page is there."""
    async with Redis(port=free_port()) as client:
        async with browsing(PageApp(dispatcher, redis=client)) as browser:
            answer = await browser.get("/")
    assert answer.status_code == 200 and "Not all could be read" in answer.text and "order.paid" in answer.text


async def test_store_that_is_not_open_is_told(dispatcher: AsyncEventDispatcher, tmp_path: Path) -> None:
    """The rest of the page is there."""
    async with browsing(PageApp(dispatcher, store=SQLiteStore(tmp_path / "outbox.db"))) as browser:
        answer = await browser.get("/")
    assert answer.status_code == 200 and "outbox.db is not open" in answer.text and "order.paid" in answer.text


async def test_outbox_in_the_hosts_state_is_shown_while_it_is_open(tmp_path: Path) -> None:
    """A host may hold nothing else of silbo's there, for its dispatcher is a global: the page says how to give it."""
    host = Starlette()
    host.state.outbox = outbox = Outbox(SQLiteStore(tmp_path / "outbox.db"), MemoryBroker(app="web"))
    async with browsing(PageApp(host)) as browser:
        before = await browser.get("/")
        async with outbox:
            during = await browser.get("/")
    assert "pending rows" not in before.text and "0pending rows" in Page(during.text).text
    assert "There is no dispatcher here. Give the page the object itself, PageApp(dispatcher)" in Page(before.text).text


@pytest.mark.parametrize("host", [None, 5, 1.5, True, "shop.web:app", b"x", AsyncEventDispatcher, asyncio, listener])
def test_host_that_can_hold_nothing_is_refused(host: Any) -> None:
    with pytest.raises(TypeError, match=r"PageApp\(dispatcher\), or of an object that holds one, not of "):
        PageApp(host)


async def test_websocket_is_closed(dispatcher: AsyncEventDispatcher) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await PageApp(dispatcher)({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close"}]


PROGRAM = """
from silbo import AsyncEventDispatcher, EventName, Trace
from silbo.web import PageApp

dispatcher = AsyncEventDispatcher(names=[EventName("order.paid")], observers=[Trace()])
page = PageApp(dispatcher, title="the shop")
"""


async def test_page_of_a_real_server(tmp_path: Path) -> None:
    """The page is the server's only application, so it takes part in its lifespan."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "shop:page", "--port", "0", "--lifespan", "on"),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stderr=asyncio.subprocess.PIPE,
    )
    assert server.stderr is not None
    try:
        told = ""
        async with asyncio.timeout(50):
            while (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", told)) is None:
                line = (await server.stderr.readline()).decode()
                assert line, told
                told += line
        async with httpx.AsyncClient() as browser:
            answer = await browser.get(found[1])
            foreign = await browser.get(found[1], headers={"host": "evil.example"})
        assert answer.status_code == 200 and "order.paid" in Page(answer.text).text
        assert foreign.status_code == 403
    finally:
        server.terminate()
        async with asyncio.timeout(50):
            rest = (await server.stderr.read()).decode()
            await server.wait()
    assert "Application shutdown complete" in rest and "Traceback" not in told + rest
