"""Redis Streams: what was published stays for a week, and every group gets it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Self

from redis.asyncio import Redis

from silbo._checks import check_seconds
from silbo.brokers.redis.address import DEFAULT, StreamKeys, stream_key
from silbo.brokers.redis.connection import check_client, packed
from silbo.brokers.redis.group import StreamGroup, check_start
from silbo.brokers.redis.line import Packet
from silbo.brokers.redis.scripts import ADD
from silbo.brokers.redis.sender import Sender
from silbo.brokers.redis.sequenced import SequencedSender
from silbo.message import Message, Origin, instance
from silbo.protocols import Format, Promises, Sequenced
from silbo.routing import check_address
from silbo.wire.formats import JSON

__all__ = ["RedisStreams"]


class RedisStreams:
    """Adds to one stream, ``{prefix}:{events}`` with the braces, or to ``{prefix}:{address}`` by a route.

    Every entry has one field, ``message``. For one event loop at a time, in its thread; loops may follow one
    another. Many publishes at once become few calls to Redis, over one connection.

    Args:
        client: The program's own. silbo opens connections of its own from its settings and leaves it as it is.
        app: The program's name, as consumers see it in ``event.origin.app``.
        prefix: The first part of every key.
        format: How messages look as bytes.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once
            until Redis answers again.
        retain: Seconds that an entry is kept at least, by Redis's clock; older ones go as others are added, in
            blocks of some hundred. None keeps everything.
    """

    promises: Final = Promises()

    def __init__(
        self,
        client: Redis,
        *,
        app: str,
        prefix: str = "silbo",
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
        retain: float | None = 7 * 24 * 3600,
    ) -> None:
        if retain is not None and not retain > 0:
            raise ValueError(f"retain is seconds, more than 0, or None to keep everything, not {retain!r}")
        self.app: Final = check_address(app, "an app")
        self._client, self._prefix, self._format = check_client(client), check_address(prefix, "a prefix"), format
        self._timeout, self._keys, self._retain = timeout, StreamKeys(prefix), retain
        keep = b"" if retain is None else b"%d" % int(retain * 1000)
        self._sender = Sender(self._client, ADD, self._pack, each=1, first=(packed([keep]), 1), timeout=timeout)
        self._sequenced = SequencedSender(
            self._client, self._pack, default=stream_key(DEFAULT, prefix).encode(), keep=keep, timeout=timeout
        )

    async def publish(self, *messages: Message) -> None:
        """Add the messages, in this order.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was added; safe to repeat.
            DeliveryUnknown: some or all may have been added.
        """
        await self._sender.publish(messages)

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Add what the streams do not have yet, in this order: for the relay of an outbox.

        For each source and stream the hash ``{stream}:outbox`` holds ``epoch:last sequence``. Goes over a connection of
        its own.

        Args:
            source: Names one partition of one outbox; one call at a time for each.
            epoch: Of its leader.
            messages: With their sequences, ascending, from 1 to 2**53; none asks the default stream.

        Raises:
            Fenced: a stream has seen a newer epoch of this source; nothing was added to it.
            BrokerUnavailable: some may have been added. Safe to repeat.
            DeliveryUnknown: some or all may have been added. Safe to repeat, in this method.
        """
        return await self._sequenced.publish(source, epoch, messages)

    def group(
        self,
        name: str,
        *,
        start: str,
        consumer: str | None = None,
        streams: Iterable[str] | None = None,
        claim_after: float = 30.0,
    ) -> StreamGroup:
        """A description of a consumer group, for a consumer: each entry goes to one of the group.

        Args:
            name: The group's; groups of different names each get everything.
            start: Where the group begins, if it does not exist: ``"new"``, ``"oldest"``, or after an entry's id.
            consumer: The name of this one in the group; what it did not acknowledge it gets again under the same
                name. By default another in each process and each time: two under one name would get each other's
                entries in hand. Name it where a restart should go on at once with what was in hand, and where it is
                sure that no two run at the same time (a StatefulSet's pod).
            streams: Addresses; ``["events"]`` by default.
            claim_after: Seconds of silence after which the group's others take over what a consumer has in hand. A
                consumer that lives says so at a third of it, however long its listeners take; so it is what a dead
                one costs. The same for all of a group.

        Raises:
            AddressInvalid: one of these is no name.
            StartInvalid: ``start`` is none of that.
        """
        check_seconds("claim_after", claim_after)
        if isinstance(streams, str):
            raise TypeError(f"streams is a list of addresses: [{streams!r}]")
        addresses = list(dict.fromkeys([DEFAULT] if streams is None else streams))
        if not addresses:
            raise ValueError("streams names at least one address")
        return StreamGroup(
            self._client,
            self.app,
            self._format,
            self._timeout,
            check_address(name, "a group"),
            check_start(start),
            None if consumer is None else check_address(consumer, "a consumer"),
            tuple(stream_key(address, self._prefix) for address in addresses),
            claim_after,
            self._retain,
        )

    async def aclose(self) -> None:
        """Send what waits, within its deadlines, and close the connections. May be called twice; groups go on."""
        try:
            await self._sender.aclose()
        finally:
            await self._sequenced.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _pack(self, message: Message) -> Packet:
        raw = self._format.encode(message, Origin(self.app, instance()))
        return self._keys.of(message), b"$%d\r\n%b\r\n" % (len(raw), raw)
