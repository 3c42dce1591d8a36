"""Ready, run, stop, cancel: what was begun is finished or comes again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from silbo import (
    AsyncEventDispatcher,
)
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery
from silbo.protocols import Receiver
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Scripted,
    UserJoined,
    delivery,
    joined,
    left_over,
)


async def test_ready_waits_until_the_broker_has_confirmed(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    ready = asyncio.create_task(consumer.ready())
    await asyncio.sleep(0)
    assert not ready.done()
    async with consumer:
        await asyncio.wait_for(ready, 5)


async def test_entering_without_a_broker_fails_and_so_does_ready(d: AsyncEventDispatcher) -> None:
    """A wrong address is seen at the start; nobody waits for ever."""

    class Away(Scripted):
        async def open(self) -> Receiver:
            raise BrokerUnavailable("nobody there")

    consumer = Consumer(d, Away())
    ready = asyncio.create_task(consumer.ready())
    with pytest.raises(BrokerUnavailable, match="nobody"):
        await consumer.__aenter__()
    with pytest.raises(BrokerUnavailable):
        await asyncio.wait_for(ready, 5)


async def test_consumer_is_used_once(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    async with consumer:
        consumer.stop()
        await consumer.run()
        with pytest.raises(RuntimeError, match="once"):
            await consumer.run()
    with pytest.raises(RuntimeError, match="once"):
        await consumer.__aenter__()


async def test_stop_finishes_what_was_received(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """Under a name used once nobody else would get it."""
    begun, release = asyncio.Event(), asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await release.wait()
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(*map(joined, range(5)))
        await begun.wait()
        consumer.stop()
        release.set()
        await running
    assert finished == [0, 1, 2, 3, 4]
    assert await left_over(broker) == []


async def test_stop_leaves_to_the_broker_what_is_not_finished_in_time(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """As on SIGTERM: a supervisor kills what does not end. What is finished is acknowledged, nothing is lost."""
    begun = asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 2:
            begun.set()
            await asyncio.sleep(3600)
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], drain=0.2) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(*map(joined, range(5)))
        await begun.wait()
        consumer.stop()
        loop = asyncio.get_running_loop()
        before = loop.time()
        await running
        assert 0.1 < loop.time() - before < 20
    assert finished == [0, 1]
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2, 3, 4]


async def test_idle_consumer_stops_within_its_grace(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    async with Consumer(d, broker.group("billing", start="new")) as consumer:
        running = asyncio.create_task(consumer.run())
        await asyncio.sleep(0)
        consumer.stop()
        await asyncio.wait_for(running, 0.6)


async def test_stop_does_not_wait_for_a_broker_that_hangs(d: AsyncEventDispatcher) -> None:
    class Hanging(Scripted):
        async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
            if self.batches:
                return await super().receive(limit)
            await asyncio.Event().wait()
            raise AssertionError

        async def ack(self, *deliveries: Delivery) -> None:
            await asyncio.Event().wait()

    heard = Heard()
    d.add_subscriber(heard)
    async with Consumer(d, Hanging([delivery(1)])) as consumer:
        running = asyncio.create_task(consumer.run())
        await heard.until(1)
        consumer.stop()
        await asyncio.wait_for(running, 2.5)


async def test_stop_may_come_from_a_signal(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    loop = asyncio.get_running_loop()
    async with Consumer(d, broker.group("billing", start="new")) as consumer:
        loop.add_signal_handler(signal.SIGUSR1, consumer.stop)
        try:
            loop.call_soon(signal.raise_signal, signal.SIGUSR1)
            await asyncio.wait_for(consumer.run(), 5)
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)


async def test_stop_from_a_listener(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    async with Consumer(d, broker.group("billing", start="new")) as consumer:

        @d.listen("user.joined")
        async def enough(event: Any) -> None:
            consumer.stop()

        await broker.publish(joined(1), joined(2))
        await asyncio.wait_for(consumer.run(), 5)
    assert consumer.stats.handled == 2
    assert await left_over(broker) == []
