"""Redis Streams: messages are kept for a week, and every group gets them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from redis.asyncio import RedisCluster

from silbo._checks import check_address, check_seconds
from silbo._closing import AsyncCloseable
from silbo._reports import RateLimitedLog
from silbo.brokers._sender import BATCH_BYTES, BATCH_MESSAGES, OutgoingMessage
from silbo.brokers.redis.calls import CallConnection, ScriptCall
from silbo.brokers.redis.connection import Client, Lost, Refused, check_client, pack_words
from silbo.brokers.redis.group import StreamGroup, check_start
from silbo.brokers.redis.retention import (
    NOT_GIVEN,
    WEEK,
    NotGiven,
    Retention,
    RetentionPolicy,
    Trim,
    pack_keep,
)
from silbo.brokers.redis.scripts import ADD, ADD_SEQUENCED
from silbo.brokers.redis.sender import BatchScript, RedisSender, StreamsClusterSender
from silbo.brokers.redis.sharded_group import LEASE, GroupSharding
from silbo.brokers.redis.shards import FixedShards, build_shards_key, find_shards, is_like_a_shard, to_mismatch
from silbo.errors import (
    AddressInvalid,
    BrokerUnavailable,
    DeliveryUnknown,
    Fenced,
    MessageRefused,
    ShardsMismatch,
)
from silbo.message import Format, Message, own_origin
from silbo.protocols import Promises, Sequenced
from silbo.shards import build_shard_address, check_shards, place
from silbo.wire.formats import JSON

__all__ = ["DEFAULT_ADDRESS", "RedisStreams", "build_stream_key"]

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS: Final = "events"
"""The address of messages for which no route chose one."""
CLAIM_AFTER: Final = 30.0
"""Other consumers take over what a consumer has in hand that was silent for 30 seconds."""
CACHED_KEYS: Final = 1024
"""The keys of at most 1,024 addresses are remembered; then they are built anew."""
LARGEST: Final = 1 << 53
"""Lua numbers are exact integers up to 2**53."""


class RedisStreams(AsyncCloseable):
    """A publisher to one stream, ``{prefix}:{events}`` with the braces, or to ``{prefix}:{address}`` by a route.

    Every entry has one field, ``message``. For one event loop at a time: a second one gets LoopConflict until the first has
    ended. Many publishes at once become few calls to Redis, over one connection.

    Args:
        client: The program's client. silbo opens its own connections with the client's settings, and leaves the client as it is.
        app: The program's name, as consumers see it in ``event.origin.app``.
        prefix: The first part of every key.
        format: Encodes messages as bytes.
        timeout: Seconds in which a publish returns or raises. After one was missed, further publishes fail at once
            until Redis answers again.
        retain: Seconds after which an entry is removed, by Redis's clock, as others are added, in blocks of some
            hundred. None keeps everything.
        trim: ``"acknowledged"`` removes an entry sooner: about a second after every group has acknowledged it. While
            there is no group, and for a group that does not acknowledge, ``retain`` holds. ``"age"`` removes by
            ``retain`` alone.
        keep_at_least: Seconds that an acknowledged entry is kept all the same, for groups that come late.
        max_bytes: The most memory that a stream takes, as Redis estimates it; the oldest entries go first, also unread
            ones: their group gets a Gap. It is looked at once a second, and after each 4 MiB of a publisher.
        max_messages: The most entries of a stream, in the same way.
        shards: The number of shards of the default address, ``{prefix}:{events.0}`` and so on; 0 for one stream. Other addresses
            have theirs from their :class:`~silbo.bridge.Route`.

    ``retain`` to ``max_messages`` are the *retention policy* of the streams: 7 days by age if none is given. A program that gives one of them
    states a policy, also with the values of the default. It is kept beside the stream, and holds for every program; a program that
    states none follows it.

    Attributes:
        retention: The policy that this program states.

    Raises:
        AddressInvalid: the app or the prefix is not a valid name.
        ValueError: a part of the policy is out of range, or does not go with another.
    """

    promises: Final = Promises()
    has_shards: Final = True

    def __init__(
        self,
        client: Client,
        *,
        app: str,
        prefix: str = "silbo",
        format: Format = JSON,  # noqa: A002  # the word of every broker
        timeout: float = 5.0,
        retain: float | NotGiven | None = NOT_GIVEN,
        trim: Trim | None = None,
        keep_at_least: float | None = None,
        max_bytes: int | None = None,
        max_messages: int | None = None,
        shards: int = 0,
    ) -> None:
        self.retention: Final = RetentionPolicy(
            retain=WEEK if retain is NOT_GIVEN else retain,
            trim="age" if trim is None else trim,
            keep_at_least=0.0 if keep_at_least is None else keep_at_least,
            max_bytes=max_bytes,
            max_messages=max_messages,
        )
        self._shards = check_shards(shards) if shards != 0 else 0
        self._sends_to_shards = False  # true since the first message for one
        self.app: Final = check_address(app, "an app")
        self._client = check_client(client)
        self._prefix = check_address(prefix, "a prefix")
        self.format: Final = format
        self._timeout = timeout
        self._keys = _StreamKeys(prefix)
        add = BatchScript(
            ADD,
            arguments_each=1,
            first=pack_keep(self.retention),
            first_count=1,
            find_last=_pack_number_of_shards,
        )
        find_key = self._keys.key_for
        self._fixed = FixedShards(
            CallConnection(client, timeout, owner="RedisStreams"),
            lambda address: build_stream_key(address, prefix).encode(),
        )
        others = (trim, keep_at_least, max_bytes, max_messages)
        is_stated = retain is not NOT_GIVEN or any(value is not None for value in others)
        kept = Retention(self.retention if is_stated else None)
        default = self._keys.default
        if self._shards:
            default = build_stream_key(build_shard_address(DEFAULT_ADDRESS, 0), prefix).encode()
        sender = StreamsClusterSender if isinstance(client, RedisCluster) else RedisSender
        self._sender = sender(
            client,
            add,
            self._encode,
            find_key=find_key,
            prepare=self._fix_shards,
            retention=kept,
            timeout=timeout,
            owner="RedisStreams",
        )
        self._sequenced = SequencedSender(
            client,
            self._encode,
            find_key,
            default=default,
            shards=self._shards,
            fixed=self._fixed,
            retention=kept,
            timeout=timeout,
        )

    async def publish(self, *messages: Message) -> None:
        """Add the messages, in this order.

        Raises:
            MessageRefused: a message can't be sent; the others of the call were.
            BrokerUnavailable: nothing was added; safe to repeat.
            RetentionConflict: the stream has another policy than the program states; a BrokerUnavailable.
            DeliveryUnknown: some or all may have been added; to repeat may double them.
            LoopConflict: another event loop uses this broker.
            ShardsMismatch: an address has another number of shards; nothing was added.
            ShardAddressed: an address is a shard of another one; nothing was added to it.
        """
        if self._shards:
            messages = tuple(map(self._place, messages))
        try:
            await self._sender.publish(messages)
        except BrokerUnavailable as error:
            if "SHARDS" in str(error) or self._fixed.mismatches:
                await self._fixed.explain({find_shards(message, DEFAULT_ADDRESS) for message in messages}, error)
            raise

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Add the messages that the streams do not have yet, in this order: for the relay of an outbox.

        For each source and stream the hash ``{stream}:outbox`` holds ``epoch:last sequence``. The call uses a connection
        of its own.

        Args:
            source: The name of one partition of one outbox; one call at a time for each.
            epoch: The number of its leader's lead; a higher epoch fences off the lower ones.
            messages: Messages with their sequences, ascending, from 1 to 2**53. An empty list asks the default stream.

        Raises:
            Fenced: a stream has seen a newer epoch of this source; nothing was added to it.
            BrokerUnavailable: nothing was added. Safe to repeat. Where only some streams failed, the result says which
                messages are ``unsent``.
            DeliveryUnknown: some or all may have been added. Safe to repeat, in this method.
        """
        if self._shards:
            messages = [(sequence, self._place(message)) for sequence, message in messages]
        return await self._sequenced.publish(source, epoch, messages)

    def group(
        self,
        name: str,
        *,
        start: str,
        consumer: str | None = None,
        streams: Iterable[str] | None = None,
        claim_after: float | None = None,
        shards: int = 0,
    ) -> StreamGroup:
        """Describe a consumer group; a consumer opens it. Each entry goes to one consumer of the group.

        An address with shards has one consumer process at a time for each shard, and the order of each key is kept over all processes:
        see the manual, "Order per key over many processes".

        Args:
            name: The name of the group. Each group gets every message.
            start: The place where the group begins if it does not exist: ``"new"``, ``"oldest"``, or an entry's id, after
                which it begins.
            consumer: The name of this consumer in the group. By default a new name for each consumer that is
                opened. A consumer that is opened under an old name first gets the entries that the old one did not
                acknowledge. Give a name only if a restart should go on with them at once, and if two consumers can never
                have the name at the same time (a StatefulSet's pod): they would get each other's entries in hand, and both log
                a warning.
            streams: The addresses to read; ``["events"]`` by default.
            claim_after: Seconds of silence after which the group's other consumers take over what a consumer has in hand.
                A live consumer reports itself every third of that time, however long its listeners take. The entries of
                a dead consumer wait for ``claim_after`` seconds. Use the same value for all consumers of a group. By default
                30, and 3 at an address with shards, where it is the time that a lease lasts: a process whose event loop is
                blocked for longer loses its shards.
            shards: The number of shards of the addresses. By default the number that is fixed in Redis, by a publisher or another
                group; a group that may be the first to use an address with shards has to say it.

        Raises:
            AddressInvalid: the name, the consumer or a stream is not a valid name.
            StartInvalid: ``start`` is neither ``"new"``, nor ``"oldest"``, nor an entry's id.
        """
        if claim_after is not None:
            check_seconds("claim_after", claim_after)
        if shards != 0:
            check_shards(shards)
        if isinstance(streams, str):
            raise TypeError(f"streams is a list of addresses: [{streams!r}]")
        addresses = dict.fromkeys([DEFAULT_ADDRESS] if streams is None else streams)
        if not addresses:
            raise ValueError("streams names at least one address")
        return StreamGroup(
            client=self._client,
            app=self.app,
            format=self.format,
            timeout=self._timeout,
            name=check_address(name, "a group"),
            start=check_start(start),
            consumer=None if consumer is None else check_address(consumer, "a consumer"),
            keys=tuple(build_stream_key(address, self._prefix) for address in addresses),
            claim_after=CLAIM_AFTER if claim_after is None else claim_after,
            retain=self.retention.retain,
            sharding=GroupSharding(
                said={address: shards or (self._shards if address == DEFAULT_ADDRESS else 0) for address in addresses},
                find_key=lambda address: build_stream_key(address, self._prefix),
                lease=LEASE if claim_after is None else claim_after,
            ),
        )

    def address_of(self, message: Message) -> str:
        """Return the key of the stream that a message goes to.

        Raises:
            MessageRefused: the route chose something that is not an address.
        """
        return self._keys.key_for(self._place(message) if self._shards else message).decode()

    async def aclose(self) -> None:
        """Send the waiting messages, within their deadlines, and close the connections. May be called twice.

        Open groups go on.

        Raises:
            LoopConflict: another event loop uses this broker; it stays open.
        """
        try:
            await self._sender.aclose()
        finally:
            await self._sequenced.aclose()
            await self._fixed.aclose()

    def _place(self, message: Message) -> Message:
        """Return a message of the default address with its shard as its address."""
        return place(message, DEFAULT_ADDRESS, self._shards) if message.to is None else message

    async def _fix_shards(self, messages: Sequence[OutgoingMessage]) -> Sequence[OutgoingMessage]:
        """Fix the numbers of shards that the messages say; return those that may be added, and mark the others."""
        if not self._sends_to_shards:
            return messages
        wanted = {find_shards(each.message, DEFAULT_ADDRESS) for each in messages if each.message.shards}
        errors = await self._fixed.find_unfixed(wanted)
        if not errors:
            return messages
        for each in messages:
            if each.message.shards and (error := errors.get(find_shards(each.message, DEFAULT_ADDRESS))) is not None:
                each.mark_unsent(str(error))
        return [each for each in messages if each.outcome is None]

    def _encode(self, message: Message) -> bytes:
        if message.to is not None:
            self._keys.key_for(message)  # refuses what is no address
            if message.shards:
                self._sends_to_shards = True
        raw = self.format.encode(message, own_origin(self.app))
        return b"$%d\r\n%b\r\n" % (len(raw), raw)


