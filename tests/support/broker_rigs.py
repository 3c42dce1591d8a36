"""Rigs of silbo's own publishers, for the checks of ``silbo.testing.conformance``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from redis.asyncio import Redis

from silbo import Outbox
from silbo.brokers.azure import AzureServiceBus
from silbo.brokers.kafka import Kafka
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import BrokerUnavailable
from silbo.message import Delivery, Message
from silbo.outbox.rows import OutboxStore
from silbo.protocols import Publisher, Receiver
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlite import SQLiteStore
from silbo.testing.conformance import ADDRESS, Rig, message
from silbo.wire.formats import JSON
from tests.support.fake_service_bus import ServiceBus
from tools.kafka import KafkaMock
from tools.redis_server import RedisServer

TIMEOUT = 1.0
DEFAULT = "events"
PROBE = -1
"""The number of messages that only show whether somebody hears."""


@dataclass
class Received:
    """A rig whose consumers were there from the start."""

    publisher: Publisher
    receivers: dict[str | None, Receiver]
    away: Callable[[], AbstractAsyncContextManager[object]] | None = None
    frozen: Callable[[], AbstractAsyncContextManager[object]] | None = None
    got: dict[str | None, list[Message]] = field(default_factory=dict)

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        got = self.got.setdefault(to, [])
        with suppress(BrokerUnavailable):  # it connects again
            for item in await self.receivers[to].receive(1000):
                if isinstance(item, Delivery):
                    got.append(item.message())
                    await self.receivers[to].ack(item)
        return [one for one in got if one.payload.get("n") != PROBE]

    def outage(self) -> AbstractAsyncContextManager[object] | None:
        return None if self.away is None else self.away()

    def freeze(self) -> AbstractAsyncContextManager[object] | None:
        return None if self.frozen is None else self.frozen()


@asynccontextmanager
async def groups(
    publisher: Publisher, broker: MemoryBroker | RedisStreams, server: RedisServer | None = None
) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        receivers: dict[str | None, Receiver] = {}
        for to in (None, ADDRESS):
            receivers[to] = await broker.group("rig", start="new", streams=[to or DEFAULT]).open()
            stack.push_async_callback(receivers[to].aclose)
        stack.push_async_callback(publisher.aclose)
        if server is None:
            yield Received(publisher, receivers)
        else:
            yield Received(publisher, receivers, partial(killed, server), partial(paused, server))


class Server(Protocol):
    """As tools/ has them."""

    def kill(self) -> None: ...
    def restart(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


@asynccontextmanager
async def killed(server: Server) -> AsyncIterator[None]:
    await asyncio.to_thread(server.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(server.restart)


@asynccontextmanager
async def paused(server: Server) -> AsyncIterator[None]:
    await asyncio.to_thread(server.pause)
    try:
        yield
    finally:
        await asyncio.to_thread(server.resume)


@asynccontextmanager
async def memory() -> AsyncIterator[Rig]:
    broker = MemoryBroker("web")
    async with groups(broker, broker) as rig:
        yield rig


@asynccontextmanager
async def streams() -> AsyncIterator[Rig]:
    with RedisServer(appendonly="always") as server:
        async with Redis.from_url(server.url) as client:
            broker = RedisStreams(client, app="web", timeout=TIMEOUT)
            async with groups(broker, broker, server) as rig:
                yield rig


@asynccontextmanager
async def pubsub() -> AsyncIterator[Rig]:
    with RedisServer() as server:
        async with Redis.from_url(server.url) as client, AsyncExitStack() as stack:
            broker = await stack.enter_async_context(RedisPubSub(client, app="web", timeout=TIMEOUT))
            receivers: dict[str | None, Receiver] = {
                None: await broker.subscribe().open(),
                ADDRESS: await broker.subscribe(channels=(ADDRESS,)).open(),
            }
            for receiver in receivers.values():
                stack.push_async_callback(receiver.aclose)

            @asynccontextmanager
            async def subscribed(away: AbstractAsyncContextManager[object]) -> AsyncIterator[None]:
                """Away, and then until both have subscribed again."""
                async with away:
                    yield
                for to in receivers:
                    while not any(one.payload["n"] == PROBE for one in rig.got.get(to, [])):
                        with suppress(BrokerUnavailable):
                            await broker.publish(message(PROBE, to=to))
                        await rig.arrived(to)

            rig = Received(broker, receivers, lambda: subscribed(killed(server)), lambda: subscribed(paused(server)))
            yield rig


@asynccontextmanager
async def outbox(store: OutboxStore) -> AsyncIterator[Rig]:
    broker = MemoryBroker("web")
    async with Outbox(store, broker) as publisher, groups(publisher, broker) as rig:
        yield rig


@asynccontextmanager
async def outbox_in_memory() -> AsyncIterator[Rig]:
    async with outbox(MemoryStore()) as rig:
        yield rig


@asynccontextmanager
async def outbox_in_sqlite(folder: Path) -> AsyncIterator[Rig]:
    with RedisServer(appendonly="always") as server:
        async with Redis.from_url(server.url) as client:
            broker = RedisStreams(client, app="web", timeout=TIMEOUT)
            async with (
                Outbox(SQLiteStore(folder / "outbox.db"), broker) as publisher,
                groups(publisher, broker, server) as rig,
            ):
                yield rig


@dataclass
class ServiceBusRig:
    publisher: AzureServiceBus
    service: ServiceBus

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        return [JSON.decode(b"".join(message.body)) for message in self.service.topics[to or DEFAULT]]

    def outage(self) -> AbstractAsyncContextManager[object]:
        return self.service.outage()

    @asynccontextmanager
    async def freeze(self) -> AsyncIterator[None]:
        self.service.answers.clear()
        yield
        self.service.answers.set()


@asynccontextmanager
async def azure(*, sessions: bool) -> AsyncIterator[Rig]:
    service = ServiceBus()
    async with (
        service.client() as client,
        AzureServiceBus(client, DEFAULT, app="web", timeout=TIMEOUT, sessions=sessions) as broker,
    ):
        yield ServiceBusRig(broker, service)


@dataclass
class KafkaRig:
    publisher: Kafka
    server: KafkaMock

    async def arrived(self, to: str | None = None) -> Sequence[Message]:
        return [JSON.decode(record.value) for record in await records(self.server, to or DEFAULT)]

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        self.server.down()
        yield
        self.server.up()

    @asynccontextmanager
    async def freeze(self) -> AsyncIterator[None]:
        self.server.slow(TIMEOUT * 1.5)  # past every deadline
        yield
        self.server.slow(0)


@asynccontextmanager
async def kafka() -> AsyncIterator[Rig]:
    with KafkaMock() as server:
        async with (
            AIOKafkaProducer(bootstrap_servers=server.url, enable_idempotence=True, retry_backoff_ms=20) as producer,
            Kafka(producer, DEFAULT, app="web", timeout=TIMEOUT) as broker,
        ):
            yield KafkaRig(broker, server)


async def records(server: KafkaMock, topic: str) -> list[Any]:
    """All that a topic has, partition by partition."""
    found: list[Any] = []
    async with AIOKafkaConsumer(topic, bootstrap_servers=server.url, auto_offset_reset="earliest") as consumer:
        for partition, end in (await consumer.end_offsets(consumer.assignment())).items():
            while await consumer.position(partition) < end:
                found += (await consumer.getmany(partition, timeout_ms=1000)).get(partition, [])
    return found
