"""The coalescing sender: many publishes, one script call, one connection.

A publish puts its messages in line and waits. A task, which lives while there is something to send, takes up to 500
messages or 1 MiB at a time and sends them as one script call per stream; only when Redis has answered does it take the
next. So the more is published at once, the less each message costs.

A publish that is not answered within its deadline makes the sender *silent*: everybody who waits gets an error, and so
does every further publish at once, until a new connection is answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, TypeAlias

from redis.asyncio import Redis

from silbo._retry import Backoff
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, where
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, PublishError
from silbo.message import Message

__all__ = ["UNANSWERED", "Batch", "Call", "Line", "Packet", "Sender"]

FLUSH_MESSAGES: Final = 500
FLUSH_BYTES: Final = 1 << 20
"""A larger message goes alone: 500 of 100 kB would block Redis for 141 ms."""
WAITING_MESSAGES: Final = 10_000
WAITING_BYTES: Final = 16 << 20
"""Encoded and in line at most, plus the one call that goes over it; past it, a publish waits for its turn."""

Packet: TypeAlias = "tuple[bytes, bytes]"
"""One message, ready to send: the stream's key (empty for Pub/Sub), and its packed arguments of the script."""

UNANSWERED: Final = object()


class Call:
    """One call of ``publish``, and how far its messages are."""

    __slots__ = ("answered", "deadline", "failure", "is_unknown", "messages", "sent")

    def __init__(self, messages: int, answered: asyncio.Future[None], deadline: float) -> None:
        self.messages, self.answered, self.deadline = messages, answered, deadline
        self.sent = 0  # that Redis has
        self.failure: str | None = None
        self.is_unknown = False

    def answer(self) -> None:
        """Let the caller go on, unless that was done, or the caller has gone away."""
        if not self.answered.done():
            if self.failure is None:
                self.answered.set_result(None)
            else:
                self.answered.set_exception(self._error(self.failure))

    def _error(self, failure: str) -> PublishError:
        many = self.messages
        if self.is_unknown:
            what = "it" if many == 1 else f"some or all of {many} messages"
            return DeliveryUnknown(f"{failure}; {what} may have arrived")
        if self.sent:
            return DeliveryUnknown(f"{self.sent} of {many} messages were sent, the others were not: {failure}")
        return BrokerUnavailable(f"{failure}; {'not sent' if many == 1 else f'none of {many} messages was sent'}")


class Batch:
    """What goes to one stream in one flush, or to Pub/Sub: the arguments of a script call, and whose they are."""

    __slots__ = ("arguments", "calls", "key", "reply")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.arguments: list[bytes] = []  # of each message
        self.calls: list[Call] = []  # of each message
        self.reply: Any = UNANSWERED

    def settle(self, server: str, unanswered: str) -> bool:
        """Tell the calls what became of their messages, and answer those of which all are sent; False if some failed.

        Args:
            server: Who answered, for the text.
            unanswered: Why there is no answer, where there is none.
        """
        reply = self.reply
        if reply == []:  # nothing failed
            for call in self.calls:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
            return True
        # What failed: position, error, position, error, ...
        failures = dict(zip(reply[::2], reply[1::2], strict=True)) if isinstance(reply, list) else {}
        for position, call in enumerate(self.calls, 1):
            if reply is UNANSWERED:
                call.failure, call.is_unknown = unanswered, True
            elif isinstance(reply, Refused):
                call.failure = f"{server} refused it: {reply}"
            elif position in failures:
                call.failure = f"{server} refused it: {failures[position].decode(errors='replace')}"
            else:
                call.sent += 1
                if call.sent == call.messages:
                    call.answer()
        return False

    @property
    def is_forgotten(self) -> bool:
        """Whether Redis does not know the script; nothing of the batch was carried out."""
        return isinstance(self.reply, Refused) and self.reply.code == "NOSCRIPT"

    @property
    def is_demoted(self) -> bool:
        """Whether it went to a server that takes no writes any more."""
        return isinstance(self.reply, Refused) and self.reply.code in ("READONLY", "MASTERDOWN")


