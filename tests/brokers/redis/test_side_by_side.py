"""Streams that are read side by side: fairly, each for itself, also while parts come and go or a server is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher
from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis.group import StreamGroup, StreamReceiver
from silbo.brokers.redis.side_by_side import SideBySide
from silbo.errors import BrokerRefused, BrokerUnavailable
from silbo.message import Batch, Delivery, Message
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, joined
from tests.support.redis_streams import eventually, message, number, opened, receive
from tools.redis_server import RedisServer

SOON = 0.4
"""Seconds after which a silent consumer's deliveries are claimed."""


@dataclass
class Node:
    """One of two servers, with a stream of its own name on it."""

    server: RedisServer
    admin: Redis
    streams: RedisStreams
    name: str

    @property
    def key(self) -> str:
        return f"silbo:{{{self.name}}}"

    def group(self, **options: Any) -> StreamGroup:
        return self.streams.group("billing", streams=[self.name], start="oldest", **options)

    async def publish(self, *numbers: int) -> None:
        await self.streams.publish(*[message(each, to=self.name) for each in numbers])

    async def pending(self) -> int:
        found: int = (await self.admin.xpending(self.key, "billing"))["pending"]
        return found


@asynccontextmanager
async def node(server: RedisServer, name: str) -> AsyncGenerator[Node]:
    async with Redis.from_url(server.url, protocol=2) as admin, RedisStreams(admin, app="web", timeout=60.0) as streams:
        yield Node(server, admin, streams, name)


@pytest.fixture(scope="module")
def second_server() -> Iterator[RedisServer]:
    with RedisServer(appendonly="always") as server:
        yield server


@pytest.fixture
async def nodes(own_redis: RedisServer, second_server: RedisServer) -> AsyncIterator[tuple[Node, Node]]:
    """The first is this test's alone, to be killed and frozen; the stream of the second is."""
    async with node(own_redis, "first") as first, node(second_server, f"second-{next(_names)}") as second:
        yield first, second


_names = count(1)


@asynccontextmanager
async def side_by_side(*nodes: Node, claim_after: float = 30.0) -> AsyncGenerator[SideBySide]:
    parts = [StreamReceiver(each.group(claim_after=claim_after)) for each in nodes]
    receiver = SideBySide(parts, group="billing", keep_every=claim_after / 3, ack_delay=0.005)
    try:
        yield receiver
    finally:
        await receiver.aclose()


class Subscription:
    """For a consumer: parts on several servers."""

    app = "billing"
    name = "billing"

    def __init__(self, *nodes: Node) -> None:
        self._nodes = nodes

    async def open(self) -> SideBySide:
        parts = [StreamReceiver(each.group()) for each in self._nodes]
        return SideBySide(parts, group="billing", keep_every=10.0, ack_delay=0.005)


async def take(receiver: SideBySide, many: int) -> list[Delivery]:
    items = await receive(receiver, many)
    assert all(isinstance(item, Delivery) for item in items), items
    return [item for item in items if isinstance(item, Delivery)]


async def until_away(receiver: SideBySide, *away: Node) -> None:
    async def is_away() -> bool:
        with suppress(BrokerUnavailable):
            await receiver.receive(10)
        return set(receiver.away) == {each.key for each in away}

    await eventually(is_away)


# -- reading ------------------------------------------------------------------------------------------------


async def test_all_streams_come_each_in_its_order(streams: RedisStreams) -> None:
    """However the calls cut them, and never more than a call asked for."""
    names = ["one", "two", "three"]
    await streams.publish(*[message(each, to=name) for each in range(100) for name in names])
    receiver = await streams.group("billing", start="oldest", streams=names).open_side_by_side()
    got: dict[str, list[int]] = {}
    try:
        async with asyncio.timeout(30):
            while sum(map(len, got.values())) < 300:
                items = await receiver.receive_batches(7)
                assert sum(len(item) if isinstance(item, Batch) else 1 for item in items) <= 7
                for item in items:
                    assert isinstance(item, Batch)
                    got.setdefault(item.address, []).extend(map(number, item))
                    await receiver.ack(item)
        assert await receiver.receive(7) == []
    finally:
        await receiver.aclose()
    assert got == {f"silbo:{{{name}}}": list(range(100)) for name in names}


async def test_a_full_stream_leaves_the_others_their_turn(streams: RedisStreams) -> None:
    """Hundreds of its messages wait to be taken one by one: the other's comes among the first."""
    groups = [streams.group("billing", start="oldest", streams=[name]) for name in ("full", "quiet")]
    full, quiet = map(StreamReceiver, groups)
    receiver = SideBySide([full, quiet], group="billing", keep_every=10.0, ack_delay=0.005)
    try:
        await streams.publish(*[message(each, to="full") for each in range(400)])
        await take(receiver, 10)
        reading = asyncio.create_task(receiver.receive(400))  # fetches many, and is not there to take them
        await asyncio.sleep(0)
        reading.cancel()
        await streams.publish(message(-1, to="quiet"))

        async def is_fetched() -> bool:
            return full.in_hand > 300 and quiet.has_fetched

        await eventually(is_fetched)
        numbers: list[int] = []

        async def is_taken() -> bool:
            numbers.extend(map(number, await receiver.receive(1)))
            return -1 in numbers

        await eventually(is_taken)
        assert len(numbers) < 200
    finally:
        await receiver.aclose()


