"""Messages of another version than the consumer's: rebuilt, left to the others of the group, or refused with the reason."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest

from silbo import AsyncEventDispatcher, Bridge, EventName, NotificationEvent, Route, receive
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, DeliveryGivenUp, MessageInvalid, VersionTooNew
from silbo.message import Delivery, Format, Message, Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON
from tests.support.consumer import Consumer, Running, Scripted, begin, left_over


@dataclass
class PaidV1(NotificationEvent):
    order: int


@dataclass
class PaidV2(NotificationEvent):
    order: int
    currency: str


@dataclass
class PaidV3(NotificationEvent):
    order_id: int
    currency: str


def add_currency(payload: dict[str, Any]) -> dict[str, Any]:
    payload["currency"] = "EUR"
    return payload


def rename_order(payload: dict[str, Any]) -> dict[str, Any]:
    return {"order_id": payload["order"], "currency": payload["currency"]}  # all the rest is left out


V1 = EventName("order.paid", PaidV1, key="order")
V2 = EventName("order.paid", PaidV2, key="order", version=2, upcast={1: add_currency})
V3 = EventName("order.paid", PaidV3, key="order_id", version=3, upcast={1: add_currency, 2: rename_order})
ELSEWHERE = Origin("shop", "x")


def paid(number: int, version: int, *, key: str | None = None, header: str | None = None) -> Message:
    event: Any = {1: PaidV1(number), 2: PaidV2(number, "USD"), 3: PaidV3(number, "USD")}[version]
    message = to_message(event, name="order.paid", kind="notification", key=key, version=version)
    if header is not None:
        assert isinstance(message.headers, dict)
        message.headers["version"] = header
    return message


def raw(message: Message, form: Format = JSON) -> bytes:
    return form.encode(message, ELSEWHERE)


async def rebuilt(message: Message | bytes, events: Sequence[EventName[Any]], form: Format = JSON) -> Any:
    bytes_ = message if isinstance(message, bytes) else raw(message, form)
    return await receive(AsyncEventDispatcher(), bytes_, events=events, format=form)


# -- rebuilding ---------------------------------------------------------------------------------------------


async def test_older_payloads_pass_through_each_step() -> None:
    """1 -> 2 -> 3: a listener sees one class, whatever came, and can tell the version that came."""
    sent = paid(7, 1)
    event = await rebuilt(sent, [V3])
    assert type(event) is PaidV3 and (event.order_id, event.currency) == (7, "EUR")
    assert event.origin.version == 1 and event.origin == ELSEWHERE
    event = await rebuilt(paid(7, 2), [V3])
    assert (event.order_id, event.currency, event.origin.version) == (7, "USD", 2)
    event = await rebuilt(paid(7, 3), [V3])
    assert (event.order_id, event.currency, event.origin.version) == (7, "USD", 3)
    app, instance = event.origin  # still the pair of the sender
    assert (app, instance) == event.origin == ("shop", "x")
    for again in (copy.copy(event.origin), pickle.loads(pickle.dumps(event.origin))):
        assert again == event.origin and again.version == 3


async def test_a_step_that_makes_a_new_payload_keeps_the_events_id_and_time() -> None:
    """They name the fact, and no function of a host's has to copy them."""
    sent = paid(7, 2)
    event = await rebuilt(sent, [V3])
    assert event.event_id == UUID(sent.message_id)
    assert event.event_timestamp == datetime.fromisoformat(sent.payload["event_timestamp"])

    def invent(payload: dict[str, Any]) -> dict[str, Any]:
        return payload | {"currency": "EUR", "event_id": "other", "event_timestamp": None}

    @dataclass
    class Dated(NotificationEvent):
        order: int
        event_id: UUID
        event_timestamp: datetime

    sent = paid(7, 1)
    for cls in (PaidV2, Dated):
        event = await rebuilt(sent, [EventName("order.paid", cls, version=2, upcast={1: invent})])
        assert event.event_id == UUID(sent.message_id)
        assert event.event_timestamp == datetime.fromisoformat(sent.payload["event_timestamp"])


