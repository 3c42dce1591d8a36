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
from collections.abc import Callable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Final

from redis.asyncio import Redis

from silbo.brokers.redis.calls import UNANSWERED, Batch, Call, Packet
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, where
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.message import Message
from silbo.retry import Backoff

__all__ = ["Sender"]

FLUSH_MESSAGES: Final = 500
FLUSH_BYTES: Final = 1 << 20
"""A larger message goes alone: 500 of 100 kB would block Redis for 141 ms."""
WAITING_MESSAGES: Final = 10_000
WAITING_BYTES: Final = 16 << 20
"""In memory at most, plus the one call that goes over it; past it, a publish waits for its turn."""
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
        self._line: deque[Call] = deque()  # the oldest first, so the deadlines are in order; empty while silent
        self._flight: list[Batch] = []  # sent, not settled
        self._turns: deque[asyncio.Future[None]] = deque()  # of publishes that wait for room in line
        self._messages = self._bytes = 0  # in line and in flight
        self._silent_since: datetime | None = None
        self._asked = 0.0  # when a publish last met a silent Redis
        self._why = ""  # the last connection failed

    # -- publish --------------------------------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message]) -> None:
        """See :class:`~silbo.protocols.Publisher`."""
        packets: list[Packet] = []
        refused: list[MessageRefused] = []
        for message in messages:
            try:
                packets.append(self._pack(message))
            except MessageRefused as error:
                refused.append(error)
        if packets:
            await self._send(packets)
        if refused:
            if len(refused) > 1:
                refused[0].add_note(f"{len(refused) - 1} more messages of this call were refused")
            raise refused[0]

    async def _send(self, packets: list[Packet]) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # connection and task of another loop can be neither used nor closed here
            self._loop = loop
            self._reset()
        if self._closed:
            raise BrokerUnavailable("the broker is closed: nothing can be published after aclose()")
        self._check_silence()
        call = Call(packets, loop.create_future(), loop.time() + self._timeout)
        try:
            if self._turns or self._is_full():
                await self._turn(call.deadline)
                self._check_silence()
            self._line.append(call)
            self._messages += len(packets)
            self._bytes += call.size
        finally:
            if self._turns:
                self._next_turn()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), context=Context())
        await call.answered

    def _check_silence(self) -> None:
        if self._silent_since is not None:
            self._asked = asyncio.get_running_loop().time()
            raise BrokerUnavailable(f"{self._silence()}; not sent")

    def _silence(self) -> str:
        why = f" ({self._why})" if self._why else ""
        return f"{self._server} has not answered since {self._silent_since:%H:%M:%S} UTC{why}"

    def _is_full(self) -> bool:
        return self._messages >= WAITING_MESSAGES or self._bytes >= WAITING_BYTES

    async def _turn(self, deadline: float) -> None:
        """Wait for room in line, first come, first served."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout_at(deadline):
                await turn
        except TimeoutError:
            raise BrokerUnavailable(
                f"{self._messages} messages ({self._bytes} bytes) are waiting for {self._server}, and there was no "
                f"room for more within {self._timeout:g} s; not sent"
            ) from None
        finally:
            self._turns.remove(turn)

    def _next_turn(self) -> None:
        """Let the first who waits for room go on; he will let the next."""
        if self._turns and not self._turns[0].done() and not self._is_full():
            self._turns[0].set_result(None)

    async def aclose(self) -> None:
        """Answer what waits, within its deadlines, and close the connection."""
        self._closed = True
        if asyncio.get_running_loop() is not self._loop:
            return
        try:
            while self._turns or self._is_running():
                if self._silent_since is not None and self._task is not None:
                    self._task.cancel()
                await (asyncio.wait([self._task]) if self._task and self._is_running() else asyncio.sleep(0))
        finally:
            if self._task is not None:
                self._task.cancel()
            connection, self._connection = self._connection, None
            if connection is not None:
                await connection.aclose()

    def _is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    # -- the task -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Send what is in line until nothing is; while Redis is silent, look for it."""
        try:
            while self._line or (self._silent_since is not None and not self._closed):
                try:
                    await (self._flush() if self._silent_since is None else self._probe())
                except TimeoutError:
                    await self._missed()
                except Refused as refusal:
                    self._fail_line(f"{self._server} refused the connection: {refusal}")
        except BaseException as error:  # cancelled, or a defect: whoever waits gets to know
            self._settle(f"the sender was ended by {error!r}")
            self._fail_line(f"the sender was ended by {error!r}")
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
            async with asyncio.timeout_at(self._line[0].deadline):
                await self._connect()
        self._flight = self._take()
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

    # -- the line -------------------------------------------------------------------------------------------

    def _take(self) -> list[Batch]:
        """The oldest messages in line, as many as go into one flush, by stream."""
        batches: dict[bytes, Batch] = {}
        room, size = FLUSH_MESSAGES, 0
        latest = asyncio.get_running_loop().time() + LATE * self._timeout
        while self._line and room:
            call = self._line[0]
            if call.answered.done() or call.deadline <= latest:  # withdrawn, or too late
                call.failure = f"{self._server} did not come to it within {self._timeout:g} s"
                self._answer(call)
                continue
            for key, arguments in call.packets[call.taken : call.taken + room]:
                size += len(arguments)
                if size > FLUSH_BYTES and room < FLUSH_MESSAGES:
                    return list(batches.values())
                batch = batches.get(key)
                if batch is None:
                    batch = batches[key] = Batch(key)
                batch.arguments.append(arguments)
                batch.calls.append(call)
                call.taken += 1
                room -= 1
            if call.taken == len(call.packets):
                self._line.popleft()
        return list(batches.values())

    def _settle(self, unanswered: str) -> None:
        """Answer the calls of the flight, as far as they are through."""
        flight, self._flight = self._flight, []
        for batch in flight:
            batch.settle(self._server, unanswered)
        for batch in flight:
            for call in batch.calls:
                if call.is_open and (call.failure is not None or call.sent == len(call.packets)):
                    self._answer(call)

    def _answer(self, call: Call) -> None:
        """The end of a call: its caller goes on, and whoever waits for room."""
        call.is_open = False
        self._messages -= len(call.packets)
        self._bytes -= call.size
        if self._line and self._line[0] is call:
            self._line.popleft()
        if not call.answered.done():
            if call.failure is None:
                call.answered.set_result(None)
            else:
                call.answered.set_exception(call.error())
        if self._turns:
            self._next_turn()

    def _fail_line(self, why: str) -> None:
        while self._line:
            self._line[0].failure = why
            self._answer(self._line[0])
        for turn in self._turns:
            if not turn.done():
                turn.set_exception(BrokerUnavailable(f"{why}; not sent"))

    # -- silence --------------------------------------------------------------------------------------------

    async def _missed(self) -> None:
        """A deadline has passed without an answer: be silent, unless nobody was waiting for it any more."""
        waited = bool(self._flight)
        self._settle(f"{self._server} did not answer within {self._timeout:g} s")
        while self._line and self._line[0].answered.done():
            self._answer(self._line[0])
        now = asyncio.get_running_loop().time()
        if waited or (self._line and self._line[0].deadline <= now):
            self._silent_since = datetime.now(UTC) - timedelta(seconds=self._timeout)
            self._asked = now
            self._fail_line(self._silence())
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
