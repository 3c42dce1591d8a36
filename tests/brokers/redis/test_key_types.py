"""A key of another type in the place of one of silbo's: the error names the key and what to do, and everything else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer
from silbo._retry import Backoff
from silbo.brokers.redis import DeadLetters, RedisInbox, RedisStreams
from silbo.consumer import attempts
from silbo.errors import BrokerRefused, BrokerUnavailable, PublishError
from silbo.message import Delivery
from tests.support.redis_streams import eventually, message, opened, receive

pytestmark = pytest.mark.every_redis
KEY, ORDERS = "silbo:{events}", "silbo:{orders}"
DEAD, ATTEMPTS, SIGNS = f"{KEY}:dead", f"{KEY}:attempts:billing", f"{KEY}:live:billing"
OFFERED, INBOX = f"{KEY}:offered:billing", "silbo:inbox:billing"
LONG = 30.0
"""Seconds after which a hang is a failure."""


def named(key: str, expected: str, found: str = "string") -> str:
    """A pattern for the part of an error that is needed to mend it."""
    key = key.replace("{", r"\{").replace("}", r"\}")
    return f"the key {key} is a {found}, and silbo keeps a {expected} there: delete or rename the key, or use another prefix"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "STORING_RETRY", Backoff(initial=0.02, cap=0.1))


@pytest.mark.parametrize("value", ["string", "hash", "set"])
async def test_publish_names_the_key(admin: Redis, streams: RedisStreams, value: str) -> None:
    if value == "hash":
        await admin.hset(KEY, "a", "b")
    elif value == "set":
        await admin.sadd(KEY, "a")
    else:
        await admin.set(KEY, "a")
    with pytest.raises(BrokerUnavailable, match=named(KEY, "stream", value)):
        await streams.publish(message(1))
    with pytest.raises(PublishError, match=named(KEY, "stream", value)):
        await streams.publish(message(1), message(2, to="orders"))
    await admin.delete(KEY)
    await streams.publish(message(3))
    assert await admin.xlen(KEY) == 1


async def test_relay_names_the_key_of_the_stream_or_of_its_sequences(admin: Redis, streams: RedisStreams) -> None:
    for key, expected in ((KEY, "stream"), (f"{KEY}:outbox", "hash")):
        await admin.set(key, "a")
        with pytest.raises(BrokerUnavailable, match=named(key, expected)):
            await streams.publish_sequenced("box/0", 1, [(1, message(1))])
        await admin.delete(key)
    assert (await streams.publish_sequenced("box/0", 1, [(1, message(1))])).known == frozenset()


async def test_group_of_one_stream_names_its_key(admin: Redis, streams: RedisStreams) -> None:
    group = streams.group("billing", start="oldest")
    await admin.set(KEY, "a")
    with pytest.raises(BrokerUnavailable, match=named(KEY, "stream")):
        await group.open()
    await admin.delete(KEY)
    async with opened(group) as receiver:
        await admin.delete(KEY)
        await admin.set(KEY, "a")
        for _ in range(2):
            with pytest.raises(BrokerUnavailable, match=named(KEY, "stream")):
                await receiver.receive(10)
        await admin.delete(KEY)
        await streams.publish(message(1))
        async with asyncio.timeout(LONG):
            items: list[Any] = []
            while not any(isinstance(item, Delivery) for item in items):
                try:
                    items += await receiver.receive(10)
                except BrokerUnavailable:
                    await asyncio.sleep(0.05)


class Program:
    """A consumer of two streams, whose listener fails for the numbers in ``bad``."""

    def __init__(self, streams: RedisStreams, *bad: int, **options: Any) -> None:
        self.heard: list[int] = []
        self._bad = bad
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_listener("user.joined", self._hear)
        group = streams.group("billing", start="oldest", streams=["events", "orders"], claim_after=30)
        self.consumer = Consumer(dispatcher, group, **{"max_attempts": 1} | options)

    async def _hear(self, event: Any) -> None:
        self.heard.append(event.payload["n"])
        if self.heard[-1] in self._bad:
            raise LookupError("bad")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Program]:
        async with self.consumer:
            task = asyncio.create_task(self.consumer.run())
            yield self
            self.consumer.stop()
            await task

    async def until_heard(self, *numbers: int) -> None:
        async def is_heard() -> bool:
            return set(numbers) <= set(self.heard)

        await eventually(is_heard, LONG)


async def until_acknowledged(admin: Redis, key: str) -> None:
    """Wait: a message that is heard and not yet acknowledged comes again, once its stream is back."""

    async def nothing_is_pending() -> bool:
        return (await admin.xpending(key, "billing"))["pending"] == 0

    await eventually(nothing_is_pending, LONG)


def told(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [text for record in caplog.records if part in (text := record.getMessage())]


@pytest.mark.long
async def test_the_other_streams_of_a_group_go_on(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Told once, and when the stream is back; also if it is so at the start."""
    await admin.set(KEY, "a")
    await streams.publish(message(1, to="orders"))
    async with Program(streams).running() as program:
        await program.until_heard(1)
        await admin.delete(KEY)
        await streams.publish(message(2))
        await program.until_heard(2)
        await until_acknowledged(admin, KEY)
        await admin.rename(KEY, "away")
        await admin.set(KEY, "a")
        await streams.publish(message(3, to="orders"))
        await program.until_heard(3)
        await until_acknowledged(admin, ORDERS)
        await admin.rename("away", KEY)
        await streams.publish(message(4))
        await program.until_heard(4)
        assert sorted(program.heard) == [1, 2, 3, 4]
    lines = told(caplog, f"stream {KEY} of group billing")
    assert [("can't be read" in line, "back after" in line) for line in lines] == [(True, False), (False, True)] * 2
    assert named(KEY, "stream").replace("\\", "") in lines[0]
    assert told(caplog, "broker unavailable") == []


