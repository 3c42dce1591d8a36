"""Azure Service Bus: the SDK's own client, sender, batches and messages, on a link that is not the service's.

With SILBO_AZURE_CONNECTION (of an emulator, or of a namespace) one test goes to the real thing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from azure.servicebus import ServiceBusReceivedMessage
from azure.servicebus.aio import ServiceBusClient, ServiceBusReceiver
from azure.servicebus.exceptions import (
    MessagingEntityNotFoundError,
    ServiceBusAuthorizationError,
    ServiceBusConnectionError,
    ServiceBusError,
    ServiceBusQuotaExceededError,
    ServiceBusServerBusyError,
)

from silbo import AsyncEventDispatcher, EventName, receive
from silbo.brokers.azure import AzureServiceBus
from silbo.errors import AddressInvalid, BrokerUnavailable, DeliveryUnknown, MessageInvalid, MessageRefused
from silbo.message import Message, instance
from silbo.protocols import Promises
from silbo.testing.conformance import message
from silbo.wire.formats import CLOUDEVENTS, DIATOR
from tests.support.fake_service_bus import Client, Link, ServiceBus
from tests.support.snippets import execute, shown, without_pause

DOCS = Path(__file__).resolve().parents[2] / "docs/howto"
CONNECTION = os.environ.get("SILBO_AZURE_CONNECTION", "")


@pytest.fixture
def service() -> ServiceBus:
    return ServiceBus()


@pytest.fixture
async def client(service: ServiceBus) -> AsyncIterator[Client]:
    async with service.client() as client:
        yield client


@pytest.fixture
async def broker(client: Client) -> AsyncIterator[AzureServiceBus]:
    async with AzureServiceBus(client, "events", app="web", timeout=1.0) as broker:
        yield broker


def number(received: ServiceBusReceivedMessage) -> int:
    return int(json.loads(b"".join(received.body))["payload"]["n"])


def numbers(received: Sequence[ServiceBusReceivedMessage]) -> list[int]:
    return [number(one) for one in received]


# -- what is sent -------------------------------------------------------------------------------------------


async def test_message_can_be_filtered_without_being_decoded(broker: AzureServiceBus, service: ServiceBus) -> None:
    """A subscription's rules see subject and application properties."""
    one = message(1)
    await broker.publish(one)
    (received,) = service.topics["events"]
    properties = {name.decode(): value.decode() for name, value in (received.application_properties or {}).items()}  # type: ignore[union-attr]  # the SDK gives bytes
    assert properties == {
        "message_type": "notification_event",
        "message_name": "conformance.checked",
        "message_id": one.message_id,
        "app": "web",
        "instance": instance(),
        "publication": one.headers["publication"],
        "version": "1",
        "key": "k1",
    }
    assert received.subject == "conformance.checked"
    assert received.content_type == "application/json"
    assert received.message_id == one.headers["publication"]
    assert received.session_id is None


async def test_publication_is_what_duplicates_are_recognised_by(broker: AzureServiceBus, service: ServiceBus) -> None:
    """What is sent again after DeliveryUnknown is dropped by a topic with duplicate detection."""

    def lose_the_answer() -> None:
        service.on_send = lambda: None
        raise ServiceBusError("the answer was lost")

    service.on_send = lose_the_answer
    one = message(1)
    with pytest.raises(DeliveryUnknown, match="answer was lost"):
        await broker.publish(one)
    await broker.publish(one, message(2))
    assert numbers(service.topics["events"]) == [1, 2]


async def test_topic_may_have_any_name_that_the_service_takes(client: Client, service: ServiceBus) -> None:
    async with AzureServiceBus(client, "sales/orders", app="web") as broker:
        await broker.publish(message(1))
    assert numbers(service.topics["sales/orders"]) == [1]
    with pytest.raises(AddressInvalid, match="a topic"):
        AzureServiceBus(client, "", app="web")


async def test_many_messages_become_few_batches(client: Client, service: ServiceBus) -> None:
    async with AzureServiceBus(client, "events", app="web", timeout=60) as broker:
        await asyncio.gather(*(broker.publish(message(n)) for n in range(1000)))
    assert sum(service.batches) == 1000
    assert len(service.batches) == 4  # 500 at a time, and 256 KiB


async def test_batches_keep_to_the_size_that_the_service_takes(broker: AzureServiceBus, service: ServiceBus) -> None:
    await broker.publish(*(message(n, pad="x" * 50_000) for n in range(12)))
    assert service.batches == [5, 5, 2]
    assert numbers(service.topics["events"]) == list(range(12))


async def test_session_is_the_key_and_a_batch_has_one_session(client: Client, service: ServiceBus) -> None:
    async with AzureServiceBus(client, "events", app="web", sessions=True) as broker:
        assert broker.promises == Promises(order="key")
        await broker.publish(*map(message, range(10)))
        assert {received.session_id for received in service.topics["events"]} == {f"k{n}" for n in range(5)}
        assert service.batches == [2] * 5
        for key in (None, "", "k" * 129):
            headers = {} if key is None else {"key": key}
            with pytest.raises(MessageRefused, match="sessions need a key of 1 to 128 characters"):
                await broker.publish(Message("ecst_event", "n", "id", {}, headers))