async def test_payload_of_a_name_without_a_class_is_upcast_too() -> None:
    """A dict of the newest shape."""
    name: EventName[Any] = EventName("order.paid", version=2, upcast={1: add_currency})
    event = await rebuilt(paid(7, 1), [name])
    assert event.payload["order"] == 7 and event.payload["currency"] == "EUR" and event.origin.version == 1


class _Textless(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def _raise(error: Exception) -> Callable[[Any], Any]:
    def broken(payload: dict[str, Any]) -> dict[str, Any]:
        raise error

    return broken


def _return(value: Any) -> Callable[[Any], Any]:
    def broken(payload: dict[str, Any]) -> Any:
        return value

    return broken


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (_raise(KeyError("order")), "broken raised KeyError: 'order'"),
        (_raise(RecursionError()), "broken raised RecursionError"),
        (_raise(_Textless()), "broken raised _Textless"),
        (_raise(MessageInvalid("not mine", field="x")), "broken raised x: not mine"),
        (_return(None), "broken returned NoneType, not a dict"),
        (_return([("order", 1)]), "broken returned list, not a dict"),
    ],
)
async def test_failing_step_is_a_malformed_message_that_names_version_and_function(
    step: Callable[[Any], Any], problem: str
) -> None:
    """Whatever reading raises is MessageInvalid, and the host finds its function."""
    name = EventName("order.paid", PaidV3, version=3, upcast={1: add_currency, 2: step})
    with pytest.raises(MessageInvalid) as caught:
        await rebuilt(paid(7, 1), [name])
    assert "upcast from version 2: " in str(caught.value) and problem in str(caught.value)


async def test_step_whose_payload_does_not_fit_names_the_field() -> None:
    """As any other payload that does not fit."""
    name = EventName("order.paid", PaidV2, version=2, upcast={1: _return({"order": "seven", "currency": "EUR"})})
    with pytest.raises(MessageInvalid, match=r"payload\.order: "):
        await rebuilt(paid(7, 1), [name])


async def test_without_an_upcast_older_payloads_are_tried_as_they_are() -> None:
    """An optional field needs no function; a required one is missing, and the error says why."""

    @dataclass
    class PaidWithDefault(NotificationEvent):
        order: int
        currency: str = "EUR"

    event = await rebuilt(paid(7, 1), [EventName("order.paid", PaidWithDefault, version=2)])
    assert event.currency == "EUR" and event.origin.version == 1
    with pytest.raises(
        MessageInvalid, match=r"payload\.currency: missing \(the message has version 1, and PaidV2 is ver"
    ):
        await rebuilt(paid(7, 1), [EventName("order.paid", PaidV2, version=2)])
    with pytest.raises(MessageInvalid, match=r"payload\.currency: missing$"):
        await rebuilt(paid(7, 1), [EventName("order.paid", PaidV2)])


async def test_older_than_the_first_step_is_malformed() -> None:
    """A function for version 1 was taken away: no other may get its payload."""
    name = EventName("order.paid", PaidV3, version=3, upcast={2: rename_order})
    with pytest.raises(MessageInvalid, match=r"headers\.version: version 1 is too old: upcast begins with 2"):
        await rebuilt(paid(7, 1), [name])


async def test_each_version_has_its_class() -> None:
    """Two names that are equal as strings: each message is rebuilt as the class of its version."""
    plain_v2 = EventName("order.paid", PaidV2, version=2)
    for events in ([V1, plain_v2], [plain_v2, V1]):
        assert type(await rebuilt(paid(7, 1), events)) is PaidV1
        assert type(await rebuilt(paid(7, 2), events)) is PaidV2
        with pytest.raises(VersionTooNew, match=r"'order.paid': the message has version 3, and .* than 2"):
            await rebuilt(paid(7, 3), events)


