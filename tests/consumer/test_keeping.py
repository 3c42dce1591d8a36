"""What is in work is kept; what another consumer has taken over is not begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from silbo import AsyncEventDispatcher
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Delivery
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, UserJoined, delivery


class Kept(Scripted):
    """Notes what is kept; some of it is another's by then."""

    keep_every = 0.05

    def __init__(self, *batches: Sequence[Delivery | Gap] | Exception, taken: Collection[str] = ()) -> None:
        super().__init__(*batches)
        self.taken = taken
        self.kept: list[list[str]] = []
        self.away = False

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        if self.away:
            raise BrokerUnavailable("away")
        self.kept.append([delivery.id for delivery in deliveries])
        self.changed.set()
        return [delivery for delivery in deliveries if delivery.id in self.taken]

    async def until_kept(self, many: int) -> None:
        async with asyncio.timeout(20):
            while len(self.kept) < many:
                self.changed.clear()
                await self.changed.wait()


async def test_everything_in_hand_is_kept_while_a_listener_runs_long(d: AsyncEventDispatcher) -> None:
    """What is in work, what waits for its turn, what waits for another try; not what is done."""
    release = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 1:
            raise ValueError("no")
        if event.user_id == 2:
            await release.wait()

    subscription = Kept([delivery(number) for number in range(4)])
    consumer = Consumer(d, subscription, events=[USER_JOINED], on_error=lambda *_: None, max_attempts=10**6)
    async with Running(consumer):
        await subscription.until_acked(1)
        await subscription.until_kept(len(subscription.kept) + 4)
        assert subscription.kept[-1] == ["1", "2", "3"]
        release.set()
        await subscription.until_acked(3)


async def test_what_another_has_taken_over_is_not_begun(d: AsyncEventDispatcher) -> None:
    """And not tried again, counted or buried; but what was done all the same is acknowledged."""
    release, begun = asyncio.Event(), asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        await heard.hear(event)
        if event.user_id == 0:
            begun.set()
            await release.wait()
        if event.user_id == 1:
            raise ValueError("no")

    subscription = Kept([delivery(1), delivery(0), delivery(2), delivery(3)], taken=["0", "1", "2"])
    consumer = Consumer(d, subscription, events=[USER_JOINED], on_error=lambda *_: None)
    async with Running(consumer):
        await begun.wait()
        await subscription.until_kept(1)
        async with asyncio.timeout(5):
            while consumer.stats.lost < 3:
                await asyncio.sleep(0.01)
        release.set()
        await subscription.until_acked(2)
    assert heard.ids == [1, 0, 3]
    assert subscription.acked == ["0", "3"]
    assert (consumer.stats.lost, subscription.attempts["1"], subscription.buried) == (3, 1, [])


async def test_what_was_lost_may_come_back(d: AsyncEventDispatcher) -> None:
    """The other one died, too. What waited here all the while is not begun for the first delivery and the second."""
    release = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        await heard.hear(event)
        if event.user_id == 1:
            await release.wait()

    class Back(Kept):
        async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
            lost = await super().keep(*deliveries)
            if self.taken:
                self.taken = ()
                self.batches.append([delivery(2, attempt=2)])
            return lost

    subscription = Back([delivery(1), delivery(2)], taken=["2"])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        async with asyncio.timeout(5):
            while consumer.stats.received < 3:
                await asyncio.sleep(0.01)
        release.set()
        await subscription.until_acked(2)
    assert heard.ids == [1, 2]


@pytest.mark.parametrize("late", [False, True], ids=["in-hand", "arriving"])
async def test_after_a_long_pause_the_broker_is_asked_before_anything_is_begun(
    late: bool, d: AsyncEventDispatcher
) -> None:
    """A process that was frozen wakes up with what others have done since."""
    heard = Heard()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        await heard.hear(event)
        if event.user_id == 1 and not late:
            time.sleep(0.3)  # the whole process stands still, longer than is kept

    class Late(Kept):
        async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
            batch = await super().receive(limit)
            if batch and late:
                time.sleep(0.3)
                kept = len(self.kept)
                await self.until_kept(kept + 1)  # what is in hand is kept since; this answer is older
            return batch

    subscription = Late([delivery(1), delivery(2), delivery(3)], taken=["2"] if not late else ["1", "2"])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.until_acked(1 if late else 2)
    assert heard.ids == ([3] if late else [1, 3])


async def test_nothing_is_begun_while_it_is_not_known_whose_it_is(d: AsyncEventDispatcher) -> None:
    """An outage that lasts longer than what is kept: then others may have it."""
    release = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        await heard.hear(event)
        if event.user_id == 1:
            subscription.away = True
            await asyncio.sleep(0.3)
            release.set()

    subscription = Kept([delivery(1), delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await release.wait()
        await asyncio.sleep(0.2)
        assert heard.ids == [1]
        subscription.away = False
        await subscription.until_acked(2)
    assert heard.ids == [1, 2]


async def test_stop_does_not_wait_until_it_is_known_whose_it_is(d: AsyncEventDispatcher) -> None:
    """What is not surely ours stays with the broker."""
    begun = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        await heard.hear(event)
        subscription.away = True
        begun.set()
        await asyncio.sleep(0.2)

    subscription = Kept([delivery(1), delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with consumer:
        running = asyncio.create_task(consumer.run())
        await begun.wait()
        consumer.stop()
        await asyncio.wait_for(running, 3)
    assert (heard.ids, subscription.acked) == ([1], ["1"])


async def test_keeping_goes_on_until_the_last_listener_has_ended(d: AsyncEventDispatcher) -> None:
    """While a stop drains, too: the others must not take over what is nearly done."""
    begun, release = asyncio.Event(), asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: Any) -> None:
        begun.set()
        await release.wait()

    subscription = Kept([delivery(1)])
    consumer = Consumer(d, subscription)
    async with consumer:
        running = asyncio.create_task(consumer.run())
        await begun.wait()
        consumer.stop()
        await subscription.until_kept(len(subscription.kept) + 3)
        release.set()
        await running
    assert subscription.acked == ["1"]