async def test_order_is_promised_with_sessions_alone(broker: AzureServiceBus) -> None:
    assert broker.promises == Promises(order="none")


@pytest.mark.parametrize(
    ("format_", "media"), [(DIATOR, "application/json"), (CLOUDEVENTS, "application/cloudevents+json")]
)
async def test_other_formats(client: Client, service: ServiceBus, format_: Any, media: str) -> None:
    async with AzureServiceBus(client, "events", app="web", format=format_) as broker:
        await broker.publish(message(1))
    (received,) = service.topics["events"]
    assert received.content_type == media
    assert format_.decode(b"".join(received.body)).payload["n"] == 1


# -- what fails ---------------------------------------------------------------------------------------------


async def test_message_that_no_batch_can_hold_is_refused(broker: AzureServiceBus, service: ServiceBus) -> None:
    with pytest.raises(MessageRefused, match="larger than the 262144 bytes"):
        await broker.publish(message(1), message(2, pad="x" * 300_000), message(3))
    assert numbers(service.topics["events"]) == [1, 3]


@pytest.mark.parametrize("headers", [{"publication": "p" * 200}, {"tenant": "\ud800"}])
async def test_message_that_can_not_be_written_is_refused_alone(
    client: Client, service: ServiceBus, headers: dict[str, str]
) -> None:
    """It is no outage: those of the same batch are sent. This format leaves headers out of its bytes."""
    wrong = replace(message(2), headers=headers)
    async with AzureServiceBus(client, "events", app="web", format=DIATOR) as broker:
        with pytest.raises(MessageRefused, match="can't be written for Service Bus"):
            await broker.publish(message(1), wrong, message(3))
    assert numbers(service.topics["events"]) == [1, 3]


@pytest.mark.parametrize(
    "error", [MessagingEntityNotFoundError, ServiceBusAuthorizationError, ServiceBusQuotaExceededError]
)
async def test_topic_that_takes_nothing_is_not_unknown(
    broker: AzureServiceBus, service: ServiceBus, error: type[ServiceBusError]
) -> None:
    def refuse() -> None:
        raise error(message="not today")

    service.on_send = refuse
    with pytest.raises(BrokerUnavailable, match="Service Bus refused it: not today; not sent"):
        await broker.publish(message(1))


@pytest.mark.parametrize("error", [ServiceBusConnectionError, ServiceBusServerBusyError])
async def test_what_the_client_tried_several_times_is_unknown(
    broker: AzureServiceBus, service: ServiceBus, error: type[ServiceBusError]
) -> None:
    """Its last error says nothing of the first try."""
    tries = 0

    def refuse() -> None:
        nonlocal tries
        tries += 1
        raise error(message="not now")

    service.on_send = refuse
    with pytest.raises(DeliveryUnknown, match="not now"):
        await broker.publish(message(1))
    assert tries == 4


async def test_batches_behind_one_that_failed_do_not_go(broker: AzureServiceBus, service: ServiceBus) -> None:
    """They would come before its repeat."""
    await broker.publish(message(0))

    def fail() -> None:
        raise ServiceBusQuotaExceededError(message="full")

    service.on_send = fail
    with pytest.raises(BrokerUnavailable, match="none of 12 messages was sent"):
        await broker.publish(*(message(n, pad="x" * 50_000) for n in range(1, 13)))
    assert service.batches == [1, 5]


async def test_connection_that_is_not_there_is_not_unknown(broker: AzureServiceBus, service: ServiceBus) -> None:
    async with service.outage():
        with pytest.raises(BrokerUnavailable, match="nobody there; not sent"):
            await broker.publish(message(1))
    await broker.publish(message(2))
    async with service.outage():
        with pytest.raises(DeliveryUnknown, match="the link is gone|nobody there"):
            await broker.publish(message(3))
        with pytest.raises(BrokerUnavailable, match="nobody there; not sent"):  # it is known by now
            await broker.publish(message(4))
    await broker.publish(message(5))
    assert numbers(service.topics["events"]) == [2, 5]


async def test_answer_that_does_not_come_leaves_it_unknown_and_holds_up_nobody(
    broker: AzureServiceBus, service: ServiceBus
) -> None:
    service.answers.clear()
    with pytest.raises(DeliveryUnknown, match="has not answered since"):
        await broker.publish(message(1))
    ends = await asyncio.gather(*(broker.publish(message(n)) for n in (2, 3, 4)), return_exceptions=True)
    assert [type(end) for end in ends] == [DeliveryUnknown, BrokerUnavailable, BrokerUnavailable]
    service.answers.set()
    await broker.publish(message(5))


# -- whose is what ------------------------------------------------------------------------------------------


