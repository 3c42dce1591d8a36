"""What the page on brokers says of each is what each declares."""

from __future__ import annotations

import re
from pathlib import Path

from silbo.brokers.azure import AzureServiceBus
from silbo.brokers.kafka import Kafka
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.rabbitmq import RabbitMQ
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.protocols import Promises
from tests.support.fake_service_bus import ServiceBus

PAGE = Path(__file__).resolve().parents[2] / "docs/howto/brokers.md"
ORDERS = {"all": "all", "key": "each key", "none": "nothing"}


async def test_table_of_promises_is_made_of_what_brokers_declare() -> None:
    async with ServiceBus().client() as client:
        declared: list[tuple[str, type, Promises]] = [
            *((cls.__name__, cls, cls.promises) for cls in (MemoryBroker, RedisPubSub, RedisStreams, Kafka, RabbitMQ)),
            *(
                (f"AzureServiceBus{'(sessions=True)' * sessions}", AzureServiceBus, broker.promises)
                for sessions in (False, True)
                if (broker := AzureServiceBus(client, "events", app="web", sessions=sessions))
            ),
        ]
    rows = [
        f"| `{name}` | {ORDERS[promises.order]} | {'yes' if promises.keeps else 'no'} | "
        f"{'arrives once' if hasattr(cls, 'publish_sequenced') else 'may arrive twice'} |"
        for name, cls, promises in declared
    ]
    assert re.findall(r"^\| `.*", PAGE.read_text(), re.MULTILINE) == rows
