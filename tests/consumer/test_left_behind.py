"""Listeners and hooks that leave something behind on their task: the consumer goes on, or ends with an error; never in silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest

from silbo import AsyncEventDispatcher
from silbo.brokers.memory import MemoryBroker
from silbo.errors import Gap, MessageInvalid
from silbo.message import Delivery
from tests.support.consumer import USER_JOINED, Consumer, Running, Scripted, UserJoined, delivery, joined, left_over


def cancel_this_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def cancel_and_catch() -> None:
    cancel_this_task()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(30)


async def cancel_and_return() -> None:
    cancel_this_task()


async def cancel_soon() -> None:
    """As a timer that is not cleaned up: it strikes when the listener has returned."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.001, task.cancel)


LEAVING = [cancel_and_catch, cancel_and_return, cancel_soon]


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("leave", LEAVING)
async def test_consumer_goes_on_after_a_listener_that_leaves_a_cancellation(
    leave: Callable[[], Awaitable[None]], concurrency: int, broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """Libraries cancel the task they run in, and don't take it back; all that follows is handled all the same."""
    finished: set[int] = set()
    done = asyncio.Event()

    @d.listen("user.joined")
    async def listener(event: UserJoined) -> None:
        if event.user_id % 3 == 0:
            await leave()
        finished.add(event.user_id)
        if len(finished) == 10:
            done.set()

    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], concurrency=concurrency)
    async with Running(consumer):
        await broker.publish(*(joined(number, key=str(number)) for number in range(10)))
        await asyncio.wait_for(done.wait(), 30)
    assert consumer.stats.handled == 10
    assert await left_over(broker) == []


@pytest.mark.parametrize("leave", [cancel_and_catch, cancel_and_return])
async def test_consumer_goes_on_after_a_hook_that_leaves_a_cancellation(leave: Callable[[], Awaitable[None]]) -> None:
    """Whatever the hook is told: a failure, a malformed message, a dead letter, a gap."""
    told: list[str] = []

    async def hook(error: Exception, about: object) -> None:
        told.append(type(error).__name__)
        await leave()

    d = AsyncEventDispatcher()

    @d.listen("user.joined")
    async def listener(event: UserJoined) -> None:
        if event.user_id == 1:
            raise ValueError("no")

    gap = Gap("events", "lost")
    subscription = Scripted([gap, delivery(1), delivery(2, raw=b"{"), delivery(3)], [delivery(4)])
    consumer = Consumer(d, subscription, events=[USER_JOINED], max_attempts=2, on_error=hook)
    async with Running(consumer):
        await subscription.until_acked(4)
    assert sorted(told) == [
        "DeliveryGivenUp",
        "DeliveryGivenUp",
        "Gap",
        MessageInvalid.__name__,
        "ValueError",
        "ValueError",
    ]


async def test_sync_hook_and_event_class_may_cancel_their_task_too(d: AsyncEventDispatcher) -> None:
    """The same, in code that is not awaited at all."""
    made: list[int] = []

    class Cancelling(UserJoined):
        def __init__(self, user_id: int, plan: str = "free") -> None:
            super().__init__(user_id, plan)
            cancel_this_task()
            made.append(user_id)

    @d.listen("**")
    async def listener(event: Any) -> None:
        if event.user_id == 1 and made.count(1) == 1:
            raise ValueError("once")

    name = type(USER_JOINED)("user.joined", Cancelling)
    subscription = Scripted([delivery(1), delivery(2)])
    async with Running(Consumer(d, subscription, events=[name], on_error=lambda *_: cancel_this_task())):
        await subscription.until_acked(2)
    assert sorted(made) == [1, 1, 2]


