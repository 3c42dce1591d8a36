"""The consumer: what arrives is heard under its name, at least once, whatever fails on the way."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, Self
from zlib import crc32

import pytest
import whistle

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    Consumer,
    DomainEvent,
    ECSTEvent,
    Event,
    EventName,
    NotificationEvent,
    Route,
    on,
)
from silbo import acks as acks_module
from silbo import consumer as consumer_module
from silbo.brokers.memory import MemoryBroker
from silbo.codec import to_message
from silbo.errors import BrokerUnavailable, Gap, MessageInvalid, NotAnEvent, OwnMessagesUndecided
from silbo.formats import DIATOR, JSON
from silbo.message import Delivery, Message, Origin, instance
from silbo.protocols import Receiver
from silbo.retry import Backoff


@dataclass
class UserJoined(ECSTEvent):
    user_id: int
    plan: str = "free"


@dataclass
class UserLeft(NotificationEvent):
    user_id: int


USER_JOINED = EventName("user.joined", UserJoined, key="user_id")
USER_LEFT = EventName("user.left", UserLeft)


def joined(number: int, *, key: str | None = None) -> Message:
    return to_message(UserJoined(number), name="user.joined", kind="ecst", key=key)


class Heard:
    """A subscriber that notes what it hears; `until` waits for a number of them."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = asyncio.Event()

    @property
    def ids(self) -> list[int]:
        return [event.user_id for event in self.events]

    @on("**")
    async def hear(self, event: Any) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, many: int) -> Self:
        async with asyncio.timeout(20):
            while len(self.events) < many:
                self._changed.clear()
                await self._changed.wait()
        return self


class Running:
    """A consumer that runs beside the test's body."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer

    async def __aenter__(self) -> Consumer:
        await self.consumer.__aenter__()
        self.task = asyncio.create_task(self.consumer.run())
        return self.consumer

    async def __aexit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.task.cancel()  # the test has failed: don't wait for its listeners
        await self.consumer.__aexit__(kind, *error)  # type: ignore[arg-type]
        await asyncio.wait([self.task])
        if kind is None:
            self.task.result()


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumer_module, "LISTENERS", Backoff(initial=0.01, cap=0.05))


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker("other")


@pytest.fixture
def d() -> AsyncEventDispatcher:
    return AsyncEventDispatcher()


@pytest.fixture
def heard(d: AsyncEventDispatcher) -> Heard:
    heard = Heard()
    d.add_subscriber(heard)
    return heard


async def left_over(broker: MemoryBroker, group: str = "billing") -> list[Delivery]:
    """What the group has not acknowledged, once nobody has it in hand."""
    receiver = await broker.group(group, start="new").open()
    await broker.publish(joined(-1))
    found: list[Any] = []
    while not found or found[-1].message().payload["user_id"] != -1:
        found += await receiver.receive(1000)
    await receiver.ack(*found)
    await receiver.aclose()
    return found[:-1]


async def begin(broker: MemoryBroker, group: str = "billing") -> None:
    """Make the group, so that what is published next waits for it."""
    await (await broker.group(group, start="new").open()).aclose()


# -- what arrives -------------------------------------------------------------------------------------------


async def test_event_arrives_as_its_class_under_its_name_with_its_origin(
    broker: MemoryBroker, d: AsyncEventDispatcher, heard: Heard
) -> None:
    sender = AsyncEventDispatcher()
    sender.add_subscriber(Bridge(broker))
    async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])) as consumer:
        sent = await sender.adispatch(USER_JOINED, UserJoined(7, "pro"))
        await heard.until(1)
    (event,) = heard.events
    assert event == sent
    assert event is not sent
    assert (event.name, event.event_id, event.event_timestamp) == (USER_JOINED, sent.event_id, sent.event_timestamp)
    assert event.origin == ("other", instance())
    assert (consumer.stats.received, consumer.stats.handled, consumer.stats.failed) == (1, 1, 0)
    assert await left_over(broker) == []


async def test_unknown_name_arrives_as_its_kind_with_its_payload(
    broker: MemoryBroker, d: AsyncEventDispatcher, heard: Heard
) -> None:
    """A consumer need not know a class to hear a name."""
    async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_LEFT])):
        await broker.publish(joined(7))
        await heard.until(1)
    (event,) = heard.events
    assert type(event) is ECSTEvent
    assert (event.name, event.payload["user_id"]) == ("user.joined", 7)  # type: ignore[attr-defined]


async def test_format_with_class_names_is_mapped_by_them(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Diator names the class: known ones are heard under their event name, others under the class's."""
    broker = MemoryBroker("other", format=DIATOR)
    async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])):
        await broker.publish(joined(7), to_message(UserLeft(8), name="user.left", kind="notification"))
        await heard.until(2)
    first, second = heard.events
    assert (first.name, first.user_id, type(first)) == ("user.joined", 7, UserJoined)
    assert (second.name, second.payload["user_id"], type(second)) == ("UserLeft", 8, NotificationEvent)
    assert isinstance(first.origin, Origin)  # unknown, but from outside: it is not bridged again


