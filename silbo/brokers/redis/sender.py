"""The part of publishing that is Redis's: a batch is one script call for each stream.

With one server all calls go over one connection. In a cluster each stream, or sharded channel, has a queue of its own, so
that a node that is not there holds up its own alone.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from silbo._retry import Backoff
from silbo.brokers._sender import OutgoingMessage, PublishCall, Sender, mark_all_sent
from silbo.brokers.redis.calls import UNANSWERED, Call, CallConnection, DeclaringCall, ScriptCall, run_calls
from silbo.brokers.redis.connection import Client, Connection, Lost, Refused, describe_server, find_trouble
from silbo.brokers.redis.failures import Unreached
from silbo.brokers.redis.nodes import connect_to
from silbo.brokers.redis.retention import Retention
from silbo.brokers.redis.scripts import Script
from silbo.brokers.redis.shards import build_shards_key, is_like_a_shard
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.message import Message

__all__ = ["BatchScript", "ClusterSender", "MarkedCall", "RedisSender", "StreamsClusterSender"]

RECONNECT: Final = Backoff(initial=0.02, cap=0.5)
"""The delays between two attempts to connect."""


_Batch: TypeAlias = tuple[Sequence[bytes], Sequence[OutgoingMessage]]
"""The keys of a call, and its messages."""


class BatchScript(NamedTuple):
    """A script that carries out a batch, and the form of its arguments.

    Attributes:
        script: Replies with what failed: ``position, error, ...``.
        arguments_each: The number of arguments for one message.
        first: The arguments before those of the messages, as they stand in a Redis command.
        first_count: The number of arguments in ``first``.
        find_last: Returns one more argument before those of the messages, of any message of the call.
    """

    script: Script
    arguments_each: int
    first: bytes = b""
    first_count: int = 0
    find_last: Callable[[Message], bytes] | None = None


class BatchCall(DeclaringCall):
    """One call of the script: all messages of a batch that go to one stream, or all that go to Pub/Sub."""

    __slots__ = ("_is_written", "_messages", "_script")

    def __init__(self, script: BatchScript, keys: Sequence[bytes], messages: Sequence[OutgoingMessage]) -> None:
        self._script = script
        self._messages = messages
        self._is_written = False
        first = messages[0].message
        checks_shards = bool(keys) and (first.shards or is_like_a_shard(first.to))
        self.keys = (*keys, build_shards_key(keys[0])) if checks_shards else keys
        self.reply = UNANSWERED

    def pack(self, *, by_source: bool) -> bytes:
        """See :class:`~silbo.brokers.redis.calls.Call`."""
        self._is_written = True
        script, each, first, first_count, find_last = self._script
        if find_last is not None:
            first += find_last(self._messages[0].message)
            first_count += 1
        arguments = first + b"".join([outgoing.raw for outgoing in self._messages])
        count = first_count + each * len(self._messages)
        return script.pack_call(self.keys, arguments, count, by_source=by_source)

    def mark_outcomes(self, server: str) -> None:
        """Mark the outcome of each message; without a reply, that it was handed over, if it was."""
        reply = self.reply
        if reply == []:  # nothing failed
            mark_all_sent(self._messages)
        elif reply is UNANSWERED:
            for outgoing in self._messages:
                outgoing.is_handed_over = self._is_written
        elif isinstance(reply, Refused):
            for outgoing in self._messages:
                outgoing.mark_unsent(f"{server} refused it: {reply}")
        else:
            failures = dict(zip(reply[::2], reply[1::2], strict=True))
            for position, outgoing in enumerate(self._messages, 1):
                if position in failures:
                    outgoing.mark_unsent(f"{server} refused it: {failures[position].decode(errors='replace')}")
                else:
                    outgoing.mark_sent()


class RedisSender(Sender):
    """Sends published messages over one connection of silbo's own.

    After a message that was not sent, the others of its call are not sent either.

    Args:
        client: The program's client.
        script: Carries out a batch.
        encode: Returns a message as packed arguments of the script; may raise MessageRefused.
        find_key: Returns the key of a message's stream. None for Pub/Sub.
        prepare: Called before each batch: returns the messages that may go, and marks the others.
        retention: The retention of the streams; None for Pub/Sub.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
    """

    def __init__(
        self,
        client: Client,
        script: BatchScript,
        encode: Callable[[Message], bytes],
        *,
        find_key: Callable[[Message], bytes] | None = None,
        prepare: Callable[[Sequence[OutgoingMessage]], Awaitable[Sequence[OutgoingMessage]]] | None = None,
        retention: Retention | None = None,
        timeout: float,
        owner: str,
    ) -> None:
        self._client = client
        self._server = describe_server(client)
        self._script = script
        self._find_key = find_key
        self._prepare = prepare
        self._retention = retention
        super().__init__(
            self._server,
            self._send,
            encode,
            timeout=timeout,
            owner=owner,
            connect=self._connect,
            explain=lambda: find_trouble(client) or self._trouble,
            order_of=_call_of,
            forget=self._forget_connection,
        )

    def _forget_connection(self) -> None:
        self._connection: Connection | None = None
        self._trouble = ""  # of the last connection

    async def aclose(self) -> None:
        """Answer every waiting publish, within its deadline, and close the connection: see :class:`Sender`."""
        self.check_loop("aclose")
        try:
            await super().aclose()
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.aclose()

    async def _connect(self) -> None:
        """Return as soon as there is a connection that can be used.

        Raises:
            ConnectionError: wrong credentials, or no such database; waiting does not help.
        """
        if self._connection is not None:
            if await self._connection.is_usable():
                return
            await self._disconnect()
        attempt = 0
        while self._connection is None:
            attempt += 1
            try:
                self._connection = await connect_to(self._client, None)
                self._trouble = ""
            except Lost as error:
                self._trouble = str(error)
                await asyncio.sleep(RECONNECT.delay(attempt) or 0)
            except Refused as refusal:
                raise ConnectionError(f"it refused the connection: {refusal}") from refusal

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        """Send a batch: a script call for each stream, all in one write."""
        assert self._connection is not None
        if self._prepare is not None:
            messages = await self._prepare(messages)
            if not messages:
                return
        calls: list[BatchCall] = []
        is_usable = False
        try:
            batches = self._group(messages)
            trims: list[ScriptCall] = []
            if self._retention is not None:
                batches = await self._check_retention(self._retention, self._connection, batches)
                trims = self._retention.due_calls(_raws_of(batches))
            calls = [
                BatchCall(_fit_script(self._script, self._retention, keys), keys, its_messages)
                for keys, its_messages in batches
            ]
            await run_calls(self._connection, [*trims, *calls])
            if trims and self._retention is not None:
                self._retention.note(trims, [trim.reply for trim in trims])
            is_usable = not any(isinstance(call.reply, Refused) and call.reply.is_demotion for call in calls)
        except Lost as error:
            self._trouble = str(error)
            raise ConnectionError(f"the connection broke: {error}") from error
        finally:
            for call in calls:
                call.mark_outcomes(self._server)
            if not is_usable:
                await self._disconnect()

    async def _check_retention(
        self, retention: Retention, connection: Connection, batches: Sequence[_Batch]
    ) -> Sequence[_Batch]:
        """Return the batches of streams that have the program's retention; the messages of the others are not sent."""
        checks = retention.first_calls([keys[0] for keys, _ in batches])
        if not checks:
            return batches
        await run_calls(connection, checks)
        conflicts = retention.note(checks, [check.reply for check in checks])
        for keys, its_messages in batches:
            if keys[0] in conflicts:
                for outgoing in its_messages:
                    outgoing.mark_unsent(conflicts[keys[0]])
        return [batch for batch in batches if batch[0][0] not in conflicts]

    def _group(self, messages: Sequence[OutgoingMessage]) -> Sequence[_Batch]:
        """Return the messages of each stream with its key; those of Pub/Sub without one."""
        if self._find_key is None:
            return [((), messages)]
        by_address: dict[str | None, list[OutgoingMessage]] = {}
        for outgoing in messages:
            address = outgoing.message.to
            if address in by_address:
                by_address[address].append(outgoing)
            else:
                by_address[address] = [outgoing]
        return [((self._find_key(its_messages[0].message),), its_messages) for its_messages in by_address.values()]


