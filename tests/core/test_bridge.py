"""The bridge: what leaves, when, and whom an error goes to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import whistle
from redis.asyncio import Redis

from silbo import LAST, AsyncEventDispatcher, Bridge, DomainEvent, ECSTEvent, Event, EventName, NotificationEvent, Route
from silbo import bridge as bridge_module
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused, PublishError, RouteConflict
from silbo.event import set_mark
from silbo.message import Message, Origin
from silbo.protocols import Receiver


@dataclass
class UserJoined(ECSTEvent):
    user_id: int
    tags: list[str] = field(default_factory=list)


@dataclass
class UserLeft(NotificationEvent):
    user_id: int


@dataclass
class Plain(Event):
    user_id: int = 1


@dataclass
class Foreign:
    user_id: int = 1


USER_JOINED = EventName("user.joined", UserJoined, key="user_id", version=3)


class Away:
    """A broker that can't be reached."""

    app = "app"

    async def publish(self, *messages: Message) -> None:
        raise BrokerUnavailable("nobody there")

    async def aclose(self) -> None: ...


class Slow(MemoryBroker):
    """A broker that has a message when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()

    async def publish(self, *messages: Message) -> None:
        await self.open.wait()
        await super().publish(*messages)


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def wire(broker: MemoryBroker) -> Receiver:
    addresses = ["events", "users", "others", "elsewhere"]
    return await broker.group("test", start="oldest", streams=addresses).open()


@pytest.fixture
def d() -> AsyncEventDispatcher:
    return AsyncEventDispatcher()


async def sent(wire: Receiver, many: int) -> list[Message]:
    """Return the messages that have arrived, with a last one behind them: so an unwanted one can't be late."""
    messages: list[Message] = []
    while len(messages) < many:
        got = await wire.receive(1000)
        assert got, f"only {len(messages)} of {many} arrived"
        messages += [item.message() for item in got]  # type: ignore[union-attr]
    assert len(messages) == many
    return messages


async def names(d: AsyncEventDispatcher, wire: Receiver) -> list[str]:
    """The names sent so far."""
    await d.adispatch("the.end", UserLeft(0))
    found: list[str] = []
    while "the.end" not in found:
        found += [item.message().message_name for item in await wire.receive(1000)]  # type: ignore[union-attr]
    return found[:-1]


# -- what leaves --------------------------------------------------------------------------------------------


