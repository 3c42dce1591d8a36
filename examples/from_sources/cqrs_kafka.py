"""Notification events on Kafka, and heard again from the program's own consumer.

    python -m examples.from_sources.cqrs_kafka --kafka localhost:9092

Without `--kafka` it runs on the mock cluster that librdkafka contains for tests. The topic is `orders`.
"""

import argparse
import asyncio
from contextlib import suppress

import di
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from examples.from_sources.cqrs_shop import ORDER_PLACED, OrderPlaced, PlaceOrder, commands_mapper, events_mapper
from silbo import AsyncEventDispatcher, bootstrap, receive
from silbo.brokers.kafka import Kafka
from silbo.errors import MessageInvalid
from tools.kafka import KafkaMock

TOPIC = "orders"


async def place_orders(servers: str) -> None:
    """Place orders as the shop, whose producer is its own."""
    async with (
        AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True) as producer,
        Kafka(producer, TOPIC, app="shop") as broker,
    ):
        mediator = bootstrap(
            di_container=di.Container(),
            commands_mapper=commands_mapper,
            domain_events_mapper=events_mapper,
            message_broker=broker,
        )
        for order_id in ("o-1", "o-2"):
            await mediator.send(PlaceOrder(order_id, ("pear",)))


async def hear_orders(servers: str, many: int) -> None:
    """Receive orders as another program: with its own loop and commits, and the same `add_listener`."""
    dispatcher = AsyncEventDispatcher()
    heard: list[OrderPlaced] = []

    @dispatcher.listen(ORDER_PLACED)
    async def print_it(event: OrderPlaced) -> None:
        print(event.name, event.order_id)
        heard.append(event)

    async with AIOKafkaConsumer(
        TOPIC, bootstrap_servers=servers, group_id="billing", auto_offset_reset="earliest", enable_auto_commit=False
    ) as consumer:
        while len(heard) < many:
            record = await consumer.getone()
            with suppress(MessageInvalid):  # a foreign message, in a topic that existed already; it stays there
                await receive(dispatcher, record.value, events=[ORDER_PLACED])
            await consumer.commit()  # the listeners have run


async def main(servers: str) -> None:
    """Place two orders, and receive their events."""
    await place_orders(servers)
    async with asyncio.timeout(30):
        await hear_orders(servers, 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.from_sources.cqrs_kafka")
    parser.add_argument("--kafka", metavar="HOST:PORT", help="a Kafka that is there")
    given: str | None = parser.parse_args().kafka
    if given:
        asyncio.run(main(given))
    else:
        with KafkaMock() as mock:
            asyncio.run(main(mock.url))
