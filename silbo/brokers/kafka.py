"""Kafka as a broker, through the host's own ``aiokafka.AIOKafkaProducer``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from silbo._checks import check_address, require_extra
from silbo.brokers._library_broker import LibraryBroker, build_labels
from silbo.brokers._sender import OutgoingMessage
from silbo.message import Format
from silbo.protocols import Promises
from silbo.wire.formats import JSON

with require_extra("silbo.brokers.kafka", extra="kafka", libraries=("aiokafka",)):
    from aiokafka import AIOKafkaProducer
    from aiokafka.errors import (
        ClusterAuthorizationFailedError,
        MessageSizeTooLargeError,
        TopicAuthorizationFailedError,
    )

__all__ = ["Kafka"]

FORBIDDEN: Final[tuple[type[Exception], ...]] = (ClusterAuthorizationFailedError, TopicAuthorizationFailedError)
"""With these errors Kafka surely did not take the message."""


class Kafka(LibraryBroker):
    """A publisher to one topic, or to the one that a route chose; the key decides the partition.

    A record has the message as its value, its routing key as its key, and its headers: ``message_type``,
    ``message_name``, ``message_id`` and the message's own, so that a consumer can filter without decoding. Messages of
    one key keep their order; those without a key are spread over the partitions, in no order.

    A publish returns when all replicas in sync have its messages. After a publish has raised DeliveryUnknown, the producer
    may still send the message: it goes on trying by itself. Closing leaves the producer open.

    Args:
        producer: The program's own, started, with ``acks="all"``. ``enable_idempotence=True`` sets that, and keeps the
            producer's retries from doubling messages. It stays open.
        topic: The topic of messages for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once, but
            for one at a time that probes if Kafka answers again.
        format: Encodes messages as bytes.

    Raises:
        AddressInvalid: the app or the topic is not a valid name.
        ValueError: the producer does not wait until all replicas have a message: a confirmed message could be lost.
    """

    kind = "Kafka topic"
    promises = Promises(order="key")

    def __init__(
        self,
        producer: AIOKafkaProducer,
        topic: str = "events",
        *,
        app: str,
        timeout: float = 15.0,
        format: Format = JSON,  # noqa: A002  # the word of every broker
    ) -> None:
        super().__init__(check_address(topic, "a topic"), app=app, timeout=timeout, format=format)
        if getattr(getattr(producer, "_sender", None), "_acks", -1) != -1:  # aiokafka has no public name for it
            raise ValueError(
                "this producer does not wait until all replicas have a message, so that one it has confirmed can be "
                "lost; make it with AIOKafkaProducer(..., enable_idempotence=True), which is acks='all' too"
            )
        self._producer = producer
        self._unanswered_topics: set[str] = set()  # topics whose last messages have no answer

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        # A producer learns of its brokers when it starts; one that was not started waits for ever.
        if not self._producer.client.cluster.brokers():
            raise ConnectionError("the producer was not started: `await producer.start()`, or `async with producer`")
        # Without this check each probe would leave a copy with a producer that can't send it.
        if address in self._unanswered_topics and not await self._producer.client.force_metadata_update():
            raise ConnectionError("no broker answers")
        answers: list[asyncio.Future[Any]] = []
        failed: Exception | None = None
        for outgoing in messages:
            message = outgoing.message
            try:
                key = None if message.key is None else message.key.encode()
                headers = [(name, value.encode()) for name, value in build_labels(message, self.app).items()]
            except (AttributeError, UnicodeError) as error:
                outgoing.mark_refused(f"its key or a header is no text that can be written: {error}")
                continue
            headers.append(("content-type", self.format.content_type.encode()))
            try:
                # A send() that is cancelled has added nothing; once it returns, the producer has the message.
                answer = await self._producer.send(address, outgoing.raw, key=key, headers=headers)
            except MessageSizeTooLargeError as error:
                outgoing.mark_refused(f"larger than the producer's max_request_size: {error}")
            except Exception as error:  # noqa: BLE001  # raised below; no message may overtake one that was not taken
                failed = error
                break
            else:
                outgoing.is_handed_over = True
                answer.add_done_callback(partial(_mark_outcome, outgoing))
                answers.append(answer)
        if answers:
            self._unanswered_topics.add(address)
            await asyncio.wait(answers)
            self._unanswered_topics.discard(address)
        if failed is not None:
            raise failed


def _mark_outcome(outgoing: OutgoingMessage, answer: asyncio.Future[Any]) -> None:
    if answer.cancelled():
        outgoing.mark_unknown("the producer was closed")
    elif (error := answer.exception()) is None:
        outgoing.mark_sent()
    elif isinstance(error, MessageSizeTooLargeError):
        outgoing.mark_refused(f"too large for Kafka: {error}")
    elif isinstance(error, FORBIDDEN):
        outgoing.mark_unsent(f"Kafka refused it: {error}")
    else:  # it may be the error of the last of several tries, and an earlier one arrived
        outgoing.mark_unknown(f"Kafka did not confirm it: {error}")
