"""The clock of a test, and the wait until nothing is running, waiting or due."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import (
    AsyncEventDispatcher,
    Backoff,
    Bridge,
    Consumer,
    ECSTEvent,
    Event,
    EventName,
    Message,
    Outbox,
)
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, ListenerTimeout, NotSettled
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlite import SQLiteStore
from silbo.testing import Clock, EventRecorder
from tests.support.consumer import Running
from tests.support.memory_broker import message


@dataclass
class Paid(ECSTEvent):
    order: int = 0


PAID = EventName("order.paid", Paid, key="order")


@pytest.fixture
def events() -> Iterator[EventRecorder]:
    recorder = EventRecorder()
    yield recorder
    recorder.close()


# -- the clock ----------------------------------------------------------------------------------------------


async def test_time_stands_still_until_it_is_moved() -> None:
    loop = asyncio.get_running_loop()
    with Clock() as clock:
        loop_began, began = loop.time(), clock()
        assert abs(began - time.time()) < 60
        sleeping = asyncio.create_task(asyncio.sleep(30))
        for _ in range(100):
            await asyncio.sleep(0)
        assert loop.time() == loop_began
        assert clock.next_timer == pytest.approx(30)
        clock.advance(29.5)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not sleeping.done()
        assert (clock() - began, clock.next_timer) == pytest.approx((29.5, 0.5), abs=1e-5)
        clock.advance(0.5)
        for _ in range(10):
            await asyncio.sleep(0)
        assert sleeping.done()
        with pytest.raises(ValueError, match="0 seconds or more"):
            clock.advance(-1)


async def test_time_flows_on_from_where_it_stood() -> None:
    """So timers that are set keep their order, and a loop of the whole session can be stopped again and again."""
    loop = asyncio.get_running_loop()
    for _ in range(3):
        with Clock() as clock:
            before = loop.time()
            clock.advance(1000)
        assert before + 1000 <= loop.time() < before + 1060
    with pytest.raises(RuntimeError, match="entered once"):
        clock.__enter__()


async def test_loop_has_one_clock_at_a_time(events: EventRecorder) -> None:
    events.freeze()
    with pytest.raises(RuntimeError, match="stands still already"):
        Clock().__enter__()


def test_clock_may_be_left_after_its_loop_is_closed() -> None:
    """A fixture that is no coroutine function may end after the loop."""
    recorder = EventRecorder()

    async def freeze() -> None:
        recorder.freeze()

    asyncio.run(freeze())
    recorder.close()


async def test_waiting_test_is_not_blocked_by_its_clock() -> None:
    """A minute's time limit ends, and so does a consumer that waits for its broker; in little real time."""
    d = AsyncEventDispatcher()
    began = time.monotonic()
    with Clock() as clock:
        start = clock()
        with pytest.raises(TimeoutError):
            await d.wait_for("x", timeout=60)
        assert clock() - start == pytest.approx(60)
        async with Running(Consumer(d, MemoryBroker().group("g", start="new"))):
            await asyncio.sleep(0)
    assert time.monotonic() - began < 30


async def test_another_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As uvloop's, whose time can't be stopped."""
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: object())
    with pytest.raises(TypeError, match="asyncio's own event loop"):
        Clock().__enter__()
    with pytest.raises(TypeError, match="asyncio's own event loop"):
        await EventRecorder().settle()


async def test_listener_runs_into_its_time_limit(events: EventRecorder) -> None:
    clock = events.freeze()
    assert events.freeze() is clock
    d = events.watch(AsyncEventDispatcher())

    async def hang(event: Event) -> None:
        await asyncio.Event().wait()

    d.add_listener("x", hang, timeout=30)
    dispatch = asyncio.create_task(d.adispatch("x"))
    await asyncio.sleep(0)
    clock.advance(30)
    with pytest.raises(ListenerTimeout):
        await dispatch


async def test_offers_of_the_memory_broker_grow_old_by_the_clock(events: EventRecorder) -> None:
    """So does ``newer_version_wait`` of a consumer."""
    clock = events.freeze()
    broker = MemoryBroker()
    receiver = await broker.group("g", start="new").open()
    await broker.publish(message(1))
    [delivery] = await receiver.receive(1)
    assert await receiver.offer(delivery) == [0]
    clock.advance(300)
    assert await receiver.offer(delivery) == [pytest.approx(300)]


# -- settled ------------------------------------------------------------------------------------------------


async def test_spawned_chain_is_waited_for_to_its_end(events: EventRecorder) -> None:
    """Whatever it awaits: turns of the loop, futures, tasks of its own, and callbacks."""
    d = events.watch(AsyncEventDispatcher())
    loop = asyncio.get_running_loop()
    steps: list[str] = []

    @d.listen("a")
    async def first(event: Event) -> None:
        for _ in range(50):
            await asyncio.sleep(0)
        steps.append("a")
        d.spawn("b")

    @d.listen("b")
    async def second(event: Event) -> None:
        later: asyncio.Future[None] = loop.create_future()
        loop.call_soon(loop.call_soon, later.set_result, None)
        await later
        steps.append("b")
        _ = asyncio.get_running_loop().call_soon(lambda: loop.call_later(0, steps.append, "c"))

    d.spawn("a")
    await events.settle()
    assert steps == ["a", "b", "c"]


async def test_listener_that_waits_for_a_thread_is_waited_for(events: EventRecorder) -> None:
    """Also while the loop's clock stands still; the loop itself has nothing to do meanwhile."""
    events.freeze()
    d = events.watch(AsyncEventDispatcher())
    go, done = threading.Event(), []

    @d.listen("x")
    async def work(event: Event) -> None:
        await asyncio.to_thread(go.wait, 30)
        done.append(1)

    d.spawn("x")
    threading.Timer(0.05, go.set).start()
    await events.settle(within=30)
    assert done == [1]