class _Turn:
    """A publish that waits for room, and what it needs."""

    __slots__ = ("given", "messages", "size")

    def __init__(self, messages: int, size: int) -> None:
        self.messages, self.size = messages, size
        self.given = asyncio.get_running_loop().create_future()


class Line:
    """What waits to be sent, the oldest first, so that the deadlines are in order too."""

    def __init__(self) -> None:
        self._entries: deque[tuple[Call, bytes, bytes]] = deque()
        self._messages = self._bytes = 0  # in line, or promised to a turn
        self._turns: deque[_Turn] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody waits for room."""
        return bool(self._turns)

    def has_room(self) -> bool:
        """Whether a call can be appended now. Calls may go over the limit by one, or a large one never could."""
        return not self._turns and self._is_open()

    def _is_open(self) -> bool:
        return self._messages < WAITING_MESSAGES and self._bytes < WAITING_BYTES

    async def room(self, messages: int, size: int, deadline: float) -> None:
        """Wait until a call can be appended, first come, first served; then append it at once.

        Raises:
            BrokerUnavailable: there was no room before the deadline, or the line was given up.
        """
        turn = _Turn(messages, size)
        self._turns.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn.given
        except BaseException as error:
            self._leave(turn)
            self._let_in()
            if isinstance(error, TimeoutError):
                waiting = f"{self._messages} messages ({self._bytes} bytes) are in line"
                raise BrokerUnavailable(f"{waiting}, and no room came in time; not sent") from None
            raise
        self._leave(turn)

    def _leave(self, turn: _Turn) -> None:
        self._turns.remove(turn)
        if turn.given.done() and not turn.given.cancelled() and turn.given.exception() is None:
            self._messages -= turn.messages
            self._bytes -= turn.size

    def _let_in(self) -> None:
        for turn in self._turns:
            if turn.given.done():
                continue
            if not self._is_open():
                break
            self._messages += turn.messages
            self._bytes += turn.size
            turn.given.set_result(None)

    def append(self, call: Call, packets: Iterable[Packet]) -> None:
        """Put the messages of a call at the end."""
        for key, arguments in packets:
            self._entries.append((call, key, arguments))
            self._bytes += len(arguments)
        self._messages += call.messages

    def first(self) -> Call | None:
        """Whose message is the oldest; those whose callers have gone away are dropped."""
        while self._entries and self._entries[0][0].answered.done():
            self._drop()
        return self._entries[0][0] if self._entries else None

    def take(self, most: int, latest: float, late: str) -> list[Batch]:
        """The oldest messages, as many as go into one flush, by stream.

        Args:
            most: No more messages than this.
            latest: Calls with a deadline up to this fail.
            late: With this text.
        """
        while (first := self.first()) is not None and first.deadline <= latest:
            first.failure = late
            first.answer()
        batches: dict[bytes, Batch] = {}
        batch: Batch | None = None
        entries, size, room = self._entries, 0, most
        while entries and room:
            call, key, arguments = entries[0]
            if call.answered.done():
                self._drop()
                continue
            if size + len(arguments) > FLUSH_BYTES and batches:
                break
            entries.popleft()
            if batch is None or batch.key is not key:
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(key)
            batch.arguments.append(arguments)
            batch.calls.append(call)
            size += len(arguments)
            room -= 1
        self._messages -= most - room
        self._bytes -= size
        if self._turns:
            self._let_in()
        return list(batches.values())

    def _drop(self) -> None:
        _, _, arguments = self._entries.popleft()
        self._messages -= 1
        self._bytes -= len(arguments)

    def fail(self, why: str) -> None:
        """Answer whoever is in line, or waits for room, with an error: none of it is sent."""
        while (call := self.first()) is not None:
            call.failure = why
            call.answer()
        for turn in self._turns:
            if not turn.given.done():
                turn.given.set_exception(BrokerUnavailable(f"{why}; not sent"))


BURST: Final = 32
"""Messages in line when nothing is under way: of so many or more, the first flush takes half, so that from then on
Redis is at one half while the other is being encoded (a third faster at 100 publishers than all in one flush)."""
LATE: Final = 0.05
"""The share of the timeout that must be left of a message's time: one sent later would likely end unknown."""
PROBE_FOR: Final = 60.0
"""Seconds for which a silent Redis is looked for after the last publish; then the next publish waits for it itself."""
RECONNECT: Final = Backoff(initial=0.02, cap=0.5)