async def test_what_is_in_hand_of_a_stream_that_is_gone_holds_up_no_other(admin: Redis, streams: RedisStreams) -> None:
    """Its deliveries have no place any more: they are acknowledged, kept and offered without an error, and lost."""
    group = streams.group("billing", start="oldest", streams=["events", "orders"])
    await streams.publish(message(1), message(2, to="orders"))
    async with opened(group) as receiver:
        items = await receive(receiver, 2)
        await admin.delete(KEY)
        await admin.set(KEY, "a")
        gone = next(item for item in items if isinstance(item, Delivery) and item.address == KEY)
        here = next(item for item in items if isinstance(item, Delivery) and item.address == ORDERS)
        with pytest.raises(BrokerRefused, match=named(KEY, "stream")):
            await receiver.bury(gone, error="no", attempts=1)
        assert list(await receiver.keep(gone, here)) == [gone]
        (first, second) = await receiver.offer(gone, here)
        assert (first, second is not None) == (None, True)
        await receiver.ack(gone, here)
        assert (await admin.xpending(ORDERS, "billing"))["pending"] == 0


@pytest.mark.one_server
async def test_stream_that_is_renamed_back_gives_what_was_in_hand_again(admin: Redis, streams: RedisStreams) -> None:
    """At once, and not only when another consumer would have taken it over."""
    group = streams.group("billing", start="oldest", streams=["events", "orders"], claim_after=600)
    await streams.publish(message(1))
    async with opened(group) as receiver:
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        await admin.rename(KEY, "away")
        await admin.set(KEY, "a")
        assert await receiver.receive(10) == []
        assert list(await receiver.keep(delivery)) == [delivery]
        await admin.rename("away", KEY)
        async with asyncio.timeout(LONG):
            (again,) = await receive(receiver, 1)
        assert isinstance(again, Delivery) and again.id == delivery.id


@pytest.mark.parametrize(("key", "expected"), [(DEAD, "stream"), (ATTEMPTS, "hash")])
async def test_failed_delivery_that_can_not_be_stored_names_the_key_and_waits(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture, key: str, expected: str
) -> None:
    await admin.set(key, "a")
    await streams.publish(*map(message, range(3)))
    async with Program(streams, 0).running() as program:
        await program.until_heard(0, 1, 2)

        async def is_told() -> bool:
            return bool(told(caplog, "storing of failed deliveries refused"))

        await eventually(is_told, LONG)
        await admin.delete(key)

        async def is_dead() -> bool:
            return program.consumer.stats.dead == 1

        await eventually(is_dead, LONG)
        assert (program.consumer.stats.handled, program.heard) == (2, [0, 1, 2])
    (line,) = told(caplog, "storing of failed deliveries refused")
    assert named(key, expected).replace("\\", "") in line


