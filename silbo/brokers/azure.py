"""Azure Service Bus as a broker, through the host's own ``azure.servicebus.aio.ServiceBusClient``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.brokers._sender import Parcel, Sender, close_all, labels
from silbo.errors import AddressInvalid, MessageRefused, MissingExtra
from silbo.message import Format, Message, Origin, instance
from silbo.protocols import Promises
from silbo.wire.formats import JSON

try:
    from azure.servicebus import ServiceBusMessage, ServiceBusMessageBatch
    from azure.servicebus.aio import ServiceBusClient, ServiceBusSender
    from azure.servicebus.exceptions import (
        MessageSizeExceededError,
        MessagingEntityDisabledError,
        MessagingEntityNotFoundError,
        ServiceBusAuthenticationError,
        ServiceBusAuthorizationError,
        ServiceBusQuotaExceededError,
    )
except ModuleNotFoundError as error:
    if error.name not in ("azure", "azure.servicebus"):
        raise
    raise MissingExtra("silbo.brokers.azure", extra="azure") from error

__all__ = ["AzureServiceBus"]

REFUSALS: Final[tuple[type[Exception], ...]] = (
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
    ServiceBusQuotaExceededError,
)
"""While one of these is the answer, the topic takes nothing at all."""
LONGEST_ID: Final = 128
"""Characters of a session's id; a limit of the service."""


class AzureServiceBus(AsyncCloseable):
    """Sends to one topic, or to the one that a route chose, in batches as large as the service takes them.

    A message has the event name as its ``subject``, its headers as ``application_properties``, and its publication as its
    ``message_id``: with duplicate detection, a topic drops what is sent a second time after DeliveryUnknown. One sender
    is kept for each topic.

    Args:
        client: The program's own. It stays open.
        topic: Where messages go for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises, the client's own retries included. After one was missed,
            further publishes fail at once, but for one at a time that tries whether the service answers again.
        sessions: Whether the topic's subscriptions have sessions, which alone keep the order of a key: the key is the
            session, and a message without one is refused.
        format: How messages look as bytes.

    Attributes:
        promises: With ``sessions`` the order of each key, without them none.
    """

    def __init__(
        self,
        client: ServiceBusClient,
        topic: str,
        *,
        app: str,
        timeout: float = 15.0,
        sessions: bool = False,
        format: Format = JSON,  # noqa: A002  # the word of every broker
    ) -> None:
        self.app: Final = check_address(app, "an app")
        if not topic:
            raise AddressInvalid(topic, "a topic")
        self.promises: Final = Promises(order="key" if sessions else "none")
        self._client, self._sessions, self._format, self._timeout = client, sessions, format, timeout
        self._sender = Sender("Service Bus topic", self._send, self._encode, to=topic, timeout=timeout)
        self._senders: dict[str, ServiceBusSender] = {}

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order; returns when the service has them.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have been sent.
        """
        await self._sender.publish(messages)

    async def aclose(self) -> None:
        """Send what waits, within its deadlines, and close the senders. May be called twice; the client stays open."""
        try:
            await self._sender.aclose()
        finally:
            senders, self._senders = self._senders, {}
            await close_all([sender.close for sender in senders.values()], self._timeout)

    def _encode(self, message: Message) -> bytes:
        if self._sessions and not 0 < len(message.key or "") <= LONGEST_ID:
            raise MessageRefused(
                message.message_name,
                f"sessions need a key of 1 to {LONGEST_ID} characters, not {message.key!r}: give its EventName or Route one",
            )
        return self._format.encode(message, Origin(self.app, instance()))

    async def _send(self, topic: str, parcels: Sequence[Parcel]) -> None:
        until = parcels[0].deadline
        sender = self._senders.get(topic)
        if sender is None:
            sender = self._senders[topic] = self._client.get_topic_sender(topic)
        await sender.__aenter__()  # connects where it is not; what fails in it was not sent
        for group in self._groups(parcels):
            waiting = list(group)
            while waiting:
                batch = await sender.create_message_batch()
                its = self._fill(batch, waiting)
                if its:
                    await _send_batch(sender, batch, its, until)

    def _groups(self, parcels: Sequence[Parcel]) -> Iterator[Sequence[Parcel]]:
        """Those that may go in one batch: a batch has one session."""
        if not self._sessions:
            yield parcels
            return
        by_key: dict[str | None, list[Parcel]] = {}
        for parcel in parcels:
            by_key.setdefault(parcel.message.key, []).append(parcel)
        yield from by_key.values()

    def _fill(self, batch: ServiceBusMessageBatch, waiting: list[Parcel]) -> list[Parcel]:
        """Move as many to the batch as go into it, and refuse one that is too large for any."""
        its: list[Parcel] = []
        while waiting:
            try:
                batch.add_message(self._message(waiting[0]))
            except MessageSizeExceededError:
                if its:
                    break
                waiting.pop(0).refused(f"larger than the {batch.max_size_in_bytes} bytes that the topic takes")
            else:
                its.append(waiting.pop(0))
        return its

    def _message(self, parcel: Parcel) -> ServiceBusMessage:
        message = parcel.message
        return ServiceBusMessage(
            parcel.raw,
            application_properties=dict(labels(message, self.app).items()),  # as keys of a wider type
            message_id=message.headers.get("publication", message.message_id),
            session_id=message.key if self._sessions else None,
            subject=message.message_name,
            content_type=self._format.content_type,
        )


async def _send_batch(
    sender: ServiceBusSender, batch: ServiceBusMessageBatch, parcels: Sequence[Parcel], until: float
) -> None:
    """Send a batch, which the service takes whole or not at all.

    Raises:
        Exception: what it failed with; the batches after it must not go before its repeat.
    """
    for parcel in parcels:
        parcel.is_handed = True
    try:
        await sender.send_messages(batch, timeout=max(0.001, until - asyncio.get_running_loop().time()))
    except REFUSALS as error:
        for parcel in parcels:
            parcel.unsent(f"Service Bus refused it: {error}")
        raise
    for parcel in parcels:
        parcel.sent()