def _fit_script(script: BatchScript, retention: Retention | None, keys: Sequence[bytes]) -> BatchScript:
    """Return the script for a stream: where the stream keeps its entries for another time than the program states, with that."""
    if retention is None or (keep := retention.keep_for(keys[0])) == script.first:
        return script
    return script._replace(first=keep)


def _raws_of(batches: Sequence[_Batch]) -> list[tuple[bytes, Iterable[bytes]]]:
    """Return the key of each stream with the encoded messages that go to it, which few look at."""
    return [(keys[0], (outgoing.raw for outgoing in its_messages)) for keys, its_messages in batches]


class MarkedCall(Call, Protocol):
    """A call that sends messages, and marks their outcomes."""

    def mark_outcomes(self, server: str) -> None:
        """Mark the outcome of each message; without a reply, that it was handed over, if it was."""
        ...


class ClusterSender(Sender):
    """Sends published messages to the nodes of a cluster: a queue for each key, over one connection to each node.

    The batches of a key follow one another, also where its slot moves from node to node; those of different keys go side by
    side. A key whose node is not there is tried again until the deadline of the oldest message.

    Args:
        client: The program's client.
        kind: The word for a key in errors: stream or channel.
        encode: Returns a message as packed arguments of its call; may raise MessageRefused.
        find_key: Returns the key that a message goes to; may raise MessageRefused.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
    """

    def __init__(
        self,
        client: Client,
        kind: str,
        encode: Callable[[Message], bytes],
        *,
        find_key: Callable[[Message], bytes],
        timeout: float,
        owner: str,
    ) -> None:
        self.connection: Final = CallConnection(client, timeout, owner=owner)
        self._find_key = find_key
        self._trouble = ""
        super().__init__(
            f"{self.connection.server}, {kind}",
            self._send,
            encode,
            timeout=timeout,
            owner=owner,
            default=kind,
            explain=lambda: find_trouble(client) or self._trouble,
            order_of=_call_of,
        )

    @abstractmethod
    async def build_calls(self, key: bytes, messages: Sequence[OutgoingMessage]) -> Sequence[MarkedCall]:
        """Return the calls that send the messages, in this order; messages that may not go are marked."""

    def address_of(self, message: Message) -> str:
        """Return the key that a message goes to."""
        try:
            return self._find_key(message).decode()
        except MessageRefused:  # it is refused again when it is encoded
            return ""

    async def aclose(self) -> None:
        """Answer every waiting publish, within its deadline, and close the connections: see :class:`Sender`."""
        self.check_loop("aclose")
        try:
            await super().aclose()
        finally:
            await self.connection.aclose()

    async def _send(self, address: str, messages: Sequence[OutgoingMessage]) -> None:
        """Send a batch of one key to the node that serves it, as soon as that can be reached."""
        calls = await self.build_calls(address.encode(), messages)
        replies: list[Any] = []
        attempt = 0
        try:
            while len(replies) < len(calls):
                try:
                    replies = await self.connection.run_all(*calls, deadline=messages[0].deadline)
                except BrokerUnavailable as error:  # nothing was done
                    if not isinstance(error.__cause__, Unreached):
                        raise ConnectionError(str(error)) from error
                    self._trouble = str(error)
                    attempt += 1
                    await asyncio.sleep(RECONNECT.delay(attempt) or 0)
        finally:
            for call in calls:
                call.mark_outcomes(self.connection.server)
        self._trouble = next((str(reply) for reply in replies if isinstance(reply, Lost)), "")
        if self._trouble:
            raise ConnectionError(self._trouble)


