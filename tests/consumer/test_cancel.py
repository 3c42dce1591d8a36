"""Leaving and cancelling: nothing is lost, nothing that was done is repeated."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest

from silbo import (
    AsyncEventDispatcher,
)
from silbo.brokers.memory import MemoryBroker
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    UserJoined,
    begin,
    joined,
    left_over,
)


async def test_leaving_the_context_waits_for_a_run_beside_it(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """The natural program closes in order: the listener ends, it is acknowledged, then the connection goes."""
    begun = asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await begun.wait()
    await running
    assert finished == [1]
    assert await left_over(broker) == []


async def test_cancelled_body_cancels_the_run_beside_it(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """Cancel means leave now: a listener of a minute is not waited for, and its delivery comes again."""
    begun = asyncio.Event()
    runs: list[asyncio.Task[None]] = []

    @d.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def program() -> None:
        async with Consumer(d, broker.group("billing", start="new")) as consumer:
            runs.append(asyncio.create_task(consumer.run()))
            await asyncio.sleep(3600)

    await begin(broker)
    await broker.publish(joined(1))
    task = asyncio.create_task(program())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(asyncio.CancelledError):
        await runs[0]
    assert len(await left_over(broker)) == 1


async def test_cancellation_while_leaving_the_context_cancels_the_run_beside_it(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """The second Ctrl-C: whoever does not want to wait for the listener any longer need not."""
    begun = asyncio.Event()
    runs: list[asyncio.Task[None]] = []

    @d.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def program() -> None:
        async with Consumer(d, broker.group("billing", start="new")) as consumer:
            runs.append(asyncio.create_task(consumer.run()))
            await begun.wait()

    await begin(broker)
    await broker.publish(joined(1))
    task = asyncio.create_task(program())
    await begun.wait()
    await asyncio.wait([task], timeout=0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(runs[0], 5)
    assert len(await left_over(broker)) == 1


async def test_cancelled_listener_leaves_its_delivery_pending_and_what_is_done_acknowledged(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """Shutdown in the middle of a listener loses nothing, and repeats nothing that was done."""
    begun = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 2:
            begun.set()
            await asyncio.sleep(3600)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1), joined(2), joined(3))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 5)
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2, 3]


@pytest.mark.parametrize("seed", range(12))
async def test_cancellation_at_any_moment_loses_nothing(seed: int) -> None:
    """Whatever a consumer was doing, every event is heard by it or by the next one, failures and concurrency included."""
    rng = random.Random(seed)
    broker = MemoryBroker("other")
    await begin(broker)
    completed: list[int] = []
    d = AsyncEventDispatcher()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.random() < 0.2:
            raise ValueError("not now")
        completed.append(event.user_id)

    published = 0
    for _ in range(25):
        new = range(published, published + rng.randrange(8))
        published = new.stop
        await broker.publish(*(joined(number, key=str(number % 5)) for number in new))
        consumer = Consumer(
            d,
            broker.group("billing", start="new"),
            events=[USER_JOINED],
            concurrency=rng.choice([1, 3]),
            max_attempts=1000,  # a beginning that was cancelled counts
            on_error=lambda error, what: None,
        )
        async with consumer:
            running = asyncio.create_task(consumer.run())
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    consumer = Consumer(
        d, broker.group("billing", start="new"), events=[USER_JOINED], max_attempts=1000, on_error=lambda *_: None
    )
    async with Running(consumer):
        async with asyncio.timeout(20):
            while len(set(completed)) < published:
                await asyncio.sleep(0.01)
    assert set(completed) == set(range(published))
    assert await left_over(broker) == []


async def test_swallowed_cancellation_in_a_listener_ends_the_run_all_the_same(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """As ``wait_for`` does on Python 3.11: the consumer must not read on after it was cancelled."""
    begun = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def swallow(event: UserJoined) -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await heard.hear(event)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1), joined(2))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 5)
    assert heard.ids == [1]
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2]


async def test_redelivery_goes_to_another_consumer_of_the_group(broker: MemoryBroker) -> None:
    """What one could not finish, the next does, and knows that it is not the first attempt."""
    begun = asyncio.Event()
    first, second = AsyncEventDispatcher(), AsyncEventDispatcher()

    @first.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    attempts: list[int] = []
    done = asyncio.Event()

    @second.listen("user.joined")
    async def fail_once(event: Any) -> None:
        if len(attempts) == 0:
            raise ValueError("once")
        done.set()

    group = broker.group("billing", start="new")
    async with Consumer(first, group) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await begun.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    async with Running(Consumer(second, group, on_error=lambda error, what: attempts.append(what.attempt))):
        await done.wait()
    assert attempts == [2]
    assert await left_over(broker) == []


def test_consumer_serves_one_loop_and_the_broker_the_next() -> None:
    broker = MemoryBroker("other")
    found: list[int] = []

    async def program(number: int) -> None:
        d = AsyncEventDispatcher()
        heard = Heard()
        d.add_subscriber(heard)
        async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])):
            await broker.publish(joined(number))
            await heard.until(1)
        found.extend(heard.ids)

    asyncio.run(program(1))
    asyncio.run(program(2))
    assert found == [1, 2]


def test_slips_are_refused_with_what_was_meant(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """A broker for its group, arguments the wrong way round, a name for a list of names."""
    wrong: Any = broker
    with pytest.raises(TypeError, match="group"):
        Consumer(d, wrong)
    swapped: Any = broker.group("billing", start="new")
    with pytest.raises(TypeError, match="dispatcher and a subscription"):
        Consumer(swapped, d)  # type: ignore[arg-type]
    events: Any = USER_JOINED
    with pytest.raises(TypeError, match="list of EventName"):
        Consumer(d, swapped, events=events)
