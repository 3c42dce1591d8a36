"""What is malformed, and what fails: told, tried again, given up in the end, and never lost."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any

import pytest

from silbo import (
    AsyncEventDispatcher,
    EventName,
)
from silbo.brokers.memory import MemoryBroker
from silbo.consumer import consumer as consumer_module
from silbo.errors import DeliveryGivenUp, Gap, MessageInvalid, NotAnEvent
from silbo.message import Origin
from silbo.wire.formats import JSON
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    delivery,
    joined,
    left_over,
)


async def test_malformed_message_is_reported_becomes_a_dead_letter_and_stops_nothing(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """It would not get better: it must not come again for ever, nor be lost, nor go without a word."""
    misfit = JSON.encode(joined(3), Origin("other", "x")).replace(b'"user_id":3', b'"user_id":"three"')
    starred = JSON.encode(joined(4), Origin("other", "x")).replace(b'"user.joined"', b'"user.*"')
    bad = [delivery(1, raw=b"{"), delivery(2, raw=b""), delivery(3, raw=misfit), delivery(4, raw=starred)]
    subscription = Scripted([*bad, delivery(5)])
    errors: list[Any] = []
    consumer = Consumer(
        d, subscription, events=[USER_JOINED], on_error=lambda error, what: errors.append((error, what))
    )
    async with Running(consumer):
        await heard.until(1)
        await subscription.until_acked(5)
    assert heard.ids == [5]
    malformed = [what.id for error, what in errors if isinstance(error, MessageInvalid)]
    given_up = [(error.delivery_id, error.attempts) for error, _ in errors if isinstance(error, DeliveryGivenUp)]
    assert malformed == ["1", "2", "3", "4"]
    assert given_up == [("1", 0), ("2", 0), ("3", 0), ("4", 0)]
    assert len(errors) == 8
    assert (consumer.stats.malformed, consumer.stats.handled, consumer.stats.failed) == (4, 1, 0)
    assert consumer.stats.dead == 4
    assert [(number, attempts) for number, _, attempts in subscription.buried] == [(str(n), 0) for n in (1, 2, 3, 4)]
    assert subscription.buried[2][1].startswith("MessageInvalid: payload.user_id: ")


async def test_errors_without_a_hook_are_logged(
    d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    async with Running(Consumer(d, Scripted([Gap("events", "cut off"), delivery(1, raw=b"{"), delivery(2)]))):
        await heard.until(1)
    records: list[Any] = caplog.records
    assert [re.sub("not JSON: .*", "not JSON: ...", record.message) for record in records] == [
        "gap in group billing: events: an unknown number of messages may have been missed: cut off",
        "a message 1 in group billing: malformed: not JSON: ...",
        "dead letter: a message 1 in group billing: given up at once: not JSON: ...",
    ]
    assert (records[1].address, records[1].delivery_id) == ("events", "1")


async def test_gap_is_counted_and_reported(d: AsyncEventDispatcher, heard: Heard) -> None:
    gap = Gap("events", "cut off", count=3)
    errors: list[Any] = []

    async def hook(error: Exception, what: object) -> None:
        errors.append((error, what))

    consumer = Consumer(d, Scripted([gap, delivery(1)]), on_error=hook)
    async with Running(consumer):
        await heard.until(1)
    assert errors == [(gap, None)]
    assert (consumer.stats.gaps, consumer.stats.received) == (1, 1)


async def test_class_that_can_not_be_dispatched_is_a_failure_not_a_malformed_message(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """The mistake is the program's: its messages stay with the broker until it is mended."""

    @dataclass(slots=True)
    class Slotted:
        user_id: int

    errors: list[Any] = []
    reported = asyncio.Event()

    def hook(error: Exception, what: object) -> None:
        errors.append(error)
        reported.set()

    group = broker.group("billing", start="new")
    consumer = Consumer(d, group, events=[EventName("user.joined", Slotted)], on_error=hook)  # type: ignore[type-var]
    async with Running(consumer):
        await broker.publish(joined(7))
        await reported.wait()
    assert isinstance(errors[0], NotAnEvent)
    assert consumer.stats.malformed == 0
    assert len(await left_over(broker)) == 1


# -- what fails ---------------------------------------------------------------------------------------------


