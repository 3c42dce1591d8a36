"""Redis above maxmemory: what fails waits until it can be stored; everything else is handled and acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from silbo import AsyncEventDispatcher, Consumer
from silbo._retry import Backoff
from silbo.brokers.redis import DeadLetters, RedisInbox, RedisStreams
from silbo.brokers.redis import group as reading
from silbo.consumer import attempts
from silbo.errors import BrokerRefused, BrokerUnavailable, MessageInvalid
from silbo.message import Delivery
from tests.support.redis_streams import eventually, message, opened, receive
from tools.redis_server import RedisServer

pytestmark = pytest.mark.every_redis
KEY, DEAD = "silbo:{events}", "silbo:{events}:dead"
LONG = 30.0
"""Seconds after which a hang is a failure."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "STORING_RETRY", Backoff(initial=0.02, cap=0.1))


async def fill(admin: Redis) -> None:
    """Leave no room; the group is there, for a new one is refused."""
    with suppress(ResponseError):
        await admin.xgroup_create(KEY, "billing", "0")
    await admin.config_set("maxmemory", 1)


async def empty(admin: Redis) -> None:
    await admin.config_set("maxmemory", 0)


async def pending(admin: Redis) -> list[str]:
    return [row["message_id"].decode() for row in await admin.xpending_range(KEY, "billing", "-", "+", 100)]


class Program:
    """A consumer whose listener fails for the numbers in ``bad``."""

    def __init__(self, streams: RedisStreams, *bad: int, **options: Any) -> None:
        self.heard: list[int] = []
        self.errors: list[Exception] = []
        self._bad = bad
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_listener("user.joined", self._hear)
        options = {"max_attempts": 2, "backoff": Backoff(initial=0.01)} | options
        self.consumer = Consumer(
            dispatcher,
            streams.group("billing", start="oldest", claim_after=30),
            on_error=lambda error, about: self.errors.append(error),
            **options,
        )

    async def _hear(self, event: Any) -> None:
        number = event.payload["n"]
        self.heard.append(number)
        if number in self._bad:
            raise LookupError("bad")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Program]:
        async with self.consumer:
            task = asyncio.create_task(self.consumer.run())
            yield self
            self.consumer.stop()
            await task