async def test_version_without_a_class_of_its_own_becomes_the_next_that_can_take_it() -> None:
    """The next newer one whose upcast begins early enough; else the next newer one without an upcast."""
    late_v2 = EventName("order.paid", PaidV2, version=2)
    assert type(await rebuilt(paid(7, 1), [late_v2, V3])) is PaidV3  # late_v2 has no function for it
    assert type(await rebuilt(paid(7, 2), [V1, V3])) is PaidV3

    @dataclass
    class Loose(NotificationEvent):
        order: int

    loose = EventName("order.paid", Loose, version=4)
    late_v3 = EventName("order.paid", PaidV3, version=3, upcast={2: rename_order})
    assert type(await rebuilt(paid(7, 1), [late_v3, loose])) is Loose


def test_one_version_twice_is_refused_if_the_two_differ() -> None:
    """Nobody could tell which is meant; the same twice is no conflict."""
    subscription = Scripted()
    Consumer(AsyncEventDispatcher(), subscription, events=[V1, V1, EventName("order.paid", PaidV1)])
    with pytest.raises(ValueError, match="version 1 of 'order.paid' twice, with different classes"):
        Consumer(AsyncEventDispatcher(), subscription, events=[V1, EventName("order.paid", PaidV2)])
    other = EventName("order.paid", PaidV2, version=2)
    with pytest.raises(ValueError, match="version 2 of 'order.paid' twice, with different upcasts"):
        Consumer(AsyncEventDispatcher(), subscription, events=[V1, V2, other])


async def test_unwanted_message_of_ones_own_is_skipped_whatever_its_version() -> None:
    """An unwanted message is left to nobody."""
    dispatcher = AsyncEventDispatcher()
    assert await receive(dispatcher, raw(paid(1, 3)), events=[V1], own="skip", app="shop") is None


# -- on the wire --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0", "-1", "+1", "two", "1.0", "²", "", " 1", "1_0", "9" * 19])
async def test_header_that_is_no_version_is_malformed(version: str) -> None:
    """Nobody can tell what the payload is: it is not taken for version 1."""
    for events in ([V2], []):
        with pytest.raises(MessageInvalid, match=r"headers\.version: .*is not a version"):
            await rebuilt(paid(1, 1, header=version), events)


async def test_message_that_does_not_tell_its_version_is_of_version_1() -> None:
    """As those of other producers."""
    message = paid(7, 1)
    assert isinstance(message.headers, dict)
    del message.headers["version"]
    event = await rebuilt(message, [V2])
    assert event.currency == "EUR" and event.origin.version == 1


async def test_cloudevents_carry_the_version() -> None:
    """As text, and as an integer, which CloudEvents has too."""
    event = await rebuilt(paid(7, 2), [V3], CLOUDEVENTS)
    assert (event.order_id, event.origin.version) == (7, 2)
    number = raw(paid(7, 2), CLOUDEVENTS).replace(b'"silboversion":"2"', b'"silboversion":2')
    event = await rebuilt(number, [V3], CLOUDEVENTS)
    assert (event.order_id, event.origin.version) == (7, 2)
    foreign = raw(paid(7, 2), CLOUDEVENTS).replace(b'"silboversion":"2"', b'"other":true')
    assert (await rebuilt(foreign, [], CLOUDEVENTS)).origin.version == 1


async def test_in_diators_format_the_class_tells_the_version() -> None:
    """It has no headers: the name of the class is all that there is, and nothing is upcast."""
    for message, version in ((paid(7, 1), 1), (paid(7, 2), 2)):
        event = await rebuilt(message, [V1, V2], DIATOR)
        assert type(event).__name__ == message.class_name and event.origin.version == version
        assert event.order == 7


async def test_event_that_is_dispatched_under_its_text_leaves_with_the_version_of_its_class() -> None:
    """Else a consumer would upcast a payload that is new."""
    broker = MemoryBroker("shop")
    receiver = await broker.group("billing", start="new").open()
    dispatcher = AsyncEventDispatcher()
    dispatcher.add_subscriber(Bridge(broker, routes=[Route("order.*")]))
    older = EventName("order.paid", PaidV2)  # of the same class: its payloads have one shape only
    await dispatcher.adispatch("order.paid", PaidV2(7, "USD"))
    await dispatcher.adispatch(V2, PaidV2(7, "USD"))
    await dispatcher.adispatch("order.refunded", PaidV2(7, "USD"))  # another name, which has no version
    await dispatcher.adispatch("order.noted", NotificationEvent())
    found = [item.message().version for item in await receiver.receive(9) if isinstance(item, Delivery)]
    assert found == [2, 2, 1, 1] and older.version == 1
    await receiver.aclose()


