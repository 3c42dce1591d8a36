"""The coalescing sender: many publishes, one script call, one connection.

A publish puts its messages into a queue and waits. A task, which lives while there is something to send, takes up to 500
messages or 1 MiB at a time and sends them as one script call per stream; only when Redis has answered does it take the
next. So the more is published at once, the less each message costs.

A publish that is not answered within its deadline makes the sender *silent*: every waiting publish gets an error, and so
does every further one at once, until a new connection is answered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple, NoReturn, TypeAlias

from redis.asyncio import Redis

from silbo._checks import check_seconds
from silbo._loops import LoopBinding
from silbo._retry import Backoff
from silbo.brokers._sender import add_refusal, build_publish_error
from silbo.brokers.redis.calls import UNANSWERED, run_calls
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, describe_server, find_trouble
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.message import Message

__all__ = ["FLUSH_BYTES", "FLUSH_MESSAGES", "BatchScript", "EncodedMessage", "RedisSender"]

FLUSH_MESSAGES: Final = 500
"""A flush has at most 500 messages."""
FLUSH_BYTES: Final = 1 << 20
"""A flush has at most 1 MiB. A larger message goes alone: 500 of 100 kB would block Redis for 141 ms."""
QUEUE_MESSAGES: Final = 10_000
"""The queue is full with 10,000 messages. The call that exceeds the limit goes in whole; a later publish waits for room."""
QUEUE_BYTES: Final = 16 << 20
"""The queue is full with 16 MiB of encoded messages."""
BURST: Final = 32
"""If 32 or more messages are queued while nothing is under way, the first flush takes half of them. From then on Redis
works on one half while the other is being encoded (a third faster at 100 publishers than all in one flush)."""
LATE: Final = 0.05
"""A message is not sent when less than this share of the timeout is left: its result would likely be unknown."""
PROBE_FOR: Final = 60.0
"""A silent Redis is probed for 60 seconds after the last publish; then the next publish waits for it itself."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.5)
"""The delays between two attempts to connect."""

EncodedMessage: TypeAlias = "tuple[bytes, bytes]"
"""The stream's key (empty for Pub/Sub) of one message, and its packed arguments of the script."""


class PublishCall:
    """One call of ``publish``, and the progress of its messages.

    Attributes:
        messages: The number of its messages.
        answered: Done when every message of the call is settled, or when the caller has gone away.
        deadline: The loop's time at which the call is answered at the latest.
        sent: The number of messages that Redis has.
        failure: The reason why messages failed.
        is_unknown: True if Redis may have messages that failed.
    """

    __slots__ = ("answered", "deadline", "failure", "is_unknown", "messages", "sent")

    def __init__(self, messages: int, answered: asyncio.Future[None], deadline: float) -> None:
        self.messages = messages
        self.answered = answered
        self.deadline = deadline
        self.sent = 0
        self.failure: str | None = None
        self.is_unknown = False

    def answer(self) -> None:
        """Let the caller go on, unless that was done or the caller has gone away."""
        if not self.answered.done():
            if self.failure is None:
                self.answered.set_result(None)
            else:
                self.answered.set_exception(
                    build_publish_error(
                        self.failure, messages=self.messages, sent=self.sent, is_unknown=self.is_unknown
                    )
                )


class BatchScript(NamedTuple):
    """A script that carries out a batch, and the form of its arguments.

    Attributes:
        script: Replies with what failed: ``position, error, ...``.
        arguments_each: The number of arguments for one message.
        first: The arguments before those of the messages, as they stand in a Redis command.
        first_count: The number of arguments in ``first``.
    """

    script: Script
    arguments_each: int
    first: bytes = b""
    first_count: int = 0


class Batch:
    """The messages of one call of the script: all that go to one stream in one flush, or all that go to Pub/Sub."""

    __slots__ = ("_script", "arguments", "calls", "key", "reply")

    def __init__(self, key: bytes, script: BatchScript) -> None:
        self._script = script
        self.key = key
        self.arguments: list[bytes] = []  # of each message
        self.calls: list[PublishCall] = []  # of each message
        self.reply: Any = UNANSWERED

    @property
    def keys(self) -> Sequence[bytes]:
        """The keys that the call uses."""
        return [self.key] if self.key else []

    def pack(self, *, by_source: bool) -> bytes:
        """Return the script call as the Redis protocol writes it."""
        script, each, first, first_count = self._script
        arguments = first + b"".join(self.arguments)
        count = first_count + each * len(self.arguments)
        return script.pack_call(self.keys, arguments, count, by_source=by_source)

    def settle(self, server: str, unanswered: str) -> bool:
        """Note the outcome of each message in its call, and answer the calls of which all are sent.

        Args:
            server: The server's description, for the text of a failure.
            unanswered: The reason why there is no reply, if there is none.

        Returns:
            False if a message failed: the caller answers its call when all batches are settled.
        """
        reply = self.reply
        if reply == []:  # nothing failed
            for call in self.calls:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
            return True
        failures = dict(zip(reply[::2], reply[1::2], strict=True)) if isinstance(reply, list) else {}
        for position, call in enumerate(self.calls, 1):
            if reply is UNANSWERED:
                call.failure = unanswered
                call.is_unknown = True
            elif isinstance(reply, Refused):
                call.failure = f"{server} refused it: {reply}"
            elif position in failures:
                call.failure = f"{server} refused it: {failures[position].decode(errors='replace')}"
            else:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
        return False


