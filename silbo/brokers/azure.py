"""Azure Service Bus as a broker, through the host's own ``azure.servicebus.aio.ServiceBusClient``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Final

from silbo._checks import require_extra
from silbo.brokers._library_broker import LibraryBroker, build_labels
from silbo.brokers._sender import OutgoingMessage
from silbo.errors import AddressInvalid, MessageRefused
from silbo.message import Format, Message
from silbo.protocols import Promises
from silbo.wire.formats import JSON

with require_extra("silbo.brokers.azure", extra="azure", libraries=("azure", "azure.servicebus")):
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

__all__ = ["AzureServiceBus"]

REFUSALS: Final[tuple[type[Exception], ...]] = (
    MessagingEntityDisabledError,
    MessagingEntityNotFoundError,
    ServiceBusAuthenticationError,
    ServiceBusAuthorizationError,
    ServiceBusQuotaExceededError,
)
"""With these errors the topic takes no message at all."""
LONGEST_SESSION_ID: Final = 128
"""A session's id has at most 128 characters, by Service Bus."""


class AzureServiceBus(LibraryBroker):
    """A publisher to one topic, or to the one that a route chose, in batches as large as the service takes them.

    A message has the event name as its ``subject``, its headers as ``application_properties``, and its publication as its
    ``message_id``: with duplicate detection, a topic drops a message that is published again after DeliveryUnknown. A
    publish returns when the service has its messages. One sender of the library's is kept for each topic; closing closes
    the senders and leaves the client open.

    Args:
        client: The program's client. It stays open.
        topic: The topic of messages for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises, the client's own retries included. After one was missed,
            further publishes fail at once, but for one at a time that probes if the service answers again.
        sessions: True if the topic's subscriptions have sessions, which alone keep the order of a key: the key is the
            session, and a message without one is refused.
        format: Encodes messages as bytes.

    Attributes:
        promises: With ``sessions`` the order of each key, without them none.

    Raises:
        AddressInvalid: the app is not a valid name, or the topic is empty.
    """

    kind = "Service Bus topic"

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
        super().__init__(topic, app=app, timeout=timeout, format=format)
        if not topic:
            raise AddressInvalid(topic, "a topic")
        self.promises = Promises(order="key" if sessions else "none")
        self._client = client
        self._sessions = sessions
        self._topic_senders: dict[str, ServiceBusSender] = {}

    def _closes(self) -> Iterable[Callable[[], Awaitable[object]]]:
        senders, self._topic_senders = self._topic_senders, {}
        return [sender.close for sender in senders.values()]

    def _encode(self, message: Message) -> bytes:
        if self._sessions and not 0 < len(message.key or "") <= LONGEST_SESSION_ID:
            raise MessageRefused(
                message.message_name,
                f"sessions need a key of 1 to {LONGEST_SESSION_ID} characters, not {message.key!r}: "
                "give its EventName or Route one",
            )
        return super()._encode(message)

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        deadline = messages[0].deadline
        sender = self._topic_senders.get(address)
        if sender is None:
            sender = self._topic_senders[address] = self._client.get_topic_sender(address)
        await sender.__aenter__()  # connects if it is not connected; on an error nothing was sent
        for session in self._split_by_session(messages):
            waiting = list(session)
            while waiting:
                batch = await sender.create_message_batch()
                if filled := self._fill(batch, waiting):
                    await _send_batch(sender, batch, filled, deadline)

    def _split_by_session(self, messages: Sequence[OutgoingMessage]) -> Collection[Sequence[OutgoingMessage]]:
        """Return the messages that may share a batch: a batch has one session."""
        if not self._sessions:
            return [messages]
        by_key: dict[str | None, list[OutgoingMessage]] = {}
        for outgoing in messages:
            by_key.setdefault(outgoing.message.key, []).append(outgoing)
        return by_key.values()

    def _fill(self, batch: ServiceBusMessageBatch, waiting: list[OutgoingMessage]) -> list[OutgoingMessage]:
        """Move messages from ``waiting`` to the batch until it is full; refuse a message that is too large for any."""
        filled: list[OutgoingMessage] = []
        while waiting:
            try:
                batch.add_message(self._to_library(waiting[0]))
            except MessageSizeExceededError:
                if filled:
                    break
                waiting.pop(0).mark_refused(f"larger than the {batch.max_size_in_bytes} bytes that the topic takes")
            except (TypeError, ValueError) as error:  # a property too long, a text that is no UTF-8
                waiting.pop(0).mark_refused(f"it can't be written for Service Bus: {error}")
            else:
                filled.append(waiting.pop(0))
        return filled

    def _to_library(self, outgoing: OutgoingMessage) -> ServiceBusMessage:
        message = outgoing.message
        return ServiceBusMessage(
            outgoing.raw,
            application_properties=dict(build_labels(message, self.app).items()),  # as keys of a wider type
            message_id=message.headers.get("publication", message.message_id),
            session_id=message.key if self._sessions else None,
            subject=message.message_name,
            content_type=self.format.content_type,
        )


async def _send_batch(
    sender: ServiceBusSender, batch: ServiceBusMessageBatch, messages: Sequence[OutgoingMessage], deadline: float
) -> None:
    """Send a batch, which the service takes whole or not at all, and mark its messages.

    Raises:
        Exception: the library's error; later batches must not be sent before this one is repeated.
    """
    for outgoing in messages:
        outgoing.is_handed_over = True
    try:
        await sender.send_messages(batch, timeout=max(0.001, deadline - asyncio.get_running_loop().time()))
    except REFUSALS as error:
        for outgoing in messages:
            outgoing.mark_unsent(f"Service Bus refused it: {error}")
        raise
    for outgoing in messages:
        outgoing.mark_sent()