# -- keys ---------------------------------------------------------------------------------------------------


def build_stream_key(address: str, prefix: str) -> str:
    """Return ``{prefix}:{{address}}``, as ``silbo:{events}``, the braces included.

    The braces make the address the hash tag, so that everything that belongs to a stream is in its slot. The prefix stands
    before them, so that one ACL pattern covers all keys.

    Raises:
        AddressInvalid: the address is not a valid name.
    """
    return f"{prefix}:{{{check_address(address)}}}"


def _pack_number_of_shards(message: Message) -> bytes:
    """Return the number of shards of a message's address as a packed argument: nothing for a stream without shards."""
    if message.shards:
        return pack_words([b"%d" % message.shards])
    return _NOT_OF_SHARDS if is_like_a_shard(message.to) else _NO_SHARDS


_NO_SHARDS: Final = pack_words([b""])
_NOT_OF_SHARDS: Final = pack_words([b"0"])  # it is looked if the stream is a shard, also if there are entries


class _StreamKeys:
    """The key of each message's stream."""

    def __init__(self, prefix: str) -> None:
        self.default: Final = build_stream_key(DEFAULT_ADDRESS, prefix).encode()
        self._prefix = prefix
        self._keys: dict[str, bytes] = {}

    def key_for(self, message: Message) -> bytes:
        """Return the key of the stream: of the address that a route chose, or of the default address if no route chose one.

        Raises:
            MessageRefused: the route chose something that is not an address.
        """
        if message.to is None:
            return self.default
        key = self._keys.get(message.to)
        if key is None:
            try:
                key = build_stream_key(message.to, self._prefix).encode()
            except AddressInvalid as error:
                raise MessageRefused(message.message_name, str(error)) from None
            if len(self._keys) >= CACHED_KEYS:
                self._keys.clear()
            self._keys[message.to] = key
        return key