@pytest.mark.parametrize(("together", "each"), [(1, 10), (2, 20), (8, 40)])
async def test_full_streams_share_what_is_fetched(streams: RedisStreams, together: int, each: int) -> None:
    """Four of them, and a limit of 40: none fetches more than the limit, whatever all may fetch together."""
    names = ["one", "two", "three", "four"]
    await streams.publish(*[message(n, to=name) for n in range(200) for name in names])
    parts = [StreamReceiver(streams.group("billing", start="oldest", streams=[name])) for name in names]
    receiver = SideBySide(parts, group="billing", keep_every=10.0, ack_delay=0.005)
    receiver.together = together
    try:
        reading = asyncio.create_task(receiver.receive(40))  # from now on all are known to be full
        await asyncio.sleep(0)
        reading.cancel()

        async def are_fetched() -> bool:
            return all(part.has_fetched for part in parts)

        await eventually(are_fetched)
        most = taken = 0
        while taken < 400:
            items = [item for item in await receiver.receive(40) if isinstance(item, Delivery)]
            taken += len(items)
            most = max(most, *(part.in_hand for part in parts))
            await receiver.ack(*items)
        assert most == each
    finally:
        await receiver.aclose()


async def test_a_cancelled_read_loses_nothing(streams: RedisStreams) -> None:
    """A consumer that stops cancels it at any moment."""
    receiver = await streams.group("billing", start="oldest", streams=["one", "two"]).open_side_by_side()
    got: list[int] = []
    try:
        for each in range(0, 40, 2):
            reading = asyncio.create_task(receiver.receive(10))
            await streams.publish(message(each, to="one"), message(each + 1, to="two"))
            reading.cancel()
            with suppress(asyncio.CancelledError):
                got += map(number, await reading)
        got += map(number, await take(receiver, 40 - len(got)))
    finally:
        await receiver.aclose()
    assert sorted(got) == list(range(40))


@pytest.mark.long
@pytest.mark.one_server
async def test_what_waits_to_be_taken_is_kept(streams: RedisStreams) -> None:
    """It was fetched, there was no room for it, and a listener holds things up: no other consumer claims it meanwhile."""
    group = streams.group("billing", start="oldest", streams=["one", "two"], claim_after=SOON)
    await streams.publish(*[message(each, to=name) for each in range(3) for name in ("one", "two")])
    async with opened(group) as first, opened(group) as other:
        (taken,) = await receive(first, 1)
        assert isinstance(taken, Delivery)
        got = await receive(other, 4)  # what the first has not fetched
        for _ in range(6):
            await asyncio.sleep(SOON / 4)
            assert await first.keep(taken) == []
            assert await other.keep(*[item for item in got if isinstance(item, Delivery)]) == []
            assert await other.receive(10) == []
        assert len(await receive(first, 1)) == 1


# -- parts that come and go ---------------------------------------------------------------------------------


async def test_a_part_comes_and_goes_while_it_is_read(nodes: tuple[Node, Node]) -> None:
    """Without parts it waits; what a removed one had given out is settled, and the rest stays in Redis."""
    first, second = nodes
    async with side_by_side() as receiver:
        assert await receiver.receive(10) == []
        parts = [StreamReceiver(each.group()) for each in nodes]
        await first.publish(1, 2, 3)
        reading = asyncio.create_task(take(receiver, 1))
        await asyncio.sleep(0)
        receiver.add(parts[0])  # while a read waits
        (one,) = await reading
        receiver.add(parts[1])
        await receiver.remove(parts[0])
        await first.publish(4)
        await second.publish(5)
        assert [number(item) for item in await take(receiver, 1)] == [5]
        assert await receiver.receive(10) == []
        assert receiver.count_in_hand(parts[0]) == 1
        assert await receiver.count(one) == 1
        await receiver.ack(one)
        assert receiver.count_in_hand(parts[0]) == 0
        await parts[0].aclose()
        assert list(await receiver.keep(one)) == [one], "its owner has closed it"
        assert await receiver.bury(one, error="none", attempts=1) is False
        with pytest.raises(BrokerRefused, match="no longer"):
            await receiver.count(one)
        receiver.add(StreamReceiver(first.group()))  # the same stream again
        assert sorted(number(item) for item in await take(receiver, 3)) == [2, 3, 4]