# -- consumers ----------------------------------------------------------------------------------------------


class Paid:
    """A listener that notes the orders it hears, and `until` waits for a number of them."""

    def __init__(self, dispatcher: AsyncEventDispatcher, fails: int = 0) -> None:
        self.heard: list[Any] = []
        self._fails = fails
        self._changed = asyncio.Event()
        dispatcher.add_listener("order.paid", self.hear)

    async def hear(self, event: Any) -> None:
        if self._fails:
            self._fails -= 1
            raise LookupError("as told")
        self.heard.append(event)
        self._changed.set()

    @property
    def orders(self) -> list[int]:
        return [event.order for event in self.heard]

    async def until(self, many: int) -> None:
        async with asyncio.timeout(30):
            while len(self.heard) < many:
                self._changed.clear()
                await self._changed.wait()


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not check():
            await asyncio.sleep(0.001)


def make(broker: MemoryBroker, events: Sequence[EventName[Any]], **options: Any) -> tuple[Paid, Consumer]:
    dispatcher = AsyncEventDispatcher()
    paid_ = Paid(dispatcher)
    return paid_, Consumer(dispatcher, broker.group("billing", start="oldest"), events=events, **options)


async def test_each_attempt_upcasts_anew() -> None:
    """A step may change the payload in place: the next attempt begins with what was sent."""
    broker = MemoryBroker("shop")
    seen: list[Mapping[str, Any]] = []

    def once(payload: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(payload))
        payload["currency"] = "EUR"
        del payload["order"]
        payload["order"] = 7
        return payload

    name = EventName("order.paid", PaidV2, key="order", version=2, upcast={1: once})
    dispatcher = AsyncEventDispatcher()
    listener = Paid(dispatcher, fails=1)
    async with Running(Consumer(dispatcher, broker.group("billing", start="new"), events=[name])):
        await broker.publish(paid(7, 1))  # without a key: it is taken from the event, which is upcast for that
        await listener.until(1)
    assert len(seen) == 3 and all("currency" not in payload for payload in seen)


async def test_newer_message_is_left_to_the_consumer_that_knows_it() -> None:
    """Neither malformed nor dead; what waits behind it goes along, and the order of the key holds."""
    broker = MemoryBroker("shop")
    await begin(broker)
    errors: list[Any] = []
    old, old_consumer = make(broker, [V1], on_error=lambda error, _: errors.append(error))
    new, new_consumer = make(broker, [V2], concurrency=2)
    async with Running(old_consumer):
        await broker.publish(paid(1, 2, key="a"), paid(2, 1, key="a"), paid(3, 2, key="a"), paid(4, 1, key="b"))
        await old.until(1)
        await until(lambda: old_consumer.stats.newer)
        assert old.orders == [4]  # the key of the newer one waits, and no other
        async with Running(new_consumer):
            await new.until(3)
    assert new.orders == [1, 2, 3] and old.orders == [4]
    assert [event.origin.version for event in new.heard] == [2, 1, 2]
    assert not broker.dead and not errors and not await left_over(broker)
    assert (old_consumer.stats.malformed, old_consumer.stats.dead, old_consumer.stats.failed) == (0, 0, 0)
    assert new_consumer.stats.claimed == 3 and new_consumer.stats.handled == 3


