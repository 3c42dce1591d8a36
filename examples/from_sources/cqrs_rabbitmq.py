"""Notification events on RabbitMQ, and heard again from the program's own queue.

    python -m examples.from_sources.cqrs_rabbitmq --rabbitmq amqp://guest:guest@localhost/

Without `--rabbitmq` it starts a RabbitMQ of its own, if one is installed.
"""

import argparse
import asyncio

import aio_pika
import di
from aio_pika.abc import AbstractRobustConnection

from examples.from_sources.cqrs_shop import ORDER_PLACED, OrderPlaced, PlaceOrder, commands_mapper, events_mapper
from silbo import AsyncEventDispatcher, bootstrap, receive
from silbo.brokers.rabbitmq import RabbitMQ
from silbo.errors import MessageInvalid
from tools.rabbitmq import RabbitMQServer

EXCHANGE = "shop"


async def place_orders(connection: AbstractRobustConnection) -> None:
    """Place orders as the shop, whose connection is its own."""
    async with RabbitMQ(connection, EXCHANGE, app="shop") as broker:
        mediator = bootstrap(
            di_container=di.Container(),
            commands_mapper=commands_mapper,
            domain_events_mapper=events_mapper,
            message_broker=broker,
        )
        for order_id in ("o-1", "o-2"):
            await mediator.send(PlaceOrder(order_id, ("pear",)))


async def hear_orders(queue: aio_pika.abc.AbstractQueue, many: int) -> None:
    """Receive orders as another program: with its own queue and acknowledgements, and the same `add_listener`."""
    dispatcher = AsyncEventDispatcher()
    heard: list[OrderPlaced] = []

    @dispatcher.listen(ORDER_PLACED)
    async def print_it(event: OrderPlaced) -> None:
        print(event.name, event.order_id)
        heard.append(event)

    async with queue.iterator() as messages:
        while len(heard) < many:
            message = await anext(messages)
            async with message.process(requeue=True, ignore_processed=True):  # acknowledged when the listeners have run
                try:
                    await receive(dispatcher, message.body, events=[ORDER_PLACED])
                except (
                    MessageInvalid
                ):  # a foreign message, in a queue that existed already; it would come again for ever
                    await message.reject()


async def main(url: str) -> None:
    """Place two orders, and receive their events."""
    async with await aio_pika.connect_robust(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, "topic", durable=True)
        queue = await channel.declare_queue("billing", durable=True)
        await queue.bind(exchange, "order.*")
        await place_orders(connection)
        async with asyncio.timeout(30):
            await hear_orders(queue, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.from_sources.cqrs_rabbitmq")
    parser.add_argument("--rabbitmq", metavar="URL", help="a RabbitMQ that is there")
    given: str | None = parser.parse_args().rabbitmq
    if given:
        asyncio.run(main(given))
    else:
        with RabbitMQServer() as server:
            asyncio.run(main(server.url))
