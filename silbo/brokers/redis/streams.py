"""Redis Streams: what was published stays for a week, and every group gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from redis.asyncio import Redis

from silbo._checks import check_address, check_seconds
from silbo._closing import AsyncCloseable
from silbo.brokers.redis.calls import Calls, ScriptCall
from silbo.brokers.redis.connection import Lost, Refused, check_client, packed
from silbo.brokers.redis.group import StreamGroup, check_start
from silbo.brokers.redis.scripts import ADD, ADD_SEQUENCED
from silbo.brokers.redis.sender import FLUSH_BYTES, FLUSH_MESSAGES, Packet, Sender
from silbo.errors import AddressInvalid, BrokerUnavailable, DeliveryUnknown, Fenced, MessageRefused
from silbo.message import Format, Message, Origin, instance
from silbo.protocols import Promises, Sequenced
from silbo.wire.formats import JSON

__all__ = ["RedisStreams", "SequencedSender", "StreamKeys", "stream_key"]

DEFAULT = "events"
CACHED = 1024


def stream_key(address: str, prefix: str) -> str:
    """``{prefix}:{{address}}``, as ``silbo:{events}``, the braces included.

    They make the address the hash tag, so that whatever belongs to a stream is in its slot; the prefix stands before
    them, so that one ACL pattern covers it all.

    Raises:
        AddressInvalid: it is no address.
    """
    return f"{prefix}:{{{check_address(address)}}}"


class StreamKeys:
    """The key of each message's stream."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._default = stream_key(DEFAULT, prefix).encode()
        self._keys: dict[str, bytes] = {}

    def of(self, message: Message) -> bytes:
        """The default stream's, or the one of the address that a route chose.

        Raises:
            MessageRefused: what it chose is no address.
        """
        if message.to is None:
            return self._default
        key = self._keys.get(message.to)
        if key is None:
            try:
                key = stream_key(message.to, self._prefix).encode()
            except AddressInvalid as error:
                raise MessageRefused(message.message_name, str(error)) from None
            if len(self._keys) >= CACHED:
                self._keys.clear()
            self._keys[message.to] = key
        return key


LARGEST: Final = 1 << 53
"""What a number in a script is exact up to."""


class SequencedSender:
    """Adds numbered messages to streams, over a connection of its own, for one event loop at a time.

    Beside each stream a hash, ``{stream}:outbox``, holds ``epoch:last sequence`` of each source.

    Args:
        client: The user's.
        pack: A message as its stream's key and the script's argument; may raise MessageRefused.
        default: The key of the stream that is asked where there is no message.
        keep: Milliseconds that entries are kept, as text; empty for ever.
        timeout: Seconds in which a publish is answered.
    """

    def __init__(
        self, client: Redis, pack: Callable[[Message], Packet], *, default: bytes, keep: bytes, timeout: float
    ) -> None:
        self._calls = Calls(client, timeout)
        self._pack, self._default, self._keep = pack, default, keep

    async def publish(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """See :class:`~silbo.protocols.SequencedPublisher`."""
        _check(epoch, messages)
        sending = _Sending(self._calls, source, epoch, self._keep)
        if not messages:
            sending.batches[self._default] = []
        for sequence, message in messages:
            try:
                key, argument = self._pack(message)
            except MessageRefused as error:
                sending.refused[sequence] = error
            else:
                if not sending.has_room(argument):
                    await sending.flush()
                sending.put(key, sequence, argument)
        await sending.flush()
        return Sequenced(sending.known, sending.refused, max(sending.last.values(), default=0))

    async def aclose(self) -> None:
        """Wait for what is under way, within its deadline, and close the connection."""
        await self._calls.aclose()


def _check(epoch: int, messages: Sequence[tuple[int, Message]]) -> None:
    above = 0
    for sequence, _ in messages:
        if not above < sequence <= LARGEST:
            raise ValueError(f"sequences ascend from 1 to 2**53, and {sequence!r} comes after {above}")
        above = sequence
    if not 0 <= epoch <= LARGEST:
        raise ValueError(f"an epoch is from 0 to 2**53, not {epoch!r}")


class _Sending:
    """One call of publish, and how far it is."""

    def __init__(self, calls: Calls, source: str, epoch: int, keep: bytes) -> None:
        self._calls, self._source, self._epoch = calls, source, epoch
        self._head = packed([keep, source.encode(), b"%d" % epoch])
        self._deadline = calls.deadline()
        self._count = self._size = 0
        self.batches: dict[bytes, list[tuple[int, bytes]]] = {}  # by stream: sequences and arguments
        self.known: set[int] = set()
        self.refused: dict[int, MessageRefused] = {}
        self.last: dict[bytes, int] = {}  # by stream: before this call

    def has_room(self, argument: bytes) -> bool:
        """Whether this one goes into the same flush."""
        return self._count < FLUSH_MESSAGES and (self._count == 0 or self._size + len(argument) <= FLUSH_BYTES)

    def put(self, key: bytes, sequence: int, argument: bytes) -> None:
        """Take one more, unless it is known that the stream has it: a repeated call of many flushes gets further."""
        if sequence <= self.last.get(key, 0):
            self.known.add(sequence)
            return
        self.batches.setdefault(key, []).append((sequence, argument))
        self._count += 1
        self._size += len(argument)

    async def flush(self) -> None:
        """Send what was taken, a script call for each stream, and wait for the answers.

        Raises:
            Fenced: one of the streams has seen a newer epoch.
            DeliveryUnknown: an answer did not come.
            BrokerUnavailable: Redis refused something, or could not be reached.
        """
        batches, self.batches = self.batches, {}
        self._count = self._size = 0
        if not batches:
            return
        calls = [self._call(key, batch) for key, batch in batches.items()]
        replies = await self._calls.run(ADD_SEQUENCED, *calls, deadline=self._deadline)
        failures: list[Exception] = []
        for (key, batch), reply in zip(batches.items(), replies, strict=True):
            if (failure := self._settle(key, batch, reply)) is not None:
                failures.append(failure)
        for kind in (Fenced, DeliveryUnknown, BrokerUnavailable):
            for failure in failures:
                if isinstance(failure, kind):
                    raise failure

    def _call(self, key: bytes, batch: Sequence[tuple[int, bytes]]) -> ScriptCall:
        numbered = b"".join([b"%b%b" % (packed([b"%d" % sequence]), argument) for sequence, argument in batch])
        return ScriptCall([key, key + b":outbox"], self._head + numbered, 3 + 2 * len(batch))

    def _settle(self, key: bytes, batch: Sequence[tuple[int, bytes]], reply: Any) -> Exception | None:
        """Take in what a stream answered; why something of it was not added."""
        server = self._calls.server
        if isinstance(reply, Lost):
            return DeliveryUnknown(f"{reply}; some or all may have arrived")
        if isinstance(reply, Refused):
            return BrokerUnavailable(f"{server} refused it, for {key.decode()}: {reply}; not sent")
        epoch, last, added, *error = reply
        if epoch > self._epoch:
            return Fenced(self._source, epoch)
        self.last.setdefault(key, last)
        self.known.update(sequence for sequence, _ in batch if sequence <= last)
        if error:
            why = error[0].decode(errors="replace")
            return BrokerUnavailable(f"{server} refused it, for {key.decode()}, after {added} were sent: {why}")
        return None


class RedisStreams(AsyncCloseable):
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

    def _pack(self, message: Message) -> Packet:
        raw = self._format.encode(message, Origin(self.app, instance()))
        return self._keys.of(message), b"$%d\r\n%b\r\n" % (len(raw), raw)
