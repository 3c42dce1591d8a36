"""The consumer's share of the event loop, and of the group's messages: both are bounded by time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic

import pytest

from silbo import AsyncEventDispatcher
from silbo.brokers.memory import MemoryBroker
from silbo.consumer import consumer as consumer_module
from silbo.consumer.loop_turns import TURN, LoopTurns
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, UserJoined, begin, delivery, joined


@pytest.mark.parametrize("concurrency", [1, 8])
async def test_the_loop_goes_on_between_listeners_that_wait_for_nothing(
    d: AsyncEventDispatcher, concurrency: int
) -> None:
    """A host that serves requests in the same loop does not stand still until all that was read is handled."""
    since_tick: list[int] = [0]

    @d.listen("user.joined")
    async def busy(event: UserJoined) -> None:
        until = monotonic() + TURN
        while monotonic() < until:
            pass
        since_tick[-1] += 1

    async def tick() -> None:
        while True:
            await asyncio.sleep(0)
            since_tick.append(0)

    ticking = asyncio.create_task(tick())
    subscription = Scripted([], [delivery(number) for number in range(60)])  # the workers wait when they come
    async with Running(Consumer(d, subscription, events=[USER_JOINED], concurrency=concurrency)):
        await subscription.until_acked(60)
    ticking.cancel()
    with suppress(asyncio.CancelledError):
        await ticking
    assert sum(since_tick) == 60
    assert max(since_tick) <= 2


async def test_tasks_share_one_turn() -> None:
    """Several workers would else take a turn each before the loop gets to anything else."""
    turns, loop = LoopTurns(), asyncio.get_running_loop()
    rounds: list[set[str]] = [set()]

    async def work(name: str) -> None:
        for _ in range(5):
            while turns.is_over(loop.time()):
                await turns.next()
            until = monotonic() + 1.1 * TURN
            while monotonic() < until:
                pass
            rounds[-1].add(name)

    async def look() -> None:
        while len(working) > 0:
            rounds.append(set())
            await asyncio.sleep(0)

    working = {asyncio.create_task(work(name)) for name in "abc"}
    for task in working:
        task.add_done_callback(working.discard)
    await look()
    assert sum(map(len, rounds)) == 15
    assert all(len(one) <= 1 for one in rounds)


async def test_a_turn_whose_task_is_cancelled_leaves_the_next_to_others() -> None:
    turns, loop = LoopTurns(), asyncio.get_running_loop()
    assert turns.is_over(loop.time())
    task = asyncio.create_task(turns.next())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not turns.is_over(loop.time())


async def test_slow_listeners_leave_messages_to_the_others_of_the_group(
    d: AsyncEventDispatcher, broker: MemoryBroker, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of a second of work is read ahead, however many messages that is."""
    monkeypatch.setattr(consumer_module, "FIRST_AHEAD", 2)
    most = 0

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        nonlocal most
        await asyncio.sleep(0.02)
        most = max(most, consumer.in_hand)

    await begin(broker)
    await broker.publish(*[joined(number) for number in range(25)])
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])
    async with Running(consumer):
        await heard.until(25)
    assert most <= 5


async def test_what_is_read_ahead_is_bounded_in_bytes(d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large messages fill no memory while a listener is slow."""
    monkeypatch.setattr(consumer_module, "FIRST_AHEAD", 4)
    monkeypatch.setattr(consumer_module, "BYTES_AHEAD", 1)
    gate, begun = asyncio.Event(), asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await gate.wait()

    subscription = Scripted([delivery(1)], [delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await begun.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert consumer.in_hand == 1
        gate.set()
        await subscription.until_acked(2)