# -- a server that is away ----------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_frozen_server_holds_up_no_other(nodes: tuple[Node, Node], caplog: pytest.LogCaptureFixture) -> None:
    """Nor do the acknowledgements for it, which are made up for before it is read again: nothing comes twice."""
    first, second = nodes
    async with side_by_side(first, second) as receiver:
        await first.publish(*range(10))
        got = await take(receiver, 10)
        first.server.pause()
        try:
            loop = asyncio.get_running_loop()
            begin = loop.time()
            await receiver.ack(*got)
            for each in range(100, 120):
                await second.publish(each)
                (item,) = await take(receiver, 1)
                assert number(item) == each
                await receiver.ack(item)
            assert loop.time() - begin < 30
            assert await second.pending() == 0
            await until_away(receiver, first)
        finally:
            first.server.resume()
        await first.publish(10)
        assert [number(item) for item in await take(receiver, 1)] == [10]
        await until_away(receiver)
        assert await first.pending() == 1
    told = [record.getMessage() for record in caplog.records if first.key in record.getMessage()]
    assert [" back after" in text for text in told] == [False, True], told


@pytest.mark.long
async def test_what_was_done_before_a_kill_does_not_come_again(nodes: tuple[Node, Node]) -> None:
    """Its acknowledgement had no answer. What was not done comes again."""
    first, second = nodes
    async with side_by_side(first, second) as receiver:
        await first.publish(1, 2)
        done, open_ = await take(receiver, 2)
        first.server.kill()
        await receiver.ack(done)
        await until_away(receiver, first)
        first.server.restart()
        again = await take(receiver, 1)
        assert [(number(item), item.attempt) for item in again] == [(number(open_), 2)]
        assert await first.pending() == 1


async def test_a_failed_delivery_of_a_server_that_is_away_waits(nodes: tuple[Node, Node]) -> None:
    """The worker gets an error that lets it take another; with no server at all it waits."""
    first, second = nodes
    async with side_by_side(first, second) as receiver:
        await first.publish(1)
        (item,) = await take(receiver, 1)
        first.server.kill()
        with pytest.raises(BrokerRefused):
            await receiver.count(item, error="broken")
        with pytest.raises(BrokerRefused):
            await receiver.bury(item, error="broken", attempts=1)
        with pytest.raises(BrokerUnavailable):
            await receiver.offer(item)
        first.server.restart()
        await until_away(receiver)
        assert await receiver.count(item) == 1


@pytest.mark.long
async def test_without_a_server_left_the_consumer_is_told(nodes: tuple[Node, Node]) -> None:
    """By each call, also while a frozen server lets no read end."""
    first, _ = nodes
    async with side_by_side(first) as receiver:
        await first.publish(1, 2)
        one, two = await take(receiver, 2)
        first.server.pause()
        try:
            await receiver.ack(one)
            for _ in range(2):
                with pytest.raises(BrokerUnavailable):
                    await receiver.receive(1)
        finally:
            first.server.resume()
        await until_away(receiver)
        await receiver.ack(two)
        assert await first.pending() == 0


@pytest.mark.long
async def test_what_may_be_anothers_is_given_up_and_comes_again(nodes: tuple[Node, Node]) -> None:
    """A server that was away for nearly claim_after may have given it to another consumer. If it did not, it comes again."""
    first, second = nodes
    async with side_by_side(first, second, claim_after=2.0) as receiver:
        await first.publish(1)
        await second.publish(2)
        one, two = sorted(await take(receiver, 2), key=number)
        assert await receiver.keep(one, two) == []
        first.server.kill()

        async def is_lost() -> bool:
            lost = await receiver.keep(one, two)
            assert two not in lost
            return one in lost

        await asyncio.gather(eventually(is_lost), until_away(receiver, first))
        first.server.restart()
        (again,) = await take(receiver, 1)
        assert number(again) == 1
        assert await receiver.keep(again, two) == []


async def test_a_server_that_is_away_at_the_start_is_read_later(nodes: tuple[Node, Node]) -> None:
    """Its group is made then; without any server the start fails."""
    first, second = nodes
    first.server.kill()
    async with side_by_side(first, second) as receiver:
        await second.publish(2)
        assert [number(item) for item in await take(receiver, 1)] == [2]
        await until_away(receiver, first)
        first.server.restart()
        await first.publish(1)
        assert [number(item) for item in await take(receiver, 1)] == [1]


async def test_a_consumer_goes_on_with_the_others(nodes: tuple[Node, Node], caplog: pytest.LogCaptureFixture) -> None:
    """Its health names the stream that is away; at the end each message was handled once."""
    caplog.set_level(logging.WARNING)
    first, second = nodes
    dispatcher, heard = AsyncEventDispatcher(), Heard()
    dispatcher.add_subscriber(heard)
    consumer = Consumer(dispatcher, Subscription(first, second), events=[USER_JOINED], own="handle")
    async with Running(consumer):
        await first.streams.publish(*[_to(first, each) for each in range(50)])
        await heard.until(50)
        first.server.kill()
        for each in range(50, 80):
            await second.streams.publish(_to(second, each))
            await heard.until(each + 1)

        async def is_seen() -> bool:
            return consumer.health().away == (first.key,)

        await eventually(is_seen)
        assert consumer.health().is_ready
        first.server.restart()
        await first.streams.publish(*[_to(first, each) for each in range(80, 130)])
        await heard.until(130)
    assert sorted(heard.ids) == list(range(130))
    assert not consumer.health().away
    assert await first.pending() == await second.pending() == 0


def _to(node: Node, each: int) -> Message:
    return replace(joined(each), to=node.name)
