"""A web program or a billing program that exports its spans by OTLP. Run by tests/instrumentation/test_two_processes.py.

python -m tests.support.traced_shop_process web|billing URL PREFIX STORE ENDPOINT

The web program handles one request, and stores its event in an outbox; the relay of the outbox sends it. The billing program
ends when it has handled the event; its first attempt fails.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge, Consumer, ECSTEvent, EventName, Outbox
from silbo._retry import Backoff
from silbo.brokers.redis import RedisStreams
from silbo.instrumentation.opentelemetry import instrument
from silbo.stores.sqlite import SQLiteStore


@dataclass
class UserJoined(ECSTEvent):
    user_id: int


USER_JOINED = EventName("user.joined", UserJoined, key="user_id")


async def web(url: str, prefix: str, store: str) -> None:
    dispatcher = AsyncEventDispatcher()
    async with Redis.from_url(url) as client:
        streams = RedisStreams(client, app="web", prefix=prefix)
        async with Outbox(SQLiteStore(store), streams) as outbox:
            dispatcher.add_subscriber(Bridge(outbox))
            instrument(dispatcher, relay=outbox)
            with trace.get_tracer("web").start_as_current_span("POST /users"):
                await dispatcher.adispatch(USER_JOINED, UserJoined(17))


async def billing(url: str, prefix: str) -> None:
    dispatcher = AsyncEventDispatcher()
    instrument(dispatcher)
    failed = False

    @dispatcher.listen(USER_JOINED)
    async def open_account(event: UserJoined) -> None:
        nonlocal failed
        if not failed:
            failed = True
            raise ConnectionError("as told")
        with trace.get_tracer("billing").start_as_current_span("INSERT accounts"):
            consumer.stop()

    async with Redis.from_url(url) as client, RedisStreams(client, app="billing", prefix=prefix) as streams:
        group = streams.group("billing", start="oldest")
        async with Consumer(dispatcher, group, events=[USER_JOINED], backoff=Backoff(initial=0.01)) as consumer:
            await consumer.run()


def main(role: str, url: str, prefix: str, store: str, endpoint: str) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": role}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    trace.set_tracer_provider(provider)
    asyncio.run(web(url, prefix, store) if role == "web" else billing(url, prefix))
    provider.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
