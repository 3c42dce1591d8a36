"""Headers: from a route, an event or a received message, to the listener on the other side."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    DomainEvent,
    ECSTEvent,
    EventName,
    Message,
    NotificationEvent,
    Origin,
    Outbox,
    Route,
    receive,
    set_header,
)
from silbo.brokers.memory import MemoryBroker
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.errors import HeaderInvalid
from silbo.message import Delivery
from silbo.stores.memory import MemoryStore
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON
from tests.support.consumer import USER_JOINED, Consumer, Running, joined
from tests.support.relay import wait_until


class Collecting:
    """A publisher that keeps what it gets."""

    app = "web"

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def publish(self, *messages: Message) -> None:
        self.messages += messages

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Frozen(NotificationEvent):
    number: int = 1


@dataclass
class Foreign:
    number: int = 1

    def __getattr__(self, name: str) -> Any:
        return f"an answer to {name}"


def bridged(*routes: Route) -> tuple[AsyncEventDispatcher, Collecting]:
    d, publisher = AsyncEventDispatcher(), Collecting()
    d.add_subscriber(Bridge(publisher, routes=routes))
    return d, publisher


async def test_a_header_of_the_event_goes_before_the_route_s() -> None:
    """A listener's word about this very event counts more than the route's about all events of a name."""
    d, publisher = bridged(Route("user.**", headers={"tenant": "all", "team": "accounts"}))
    event = Frozen()
    set_header(event, "tenant", "acme")
    set_header(event, "correlationid", "of the request")
    await d.adispatch("user.joined", event)
    await d.adispatch("other", event)
    first, second = publisher.messages
    assert first.headers.items() >= {"tenant": "acme", "team": "accounts", "correlationid": "of the request"}.items()
    assert second.headers["tenant"] == "acme" and "team" not in second.headers
    assert first.headers["publication"] != second.headers["publication"]
    assert "tenant" not in first.payload and "tenant" not in str(first.payload)


async def test_a_class_that_answers_to_every_attribute_has_no_headers() -> None:
    d, publisher = bridged(Route("x", kind="notification"))
    event = Foreign()
    event.origin = event.event_id = event.event_timestamp = None
    await d.adispatch("x", event)
    set_header(event, "tenant", "acme")
    await d.adispatch("x", event)
    assert [message.headers.get("tenant") for message in publisher.messages] == [None, "acme"]


@pytest.mark.parametrize("name", ["app", "instance", "key", "publication", "version", "", 1, None])
def test_a_name_that_silbo_sets_or_that_is_no_text_is_refused(name: Any) -> None:
    """An origin could be forged by a listener, and an echo go unseen."""
    with pytest.raises(HeaderInvalid, match="header"):
        set_header(Frozen(), name, "x")
    with pytest.raises(HeaderInvalid):
        Route("x", headers={name: "x"})


@pytest.mark.parametrize("headers", [{"Team": "x"}, {"subject": "x"}, {"silboversion": "2"}, {"team": "\x00"}])
def test_a_header_that_the_format_can_not_carry_is_refused_with_its_bridge(headers: dict[str, str]) -> None:
    """Not at the first dispatch; with an outbox in between, too. JSON carries all of them."""
    routes = [Route("user.**", headers=headers)]
    broker = MemoryBroker(app="web", format=CLOUDEVENTS)
    for publisher in (broker, Outbox(MemoryStore(), broker)):
        with pytest.raises(HeaderInvalid, match="CloudEvents") as caught:
            Bridge(publisher, routes=routes)
        assert caught.value.name == next(iter(headers))
    Bridge(MemoryBroker(app="web"), routes=routes)
    Bridge(broker, routes=[Route("user.**", headers={"team2": "", "tenant": "Acme"})])


@pytest.mark.parametrize("make", [RedisStreams, RedisPubSub])
def test_brokers_tell_their_format(make: Any, redis: Redis) -> None:
    assert make(redis, app="web", format=CLOUDEVENTS).format is CLOUDEVENTS


def test_a_value_that_is_no_text_is_refused() -> None:
    with pytest.raises(HeaderInvalid, match=r"write str\(...\)"):
        set_header(Frozen(), "tenant", 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mapping"):
        Route("x", headers=["tenant"])  # type: ignore[arg-type]
    assert hash(Route("x", headers={"a": "b"})) == hash(Route("x"))


@pytest.mark.parametrize("form", [JSON, CLOUDEVENTS])
async def test_a_listener_reads_the_headers(form: Any) -> None:
    """Of the message as it came; a first message is its own correlation."""
    d, seen = AsyncEventDispatcher(), []

    @d.listen("user.joined")
    async def hear(event: Any) -> None:
        seen.append(event)

    message = joined(1, key="k")
    message.headers["tenant"] = "acme"  # type: ignore[index]
    await receive(d, form.encode(message, Origin("web", "1")), format=form)
    origin = seen[0].origin
    headers = origin.headers
    assert headers["tenant"] == "acme" and headers["key"] == "k" and headers["app"] == "web"
    assert headers["correlationid"] == message.message_id and "causationid" not in headers
    assert origin == ("web", "1"), "the headers are no part of the pair"
    for again in (copy.copy(origin), copy.deepcopy(origin), pickle.loads(pickle.dumps(origin))):
        assert again == origin and again.headers == headers
    assert Origin("web", "1").headers == {}


async def test_a_format_without_headers_gives_none() -> None:
    d, seen = AsyncEventDispatcher(), []

    @d.listen("**")
    async def hear(event: Any) -> None:
        seen.append(event.origin.headers)

    await receive(d, DIATOR.encode(joined(1), Origin("web", "1")), format=DIATOR)
    assert seen == [{}]


@pytest.mark.parametrize("events", [(), (USER_JOINED,)], ids=["payload", "class"])
async def test_what_a_listener_dispatches_names_its_conversation_and_its_cause(
    broker: MemoryBroker, events: Sequence[EventName[Any]]
) -> None:
    """Also from a task that goes on when the consumer is at its next delivery: each has a context of its own."""
    d, publisher = bridged()
    goes_on = asyncio.Event()
    conversations: list[str] = []
    tasks: list[asyncio.Task[Any]] = []

    @d.listen("user.joined")
    async def answer(event: Any) -> None:
        conversations.append(event.origin.headers["correlationid"])
        if (event.user_id if events else event.payload["user_id"]) == 1:

            async def later() -> None:
                await goes_on.wait()
                await d.adispatch("late", Frozen())

            tasks.append(asyncio.create_task(later()))
        else:
            await d.adispatch("at.once", Frozen())
            goes_on.set()

    first, second = joined(1, key="1"), joined(2, key="2")
    second.headers["correlationid"] = "begun elsewhere"  # type: ignore[index]
    group = broker.group("billing", start="new")
    async with Running(Consumer(d, group, own="handle", events=events)) as consumer:
        await broker.publish(first, second)
        async with asyncio.timeout(30):
            await goes_on.wait()
            await asyncio.gather(*tasks)
    assert (consumer.stats.handled, consumer.stats.failed) == (2, 0)
    found = {
        message.message_name: (message.headers["correlationid"], message.headers["causationid"])
        for message in publisher.messages
    }
    assert found == {
        "at.once": ("begun elsewhere", second.message_id),
        "late": (first.message_id, first.message_id),
    }
    assert conversations == [first.message_id, "begun elsewhere"]
    await d.adispatch("outside", Frozen())
    assert not publisher.messages[-1].headers.keys() & {"correlationid", "causationid"}


def causes(publisher: Collecting) -> dict[str, tuple[str | None, str | None]]:
    """Return the correlation id and the causation id of each message, by its name."""
    return {
        message.message_name: (message.headers.get("correlationid"), message.headers.get("causationid"))
        for message in publisher.messages
    }


class Hook:
    """An observer that only makes the dispatcher go the way of observed dispatches."""

    def before_dispatch(self, dispatch: Any) -> None: ...
    def after_dispatch(self, dispatch: Any) -> None: ...
    def before_listener(self, call: Any) -> None: ...
    def after_listener(self, call: Any) -> None: ...


@pytest.mark.parametrize("way", ["direct", "observed", "options", "declared"])
async def test_what_a_listener_of_a_local_event_dispatches_names_that_event(way: str) -> None:
    """However deep, and whichever way a dispatch goes; domain events in between pass it on."""
    d, publisher = bridged()
    if way == "observed":
        d.observe(Hook())
    options: Any = {"timeout": 30} if way == "options" else {}
    first, second, third = NotificationEvent(), ECSTEvent(), NotificationEvent()
    goes_on, tasks = asyncio.Event(), list[asyncio.Task[Any]]()

    async def later() -> None:
        await goes_on.wait()
        await d.adispatch("late", NotificationEvent())

    async def on_first(event: Any) -> None:
        await d.adispatch("second", second)
        tasks.append(asyncio.create_task(later()))
        await d.adispatch("next", NotificationEvent())

    async def on_second(event: Any) -> None:
        await d.adispatch("within", DomainEvent())

    async def on_within(event: Any) -> None:
        await d.adispatch("third", third)

    for name, listener in (("first", on_first), ("second", on_second), ("within", on_within)):
        d.add_listener(EventName(name) if way == "declared" else name, listener, **options)
    for _ in range(2):  # the second time the listeners are known
        publisher.messages.clear()
        await d.adispatch("first", first)
        await d.adispatch("outside", NotificationEvent())
        goes_on.set()
        await asyncio.gather(*tasks)
        begun = str(first.event_id)
        assert causes(publisher) == {
            "third": (begun, str(second.event_id)),
            "second": (begun, begun),
            "next": (begun, begun),
            "first": (None, None),
            "outside": (None, None),
            "late": (begun, begun),
        }


async def test_no_cause_is_left_behind_by_a_dispatch_that_fails_or_is_stopped() -> None:
    d, publisher = bridged()

    @d.listen("stopped")
    async def stop(event: Any) -> None:
        event.stop_propagation()

    @d.listen("failed")
    async def fail(event: Any) -> None:
        raise LookupError("no")

    for _ in range(2):
        await d.adispatch("stopped", NotificationEvent())
        with pytest.raises(LookupError):
            await d.adispatch("failed", NotificationEvent())
        await d.adispatch("after", NotificationEvent())
    assert [message.headers.get("causationid") for message in publisher.messages] == [None, None]


async def test_what_a_local_event_causes_within_a_delivery_keeps_the_conversation(broker: MemoryBroker) -> None:
    """And an event that has a correlation id of the host's hands that on."""
    d, publisher = bridged()
    local, named = NotificationEvent(), NotificationEvent()

    @d.listen("user.joined")
    async def answer(event: Any) -> None:
        await d.adispatch("local", local)

    @d.listen("local")
    async def go_on(event: Any) -> None:
        await d.adispatch("next", named)

    @d.listen("next")
    async def name(event: Any) -> None:
        set_header(event, "correlationid", "of the host")
        await d.adispatch("last", NotificationEvent())

    message = joined(1)
    message.headers["correlationid"] = "begun elsewhere"  # type: ignore[index]
    async with Running(Consumer(d, broker.group("billing", start="new"), own="handle")) as consumer:
        await broker.publish(message)
        await wait_until(lambda: consumer.stats.handled == 1)
    assert causes(publisher) == {
        "last": ("of the host", str(named.event_id)),
        "next": ("of the host", str(local.event_id)),
        "local": ("begun elsewhere", message.message_id),
    }


async def test_receive_names_the_cause_as_a_consumer_does() -> None:
    d, publisher = bridged()

    @d.listen("user.joined")
    async def answer(event: Any) -> None:
        await d.adispatch("at.once", Frozen())

    message = joined(1)
    await receive(d, JSON.encode(message, Origin("other", "1")))
    await d.adispatch("outside", Frozen())
    inside, outside = publisher.messages
    assert inside.headers["causationid"] == message.message_id
    assert "causationid" not in outside.headers


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker("other")


def test_a_delivery_keeps_the_headers_as_they_came() -> None:
    """They are made anew at each attempt, so that a listener's changes reach no other attempt."""
    delivery = Delivery(JSON.encode(joined(1), Origin("web", "1")), "events", JSON)
    origins = [delivery.message().origin for _ in range(2)]
    assert origins[0] is not None and origins[1] is not None
    origins[0].headers["publication"] = "x"  # type: ignore[index]
    assert origins[1].headers["publication"] != "x"