async def test_bridge_that_does_not_wait_is_waited_for(events: EventRecorder) -> None:
    go, sent = threading.Event(), []

    class Slow(MemoryBroker):
        async def publish(self, *messages: Message) -> None:
            await asyncio.to_thread(go.wait, 30)
            sent.extend(messages)

    async with Bridge(Slow(), wait=False) as bridge:
        d = events.watch(AsyncEventDispatcher())
        d.add_subscriber(bridge)
        await d.adispatch(PAID)
        threading.Timer(0.05, go.set).start()
        await events.settle(within=30)
        assert len(sent) == 1 and bridge.under_way == 0
        events.assert_published(PAID)


async def test_outbox_is_waited_for_until_all_is_sent(events: EventRecorder, tmp_path: Path) -> None:
    """SQLite's thread and the relay's pauses take real time."""
    async with Outbox(SQLiteStore(tmp_path / "outbox.db"), broker := MemoryBroker()) as outbox:
        d = events.watch(AsyncEventDispatcher())
        d.add_subscriber(Bridge(outbox))
        receiver = await broker.group("g", start="oldest").open()
        for number in range(3):
            await d.adispatch(PAID, Paid(number))
        await events.settle(within=30)
        status = await outbox.status()
        assert (status.counts["sent"], status.counts["pending"], status.counts["sending"]) == (3, 0, 0)
        assert len(await receiver.receive(10)) == 3


async def test_outbox_whose_broker_is_away_is_settled_until_its_next_attempt_is_due(events: EventRecorder) -> None:
    clock = events.freeze()
    is_away = True

    class Away(MemoryBroker):
        async def publish_sequenced(self, *arguments: Any) -> Any:
            if is_away:
                raise BrokerUnavailable("away")
            return await super().publish_sequenced(*arguments)

    async with Outbox(MemoryStore(clock=clock), Away()) as outbox:
        d = events.watch(AsyncEventDispatcher())
        d.add_subscriber(Bridge(outbox))
        await d.adispatch(PAID)
        await events.settle()
        stats = outbox.stats
        assert stats is not None and (stats.sent, stats.postponed) == (0, 1)
        is_away = False
        await events.settle()
        assert stats.sent == 0
        clock.advance(5)
        await events.settle()
        assert stats.sent == 1


async def test_consumer_is_settled_between_the_attempts_of_a_delivery(events: EventRecorder) -> None:
    """Each attempt comes when it is due by the clock, and not before."""
    clock = events.freeze()
    broker, d = MemoryBroker(), AsyncEventDispatcher()
    d.add_listener(PAID, failing := AsyncMock(side_effect=LookupError))
    backoff = Backoff(initial=10, factor=1, cap=10, jitter=0)
    consumer = Consumer(d, broker.group("g", start="new"), events=[PAID], max_attempts=3, backoff=backoff)
    async with Running(events.watch(consumer)):
        sender = events.watch(AsyncEventDispatcher())
        sender.add_subscriber(Bridge(broker))
        await sender.adispatch(PAID)
        for attempt in (1, 2, 3):
            await events.settle()
            assert failing.await_count == attempt
            assert len(events.dead()) == (attempt == 3)
            clock.advance(9.9)
            await events.settle()
            assert failing.await_count == attempt
            clock.advance(0.1)
        await events.settle()
        assert failing.await_count == 3


async def test_consumer_that_waits_for_its_inbox_has_a_delivery_in_hand(events: EventRecorder) -> None:
    """No listener runs then, and no dispatch."""
    go = threading.Event()

    class SlowInbox:
        def handling(self, group: str, publication: str) -> Any:
            return self

        async def __aenter__(self) -> bool:
            threading.Timer(0.05, go.set).start()
            await asyncio.to_thread(go.wait, 30)
            return True

        async def __aexit__(self, *error: object) -> None: ...

    broker, d = MemoryBroker(), AsyncEventDispatcher()
    d.add_listener(PAID, heard := AsyncMock())
    consumer = Consumer(d, broker.group("g", start="new"), events=[PAID], inbox=SlowInbox())
    async with Running(events.watch(consumer)):
        sender = AsyncEventDispatcher()
        sender.add_subscriber(Bridge(broker))
        await sender.adispatch(PAID)
        await events.settle(within=30)
        heard.assert_awaited_once()


async def test_wait_ends_with_an_error_that_says_what_still_runs(events: EventRecorder) -> None:
    """After real time, although the clock stands still; and names the next timer by the clock."""
    clock = events.freeze()
    d = events.watch(AsyncEventDispatcher())

    @d.listen("x")
    async def slow(event: Event) -> None:
        await asyncio.sleep(60)

    task = d.spawn("x")
    with pytest.raises(NotSettled) as caught:
        await events.settle(within=0.05)
    first, second, third = caught.value.running
    assert first.startswith("the dispatch of x, in ") and f"slow [{__name__}] " in first and "test_clock.py:" in first
    assert second == "1 spawned tasks"
    assert third == "(the clock stands still, and the next timer is due in 60 s: clock.advance(...))"
    clock.advance(60)
    await events.settle()
    assert task.done()


async def test_task_that_yields_for_ever_is_never_settled(events: EventRecorder) -> None:
    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    task = asyncio.create_task(spin())
    with pytest.raises(NotSettled, match="yields for ever"):
        await events.settle(within=0.05)
    task.cancel()


async def test_timer_that_is_not_due_is_not_waited_for(events: EventRecorder) -> None:
    """In real time neither."""
    timer = asyncio.get_running_loop().call_later(3600, AsyncMock())
    await events.settle()
    timer.cancel()