async def test_whistles_own_dispatcher_and_overrides_are_used(broker: MemoryBroker) -> None:
    """A consumer asks for adispatch alone."""
    dispatched: list[Any] = []

    class Logging(whistle.AsyncEventDispatcher):  # type: ignore[misc]  # whistle ships no types
        async def adispatch(self, event_id: Any, event: Any = None, /) -> Any:
            dispatched.append((event_id, event))
            return await super().adispatch(event_id, event)

    host = Logging()
    heard = Heard()
    host.add_listener("user.joined", heard.hear)
    async with Running(Consumer(host, broker.group("billing", start="new"), events=[USER_JOINED])):
        await broker.publish(joined(7))
        await heard.until(1)
    assert dispatched == [("user.joined", heard.events[0])]


@pytest.mark.parametrize("wrong", ["user.joined", UserJoined, ("user.joined", UserJoined)])
def test_events_that_are_no_name_constants_are_refused(broker: MemoryBroker, wrong: Any) -> None:
    with pytest.raises(TypeError, match="EventName"):
        Consumer(AsyncEventDispatcher(), broker.group("billing", start="new"), events=[wrong])


def test_one_name_with_two_classes_is_refused(broker: MemoryBroker) -> None:
    with pytest.raises(ValueError, match="twice"):
        Consumer(
            AsyncEventDispatcher(),
            broker.group("billing", start="new"),
            events=[USER_JOINED, EventName("user.joined", UserLeft)],
        )


@pytest.mark.parametrize("wrong", [{"own": "both"}, {"concurrency": 0}])
def test_settings_that_make_no_sense_are_refused(broker: MemoryBroker, wrong: Any) -> None:
    with pytest.raises(ValueError):
        Consumer(AsyncEventDispatcher(), broker.group("billing", start="new"), **wrong)


# -- what is bad --------------------------------------------------------------------------------------------


class Scripted:
    """A subscription and its receiver in one: hands out what a test prepared."""

    app = "other"
    name = "billing"
    keep_every: float | None = None

    def __init__(self, *batches: Sequence[Delivery | Gap] | Exception, own_instance: bool = False) -> None:
        self.batches = list(batches)
        self.skips_own_instance = own_instance
        self.acked: list[str] = []
        self.refuse_acks = 0
        self.closed = 0
        self.empty = asyncio.Event()
        self.changed = asyncio.Event()

    async def open(self) -> Receiver:
        return self

    async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
        await asyncio.sleep(0)
        if not self.batches:
            self.empty.set()
            await asyncio.sleep(0.05)
            return []
        batch = self.batches.pop(0)
        if isinstance(batch, Exception):
            raise batch
        assert len(batch) <= limit
        return batch

    async def ack(self, *deliveries: Delivery) -> None:
        await asyncio.sleep(0)
        if self.refuse_acks:
            self.refuse_acks -= 1
            raise BrokerUnavailable("no")
        self.acked += [delivery.id for delivery in deliveries]
        self.changed.set()

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        return ()

    async def count(self, delivery: Delivery) -> int:
        return delivery.attempt

    async def bury(self, delivery: Delivery, *, error: str, attempts: int) -> bool:
        await self.ack(delivery)
        return True

    async def until_acked(self, many: int) -> None:
        async with asyncio.timeout(20):
            while len(self.acked) < many:
                self.changed.clear()
                await self.changed.wait()

    async def aclose(self) -> None:
        self.closed += 1


def delivery(number: int, *, raw: bytes | None = None, key: str | None = None, kept: bool = True) -> Delivery:
    encoded = JSON.encode(joined(number, key=key), Origin("other", "elsewhere"))
    return Delivery(encoded if raw is None else raw, "events", JSON, str(number) if kept else "")