class StreamsClusterSender(ClusterSender):
    """Sends published messages to the streams of a cluster.

    Args:
        client: The program's client.
        script: Carries out a batch.
        encode: Returns a message as packed arguments of the script; may raise MessageRefused.
        find_key: Returns the key of a message's stream; may raise MessageRefused.
        prepare: Called before each batch: returns the messages that may go, and marks the others.
        retention: The retention of the streams.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
    """

    def __init__(
        self,
        client: Client,
        script: BatchScript,
        encode: Callable[[Message], bytes],
        *,
        find_key: Callable[[Message], bytes],
        prepare: Callable[[Sequence[OutgoingMessage]], Awaitable[Sequence[OutgoingMessage]]],
        retention: Retention,
        timeout: float,
        owner: str,
    ) -> None:
        self._script = script
        self._prepare = prepare
        self._retention = retention
        super().__init__(client, "stream", encode, find_key=find_key, timeout=timeout, owner=owner)

    async def build_calls(self, key: bytes, messages: Sequence[OutgoingMessage]) -> Sequence[MarkedCall]:
        """Return one call of the script."""
        messages = await self._prepare(messages)
        if not messages or not await self._check_retention(key, messages):
            return []
        return [BatchCall(_fit_script(self._script, self._retention, [key]), [key], messages)]

    async def _check_retention(self, key: bytes, messages: Sequence[OutgoingMessage]) -> bool:
        """Look after the stream's retention, if it is time to; False if it is another one: then nothing may be sent."""
        calls = self._retention.first_calls([key]) or self._retention.due_calls(_raws_of([((key,), messages)]))
        if not calls:
            return True
        try:
            replies = await self.connection.run_all(*calls, deadline=messages[0].deadline)
        except BrokerUnavailable:  # which the publish itself will tell
            return True
        conflict = self._retention.note(calls, replies).get(key)
        if conflict is not None:
            for outgoing in messages:
                outgoing.mark_unsent(conflict)
        return conflict is None


def _call_of(outgoing: OutgoingMessage) -> PublishCall:
    return outgoing.call