async def test_what_nobody_knows_in_time_becomes_a_dead_letter_with_the_reason() -> None:
    """Then its key goes on, here where it waited."""
    broker = MemoryBroker("shop")
    await begin(broker)
    errors: list[Any] = []
    old, consumer = make(broker, [V1], newer_version_wait=0.01, on_error=lambda error, _: errors.append(error))
    async with Running(consumer):
        await broker.publish(paid(1, 2, key="a"), paid(2, 1, key="a"))
        await old.until(1)
    assert old.orders == [2]
    (letter,) = broker.dead
    assert letter.attempts == 0 and letter.error.startswith("VersionTooNew: 'order.paid': the message has version 2")
    (given_up,) = errors
    assert isinstance(given_up, DeliveryGivenUp) and isinstance(given_up.__cause__, VersionTooNew)
    assert "given up as no consumer of the group that knows its version came in time" in str(given_up)
    assert (consumer.stats.newer, consumer.stats.dead, consumer.stats.handled) == (1, 1, 1)
    assert not await left_over(broker)


async def test_no_wait_makes_it_a_dead_letter_at_once_and_too_long_a_wait_is_refused() -> None:
    """The limits of the option."""
    broker = MemoryBroker("shop")
    await begin(broker)
    _, consumer = make(broker, [V1], newer_version_wait=0)
    async with Running(consumer):
        await broker.publish(paid(1, 2))
        await until(lambda: broker.dead)
    with pytest.raises(ValueError, match="newer_version_wait is at most a day"):
        make(broker, [V1], newer_version_wait=86_401)
    with pytest.raises(TypeError, match="newer_version_wait is a number of seconds"):
        make(broker, [V1], newer_version_wait=None)


async def test_without_a_group_a_newer_message_is_reported_at_once() -> None:
    """Nobody else gets what Pub/Sub gave to this consumer."""
    delivery = Delivery(raw(paid(1, 2)), "orders", JSON)
    known = Delivery(raw(paid(2, 1)), "orders", JSON)
    errors: list[Any] = []
    dispatcher = AsyncEventDispatcher()
    listener = Paid(dispatcher)
    subscription = Scripted([delivery, known])
    consumer = Consumer(
        dispatcher, subscription, events=[V1], on_error=lambda error, about: errors.append((error, about))
    )
    async with Running(consumer):
        await listener.until(1)
    ((error, about),) = errors
    assert isinstance(error, VersionTooNew) and (error.name, error.version, error.known) == ("order.paid", 2, 1)
    assert about is delivery
    assert (consumer.stats.newer, consumer.stats.malformed, consumer.stats.dead) == (1, 0, 0)


async def test_broker_that_can_not_be_told_holds_up_no_other_key() -> None:
    """An outage, or a Redis that is full and refuses: the offer is repeated, and the one worker goes on."""

    class Refusing(Scripted):
        keep_every = 0.005
        offers = 0

        async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
            self.offers += 1
            if self.offers < 3:
                raise BrokerUnavailable("no")
            return [None] * len(deliveries)

    newer = Delivery(raw(paid(1, 2, key="a")), "events", JSON, "1")
    behind = Delivery(raw(paid(2, 1, key="a")), "events", JSON, "2")
    other = Delivery(raw(paid(3, 1, key="b")), "events", JSON, "3")
    dispatcher = AsyncEventDispatcher()
    listener = Paid(dispatcher)
    subscription = Refusing([newer, behind, other])
    async with Running(Consumer(dispatcher, subscription, events=[V1])):
        await subscription.until_acked(1)
        await until(lambda: subscription.offers >= 3)
    assert listener.orders == [3] and subscription.acked == ["3"] and not subscription.buried  # the others took both


class Leaving(Scripted):
    """A group whose others take the first delivery that is offered as soon as they may."""

    keep_every = 0.005

    def __init__(self, *batches: Sequence[Delivery], also: str = "") -> None:
        super().__init__(*batches)
        self.kept: list[str] = []
        self.keeps = 0
        self.may_take = False
        self.also_taken = also

    async def offer(self, *deliveries: Delivery) -> Sequence[float | None]:
        return [None if self.may_take and not place else 1.0 for place in range(len(deliveries))]

    async def keep(self, *deliveries: Delivery) -> Collection[Delivery]:
        self.keeps += 1
        self.kept += [delivery.id for delivery in deliveries]
        return [delivery for delivery in deliveries if delivery.id == self.also_taken]


