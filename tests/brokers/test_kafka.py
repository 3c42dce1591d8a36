"""Kafka, on librdkafka's mock cluster: real sockets, the real client, a broker that goes away on demand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, EventName, Outbox, Route
from silbo.brokers.kafka import Kafka
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.message import instance
from silbo.stores.memory import MemoryStore
from silbo.testing.conformance import message
from silbo.wire.formats import CLOUDEVENTS, DIATOR
from tests.support.broker_rigs import records
from tests.support.snippets import execute, shown
from tools.kafka import KafkaMock

PAGE = Path(__file__).resolve().parents[2] / "docs/howto/receive.md"
NOT_ENOUGH_REPLICAS = 19
MESSAGE_TOO_LARGE = 10
TOPIC_AUTHORIZATION_FAILED = 29
UNKNOWN_SERVER_ERROR = -1


@pytest.fixture
def server() -> Iterator[KafkaMock]:
    with KafkaMock() as server:
        yield server


@pytest.fixture
async def producer(server: KafkaMock) -> AsyncIterator[AIOKafkaProducer]:
    async with AIOKafkaProducer(
        bootstrap_servers=server.url, enable_idempotence=True, retry_backoff_ms=20, request_timeout_ms=2000
    ) as producer:
        yield producer


@pytest.fixture
async def broker(producer: AIOKafkaProducer) -> AsyncIterator[Kafka]:
    async with Kafka(producer, app="web", timeout=1.0) as broker:
        yield broker


def numbers(found: list[Any]) -> list[int]:
    return [json.loads(record.value)["payload"]["n"] for record in found]


async def test_record_can_be_routed_and_filtered_without_being_decoded(broker: Kafka, server: KafkaMock) -> None:
    one = message(1)
    await broker.publish(one)
    (record,) = await records(server, "events")
    assert record.key == b"k1"
    assert dict(record.headers) == {
        "message_type": b"notification_event",
        "message_name": b"conformance.checked",
        "message_id": one.message_id.encode(),
        "app": b"web",
        "instance": instance().encode(),
        "publication": one.headers["publication"].encode(),
        "version": b"1",
        "key": b"k1",
        "content-type": b"application/json",
    }


async def test_key_of_an_event_name_keeps_its_events_in_one_partition(broker: Kafka, server: KafkaMock) -> None:
    dispatcher, name = AsyncEventDispatcher(), EventName("user.moved", ECSTEvent, key=lambda event: event.user)
    dispatcher.add_subscriber(Bridge(broker, routes=[Route("order.**", to="orders")]))
    for user in (1, 2, 3, 1, 2, 3):
        event = ECSTEvent()
        event.user = user  # type: ignore[attr-defined]  # a plain attribute
        await dispatcher.adispatch(name, event)
    await dispatcher.adispatch("order.paid", ECSTEvent())
    partitions: dict[bytes, set[int]] = {}
    for record in await records(server, "events"):
        partitions.setdefault(record.key, set()).add(record.partition)
    assert {key: len(its) for key, its in partitions.items()} == {b"1": 1, b"2": 1, b"3": 1}
    (order,) = await records(server, "orders")
    assert order.key is None


@pytest.mark.parametrize(
    ("format_", "media"), [(DIATOR, b"application/json"), (CLOUDEVENTS, b"application/cloudevents+json")]
)
async def test_other_formats(producer: AIOKafkaProducer, server: KafkaMock, format_: Any, media: bytes) -> None:
    async with Kafka(producer, app="web", format=format_) as broker:
        await broker.publish(message(1))
    (record,) = await records(server, "events")
    assert format_.decode(record.value).payload["n"] == 1
    assert dict(record.headers)["content-type"] == media


async def test_producer_that_would_lose_what_it_confirms_is_refused(server: KafkaMock) -> None:
    """aiokafka's default confirms what one replica has: at its fail-over it would be gone, without an error."""
    for settings in ({}, {"acks": 0}, {"acks": 1}):
        async with AIOKafkaProducer(bootstrap_servers=server.url, **settings) as producer:
            with pytest.raises(ValueError, match="enable_idempotence=True"):
                Kafka(producer, app="web")
    async with AIOKafkaProducer(bootstrap_servers=server.url, acks="all") as producer:
        Kafka(producer, app="web")


