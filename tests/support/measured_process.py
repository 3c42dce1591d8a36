"""A program that shows its metrics to Prometheus: a dispatcher, a bridge, an outbox with a relay, and a consumer, all at work.

    python -m tests.support.measured_process REDIS_URL PREFIX FOLDER

Prints the port, and runs until its stdin ends.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge, Consumer, Event, EventName, NotificationEvent, Outbox
from silbo._retry import Backoff
from silbo.brokers.redis import RedisStreams
from silbo.errors import MessageRefused
from silbo.instrumentation.metrics import Metrics
from silbo.stores.sqlite import SQLiteStore


@dataclass
class OrderPaid(NotificationEvent):
    order: int
    note: str = ""


ORDER_PAID = EventName("order.paid", OrderPaid, key="order")


async def main(url: str, prefix: str, folder: str) -> None:
    set_meter_provider(MeterProvider([PrometheusMetricReader()]))
    server, _ = start_http_server(0, "127.0.0.1")
    metrics = Metrics(every=0.1)
    hearing, sending = AsyncEventDispatcher(observers=[metrics]), AsyncEventDispatcher(observers=[metrics])

    @hearing.listen(ORDER_PAID)
    async def handle(event: Any) -> None:
        if event.order == 1:
            raise ValueError("no such order")

    async with Redis.from_url(url) as client:
        shop = RedisStreams(client, app="shop", prefix=prefix)
        billing = RedisStreams(client, app="billing", prefix=prefix).group("billing", start="oldest")
        consumer = Consumer(
            hearing, billing, events=[ORDER_PAID], max_attempts=2, backoff=Backoff(initial=0.01, cap=0.01)
        )
        async with Outbox(SQLiteStore(Path(folder) / "outbox.db"), shop) as outbox, Bridge(outbox) as bridge:
            sending.add_subscriber(bridge)
            metrics.watch(consumer, outbox, bridge)
            async with metrics, consumer:
                running = asyncio.create_task(consumer.run())
                for order in (1, 2):
                    await sending.adispatch(ORDER_PAID, OrderPaid(order))
                await sending.adispatch("not.declared", Event())
                with suppress(MessageRefused):
                    await sending.adispatch(ORDER_PAID, OrderPaid(3, note="x" * 2_000_000))
                print(server.server_port, flush=True)
                await asyncio.to_thread(sys.stdin.read)
                consumer.stop()
                await running


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
