"""The queue of the sender: bounded in messages and in bytes, and taken in flushes of either."""

from __future__ import annotations

import asyncio

import pytest

from silbo.brokers.redis.scripts import ADD
from silbo.brokers.redis.sender import (
    FLUSH_BYTES,
    FLUSH_MESSAGES,
    QUEUE_BYTES,
    QUEUE_MESSAGES,
    BatchScript,
    PublishCall,
    SendQueue,
)
from silbo.errors import BrokerUnavailable


def enter(queue: SendQueue, *sizes: int, key: bytes = b"key") -> PublishCall:
    """A call with one message of each size, at the end of the queue."""
    loop = asyncio.get_running_loop()
    call = PublishCall(len(sizes), loop.create_future(), loop.time() + 5)
    queue.append(call, [(key, bytes(size)) for size in sizes])
    return call


def take(queue: SendQueue) -> list[list[int]]:
    """The sizes of the messages of the next flush, by batch."""
    return [[len(arguments) for arguments in batch.arguments] for batch in queue.take(FLUSH_MESSAGES, 0, "late")]


async def test_queue_is_bounded_in_messages() -> None:
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    while queue.has_room():
        enter(queue, 1)
    assert len(queue) == QUEUE_MESSAGES
    take(queue)
    assert queue.has_room()


async def test_queue_is_bounded_in_bytes() -> None:
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    while queue.has_room():
        enter(queue, 1 << 19)
    assert len(queue) == QUEUE_BYTES // (1 << 19)
    take(queue)
    assert queue.has_room()


async def test_flush_is_bounded_in_messages_and_in_bytes() -> None:
    """A message that is larger than a flush goes alone, and is not passed by others."""
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    enter(queue, *[1] * (FLUSH_MESSAGES + 1))
    enter(queue, FLUSH_BYTES - 1, 1, FLUSH_BYTES + 1, 1)
    assert take(queue) == [[1] * FLUSH_MESSAGES]
    assert take(queue) == [[1, FLUSH_BYTES - 1]]
    assert take(queue) == [[1]]
    assert take(queue) == [[FLUSH_BYTES + 1]]
    assert take(queue) == [[1]]
    assert take(queue) == []


async def test_withdrawn_messages_make_room() -> None:
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    calls = [enter(queue, 1) for _ in range(QUEUE_MESSAGES)]
    assert not queue.has_room()
    for call in calls:
        call.answered.cancel()
    assert queue.first() is None
    assert queue.has_room()


async def test_room_is_given_in_turn_and_not_twice() -> None:
    """Who comes while others wait is behind them; who goes away, even with room given, leaves it to the next."""
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    full = enter(queue, *[1] * QUEUE_MESSAGES)
    order: list[int] = []

    async def come(number: int) -> None:
        await queue.wait_for_room(QUEUE_MESSAGES, 1, asyncio.get_running_loop().time() + 5)
        enter(queue, *[1] * QUEUE_MESSAGES)
        order.append(number)

    async def all_others() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(come(number)) for number in range(5)]
    await all_others()
    assert not queue.has_room()
    tasks[0].cancel()
    await all_others()
    assert order == []
    full.answered.cancel()
    take(queue)  # gives room to the next, who does not get to it
    tasks[1].cancel()
    await all_others()
    assert order == [2]
    for expected in ([2, 3], [2, 3, 4]):
        while take(queue):
            pass
        await all_others()
        assert order == expected
    assert not queue.has_room()


async def test_queue_that_is_given_up_answers_everybody() -> None:
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    call = enter(queue, *[1] * QUEUE_MESSAGES)
    waiting = asyncio.ensure_future(queue.wait_for_room(1, 1, asyncio.get_running_loop().time() + 5))
    await asyncio.sleep(0)
    queue.fail("no Redis")
    with pytest.raises(BrokerUnavailable, match="no Redis; none of 10000 messages was sent"):
        await call.answered
    with pytest.raises(BrokerUnavailable, match="no Redis; not sent"):
        await waiting
    assert queue.has_room()


async def test_no_room_in_time_is_told() -> None:
    """The task that takes messages fails the waiting publishes that are late, and gives room to the others."""
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    enter(queue, *[1] * QUEUE_MESSAGES)
    late, early = (asyncio.ensure_future(queue.wait_for_room(1, 1, deadline)) for deadline in (1, 3))
    await asyncio.sleep(0)
    queue.take(FLUSH_MESSAGES, 2, "late")
    with pytest.raises(
        BrokerUnavailable, match=r"10000 messages \(10000 bytes\) wait to be sent, and no room came in time"
    ):
        await late
    await early
    assert not queue.is_awaited


async def test_room_is_given_when_all_that_waited_to_be_sent_have_gone_away() -> None:
    """Nothing is left then that a flush could take."""
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    full = enter(queue, *[1] * QUEUE_MESSAGES)
    waiting = asyncio.ensure_future(queue.wait_for_room(1, 1, asyncio.get_running_loop().time() + 60))
    await asyncio.sleep(0)
    full.answered.cancel()
    assert queue.first() is None
    async with asyncio.timeout(30):
        await waiting
    assert not queue.is_awaited


class _CountedFuture(asyncio.Future[None]):
    """A future that counts how often any of its kind was looked at."""

    looks = 0

    def done(self) -> bool:
        _CountedFuture.looks += 1
        return super().done()


@pytest.mark.parametrize("end", ["fail", "cancel", "admit"])
async def test_each_that_waits_for_room_is_looked_at_a_few_times(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, and however they leave: the cost is linear."""
    waiting = 2_000
    queue = SendQueue(BatchScript(ADD, arguments_each=1))
    full = enter(queue, *[1] * QUEUE_MESSAGES)
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "create_future", lambda: _CountedFuture(loop=loop))
        tasks = [asyncio.ensure_future(queue.wait_for_room(1, 1, 1 << 60)) for _ in range(waiting)]
        await asyncio.sleep(0)
    _CountedFuture.looks = 0
    if end == "fail":
        queue.fail("no Redis")
    elif end == "cancel":
        for task in reversed(tasks):
            task.cancel()
    else:
        full.answered.cancel()
        queue.first()
    await asyncio.wait(tasks)
    assert _CountedFuture.looks <= 5 * waiting
    assert not queue.is_awaited