async def test_message_that_is_too_large_is_refused_by_producer_and_server(broker: Kafka, server: KafkaMock) -> None:
    large = message(1, pad="x" * (1 << 20))
    with pytest.raises(MessageRefused, match="more than 1048576"):
        await broker.publish(large)
    with pytest.raises(MessageRefused, match="max_request_size"):  # with its headers it is
        await broker.publish(message(2, pad="x" * ((1 << 20) - 500)), message(3))
    server.refuse(MESSAGE_TOO_LARGE)
    with pytest.raises(MessageRefused, match="too large for Kafka"):
        await broker.publish(message(4))
    await broker.publish(message(5))
    assert sorted(numbers(await records(server, "events"))) == [3, 5]


@pytest.mark.parametrize("headers", [{"tenant": "\ud800"}, {"key": "\ud800"}])
async def test_message_that_can_not_be_written_is_refused_alone(
    producer: AIOKafkaProducer, server: KafkaMock, headers: dict[str, str]
) -> None:
    """It is no outage: those of the same batch are sent. This format leaves headers out of its bytes."""
    wrong = replace(message(2), headers=headers)
    async with Kafka(producer, app="web", format=DIATOR) as broker:
        with pytest.raises(MessageRefused, match="is no text that can be written"):
            await broker.publish(message(1), wrong, message(3))
    assert sorted(numbers(await records(server, "events"))) == [1, 3]


async def test_replicas_that_are_missing_are_waited_for(broker: Kafka, server: KafkaMock) -> None:
    """The producer's own retries; within the deadline they go unnoticed."""
    server.refuse(NOT_ENOUGH_REPLICAS, NOT_ENOUGH_REPLICAS)
    await broker.publish(message(1))
    assert numbers(await records(server, "events")) == [1]


async def test_refusal_of_a_topic_is_not_unknown(broker: Kafka, server: KafkaMock) -> None:
    server.refuse(TOPIC_AUTHORIZATION_FAILED)
    with pytest.raises(BrokerUnavailable, match="TopicAuthorizationFailed.*not sent"):
        await broker.publish(message(1))


async def test_other_errors_of_the_server_leave_it_unknown(broker: Kafka, server: KafkaMock) -> None:
    server.refuse(UNKNOWN_SERVER_ERROR)
    with pytest.raises(DeliveryUnknown, match="did not confirm"):
        await broker.publish(message(1))


async def test_answer_that_does_not_come_leaves_it_unknown_and_holds_up_nobody(
    broker: Kafka, server: KafkaMock
) -> None:
    await broker.publish(message(0))
    loop = asyncio.get_running_loop()
    server.slow(1.5)
    begin = loop.time()
    with pytest.raises(DeliveryUnknown, match="has not answered since"):
        await broker.publish(message(1))
    assert loop.time() - begin < 20
    ends = await asyncio.gather(*(broker.publish(message(n)) for n in range(2, 5)), return_exceptions=True)
    assert [type(end) for end in ends] == [BrokerUnavailable] * 3
    server.slow(0)
    async with asyncio.timeout(10):
        while True:
            with suppress(BrokerUnavailable):
                await broker.publish(message(9))
                break
    assert sorted(numbers(await records(server, "events"))) == [0, 1, 9]


async def test_outage_leaves_no_copies_with_the_producer(broker: Kafka, server: KafkaMock) -> None:
    """The producer keeps what it could not send, and sends it later: each try would add one."""
    await broker.publish(message(0))
    server.down()
    ends = [type((await asyncio.gather(broker.publish(message(1)), return_exceptions=True))[0]) for _ in range(5)]
    assert ends == [DeliveryUnknown, *[BrokerUnavailable] * 4]
    server.up()
    async with asyncio.timeout(10):
        while True:
            with suppress(BrokerUnavailable):
                await broker.publish(message(2))
                break
    assert sorted(numbers(await records(server, "events"))) == [0, 1, 2]