async def test_bridge_runs_after_every_other_listener_and_is_seen(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    """Local listeners shape what leaves, those registered later and with any priority too."""
    bridge = Bridge(broker)
    d.add_subscriber(bridge)

    @d.listen("user.joined", priority=10**9)
    async def enrich(event: UserJoined) -> None:
        event.tags.append("late")

    assert d.get_listeners("user.joined") == (enrich, bridge.forward)
    assert [row.priority for row in d.describe("user.joined")] == [10**9, LAST]
    await d.adispatch("user.joined", UserJoined(1))
    (message,) = await sent(wire, 1)
    assert message.payload["tags"] == ["late"]


async def test_name_constant_gives_key_and_version(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    d.add_subscriber(Bridge(broker))
    event = UserJoined(7)
    await d.adispatch(USER_JOINED, event)
    await d.adispatch("user.joined", event)
    first, second = await sent(wire, 2)
    assert (first.message_name, first.key, first.headers["version"]) == ("user.joined", "7", "3")
    assert (second.message_name, second.key, second.headers["version"]) == ("user.joined", None, "3")  # of its class
    assert first.message_id == second.message_id == str(event.event_id)
    assert first.headers["publication"] != second.headers["publication"]


async def test_kinds_that_leave(d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver) -> None:
    """Notifications and state transfers; nothing plain, nothing foreign, nothing of the domain."""
    d.add_subscriber(Bridge(broker))
    events = (UserJoined(1), UserLeft(2), Plain(), Foreign(), DomainEvent(), None)
    for number, event in enumerate(events):
        await d.adispatch(f"event.{number}", event)
    assert await names(d, wire) == ["event.0", "event.1"]


async def test_route_lets_plain_and_foreign_events_leave_as_its_kind(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    d.add_subscriber(Bridge(broker, routes=[Route("user.*", kind="notification"), Route("**", kind="ecst")]))
    await d.adispatch("user.seen", Plain(1))
    await d.adispatch("order.paid", Foreign(2))
    messages = await sent(wire, 2)
    assert [message.message_type for message in messages] == ["notification_event", "ecst_event"]
    assert [message.payload["user_id"] for message in messages] == [1, 2]


async def test_event_keeps_its_own_kind_whatever_a_route_says(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    d.add_subscriber(Bridge(broker, routes=[Route("**", kind="ecst")]))
    await d.adispatch("user.left", UserLeft(1))
    (message,) = await sent(wire, 1)
    assert message.message_type == "notification_event"


async def test_domain_event_never_leaves(d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver) -> None:
    d.add_subscriber(Bridge(broker, routes=[Route("**", kind="ecst")]))
    await d.adispatch("secret", DomainEvent())
    assert await names(d, wire) == []


async def test_route_without_a_kind_lets_nothing_plain_leave(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    d.add_subscriber(Bridge(broker, routes=[Route("**", to="elsewhere")]))
    await d.adispatch("user.seen", Plain())
    assert await names(d, wire) == []


async def test_route_gives_address_and_key(broker: MemoryBroker, wire: Receiver, d: AsyncEventDispatcher) -> None:
    """Its key goes before the name's own; one without a key leaves that."""
    routes = [Route("user.joined", to="users", key=lambda event: f"u-{event.user_id}"), Route("user.**", to="others")]
    d.add_subscriber(Bridge(broker, routes=routes))
    await d.adispatch(USER_JOINED, UserJoined(1))
    await d.adispatch(EventName("user.left", key="user_id"), UserLeft(2))
    items: Any = await wire.receive(10)
    assert [(item.address, item.message().key) for item in items] == [("users", "u-1"), ("others", "2")]


def test_two_equal_routes_fail_when_the_bridge_is_built(broker: MemoryBroker) -> None:
    with pytest.raises(RouteConflict):
        Bridge(broker, routes=[Route("user.*"), Route("user.*", to="users")])


async def test_name_that_is_no_string_stays(d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver) -> None:
    """Patterns match strings only."""
    d.add_subscriber(Bridge(broker))
    await d.adispatch(("user", "joined"), UserJoined(1))
    assert await names(d, wire) == []


# -- what holds an event back -------------------------------------------------------------------------------


async def test_stopped_event_does_not_leave(d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver) -> None:
    d.add_subscriber(Bridge(broker))

    @d.listen("user.joined")
    async def ban(event: UserJoined) -> None:
        event.stop_propagation()

    event = await d.adispatch("user.joined", UserJoined(1))
    assert await names(d, wire) == []
    d.remove_listener("user.joined", ban)
    await d.adispatch("user.joined", event)  # the stop belonged to that dispatch
    assert await names(d, wire) == ["user.joined"]


@pytest.mark.parametrize("event", [UserJoined(1), Foreign(1)], ids=["silbo", "foreign"])
@pytest.mark.parametrize("policy", ["raise", "collect"])
async def test_event_whose_dispatch_failed_does_not_leave(
    policy: Any, event: Any, broker: MemoryBroker, wire: Receiver
) -> None:
    """An event that did not happen here is not told elsewhere. The same event leaves once it succeeds."""
    d = AsyncEventDispatcher(on_error=policy)
    d.add_subscriber(Bridge(broker, routes=[Route("**", kind="ecst")]))

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise ValueError("no")

    with pytest.raises((ValueError, ExceptionGroup)):
        await d.adispatch("user.joined", event)
    assert await names(d, wire) == []
    d.remove_listener("user.joined", fail)
    await d.adispatch("user.joined", event)
    assert await names(d, wire) == ["user.joined"]


async def test_isolated_failure_does_not_hold_an_event_back(broker: MemoryBroker, wire: Receiver) -> None:
    """A plugin that fails on its own is no reason that the host's event is not heard."""
    errors: list[Exception] = []
    d = AsyncEventDispatcher(on_error=lambda error, event, listener: errors.append(error))
    d.add_subscriber(Bridge(broker))

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise ValueError("no")

    await d.adispatch("user.joined", UserJoined(1))
    assert await names(d, wire) == ["user.joined"]
    assert len(errors) == 1


async def test_consumed_event_is_not_sent_out_again(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    d.add_subscriber(Bridge(broker))
    event = UserJoined(1)
    set_mark(event, "origin", Origin("", ""))
    await d.adispatch("user.joined", event)
    assert await names(d, wire) == []


async def test_attribute_of_a_foreign_event_is_no_origin(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    """Only what a consumer writes there counts."""

    class Flight:
        def __init__(self) -> None:
            self.origin = "GMZ"

    d.add_subscriber(Bridge(broker, routes=[Route("**", kind="ecst")]))
    await d.adispatch("flight.left", Flight())
    assert await names(d, wire) == ["flight.left"]


async def test_nested_dispatches_leave_each_under_its_name(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    """Another event or the same object: the inner first, and the outer goes on as it was."""
    d.add_subscriber(Bridge(broker))

    @d.listen("user.joined")
    async def nest(event: UserJoined) -> None:
        await d.adispatch("user.welcomed", event)
        await d.adispatch("user.counted", UserLeft(2))

    await d.adispatch("user.joined", UserJoined(1))
    assert await names(d, wire) == ["user.welcomed", "user.counted", "user.joined"]


# -- the snapshot -------------------------------------------------------------------------------------------


async def test_snapshot_is_taken_before_the_first_await() -> None:
    """A change of the event while the broker is slow does not change the message."""
    broker = Slow()
    d = AsyncEventDispatcher()
    d.add_subscriber(Bridge(broker))
    event = UserJoined(1, tags=["then"])
    dispatching = asyncio.create_task(d.adispatch("user.joined", event))
    await asyncio.sleep(0)
    event.user_id = 2
    event.tags.append("later")
    broker.open.set()
    await dispatching
    (message,) = await sent(await broker.group("test", start="oldest").open(), 1)
    assert (message.payload["user_id"], message.payload["tags"]) == (1, ["then"])


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    ("key", "tags", "at_fault"),
    [("nothing", [], "nothing"), (lambda event: 1 / 0, [], None), ("user_id", [object()], "tags[0]")],
    ids=["missing key", "failing key", "payload"],
)
async def test_event_that_can_not_be_a_message_is_refused_to_the_caller(
    broker: MemoryBroker, wait: bool, key: Any, tags: list[Any], at_fault: str | None
) -> None:
    """A mistake in the program: seen where it is made, also where nobody waits for the broker."""
    d = AsyncEventDispatcher()
    async with Bridge(broker, routes=[Route("**", key=key)], wait=wait) as bridge:
        d.add_subscriber(bridge)
        with pytest.raises(MessageRefused) as caught:
            await d.adispatch("user.joined", UserJoined(1, tags))
    assert caught.value.name == "user.joined"
    assert caught.value.field == at_fault


# -- errors -------------------------------------------------------------------------------------------------


async def test_error_of_the_broker_goes_to_the_caller(d: AsyncEventDispatcher) -> None:
    d.add_subscriber(Bridge(Away()))
    with pytest.raises(BrokerUnavailable):
        await d.adispatch("user.joined", UserJoined(1))


async def test_error_of_the_broker_follows_the_dispatchers_policy() -> None:
    errors: list[Exception] = []
    d = AsyncEventDispatcher(on_error=lambda error, event, listener: errors.append(error))
    d.add_subscriber(Bridge(Away()))
    await d.adispatch("user.joined", UserJoined(1))
    assert [type(error) for error in errors] == [BrokerUnavailable]


def collector(errors: list[tuple[Exception, Any]], *, is_async: bool) -> Callable[[Exception, Any], object]:
    async def later(error: Exception, what: Any) -> None:
        await asyncio.sleep(0)
        errors.append((error, what))

    return later if is_async else lambda error, what: errors.append((error, what))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("wait", [True, False])
async def test_error_hook_gets_the_error_and_the_message_in_place_of_the_caller(
    d: AsyncEventDispatcher, wait: bool, is_async: bool
) -> None:
    errors: list[tuple[Exception, Any]] = []
    async with Bridge(Away(), wait=wait, on_error=collector(errors, is_async=is_async)) as bridge:
        d.add_subscriber(bridge)
        await d.adispatch("user.joined", UserJoined(1))
        await d.adispatch("user.joined", UserJoined(2, [object()]))  # type: ignore[list-item]
    kinds = sorted((type(error).__name__, what and what.payload["user_id"]) for error, what in errors)
    assert kinds == [("BrokerUnavailable", 1), ("MessageRefused", None)]


async def test_failing_error_hook_is_logged(d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    def broken(error: Exception, what: object) -> None:
        raise KeyError("hook")

    async with Bridge(Away(), wait=False, on_error=broken) as bridge:
        d.add_subscriber(bridge)
        await d.adispatch("user.joined", UserJoined(1))
    assert [record.message for record in caplog.records] == ["error hook failed"]


# -- without waiting ----------------------------------------------------------------------------------------


async def test_without_waiting_the_caller_is_not_held_and_order_is_kept() -> None:
    broker = Slow()
    wire = await broker.group("test", start="oldest").open()
    d = AsyncEventDispatcher()
    async with Bridge(broker, wait=False) as bridge:
        d.add_subscriber(bridge)
        for number in range(200):
            await d.adispatch("user.joined", UserJoined(number))
        closing = asyncio.create_task(bridge.aclose())
        await asyncio.sleep(0)
        assert not closing.done()
        broker.open.set()
        await closing
    await bridge.aclose()
    assert [message.payload["user_id"] for message in await sent(wire, 200)] == list(range(200))


async def test_leaving_the_bridge_keeps_its_publisher_open(
    d: AsyncEventDispatcher, broker: MemoryBroker, wire: Receiver
) -> None:
    """Close what you opened: the publisher was passed in."""
    async with Bridge(broker, wait=False) as bridge:
        d.add_subscriber(bridge)
        await d.adispatch("user.joined", UserJoined(1))
    await broker.publish(*(await sent(wire, 1)))
    await sent(wire, 1)


async def test_without_waiting_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound a message is told to be lost, at once; those under way are not touched."""
    monkeypatch.setattr(bridge_module, "UNSENT_LIMIT", 5)
    broker = Slow()
    wire = await broker.group("test", start="oldest").open()
    d = AsyncEventDispatcher()
    errors: list[tuple[Exception, Any]] = []
    async with Bridge(broker, wait=False, on_error=collector(errors, is_async=False)) as bridge:
        d.add_subscriber(bridge)
        for number in range(7):
            await d.adispatch("user.joined", UserJoined(number))
        assert [what.payload["user_id"] for _, what in errors] == [5, 6]
        assert all(isinstance(error, BrokerUnavailable) and "5 messages" in str(error) for error, _ in errors)
        broker.open.set()
    assert [message.payload["user_id"] for message in await sent(wire, 5)] == [0, 1, 2, 3, 4]


async def test_without_a_hook_lost_messages_give_one_line_a_second(
    d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that is away must not fill a disk; the next line says how many were left out."""
    now = 1000.0
    monkeypatch.setattr("silbo._reports.time.monotonic", lambda: now)
    async with Bridge(Away(), wait=False) as bridge:
        d.add_subscriber(bridge)
        for _ in range(20):
            await d.adispatch("user.joined", UserJoined(1))
        await bridge.aclose()
        now += 1.5
        await d.adispatch("user.joined", UserJoined(1))
    records: list[Any] = caplog.records
    assert [(record.message, record.withheld, record.event_name) for record in records] == [
        ("message not sent: nobody there", 0, "user.joined"),
        ("message not sent: nobody there (and 19 more like it)", 19, "user.joined"),
    ]
    assert all(record.levelno == logging.WARNING for record in records)


def test_program_that_ends_before_its_bridge_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A message that was never sent is not lost without a word."""

    async def program() -> None:
        d = AsyncEventDispatcher()
        d.add_subscriber(Bridge(Slow(), wait=False))
        await d.adispatch("user.joined", UserJoined(1))

    asyncio.run(program())
    assert [record.message for record in caplog.records] == [
        "message not sent: the program ended before the bridge was closed"
    ]


async def test_error_hook_may_close_the_bridge(d: AsyncEventDispatcher) -> None:
    """It runs inside of what a close waits for: it must not wait for itself."""
    closed: list[bool] = []

    async def close(error: Exception, what: object) -> None:
        await bridge.aclose()
        closed.append(True)

    bridge = Bridge(Away(), wait=False, on_error=close)
    d.add_subscriber(bridge)
    await d.adispatch("user.joined", UserJoined(1))
    await asyncio.wait_for(bridge.aclose(), 5)
    assert closed == [True]


async def test_every_error_hook_may_close_the_bridge(d: AsyncEventDispatcher) -> None:
    """None waits for another that waits in the same way; a close from outside waits for all of them."""
    closed: list[bool] = []

    async def close(error: Exception, what: object) -> None:
        await bridge.aclose()
        closed.append(True)

    bridge = Bridge(Away(), wait=False, on_error=close)
    d.add_subscriber(bridge)
    for _ in range(3):
        await d.adispatch("user.joined", UserJoined(1))
    await asyncio.wait_for(bridge.aclose(), 30)
    assert closed == [True] * 3


async def test_publisher_that_is_cancelled_is_told_to_the_hook(d: AsyncEventDispatcher) -> None:
    """Nobody has cancelled the bridge."""

    class Cancelled(MemoryBroker):
        async def publish(self, *messages: Message) -> None:
            raise asyncio.CancelledError

    errors: list[tuple[Exception, object]] = []
    async with Bridge(Cancelled(), wait=False, on_error=lambda *error: errors.append(error)) as bridge:
        d.add_subscriber(bridge)
        await d.adispatch("user.joined", UserJoined(1))
    ((error, message),) = errors
    assert isinstance(error, DeliveryUnknown) and isinstance(message, Message)


# -- on Whistle's own dispatcher ----------------------------------------------------------------------------


async def test_forward_works_on_whistles_own_dispatcher(broker: MemoryBroker, wire: Receiver) -> None:
    """It knows no patterns, so under explicit names; LAST sorts behind every number there too."""
    dispatcher = whistle.AsyncEventDispatcher()
    bridge = Bridge(broker)
    dispatcher.add_listener("user.joined", bridge.forward, priority=LAST)

    async def enrich(event: Any) -> None:
        event.tags.append("late")

    dispatcher.add_listener("user.joined", enrich, priority=10**9)
    await dispatcher.adispatch(USER_JOINED, UserJoined(5))
    await dispatcher.adispatch("user.left", UserLeft(5))
    (message,) = await sent(wire, 1)
    assert (message.message_name, message.key, message.payload["tags"]) == ("user.joined", "5", ["late"])


async def test_name_that_is_no_string_is_refused_on_whistles_own_dispatcher(broker: MemoryBroker) -> None:
    dispatcher = whistle.AsyncEventDispatcher()
    dispatcher.add_listener(("user", 1), Bridge(broker).forward)
    with pytest.raises(MessageRefused, match="string"):
        await dispatcher.adispatch(("user", 1), UserJoined(1))


def test_a_bridge_to_what_is_no_publisher_is_refused_when_built() -> None:
    """A Redis client has a publish(), too."""
    for wrong in (Redis(), object(), None):
        with pytest.raises(TypeError, match="RedisStreams"):
            Bridge(wrong)  # type: ignore[arg-type]


def test_what_is_no_broker_is_told_by_its_type_alone() -> None:
    """A client's own text is long, and may have a password in it."""

    class Client:
        def __repr__(self) -> str:
            return "redis://:secret@host"

    for given, told in (
        (Client(), rf"not to a {__name__}\.test_what.*Client$"),
        (Client, "not to <class"),
        (3, "not to 3$"),
    ):
        wrong: Any = given
        with pytest.raises(TypeError, match=told):
            Bridge(wrong)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("hooked", [True, False])
async def test_health_tells_an_outage_of_the_publisher(d: AsyncEventDispatcher, wait: bool, hooked: bool) -> None:
    """To a caller's error, an error hook or the log, the health is the same; a refused message is no outage."""
    errors: list[Exception] = []

    class Moody(MemoryBroker):
        error: Exception | None = None

        async def publish(self, *messages: Message) -> None:
            if self.error is not None:
                raise self.error
            await super().publish(*messages)

    async def send() -> None:
        with contextlib.suppress(PublishError):
            await d.adispatch("user.left", UserLeft(1))
        while bridge.under_way:
            await asyncio.sleep(0)

    broker = Moody("app")
    hook = (lambda error, message: errors.append(error)) if hooked else None
    async with Bridge(broker, wait=wait, on_error=hook) as bridge:
        d.add_subscriber(bridge)
        await send()
        health = bridge.health()
        assert (health.part, health.name, health.is_ready, health.last_error) == ("bridge", "app", True, None)
        broker.error = MessageRefused("user.left", "too large")
        await send()
        assert bridge.health().is_ready
        broker.error = BrokerUnavailable("nobody there")
        await send()
        health = bridge.health()
        assert not health.is_ready and health.away_since is not None
        assert health.last_error is not None and health.last_error.text == "nobody there"
        broker.error = None
        await send()
        assert bridge.health().is_ready and bridge.health().away_since is None


async def test_bridge_with_too_much_under_way_has_no_room(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "UNSENT_LIMIT", 2)
    broker = Slow()
    async with Bridge(broker, wait=False) as bridge:
        d.add_subscriber(bridge)
        for number in range(2):
            await d.adispatch("user.left", UserLeft(number))
        assert (bridge.health().in_hand, bridge.health().explain()) == (2, "no room")
        broker.open.set()
