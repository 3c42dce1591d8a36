"""Commands and script calls that are awaited one after another, over a connection of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis

from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, packed, where
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable

__all__ = ["Calls", "ScriptCall"]

_UNANSWERED: Final = object()


class ScriptCall(NamedTuple):
    """A call of a script: its keys, its arguments as the Redis protocol writes them, and their number."""

    keys: Sequence[bytes]
    arguments: bytes
    number: int

    @classmethod
    def of(cls, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        """A call with these arguments."""
        return cls(keys, packed(arguments), len(arguments))


class Calls:
    """One connection, opened when it is needed, for one exchange at a time and for one event loop at a time.

    Whatever goes wrong in an exchange ends the connection, so that a late answer is never taken for another's.

    Args:
        client: The user's.
        timeout: Seconds in which a call is answered, waiting for its turn included.
    """

    def __init__(self, client: Redis, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout is seconds, more than 0, not {timeout!r}")
        self.server: Final = where(client)
        self._client, self._timeout = client, timeout
        self._late = f"{self.server} has not answered within {timeout:g} s"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle: Connection | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    def deadline(self) -> float:
        """Of a call that begins now, by the loop's clock."""
        return asyncio.get_running_loop().time() + self._timeout

    async def run(self, script: Script, *calls: ScriptCall, deadline: float | None = None) -> list[Any]:
        """Call a script so many times, in one write; by its source where Redis has forgotten it.

        Returns:
            A reply for each: a value; or a :class:`Refused`; or a :class:`Lost` where none came: perhaps it was carried
            out.

        Raises:
            BrokerUnavailable: there was no connection in time.
        """
        until = self.deadline() if deadline is None else deadline
        replies = await self._exchange([script.call(*call) for call in calls], until)
        # After SCRIPT FLUSH or a restart; nothing of these was carried out.
        forgotten = [at for at, reply in enumerate(replies) if isinstance(reply, Refused) and reply.code == "NOSCRIPT"]
        if forgotten:
            again = [script.call(*calls[at], by_source=True) for at in forgotten]
            for at, reply in zip(forgotten, await self._exchange(again, until), strict=True):
                replies[at] = reply
        return replies

    async def call(self, script: Script, call: ScriptCall, *, deadline: float | None = None) -> Any:
        """The reply to one call of a script.

        Raises:
            BrokerUnavailable: there is none, or it is an error; perhaps it was carried out.
        """
        (reply,) = await self.run(script, call, deadline=deadline)
        return self._answered(reply)

    async def ask(self, *words: bytes) -> Any:
        """The reply to one command.

        Raises:
            BrokerUnavailable: there is none, or it is an error; perhaps it was carried out.
        """
        (reply,) = await self._exchange([b"*%d\r\n%b" % (len(words), packed(words))], self.deadline())
        return self._answered(reply)

    def _answered(self, reply: Any) -> Any:
        if isinstance(reply, Lost):
            raise BrokerUnavailable(str(reply)) from reply
        if isinstance(reply, Refused):
            raise BrokerUnavailable(f"{self.server} refused it: {reply}") from reply
        return reply

    async def aclose(self) -> None:
        """Wait for what is under way, within its deadline, and close the connection. May be called twice."""
        self._closed = True
        if asyncio.get_running_loop() is self._loop:
            async with self._turn:
                connection, self._idle = self._idle, None
                if connection is not None:
                    await connection.aclose()

    async def _exchange(self, commands: Sequence[bytes], until: float) -> list[Any]:
        """One write, and as many replies as commands: see :meth:`run`."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # the connection of another loop can be neither used nor closed here
            self._loop, self._idle, self._turn = loop, None, asyncio.Lock()
        try:
            async with asyncio.timeout_at(until):
                await self._turn.acquire()
        except TimeoutError:
            raise BrokerUnavailable(f"{self._late}; nothing was done") from None
        connection: Connection | None = None
        try:
            connection = await self._connected(until)
            replies, is_usable = await self._talk(connection, commands, until)
            if is_usable:
                self._idle, connection = connection, None
            return replies
        finally:
            try:
                if connection is not None:
                    await connection.drop()
            finally:
                self._turn.release()

    async def _connected(self, until: float) -> Connection:
        if self._closed:
            raise BrokerUnavailable("it is closed, and was used after aclose(); nothing was done")
        try:
            async with asyncio.timeout_at(until):
                if (idle := self._idle) is not None:
                    is_usable = not await idle.has_something()
                    self._idle = None
                    if is_usable:
                        return idle
                    await idle.drop()
                return await connect(self._client)
        except TimeoutError:
            raise BrokerUnavailable(f"{self._late}; nothing was done") from None
        except Lost as error:
            raise BrokerUnavailable(f"{self.server} can't be reached ({error}); nothing was done") from error
        except Refused as refusal:
            raise BrokerUnavailable(f"{self.server} refused the connection: {refusal}; nothing was done") from refusal

    async def _talk(self, connection: Connection, commands: Sequence[bytes], until: float) -> tuple[list[Any], bool]:
        """The replies, and whether the connection can be used again."""
        replies: list[Any] = [_UNANSWERED] * len(commands)
        try:
            async with asyncio.timeout_at(until):
                await connection.write(b"".join(commands))
                for at in range(len(commands)):
                    try:
                        replies[at] = await connection.read()
                    except Refused as refusal:
                        replies[at] = refusal
        except (Lost, TimeoutError) as error:
            why = f"the connection to {self.server} broke: {error}" if isinstance(error, Lost) else self._late
            return [Lost(why) if reply is _UNANSWERED else reply for reply in replies], False
        demoted = any(isinstance(reply, Refused) and reply.code in ("READONLY", "MASTERDOWN") for reply in replies)
        return replies, not demoted  # a new connection may lead to the new master
