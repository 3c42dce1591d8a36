"""Redis behind a slow link: reads have a size that fits, and are given up only when nothing comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo._read_budget import LEAST_SIZE
from silbo.brokers.redis import DeadLetters, RedisPubSub, RedisStreams
from silbo.brokers.redis import group as reading
from silbo.brokers.redis.read_size import READ_BYTES, ReadSize
from silbo.errors import BrokerUnavailable
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.redis_streams import message, number, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY, DEAD = "silbo:{events}", "silbo:{events}:dead"
LARGE = 900_000
"""Bytes of a large message."""
RATE = 600_000
"""Bytes that the slow link carries in a second: a large message takes longer than TIMEOUT."""
TIMEOUT = 1.0
LONG = 60.0


class Link:
    """A link to a server, as a path of a unix socket; what Redis sends comes slowly, or stops."""

    def __init__(self, server: RedisServer, folder: Path) -> None:
        self.path = str(folder / "link.sock")
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self._server = str(server.folder / "redis.sock")
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_unix_connection(self._server)
        self._writers += [here, writer]
        self._tasks |= {
            asyncio.create_task(self._carry(reader, here, slow=False)),
            asyncio.create_task(self._carry(there, writer, slow=True)),
        }

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, slow: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(RATE // 50):
                if slow:
                    await self.goes_on.wait()
                    await asyncio.sleep(len(data) / RATE)
                writer.write(data)
                await writer.drain()

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@pytest.fixture
async def link(own_redis: RedisServer, tmp_path: Path) -> AsyncIterator[Link]:
    slow = Link(own_redis, tmp_path)
    server = await asyncio.start_unix_server(slow.serve, slow.path)
    yield slow
    server.close()
    await slow.aclose()


@asynccontextmanager
async def client_over(link: Link) -> AsyncIterator[Redis]:
    async with Redis(unix_socket_path=link.path) as client:
        yield client


async def all_of(receiver: Receiver, many: int) -> list[list[int]]:
    """The numbers of so many messages, by the read that brought them."""
    reads: list[list[int]] = []
    async with asyncio.timeout(LONG):
        while sum(map(len, reads)) < many:
            if items := await receiver.receive(100):
                reads.append([number(item) for item in items])
    return reads


def in_order(reads: list[list[int]]) -> list[int]:
    return [number for numbers in reads for number in numbers]


@pytest.mark.one_server
async def test_message_that_takes_longer_than_the_timeout_is_read(
    streams: RedisStreams, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes come all the time. And so again for what is read anew."""
    monkeypatch.setattr(reading, "BLOCK", 0.05)
    await streams.publish(message(1, data="x" * LARGE))
    async with client_over(link) as client:
        slow = RedisStreams(client, app="billing", timeout=TIMEOUT)
        async with opened(slow.group("billing", start="oldest", consumer="pod-1")) as receiver:
            (delivery,) = await receiver.receive(100)
            assert number(delivery) == 1