async def test_listener_that_is_cancelled_without_its_consumer_is_tried_again(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """Alone, or beside another concurrent listener that fails: one failed attempt each, and no task has ended."""
    calls = 0
    handled = asyncio.Event()
    errors: list[str] = []

    @d.listen("user.joined", concurrent=True)
    async def cancels(event: Any) -> None:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise asyncio.CancelledError
        handled.set()

    @d.listen("user.joined", concurrent=True)
    async def fails(event: Any) -> None:
        if calls < 3:
            raise ValueError("no")

    consumer = Consumer(d, broker.group("billing", start="new"), on_error=lambda error, what: errors.append(str(error)))
    async with Running(consumer):
        await broker.publish(joined(1))
        await asyncio.wait_for(handled.wait(), 30)
    assert errors == ["a listener was cancelled, but not by its consumer"] * 3
    assert (consumer.stats.failed, consumer.stats.handled) == (3, 1)


async def test_stop_finishes_what_is_in_hand_after_a_cancellation_that_was_left(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """A stop is under way, and a left-over cancellation is still none of the consumer's."""
    finished: list[int] = []

    @d.listen("user.joined")
    async def listener(event: UserJoined) -> None:
        consumer.stop()
        await cancel_and_catch()
        finished.append(event.user_id)

    await (await broker.group("billing", start="new").open()).aclose()
    await broker.publish(*(joined(number) for number in range(5)))
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], drain=30)
    async with consumer:
        await asyncio.wait_for(consumer.run(), 60)
    assert finished == [0, 1, 2, 3, 4]


class Exit(BaseException):
    """As pytest's and Ray's: nobody's ``except Exception`` catches it."""


async def test_worker_that_ends_before_the_stop_ends_the_run_with_its_error(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """No consumer lives on without its worker: what it had in hand goes to others."""

    @d.listen("user.joined")
    async def listener(event: UserJoined) -> None:
        raise Exit

    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])
    async with consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        with pytest.raises(Exit):
            await asyncio.wait_for(running, 30)
    assert len(await left_over(broker)) == 1


class CancelsItsCaller(Scripted):
    """A broker's adapter that cancels the task that calls it, in one of its methods."""

    keep_every = 0.01

    def __init__(self, method: str) -> None:
        super().__init__([delivery(1)])
        self.method = method

    def _cancel(self, method: str) -> None:
        if method == self.method:
            raise asyncio.CancelledError

    async def receive(self, limit: int) -> Any:
        self._cancel("receive")
        return await super().receive(limit)

    async def keep(self, *deliveries: Delivery) -> Any:
        self._cancel("keep")
        return await super().keep(*deliveries)

    async def ack(self, *deliveries: Delivery) -> None:
        if self.method == "ack":
            self.method = ""  # the end of the run acknowledges too
            raise asyncio.CancelledError
        await super().ack(*deliveries)


@pytest.mark.parametrize("method", ["receive", "keep", "ack"])
async def test_reader_heartbeat_and_acknowledgements_don_t_end_in_silence(method: str, d: AsyncEventDispatcher) -> None:
    """Each task of a consumer that ends before the stop ends its run: nobody takes a half-dead consumer for a live one."""

    @d.listen("**")
    async def listener(event: Any) -> None:
        pass

    consumer = Consumer(d, CancelsItsCaller(method))
    async with consumer:
        with pytest.raises(RuntimeError, match="a task of the consumer was cancelled"):
            await asyncio.wait_for(consumer.run(), 30)


tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


async def test_context_of_a_delivery_is_not_seen_by_the_next(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """A tenant or a session of one message must never be taken for another's; the listeners of one message share theirs."""
    seen: list[tuple[str, str]] = []
    done = asyncio.Event()

    @d.listen("user.joined", priority=-1)
    async def enter(event: UserJoined) -> None:
        before = tenant.get()
        tenant.set(f"tenant {event.user_id}")
        await asyncio.sleep(0)
        seen.append((before, tenant.get()))

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        assert tenant.get() == f"tenant {event.user_id}"
        if event.user_id == 0 and len(seen) == 1:
            raise ValueError("again")
        if event.user_id == 2:
            done.set()

    def hook(error: Exception, about: object) -> None:
        seen.append((tenant.get(), "hook"))
        tenant.set("the hook's")

    tenant.set("the program's")
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], on_error=hook)
    async with Running(consumer):
        await broker.publish(*(joined(number, key="a") for number in range(3)))
        await asyncio.wait_for(done.wait(), 30)
    assert seen == [
        ("the program's", "tenant 0"),
        ("the program's", "hook"),
        ("the program's", "tenant 0"),
        ("the program's", "tenant 1"),
        ("the program's", "tenant 2"),
    ]