async def test_topic_that_is_missing_holds_up_no_other(
    broker: Kafka, producer: AIOKafkaProducer, server: KafkaMock
) -> None:
    """The producer waits for it; the other topics' messages don't wait for that."""
    forever = asyncio.Event()
    real = producer.send

    async def send(topic: str, *arguments: Any, **more: Any) -> Any:
        if topic == "missing":  # the mock cluster makes every topic that it is asked for
            await forever.wait()
        return await real(topic, *arguments, **more)

    producer.send = send
    waiting = asyncio.create_task(broker.publish(message(1, to="missing")))
    await asyncio.sleep(0)
    await broker.publish(message(2))
    with pytest.raises(BrokerUnavailable, match="'missing'.*not sent"):
        await waiting
    assert numbers(await records(server, "events")) == [2]


async def test_producer_that_was_not_started(server: KafkaMock) -> None:
    """It would wait for ever, and the error be of a Kafka that does not answer."""
    producer = AIOKafkaProducer(bootstrap_servers=server.url, enable_idempotence=True)
    async with Kafka(producer, app="web") as broker:
        with pytest.raises(BrokerUnavailable, match=r"not started: `await producer\.start\(\)`.*not sent"):
            await broker.publish(message(1))
        async with producer:  # late is not too late
            await broker.publish(message(2))
    assert numbers(await records(server, "events")) == [2]


async def test_producer_that_the_host_has_stopped(broker: Kafka, producer: AIOKafkaProducer) -> None:
    await broker.publish(message(1))
    await producer.stop()
    with pytest.raises(BrokerUnavailable, match="ProducerClosed.*not sent"):
        await broker.publish(message(2))


async def test_closing_leaves_the_producer_running(producer: AIOKafkaProducer, server: KafkaMock) -> None:
    broker = Kafka(producer, app="web")
    await broker.publish(message(1))
    await broker.aclose()
    await broker.aclose()
    await producer.send_and_wait("orders", b"the host's own")
    assert len(await records(server, "orders")) == 1


async def test_outbox_sends_through_it_what_was_stored_while_it_was_away(broker: Kafka, server: KafkaMock) -> None:
    """Kafka knows no sequences: what ended unknown is repeated. The first of each comes in order."""
    async with Outbox(MemoryStore(), broker) as outbox:
        server.down()
        for number in range(50):
            await outbox.publish(message(number))
        server.up()
        async with asyncio.timeout(20):
            while (await outbox.status()).counts["sent"] < 50:
                await asyncio.sleep(0.02)
    for key in range(5):
        came = [n for n in dict.fromkeys(numbers(await records(server, "events"))) if n % 5 == key]
        assert came == list(range(key, 50, 5))


@pytest.mark.long
async def test_group_of_the_page_parks_junk_and_tries_again_what_failed(
    broker: Kafka, producer: AIOKafkaProducer, server: KafkaMock
) -> None:
    """What failed is handled before what is behind it, and then all is committed."""
    page: dict[str, Any] = {"__name__": __name__}
    await execute(shown(PAGE, "async def invoice"), page)
    await execute(shown(PAGE, "def make_group").replace("localhost:9092", server.url), page)
    page["dispatcher"] = AsyncEventDispatcher()
    heard: list[int] = []

    @page["dispatcher"].listen("user.joined")
    async def fail_once(event: Any) -> None:
        heard.append(event.user_id)
        if len(heard) == 1:
            raise OSError("not now")

    for junk in (b"junk", None):
        await producer.send_and_wait("events", junk, key=b"one partition")
    web = AsyncEventDispatcher()
    web.add_subscriber(Bridge(broker))
    name = EventName("user.joined", page["UserJoined"], key=lambda _: "one partition")
    for user_id in (7, 8):
        await web.adispatch(name, page["UserJoined"](user_id))
    (partition,) = {record.partition for record in await records(server, "events")}

    group = page["make_group"](producer)
    running = asyncio.create_task(group.run())
    try:
        async with asyncio.timeout(30), AIOKafkaConsumer(bootstrap_servers=server.url, group_id="billing") as other:
            while await other.committed(TopicPartition("events", partition)) != 4:
                assert not running.done(), running
                await asyncio.sleep(0.02)
        group.stop()
        await running
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert heard == [7, 7, 8]
    dead = await records(server, "billing.dead")
    assert [(record.value, record.key) for record in dead] == [(b"junk", b"one partition"), (b"", b"one partition")]
    assert [dict(record.headers)["from"] for record in dead] == [b"events %d %d" % (partition, at) for at in (0, 1)]
