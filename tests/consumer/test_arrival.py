"""The consumer: what arrives is heard under its name, and what is this program's own is not heard twice."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
import whistle

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    DomainEvent,
    ECSTEvent,
    Event,
    EventName,
    NotificationEvent,
    Route,
)
from silbo.bridge import find_bridges
from silbo.brokers.memory import MemoryBroker
from silbo.consumer import consumer as consumer_module
from silbo.errors import OwnMessagesUndecided
from silbo.message import Delivery, Origin, instance
from silbo.wire.encode import to_message
from silbo.wire.formats import DIATOR, JSON
from tests.support.consumer import (
    USER_JOINED,
    USER_LEFT,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    UserLeft,
    delivery,
    joined,
    left_over,
)


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


@pytest.mark.parametrize("wrong", [{"own": "both"}, {"concurrency": 0}, {"max_attempts": 0}, {"drain": -1}])
def test_settings_that_make_no_sense_are_refused(broker: MemoryBroker, wrong: Any) -> None:
    with pytest.raises(ValueError):
        Consumer(AsyncEventDispatcher(), broker.group("billing", start="new"), **wrong)


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


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one each time that a consumer looks through all listeners for a bridge."""
    looks: list[Any] = []
    monkeypatch.setattr(
        consumer_module, "find_bridges", lambda dispatcher: looks.append(dispatcher) or find_bridges(dispatcher)
    )
    return looks


async def test_all_listeners_are_looked_at_again_only_when_they_have_changed(
    d: AsyncEventDispatcher, heard: Heard, looks: list[Any]
) -> None:
    """A look at a thousand names takes a millisecond, and a consumer reads hundreds of times a second."""
    subscription = Scripted(*([delivery(number)] for number in range(20)))
    async with Running(Consumer(d, subscription)):
        await heard.until(20)
        assert len(looks) == 1
        with d.add_listener("user.left", heard.hear):
            subscription.batches.append([delivery(20)])
            await heard.until(21)
            assert len(looks) == 2
        subscription.batches += [[delivery(21)], [delivery(22)]]
        await heard.until(23)
        assert len(looks) == 3


class Overridden(AsyncEventDispatcher):
    def get_listeners(self, name: Any = None, /) -> Any:
        return super().get_listeners(name)


@pytest.mark.parametrize("cls", [whistle.AsyncEventDispatcher, Overridden])
async def test_all_listeners_of_a_dispatcher_that_tells_no_change_are_looked_at_once_a_second(
    cls: type[Any], looks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whistle's own, and a host's that may give other listeners than those that were added."""
    now = 1000.5
    monkeypatch.setattr(consumer_module, "monotonic", lambda: now)
    d = cls()
    heard = Heard()
    d.add_listener("user.joined", heard.hear)
    subscription = Scripted(*([delivery(number)] for number in range(20)))
    async with Consumer(d, subscription) as consumer:
        running = asyncio.create_task(consumer.run())
        await heard.until(20)
        assert len(looks) == 1
        d.add_listener("user.joined", Bridge(MemoryBroker("other")).forward, priority=1)
        now += 1.0
        with pytest.raises(OwnMessagesUndecided):
            await running
    assert len(looks) == 2


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
