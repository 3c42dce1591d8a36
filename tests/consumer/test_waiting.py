"""A consumer that is not entered: `run` connects, waits for a broker that is away, and disconnects."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Bridge
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisStreams
from silbo.consumer import consumer as opening
from silbo.errors import BrokerUnavailable, OwnMessagesUndecided
from silbo.protocols import Receiver
from tests.support.consumer import USER_JOINED, Consumer, Heard, Scripted, delivery, joined
from tools.redis_server import RedisServer


class Late(Scripted):
    """A subscription whose broker is away for so many tries, or never answers."""

    def __init__(self, *, away: int = 0, hangs: bool = False) -> None:
        super().__init__([delivery(1)])
        self.away, self.hangs, self.tried = away, hangs, asyncio.Event()

    async def open(self) -> Receiver:
        self.tried.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.away:
            self.away -= 1
            raise BrokerUnavailable("nobody there")
        return self


async def test_redis_that_comes_up_later_is_waited_for(
    own_redis: RedisServer, d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """What a host's lifespan needs: it starts during an outage, says so once, and hears what comes after it."""
    await asyncio.to_thread(own_redis.kill)
    async with Redis.from_url(own_redis.url) as client, RedisStreams(client, app="other") as streams:
        consumer = Consumer(d, streams.group("billing", start="new"), events=[USER_JOINED])
        running, ready = asyncio.create_task(consumer.run()), asyncio.create_task(consumer.ready())
        async with asyncio.timeout(20):
            while not caplog.records:
                await asyncio.sleep(0.01)
        assert not running.done() and not ready.done()
        await asyncio.to_thread(own_redis.restart)
        async with asyncio.timeout(20):
            await ready
        await streams.publish(joined(1))
        await heard.until(1)
        consumer.stop()
        await asyncio.wait_for(running, 5)
        assert await client.xinfo_consumers("silbo:{events}", "billing") == [], "it has taken its leave"
    away, back = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert away.message.startswith("broker unavailable, trying again: Redis at ")
    assert "can't be reached" in away.message
    assert re.fullmatch(r"broker back after [\d.]+ s", back.message)
    assert away.exc_info is None


@pytest.mark.parametrize("way", ["stop", "cancel"])
async def test_frozen_redis_holds_back_neither_a_stop_nor_a_cancellation(
    way: str, own_redis: RedisServer, d: AsyncEventDispatcher
) -> None:
    """A service that is to end while it still waits: its supervisor must not need to kill it."""
    own_redis.pause()
    try:
        async with Redis.from_url(own_redis.url) as client:
            consumer = Consumer(d, RedisStreams(client, app="other", timeout=60).group("billing", start="new"))
            running, ready = asyncio.create_task(consumer.run()), asyncio.create_task(consumer.ready())
            done, _ = await asyncio.wait([running, ready], timeout=0.2)
            assert not done
            consumer.stop() if way == "stop" else running.cancel()
            await asyncio.wait([running], timeout=5)
            assert running.done()
            assert running.cancelled() == (way == "cancel")
            with pytest.raises(BrokerUnavailable, match="not connected"):
                await asyncio.wait_for(ready, 5)
    finally:
        own_redis.resume()


async def test_stop_between_two_tries_ends_it_at_once(d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "GRACE", 60.0)
    subscription = Late(away=1_000_000)
    consumer = Consumer(d, subscription)
    running = asyncio.create_task(consumer.run())
    await subscription.tried.wait()
    consumer.stop()
    await asyncio.wait_for(running, 5)
    assert subscription.away == 999_999
    assert subscription.closed == 0


async def test_stop_that_comes_before_run_connects_to_nothing(d: AsyncEventDispatcher) -> None:
    """A signal during the start of the program."""
    subscription = Late()
    consumer = Consumer(d, subscription)
    consumer.stop()
    await asyncio.wait_for(consumer.run(), 5)
    assert not subscription.tried.is_set()


async def test_cancelled_while_it_opens_leaves_at_once(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "GRACE", 60.0)
    subscription = Late(hangs=True)
    running = asyncio.create_task(Consumer(d, subscription).run())
    await subscription.tried.wait()
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


@pytest.mark.parametrize("way", ["stop", "cancel"])
async def test_receiver_is_closed_at_the_end(way: str, d: AsyncEventDispatcher, heard: Heard) -> None:
    subscription = Late(away=1)
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    running = asyncio.create_task(consumer.run())
    await heard.until(1)
    assert subscription.closed == 0
    consumer.stop() if way == "stop" else running.cancel()
    await asyncio.wait([running])
    assert running.cancelled() == (way == "cancel")
    assert subscription.closed == 1
    assert subscription.acked == ["1"]


async def test_what_waiting_does_not_mend_is_raised(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """A mistake in the program, or in a broker's adapter, is no outage; and nobody waits for it."""
    d.add_subscriber(Bridge(MemoryBroker("other")))
    undecided = Consumer(d, broker.group("billing", start="new"))
    with pytest.raises(OwnMessagesUndecided):
        await undecided.run()
    with pytest.raises(BrokerUnavailable):
        await asyncio.wait_for(undecided.ready(), 5)

    class Broken(Scripted):
        async def open(self) -> Receiver:
            raise ZeroDivisionError

    broken = Consumer(AsyncEventDispatcher(), Broken())
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(broken.run(), 5)


async def test_consumer_that_runs_by_itself_is_used_once_too(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    running = asyncio.create_task(consumer.run())
    await consumer.ready()
    with pytest.raises(RuntimeError, match="before it runs"):
        await consumer.__aenter__()
    consumer.stop()
    await running
    with pytest.raises(RuntimeError, match="once"):
        await consumer.run()

    class Away(Scripted):
        async def open(self) -> Receiver:
            raise BrokerUnavailable("nobody there")

    failed = Consumer(d, Away())
    with pytest.raises(BrokerUnavailable):
        await failed.__aenter__()
    with pytest.raises(RuntimeError, match="once"):
        await failed.run()


@pytest.mark.parametrize("way", ["stop", "leave"])
async def test_run_that_begins_after_the_stop_is_done(way: str, d: AsyncEventDispatcher, heard: Heard) -> None:
    """A program that ends before its task for `run` had its turn: that is no error, and nothing is received any more."""
    subscription = Late()
    async with Consumer(d, subscription, events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        if way == "stop":
            consumer.stop()
            await asyncio.wait_for(running, 5)
    await asyncio.wait_for(running, 5)
    assert heard.ids == [] and subscription.closed == 1
    with pytest.raises(RuntimeError, match="once"):
        await consumer.run()
