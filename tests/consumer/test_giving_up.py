"""The last attempt: what becomes a dead letter, and what is not taken for it."""

from __future__ import annotations

import asyncio
from typing import Any

from silbo import (
    AsyncEventDispatcher,
)
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, DeliveryGivenUp, MessageInvalid
from silbo.message import Delivery
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    begin,
    delivery,
    joined,
    left_over,
)


async def test_what_fails_to_the_last_attempt_becomes_a_dead_letter(
    broker: MemoryBroker, d: AsyncEventDispatcher, heard: Heard
) -> None:
    """It is parked with its error, and acknowledged; the others are handled."""

    @d.listen("user.joined", priority=-1)
    async def fail(event: Any) -> None:
        if event.user_id == 1:
            raise ValueError("no such account")

    errors: list[tuple[type[Exception], int]] = []
    consumer = Consumer(
        d,
        broker.group("billing", start="new"),
        events=[USER_JOINED],
        max_attempts=3,
        on_error=lambda error, what: errors.append((type(error), what.attempt)),
    )
    async with Running(consumer):
        await broker.publish(*map(joined, range(3)))
        async with asyncio.timeout(10):
            while not broker.dead:
                await asyncio.sleep(0.01)
    (letter,) = broker.dead
    assert (letter.delivery.message().payload["user_id"], letter.error) == (1, "ValueError: no such account")
    assert letter.attempts == 3
    assert errors == [(ValueError, 1), (ValueError, 2), (ValueError, 3), (DeliveryGivenUp, 3)]
    stats = consumer.stats
    assert (heard.ids, stats.dead, stats.failed, stats.handled) == ([0, 2], 1, 3, 2)
    assert await left_over(broker) == []


async def test_attempts_of_all_consumers_count_together(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """A consumer that is restarted does not begin from one."""
    ran = asyncio.Semaphore(0)

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        ran.release()
        raise ValueError("no")

    await begin(broker)
    await broker.publish(joined(1))
    attempts = 0
    while not broker.dead:
        consumer = Consumer(
            d,
            broker.group("billing", start="new"),
            max_attempts=4,
            backoff=Backoff(initial=60, cap=60),
            on_error=lambda error, what: None,
        )
        async with Running(consumer):
            async with asyncio.timeout(10):
                await ran.acquire()
                while not consumer.stats.failed:
                    await asyncio.sleep(0)
        attempts += consumer.stats.failed
    assert (attempts, broker.dead[0].attempts) == (4, 4)


async def test_what_never_ends_is_given_up_without_another_beginning(d: AsyncEventDispatcher, heard: Heard) -> None:
    """As where it kills its process: its beginnings are counted, before the listeners run."""
    subscription = Scripted([delivery(1, attempt=2), delivery(2, attempt=2)])
    subscription.attempts["1"] = 5
    subscription.attempts["2"] = 4
    errors: list[str] = []
    consumer = Consumer(d, subscription, events=[USER_JOINED], on_error=lambda error, what: errors.append(str(error)))
    async with Running(consumer):
        await subscription.until_acked(2)
    assert heard.ids == [2]
    assert [(number, attempts) for number, _, attempts in subscription.buried] == [("1", 5)]
    assert len(errors) == 1
    assert "did not end" in errors[0]
    assert (consumer.stats.claimed, consumer.stats.dead, consumer.stats.failed) == (2, 1, 0)


async def test_what_was_only_redelivered_has_all_its_attempts(d: AsyncEventDispatcher) -> None:
    """A lost answer of the broker's is no attempt; what is counted before it begins is not counted again as it fails."""

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise ValueError("no")

    subscription = Scripted([delivery(1, attempt=2)])
    consumer = Consumer(d, subscription, max_attempts=3, on_error=lambda error, what: None)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (consumer.stats.failed, subscription.buried[0][2]) == (3, 3)


async def test_suspect_that_has_begun_before_runs_alone_and_what_is_done_is_acknowledged_before(
    d: AsyncEventDispatcher,
) -> None:
    """If it kills the process, no neighbour is suspected for it: neither one in work, nor one that is done."""
    busy: set[int] = set()
    beside: dict[int, set[int]] = {}
    acked: dict[int, list[str]] = {}
    done: dict[int, set[str]] = {}
    finished: list[str] = []

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        busy.add(event.user_id)
        acked[event.user_id], done[event.user_id] = list(subscription.acked), set(finished)
        for _ in range(20):
            await asyncio.sleep(0)
            beside.setdefault(event.user_id, set()).update(busy)
        busy.discard(event.user_id)
        finished.append(str(event.user_id))

    items = [delivery(number, key=str(number), attempt=3 if number == 5 else 1) for number in range(10)]
    subscription = Scripted(items)
    subscription.attempts["5"] = 1
    async with Running(Consumer(d, subscription, events=[USER_JOINED], concurrency=4)):
        await subscription.until_acked(10)
    assert beside[5] == {5}
    assert any(len(others) > 1 for others in beside.values())
    assert len(done[5]) > 2
    assert set(acked[5]) == done[5]


async def test_suspect_for_the_first_time_runs_with_the_others(d: AsyncEventDispatcher) -> None:
    """After each lost connection everything in hand is suspect: that must not cost the concurrency."""
    busy = most = 0

    @d.listen("user.joined")
    async def work(event: Any) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        for _ in range(20):
            await asyncio.sleep(0)
        busy -= 1

    subscription = Scripted([delivery(number, key=str(number), attempt=2) for number in range(8)])
    async with Running(Consumer(d, subscription, concurrency=4)):
        await subscription.until_acked(8)
    assert most == 4


async def test_error_of_a_listener_that_looks_like_a_malformed_message_is_a_failure(d: AsyncEventDispatcher) -> None:
    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise MessageInvalid("from a broker of its own")

    subscription = Scripted([delivery(1)])
    consumer = Consumer(d, subscription, max_attempts=2, on_error=lambda error, what: None)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (consumer.stats.malformed, consumer.stats.failed, subscription.buried[0][2]) == (0, 2, 2)


async def test_counting_and_burying_wait_for_the_broker(d: AsyncEventDispatcher) -> None:
    """An outage in that moment loses neither the count nor the message."""

    class Away(Scripted):
        outages = 4

        async def count(self, delivery: Delivery, *, error: str = "") -> int:
            self._be_away()
            return await super().count(delivery, error=error)

        async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
            self._be_away()
            return await super().bury(delivery, error=error, attempts=attempts)

        def _be_away(self) -> None:
            if self.outages:
                self.outages -= 1
                raise BrokerUnavailable("away")
            self.outages = 2

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise ValueError("no")

    subscription = Away([delivery(1)])
    consumer = Consumer(d, subscription, max_attempts=2, on_error=lambda error, what: None)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (consumer.stats.failed, subscription.buried) == (2, [("1", "ValueError: no", 2)])