class Sender:
    """Sends what is published over one connection, for one event loop at a time.

    Args:
        client: The user's.
        script: What carries out a batch.
        pack: A message as a packet; may raise MessageRefused.
        each: Arguments of the script for one message.
        first: Arguments of the script before the messages, packed, and their number.
        timeout: Seconds in which a publish is answered.
    """

    def __init__(
        self,
        client: Redis,
        script: Script,
        pack: Callable[[Message], Packet],
        *,
        each: int,
        first: tuple[bytes, int] = (b"", 0),
        timeout: float,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is seconds, more than 0, not {timeout!r}")
        self._client, self._server, self._timeout = client, where(client), timeout
        self._script, self._pack, self._each, self._first = script, pack, each, first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._line = Line()  # empty while silent
        self._flight: list[Batch] = []  # sent, not settled
        self._silent_since: datetime | None = None
        self._asked = 0.0  # when a publish last met a silent Redis
        self._why = ""  # the last connection failed

    # -- publish --------------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message]) -> None:
        """See :class:`~silbo.protocols.Publisher`."""
        refused: MessageRefused | None = None
        if len(messages) == 1:  # as the bridge publishes
            packets = [self._pack(messages[0])]
        else:
            packets, refused = self._packets(messages)
        if packets:
            loop = asyncio.get_running_loop()
            if loop is not self._loop:  # connection and task of another loop can be neither used nor closed here
                self._loop = loop
                self._reset()
            if self._closed:
                raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
            if self._silent_since is not None:
                self._refuse()
            call = Call(len(packets), loop.create_future(), loop.time() + self._timeout)
            if not self._line.has_room():
                packets = await self._turn(call, packets, messages)
            self._line.append(call, packets)
            if self._task is None or self._task.done():
                self._task = loop.create_task(self._run(), context=Context())
            await call.answered
        if refused is not None:
            raise refused

    def _packets(self, messages: Sequence[Message]) -> tuple[list[Packet], MessageRefused | None]:
        packets: list[Packet] = []
        refused: MessageRefused | None = None
        for message in messages:
            try:
                packets.append(self._pack(message))
            except MessageRefused as error:
                if refused is None:
                    refused = error
                else:
                    refused.add_note(f"and in the same call: {error}")
        return packets, refused

    async def _turn(self, call: Call, packets: list[Packet], messages: Sequence[Message]) -> list[Packet]:
        """Wait for room in line. What waits takes none: it is encoded again."""
        size = sum(len(arguments) for _, arguments in packets)
        packets.clear()
        await self._line.room(call.messages, size, call.deadline)
        if self._silent_since is not None:
            self._refuse()
        return self._packets(messages)[0]

    def _refuse(self) -> NoReturn:
        self._asked = asyncio.get_running_loop().time()
        raise BrokerUnavailable(f"{self._silence()}; not sent")

    def _silence(self) -> str:
        why = f" ({self._why})" if self._why else ""
        return f"{self._server} has not answered since {self._silent_since:%H:%M:%S} UTC{why}"

    async def aclose(self) -> None:
        """Answer what waits, within its deadlines, and close the connection."""
        self._closed = True
        if asyncio.get_running_loop() is not self._loop:
            return
        try:
            while self._line.is_waited_for or (self._task is not None and not self._task.done()):
                if self._silent_since is not None and self._task is not None:
                    self._task.cancel()
                if self._task is not None:
                    await asyncio.wait([self._task])
                await asyncio.sleep(0)  # who was given room goes on, and a new task with it
        finally:
            if self._task is not None:
                self._task.cancel()
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.aclose()

    # -- the task -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Send what is in line until nothing is; while Redis is silent, look for it."""
        self._begun = False
        try:
            while self._line or (self._silent_since is not None and not self._closed):
                try:
                    await (self._flush() if self._silent_since is None else self._probe())
                except TimeoutError:
                    await self._missed()
                except Refused as refusal:
                    self._line.fail(f"{self._server} refused the connection: {refusal}")
        except BaseException as error:  # cancelled, or a defect: whoever waits gets to know
            self._settle(f"the sender was ended by {error!r}")
            self._line.fail(f"the sender was ended by {error!r}")
            self._silent_since = None
            await self._disconnect()
            raise

    async def _flush(self) -> None:
        """Send the next batches, one for each stream, and settle them.

        Raises:
            TimeoutError: the oldest message's deadline has passed.
            Refused: there is no connection, and waiting for one does not help.
        """
        if self._connection is None or await self._connection.has_something():
            await self._disconnect()
            if (first := self._line.first()) is None:
                return
            async with asyncio.timeout_at(first.deadline):
                await self._connect()
        latest = asyncio.get_running_loop().time() + LATE * self._timeout
        most = FLUSH_MESSAGES if self._begun or len(self._line) < BURST else min(FLUSH_MESSAGES, len(self._line) // 2)
        self._begun = True
        self._flight = self._line.take(most, latest, f"{self._server} did not come to it within {self._timeout:g} s")
        if not self._flight:
            return
        lost = ""
        try:
            async with asyncio.timeout_at(self._flight[0].calls[0].deadline):
                await self._exchange(self._flight, by_source=False)
                forgotten = [batch for batch in self._flight if batch.is_forgotten]
                if forgotten:  # the script, after SCRIPT FLUSH or a restart: nothing of these was carried out
                    await self._exchange(forgotten, by_source=True)
        except Lost as error:
            self._why = lost = str(error)
        demoted = any(batch.is_demoted for batch in self._flight)
        self._settle(f"the connection to {self._server} broke: {lost}")
        if lost or demoted:  # the next one may lead to the new master
            await self._disconnect()

    async def _connect(self) -> None:
        attempt = 0
        while self._connection is None:
            attempt += 1
            try:
                self._connection = await connect(self._client)
                self._why = ""
            except Lost as error:
                self._why = str(error)
                await asyncio.sleep(RECONNECT.delay(attempt) or 0)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    async def _exchange(self, batches: list[Batch], *, by_source: bool) -> None:
        """One write and as many replies as batches.

        Raises:
            Lost: the connection broke; batches may have been carried out.
        """
        assert self._connection is not None
        first, count = self._first
        commands: list[bytes] = []
        for batch in batches:
            batch.reply = UNANSWERED
            keys = [batch.key] if batch.key else []
            arguments = first + b"".join(batch.arguments)
            number = count + self._each * len(batch.arguments)
            commands.append(self._script.call(keys, arguments, number, by_source=by_source))
        await self._connection.write(b"".join(commands))
        for batch in batches:
            try:
                batch.reply = await self._connection.read()
            except Refused as refusal:
                batch.reply = refusal

    def _settle(self, unanswered: str) -> None:
        """Answer the calls of the flight, as far as they are through."""
        flight, self._flight = self._flight, []
        failed = [batch for batch in flight if not batch.settle(self._server, unanswered)]
        for batch in failed:  # only now it is known what became of the call's other messages
            for call in batch.calls:
                if call.failure is not None:
                    call.answer()

    # -- silence --------------------------------------------------------------------------------------------

    async def _missed(self) -> None:
        """A deadline has passed without an answer: be silent, unless nobody was waiting for it any more."""
        waited = bool(self._flight)
        self._settle(f"{self._server} did not answer within {self._timeout:g} s")
        first, now = self._line.first(), asyncio.get_running_loop().time()
        if waited or (first is not None and first.deadline <= now):
            self._silent_since = datetime.now(UTC) - timedelta(seconds=self._timeout)
            self._asked = now
            self._line.fail(self._silence())
        await self._disconnect()

    async def _probe(self) -> None:
        """Look whether a silent Redis answers a new connection."""
        try:
            async with asyncio.timeout(self._timeout):
                self._connection = await connect(self._client)
        except (Lost, TimeoutError) as error:
            self._why = str(error) or self._why
            await asyncio.sleep(RECONNECT.cap)
            if asyncio.get_running_loop().time() - self._asked < PROBE_FOR:
                return
        except Refused:  # an answer: the next publish brings it to its caller
            pass
        self._silent_since = None
