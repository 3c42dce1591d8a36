"""Redis Pub/Sub: every subscriber that is connected gets a message, and no later one does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

from silbo._checks import check_address
from silbo._closing import AsyncCloseable
from silbo._retry import Backoff
from silbo.brokers.redis.connection import (
    Client,
    Connection,
    Lost,
    Refused,
    check_client,
    find_trouble,
    to_unavailable,
)
from silbo.brokers.redis.nodes import connect_to
from silbo.brokers.redis.pubsub_receiver import PubSubReceiver
from silbo.brokers.redis.scripts import PUBLISH
from silbo.brokers.redis.sender import BatchScript, RedisSender
from silbo.brokers.redis.sharded_channels import ShardedChannelReceiver, ShardedChannelSender
from silbo.errors import BrokerUnavailable, Gap, NameInvalid
from silbo.message import Batch, Format, Message, own_origin
from silbo.names import compile_pattern
from silbo.protocols import Promises
from silbo.wire.formats import JSON

__all__ = ["RedisPubSub"]

WAIT: Final = 0.5
"""A receive waits at most 0.5 seconds for a message."""
CACHED_CHANNELS: Final = 10_000
"""The filter remembers its answer for at most 10,000 channels."""
LONG_CHANNEL: Final = 1_000
"""A channel of more bytes is remembered by a digest: anybody may publish to channels of any length."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.25)
"""The delays between two attempts to subscribe again."""


class RedisPubSub(AsyncCloseable):
    """A publisher to the channels ``{prefix}:{message_type}:{event name}``, or ``{prefix}:{address}`` by a route.

    Redis keeps no message: a subscriber gets those that are published while it is connected. For one event loop at a
    time: a second one gets LoopConflict until the first has ended. Many publishes at once become few calls to Redis, over
    one connection.

    Args:
        client: The program's client. silbo opens its own connections with the client's settings, and leaves the client as it is.
        app: The program's name, as consumers see it in ``event.origin.app``.
        prefix: The first part of every channel.
        format: Encodes messages as bytes, and names the channels.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once
            until Redis answers again.
        sharded: Use Redis's sharded channels (Redis 7 and later): in a cluster each is at one node, and no message goes to
            the others. They have no patterns: subscriptions name each event. The programs on both sides say the same.

    Raises:
        AddressInvalid: the app or the prefix is not a valid name.
        ValueError: the format's channels do not tell the names, as sharded channels need.
    """

    promises: Final = Promises(keeps=False)

    def __init__(
        self,
        client: Client,
        *,
        app: str,
        prefix: str = "silbo",
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
        sharded: bool = False,
    ) -> None:
        if sharded and format.names == "class":
            raise ValueError(
                "sharded channels have no patterns, and the channels of this format do not tell the event's name"
            )
        self._sharded = sharded
        self.app: Final = check_address(app, "an app")
        self._client = check_client(client)
        self._prefix = check_address(prefix, "a prefix")
        self.format: Final = format
        self._timeout = timeout
        self._sender: RedisSender | ShardedChannelSender
        if sharded:
            self._sender = ShardedChannelSender(
                client, "channel", self._encode, find_key=self._find_key, timeout=timeout, owner="RedisPubSub"
            )
        else:
            publish = BatchScript(PUBLISH, arguments_each=2)
            self._sender = RedisSender(client, publish, self._encode, timeout=timeout, owner="RedisPubSub")

    async def publish(self, *messages: Message) -> None:
        """Send the messages, in this order.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was sent; safe to repeat.
            DeliveryUnknown: some or all may have arrived; to repeat may double them.
            LoopConflict: another event loop uses this broker.
        """
        await self._sender.publish(messages)

    def subscribe(self, *patterns: str, channels: tuple[str, ...] = ()) -> PubSubSubscription:
        """Describe a subscription; a consumer opens it.

        Args:
            patterns: Event names and patterns, as in ``add_listener``; ``**`` if there are neither patterns nor channels.
            channels: Addresses that routes chose (``Route(..., to="orders")``): all messages there, of any name.

        Raises:
            NameInvalid: a pattern has a ``*`` that is not a whole segment. With sharded channels: there is a pattern, or
                neither a name nor a channel.
            AddressInvalid: a channel is not an address.
        """
        if self._sharded:
            for name in patterns or (() if channels else ("**",)):
                if set(name) & set("*?[]\\"):
                    raise NameInvalid(
                        name, "sharded channels have no patterns: name each event, or leave out sharded=True"
                    )
        for pattern in patterns:
            compile_pattern(pattern)
        return PubSubSubscription(
            client=self._client,
            app=self.app,
            prefix=self._prefix,
            format=self.format,
            timeout=self._timeout,
            patterns=tuple(map(str, patterns)) or (() if channels else ("**",)),
            channels=tuple(check_address(channel, "a channel") for channel in channels),
            sharded=self._sharded,
        )

    def address_of(self, message: Message) -> str:
        """Return the channel that a message goes to."""
        return self.format.channel(message, self._prefix)

    async def aclose(self) -> None:
        """Send the waiting messages, within their deadlines, and close the connection. May be called twice.

        Open subscriptions go on.

        Raises:
            LoopConflict: another event loop uses this broker; it stays open.
        """
        await self._sender.aclose()

    def _find_key(self, message: Message) -> bytes:
        return self.format.channel(message, self._prefix).encode()

    def _encode(self, message: Message) -> bytes:
        raw = self.format.encode(message, own_origin(self.app))
        channel = self.format.channel(message, self._prefix).encode()
        return b"$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(channel), channel, len(raw), raw)