async def test_malformed_message_is_reported_acknowledged_and_stops_nothing(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """It would not get better: it must not come again for ever, nor go without a word."""
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
    assert [what.id for _, what in errors] == ["1", "2", "3", "4"]
    assert all(isinstance(error, MessageInvalid) for error, _ in errors)
    assert (consumer.stats.malformed, consumer.stats.handled, consumer.stats.failed) == (4, 1, 0)


async def test_errors_without_a_hook_are_logged(
    d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    async with Running(Consumer(d, Scripted([Gap("events", "cut off"), delivery(1, raw=b"{"), delivery(2)]))):
        await heard.until(1)
    records: list[Any] = caplog.records
    assert [record.message for record in records] == ["messages may have been missed", "malformed message"]
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


async def test_failure_that_the_dispatcher_isolates_is_no_failure_here(broker: MemoryBroker) -> None:
    d = AsyncEventDispatcher(on_error=lambda error, event, listener: None)

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise ValueError("isolated")

    heard = Heard()
    d.add_subscriber(heard)
    consumer = Consumer(d, broker.group("billing", start="new"))
    async with Running(consumer):
        await broker.publish(joined(1))
        await heard.until(1)
    assert (consumer.stats.handled, consumer.stats.failed) == (1, 0)
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
    assert [(item.message().payload["user_id"], item.attempt) for item in await left_over(broker)] == [(1, 2)]


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
        d, broker.group("billing", start="new"), events=[USER_JOINED], on_error=lambda error, what: None
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


# -- acknowledgement ----------------------------------------------------------------------------------------


async def test_what_is_done_is_acknowledged_while_a_slow_listener_runs(d: AsyncEventDispatcher) -> None:
    """A crash in a long listener does not repeat all that came before it."""
    release = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 3:
            await release.wait()

    subscription = Scripted([delivery(1), delivery(2), delivery(3), delivery(4)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(2)
        assert subscription.acked == ["1", "2"]
        release.set()
        await subscription.until_acked(4)


async def test_acknowledgements_go_in_batches_and_at_once_when_all_is_done(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for many: a round trip for each would be most of the work. And nothing is waited for that can't come."""
    monkeypatch.setattr(acks_module, "ACK_WITHIN", 3600)
    subscription = Scripted([delivery(number) for number in range(80)])
    calls: list[int] = []

    async def ack(*deliveries: Delivery) -> None:
        calls.append(len(deliveries))
        await Scripted.ack(subscription, *deliveries)

    subscription.ack = ack  # type: ignore[method-assign]
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(80)
    assert calls == [80]


async def test_many_done_are_acknowledged_without_waiting_for_more(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acks_module, "ACK_BATCH", 3)
    monkeypatch.setattr(acks_module, "ACK_WITHIN", 3600)
    release = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 4:
            await release.wait()

    subscription = Scripted([delivery(number) for number in (1, 2, 3, 4)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(3)
        release.set()


async def test_stop_lets_an_acknowledgement_under_way_finish(d: AsyncEventDispatcher) -> None:
    """To cancel it would cost a connection, and leave it open whether it was heard."""
    cancelled: list[bool] = []

    class SlowAck(Scripted):
        async def ack(self, *deliveries: Delivery) -> None:
            consumer.stop()
            try:
                await asyncio.sleep(0.2)  # longer than the reading that the stop waits for
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            await super().ack(*deliveries)

    subscription = SlowAck([delivery(1)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with consumer:
        await consumer.run()
    assert (subscription.acked, cancelled) == (["1"], [])


async def test_what_is_done_during_an_acknowledgement_goes_with_the_next(d: AsyncEventDispatcher) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    calls: list[list[str]] = []

    class SlowAck(Scripted):
        async def ack(self, *deliveries: Delivery) -> None:
            calls.append([delivery.id for delivery in deliveries])
            if len(calls) == 1:
                first.set()
                await second.wait()
            await super().ack(*deliveries)

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        if event.user_id == 2:
            await first.wait()  # so the first batch is under way
        if event.user_id == 3:
            second.set()

    subscription = SlowAck([delivery(1), delivery(2), delivery(3)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(3)
    assert calls == [["1"], ["2", "3"]]


async def test_refused_acknowledgements_are_kept_and_repeated(d: AsyncEventDispatcher, heard: Heard) -> None:
    subscription = Scripted([delivery(1), delivery(2)])
    subscription.refuse_acks = 3
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(2)
    assert subscription.acked == ["1", "2"]
    assert heard.ids == [1, 2]


async def test_delivery_that_is_still_in_hand_is_not_handled_twice(d: AsyncEventDispatcher) -> None:
    """After a lost connection a broker sends again what it has no answer for."""
    release = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        await release.wait()
        await heard.hear(event)

    subscription = Scripted([delivery(1), delivery(2)], BrokerUnavailable("lost"), [delivery(1), delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.empty.wait()
        release.set()
        await subscription.until_acked(2)
    assert (heard.ids, consumer.stats.received) == ([1, 2], 2)


async def test_consumer_outlives_its_broker(
    d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage is waited for, with pauses that grow, and one line a second."""
    outage = [BrokerUnavailable("away") for _ in range(4)]
    before = asyncio.get_running_loop().time()
    async with Running(Consumer(d, Scripted([delivery(1)], *outage, [delivery(2)]), events=[USER_JOINED])):
        await heard.until(2)
    assert asyncio.get_running_loop().time() - before > 0.3
    assert [record.message for record in caplog.records] == ["broker unavailable, trying again"]


async def test_error_that_is_no_outage_ends_the_run(d: AsyncEventDispatcher) -> None:
    """A broken adapter is no weather: it is seen."""
    async with Consumer(d, Scripted(ZeroDivisionError("bug"))) as consumer:
        with pytest.raises(ZeroDivisionError):
            await consumer.run()


# -- own messages -------------------------------------------------------------------------------------------


async def test_bridging_and_consuming_one_app_has_to_be_decided(d: AsyncEventDispatcher) -> None:
    broker = MemoryBroker("web")
    d.add_subscriber(Bridge(broker))
    group = broker.group("billing", start="new")
    with pytest.raises(OwnMessagesUndecided, match='own="skip"') as caught:
        await Consumer(d, group).__aenter__()
    assert caught.value.app == "web"
    for own in ("skip", "handle"):
        async with Consumer(d, group, own=own):
            pass


async def test_bridge_of_another_app_needs_no_decision(d: AsyncEventDispatcher, broker: MemoryBroker) -> None:
    d.add_subscriber(Bridge(MemoryBroker("web")))
    async with Consumer(d, broker.group("billing", start="new")):
        pass


async def test_bridge_behind_options_is_found_too(d: AsyncEventDispatcher) -> None:
    broker = MemoryBroker("web")
    d.add_listener("user.joined", Bridge(broker).forward, timeout=5)
    with pytest.raises(OwnMessagesUndecided):
        await Consumer(d, broker.group("billing", start="new")).__aenter__()


async def test_bridge_added_to_a_running_consumer_has_to_be_decided_too(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Before the next message is heard twice; it stays with the broker."""
    broker = MemoryBroker("web")
    async with Consumer(d, broker.group("billing", start="new")) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await heard.until(1)
        d.add_subscriber(Bridge(broker))
        await broker.publish(joined(2))
        with pytest.raises(OwnMessagesUndecided):
            await running
    assert len(heard.events) == 1
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2]


@pytest.mark.parametrize(("own", "expected"), [("skip", [2]), ("handle", [1, 2])])
async def test_own_messages_are_skipped_or_handled(
    d: AsyncEventDispatcher, heard: Heard, own: Any, expected: list[int]
) -> None:
    mine = Delivery(JSON.encode(joined(1), Origin("other", "replica")), "events", JSON, "1")
    theirs = Delivery(JSON.encode(joined(2), Origin("another", "replica")), "events", JSON, "2")
    subscription = Scripted([mine, theirs])
    consumer = Consumer(d, subscription, events=[USER_JOINED], own=own)
    async with Running(consumer):
        await subscription.until_acked(2)
    assert heard.ids == expected
    assert consumer.stats.skipped == 2 - len(expected)


async def test_where_everybody_hears_everything_this_very_process_is_skipped(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """On Pub/Sub: its listeners have run. Another app in the same process, or another replica, is somebody else."""
    origins = [Origin("other", instance()), Origin("another", instance()), Origin("other", "replica")]
    items = [
        Delivery(JSON.encode(joined(number), origin), "channel", JSON) for number, origin in enumerate(origins, start=1)
    ]
    no_headers = Delivery(DIATOR.encode(joined(4), origins[0]), "channel", DIATOR)
    subscription = Scripted([*items, no_headers], own_instance=True)
    consumer = Consumer(d, subscription, events=[USER_JOINED], own="handle")
    async with Running(consumer):
        await heard.until(3)
        await subscription.empty.wait()
    assert heard.ids == [2, 3, 4]
    assert consumer.stats.skipped == 1


async def test_consumed_event_is_not_bridged_again_but_what_its_listeners_dispatch_is(
    d: AsyncEventDispatcher,
) -> None:
    """No echo between two programs; and an answer to what was heard does leave."""
    source, target = MemoryBroker("other"), MemoryBroker("mine")
    d.add_subscriber(Bridge(target, routes=[Route("**", kind="ecst")]))
    out = await target.group("test", start="new").open()

    @d.listen(USER_JOINED)
    async def answer(event: UserJoined) -> None:
        await d.adispatch("secret", DomainEvent())
        await d.adispatch("user.welcomed", Event())
        await d.adispatch("user.left", UserLeft(event.user_id))

    async with Running(Consumer(d, source.group("billing", start="new"), events=[USER_JOINED])):
        await source.publish(joined(7), joined(8))
        sent: list[Any] = []
        while len(sent) < 4:
            sent += await out.receive(10)
    names = [item.message().message_name for item in sent]
    assert names == ["user.welcomed", "user.left"] * 2


async def test_three_replicas_that_skip_their_own_have_each_effect_once() -> None:
    """Each dispatches, bridges and consumes as one app: every event is heard where it was dispatched, and nowhere else."""
    broker = MemoryBroker("web")
    effects: list[tuple[int, int]] = []
    replicas: list[AsyncEventDispatcher] = []
    async with AsyncExitStack() as stack:
        consumers: list[Consumer] = []
        for replica in range(3):
            d = AsyncEventDispatcher()

            @d.listen(USER_JOINED)
            async def effect(event: UserJoined, replica: int = replica) -> None:
                effects.append((event.user_id, replica))

            d.add_subscriber(Bridge(broker))
            consumer = Consumer(d, broker.group("web", start="new"), events=[USER_JOINED], own="skip")
            consumers.append(await stack.enter_async_context(Running(consumer)))
            replicas.append(d)
        for number in range(60):
            await replicas[number % 3].adispatch(USER_JOINED, UserJoined(number))
        async with asyncio.timeout(20):
            while sum(consumer.stats.skipped for consumer in consumers) < 60:
                await asyncio.sleep(0)
    assert sorted(effects) == [(number, number % 3) for number in range(60)]
    assert await left_over(broker, "web") == []


# -- order and concurrency ----------------------------------------------------------------------------------


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
    other = next(key for key in "bcdefghijk" if (crc32(key.encode()) - crc32(b"a")) % 2)  # of the other lane

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


async def test_messages_without_a_key_keep_their_order_and_the_first_is_reported(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """Side by side they could overtake one another: so they don't, and somebody is told why they are slow."""
    subscription = Scripted([*(delivery(number) for number in range(10)), delivery(10, raw=b"{")])
    errors: list[Any] = []
    consumer = Consumer(
        d,
        subscription,
        events=[USER_JOINED],
        concurrency=4,
        on_error=lambda error, what: errors.append((error.field, what.id)),  # type: ignore[attr-defined]
    )
    async with Running(consumer):
        await subscription.until_acked(11)
    assert heard.ids == list(range(10))
    assert errors[0] == ("headers.key", "0")
    assert [what for _, what in errors[1:]] == ["10"]


# -- ready, run, stop, cancel -------------------------------------------------------------------------------


async def test_ready_waits_until_the_broker_has_confirmed(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    ready = asyncio.create_task(consumer.ready())
    await asyncio.sleep(0)
    assert not ready.done()
    async with consumer:
        await asyncio.wait_for(ready, 5)


async def test_entering_without_a_broker_fails_and_so_does_ready(d: AsyncEventDispatcher) -> None:
    """A wrong address is seen at the start; nobody waits for ever."""

    class Away(Scripted):
        async def open(self) -> Receiver:
            raise BrokerUnavailable("nobody there")

    consumer = Consumer(d, Away())
    ready = asyncio.create_task(consumer.ready())
    with pytest.raises(BrokerUnavailable, match="nobody"):
        await consumer.__aenter__()
    with pytest.raises(BrokerUnavailable):
        await asyncio.wait_for(ready, 5)


async def test_consumer_is_used_once_and_inside_of_its_context(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    consumer = Consumer(d, broker.group("billing", start="new"))
    with pytest.raises(RuntimeError, match="async with"):
        await consumer.run()
    async with consumer:
        consumer.stop()
        await consumer.run()
        with pytest.raises(RuntimeError, match="once"):
            await consumer.run()
    with pytest.raises(RuntimeError, match="once"):
        await consumer.__aenter__()


async def test_stop_finishes_what_was_received(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """Under a name used once nobody else would get it."""
    begun, release = asyncio.Event(), asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await release.wait()
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(*map(joined, range(5)))
        await begun.wait()
        consumer.stop()
        release.set()
        await running
    assert finished == [0, 1, 2, 3, 4]
    assert await left_over(broker) == []


async def test_stop_finishes_the_running_listener_and_leaves_to_the_broker_what_it_has_no_time_for(
    broker: MemoryBroker, d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on SIGTERM: what is begun is finished and acknowledged, nothing new is begun after a while, nothing is lost."""
    monkeypatch.setattr("silbo.consumer.DRAIN", 0.1)
    begun, release = asyncio.Event(), asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await release.wait()
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(*map(joined, range(5)))
        await begun.wait()
        consumer.stop()
        await asyncio.sleep(0.6)
        assert not running.done()
        loop = asyncio.get_running_loop()
        before = loop.time()
        release.set()
        await running
        assert loop.time() - before < 0.6
    assert finished == [0]
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [1, 2, 3, 4]


async def test_idle_consumer_stops_within_its_grace(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    async with Consumer(d, broker.group("billing", start="new")) as consumer:
        running = asyncio.create_task(consumer.run())
        await asyncio.sleep(0)
        consumer.stop()
        await asyncio.wait_for(running, 0.6)


async def test_stop_does_not_wait_for_a_broker_that_hangs(d: AsyncEventDispatcher) -> None:
    class Hanging(Scripted):
        async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
            if self.batches:
                return await super().receive(limit)
            await asyncio.Event().wait()
            raise AssertionError

        async def ack(self, *deliveries: Delivery) -> None:
            await asyncio.Event().wait()

    heard = Heard()
    d.add_subscriber(heard)
    async with Consumer(d, Hanging([delivery(1)])) as consumer:
        running = asyncio.create_task(consumer.run())
        await heard.until(1)
        consumer.stop()
        await asyncio.wait_for(running, 2.5)


async def test_stop_may_come_from_a_signal(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    loop = asyncio.get_running_loop()
    async with Consumer(d, broker.group("billing", start="new")) as consumer:
        loop.add_signal_handler(signal.SIGUSR1, consumer.stop)
        try:
            loop.call_soon(signal.raise_signal, signal.SIGUSR1)
            await asyncio.wait_for(consumer.run(), 5)
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)


async def test_stop_from_a_listener(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    async with Consumer(d, broker.group("billing", start="new")) as consumer:

        @d.listen("user.joined")
        async def enough(event: Any) -> None:
            consumer.stop()

        await broker.publish(joined(1), joined(2))
        await asyncio.wait_for(consumer.run(), 5)
    assert consumer.stats.handled == 2
    assert await left_over(broker) == []


async def test_leaving_the_context_waits_for_a_run_beside_it(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """The natural program closes in order: the listener ends, it is acknowledged, then the connection goes."""
    begun = asyncio.Event()
    finished: list[int] = []

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        begun.set()
        await asyncio.sleep(0.05)
        finished.append(event.user_id)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await begun.wait()
    await running
    assert finished == [1]
    assert await left_over(broker) == []


async def test_cancelled_body_cancels_the_run_beside_it(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """Cancel means leave now: a listener of a minute is not waited for, and its delivery comes again."""
    begun = asyncio.Event()
    runs: list[asyncio.Task[None]] = []

    @d.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def program() -> None:
        async with Consumer(d, broker.group("billing", start="new")) as consumer:
            runs.append(asyncio.create_task(consumer.run()))
            await asyncio.sleep(3600)

    await begin(broker)
    await broker.publish(joined(1))
    task = asyncio.create_task(program())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(asyncio.CancelledError):
        await runs[0]
    assert len(await left_over(broker)) == 1


async def test_cancellation_while_leaving_the_context_cancels_the_run_beside_it(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """The second Ctrl-C: whoever does not want to wait for the listener any longer need not."""
    begun = asyncio.Event()
    runs: list[asyncio.Task[None]] = []

    @d.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async def program() -> None:
        async with Consumer(d, broker.group("billing", start="new")) as consumer:
            runs.append(asyncio.create_task(consumer.run()))
            await begun.wait()

    await begin(broker)
    await broker.publish(joined(1))
    task = asyncio.create_task(program())
    await begun.wait()
    await asyncio.wait([task], timeout=0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(runs[0], 5)
    assert len(await left_over(broker)) == 1


async def test_cancelled_listener_leaves_its_delivery_pending_and_what_is_done_acknowledged(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """Shutdown in the middle of a listener loses nothing, and repeats nothing that was done."""
    begun = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 2:
            begun.set()
            await asyncio.sleep(3600)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1), joined(2), joined(3))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 5)
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2, 3]


@pytest.mark.parametrize("seed", range(12))
async def test_cancellation_at_any_moment_loses_nothing(seed: int) -> None:
    """Whatever a consumer was doing, every event is heard by it or by the next one, failures and concurrency included."""
    rng = random.Random(seed)
    broker = MemoryBroker("other")
    await begin(broker)
    completed: list[int] = []
    d = AsyncEventDispatcher()

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if rng.random() < 0.2:
            raise ValueError("not now")
        completed.append(event.user_id)

    published = 0
    for _ in range(25):
        new = range(published, published + rng.randrange(8))
        published = new.stop
        await broker.publish(*(joined(number, key=str(number % 5)) for number in new))
        consumer = Consumer(
            d,
            broker.group("billing", start="new"),
            events=[USER_JOINED],
            concurrency=rng.choice([1, 3]),
            on_error=lambda error, what: None,
        )
        async with consumer:
            running = asyncio.create_task(consumer.run())
            for _ in range(rng.randrange(60)):
                await asyncio.sleep(0)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    async with Running(
        Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], on_error=lambda error, what: None)
    ):
        async with asyncio.timeout(20):
            while len(set(completed)) < published:
                await asyncio.sleep(0.01)
    assert set(completed) == set(range(published))
    assert await left_over(broker) == []


async def test_swallowed_cancellation_in_a_listener_ends_the_run_all_the_same(
    broker: MemoryBroker, d: AsyncEventDispatcher
) -> None:
    """As ``wait_for`` does on Python 3.11: the consumer must not read on after it was cancelled."""
    begun = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def swallow(event: UserJoined) -> None:
        begun.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)
        await heard.hear(event)

    async with Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED]) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1), joined(2))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 5)
    assert heard.ids == [1]
    assert [item.message().payload["user_id"] for item in await left_over(broker)] == [2]


async def test_redelivery_goes_to_another_consumer_of_the_group(broker: MemoryBroker) -> None:
    """What one could not finish, the next does, and knows that it is not the first attempt."""
    begun = asyncio.Event()
    first, second = AsyncEventDispatcher(), AsyncEventDispatcher()

    @first.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    attempts: list[int] = []
    done = asyncio.Event()

    @second.listen("user.joined")
    async def fail_once(event: Any) -> None:
        if len(attempts) == 0:
            raise ValueError("once")
        done.set()

    group = broker.group("billing", start="new")
    async with Consumer(first, group) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await begun.wait()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    async with Running(Consumer(second, group, on_error=lambda error, what: attempts.append(what.attempt))):
        await done.wait()
    assert attempts == [2]
    assert await left_over(broker) == []


def test_consumer_serves_one_loop_and_the_broker_the_next() -> None:
    broker = MemoryBroker("other")
    found: list[int] = []

    async def program(number: int) -> None:
        d = AsyncEventDispatcher()
        heard = Heard()
        d.add_subscriber(heard)
        async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])):
            await broker.publish(joined(number))
            await heard.until(1)
        found.extend(heard.ids)

    asyncio.run(program(1))
    asyncio.run(program(2))
    assert found == [1, 2]


def test_slips_are_refused_with_what_was_meant(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """A broker for its group, arguments the wrong way round, a name for a list of names."""
    wrong: Any = broker
    with pytest.raises(TypeError, match="group"):
        Consumer(d, wrong)
    swapped: Any = broker.group("billing", start="new")
    with pytest.raises(TypeError, match="dispatcher and a subscription"):
        Consumer(swapped, d)  # type: ignore[arg-type]
    events: Any = USER_JOINED
    with pytest.raises(TypeError, match="list of EventName"):
        Consumer(d, swapped, events=events)
