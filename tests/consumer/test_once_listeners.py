"""A `once=True` listener and a received event: it stays registered until the delivery is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, receive
from silbo.errors import StoreUnavailable
from silbo.wire.formats import JSON
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Running,
    Scripted,
    UserJoined,
    delivery,
    handle_one,
)


class Failing:
    """A listener that fails in its first runs."""

    def __init__(self, failures: int = 1) -> None:
        self.runs: list[int] = []
        self.failures = failures

    async def __call__(self, event: UserJoined) -> None:
        self.runs.append(event.user_id)
        if len(self.runs) <= self.failures:
            raise LookupError("no disk")


@pytest.mark.parametrize("how", ["its own error", "a later listener", "isolated", "its time limit"])
@pytest.mark.parametrize("limit", [None, 30.0], ids=["unlimited", "limited"])
async def test_listener_runs_again_with_the_next_attempt_of_a_delivery_that_failed(
    how: str, limit: float | None
) -> None:
    d = AsyncEventDispatcher(on_error=(lambda *_: None) if how == "isolated" else "raise")
    fails, runs = Failing(), []

    async def once(event: UserJoined) -> None:
        runs.append(event.user_id)
        if how == "its time limit" and len(runs) == 1:
            await asyncio.Event().wait()
        if how not in ("a later listener", "its time limit"):
            await fails(event)

    d.add_listener("user.joined", once, once=True, timeout=0.02 if how == "its time limit" else None)
    if how == "a later listener":
        d.add_listener("user.joined", fails)
    consumer, subscription, _ = await handle_one(d, listener_timeout=limit)
    assert runs == [1, 1]
    assert (consumer.stats.failed, consumer.stats.handled, consumer.stats.dead) == (1, 1, 0)
    assert dict(subscription.attempts) == {"1": 1}
    assert once not in d.get_listeners("user.joined")


async def test_listener_of_a_delivery_that_was_given_up_hears_the_next(d: AsyncEventDispatcher) -> None:
    once = Failing(2)
    d.add_listener("user.joined", once, once=True)
    subscription = Scripted([delivery(1, key="a"), delivery(2, key="a")])
    consumer = Consumer(d, subscription, events=[USER_JOINED], max_attempts=2, on_error=lambda *_: None)
    async with Running(consumer):
        await subscription.until_acked(2)
    assert (once.runs, consumer.stats.dead, consumer.stats.handled) == ([1, 1, 2], 1, 1)
    assert not d.has_listeners("user.joined")


async def test_listener_is_given_back_by_an_inbox_that_can_not_remember(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inbox's transaction is rolled back, with all that the listener did in it."""
    monkeypatch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.01)

    class Commits:
        lost = 1

        @asynccontextmanager
        async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
            yield True
            if self.lost:
                self.lost -= 1
                raise StoreUnavailable("gone")

    once = Failing(0)
    d.add_listener("user.joined", once, once=True)
    consumer, _, _ = await handle_one(d, inbox=Commits())
    assert (once.runs, consumer.stats.handled) == ([1, 1], 1)
    assert not d.has_listeners("user.joined")


async def test_listener_that_a_stop_cancels_is_given_back(d: AsyncEventDispatcher) -> None:
    """Its delivery is pending, and another consumer of this process may get it."""
    begun = asyncio.Event()

    async def once(event: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    d.add_listener("user.joined", once, once=True)
    async with Consumer(d, Scripted([delivery(1)]), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        async with asyncio.timeout(30):
            await begun.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    (listener,) = d.get_listeners("user.joined")
    assert listener == once and not listener.spent


async def test_receive_gives_the_listener_back_if_it_raises(d: AsyncEventDispatcher) -> None:
    once = Failing()
    d.add_listener("user.joined", once, once=True)
    raw = delivery(1).raw
    with pytest.raises(LookupError):
        await receive(d, raw, events=[USER_JOINED], format=JSON)
    for _ in range(2):
        await receive(d, raw, events=[USER_JOINED], format=JSON)
    assert once.runs == [1, 1]
    assert not d.has_listeners("user.joined")


async def test_event_that_a_listener_dispatches_is_no_part_of_the_delivery(d: AsyncEventDispatcher) -> None:
    """As of any dispatch in this process, its listener has had its run."""
    once = Failing(0)
    d.add_listener("user.greeted", once, once=True)

    async def greet(event: UserJoined) -> None:
        await d.adispatch("user.greeted", UserJoined(7))
        if len(greeted := [*greetings, 1]) == 1:
            greetings.extend(greeted)
            raise LookupError("no disk")

    greetings: list[int] = []
    d.add_listener("user.joined", greet)
    await handle_one(d)
    assert once.runs == [7]


async def test_listener_that_a_task_left_behind_runs_is_not_the_deliverys(d: AsyncEventDispatcher) -> None:
    """The event is done, and no end of a delivery will unregister it."""
    runs: list[int] = []
    tasks: list[asyncio.Task[None]] = []
    done = asyncio.Event()

    async def once(event: UserJoined) -> None:
        runs.append(event.user_id)

    async def dispatch_on(event: UserJoined) -> None:
        await done.wait()
        d.remove_listener(USER_JOINED, first)
        d.add_listener(USER_JOINED, once, once=True)
        await d.adispatch(USER_JOINED, event)

    @d.listen(USER_JOINED)
    async def first(event: UserJoined) -> None:
        tasks.append(asyncio.create_task(dispatch_on(event)))

    subscription = Scripted([delivery(1, key="1")])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(1)
        done.set()
        await asyncio.wait(tasks)
    assert runs == [1]
    assert d.get_listeners(USER_JOINED) == ()
