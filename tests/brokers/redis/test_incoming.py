"""Replies of a subscribed connection: all that have come at once, in their order, and no more than the memory allows."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from silbo.brokers.redis import incoming
from silbo.brokers.redis.failures import Lost, Refused
from silbo.brokers.redis.incoming import ReplyStream

WITHIN = 30.0


def reply(text: str) -> bytes:
    return b"*2\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n" % (len(text), text.encode())


class Wire:
    """A stream, and the other end of its socket."""

    def __init__(self, stream: ReplyStream, server: socket.socket) -> None:
        self.stream = stream
        self.server = server

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.server, data)

    async def take(self, limit: int = 100) -> list[Any]:
        """Wait for the next replies."""
        async with asyncio.timeout(WITHIN):
            while not (replies := self.stream.take(limit)):
                await self.stream.wait(WITHIN)
            return replies


@pytest.fixture
async def wire() -> AsyncGenerator[Wire]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, protocol = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    assert isinstance(transport, asyncio.Transport)
    stream = ReplyStream(protocol, transport)
    transport.set_protocol(stream)
    yield Wire(stream, theirs)
    transport.abort()
    theirs.close()


async def test_all_replies_come_at_once_and_in_order(wire: Wire) -> None:
    await wire.send(b"".join(reply(str(n)) for n in range(10)))
    assert await wire.take(4) == [[b"message", b"%d" % n] for n in range(4)]
    assert wire.stream.take(100) == [[b"message", b"%d" % n] for n in range(4, 10)]
    assert wire.stream.take(100) == []


async def test_part_of_a_reply_waits_for_its_rest(wire: Wire) -> None:
    await wire.send(reply("first") + reply("second")[:12])
    assert await wire.take() == [[b"message", b"first"]]
    await wire.stream.wait(0)
    assert wire.stream.take(100) == []
    await wire.send(reply("second")[12:])
    assert await wire.take() == [[b"message", b"second"]]


async def test_wait_ends_with_its_time(wire: Wire) -> None:
    async with asyncio.timeout(WITHIN):
        await wire.stream.wait(0.01)
    assert wire.stream.take(1) == []


async def test_error_is_raised_behind_the_replies_before_it(wire: Wire) -> None:
    await wire.send(reply("first") + b"-NOPERM no such channel for you\r\n" + reply("second"))
    assert await wire.take() == [[b"message", b"first"]]
    with pytest.raises(Refused, match="no such channel for you") as refusal:
        await wire.take()
    assert refusal.value.code == "NOPERM"
    assert await wire.take() == [[b"message", b"second"]]


async def test_end_is_told_behind_the_last_reply(wire: Wire) -> None:
    await wire.send(reply("last"))
    wire.server.shutdown(socket.SHUT_WR)
    assert await wire.take() == [[b"message", b"last"]]
    for _ in range(2):
        with pytest.raises(Lost, match="the server has closed the connection"):
            await wire.take()


async def test_what_is_no_reply_loses_the_connection(wire: Wire) -> None:
    await wire.send(reply("last") + b"HTTP/1.1 400 Bad Request\r\n")
    assert await wire.take() == [[b"message", b"last"]]
    with pytest.raises(Lost, match="what is no reply"):
        await wire.take()


async def test_sender_has_to_wait_while_nothing_is_taken(wire: Wire) -> None:
    """The memory is bounded: what is not read stays with Redis, which cuts a slow subscriber off."""
    sent = 0
    big = reply("x" * 10_000)
    send = asyncio.ensure_future(wire.send(big * 1000))
    while not wire.stream._is_paused:
        await wire.stream.wait(WITHIN)
        await asyncio.sleep(0)
    held = wire.stream._unread
    assert incoming.MOST_UNREAD < held < 2 * incoming.MOST_UNREAD
    for _ in range(20):
        await asyncio.sleep(0)
    assert wire.stream._unread == held
    assert not send.done()
    while sent < 1000:
        sent += len(await wire.take())
    await send
    assert sent == 1000


async def test_reply_larger_than_the_bound_comes_whole(wire: Wire) -> None:
    text = "x" * (3 * incoming.MOST_UNREAD)
    send = asyncio.ensure_future(wire.send(reply(text)))
    assert await wire.take() == [[b"message", text.encode()]]
    await send
