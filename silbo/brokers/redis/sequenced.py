"""What an outbox sends to its streams: each message once, however often it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from redis.asyncio import Redis

from silbo.brokers.redis.calls import Calls, ScriptCall
from silbo.brokers.redis.connection import Lost, Refused, packed
from silbo.brokers.redis.line import FLUSH_BYTES, FLUSH_MESSAGES, Packet
from silbo.brokers.redis.scripts import ADD_SEQUENCED
from silbo.errors import BrokerUnavailable, DeliveryUnknown, Fenced, MessageRefused
from silbo.message import Message
from silbo.protocols import Sequenced

__all__ = ["SequencedSender"]

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
