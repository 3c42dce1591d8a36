"""The FastAPI dependency of docs/howto/outbox-sqlalchemy.md: the commit comes before the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent, Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlalchemy import SQLAlchemyStore, current_session, in_session


@dataclass
class OrderPaid(NotificationEvent):
    order: int


ORDER_PAID = EventName("order.paid", OrderPaid, key="order")


class Shop:
    """A FastAPI application with an endpoint for each way to open the session, and what a client sees of it."""

    def __init__(self, engine: AsyncEngine, dispatcher: AsyncEventDispatcher) -> None:
        from fastapi import Depends, FastAPI  # its import is slow

        self._engine = engine
        self._dispatcher = dispatcher
        self.orders_at_the_answer: list[int] = []
        sessions = async_sessionmaker(engine)

        async def session_of_a_request() -> AsyncIterator[None]:
            async with sessions.begin() as session:
                with in_session(session):
                    yield

        app = FastAPI()
        by_scope: dict[str, Any] = {
            "function": Depends(session_of_a_request, scope="function"),
            "request": Depends(session_of_a_request),
        }
        for scope, dependency in by_scope.items():
            app.post(f"/{scope}/{{number}}", dependencies=[dependency])(self._pay)

        @app.post("/endpoint/{number}")
        async def pay(number: int) -> dict[str, int]:
            async with sessions.begin() as session:
                with in_session(session):
                    return await self._pay(number)

        self._app = app

    async def post(self, path: str) -> int:
        """The status that the client gets."""
        server = httpx.ASGITransport(self._watched, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=server, base_url="http://shop") as client:
            return (await client.post(path)).status_code

    async def count(self, table: str) -> int:
        async with self._engine.connect() as connection:
            found = await connection.scalar(text(f"SELECT count(*) FROM {table}"))
        assert isinstance(found, int)
        return found

    async def _pay(self, number: int) -> dict[str, int]:
        await self._dispatcher.adispatch(ORDER_PAID, OrderPaid(number))
        await current_session().execute(text("INSERT INTO orders VALUES (:number)"), {"number": number})
        return {"paid": number}

    async def _watched(self, scope: Any, receive: Any, send: Any) -> None:
        async def look_and_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.orders_at_the_answer.append(await self.count("orders"))
            await send(message)

        await self._app(scope, receive, look_and_send)


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shop.db'}", connect_args={"timeout": 30})
    store = SQLAlchemyStore(engine)
    await store.create()
    async with engine.begin() as connection:
        # A number is looked for when the transaction commits: what fails there fails behind the endpoint.
        await connection.execute(text("CREATE TABLE numbers (number INTEGER PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO numbers VALUES (1)"))
        column = "number INTEGER REFERENCES numbers (number) DEFERRABLE INITIALLY DEFERRED"
        await connection.execute(text(f"CREATE TABLE orders ({column})"))

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _: object) -> None:
        connection.cursor().execute("PRAGMA foreign_keys=ON")

    await engine.dispose()
    dispatcher = AsyncEventDispatcher()
    async with Outbox(store, MemoryBroker("shop"), relay=False) as outbox:
        dispatcher.add_subscriber(Bridge(outbox))
        yield Shop(engine, dispatcher)
    await engine.dispose()


@pytest.mark.parametrize("way", ["function", "endpoint"])
async def test_answer_is_not_sent_before_the_commit(shop: Shop, way: Literal["function", "endpoint"]) -> None:
    """A client that was told 200 has its order, and the order has its event."""
    assert await shop.post(f"/{way}/1") == 200
    assert shop.orders_at_the_answer == [1]
    assert await shop.count("silbo_message") == 1


@pytest.mark.parametrize("way", ["function", "endpoint"])
async def test_commit_that_fails_is_an_error_to_the_client(shop: Shop, way: Literal["function", "endpoint"]) -> None:
    """Not a 200 for an order that does not exist; and no event."""
    assert await shop.post(f"/{way}/2") == 500
    assert (await shop.count("orders"), await shop.count("silbo_message")) == (0, 0)


async def test_what_the_page_warns_of_is_so(shop: Shop) -> None:
    """Without the scope FastAPI answers first: a failing commit comes too late to be told."""
    assert await shop.post("/request/2") == 200
    assert (await shop.count("orders"), await shop.count("silbo_message")) == (0, 0)
