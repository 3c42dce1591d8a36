"""Redis Pub/Sub: everybody who listens hears it, nobody who listens later does."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import Redis

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo._retry import Backoff
from silbo.brokers.redis.connection import Connection, Lost, Refused, check_client, connect, where
from silbo.brokers.redis.scripts import PUBLISH
from silbo.brokers.redis.sender import Packet, Sender
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery, Format, Message, Origin, instance
from silbo.names import compile_pattern
from silbo.protocols import Promises
from silbo.wire.formats import JSON

__all__ = ["PubSubSubscription", "RedisPubSub"]

WAIT: Final = 0.5
"""Seconds that a receive waits for something to come."""
CHANNELS: Final = 10_000
"""Channels of which it is remembered whether they are wanted."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.25)


@dataclass(frozen=True, slots=True)
class PubSubSubscription:
    """A subscription to patterns of event names, and to channels; a consumer opens it."""

    client: Redis
    app: str
    prefix: str
    format: Format
    timeout: float
    patterns: tuple[str, ...]
    channels: tuple[str, ...]

    @property
    def name(self) -> str:
        """There are no groups."""
        return ""

    async def open(self) -> _Listener:
        """Subscribe; returns when Redis has confirmed all of it.

        Raises:
            BrokerUnavailable: it can't be reached, or refuses.
        """
        listener = _Listener(self)
        await listener.subscribe()
        return listener


class _Wanted:
    """What to subscribe to, and which of the messages that come are meant.

    Redis's patterns are wider than silbo's (its ``*`` crosses dots), and a message comes once for every subscription
    that it matches. Each channel is looked at once, then remembered.
    """

    def __init__(self, subscription: PubSubSubscription) -> None:
        self._prefix = f"{subscription.prefix}:"
        self._addresses = {f"{self._prefix}{channel}" for channel in subscription.channels}
        self._by_class = subscription.format.names == "class"  # then no name is in a channel
        self._names = [compile_pattern(pattern) for pattern in subscription.patterns]
        every = [
            channel
            for pattern in subscription.patterns
            for channel in subscription.format.channels(pattern, subscription.prefix)
        ]
        self.globs = list(dict.fromkeys(channel for channel in every if set(channel) & set("*?[\\")))
        self.exact = list(
            dict.fromkeys([channel for channel in every if channel not in self.globs] + [*self._addresses])
        )
        self._via: dict[bytes, bytes] = {}

    @property
    def widest(self) -> str | None:
        """The one pattern that covers all, which an ACL rule ``&silbo:*`` allows; None where it would not cover all."""
        covers = all(channel.startswith(self._prefix) for channel in self.globs + self.exact)
        return f"{self._prefix}*" if covers else None

    def __str__(self) -> str:
        return ", ".join(self.globs + self.exact)

    def accepts(self, channel: bytes, via: bytes) -> bool:
        """Whether a message is meant, and has not come through another subscription as well."""
        accepted = self._via.get(channel)
        if accepted is None:
            if len(self._via) >= CHANNELS:
                del self._via[next(iter(self._via))]  # the oldest: the copies of one message come right behind it
            accepted = self._via[channel] = via if self._means(channel.decode(errors="replace")) else b""
        return accepted == via

    def forget(self) -> None:
        """Other subscriptions, other copies."""
        self._via.clear()

    def _means(self, channel: str) -> bool:
        if channel in self._addresses or not channel.startswith(self._prefix):
            return True
        _, colon, name = channel.removeprefix(self._prefix).partition(":")
        return bool(colon) and (self._by_class or any(pattern.fullmatch(f"{name}.") for pattern in self._names))


