"""The health of a consumer says if it is connected and has room, and what it has in hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from silbo import AsyncEventDispatcher
from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.consumer import consumer as module
from silbo.errors import BrokerUnavailable
from silbo.message import Message
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, begin, delivery, joined
from tests.support.relay import wait_until


async def test_consumer_is_ready_from_its_start_to_its_stop(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    health = consumer.health()
    assert (health.part, health.name, health.is_ready) == ("consumer", "billing", False)
    assert (health.is_connected, health.explain(), health.last_error) == (False, "not running", None)
    async with Running(consumer):
        await wait_until(lambda: consumer.health().is_ready)
        assert consumer.health().explain() == "ready"
        consumer.stop()
        assert not consumer.health().is_ready and consumer.health().is_connected


async def test_consumer_that_drains_is_stopping(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    go_on = asyncio.Event()

    async def wait(_: object) -> None:
        await go_on.wait()

    d.add_listener("user.joined", wait)
    await begin(broker)
    async with Running(Consumer(d, broker.group("billing", start="new"), drain=30)) as consumer:
        await broker.publish(joined(1))
        await wait_until(lambda: consumer.health().in_hand == 1)
        consumer.stop()
        assert (consumer.health().explain(), consumer.health().is_ready) == ("stopping", False)
        go_on.set()
    assert consumer.health().explain() == "not running"


async def test_outage_is_told_with_its_begin_and_its_error(d: AsyncEventDispatcher) -> None:
    down = [BrokerUnavailable("it is away")] * 3
    subscription = Scripted(*down)
    before = datetime.now(UTC)
    async with Running(Consumer(d, subscription)) as consumer:
        await wait_until(lambda: not consumer.health().is_connected)
        away = consumer.health()
        assert away.away_since is not None and before <= away.away_since <= datetime.now(UTC)
        assert not away.is_ready and away.explain().startswith("not connected since 20")
        assert away.last_error is not None and away.last_error.text == "it is away" and away.last_error.at >= before
        await wait_until(lambda: consumer.health().is_ready)
        back = consumer.health()
    assert (back.is_connected, back.away_since) == (True, None)
    assert back.last_error is not None, "the last error stays, with its time"


async def test_deliveries_in_hand_and_the_oldest_of_them(
    d: AsyncEventDispatcher, broker: MemoryBroker, heard: Heard
) -> None:
    """Since a look saw it: what a later look sees first is younger, and what is done no longer counts."""
    go_on = asyncio.Event()

    async def wait(_: object) -> None:
        await go_on.wait()

    d.add_listener("user.joined", wait)
    group = broker.group("billing", start="new")
    await begin(broker)
    async with Running(Consumer(d, group)) as consumer:
        assert (consumer.health().oldest_at, consumer.health().received_at) == (None, None)
        await broker.publish(joined(1), joined(2))
        await wait_until(lambda: consumer.health().in_hand == 2)
        first = consumer.health()
        assert first.oldest_at is not None and first.received_at is not None
        await wait_until(lambda: datetime.now(UTC) - first.oldest_at > timedelta(milliseconds=20))
        again = consumer.health()
        assert again.oldest_at is not None and abs(again.oldest_at - first.oldest_at) < timedelta(milliseconds=10)
        go_on.set()
        await heard.until(2)
        await wait_until(lambda: consumer.health().oldest_at is None)
        assert consumer.health().in_hand == 0


async def test_failed_delivery_waits_for_its_retry(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    @d.listen("user.joined")
    async def fail(_: object) -> None:
        raise ValueError("no such plan")

    await begin(broker)
    consumer = Consumer(d, broker.group("billing", start="new"), backoff=Backoff(initial=60, cap=60), drain=0)
    async with Running(consumer):
        await broker.publish(joined(1))
        await wait_until(lambda: consumer.health().waiting_for_retry == 1)
        health = consumer.health()
        assert health.in_hand == 0 and health.is_ready and health.oldest_at is not None
        assert health.last_error is not None and health.last_error.text == "ValueError: no such plan"
        consumer.stop()


async def test_no_room_is_left_if_nearly_all_waits_for_a_retry(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNACKED", 4)
    broken = True

    @d.listen("user.joined")
    async def fail(_: object) -> None:
        if broken:
            raise ValueError("no")

    subscription = Scripted([delivery(number) for number in range(1, 7)])
    async with Running(Consumer(d, subscription, backoff=Backoff(initial=0.3, cap=0.3))) as consumer:
        await wait_until(lambda: not consumer.health().has_room)
        assert consumer.health().explain() == "no room"
        broken = False
        await wait_until(lambda: consumer.health().is_ready)


async def test_messages_of_a_newer_version_are_the_reason_for_no_room(
    d: AsyncEventDispatcher, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no retries: a newer consumer has to be deployed."""
    monkeypatch.setattr(module, "UNACKED", 4)
    await begin(broker)
    async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], drain=0)) as consumer:
        newer = [_of_version_2(joined(number, key=str(number))) for number in range(4)]
        await broker.publish(*newer)
        await wait_until(lambda: not consumer.health().has_room)
        health = consumer.health()
        assert (health.waiting_for_newer, health.waiting_for_retry, health.slow) == (4, 0, 0)
        assert health.explain() == "no room: 4 in hand wait for a consumer that knows their newer version"


def _of_version_2(message: Message) -> Message:
    return replace(message, headers={**message.headers, "version": "2"})


async def test_slow_listeners_are_counted(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    go_on = asyncio.Event()

    @d.listen("user.joined")
    async def wait(_: object) -> None:
        await go_on.wait()

    await begin(broker)
    async with Running(Consumer(d, broker.group("billing", start="new"), slow_after=0.01)) as consumer:
        await broker.publish(joined(1))
        await wait_until(lambda: consumer.health().slow == 1)
        go_on.set()
        await wait_until(lambda: consumer.health().slow == 0)


async def test_busy_consumer_has_room(d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deliveries that wait for a long listener don't make a consumer unready: a rolling deploy would never end."""
    monkeypatch.setattr(module, "UNACKED", 4)
    go_on = asyncio.Event()

    @d.listen("user.joined")
    async def wait(_: object) -> None:
        await go_on.wait()

    async with Running(Consumer(d, Scripted([delivery(number) for number in range(1, 7)]))) as consumer:
        await wait_until(lambda: consumer.health().in_hand == 4)
        assert consumer.health().is_ready
        go_on.set()


async def test_lag_is_as_it_was_refreshed(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    await begin(broker)
    consumer = Consumer(d, broker.group("billing", start="new"))
    await broker.publish(joined(1), joined(2))
    assert consumer.health().lag is None
    await consumer.refresh_health()
    assert consumer.health().lag == 2
    unmeasured = Consumer(d, Scripted())
    await unmeasured.refresh_health()
    assert unmeasured.health().lag is None


async def test_lag_stays_while_it_is_read_anew(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    """So that no exporter finds a gap; once the broker can't be asked there is none."""
    asked, go_on = asyncio.Event(), asyncio.Event()
    is_away = False

    class Slow(Scripted):
        async def read_lag(self) -> int:
            asked.set()
            await go_on.wait()
            if is_away:
                raise BrokerUnavailable("away")
            return 2

    consumer = Consumer(d, Slow())
    go_on.set()
    await consumer.refresh_health()
    go_on.clear()
    asked.clear()
    is_away = True
    reading = asyncio.create_task(consumer.refresh_health())
    await asked.wait()
    assert consumer.health().lag == 2
    go_on.set()
    await reading
    assert consumer.health().lag is None
