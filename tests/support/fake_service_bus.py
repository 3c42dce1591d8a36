"""A Service Bus without its network: the SDK's own client, sender, batches and messages, on a link of ours.

Messages go through it as the SDK's AMQP encoder makes them and its decoder reads them.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from azure.core.credentials import AzureNamedKeyCredential
from azure.servicebus import ServiceBusReceivedMessage
from azure.servicebus._pyamqp._decode import decode_payload
from azure.servicebus.aio import ServiceBusClient, ServiceBusSender
from azure.servicebus.exceptions import OperationTimeoutError, ServiceBusConnectionError

STANDARD = 256 * 1024
"""Bytes of a batch in the standard tier."""


class ServiceBus:
    """The state and the behaviour of the service."""

    def __init__(self) -> None:
        self.topics: dict[str, list[ServiceBusReceivedMessage]] = defaultdict(list)
        self.batches: list[int] = []
        """The number of messages of each batch."""
        self.senders: list[Sender] = []
        self.is_away = False
        self.on_send: Callable[[], object] = lambda: None
        """Called with each batch, after the batch was taken; may raise the error that the client then raises."""
        self.answers = asyncio.Event()
        self.answers.set()

    def client(self) -> Client:
        client = Client(
            "silbo.servicebus.windows.net", AzureNamedKeyCredential("name", "key"), retry_backoff_factor=0.01
        )
        client.service = self
        return client

    async def take(self, topic: str, raw: list[bytes]) -> None:
        if self.is_away:
            raise ServiceBusConnectionError(message="the link is gone")
        decoded: list[Any] = [decode_payload(memoryview(bytes(one))) for one in raw]
        messages = [ServiceBusReceivedMessage(one, receiver=None) for one in decoded]
        assert len({message.session_id for message in messages}) == 1, "the service takes a batch of one session alone"
        assert sum(map(len, raw)) <= STANDARD
        known = {message.message_id for message in self.topics[topic]}
        self.topics[topic] += [message for message in messages if message.message_id not in known]
        self.batches.append(len(messages))
        self.on_send()
        await self.answers.wait()

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        self.is_away = True
        yield
        self.is_away = False


class Client(ServiceBusClient):
    service: ServiceBus

    def get_topic_sender(self, topic_name: str, **kwargs: Any) -> ServiceBusSender:
        real = super().get_topic_sender(topic_name, **kwargs)
        real.__class__ = Sender
        assert isinstance(real, Sender)
        real.service, real.is_closed = self.service, False
        self.service.senders.append(real)
        return real


class Sender(ServiceBusSender):
    service: ServiceBus
    is_closed: bool

    async def _open(self, timeout: float | None = None) -> None:
        if not self._running:
            if self.service.is_away:
                raise ServiceBusConnectionError(message="nobody there")
            self._handler: Any = Link(self.service, self.entity_name)
            self._running = True
            self._max_message_size_on_link = self._max_batch_size_on_link = STANDARD

    async def close(self) -> None:
        self.is_closed = True
        await super().close()


class Link:
    """In place of the SDK's own AMQP client."""

    def __init__(self, service: ServiceBus, topic: str) -> None:
        self._service, self._topic = service, topic

    async def send_message_async(self, message: Any, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._service.take(self._topic, message.data)
        except TimeoutError:
            raise OperationTimeoutError(message="Send operation timed out") from None

    async def close_async(self) -> None: ...