async def test_one_sender_is_kept_for_each_topic_and_closed_at_the_end(client: Client, service: ServiceBus) -> None:
    """Diator opens and closes the whole client for each message."""
    broker = AzureServiceBus(client, "events", app="web")
    for n in range(3):
        await broker.publish(message(n), message(n, to="orders"))
    assert sorted(sender.entity_name for sender in service.senders) == ["events", "orders"]
    await broker.aclose()
    await broker.aclose()
    assert all(sender.is_closed for sender in service.senders)
    async with client.get_topic_sender("events") as own:  # the client is still of use to the host
        assert not own.is_closed  # type: ignore[attr-defined]  # the double's


async def test_closing_ends_although_the_service_does_not_answer(
    client: Client, service: ServiceBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forever(link: object) -> None:
        await asyncio.Event().wait()

    async def broken(link: object) -> None:
        raise ServiceBusConnectionError(message="gone")

    for close in (forever, broken):
        broker = AzureServiceBus(client, "events", app="web", timeout=0.1)
        await broker.publish(message(1))
        with monkeypatch.context() as patch:
            patch.setattr(Link, "close_async", close)
            async with asyncio.timeout(5):
                await broker.aclose()


async def test_client_that_the_host_has_closed(client: Client, broker: AzureServiceBus) -> None:
    await broker.publish(message(1))
    await client.close()
    with pytest.raises(BrokerUnavailable, match="not sent"):
        await broker.publish(message(2))


async def test_pages_do_what_they_say(service: ServiceBus, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docs show of Service Bus, sending and receiving: but for the link, and the SDK's receiver."""
    monkeypatch.setattr(ServiceBusClient, "from_connection_string", lambda connection: service.client())
    await execute(shown(DOCS / "brokers.md", "azure.servicebus"), {"CONNECTION": "Endpoint=..."})
    topic = service.topics["events"]
    assert [received.subject for received in topic] == ["user.joined"]
    async with AzureServiceBus(client, "events", app="web") as broker:
        await broker.publish(
            Message("ecst_event", "bad", "id", {"event_id": 1}), Message("ecst_event", "failing", str(uuid.uuid4()), {})
        )

    dispatcher, settled = AsyncEventDispatcher(), []

    @dispatcher.listen("failing")
    async def fail(event: object) -> None:
        raise OSError("no")

    class Receiver:  # stands for the SDK's own
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def __aiter__(self) -> AsyncIterator[ServiceBusReceivedMessage]:
            for received in topic:
                yield received

        async def complete_message(self, received: ServiceBusReceivedMessage) -> None:
            settled.append(("complete", received.subject))

        async def abandon_message(self, received: ServiceBusReceivedMessage) -> None:
            settled.append(("abandon", received.subject))

        async def dead_letter_message(self, received: ServiceBusReceivedMessage, *, reason: str, **_: str) -> None:
            settled.append((reason, received.subject))

    assert all(
        callable(getattr(ServiceBusReceiver, name))
        for name in ("complete_message", "abandon_message", "dead_letter_message")
    )
    monkeypatch.setattr(client, "get_subscription_receiver", lambda topic, subscription: Receiver())
    namespace = {
        "client": client,
        "receive": receive,
        "dispatcher": dispatcher,
        "USER_JOINED": EventName("user.joined"),
        "MessageInvalid": MessageInvalid,
        "asyncio": asyncio,
        "logger": logging.getLogger("billing"),
    }
    await execute(without_pause(shown(DOCS / "receive.md", "get_subscription_receiver")), namespace)
    assert settled == [("complete", "user.joined"), ("MessageInvalid", "bad"), ("abandon", "failing")]


@pytest.mark.skipif(
    not CONNECTION, reason="SILBO_AZURE_CONNECTION is not set: no Service Bus, and no emulator of it, here"
)
async def test_service_itself() -> None:
    """Needs a topic `silbo` with a subscription `silbo`, or SILBO_AZURE_TOPIC and SILBO_AZURE_SUBSCRIPTION."""
    topic = os.environ.get("SILBO_AZURE_TOPIC", "silbo")
    subscription = os.environ.get("SILBO_AZURE_SUBSCRIPTION", "silbo")
    mark = uuid.uuid4().hex
    async with ServiceBusClient.from_connection_string(CONNECTION) as client:
        async with AzureServiceBus(client, topic, app="web") as broker:
            await broker.publish(*(message(n, mark=mark, pad="x" * 20_000) for n in range(20)))
            await asyncio.gather(*(broker.publish(message(n, mark=mark)) for n in range(20, 40)))
        found: set[int] = set()
        async with client.get_subscription_receiver(topic, subscription) as receiver, asyncio.timeout(60):
            while len(found) < 40:
                for received in await receiver.receive_messages(max_message_count=50, max_wait_time=5):
                    payload = json.loads(b"".join(received.body))["payload"]
                    if payload.get("mark") == mark:
                        found.add(payload["n"])
                    await receiver.complete_message(received)
    assert found == set(range(40))