class RedisSender:
    """Sends published messages over one connection, for one event loop at a time: see :class:`~silbo._loops.LoopBinding`.

    Args:
        client: The program's client.
        script: Carries out a batch.
        encode: Returns a message encoded; may raise MessageRefused.
        timeout: Seconds in which a publish is answered.
        owner: The name of the broker's class, for errors.
    """

    def __init__(
        self,
        client: Redis,
        script: BatchScript,
        encode: Callable[[Message], EncodedMessage],
        *,
        timeout: float,
        owner: str,
    ) -> None:
        self._client = client
        self._server = describe_server(client)
        self._script = script
        self._encode = encode
        self._timeout = check_seconds("timeout", timeout)
        self._binding = LoopBinding(owner, is_busy=self._is_busy, forget=self._reset)
        self._closed = False
        self._reset()

    def _is_busy(self) -> bool:
        return self._task is not None and not self._task.done()

    def _reset(self) -> None:
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._queue = SendQueue(self._script)  # empty while Redis is silent
        self._in_flight: list[Batch] = []  # sent, not settled
        self._silent_since: datetime | None = None
        self._last_asked = 0.0  # the loop's time when a publish last met a silent Redis
        self._trouble = ""  # of the last connection

    # -- publish --------------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message]) -> None:
        """Send the messages, in this order: see :class:`~silbo.protocols.Publisher`."""
        refused: MessageRefused | None = None
        if len(messages) == 1:  # as the bridge publishes
            encoded = [self._encode(messages[0])]
        else:
            encoded, refused = self._encode_all(messages)
        if encoded:
            loop = asyncio.get_running_loop()
            if loop is not self._binding.loop:
                self._binding.enter("publish")
            if self._closed:
                raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
            if self._silent_since is not None:
                self._refuse()
            call = PublishCall(len(encoded), loop.create_future(), loop.time() + self._timeout)
            if not self._queue.has_room():
                encoded = await self._wait_for_room(call, encoded, messages)
            self._queue.append(call, encoded)
            if self._task is None or self._task.done():
                self._task = loop.create_task(self._run(), context=Context())
            await call.answered
        if refused is not None:
            raise refused

    def _encode_all(self, messages: Sequence[Message]) -> tuple[list[EncodedMessage], MessageRefused | None]:
        encoded: list[EncodedMessage] = []
        refused: MessageRefused | None = None
        for message in messages:
            try:
                encoded.append(self._encode(message))
            except MessageRefused as error:
                refused = add_refusal(refused, error)
        return encoded, refused

    async def _wait_for_room(
        self, call: PublishCall, encoded: list[EncodedMessage], messages: Sequence[Message]
    ) -> list[EncodedMessage]:
        """Wait for room in the queue. A waiting call must not take memory: its messages are encoded again."""
        size = sum([len(arguments) for _, arguments in encoded])
        encoded.clear()
        await self._queue.wait_for_room(call.messages, size, call.deadline)
        if self._silent_since is not None:
            self._refuse()
        return self._encode_all(messages)[0]

    def _refuse(self) -> NoReturn:
        self._last_asked = asyncio.get_running_loop().time()
        raise BrokerUnavailable(f"{self._silence()}; not sent")

    def _silence(self) -> str:
        trouble = f" ({self._trouble})" if self._trouble else ""
        return f"{self._server} has not answered since {self._silent_since:%H:%M:%S} UTC{trouble}"

    async def aclose(self) -> None:
        """Answer every waiting publish, within its deadline, and close the connection. May be called twice.

        Raises:
            LoopConflict: another event loop uses it; it stays open.
        """
        self._binding.enter("aclose")
        self._closed = True
        try:
            while self._queue.is_awaited or self._is_busy():
                if self._silent_since is not None and self._task is not None:
                    self._task.cancel()
                if self._task is not None:
                    await asyncio.wait([self._task])
                await asyncio.sleep(0)  # a publish that was given room goes on, and starts a new task
        finally:
            if self._task is not None:
                self._task.cancel()
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.aclose()

    # -- the task -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Send until the queue is empty; while Redis is silent, probe it."""
        self._begun = False
        try:
            while self._queue or (self._silent_since is not None and not self._closed):
                try:
                    await (self._flush() if self._silent_since is None else self._probe())
                except TimeoutError:
                    await self._become_silent()
                except Refused as refusal:
                    self._queue.fail(f"{self._server} refused the connection: {refusal}")
        except BaseException as error:  # cancelled, or a defect: every waiting caller gets the error
            self._settle(f"the sender was ended by {error!r}")
            self._queue.fail(f"the sender was ended by {error!r}")
            self._silent_since = None
            await self._disconnect()
            raise

    async def _flush(self) -> None:
        """Send the next batches, one for each stream, and settle them.

        Raises:
            TimeoutError: the oldest message's deadline has passed.
            Refused: there is no connection, and waiting for one does not help.
        """
        if self._connection is None or await self._connection.has_unread():
            await self._disconnect()
            if (first := self._queue.first()) is None:
                return
            async with asyncio.timeout_at(first.deadline):
                await self._connect()
        assert self._connection is not None
        latest = asyncio.get_running_loop().time() + LATE * self._timeout
        most = FLUSH_MESSAGES if self._begun or len(self._queue) < BURST else min(FLUSH_MESSAGES, len(self._queue) // 2)
        self._begun = True
        late = f"{self._server} took longer than {self._timeout:g} s for the messages before it"
        self._in_flight = self._queue.take(most, latest, late)
        if not self._in_flight:
            return
        lost = ""
        try:
            async with asyncio.timeout_at(self._in_flight[0].calls[0].deadline):
                await run_calls(self._connection, self._in_flight)
        except Lost as error:
            self._trouble = lost = str(error)
        is_demoted = any(isinstance(batch.reply, Refused) and batch.reply.is_demotion for batch in self._in_flight)
        self._settle(f"the connection to {self._server} broke: {lost}")
        if lost or is_demoted:
            await self._disconnect()

    async def _connect(self) -> None:
        attempt = 0
        while self._connection is None:
            attempt += 1
            try:
                self._connection = await connect(self._client)
                self._trouble = ""
            except Lost as error:
                self._trouble = str(error)
                await asyncio.sleep(RECONNECT.delay(attempt) or 0)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    def _settle(self, unanswered: str) -> None:
        """Settle the batches in flight; ``unanswered`` is the reason why there is no reply, if there is none."""
        in_flight, self._in_flight = self._in_flight, []
        failed = [batch for batch in in_flight if not batch.settle(self._server, unanswered)]
        for batch in failed:  # only now the outcome of a call's messages in other batches is known
            for call in batch.calls:
                if call.failure is not None:
                    call.answer()

    # -- silence --------------------------------------------------------------------------------------------

    async def _become_silent(self) -> None:
        """Drop the connection after a missed deadline; become silent if a publish was still waiting for the answer."""
        was_awaited = bool(self._in_flight)
        if self._connection is None:
            self._trouble = find_trouble(self._client) or self._trouble
        self._settle(f"{self._server} did not answer within {self._timeout:g} s")
        first = self._queue.first()
        now = asyncio.get_running_loop().time()
        if was_awaited or (first is not None and first.deadline <= now):
            self._silent_since = datetime.now(UTC) - timedelta(seconds=self._timeout)
            self._last_asked = now
            self._queue.fail(self._silence())
        await self._disconnect()

    async def _probe(self) -> None:
        """End the silence if Redis answers a new connection, or if no publish has asked for a minute."""
        try:
            async with asyncio.timeout(self._timeout):
                self._connection = await connect(self._client)
        except (Lost, TimeoutError) as error:
            self._trouble = str(error) or find_trouble(self._client) or self._trouble
            await asyncio.sleep(RECONNECT.cap)
            if asyncio.get_running_loop().time() - self._last_asked < PROBE_FOR:
                return
        except Refused:  # an answer: the next publish brings it to its caller
            pass
        self._silent_since = None


class SendQueue:
    """Messages that wait to be sent, oldest first, of any stream, so that the deadlines are in order too.

    Bounded in messages and bytes: a publish that finds it full waits for room, behind those that wait already.
    """

    def __init__(self, script: BatchScript) -> None:
        self._script = script
        self._entries: deque[tuple[PublishCall, bytes, bytes]] = deque()  # call, stream's key, arguments
        self._messages = 0  # of the entries, and of waiters that were given room
        self._bytes = 0
        self._waiters: OrderedDict[asyncio.Future[None], _RoomWaiter] = OrderedDict()  # without room, oldest first
        self._admitted = 0  # waiters that were given room, and have not appended yet

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_awaited(self) -> bool:
        """True if a publish waits for room, or was just given it."""
        return bool(self._waiters) or self._admitted > 0

    def has_room(self) -> bool:
        """Return True if a call can be appended now, however large: else one above the limits never could."""
        return not self.is_awaited and self._is_below_limits()

    def _is_below_limits(self) -> bool:
        return self._messages < QUEUE_MESSAGES and self._bytes < QUEUE_BYTES

    async def wait_for_room(self, messages: int, size: int, deadline: float) -> None:
        """Wait until a call of so many messages and bytes can be appended, first come, first served.

        The caller appends it at once, without another await. There is no timer for each of thousands that wait: the
        sender takes or fails the queue before the deadline of its oldest message, which comes before theirs.

        Raises:
            BrokerUnavailable: there was no room before the deadline, or the queue was failed.
        """
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[admitted] = _RoomWaiter(messages, size, deadline)
        try:
            await admitted
        except BaseException:
            if self._waiters.pop(admitted, None) is None and not admitted.cancelled() and admitted.exception() is None:
                self._give_back(messages, size)  # it was given room in the same turn of the loop
            self._admit_waiters()
            raise
        self._give_back(messages, size)

    def _give_back(self, messages: int, size: int) -> None:
        """End a waiter that was given room."""
        self._admitted -= 1
        self._messages -= messages
        self._bytes -= size

    def _admit_waiters(self) -> None:
        """Give room to those that wait, oldest first, as long as there is some. Every waiter is looked at once."""
        while self._waiters and self._is_below_limits():
            admitted, waiter = self._waiters.popitem(last=False)
            if not admitted.done():  # done: it was cancelled, or failed, and is about to leave
                self._admitted += 1
                self._messages += waiter.messages
                self._bytes += waiter.size
                admitted.set_result(None)

    def append(self, call: PublishCall, encoded: Iterable[EncodedMessage]) -> None:
        """Append the messages of a call."""
        for key, arguments in encoded:
            self._entries.append((call, key, arguments))
            self._bytes += len(arguments)
        self._messages += call.messages

    def first(self) -> PublishCall | None:
        """Return the call of the oldest message; drop messages whose callers have gone away."""
        while self._entries and self._entries[0][0].answered.done():
            self._drop_first()
        if not self._entries:
            self._admit_waiters()  # nothing will be taken that makes room for them
        return self._entries[0][0] if self._entries else None

    def take(self, most: int, latest: float, late: str) -> list[Batch]:
        """Remove the oldest messages, as many as fit into one flush, and return them by stream.

        Args:
            most: The most messages taken.
            latest: Calls with a deadline up to this loop's time fail.
            late: The reason of their failure.
        """
        while (first := self.first()) is not None and first.deadline <= latest:
            first.failure = late
            first.answer()
        self._fail_late_waiters(latest)
        batches: dict[bytes, Batch] = {}
        batch: Batch | None = None
        entries, size, room = self._entries, 0, most
        while entries and room:
            call, key, arguments = entries[0]
            if call.answered.done():
                self._drop_first()
                continue
            if size + len(arguments) > FLUSH_BYTES and batches:
                break
            entries.popleft()
            if batch is None or batch.key is not key:
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(key, self._script)
            batch.arguments.append(arguments)
            batch.calls.append(call)
            size += len(arguments)
            room -= 1
        self._messages -= most - room
        self._bytes -= size
        if self._waiters:
            self._admit_waiters()
        return list(batches.values())

    def _fail_late_waiters(self, latest: float) -> None:
        while self._waiters and next(iter(self._waiters.values())).deadline <= latest:
            admitted, _ = self._waiters.popitem(last=False)
            if not admitted.done():
                queued = f"{self._messages} messages ({self._bytes} bytes) wait to be sent"
                admitted.set_exception(BrokerUnavailable(f"{queued}, and no room came in time; not sent"))

    def _drop_first(self) -> None:
        _, _, arguments = self._entries.popleft()
        self._messages -= 1
        self._bytes -= len(arguments)

    def fail(self, why: str) -> None:
        """Answer every call in the queue, and every one that waits for room, with an error: none of it is sent."""
        while self._waiters:  # first: they must not get the room of those that fail
            admitted, _ = self._waiters.popitem(last=False)
            if not admitted.done():
                admitted.set_exception(BrokerUnavailable(f"{why}; not sent"))
        while (call := self.first()) is not None:
            call.failure = why
            call.answer()


class _RoomWaiter(NamedTuple):
    """A publish that waits for room: its messages, their bytes, and the loop's time at which it is answered at the latest."""

    messages: int
    size: int
    deadline: float