class _Listener:
    """A connection that is subscribed. When it is lost, the next receive subscribes again, and tells of the gap."""

    skips_own_instance = True
    keep_every: float | None = None

    def __init__(self, subscription: PubSubSubscription) -> None:
        self._client, self._format = subscription.client, subscription.format
        self._timeout, self._server = subscription.timeout, where(subscription.client)
        self._wanted = _Wanted(subscription)
        self._connection: Connection | None = None
        self._ready: deque[Delivery | Gap] = deque()
        self._failures = 0  # to connect, one after another
        self._lost: str | None = None  # why, until it is back
        self._heard = 0.0
        self._pinged: float | None = None  # when, while there is no answer
        self._closed = False

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        if self._closed:
            raise BrokerUnavailable("the subscription is closed")
        if self._connection is None:
            await self._resubscribe()
        assert self._connection is not None
        try:
            if not self._ready:
                await self._read(self._connection, WAIT)
            while len(self._ready) < limit and await self._connection.has_something():
                if not await self._read(self._connection, 0):
                    break  # a part of a message
        except (Lost, Refused) as error:
            if not self._ready:  # else next time
                await self._lose(str(error))
                raise BrokerUnavailable(f"lost the subscription to {self._server}: {error}") from error
        return [self._ready.popleft() for _ in range(min(limit, len(self._ready)))]

    async def ack(self, *deliveries: Delivery) -> None:
        """Nothing to do, here and in the next three: Redis keeps nothing."""

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        return ()

    async def count(self, delivery: Delivery) -> int:
        return delivery.attempt

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        return False

    async def aclose(self) -> None:
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    # -- the connection -------------------------------------------------------------------------------------

    async def subscribe(self) -> None:
        """Connect and subscribe.

        Raises:
            BrokerUnavailable: it was not confirmed in time, or refused.
        """
        try:
            async with asyncio.timeout(self._timeout):
                self._connection = await connect(self._client)
                await self._subscribe(self._connection)
        except (Lost, Refused, TimeoutError) as error:
            await self._drop()
            why = str(error) or f"no answer within {self._timeout:g} s"
            raise BrokerUnavailable(f"can't subscribe at {self._server}: {why}") from error
        except BaseException:
            await self._drop()
            raise
        self._heard, self._pinged = asyncio.get_running_loop().time(), None

    async def _subscribe(self, connection: Connection) -> None:
        globs, exact = self._wanted.globs, self._wanted.exact
        self._wanted.forget()
        try:
            await self._confirm(connection, b"PSUBSCRIBE", globs)
        except Refused as refusal:
            if refusal.code != "NOPERM" or self._wanted.widest is None:
                raise
            # An ACL with &silbo:* allows this pattern literally, and none that is narrower.
            await self._confirm(connection, b"PSUBSCRIBE", [self._wanted.widest])
        else:
            await self._confirm(connection, b"SUBSCRIBE", exact)

    async def _confirm(self, connection: Connection, command: bytes, channels: list[str]) -> None:
        """Subscribe, and wait until each one is confirmed; a message that comes in between was not asked for yet."""
        if not channels:
            return
        await connection.command(command, *[channel.encode() for channel in channels])
        missing = len(channels)
        while missing:
            reply = await connection.read()
            missing -= reply[0] == command.lower()

    async def _resubscribe(self) -> None:
        if self._failures:
            await asyncio.sleep(RECONNECT.delay(self._failures) or 0)
        self._failures += 1
        await self.subscribe()
        self._failures = 0
        if self._lost is not None:
            reason = f"the connection to Redis was lost ({self._lost}) and is back"
            self._ready.appendleft(Gap(str(self._wanted), reason))
            self._lost = None

    async def _lose(self, why: str) -> None:
        self._lost = why
        await self._drop()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    # -- what comes -----------------------------------------------------------------------------------------

    async def _read(self, connection: Connection, wait: float) -> bool:
        """Take what comes within ``wait`` seconds; whether something came."""
        reply = await connection.read(wait)
        now = asyncio.get_running_loop().time()
        if reply is not None:
            self._heard, self._pinged = now, None
            self._sort(reply)
            return True
        # A connection whose other side is gone looks like one on which nothing is published.
        if self._pinged is not None:
            if now - self._pinged > self._timeout:
                raise Lost(f"no answer to a PING within {self._timeout:g} s")
        elif now - self._heard > self._timeout:
            self._pinged = now
            await connection.command(b"PING")
        return False

    def _sort(self, reply: list[Any]) -> None:
        if reply[0] == b"pmessage":
            _, via, channel, raw = reply
        elif reply[0] == b"message":
            _, channel, raw = reply
            via = channel
        else:
            return  # pong
        if self._wanted.accepts(channel, via):
            self._ready.append(Delivery(raw, channel.decode(errors="replace"), self._format))


class RedisPubSub(AsyncCloseable):
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

    def _pack(self, message: Message) -> Packet:
        raw = self._format.encode(message, Origin(self.app, instance()))
        channel = self._format.channel(message, self._prefix).encode()
        return b"", b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(channel), channel, len(raw), raw)
