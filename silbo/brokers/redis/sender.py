"""The coalescing sender: many publishes, one script call, one connection.

A publish puts its messages in line and waits. A task, which lives while there is something to send, takes up to 500
messages or 1 MiB at a time and sends them as one script call per stream; only when Redis has answered does it take the
next. So the more is published at once, the less each message costs.

A publish that is not answered within its deadline makes the sender *silent*: everybody who waits gets an error, and so
does every further publish at once, until a new connection is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn

from redis.asyncio import Redis

from silbo._retry import Backoff
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, where
from silbo.brokers.redis.line import FLUSH_MESSAGES, UNANSWERED, Batch, Call, Line, Packet
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.message import Message

__all__ = ["Sender"]

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