@pytest.mark.one_server
async def test_failing_message_does_not_hold_up_the_others(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker. The failed attempt waits, with a warning, and its listeners do not run again before it is counted."""
    await streams.publish(*map(message, range(5)))
    bad = (await admin.xrange(KEY))[1][0].decode()
    await fill(admin)
    async with Program(streams, 1).running() as program:

        async def others_are_done() -> bool:
            return len(program.heard) == 5 and await pending(admin) == [bad]

        await eventually(others_are_done, LONG)
        await asyncio.sleep(0.2)  # several tries to count
        assert program.heard == [0, 1, 2, 3, 4]
        assert (program.consumer.stats.handled, program.consumer.stats.failed) == (4, 1)
        await empty(admin)

        async def is_dead() -> bool:
            return await admin.xlen(DEAD) == 1

        await eventually(is_dead, LONG)
        assert program.heard == [0, 1, 2, 3, 4, 1]
        assert await pending(admin) == []
        ((_, fields),) = await admin.xrange(DEAD)
        assert (fields[b"id"].decode(), fields[b"attempts"]) == (bad, b"2")
    texts = [record.getMessage() for record in caplog.records]
    assert len([text for text in texts if "storing of failed deliveries refused" in text and "OOM" in text]) == 1
    assert len([text for text in texts if "storing of failed deliveries back" in text]) == 1


@pytest.mark.one_server
async def test_dead_letter_that_is_refused_waits(admin: Redis, streams: RedisStreams) -> None:
    """A malformed message is not counted; its dead letter is written once there is room, and nothing is lost."""
    await admin.xadd(KEY, {"message": "no message"})
    await streams.publish(*map(message, range(3)))
    malformed = (await admin.xrange(KEY))[0][0].decode()
    await fill(admin)
    async with Program(streams).running() as program:

        async def others_are_done() -> bool:
            return len(program.heard) == 3 and await pending(admin) == [malformed]

        await eventually(others_are_done, LONG)
        await empty(admin)

        async def is_dead() -> bool:
            return await admin.xlen(DEAD) == 1

        await eventually(is_dead, LONG)
        assert await pending(admin) == []
        assert program.consumer.stats.malformed == 1
        assert len([error for error in program.errors if isinstance(error, MessageInvalid)]) == 1


async def test_dead_letters_that_take_no_more_hold_up_nobody(admin: Redis, streams: RedisStreams) -> None:
    """An entry that another program wrote has the highest id of all: Redis adds none behind it. It has to be deleted."""
    highest = "18446744073709551615-18446744073709551615"
    await admin.xadd(DEAD, {"a": "b"}, id=highest)
    await streams.publish(*map(message, range(3)))
    bad = (await admin.xrange(KEY))[0][0].decode()
    async with Program(streams, 0, max_attempts=1).running() as program:

        async def others_are_done() -> bool:
            return len(program.heard) == 3 and await pending(admin) == [bad]

        await eventually(others_are_done, LONG)
        await admin.delete(DEAD)

        async def is_dead() -> bool:
            return await admin.xlen(DEAD) == 1

        await eventually(is_dead, LONG)
        assert program.heard == [0, 1, 2]
        assert await pending(admin) == []


@pytest.mark.one_server
async def test_suspect_waits_until_its_start_can_be_counted(admin: Redis, streams: RedisStreams) -> None:
    """It may have killed a process before: uncounted, it could do so for ever."""
    group = streams.group("billing", start="oldest", claim_after=30)
    async with opened(group) as receiver:
        await streams.publish(message(0))
        await receive(receiver, 1)
    await streams.publish(message(1))
    await fill(admin)
    async with Program(streams).running() as program:

        async def other_is_done() -> bool:
            return program.heard == [1] and len(await pending(admin)) == 1

        await eventually(other_is_done, LONG)
        await empty(admin)

        async def all_done() -> bool:
            return await pending(admin) == []

        await eventually(all_done, LONG)
        assert program.heard == [1, 0]
        assert program.consumer.stats.handled == 2


@pytest.mark.one_server
async def test_inbox_without_room_is_no_failure(
    admin: Redis, streams: RedisStreams, streams_client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The effect is there; that it can't be remembered is logged."""
    await streams.publish(*map(message, range(3)))
    await fill(admin)
    async with RedisInbox(streams_client) as inbox, Program(streams, inbox=inbox).running() as program:

        async def all_done() -> bool:
            return program.consumer.stats.handled == 3 and await pending(admin) == []

        await eventually(all_done, LONG)
    assert program.heard == [0, 1, 2]
    assert "not remembered in the inbox" in caplog.text


async def test_consumer_comes_back_while_redis_is_full(
    admin: Redis, streams: RedisStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its group exists: nothing has to be made. And what it does beside reading may be refused."""
    monkeypatch.setattr(reading, "FORGET_AFTER", 0.01)
    group = streams.group("billing", start="oldest", claim_after=0.05)
    async with opened(group):
        await streams.publish(*map(message, range(3)))
    await admin.xgroup_createconsumer(KEY, "billing", "silent")
    await asyncio.sleep(0.6)  # it is to be removed
    await fill(admin)
    async with opened(group) as receiver:
        items = await receive(receiver, 3)
        await receiver.ack(*[item for item in items if isinstance(item, Delivery)])
        assert await pending(admin) == []
    await empty(admin)


async def test_refusal_of_all_writes_is_an_outage(own_redis: RedisServer, admin: Redis, streams: RedisStreams) -> None:
    """A replica takes no acknowledgement either: nothing can go on."""
    async with opened(streams.group("billing", start="oldest")) as receiver:
        await streams.publish(message(1))
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        await fill(admin)
        with pytest.raises(BrokerRefused, match="can't count an attempt at .*OOM"):
            await receiver.count(delivery)
        await empty(admin)
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        for call in (receiver.count(delivery), receiver.bury(delivery, error="no", attempts=1), receiver.ack(delivery)):
            with pytest.raises(BrokerUnavailable, match="READONLY") as caught:
                await call
            assert not isinstance(caught.value, BrokerRefused)
        await admin.execute_command("REPLICAOF", "NO", "ONE")
        assert await receiver.count(delivery) == 1


async def test_dead_letters_are_given_back_while_redis_is_full(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """To give back needs no room."""
    async with opened(streams.group("billing", start="oldest")) as receiver, DeadLetters(streams_client) as dead:
        await streams.publish(message(1))
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        await receiver.bury(delivery, error="no", attempts=1)
        await fill(admin)
        assert (await dead.retry(group="billing")).returned == 1
        assert await pending(admin) == [delivery.id]