async def test_what_is_left_to_others_is_not_kept_from_them() -> None:
    """A sign that it is in work would have them wait; what nobody took is kept again before it is handled here."""
    subscription = Leaving(
        [Delivery(raw(paid(n, 2 if n == 1 else 1, key="a")), "events", JSON, str(n)) for n in (1, 2)]
    )
    dispatcher = AsyncEventDispatcher()
    go_on = asyncio.Event()

    async def wait(_: Any) -> None:
        await go_on.wait()

    dispatcher.add_listener("order.paid", wait)
    consumer = Consumer(dispatcher, subscription, events=[V1])
    async with Running(consumer):
        await until(lambda: consumer.stats.newer)
        told, subscription.kept = subscription.keeps, []
        await until(lambda: subscription.keeps > told + 5)
        assert not subscription.kept
        subscription.may_take = True
        await until(lambda: len(subscription.kept) > 2)
        assert set(subscription.kept) == {"2"}
        go_on.set()
        await subscription.until_acked(1)
    assert subscription.acked == ["2"] and not subscription.buried


async def test_what_others_took_with_it_is_not_handled_here() -> None:
    """They have the whole key."""
    subscription = Leaving(
        [Delivery(raw(paid(n, 2 if n == 1 else 1, key="a")), "events", JSON, str(n)) for n in (1, 2, 3)], also="2"
    )
    dispatcher = AsyncEventDispatcher()
    listener = Paid(dispatcher)
    subscription.may_take = True
    async with Running(Consumer(dispatcher, subscription, events=[V1])):
        await subscription.until_acked(1)
    assert listener.orders == [3] and subscription.acked == ["3"]


async def test_consumer_that_stops_leaves_a_newer_message_to_those_that_come() -> None:
    """The old replica ends before the new one starts, as in a deploy that recreates."""
    broker = MemoryBroker("shop")
    await begin(broker)
    _, consumer = make(broker, [V1])
    async with Running(consumer):
        await broker.publish(paid(1, 2, key="a"), paid(2, 1, key="a"))
        await until(lambda: consumer.stats.newer)
    new, consumer = make(broker, [V2])
    async with Running(consumer):
        await new.until(2)
    assert new.orders == [1, 2] and not broker.dead


async def test_two_consumers_that_do_not_know_a_version_do_not_pass_it_to_and_fro() -> None:
    """Each is offered it once; the wait began with the first offer."""
    broker = MemoryBroker("shop")
    await begin(broker)
    group = broker.group("billing", start="new")
    first, second = await group.open(), await group.open()
    await broker.publish(paid(1, 2))
    (delivery,) = await first.receive(9)
    assert isinstance(delivery, Delivery)
    assert await first.offer(delivery) >= [0.0]
    (taken,) = await second.receive(9)
    assert isinstance(taken, Delivery) and taken.attempt == 2
    assert await first.offer(delivery) == [None] and list(await first.keep(delivery)) == [delivery]
    assert not await first.receive(9)
    (waited,) = await second.offer(taken)
    assert waited is not None and waited > 0
    assert not await first.receive(9) and not await second.receive(9)
    third = await group.open()
    assert [item.id for item in await third.receive(9) if isinstance(item, Delivery)] == ["1"]
    for receiver in (first, second, third):
        await receiver.aclose()


async def test_what_is_taken_back_is_not_given_to_others() -> None:
    """A message that waited behind one that is gone is handled here, and by nobody else."""
    broker = MemoryBroker("shop")
    await begin(broker)
    group = broker.group("billing", start="new")
    first, second = await group.open(), await group.open()
    await broker.publish(paid(1, 1), paid(2, 1))
    deliveries = [item for item in await first.receive(9) if isinstance(item, Delivery)]
    await first.offer(*deliveries)
    assert not await first.keep(deliveries[1])
    assert [item.id for item in await second.receive(9) if isinstance(item, Delivery)] == ["1"]
    await first.ack(deliveries[1])
    for receiver in (first, second):
        await receiver.aclose()