@pytest.mark.one_server
async def test_link_that_stops_is_noticed(streams: RedisStreams, link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer: from then on there is no progress."""
    monkeypatch.setattr(reading, "BLOCK", 0.05)
    async with client_over(link) as client:
        slow = RedisStreams(client, app="billing", timeout=0.3)
        async with opened(slow.group("billing", start="oldest")) as receiver:
            await streams.publish(message(1, data="x" * LARGE))
            read = asyncio.ensure_future(receiver.receive(100))
            await asyncio.sleep(0.2)
            link.goes_on.clear()
            with pytest.raises(BrokerUnavailable, match="no answer within"):
                async with asyncio.timeout(LONG):
                    await read
            link.goes_on.set()


@pytest.mark.parametrize("what", ["new", "again", "claimed"])
async def test_reads_of_large_messages_are_bounded_in_bytes(what: str, admin: Redis, streams: RedisStreams) -> None:
    """Whatever the room for messages: new ones, those that were given before, and those of a dead consumer."""
    await streams.publish(*[message(n, data="x" * 300_000) for n in range(10)])
    group = streams.group("billing", start="oldest", consumer="pod-1")
    if what != "new":
        before: Any = await group.open()
        assert in_order(await all_of(before, 10)) == list(range(10))
        await before._drop()
        await before._in_hand.aclose()
    if what == "claimed":
        ids = [row["message_id"] for row in await admin.xpending_range(KEY, "billing", "-", "+", 10)]
        await admin.xclaim(KEY, "billing", "pod-1", 0, ids, idle=60_000, justid=True)
        group = streams.group("billing", start="oldest", consumer="pod-2")
    async with opened(group) as receiver:
        reads = await all_of(receiver, 10)
        assert in_order(reads) == list(range(10))
        assert max(map(len, reads)) <= 4


async def test_small_messages_come_many_at_once(streams: RedisStreams) -> None:
    """From the first read on, and soon again after a large one."""
    await streams.publish(*map(message, range(100)))
    async with opened(streams.group("billing", start="oldest")) as receiver:
        assert len(await receiver.receive(100)) == 100
        await streams.publish(message(100, data="x" * LARGE), *map(message, range(101, 301)))
        reads = await all_of(receiver, 201)
        assert in_order(reads) == list(range(100, 301))
        assert len(reads) <= 6


@pytest.mark.one_server
async def test_what_fits_is_shared_by_the_streams(streams: RedisStreams) -> None:
    """Redis gives the number asked for of each."""
    addresses = ["one", "two", "three", "four"]
    for address in addresses:
        await streams.publish(*[message(n, to=address, data="x" * 300_000) for n in range(4)])
    async with opened(streams.group("billing", start="oldest", streams=addresses)) as receiver:
        receiver_: Any = receiver
        sizes: list[int] = []
        while sum(sizes) < 16:
            first = await receiver.receive(1)
            sizes.append(len(first) + len(receiver_._ready))
            await receiver.receive(100)
        assert max(sizes) <= 4


@pytest.mark.one_server
async def test_dead_letters_are_listed_over_a_slow_link(admin: Redis, streams: RedisStreams, link: Link) -> None:
    """Pages are bounded in bytes, and large ones take their time."""
    large = {"message": b"x" * LARGE, "group": "billing", "stream": KEY, "id": "1-1"}
    await admin.xadd(DEAD, large, id="1-1")
    await admin.xadd(DEAD, large | {"message": "small"}, id="1-2")
    async with client_over(link) as client, DeadLetters(client, timeout=TIMEOUT) as dead:
        assert [letter.id for letter in await dead.list()] == ["1-1", "1-2"]


async def test_pages_of_dead_letters_are_bounded_in_bytes(admin: Redis, streams_client: Redis) -> None:
    for n in range(1, 9):
        await admin.xadd(DEAD, {"message": b"x" * 300_000, "group": "billing"}, id=f"1-{n}")
    async with DeadLetters(streams_client) as dead:
        pages = [len(page) async for page in dead._pages(None)]
        assert sum(pages) == 8
        assert max(pages) <= 4


@pytest.mark.one_server
async def test_large_message_over_pubsub_is_no_silence(pubsub_client: Redis, link: Link) -> None:
    """It takes longer than the time after which a silent connection is given up."""
    async with client_over(link) as client, RedisPubSub(pubsub_client, app="web") as pubsub:
        async with opened(RedisPubSub(client, app="billing", timeout=0.4).subscribe("user.*")) as receiver:
            await pubsub.publish(message(1, data="x" * LARGE))
            (delivery,) = await receive(receiver, 1)
            assert isinstance(delivery, Delivery)
            assert number(delivery) == 1


def test_size_follows_the_entries_and_the_link() -> None:
    size = ReadSize()
    assert size.count(100) == 1
    size.note(1, 100_000, 0.01)
    assert size.count(100) == 10
    assert size.count(100, streams=5) == 2
    for _ in range(30):
        size.note(10, 1_000, 0.01)
    assert size.count(100) == 100
    size.note(10, 1_000_000, 20.0)  # a tenth of that takes two seconds
    assert size.count(100) == 1
    for _ in range(30):
        size.note(1, 100_000, 60.0)
    assert size.has_room(LEAST_SIZE // 2 - 1)
    assert not size.has_room(LEAST_SIZE)
    for _ in range(30):
        size.note(1, 1, 0.01)
    assert not size.has_room(READ_BYTES // 2)
    assert size.has_room(READ_BYTES // 2 - 1)
