"""Redis Pub/Sub: everybody who listens hears it, nobody who listens later does."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from redis.asyncio import Redis

from silbo.brokers.redis.connection import check_client
from silbo.brokers.redis.line import Packet
from silbo.brokers.redis.listening import PubSubSubscription
from silbo.brokers.redis.scripts import PUBLISH
from silbo.brokers.redis.sender import Sender
from silbo.message import Message, Origin, instance
from silbo.names import compile_pattern
from silbo.protocols import Format, Promises
from silbo.routing import check_address
from silbo.wire.formats import JSON

__all__ = ["RedisPubSub"]


class RedisPubSub:
    """Publishes to the channels ``{prefix}:{message_type}:{event name}``, or ``{prefix}:{address}`` by a route.

    Redis keeps nothing of it: a subscriber gets what is published while it is connected. For one event loop at a
    time, in its thread; loops may follow one another. Many publishes at once become few calls to Redis, over one
    connection.

    Args:
        client: The program's own. silbo opens connections of its own from its settings and leaves it as it is.
        app: The program's name, as consumers see it in ``event.origin.app``.
        prefix: The first part of every channel.
        format: How messages look as bytes; it names the channels too.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once
            until Redis answers again.
    """

    promises: Final = Promises(keeps=False)

    def __init__(
        self,
        client: Redis,
        *,
        app: str,
        prefix: str = "silbo",
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
    ) -> None:
        self.app: Final = check_address(app, "an app")
        self._client, self._prefix, self._format = check_client(client), check_address(prefix, "a prefix"), format
        self._timeout = timeout
        self._sender = Sender(self._client, PUBLISH, self._pack, each=2, timeout=timeout)

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have arrived.
        """
        await self._sender.publish(messages)

    def subscribe(self, *patterns: str, channels: tuple[str, ...] = ()) -> PubSubSubscription:
        """A description of what to hear, for a consumer.

        Args:
            patterns: Event names and patterns, as in ``add_listener``; without any, and without channels, ``**``.
            channels: Addresses that routes chose (``Route(..., to="orders")``): whatever comes there, of any name.

        Raises:
            NameInvalid: a pattern has a ``*`` that is not a whole segment.
            AddressInvalid: a channel is no address.
        """
        for pattern in patterns:
            compile_pattern(pattern)
        return PubSubSubscription(
            self._client,
            self.app,
            self._prefix,
            self._format,
            self._timeout,
            tuple(map(str, patterns)) or (() if channels else ("**",)),
            tuple(check_address(channel, "a channel") for channel in channels),
        )

    async def aclose(self) -> None:
        """Send what waits, within its deadlines, and close the connection. May be called twice; subscriptions go on."""
        await self._sender.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _pack(self, message: Message) -> Packet:
        raw = self._format.encode(message, Origin(self.app, instance()))
        channel = self._format.channel(message, self._prefix).encode()
        return b"", b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(channel), channel, len(raw), raw)
