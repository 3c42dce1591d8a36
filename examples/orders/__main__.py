"""Run it with ``python -m examples.orders``: two orders, of which one can't be delivered.

Everything is in one SQLite file: the orders, the stock, and silbo's outbox. So one commit stores an order and the message
about it, and no crash can separate them.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.orders.shop import ORDER_CONFIRMED, Base, Order, OrderConfirmed, OutOfStock, PlaceOrder, Stock, shop
from silbo import AsyncEventDispatcher, Consumer, Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlalchemy import SQLAlchemyStore


async def open_database(file: Path) -> AsyncEngine:
    """Create the shop's tables, with ten teapots, and silbo's tables."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        if not await connection.scalar(select(func.count()).select_from(Stock)):
            await connection.execute(insert(Stock).values(item="teapot", left=10))
    await SQLAlchemyStore(engine).create()
    return engine


async def show(engine: AsyncEngine, outbox: Outbox) -> None:
    """Print the content of the database."""
    async with engine.connect() as connection:
        orders = await connection.scalar(select(func.count()).select_from(Order))
        left = await connection.scalar(select(Stock.left))
    messages = sum((await outbox.status()).counts.values())
    print(f"in the database: orders {orders}, messages about them {messages}, teapots left {left}")


async def main(file: Path) -> None:
    """Order twice, while a warehouse listens."""
    engine = await open_database(file)
    warehouse, broker = AsyncEventDispatcher(), MemoryBroker(app="shop")

    @warehouse.listen(ORDER_CONFIRMED)
    async def pack(confirmed: OrderConfirmed) -> None:
        print(f"the warehouse packs order {confirmed.order_id}")

    async with (
        Outbox(SQLAlchemyStore(engine), broker) as outbox,
        Consumer(warehouse, broker.group("warehouse", start="new"), events=[ORDER_CONFIRMED], own="handle") as consumer,
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(consumer.run())
        mediator = shop(engine, outbox)
        packed = tasks.create_task(warehouse.wait_for(ORDER_CONFIRMED, timeout=10))
        await mediator.send(PlaceOrder(item="teapot", quantity=3))
        await packed
        await show(engine, outbox)
        try:
            await mediator.send(PlaceOrder(item="teapot", quantity=8))
        except OutOfStock as error:
            print(f"no order: {error}")
        await show(engine, outbox)
        consumer.stop()
    await engine.dispose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.orders")
    parser.add_argument("--file", type=Path, help="the database; by default one that is thrown away")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(arguments.file or Path(folder) / "shop.db"))
