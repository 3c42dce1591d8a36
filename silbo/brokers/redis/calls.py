"""Calls of scripts and commands, and a connection on which they follow one another."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Protocol

from redis.asyncio import Redis

from silbo._checks import check_seconds
from silbo._loops import LoopBinding
from silbo.brokers.redis.connection import Connection, Lost, Refused, connect, describe_server, find_trouble, pack_words
from silbo.brokers.redis.key_types import find_wrong_types
from silbo.brokers.redis.scripts import Script
from silbo.errors import BrokerUnavailable

__all__ = [
    "UNANSWERED",
    "Call",
    "CallConnection",
    "Command",
    "ScriptCall",
    "ask",
    "run_calls",
    "run_script",
    "to_mapping",
]

UNANSWERED: Final = object()
"""The reply of a call that has none yet."""


class Call(Protocol):
    """A call of a script, or a command.

    Attributes:
        reply: A value, a :class:`Refused`, or ``UNANSWERED``.
        keys: The keys that it uses.
    """

    reply: Any

    @property
    def keys(self) -> Sequence[bytes]:
        """See above."""
        ...

    def pack(self, *, by_source: bool) -> bytes:
        """Return the call as the Redis protocol writes it: a script by its digest, or by its source."""
        ...


class ScriptCall:
    """One call of a script; ``arguments`` are ``count`` packed words."""

    __slots__ = ("_arguments", "_count", "_script", "keys", "reply")

    def __init__(self, script: Script, keys: Sequence[bytes], arguments: bytes, count: int) -> None:
        self._script = script
        self.keys = keys
        self._arguments = arguments
        self._count = count
        self.reply: Any = UNANSWERED

    @classmethod
    def of(cls, script: Script, keys: Sequence[bytes], *arguments: bytes) -> ScriptCall:
        """Return a call with these arguments."""
        return cls(script, keys, pack_words(arguments), len(arguments))

    def pack(self, *, by_source: bool) -> bytes:
        """See :class:`Call`."""
        return self._script.pack_call(self.keys, self._arguments, self._count, by_source=by_source)


class Command:
    """One command about one key."""

    __slots__ = ("_words", "reply")

    def __init__(self, *words: bytes) -> None:
        self._words = words
        self.reply: Any = UNANSWERED

    @property
    def keys(self) -> Sequence[bytes]:
        """See :class:`Call`."""
        return self._words[2:3] if self._words[0] == b"XINFO" else self._words[1:2]

    def pack(self, *, by_source: bool) -> bytes:  # a command has no source
        """See :class:`Call`."""
        return b"*%d\r\n%b" % (len(self._words), pack_words(self._words))


async def run_calls(connection: Connection, calls: Sequence[Call]) -> None:
    """Send the calls in one write, and set the reply of each.

    After SCRIPT FLUSH or a restart Redis answers NOSCRIPT and has carried out nothing of that call: it is repeated by its
    source. Another call must not come between, so the caller keeps the connection until this returns. The error of a key of
    another type does not name the key: a :class:`WrongType` that does so takes its place.

    Raises:
        Lost: the connection broke. Calls that are ``UNANSWERED`` may have been carried out.
    """
    refused: list[Call] = []
    for by_source in (False, True):
        for call in calls:
            call.reply = UNANSWERED
        await connection.write(b"".join([call.pack(by_source=by_source) for call in calls]))
        for call in calls:
            try:
                call.reply = await connection.read()
            except Refused as refusal:
                call.reply = refusal
                refused.append(call)
        if not refused:
            return
        calls = [call for call in refused if call.reply.code == "NOSCRIPT"]
        if not calls:
            break
        refused = [call for call in refused if call.reply.code != "NOSCRIPT"]
    for call in refused:
        if call.reply.code == "WRONGTYPE" and (wrong := await find_wrong_types(connection, call.keys)):
            call.reply = next(iter(wrong.values()))


async def run_script(connection: Connection, script: Script, keys: Sequence[bytes], *arguments: bytes) -> Any:
    """Run one call of a script, and return its reply.

    Raises:
        Lost: the connection broke; perhaps the script ran.
        Refused: Redis's answer is an error.
    """
    call = ScriptCall.of(script, keys, *arguments)
    await run_calls(connection, [call])
    if isinstance(call.reply, Refused):
        raise call.reply
    return call.reply


class CallConnection:
    """A connection of silbo's own, opened when it is needed, on which calls follow one another.

    For one event loop at a time. After any trouble the connection is dropped, so that no call gets the late answer to
    another.

    Args:
        client: The program's client.
        timeout: Seconds in which a call is answered, the wait for earlier calls included.
        owner: The name of the class that the user has made, for errors.
        is_patient: True if a reply may be large: the time begins anew as long as bytes of it come.
    """

    def __init__(
        self, client: Redis, timeout: float, *, owner: str = "CallConnection", is_patient: bool = False
    ) -> None:
        self.server: Final = describe_server(client)
        self._client = client
        self._timeout = check_seconds("timeout", timeout)
        self._is_patient = is_patient
        self._no_answer = f"{self.server} has not answered within {timeout:g} s"
        self._binding = LoopBinding(owner, is_busy=lambda: self._lock.locked(), forget=self._forget)
        self._idle: Connection | None = None
        self._lock = asyncio.Lock()
        self._closed = False

    def _forget(self) -> None:  # the connection of another loop can be neither used nor closed in this one
        self._idle = None
        self._lock = asyncio.Lock()

    def deadline(self) -> float:
        """Return the loop's time at which a call that begins now is answered at the latest."""
        return asyncio.get_running_loop().time() + self._timeout

    async def run_all(self, *calls: Call, deadline: float | None = None) -> list[Any]:
        """Run the calls in one write, and return their replies in the same order.

        Returns:
            For each call a value; or a :class:`Refused`: it was not carried out; or a :class:`Lost`: there was no answer,
            perhaps it was carried out.

        Raises:
            BrokerUnavailable: there was no connection in time; nothing was done, safe to repeat.
            LoopConflict: another event loop uses the connection.
        """
        until = self.deadline() if deadline is None else deadline
        self._binding.enter()
        try:
            async with asyncio.timeout_at(until):
                await self._lock.acquire()
        except TimeoutError:
            raise BrokerUnavailable(f"{self._no_answer}; nothing was done") from None
        connection: Connection | None = None
        try:
            connection = await self._connect(until)
            trouble = ""
            try:
                async with asyncio.timeout_at(until) as limit:
                    if self._is_patient:
                        connection.watch_progress()
                        with connection.extending(limit, self._timeout):
                            await run_calls(connection, calls)
                    else:
                        await run_calls(connection, calls)
            except Lost as error:
                trouble = f"the connection to {self.server} broke: {error}"
            except TimeoutError:
                trouble = self._no_answer
            replies = [Lost(trouble) if call.reply is UNANSWERED else call.reply for call in calls]
            if not trouble and not any(isinstance(reply, Refused) and reply.is_demotion for reply in replies):
                self._idle, connection = connection, None
            return replies
        finally:
            try:
                if connection is not None:
                    await connection.drop()
            finally:
                self._lock.release()

    async def run(self, call: Call, *, deadline: float | None = None) -> Any:
        """Run one call, and return its reply.

        Raises:
            BrokerUnavailable: there was no answer, and perhaps the call was carried out; or the answer is an error, which
                is the ``__cause__``.
        """
        (reply,) = await self.run_all(call, deadline=deadline)
        if isinstance(reply, Lost):
            raise BrokerUnavailable(str(reply)) from reply
        if isinstance(reply, Refused):
            raise BrokerUnavailable(f"{self.server} refused it: {reply}") from reply
        return reply

    async def run_command(self, *words: bytes) -> Any:
        """Run one command, and return its reply; raises as :meth:`run` does."""
        return await self.run(Command(*words))

    async def aclose(self) -> None:
        """Wait for the call under way, within its deadline, and close the connection. May be called twice."""
        self._binding.enter("aclose")
        self._closed = True
        async with self._lock:
            connection, self._idle = self._idle, None
            if connection is not None:
                await connection.aclose()

    async def _connect(self, until: float) -> Connection:
        if self._closed:
            raise BrokerUnavailable("it is closed, and can't be used after aclose(); nothing was done")
        try:
            async with asyncio.timeout_at(until):
                if (idle := self._idle) is not None:
                    is_usable = not await idle.has_unread()
                    self._idle = None
                    if is_usable:
                        return idle
                    await idle.drop()
                return await connect(self._client)
        except TimeoutError:
            trouble = find_trouble(self._client)
            raise BrokerUnavailable(
                f"{self._no_answer}{f' ({trouble})' if trouble else ''}; nothing was done"
            ) from None
        except Lost as error:
            raise BrokerUnavailable(f"{self.server} can't be reached ({error}); nothing was done") from error
        except Refused as refusal:
            raise BrokerUnavailable(f"{self.server} refused the connection: {refusal}; nothing was done") from refusal


async def ask(connection: CallConnection, *calls: Call) -> list[Any]:
    """Run the calls in one write; return their replies.

    Raises:
        BrokerUnavailable: there was no answer, or one of them is an error, which is the ``__cause__``.
    """
    replies = await connection.run_all(*calls)
    for reply in replies:
        if isinstance(reply, Lost | Refused):
            raise BrokerUnavailable(f"{connection.server} did not answer what was asked: {reply}") from reply
    return replies


def to_mapping(flat: Any) -> dict[str, Any]:
    """Return name, value, name, value, ... as a dict with names as text."""
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}