# -- sequenced publishing -----------------------------------------------------------------------------------


class SequencedSender:
    """Adds numbered messages to streams, over a connection of its own, for one event loop at a time.

    Beside each stream a hash, ``{stream}:outbox``, holds ``epoch:last sequence`` of each source.

    Args:
        client: The program's client.
        encode: Returns a message as a packed argument; may raise MessageRefused.
        find_key: Returns the key of a message's stream.
        default: The key of the stream that is asked if there is no message.
        shards: The number of shards that this stream is one of; 0 for none.
        fixed: Fixes numbers of shards.
        retention: The retention of the streams.
        timeout: Seconds in which a publish is answered.
    """

    def __init__(
        self,
        client: Client,
        encode: Callable[[Message], bytes],
        find_key: Callable[[Message], bytes],
        *,
        default: bytes,
        shards: int,
        fixed: FixedShards,
        retention: Retention,
        timeout: float,
    ) -> None:
        self._connection = CallConnection(client, timeout, owner="RedisStreams")
        self._shards = shards
        self._fixed = fixed
        self._encode = encode
        self._find_key = find_key
        self._default = default
        self._retention = retention
        self._log = RateLimitedLog(logger, every=60.0)

    async def publish(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        """Add the messages that the streams do not have: see :class:`~silbo.protocols.SequencedPublisher`."""
        _check_sequences(epoch, messages)
        call = _SequencedCall(self._connection, source, epoch, self._retention)
        numbers, unfixed = await self._find_numbers(messages)
        if not messages:
            call.batches[self._default] = []
            if self._shards:
                if unfixed:
                    raise unfixed[DEFAULT_ADDRESS]
                call.shards[self._default] = numbers[DEFAULT_ADDRESS]
        for sequence, said in messages:
            message = self._follow(said, numbers) if numbers else said
            try:
                argument = self._encode(message)
            except MessageRefused as error:
                call.refused[sequence] = error
            else:
                if not call.has_room(argument):
                    await call.flush()
                key = self._find_key(message)
                if message.shards:
                    call.shards[key] = message.shards
                    if (mismatch := unfixed.get(find_shards(message, DEFAULT_ADDRESS)[0])) is not None:
                        call.failures[key] = mismatch
                call.add(key, sequence, argument)
        await call.flush()
        if call.failures:
            self._fixed.forget([*numbers, *unfixed])
            if learned := await self._learn(call.failures.values()):
                return await self._publish_again(call, source, epoch, messages, learned)
        if call.failures and len(call.unsent) + len(call.refused) == len(messages):
            failures = call.failures.values()
            if len({str(error) for error in failures}) == 1 or not any(
                isinstance(error, ShardsMismatch) for error in failures
            ):  # else each message has an error of its own, and a person reads that
                raise next((error for error in failures if isinstance(error, DeliveryUnknown)), next(iter(failures)))
        return Sequenced(call.known, call.refused, max(call.last.values(), default=0), call.unsent)

    async def _find_numbers(
        self, messages: Sequence[tuple[int, Message]]
    ) -> tuple[dict[str, int], dict[str, BrokerUnavailable]]:
        """Return the numbers of shards that messages are sent to, by address, and the errors of addresses that have none now.

        All messages of an address go by one number, whichever they say: they were stored before and after a change of it, or by programs
        of two versions, and those of a key keep their order.
        """
        said: dict[str, int] = {}
        if not messages and self._shards:
            said[DEFAULT_ADDRESS] = self._shards
        if self._fixed.knows_any or any(message.shards for _, message in messages):
            for _, message in messages:
                address, shards = find_shards(message, DEFAULT_ADDRESS)
                said[address] = said.get(address) or shards
        numbers: dict[str, int] = {}
        errors: dict[str, BrokerUnavailable] = {}
        for address, shards in said.items():
            try:
                if number := await self._fixed.follow(address, shards):
                    numbers[address] = number
            except BrokerUnavailable as error:
                errors[address] = error
        return numbers, errors

    def _follow(self, message: Message, numbers: Mapping[str, int]) -> Message:
        """Return the message with its shard of the number that is fixed."""
        address, said = find_shards(message, DEFAULT_ADDRESS)
        number = numbers.get(address, 0)
        if not number or number == said:
            return message
        self._log.write(
            "messages of %s in the outbox say %s, and Redis has %d: they are sent to those. Is a program that stores them still to be deployed?",
            None,
            address,
            f"{said} shards" if said else "no shards",
            number,
            address=address,
            said=said,
            fixed=number,
        )
        return place(message, address, number)

    async def _learn(self, failures: Iterable[Exception]) -> set[str]:
        """Look after the numbers of which a script has said that they are fixed; return the addresses of which one is known now."""
        learned: set[str] = set()
        for error in failures:
            if isinstance(error, ShardsMismatch) and error.fixed > 1:
                with suppress(BrokerUnavailable):
                    await self._fixed.fix(error.address, error.fixed)
                    learned.add(error.address)
        return learned

    async def _publish_again(
        self,
        call: _SequencedCall,
        source: str,
        epoch: int,
        messages: Sequence[tuple[int, Message]],
        addresses: Collection[str],
    ) -> Sequenced:
        """Publish what was not sent to these addresses to the numbers that are fixed; return the result of both calls.

        All of an address at once, whichever its error: a later message that went ahead could come to the same new shard, which would take the
        earlier one for known.
        """
        again = [
            (sequence, message)
            for sequence, message in messages
            if sequence in call.unsent and find_shards(message, DEFAULT_ADDRESS)[0] in addresses
        ]
        repeated = {sequence for sequence, _ in again}
        unsent = {sequence: error for sequence, error in call.unsent.items() if sequence not in repeated}
        answer = await self.publish(source, epoch, again)
        return Sequenced(
            known={*call.known, *answer.known},
            refused={**call.refused, **answer.refused},
            last=max(answer.last, *call.last.values(), 0),
            unsent={**unsent, **answer.unsent},
        )

    async def aclose(self) -> None:
        """Wait for the call under way, within its deadline, and close the connection. May be called twice."""
        await self._connection.aclose()


def _check_sequences(epoch: int, messages: Sequence[tuple[int, Message]]) -> None:
    above = 0
    for sequence, _ in messages:
        if not above < sequence <= LARGEST:
            raise ValueError(f"sequences ascend from 1 to 2**53, and {sequence!r} comes after {above}")
        above = sequence
    if not 0 <= epoch <= LARGEST:
        raise ValueError(f"an epoch is from 0 to 2**53, not {epoch!r}")


class _SequencedCall:
    """One call of publish_sequenced, and its progress.

    Attributes:
        batches: Sequences and packed arguments of the next flush, by stream.
        known: Sequences that the streams had already.
        refused: The errors of messages that can't be encoded, by sequence.
        last: The last sequence before this call, by stream.
        failures: The first error of each stream that has refused something, or has not answered; it gets nothing more in this
            call, for its later messages must not overtake.
        unsent: The errors of messages that were not added, or may not have been, by sequence.
        shards: The numbers of shards that the streams are among, by stream; without an entry for a stream without shards.
    """

    def __init__(self, connection: CallConnection, source: str, epoch: int, retention: Retention) -> None:
        self._connection = connection
        self._source = source
        self._epoch = epoch
        self._retention = retention
        self._head = pack_words([source.encode(), b"%d" % epoch])
        self._deadline = connection.deadline()
        self._messages = 0  # in the batches
        self._bytes = 0
        self.batches: dict[bytes, list[tuple[int, bytes]]] = {}
        self.known: set[int] = set()
        self.refused: dict[int, MessageRefused] = {}
        self.last: dict[bytes, int] = {}
        self.failures: dict[bytes, BrokerUnavailable | DeliveryUnknown] = {}
        self.unsent: dict[int, BrokerUnavailable | DeliveryUnknown] = {}
        self.shards: dict[bytes, int] = {}

    def has_room(self, argument: bytes) -> bool:
        """Return True if the message fits into the same flush."""
        return self._messages < BATCH_MESSAGES and (self._messages == 0 or self._bytes + len(argument) <= BATCH_BYTES)

    def add(self, key: bytes, sequence: int, argument: bytes) -> None:
        """Add a message to the next flush, unless the stream is known to have it.

        So a call of many flushes, when it is repeated, does not send the first ones again.
        """
        if sequence <= self.last.get(key, 0):
            self.known.add(sequence)
            return
        if key in self.failures:
            self.unsent[sequence] = self.failures[key]
            return
        self.batches.setdefault(key, []).append((sequence, argument))
        self._messages += 1
        self._bytes += len(argument)

    async def flush(self) -> None:
        """Send the batches, a script call for each stream, and wait for the replies.

        Raises:
            Fenced: one of the streams has seen a newer epoch.
            DeliveryUnknown: no stream has answered.
            BrokerUnavailable: Redis could not be reached.
        """
        batches, self.batches = self.batches, {}
        self._messages = 0
        self._bytes = 0
        await self._check_retention(batches)
        if not batches:
            return
        trims = self._retention.due_calls(
            [(key, (argument for _, argument in batch)) for key, batch in batches.items()]
        )
        calls = [self._script_call(key, batch) for key, batch in batches.items()]
        replies = await self._connection.run_all(*trims, *calls, deadline=self._deadline)
        if trims:
            self._retention.note(trims, replies[: len(trims)])
            replies = replies[len(trims) :]
        unknown: dict[bytes, DeliveryUnknown] = {}
        fenced: Fenced | None = None
        for (key, batch), reply in zip(batches.items(), replies, strict=True):
            error = self._settle(key, batch, reply)
            if isinstance(error, DeliveryUnknown):
                unknown[key] = error
            else:
                fenced = fenced or error
        if fenced is not None:
            raise fenced
        if len(unknown) == len(batches):
            raise next(iter(unknown.values()))
        for key, lost in unknown.items():  # in a cluster, nodes fail one by one: the other streams go on
            self._fail(key, [sequence for sequence, _ in batches[key]], lost)

    async def _check_retention(self, batches: dict[bytes, list[tuple[int, bytes]]]) -> None:
        """Take out the batches of streams that have another retention than the program states: they are not sent."""
        checks = self._retention.first_calls([key for key, batch in batches.items() if batch])
        if not checks:
            return
        replies = await self._connection.run_all(*checks, deadline=self._deadline)
        conflicts: dict[bytes, BrokerUnavailable] = dict(self._retention.note(checks, replies))
        for check, reply in zip(checks, replies, strict=True):
            if isinstance(reply, Lost):
                conflicts[check.keys[0]] = BrokerUnavailable(f"{reply}; not sent")
        for key, error in conflicts.items():
            self._fail(key, [sequence for sequence, _ in batches.pop(key)], error)

    def _script_call(self, key: bytes, batch: Sequence[tuple[int, bytes]]) -> ScriptCall:
        numbered = b"".join(
            [b"$%d\r\n%d\r\n%b" % (len(str(sequence)), sequence, argument) for sequence, argument in batch]
        )
        keys = [key, key + b":outbox"]
        shards = _NO_SHARDS
        if key in self.shards:
            keys.append(build_shards_key(key))
            shards = pack_words([b"%d" % self.shards[key]])
        elif is_like_a_shard(key.decode().rstrip("}")):
            keys.append(build_shards_key(key))
            shards = _NOT_OF_SHARDS
        arguments = self._retention.keep_for(key) + self._head + shards + numbered
        return ScriptCall(ADD_SEQUENCED, keys, arguments, 4 + 2 * len(batch))

    def _settle(self, key: bytes, batch: Sequence[tuple[int, bytes]], reply: Any) -> Fenced | DeliveryUnknown | None:
        """Note a stream's reply; return an error that may end the whole call."""
        refused = f"{self._connection.server} refused it, for {key.decode()}"
        if isinstance(reply, Lost):
            return DeliveryUnknown(f"{reply}; some or all may have arrived")
        if isinstance(reply, Refused):
            mismatch = to_mismatch(key, self.shards.get(key, 0), reply)
            error = mismatch or BrokerUnavailable(f"{refused}: {reply}; not sent")
            self._fail(key, [sequence for sequence, _ in batch], error)
            return None
        epoch, last, added, *errors = reply
        if epoch > self._epoch:
            return Fenced(self._source, epoch)
        self.last.setdefault(key, last)
        self.known.update(sequence for sequence, _ in batch if sequence <= last)
        if errors:
            new = [sequence for sequence, _ in batch if sequence > last]
            why = errors[0].decode(errors="replace")
            self._fail(key, new[added:], BrokerUnavailable(f"{refused}, after {added} were sent: {why}"))
        return None

    def _fail(self, key: bytes, sequences: Sequence[int], error: BrokerUnavailable | DeliveryUnknown) -> None:
        self.failures[key] = error
        self.unsent.update(dict.fromkeys(sequences, self.failures[key]))
