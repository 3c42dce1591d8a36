"""The example of state and events in one transaction: it runs, and no crash parts the two."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import di
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from examples.orders.__main__ import open_database
from examples.orders.shop import OrderConfirmed, OutOfStock, PlaceOrder, Transaction, shop
from silbo import Outbox, Request, RequestHandler, bootstrap
from silbo.brokers.memory import MemoryBroker
from silbo.errors import OutboxFull
from silbo.outbox.rows import Quota
from silbo.stores.sqlalchemy import SQLAlchemyStore

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).resolve().parents[1] / "support/killed_shop_process.py"


@pytest.mark.long
def test_the_example_runs() -> None:
    command = [sys.executable, "-W", "error", "-m", "examples.orders"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines() == [
        "the warehouse packs order 1",
        "in the database: orders 1, messages about them 1, teapots left 7",
        "no order: 8 teapot ordered, 7 left",
        "in the database: orders 1, messages about them 1, teapots left 7",
    ]


# -- in this process -------------------------------------------------------------------------------------------


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = await open_database(tmp_path / "shop.db")
    yield engine
    await engine.dispose()


@pytest.fixture
async def outbox(engine: AsyncEngine) -> AsyncIterator[Outbox]:
    async with Outbox(SQLAlchemyStore(engine), MemoryBroker(app="shop"), relay=False) as outbox:
        yield outbox


async def found(engine: AsyncEngine) -> tuple[int, int, int]:
    """Orders, messages, teapots."""
    query = 'SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM silbo_message), (SELECT "left" FROM stock)'
    async with engine.connect() as connection:
        orders, messages, left = (await connection.execute(text(query))).one()
    return orders, messages, left


async def test_a_commit_has_state_and_event(engine: AsyncEngine, outbox: Outbox) -> None:
    mediator = shop(engine, outbox)
    assert [await mediator.send(PlaceOrder(item="teapot", quantity=3)) for _ in range(2)] == [1, 2]
    assert await found(engine) == (2, 2, 4)


async def test_a_rollback_has_neither(engine: AsyncEngine, outbox: Outbox) -> None:
    """The handler of an event that came after the message was stored is what fails."""
    with pytest.raises(OutOfStock):
        await shop(engine, outbox).send(PlaceOrder(item="teapot", quantity=11))
    assert await found(engine) == (0, 0, 10)


async def test_a_listener_of_anybody_elses_is_in_it_too(engine: AsyncEngine, outbox: Outbox) -> None:
    mediator = shop(engine, outbox)

    async def refuse(event: OrderConfirmed) -> None:
        raise PermissionError

    mediator.dispatcher.add_listener("order.confirmed", refuse)
    with pytest.raises(PermissionError):
        await mediator.send(PlaceOrder(item="teapot", quantity=1))
    assert await found(engine) == (0, 0, 10)


async def test_a_message_that_has_no_room_rolls_the_order_back(engine: AsyncEngine) -> None:
    broker = MemoryBroker(app="shop")
    async with Outbox(SQLAlchemyStore(engine), broker, relay=False, quota=Quota(rows=1)) as outbox:
        mediator = shop(engine, outbox)
        await mediator.send(PlaceOrder(item="teapot", quantity=1))
        with pytest.raises(OutboxFull):
            await mediator.send(PlaceOrder(item="teapot", quantity=1))
    assert await found(engine) == (1, 1, 9)


class Announce(Request[None]):
    pass


class AnnounceHandler(RequestHandler[Announce, None]):
    def __init__(self) -> None:
        self._events: list[OrderConfirmed] = []

    @property
    def events(self) -> list[OrderConfirmed]:
        return self._events

    async def handle(self, request: Announce) -> None:
        self._events += [OrderConfirmed(order_id=number) for number in range(20)]


async def test_events_side_by_side_store_one_after_another(engine: AsyncEngine, outbox: Outbox) -> None:
    """For a session can do one thing at a time."""
    mediator = bootstrap(
        di.Container(),
        commands_mapper=lambda mapper: mapper.bind(Announce, AnnounceHandler),
        message_broker=outbox,
        middlewares=[Transaction(engine)],
        max_concurrent_event_handlers=5,
    )
    await engine.dispose()  # so that the session has to wait for a connection
    await mediator.send(Announce())
    assert await found(engine) == (0, 20, 10)


# -- in processes that are killed ------------------------------------------------------------------------------


@pytest.mark.long
async def test_no_crash_parts_an_order_from_its_event(tmp_path: Path) -> None:
    """Killed before each of its statements and its commit, and after it: both are there, or neither."""
    steps = int((await run(tmp_path / "whole.db", 0))[1])
    assert steps >= 5
    files = [tmp_path / f"{doomed}.db" for doomed in range(1, steps + 2)]
    ended = await asyncio.gather(*(run(file, doomed) for doomed, file in enumerate(files, 1)))
    assert {code for code, _ in ended} == {-signal.SIGKILL}
    states = [state(file) for file in files]
    assert states == [(0, 0, 10)] * steps + [(1, 1, 7)]


async def run(file: Path, doomed: int) -> tuple[int | None, str]:
    async with LIMIT:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(PROGRAM), str(file), str(doomed)),
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        return process.returncode, out.decode()


LIMIT = asyncio.Semaphore(3)


def state(file: Path) -> tuple[int, int, int]:
    """As another program finds it; opening it rolls back what was under way."""
    database = sqlite3.connect(file)
    try:
        return tuple(
            database.execute(f"SELECT {what}").fetchone()[0]
            for what in ("count(*) FROM orders", "count(*) FROM silbo_message", '"left" FROM stock')
        )
    finally:
        database.close()
