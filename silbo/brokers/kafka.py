"""Kafka as a broker, through the host's own ``aiokafka.AIOKafkaProducer``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo.brokers._sender import Parcel, Sender, labels
from silbo.errors import MissingExtra
from silbo.message import Format, Message, Origin, instance
from silbo.protocols import Promises
from silbo.wire.formats import JSON

try:
    from aiokafka import AIOKafkaProducer
    from aiokafka.errors import (
        ClusterAuthorizationFailedError,
        MessageSizeTooLargeError,
        TopicAuthorizationFailedError,
    )
except ModuleNotFoundError as error:
    if error.name != "aiokafka":
        raise
    raise MissingExtra("silbo.brokers.kafka", extra="kafka") from error

__all__ = ["Kafka"]

FORBIDDEN: Final[tuple[type[Exception], ...]] = (ClusterAuthorizationFailedError, TopicAuthorizationFailedError)


class Kafka(AsyncCloseable):
    """Sends to one topic, or to the one that a route chose; the key decides the partition.

    A record has the message as its value, its routing key as its key, and its headers: ``message_type``,
    ``message_name``, ``message_id`` and the message's own, so that a consumer can filter without decoding. Messages of
    one key keep their order; those without a key are spread over the partitions, in no order.

    After a publish has raised DeliveryUnknown, the producer may still send the message: it goes on trying by itself.

    Args:
        producer: The program's own, started, with ``acks="all"``; ``enable_idempotence=True`` sets that, and keeps its
            retries from doubling messages. It stays open.
        topic: Where messages go for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once, but
            for one at a time that tries whether Kafka answers again.
        format: How messages look as bytes.

    Raises:
        ValueError: the producer does not wait until all replicas have a message: what it confirms could be lost.
    """

    promises: Final = Promises(order="key")

    def __init__(
        self,
        producer: AIOKafkaProducer,
        topic: str = "events",
        *,
        app: str,
        timeout: float = 15.0,
        format: Format = JSON,  # noqa: A002  # the word of every broker
    ) -> None:
        self.app: Final = check_address(app, "an app")
        if getattr(getattr(producer, "_sender", None), "_acks", -1) != -1:  # it has no public name
            raise ValueError(
                "this producer does not wait until all replicas have a message, so that one it has confirmed can be "
                "lost; make it with AIOKafkaProducer(..., enable_idempotence=True), which is acks='all' too"
            )
        self._producer, self._format = producer, format
        self._doubted: set[str] = set()  # topics whose last messages have no answer
        self._sender = Sender(
            "Kafka topic", self._send, self._encode, to=check_address(topic, "a topic"), timeout=timeout
        )

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order; returns when all replicas in sync have them.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have been sent, or be sent later.
        """
        await self._sender.publish(messages)

    async def aclose(self) -> None:
        """Send what waits, within its deadlines. May be called twice; the producer stays open."""
        await self._sender.aclose()

    def _encode(self, message: Message) -> bytes:
        return self._format.encode(message, Origin(self.app, instance()))

    async def _send(self, topic: str, parcels: Sequence[Parcel]) -> None:
        if not self._producer.client.cluster.brokers():  # it learns of them when it starts, and else waits for ever
            raise ConnectionError("the producer was not started: `await producer.start()`, or `async with producer`")
        # Else each try would leave a copy with a producer that can't send it.
        if topic in self._doubted and not await self._producer.client.force_metadata_update():
            raise ConnectionError("no broker answers")
        answers: list[asyncio.Future[Any]] = []
        failed: Exception | None = None
        for parcel in parcels:
            message = parcel.message
            key = None if message.key is None else message.key.encode()
            headers = [(name, value.encode()) for name, value in labels(message, self.app).items()]
            headers.append(("content-type", self._format.content_type.encode()))
            try:
                # A send() that is cancelled has added nothing; once it returns, the producer has the message.
                answer = await self._producer.send(topic, parcel.raw, key=key, headers=headers)
            except MessageSizeTooLargeError as error:
                parcel.refused(f"larger than the producer's max_request_size: {error}")
            except Exception as error:  # noqa: BLE001  # raised below; nothing must go past what was not taken
                failed = error
                break
            else:
                parcel.is_handed = True
                answer.add_done_callback(partial(_settle, parcel))
                answers.append(answer)
        if answers:
            self._doubted.add(topic)
            await asyncio.wait(answers)
            self._doubted.discard(topic)
        if failed is not None:
            raise failed


def _settle(parcel: Parcel, answer: asyncio.Future[Any]) -> None:
    if answer.cancelled():
        parcel.unknown("the producer was closed")
    elif (error := answer.exception()) is None:
        parcel.sent()
    elif isinstance(error, MessageSizeTooLargeError):
        parcel.refused(f"too large for Kafka: {error}")
    elif isinstance(error, FORBIDDEN):
        parcel.unsent(f"Kafka refused it: {error}")
    else:  # it may be the error of the last of several tries
        parcel.unknown(f"Kafka did not confirm it: {error}")