async def test_signs_of_life_that_can_not_be_given_are_told(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.set(SIGNS, "a")
    await streams.publish(message(1))
    async with opened(streams.group("billing", start="oldest", consumer="one")) as receiver:
        await receive(receiver, 1)
    (line,) = told(caplog, "no sign of life")
    assert SIGNS in line and "WRONGTYPE" in line


@pytest.mark.one_server
async def test_key_of_what_is_offered_does_not_stop_reading(admin: Redis, streams: RedisStreams) -> None:
    """Whoever reads what it has offered offers it again: that may fail."""
    await streams.publish(message(1))
    async with opened(streams.group("billing", start="oldest", consumer="one")) as receiver:
        (delivery,) = await receive(receiver, 1)
        assert isinstance(delivery, Delivery)
        await receiver.offer(delivery)
        assert await admin.delete(OFFERED) == 1
        await admin.set(OFFERED, "a")
        with pytest.raises(BrokerUnavailable, match=named(OFFERED, "sorted set")):
            await receiver.offer(delivery)
        await admin.client_kill_filter(_type="normal", skipme=True)
        await streams.publish(message(2))
        async with asyncio.timeout(LONG):
            numbers: list[Any] = []
            errors: list[str] = []
            while 2 not in numbers:
                try:
                    items = await receiver.receive(10)
                    numbers += [item.message().payload["n"] for item in items if isinstance(item, Delivery)]
                except BrokerUnavailable as error:
                    errors.append(str(error))
        assert errors and "WRONGTYPE" not in " ".join(errors)


async def test_inbox_names_its_key(admin: Redis, streams_client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    async with RedisInbox(streams_client) as inbox:
        async with inbox.handling("billing", "p-1"):
            await admin.set(INBOX, "a")
        assert named(INBOX, "sorted set") in caplog.text
        with pytest.raises(BrokerUnavailable, match=named(INBOX, "sorted set")):
            async with inbox.handling("billing", "p-1"):
                pytest.fail("nobody knows whether it is new")


async def test_dead_letters_name_the_key(admin: Redis, streams_client: Redis) -> None:
    async with DeadLetters(streams_client) as dead:
        await admin.set(DEAD, "a")
        for call in (dead.count(), dead.list(), dead.retry(), dead.retry(["1-0"]), dead.purge(["1-0"])):
            with pytest.raises(BrokerUnavailable, match=named(DEAD, "stream")):
                await call
        await admin.set(KEY, "a")
        with pytest.raises(BrokerUnavailable, match=named(KEY, "stream")):
            await dead.groups()


async def test_attempts_of_another_type_do_not_keep_dead_letters_from_a_retry(
    admin: Redis, streams: RedisStreams, streams_client: Redis
) -> None:
    """They hold no count, as wherever else they are read; and the other groups get theirs."""
    await streams.publish(message(1))
    for name in ("billing", "mail"):
        async with opened(streams.group(name, start="oldest")) as receiver:
            (delivery,) = await receive(receiver, 1)
            assert isinstance(delivery, Delivery)
            await receiver.bury(delivery, error="no", attempts=1)
    await admin.set(ATTEMPTS, "a")
    async with DeadLetters(streams_client) as dead:
        assert (await dead.retry()).returned == 2
        assert await dead.count() == 0
    for name in ("billing", "mail"):
        assert (await admin.xpending(KEY, name))["pending"] == 1


@pytest.mark.one_server
async def test_user_that_may_not_ask_for_the_type_is_told_the_key(admin: Redis, streams: RedisStreams) -> None:
    """The rights of an older silbo are enough."""
    await admin.execute_command("ACL", "SETUSER", "streams", "-type")
    await admin.set(KEY, "a")
    with pytest.raises(
        BrokerUnavailable, match=r"the key silbo:\{events\} is of another type, and silbo keeps a stream there"
    ):
        await streams.publish(message(1))