# -- receiving ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PubSubSubscription:
    """A subscription to patterns of event names, and to channels; a consumer opens it."""

    client: Client
    app: str
    prefix: str
    format: Format
    timeout: float
    patterns: tuple[str, ...]
    channels: tuple[str, ...]
    sharded: bool = False

    @property
    def name(self) -> str:
        """Empty: Pub/Sub has no groups."""
        return ""

    async def open(self) -> _Receiver | ShardedChannelReceiver:
        """Subscribe; return when Redis has confirmed every subscription.

        Raises:
            BrokerUnavailable: Redis can't be reached, or refuses; safe to repeat.
        """
        if self.sharded:
            sharded = ShardedChannelReceiver(self.client, _ChannelFilter(self).channels, self.format, self.timeout)
            await sharded.open()
            return sharded
        receiver = _Receiver(self)
        await receiver.subscribe()
        return receiver


class _Receiver(PubSubReceiver):
    """A subscribed connection. After it is lost, the next receive subscribes again and returns a gap."""

    def __init__(self, subscription: PubSubSubscription) -> None:
        super().__init__(subscription.client, subscription.format, subscription.timeout)
        self._filter = _ChannelFilter(subscription)
        self._connection: Connection | None = None
        self._failures = 0  # to connect, one after another
        self._lost: str | None = None  # the reason, until the connection is back
        self._heard_at = 0.0  # by the loop's clock
        self._pinged_at: float | None = None  # while there is no answer to the PING

    async def _fill(self, limit: int) -> None:
        if self._connection is None:
            await self._resubscribe()
        assert self._connection is not None
        if self._connection.may_have_to_renew:
            await self._renew(self._connection)
        try:
            if not self._ready:
                await self._read(self._connection, limit)
        except (Lost, Refused) as error:
            self._lost = str(error)
            await self._drop()
            raise BrokerUnavailable(f"lost the subscription to {self._server}: {error}") from error

    async def aclose(self) -> None:
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    # -- the connection -------------------------------------------------------------------------------------

    async def subscribe(self) -> None:
        """Connect and subscribe.

        Raises:
            BrokerUnavailable: Redis did not confirm in time, or refused.
        """
        self._binding.enter("open")
        try:
            self._connection = await self._open()
        except (Lost, Refused, TimeoutError) as error:
            why = str(error) or find_trouble(self._client) or f"no answer within {self._timeout:g} s"
            raise to_unavailable(error, self._server, f"can't subscribe at {self._server}: {why}") from error
        self._heard_at = asyncio.get_running_loop().time()
        self._pinged_at = None

    async def _open(self) -> Connection:
        """Return a new connection that is subscribed."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._timeout) as limit:
                connection = await connect_to(self._client, None)
                connection.stream_replies()
                with connection.extending(limit, self._timeout):
                    await self._subscribe(connection)
        except BaseException:
            if connection is not None:
                await connection.drop()
            raise
        return connection

    async def _renew(self, former: Connection) -> None:
        """Go on over a new connection if the credentials were renewed. What is published meanwhile comes over both."""
        if not await former.needs_successor():
            return
        try:
            connection = await self._open()
        except (Lost, Refused, TimeoutError) as error:  # the former one goes on, and a minute later it is tried again
            former.note_not_renewed(error)
            return
        try:
            async with asyncio.timeout(self._timeout):
                await former.read_out(self._add_ready)
        except (Lost, Refused, TimeoutError) as error:
            reason = f"the connection was cut before all of it was read ({str(error) or 'no answer'})"
            self._ready.append(Gap(str(self._filter), reason))
        except BaseException:  # cancelled: the former one goes on
            await connection.drop()
            raise
        self._connection = connection
        self._filter.reset()  # the subscriptions of this one may be others
        await former.drop()

    async def _subscribe(self, connection: Connection) -> None:
        self._filter.reset()
        try:
            await self._confirm(connection, b"PSUBSCRIBE", self._filter.patterns)
        except Refused as refusal:
            if refusal.code != "NOPERM" or self._filter.widest_pattern is None:
                raise
            # An ACL with &silbo:* allows exactly this pattern, and no narrower one.
            await self._confirm(connection, b"PSUBSCRIBE", [self._filter.widest_pattern])
        else:
            await self._confirm(connection, b"SUBSCRIBE", self._filter.channels)

    async def _confirm(self, connection: Connection, command: bytes, channels: list[str]) -> None:
        """Subscribe, and wait until each channel is confirmed; drop messages that come in between."""
        if not channels:
            return
        await connection.send(command, *[channel.encode() for channel in channels])
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
            self._ready.appendleft(Gap(str(self._filter), reason))
            self._lost = None

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    # -- reading --------------------------------------------------------------------------------------------

    async def _read(self, connection: Connection, limit: int) -> None:
        """Read the replies that have come; wait for one, and look after a connection that is silent."""
        replies = await connection.read_all(limit, WAIT)
        if replies:
            self._pinged_at = None
            self._heard_at = asyncio.get_running_loop().time()
            self._add_ready(replies)
            return
        now = asyncio.get_running_loop().time()
        if connection.heard_at > self._heard_at:  # also a part of a large message
            self._heard_at = connection.heard_at
            self._pinged_at = None
        # Without a PING, a connection whose other side is gone looks like one on which nothing is published.
        if self._pinged_at is not None:
            if now - self._pinged_at > self._timeout:
                raise Lost(f"no answer to a PING within {self._timeout:g} s")
        elif now - self._heard_at > self._timeout:
            self._pinged_at = now
            await connection.send(b"PING")

    def _add_ready(self, replies: Sequence[list[Any]]) -> None:
        """Make batches of the messages that are wanted, each of those that came from one channel right after one another."""
        accepts = self._filter.accepts
        raws: list[bytes] = []
        last: bytes | None = None
        for reply in replies:
            if reply[0] == b"pmessage":
                _, via, channel, raw = reply
            elif reply[0] == b"message":
                _, channel, raw = reply
                via = channel
            else:
                continue  # the answer to a PING
            if accepts(channel, via):
                if channel != last:
                    last, raws = channel, []
                    self._ready.append(Batch(channel.decode(errors="replace"), self._format, raws))
                raws.append(raw)


class _ChannelFilter:
    """The channels and patterns to subscribe to, and a filter for the messages that come.

    Redis's patterns are wider than silbo's (its ``*`` crosses dots), and a message comes once for every subscription
    that it matches. The answer for each channel is remembered.

    Attributes:
        patterns: Redis patterns, for PSUBSCRIBE.
        channels: Channels, for SUBSCRIBE.
    """

    def __init__(self, subscription: PubSubSubscription) -> None:
        self._prefix = f"{subscription.prefix}:"
        self._addresses = {f"{self._prefix}{channel}" for channel in subscription.channels}
        self._by_class = subscription.format.names == "class"  # then channels contain no event names
        self._names = [compile_pattern(pattern) for pattern in subscription.patterns]
        every = [
            channel
            for pattern in subscription.patterns
            for channel in subscription.format.channels(pattern, subscription.prefix)
        ]
        self.patterns = list(dict.fromkeys(channel for channel in every if set(channel) & set("*?[\\")))
        self.channels = list(
            dict.fromkeys([channel for channel in every if channel not in self.patterns] + [*self._addresses])
        )
        self._accepted_via: dict[bytes, bytes] = {}  # by channel: the subscription whose copy is taken, or empty

    @property
    def widest_pattern(self) -> str | None:
        """The pattern that an ACL rule ``&silbo:*`` allows; None if it does not cover every subscription."""
        is_covering = all(channel.startswith(self._prefix) for channel in self.patterns + self.channels)
        return f"{self._prefix}*" if is_covering else None

    def __str__(self) -> str:
        return ", ".join(self.patterns + self.channels)

    def accepts(self, channel: bytes, via: bytes) -> bool:
        """Return True if the message is wanted and no copy of it is taken that came ``via`` another subscription."""
        known_as = channel if len(channel) <= LONG_CHANNEL else blake2b(channel).digest()
        accepted = self._accepted_via.get(known_as)
        if accepted is None:
            if len(self._accepted_via) >= CACHED_CHANNELS:
                # The oldest: the copies of one message come right behind one another.
                del self._accepted_via[next(iter(self._accepted_via))]
            is_wanted = self._is_wanted(channel.decode(errors="replace"))
            accepted = self._accepted_via[known_as] = via if is_wanted else b""
        return accepted == via

    def reset(self) -> None:
        """Forget the answers: with other subscriptions other copies come."""
        self._accepted_via.clear()

    def _is_wanted(self, channel: str) -> bool:
        if channel in self._addresses or not channel.startswith(self._prefix):
            return True
        _, colon, name = channel.removeprefix(self._prefix).partition(":")
        return bool(colon) and (self._by_class or any(pattern.fullmatch(f"{name}.") for pattern in self._names))