async def test_failed_delivery_is_tried_again_on_a_fresh_event_while_later_ones_go_on(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """Every listener runs again, on an event that no earlier attempt has touched."""
    log: list[tuple[str, int, str]] = []
    failures = 2
    done = asyncio.Event()

    @d.listen("user.joined")
    async def enrich(event: UserJoined) -> None:
        log.append(("enrich", event.user_id, event.plan))
        event.plan = "pro"

    @d.listen("user.joined")
    async def book(event: UserJoined) -> None:
        nonlocal failures
        if event.user_id == 1 and failures:
            failures -= 1
            raise ValueError("not now")
        log.append(("book", event.user_id, event.plan))
        if event.user_id == 1:
            done.set()

    errors: list[Any] = []
    consumer = Consumer(
        d,
        broker.group("billing", start="new"),
        events=[USER_JOINED],
        on_error=lambda error, what: errors.append((str(error), what.attempt)),
    )
    async with Running(consumer):
        await broker.publish(joined(1), joined(2))
        await done.wait()
    assert log == [
        ("enrich", 1, "free"),
        ("enrich", 2, "free"),
        ("book", 2, "pro"),
        ("enrich", 1, "free"),
        ("enrich", 1, "free"),
        ("book", 1, "pro"),
    ]
    assert errors == [("not now", 1), ("not now", 2)]
    stats = consumer.stats
    assert (stats.received, stats.handled, stats.failed, stats.retried) == (2, 2, 2, 2)
    assert await left_over(broker) == []


async def test_what_failed_to_the_end_comes_again_to_the_next_consumer(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """It was never acknowledged. A failure is no reason to lose it."""
    failed = asyncio.Event()

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        if event.payload["user_id"] == 1:
            failed.set()
            raise ValueError("never")

    consumer = Consumer(d, broker.group("billing", start="new"), on_error=lambda error, what: None)
    async with Running(consumer):
        await broker.publish(joined(1), joined(2))
        await failed.wait()
    await asyncio.sleep(0.1)  # longer than the back-off: what was planned is given up with the stop
    assert (consumer.stats.failed, consumer.stats.retried) == (1, 0)
    assert [(item.message().payload["user_id"], item.attempt) for item in await left_over(broker)] == [(1, 3)]


async def test_without_acknowledgement_a_failure_is_reported_once(d: AsyncEventDispatcher) -> None:
    """A broker that keeps nothing (Pub/Sub) has nothing to try again."""
    heard = Heard()

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        await heard.hear(event)
        raise ValueError("no")

    subscription = Scripted([delivery(1, kept=False), delivery(2, kept=False)])
    errors: list[Any] = []
    consumer = Consumer(d, subscription, events=[USER_JOINED], on_error=lambda error, what: errors.append(str(error)))
    async with Running(consumer):
        await heard.until(2)
        await asyncio.sleep(0.1)  # longer than the back-off
    assert (heard.ids, errors, subscription.acked) == ([1, 2], ["no", "no"], [])
    assert (consumer.stats.failed, consumer.stats.retried) == (2, 0)


async def test_too_many_waiting_for_a_retry_stop_the_reading(
    broker: MemoryBroker, d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded when everything fails; when that is over, everything is handled."""
    monkeypatch.setattr(consumer_module, "UNACKED", 10)
    broken = True
    heard = Heard()
    attempts = asyncio.Semaphore(0)

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        attempts.release()
        if broken:
            raise ValueError("all of them")
        await heard.hear(event)

    consumer = Consumer(
        d,
        broker.group("billing", start="new"),
        events=[USER_JOINED],
        max_attempts=10**6,
        on_error=lambda error, what: None,
    )
    async with Running(consumer):
        await broker.publish(*map(joined, range(50)))
        for _ in range(100):
            await attempts.acquire()
        assert consumer.stats.received == 10
        broken = False
        await heard.until(50)
    assert sorted(heard.ids) == list(range(50))
    assert await left_over(broker) == []


async def test_listener_cancelled_from_elsewhere_is_a_failure_like_any_other(
    broker: MemoryBroker, d: AsyncEventDispatcher, heard: Heard
) -> None:
    """A cancelled task that a listener awaits must not end the consumer, silently least of all."""
    errors: list[Any] = []

    @d.listen("user.joined", priority=-1)
    async def await_cancelled(event: Any) -> None:
        if not errors:
            task = asyncio.create_task(asyncio.sleep(10))
            task.cancel()
            await task

    consumer = Consumer(
        d, broker.group("billing", start="new"), events=[USER_JOINED], on_error=lambda error, what: errors.append(error)
    )
    async with Running(consumer):
        await broker.publish(joined(1))
        await heard.until(1)
    assert [str(error) for error in errors] == ["a listener was cancelled, but not by its consumer"]
    assert await left_over(broker) == []
