"""A way to Redis on which replies are lost, requests are held back, and everything takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

__all__ = ["Delay", "DropReplies", "HoldRequest", "Link", "Proxy", "Rule"]

CHUNK = 1 << 18


class Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._writers = (client, server)
        self.armed = False
        """For a rule to remember that it waits for this link's next reply."""

    def cut(self) -> None:
        """Break it, on both sides."""
        for writer in self._writers:
            writer.transport.abort()


class Rule:
    """What happens on the way; this one disturbs nothing."""

    async def request(self, data: bytes, link: Link) -> None:
        """Before a piece of a request goes on."""

    async def reply(self, data: bytes, link: Link) -> None:
        """Before a piece of a reply goes on."""


class Delay(Rule):
    """Each way takes its time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def request(self, data: bytes, link: Link) -> None:
        await asyncio.sleep(self._seconds)

    reply = request


class DropReplies(Rule):
    """Redis has carried out the command, and the connection breaks before its answer arrives.

    Args:
        command: Its name; the first word of a request.
        random: Decides which.
        share: Of them, on the average.
        most: So many are dropped; then all goes well.
        counts: Whether a reply is one of those to be dropped: not an error, nor one that brings nothing.
    """

    def __init__(
        self, command: bytes, random: Random, *, share: float, most: int, counts: Callable[[bytes], bool]
    ) -> None:
        self._head = b"$%d\r\n%b\r\n" % (len(command), command)
        self._random, self._share, self._most, self._counts = random, share, most, counts
        self.dropped = 0

    async def request(self, data: bytes, link: Link) -> None:
        if self._head in data[:64]:
            link.armed = True

    async def reply(self, data: bytes, link: Link) -> None:
        if not link.armed:
            return
        link.armed = False
        if self.dropped < self._most and self._counts(data) and self._random.random() < self._share:
            self.dropped += 1
            link.cut()


class HoldRequest(Rule):
    """The next request with a script waits on its way, until it is let go; then its answer is kept."""

    def __init__(self) -> None:
        self.holds = self.answered = False
        self.held, self.released = asyncio.Event(), asyncio.Event()
        self.passed = 0
        """Scripts that went through and were answered without an error."""

    def arm(self) -> None:
        """Hold the next one."""
        self.holds, self.answered = True, False
        self.held.clear()
        self.released.clear()

    def disarm(self) -> None:
        """Hold none."""
        self.holds = False

    async def request(self, data: bytes, link: Link) -> None:
        if b"$7\r\nEVALSHA\r\n" not in data[:64]:
            return
        if self.holds:
            self.holds = False
            self.held.set()
            await self.released.wait()
        link.armed = True

    async def reply(self, data: bytes, link: Link) -> None:
        if link.armed:
            link.armed, self.answered = False, True
            self.passed += not data.startswith(b"-")


class Proxy:
    """Listens on a port of this machine and passes on to a Redis, under a rule."""

    def __init__(self, upstream: str, rule: Rule | None = None) -> None:
        self._upstream, self.rule = urlsplit(upstream), rule or Rule()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=CHUNK)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server
        self._server.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        try:
            if self._upstream.scheme == "unix":
                upstream = await asyncio.open_unix_connection(self._upstream.path, limit=CHUNK)
            else:
                upstream = await asyncio.open_connection(self._upstream.hostname, self._upstream.port, limit=CHUNK)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, upstream[1])
        ways = [
            asyncio.create_task(self._pass_on(reader, upstream[1], self.rule.request, link)),
            asyncio.create_task(self._pass_on(upstream[0], writer, self.rule.reply, link)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the proxy closes; asyncio's own callback reads the result of this task
        finally:
            link.cut()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        rule: Callable[[bytes, Link], Awaitable[None]],
        link: Link,
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await rule(data, link)
                if writer.is_closing():  # the rule has cut it
                    return
                writer.write(data)
                await writer.drain()
