"""RabbitMQ as a broker, through the host's own aio-pika connection."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from silbo._checks import require_extra
from silbo._retry import Backoff
from silbo.brokers._library_broker import LibraryBroker, build_labels
from silbo.brokers._sender import OutgoingMessage
from silbo.errors import AddressInvalid, MessageRefused
from silbo.message import Format, Message
from silbo.wire.formats import JSON

with require_extra("silbo.brokers.rabbitmq", extra="rabbitmq", libraries=("aio_pika", "aiormq")):
    import aio_pika
    import aiormq
    from aio_pika.abc import AbstractConnection

__all__ = ["RabbitMQ"]

RECONNECT: Final = Backoff(initial=0.02, cap=0.5)
"""The delays between two attempts to open a channel while the connection is away."""
LONGEST_ROUTING_KEY: Final = 255
"""A routing key has at most 255 bytes, by AMQP."""


class RabbitMQ(LibraryBroker):
    """A publisher to one exchange, or to the one that a route chose, with the event name as routing key.

    Bind queues to a topic exchange, as ``user.*`` or ``#``. Messages are persistent; they carry their routing key and all
    else as headers. A publish returns when RabbitMQ has confirmed its messages: every queue that gets them has them on
    disk. silbo opens a channel of its own for each exchange, which it never declares. Closing closes the channels and
    leaves the connection open.

    Args:
        connection: The program's own, from ``aio_pika.connect_robust(...)``, which connects again by itself. It stays open.
        exchange: The exchange of messages for which no route chose another.
        app: The program's name, as consumers see it in ``event.origin.app``.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once, but
            for one at a time that probes if RabbitMQ answers again.
        mandatory: Refuse a message that no queue is bound for (MessageRefused). With False RabbitMQ drops it without an
            error.
        format: Encodes messages as bytes.

    Raises:
        AddressInvalid: the app is not a valid name, or the exchange is empty.
    """

    kind = "RabbitMQ exchange"

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
        super().__init__(exchange, app=app, timeout=timeout, format=format)
        if not exchange:
            raise AddressInvalid(exchange, "an exchange")
        self._connection = connection
        self._mandatory = mandatory
        self._channels: dict[str, aiormq.abc.AbstractChannel] = {}

    def _closes(self) -> Iterable[Callable[[], Awaitable[object]]]:
        channels, self._channels = self._channels, {}
        return [channel.close for channel in channels.values() if not channel.is_closed]

    def _encode(self, message: Message) -> bytes:
        if len(message.message_name.encode()) > LONGEST_ROUTING_KEY:
            raise MessageRefused(message.message_name, "longer than a routing key of RabbitMQ's can be: 255 bytes")
        return super()._encode(message)

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        channel = await self._channel(address)
        # A task for each message: they write in this order, and none waits for another's confirmation.
        async with asyncio.TaskGroup() as tasks:
            for outgoing in messages:
                outgoing.is_handed_over = True
                tasks.create_task(self._send_message(channel, address, outgoing))

    async def _send_message(
        self, channel: aiormq.abc.AbstractChannel, exchange: str, outgoing: OutgoingMessage
    ) -> None:
        message = outgoing.message
        properties = aiormq.spec.Basic.Properties(
            content_type=self.format.content_type,
            delivery_mode=2,  # persistent
            headers=dict(build_labels(message, self.app)),
            message_id=message.headers.get("publication", message.message_id),
            timestamp=datetime.now(UTC),
            message_type=message.message_name,
            app_id=self.app,
        )
        try:
            await channel.basic_publish(
                outgoing.raw,
                exchange=exchange,
                routing_key=message.message_name,
                properties=properties,
                mandatory=self._mandatory,
            )
        except aiormq.exceptions.PublishError:
            outgoing.mark_refused(
                f"no queue is bound to exchange {exchange!r} for it: bind one, or let such messages be dropped with "
                "RabbitMQ(..., mandatory=False)"
            )
        except (TypeError, ValueError) as error:  # it can't be written: a property too long, a text that is no UTF-8
            outgoing.mark_refused(f"it can't be written for RabbitMQ: {error}")
        except Exception as error:  # noqa: BLE001  # whatever it is: the message was sent, and not confirmed
            outgoing.mark_unknown(f"RabbitMQ did not confirm it: {str(error) or repr(error)}")
        else:
            outgoing.mark_sent()

    async def _channel(self, exchange: str) -> aiormq.abc.AbstractChannel:
        """Return an open channel for an exchange that exists; wait while the connection is away.

        Not aio-pika's robust channel: it would hold up the recovery of the host's connection when the exchange is gone.
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
            except aiormq.exceptions.ChannelClosed:  # the exchange does not exist, or is not ours to use
                raise
            except (aio_pika.exceptions.AMQPError, OSError, RuntimeError):
                attempt += 1
                await asyncio.sleep(RECONNECT.delay(attempt) or 0)
            else:
                self._channels[exchange] = channel
        return channel
