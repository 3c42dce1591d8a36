"""The bytes that come over a connection: the time of the last ones, and all replies that have come at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import hiredis

from silbo.brokers.redis.failures import Lost, Refused

__all__ = ["Progress", "ReplyStream", "wait_for_news"]

MOST_UNREAD: Final = 1 << 18
"""Bytes of replies that wait to be taken; with more, Redis has to wait."""
_NOTHING: Final = object()


class Progress(asyncio.Protocol):
    """Stands before a connection's protocol, and notes when bytes come.

    Attributes:
        heard_at: The loop's time when bytes came last.
        limit: The time limit that bytes extend; None if there is none.
        seconds: The seconds by which they extend it.
    """

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self._time = asyncio.get_running_loop().time
        self.heard_at = float("-inf")
        self.limit: asyncio.Timeout | None = None
        self.seconds = 0.0

    def data_received(self, data: bytes) -> None:
        """Pass the bytes on, and note them."""
        self._protocol.data_received(data)
        self.note()

    def note(self) -> None:
        """Note that bytes have come, and extend the limit."""
        now = self.heard_at = self._time()
        if (limit := self.limit) is not None and not limit.expired():
            ends_at = limit.when()
            # A tenth late at most: to move a timer with each small reply would cost more than the reply.
            if ends_at is not None and now + 0.9 * self.seconds > ends_at:
                limit.reschedule(now + self.seconds)

    def eof_received(self) -> bool | None:
        """Pass it on."""
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on."""
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass it on."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._protocol.resume_writing()


class ReplyStream(Progress):
    """Parses what comes, and gives all replies that are complete at once: redis-py reads them one by one.

    A consumer of Pub/Sub reads more than twice as many messages in a second so. Nothing reaches redis-py's parser any more:
    the connection is for subscriptions alone from here on, and no reply may be under way when the stream takes its place.
    """

    def __init__(self, protocol: asyncio.Protocol, transport: asyncio.Transport) -> None:
        super().__init__(protocol)
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._reader = hiredis.Reader(protocolError=Lost, replyError=Refused, notEnoughData=_NOTHING)
        self._waiter: asyncio.Future[None] | None = None
        self._has_news = False  # since replies were last looked for in vain
        self._unread = 0  # bytes, since then
        self._is_paused = False
        self._refusal: Refused | None = None  # behind replies that were taken
        self._ended: str | None = None

    def data_received(self, data: bytes) -> None:
        """Parse the bytes when they are taken; stop reading if there are too many."""
        self._reader.feed(data)
        self._unread += len(data)
        if self._unread > MOST_UNREAD and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self.note()
        self._wake()

    def eof_received(self) -> bool | None:
        """Tell the reader of the end, and pass it on."""
        self._end("the server has closed the connection")
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the reader of the end, and pass it on."""
        self._end(str(exc) if exc else "the connection was closed")
        super().connection_lost(exc)

    def take(self, limit: int) -> list[Any]:
        """Return the replies that have come, at most ``limit``, in the shapes of RESP2; texts are bytes.

        Raises:
            Lost: the connection broke, or what came is no reply; those before it were returned by earlier calls.
            Refused: the next reply is an error.
        """
        if self._refusal is not None:
            refusal, self._refusal = self._refusal, None
            raise refusal
        replies: list[Any] = []
        while len(replies) < limit:
            try:
                reply = self._reader.gets()
            except Lost as error:  # the reader raises it again at each call
                if replies:
                    return replies
                raise Lost(f"Redis sent what is no reply: {error}") from error
            if reply is _NOTHING:
                self._note_all_taken()
                if self._ended is not None and not replies:
                    raise Lost(self._ended)
                break
            if isinstance(reply, Refused):
                if not replies:
                    raise reply
                self._refusal = reply
                break
            replies.append(reply)
        return replies

    async def wait(self, seconds: float) -> None:
        """Wait until bytes come or the connection ends, at most so many seconds."""
        await wait_for_news([self], seconds)

    @property
    def has_news(self) -> bool:
        """True if bytes have come since replies were last looked for in vain, or if the connection has ended."""
        return self._has_news or self._ended is not None

    def wake(self, waiter: asyncio.Future[None] | None) -> None:
        """Set this waiter when bytes come or the connection ends."""
        self._waiter = waiter

    def _note_all_taken(self) -> None:
        """Let Redis send on: there is no complete reply left, and perhaps a part of a large one."""
        self._has_news = False
        self._unread = 0
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        self._wake()

    def _wake(self) -> None:
        self._has_news = True
        if self._waiter is not None:
            _set(self._waiter)


async def wait_for_news(streams: Sequence[ReplyStream], seconds: float) -> None:
    """Wait until bytes come over one of the connections, or one ends, at most so many seconds."""
    if any(stream.has_news for stream in streams):
        return
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    timer = loop.call_later(seconds, _set, waiter)
    for stream in streams:
        stream.wake(waiter)
    try:
        await waiter
    finally:
        timer.cancel()
        for stream in streams:
            stream.wake(None)


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
