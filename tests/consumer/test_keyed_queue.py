"""Order within a key, keys side by side."""

from __future__ import annotations

import asyncio
import random
from typing import Any
from zlib import crc32

from silbo import (
    AsyncEventDispatcher,
    Bridge,
)
from silbo.brokers.memory import MemoryBroker
from silbo.message import Delivery, Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, UserJoined, delivery


async def test_order_is_kept_within_a_key_and_keys_run_side_by_side(d: AsyncEventDispatcher) -> None:
    per_key: dict[str, list[int]] = {}
    busy = most = 0
    heard = Heard()
    rng = random.Random(5)

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(0)
        busy -= 1
        per_key.setdefault(event.plan, []).append(event.user_id)
        await heard.hear(event)

    items = []
    for number in range(90):
        key = f"key-{rng.randrange(12)}"
        message = to_message(UserJoined(number, key), name="user.joined", kind="ecst", key=key)
        items.append(Delivery(JSON.encode(message, Origin("another", "x")), "events", JSON, str(number)))
    subscription = Scripted(items)
    async with Running(Consumer(d, subscription, events=[USER_JOINED], concurrency=4)):
        await subscription.until_acked(90)
    assert 1 < most <= 4
    assert len(heard.events) == 90
    assert all(numbers == sorted(numbers) for numbers in per_key.values())


async def test_one_slow_key_does_not_hold_the_others_up(d: AsyncEventDispatcher) -> None:
    release = asyncio.Event()
    heard = Heard()
    other = next(key for key in "bcdefghijk" if (crc32(key.encode()) - crc32(b"a")) % 2)

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 0:
            await release.wait()
        await heard.hear(event)

    subscription = Scripted(
        [delivery(0, key="a"), delivery(1, key="a"), delivery(2, key=other), delivery(3, key=other)]
    )
    async with Running(Consumer(d, subscription, events=[USER_JOINED], concurrency=2)):
        await heard.until(2)
        assert heard.ids == [2, 3]
        release.set()
        await heard.until(4)
    assert heard.ids[2:] == [0, 1]


async def test_failed_delivery_holds_back_its_key_and_no_other(d: AsyncEventDispatcher) -> None:
    """Order within a key is promised, also while one of it waits for another try; and the consumer does not stand still."""
    heard = Heard()
    failures = 2

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        nonlocal failures
        if event.user_id == 0 and failures:
            failures -= 1
            raise ValueError("not now")
        await heard.hear(event)

    for concurrency in (1, 3):
        failures = 2
        heard.events.clear()
        items = [delivery(0, key="a"), delivery(1, key="a"), delivery(2, key="b"), delivery(3, key="a"), delivery(4)]
        subscription = Scripted(items[:4] if concurrency > 1 else items)
        consumer = Consumer(
            d, subscription, events=[USER_JOINED], concurrency=concurrency, on_error=lambda error, what: None
        )
        async with Running(consumer):
            await subscription.until_acked(4 if concurrency > 1 else 5)
        assert [number for number in heard.ids if number in (0, 1, 3)] == [0, 1, 3]
        assert heard.ids.index(2) < heard.ids.index(0)
        if concurrency == 1:
            assert heard.ids.index(4) < heard.ids.index(0)


async def test_one_at_a_time_keeps_the_order_of_the_stream(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Over all keys, and without them."""
    rng = random.Random(3)
    items = [delivery(number, key=rng.choice(["a", "b", None])) for number in range(60)]
    subscription = Scripted(items)
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(60)
    assert heard.ids == list(range(60))


async def test_messages_without_a_key_are_dead_letters_where_there_is_concurrency(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """Side by side they could overtake one another, so it is an error; but what nobody listens to is no business of ours."""
    unheard = to_message(UserJoined(3), name="nobody.listens", kind="ecst")
    other = AsyncEventDispatcher()
    other.add_listener("user.joined", heard.hear)
    other.add_subscriber(Bridge(MemoryBroker("web")))
    items = [
        delivery(1, key=None),
        delivery(2, key="a"),
        Delivery(JSON.encode(unheard, Origin("other", "x")), "events", JSON, "3"),
    ]
    subscription = Scripted(items)
    errors: list[Any] = []
    consumer = Consumer(
        other,
        subscription,
        concurrency=4,
        on_error=lambda error, what: errors.append((getattr(error, "field", ""), what.id)),
    )
    async with Running(consumer):
        await subscription.until_acked(3)
    assert [event.payload["user_id"] for event in heard.events] == [2]
    assert errors == [("headers.key", "1"), ("", "1")]  # malformed, then given up
    assert [number for number, _, _ in subscription.buried] == ["1"]
    stats = consumer.stats
    assert (stats.malformed, stats.dead, stats.handled, stats.unheard) == (1, 1, 1, 1)


async def test_key_that_waits_for_another_try_does_not_stop_the_reading(d: AsyncEventDispatcher) -> None:
    """The messages behind it are in hand, within its bound; the others go on."""
    heard = Heard()
    broken = True

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        if broken and event.user_id == 0:
            raise ValueError("not now")
        await heard.hear(event)

    batches = [[delivery(number, key="a") for number in range(at, at + 40)] for at in range(0, 200, 40)]
    subscription = Scripted(*batches, [delivery(999, key="b")])
    consumer = Consumer(d, subscription, events=[USER_JOINED], max_attempts=10**6, on_error=lambda error, what: None)
    async with Running(consumer):
        await heard.until(1)
        assert heard.ids == [999]
        broken = False
        await subscription.until_acked(201)
    assert heard.ids[1:] == list(range(200))


async def test_messages_behind_a_slow_one_of_their_key_do_not_stop_the_reading(d: AsyncEventDispatcher) -> None:
    """The time that deliveries take lately says how far to read ahead, and this one has just taken long."""
    heard = Heard()
    release = asyncio.Event()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        if event.user_id == 0:
            await asyncio.sleep(0.3)
        elif event.user_id < 100:
            await release.wait()
        await heard.hear(event)

    slow = [delivery(number, key="slow") for number in range(100)]
    others = [[delivery(number, key=str(number % 7)) for number in range(at, at + 10)] for at in range(100, 300, 10)]
    subscription = Scripted(slow, *others)
    async with Running(Consumer(d, subscription, events=[USER_JOINED], concurrency=2)):
        await heard.until(201)
        assert sorted(heard.ids) == [0, *range(100, 300)]
        release.set()
        await subscription.until_acked(300)
    assert [number for number in heard.ids if number < 100] == list(range(100))
