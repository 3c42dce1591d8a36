"""RabbitMQ as a broker, through the host's own aio-pika connection."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo._retry import Backoff
from silbo.brokers._sender import Parcel, Sender, close_all, labels
from silbo.errors import AddressInvalid, MessageRefused, MissingExtra
from silbo.message import Format, Message, Origin, instance
from silbo.protocols import Promises
from silbo.wire.formats import JSON

try:
    import aio_pika
    import aiormq
    from aio_pika.abc import AbstractConnection
except ModuleNotFoundError as error:
    if error.name not in ("aio_pika", "aiormq"):
        raise
    raise MissingExtra("silbo.brokers.rabbitmq", extra="rabbitmq") from error

__all__ = ["RabbitMQ"]

RECONNECT: Final = Backoff(initial=0.02, cap=0.5)


class RabbitMQ(AsyncCloseable):
    """Publishes to one exchange, or to the one that a route chose, with the event name as routing key.

    Bind queues to a topic exchange, as ``user.*`` or ``#``. Messages are persistent, and confirmed by RabbitMQ when every
    queue that gets them has them on disk; they carry their routing key and all else as headers. silbo opens a channel of
    its own for each exchange, which it never declares.

    Args:
        connection: The program's own, from ``aio_pika.connect_robust(...)``, which connects again by itself. It stays open.
        exchange: Where messages go for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once, but
            for one at a time that tries whether RabbitMQ answers again.
        mandatory: Whether a message that no queue is bound for is refused. With False RabbitMQ drops it, and says nothing.
        format: How messages look as bytes.
    """

    promises: Final = Promises()

    def __init__(
        self,
        connection: AbstractConnection,
        exchange: str,
        *,
        app: str,
        timeout: float = 15.0,
        mandatory: bool = True,
        format: Format = JSON,  # noqa: A002  # the word of every broker
    ) -> None:
        self.app: Final = check_address(app, "an app")
        if not exchange:
            raise AddressInvalid(exchange, "an exchange")
        self._connection, self._mandatory, self._format, self._timeout = connection, mandatory, format, timeout
        self._sender = Sender("RabbitMQ exchange", self._send, self._encode, to=exchange, timeout=timeout)
        self._channels: dict[str, aiormq.abc.AbstractChannel] = {}

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order; returns when RabbitMQ has confirmed them.

        Raises:
            MessageRefused: a message can't be sent, or no queue is bound for it; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have arrived.
        """
        await self._sender.publish(messages)

    async def aclose(self) -> None:
        """Send what waits, within its deadlines, and close the channels. May be called twice; the connection stays open."""
        try:
            await self._sender.aclose()
        finally:
            channels, self._channels = self._channels, {}
            await close_all([channel.close for channel in channels.values() if not channel.is_closed], self._timeout)

    def _encode(self, message: Message) -> bytes:
        if len(message.message_name.encode()) > 255:
            raise MessageRefused(message.message_name, "longer than a routing key of RabbitMQ's can be: 255 bytes")
        return self._format.encode(message, Origin(self.app, instance()))

    async def _send(self, exchange: str, parcels: Sequence[Parcel]) -> None:
        channel = await self._channel(exchange)
        # A task each: they write in this order, and none waits for another's confirmation.
        async with asyncio.TaskGroup() as tasks:
            for parcel in parcels:
                parcel.is_handed = True
                tasks.create_task(self._send_one(channel, exchange, parcel))

    async def _send_one(self, channel: aiormq.abc.AbstractChannel, exchange: str, parcel: Parcel) -> None:
        message = parcel.message
        properties = aiormq.spec.Basic.Properties(
            content_type=self._format.content_type,
            delivery_mode=2,
            headers=dict(labels(message, self.app)),
            message_id=message.headers.get("publication", message.message_id),
            timestamp=datetime.now(UTC),
            message_type=message.message_name,
            app_id=self.app,
        )
        try:
            await channel.basic_publish(
                parcel.raw,
                exchange=exchange,
                routing_key=message.message_name,
                properties=properties,
                mandatory=self._mandatory,
            )
        except aiormq.exceptions.PublishError:
            parcel.refused(
                f"no queue is bound to exchange {exchange!r} for it: bind one, or let such messages be dropped with "
                "RabbitMQ(..., mandatory=False)"
            )
        except Exception as error:  # noqa: BLE001  # whatever it is: it was sent, and not confirmed
            parcel.unknown(f"RabbitMQ did not confirm it: {str(error) or repr(error)}")
        else:
            parcel.sent()

    async def _channel(self, exchange: str) -> aiormq.abc.AbstractChannel:
        """An open channel, for an exchange that exists; waits for a connection that is away.

        Not aio-pika's robust one: that would hold up the recovery of the host's connection when the exchange is gone.
        """
        channel = self._channels.get(exchange)
        attempt = 0
        while channel is None or channel.is_closed:
            if self._connection.is_closed:
                raise ConnectionError("the connection is closed")
            await self._connection.ready()
            transport = self._connection.transport
            try:
                if transport is None:
                    raise ConnectionError("not connected")
                channel = await transport.connection.channel(publisher_confirms=True, on_return_raises=True)
                await channel.exchange_declare(exchange, passive=True)
            except aiormq.exceptions.ChannelClosed:  # it does not exist, or is not ours to use
                raise
            except (aio_pika.exceptions.AMQPError, OSError, RuntimeError):
                attempt += 1
                await asyncio.sleep(RECONNECT.delay(attempt) or 0)
            else:
                self._channels[exchange] = channel
        return channel
