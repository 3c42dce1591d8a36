"""The recorder: what it hears, what its assertions ask for, and that it leaves everything as it was."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import AsyncMock

import pytest

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    DomainEvent,
    ECSTEvent,
    Event,
    EventName,
    Message,
    Outbox,
    Plugins,
    Policy,
    Registration,
    on,
    receive,
)
from silbo.brokers.memory import MemoryBroker
from silbo.errors import DeliveryGivenUp, PluginForbidden
from silbo.message import Delivery
from silbo.stores.memory import MemoryStore
from silbo.testing import EventRecorder
from silbo.wire.formats import JSON
from tests.support.consumer import Consumer, Running
from tests.support.simple_container import SimpleContainer


@dataclass
class UserJoined(ECSTEvent):
    user_id: int
    plan: str = "free"


@dataclass
class Checked(DomainEvent):
    user_id: int = 0


USER_JOINED = EventName("user.joined", UserJoined, key="user_id")
CHECKED = EventName("user.checked", Checked)


@pytest.fixture
def events() -> Iterator[EventRecorder]:
    recorder = EventRecorder()
    yield recorder
    recorder.close()


@pytest.fixture
def d(events: EventRecorder) -> AsyncEventDispatcher:
    return events.watch(AsyncEventDispatcher())


async def test_dispatch_is_asserted_by_name_and_some_fields(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    """As the listeners left the event; the assertion returns it."""

    @d.listen(USER_JOINED)
    async def enrich(event: UserJoined) -> None:
        event.plan = "pro"

    joined = await d.adispatch(USER_JOINED, UserJoined(1))
    await d.adispatch("plain")
    assert events.assert_dispatched(USER_JOINED, plan="pro") is joined
    assert events.assert_dispatched("*").name == "plain"
    events.assert_nothing_else()


@pytest.mark.parametrize(
    ("name", "fields"), [("user.left", {}), (USER_JOINED, {"user_id": 2}), (USER_JOINED, {"user": 1})]
)
async def test_another_name_value_or_field_does_not_meet_an_assertion(
    events: EventRecorder, d: AsyncEventDispatcher, name: Any, fields: dict[str, Any]
) -> None:
    await d.adispatch(USER_JOINED, UserJoined(1))
    with pytest.raises(AssertionError, match=f"nothing was dispatched: {name}"):
        events.assert_dispatched(name, **fields)
    assert events.dispatched(name, **fields) == []
    for other in (events.assert_published, events.assert_consumed, events.assert_dead):
        with pytest.raises(AssertionError):
            other(USER_JOINED)


@pytest.mark.parametrize(
    ("name", "fields", "hint"),
    [
        ("user.joind", {}, "; did you mean 'user.joined'?"),
        ("something.else", {}, ""),
        (USER_JOINED, {"user_di": 1}, "; it has no 'user_di'; did you mean 'user_id'?"),
        (USER_JOINED, {"user_id": 2}, ""),
    ],
)
async def test_a_misspelt_name_or_field_is_answered_with_the_right_one(
    events: EventRecorder, d: AsyncEventDispatcher, name: Any, fields: dict[str, Any], hint: str
) -> None:
    await d.adispatch(USER_JOINED, UserJoined(1))
    with pytest.raises(AssertionError) as caught:
        events.assert_dispatched(name, **fields)
    first, _, _ = str(caught.value).partition("\n")
    assert first.endswith(hint or ("with user_id=2" if fields else str(name)))


async def test_two_assertions_ask_for_two_dispatches(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    await d.adispatch(USER_JOINED, UserJoined(1))
    events.assert_dispatched(USER_JOINED)
    with pytest.raises(AssertionError, match="only 1 asserted before, and no other, was dispatched"):
        events.assert_dispatched(USER_JOINED)
    await d.adispatch(USER_JOINED, UserJoined(1))
    events.assert_dispatched(USER_JOINED)
    assert len(events.dispatched(USER_JOINED)) == 2


async def test_nothing_else_names_what_was_not_asserted(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    d.add_subscriber(Bridge(MemoryBroker()))
    await d.adispatch(USER_JOINED, UserJoined(1))
    await d.adispatch(CHECKED)
    events.assert_dispatched(USER_JOINED)
    with pytest.raises(
        AssertionError, match=r"more than was asserted: user\.joined \(published\), user\.checked \(disp"
    ):
        events.assert_nothing_else()
    events.assert_dispatched(CHECKED)
    events.assert_nothing_else("dispatched", "dead")
    with pytest.raises(AssertionError, match=r"user\.joined \(published\)\n"):
        events.assert_nothing_else("published")
    with pytest.raises(ValueError, match="the kinds are"):
        events.assert_nothing_else("sent")  # type: ignore[arg-type]


async def test_order_is_that_of_the_beginnings_over_all_kinds(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    @d.listen(USER_JOINED)
    async def check(event: UserJoined) -> None:
        await d.adispatch(CHECKED, Checked(event.user_id))

    d.add_subscriber(Bridge(MemoryBroker()))
    await d.adispatch(USER_JOINED, UserJoined(1))
    with events.in_order():
        events.assert_dispatched(USER_JOINED)
        events.assert_dispatched(CHECKED, user_id=1)
        events.assert_published(USER_JOINED, user_id=1)
    events.assert_nothing_else()
    await d.adispatch(CHECKED)
    await d.adispatch(USER_JOINED, UserJoined(2))
    with events.in_order():
        events.assert_dispatched(USER_JOINED, user_id=2)
        with pytest.raises(AssertionError, match=r"not in this order .* was dispatched: user\.checked"):
            events.assert_dispatched(CHECKED, user_id=0)
    events.assert_dispatched(CHECKED, user_id=0)


async def test_message_is_recorded_when_its_publisher_has_taken_it(events: EventRecorder) -> None:
    """Whichever dispatcher was watched first, bridge or publisher; fields may be given as Python has them."""
    broker = MemoryBroker(limit=1, timeout=0.01)
    _ = await broker.group("slow", start="new").open()
    d = events.watch(AsyncEventDispatcher())
    d.add_subscriber(Bridge(broker))
    joined = await d.adispatch(USER_JOINED, UserJoined(1))
    with pytest.raises(Exception, match="made no room"):
        await d.adispatch(USER_JOINED, UserJoined(2))
    message = events.assert_published(USER_JOINED, user_id=1, event_id=joined.event_id)
    assert isinstance(message, Message) and message.key == "1"
    assert len(events.published()) == 1


async def test_publisher_with_a_publish_of_its_own_gets_it_back(events: EventRecorder) -> None:
    publisher = MemoryBroker()
    publisher.publish = own = AsyncMock()  # type: ignore[method-assign]  # a host's mock
    events.watch(publisher)
    events.watch(Bridge(publisher))
    assert publisher.publish is not own
    events.close()
    assert publisher.publish is own


async def test_outbox_is_a_publisher(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    async with Outbox(MemoryStore(), MemoryBroker()) as outbox:
        d.add_subscriber(Bridge(outbox))
        await d.adispatch(USER_JOINED, UserJoined(1))
        events.assert_published(USER_JOINED)
        await events.settle()
        assert outbox.stats is not None and outbox.stats.sent == 1
    events.close()
    assert "publish" not in vars(outbox)


async def test_publisher_that_takes_no_attributes_is_refused(events: EventRecorder) -> None:
    class Slotted:
        __slots__ = ()
        app = "web"

        async def publish(self, *messages: Message) -> None: ...
        async def aclose(self) -> None: ...

    with pytest.raises(TypeError, match="takes no attributes"):
        events.watch(Slotted())
    for other in (object(), MemoryBroker, "user.joined"):
        with pytest.raises(TypeError, match="can be watched, not"):
            events.watch(other)


async def test_handled_delivery_is_consumed_and_a_failed_attempt_is_not(events: EventRecorder) -> None:
    """Only the events of the deliveries: what their listeners dispatch is dispatched."""
    d = AsyncEventDispatcher()
    broker = MemoryBroker()
    fails = 1

    @d.listen(USER_JOINED)
    async def fail_once(event: UserJoined) -> None:
        nonlocal fails
        await d.adispatch(CHECKED, Checked(event.user_id))
        fails -= 1
        if fails >= 0:
            raise LookupError("no such plan")

    clock = events.freeze()
    consumer = events.watch(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], own="handle"))
    async with Running(consumer):
        sender = AsyncEventDispatcher()
        sender.add_subscriber(Bridge(broker))
        await sender.adispatch(USER_JOINED, UserJoined(1))
        await events.settle()
        assert events.consumed() == []
        assert len(events.dispatched(CHECKED)) == 1
        assert "attempt    'user.joined'" in events.draw()
        clock.advance(1)
        await events.settle()
        with events.in_order():
            events.assert_dispatched(CHECKED)
            events.assert_consumed(USER_JOINED, user_id=1)
        assert (len(events.dispatched()), len(events.consumed())) == (2, 1)


async def test_isolated_error_fails_the_attempt(events: EventRecorder) -> None:
    """As the consumer has it: the dispatch goes on, and the delivery is tried again."""
    d = events.watch(AsyncEventDispatcher(on_error=lambda *_: None))
    d.add_listener("**", AsyncMock(side_effect=LookupError))
    broker = MemoryBroker()
    receiver = await broker.group("g", start="new").open()
    d2 = AsyncEventDispatcher()
    d2.add_subscriber(Bridge(broker))
    await d2.adispatch(USER_JOINED, UserJoined(1))
    [delivery] = await receiver.receive(1)
    with pytest.raises(LookupError):
        await receive(d, delivery.raw)  # type: ignore[union-attr]
    assert events.consumed() == events.dispatched() == []
    await receive(AsyncEventDispatcher(), delivery.raw)  # type: ignore[union-attr]
    assert events.consumed() == []
    with events.mute(d.describe()[0].listener):
        await receive(d, delivery.raw)  # type: ignore[union-attr]
    events.assert_consumed("user.joined", user_id=1)  # from the payload, for no class was given


async def test_dead_letter_is_recorded_with_its_error(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    d.add_listener(USER_JOINED, AsyncMock(side_effect=LookupError("no such plan")))
    broker = MemoryBroker()
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED], own="handle", max_attempts=1)
    async with Running(consumer):
        sender = AsyncEventDispatcher()
        sender.add_subscriber(Bridge(broker))
        await sender.adispatch(USER_JOINED, UserJoined(1))
        await events.settle()
        letter = events.assert_dead(USER_JOINED, user_id=1)
        assert (letter.error, letter.attempts, letter.group) == ("LookupError: no such plan", 1, "billing")
        assert letter == broker.dead[0]
        assert "after 1 attempts: LookupError: no such plan" in events.draw()


async def test_dispatcher_of_the_app_is_as_it_was_afterwards() -> None:
    """Observers, listeners, stand-ins, the publisher, the time of the loop, and the direct way of a dispatch."""
    loop = asyncio.get_running_loop()
    broker, app = MemoryBroker(), AsyncEventDispatcher()
    app.add_listener(USER_JOINED, kept := AsyncMock())
    app.add_subscriber(Bridge(broker))
    app.watched = "by the host"  # type: ignore[attr-defined]
    await app.adispatch(USER_JOINED, UserJoined(1))
    before = dict(vars(app)), dict(vars(broker)), app.describe(), app.get_listeners(USER_JOINED)
    recorder = EventRecorder()
    assert recorder.watch(app) is app
    recorder.watch(app)
    recorder.mute(kept)
    recorder.freeze()
    await app.adispatch(USER_JOINED, UserJoined(2))
    assert len(recorder.dispatched()) == 1
    recorder.close()
    recorder.close()
    await app.adispatch(USER_JOINED, UserJoined(3))
    await app.adispatch(USER_JOINED, UserJoined(4))
    assert (dict(vars(app)), dict(vars(broker)), app.describe(), app.get_listeners(USER_JOINED)) == before
    assert len(recorder.dispatched()) == 1
    assert kept.await_count == 3
    assert "select" not in vars(loop._selector)  # type: ignore[attr-defined]
    now = loop.time()
    await asyncio.sleep(0.001)
    assert loop.time() > now


# -- stand-ins ----------------------------------------------------------------------------------------------


async def test_muted_listener_does_not_run_until_it_is_let_again(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    """A once listener is not spent by it."""
    d.add_listener("x", mail := AsyncMock(), once=True)
    d.add_listener("x", other := AsyncMock())
    with events.mute(mail):
        await d.adispatch("x")
        assert mail.await_count == 0 and other.await_count == 1
        assert d.has_listeners("x") and mail in d.get_listeners("x")
    await d.adispatch("x")
    await d.adispatch("x")
    assert mail.await_count == 1 and other.await_count == 3


async def test_replacement_runs_under_the_options_of_the_listener(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    errors: list[Any] = []
    d.add_listener("x", mail := AsyncMock(), once=True, on_error=lambda error, event, listener: errors.append(error))
    d.add_listener("x", second := AsyncMock())
    fake = AsyncMock(side_effect=LookupError())
    events.replace(mail, AsyncMock())
    events.replace(mail, fake)  # the newest counts
    await d.adispatch("x")
    await d.adispatch("x")
    assert (mail.await_count, fake.await_count, second.await_count, len(errors)) == (0, 1, 2, 1)
    with pytest.raises(TypeError, match="async def"):
        events.replace(second, print)  # type: ignore[arg-type]


async def test_concurrent_listener_with_a_time_limit_is_replaced(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    """Still side by side: each waits for the other."""
    both = asyncio.Barrier(2)

    async def wait(_: Event) -> None:
        await both.wait()

    d.add_listener("x", first := AsyncMock(), concurrent=True, timeout=30)
    d.add_listener("x", wait, concurrent=True)
    events.replace(first, wait)
    await d.adispatch("x")
    first.assert_not_awaited()


async def test_listener_class_and_method_of_a_subscriber_are_muted(events: EventRecorder) -> None:
    ran: list[str] = []

    class Mail:
        async def handle(self, event: Event) -> None:
            ran.append("class")

    class Audit:
        @on("x")
        async def note(self, event: Event) -> None:
            ran.append("method")

    d = events.watch(AsyncEventDispatcher(container=SimpleContainer()))
    d.add_listener("x", Mail)
    d.add_subscriber(audit := Audit())
    events.mute(Mail)
    muted = events.mute(audit.note)
    await d.adispatch("x")
    assert ran == []
    muted.remove()
    await d.adispatch("x")
    assert ran == ["method"]


async def test_stand_in_for_a_listener_that_is_not_there_is_refused(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    """A mistyped mute would let the real listener run."""
    with pytest.raises(ValueError, match="no watched dispatcher has"):
        events.mute(AsyncMock())


async def test_hosts_own_adispatch_still_runs(events: EventRecorder) -> None:
    ran: list[str] = []

    class Host(AsyncEventDispatcher):
        async def _adispatch(self, listeners: Any, event: Any, /) -> None:
            ran.append(f"host runs {len(list(listeners))}")

    d = events.watch(Host())
    d.add_listener("x", mail := AsyncMock())
    registration: Registration = events.mute(mail)
    await d.adispatch("x")
    registration.remove()
    await d.adispatch("x")
    assert ran == ["host runs 0", "host runs 1"]
    assert "_adispatch" not in vars(d)


async def test_adispatch_that_a_host_has_set_on_its_dispatcher_is_put_back(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    ran: list[int] = []

    async def of_the_host(listeners: Any, event: Any, /) -> None:
        ran.append(len(list(listeners)))

    d._adispatch = of_the_host  # type: ignore[method-assign, assignment]
    d.add_listener("x", mail := AsyncMock())
    with events.mute(mail):
        await d.adispatch("x")
    await d.adispatch("x")
    assert ran == [0, 1]
    assert vars(d)["_adispatch"] is of_the_host


# -- what is drawn ------------------------------------------------------------------------------------------


async def test_any_record_can_be_drawn(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    """Long ones are cut; an event whose repr fails, a dead letter that can't be decoded, a listener without a row."""

    class Odd(Event):
        def __repr__(self) -> str:
            raise LookupError

    class Hosts(AsyncEventDispatcher):
        def get_listeners(self, name: Any = None, /) -> Any:
            return (extra,)

    async def extra(event: Event) -> None: ...

    await d.adispatch("odd", Odd())
    await d.adispatch(CHECKED, Checked("x" * 1000))  # type: ignore[arg-type]
    await events.watch(Hosts()).adispatch("y")
    bad = Delivery(b"no JSON", "events", JSON, "1")
    events.after_dead_letter(bad, DeliveryGivenUp("", "1", "billing", 0, "malformed"))
    drawn = events.draw()
    assert "whose repr raises LookupError" in drawn
    assert "x..." in drawn
    assert re.search(r"called .* test_any_record.*extra \[.*test_recorder\] .*test_recorder\.py:\d+ ", drawn)
    assert "dead       '' in group billing after 0 attempts: malformed" in drawn
    assert events.dead(user_id=1) == []
    assert events.assert_dead("").delivery is bad
    for _ in range(40):
        await d.adispatch("many")
    assert "the last 30" in events.draw() and "whose repr" not in events.draw()


async def test_value_that_json_can_not_carry_meets_no_message(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    d.add_subscriber(Bridge(MemoryBroker()))
    await d.adispatch(USER_JOINED, UserJoined(1))
    assert events.published(USER_JOINED, user_id=object()) == []


# -- plugins ------------------------------------------------------------------------------------------------


async def test_listeners_of_plugins_are_drawn_with_their_plugin(events: EventRecorder, d: AsyncEventDispatcher) -> None:
    """Also one whose plugin is switched off, and the reason for which an event was refused."""
    may_join = EventName("user.may_join", Checked, policy=Policy(on_failure="refuse"))

    def audit(view: AsyncEventDispatcher) -> None:
        @view.listen(may_join)
        async def check(event: Checked) -> None:
            raise LookupError("no such user")

    async with Plugins(d) as plugins:
        await plugins.load(audit)
        await d.adispatch(may_join)
        plugins.switch_off("audit", "for the night")
        await d.adispatch(may_join)
        with events.mute(d.describe(may_join)[0].listener):
            await d.adispatch(may_join)
    drawn = events.draw()
    for line in (
        r"1 dispatched .*: stopped, .* ms, refused: plugin 'audit': LookupError: no such user$",
        r"    failed .* check \[audit\] .*test_recorder\.py:\d+ .*: LookupError: no such user$",
        r"2 dispatched .*: stopped, .* ms, refused: plugin 'audit': .*for the night",
        r"    not called  .* check \[audit\] .*: its plugin is switched off$",
        r"3 dispatched .*: completed",
        r"    not called  .* check \[audit\] .*: muted by the test$",
    ):
        line = line.replace(" check", "check")
        found = re.search(line, drawn, re.MULTILINE)
        assert found, f"{line}\n{drawn}"
        drawn = drawn[found.end() :]


async def test_replacement_of_a_plugins_listener_runs_under_its_policy(
    events: EventRecorder, d: AsyncEventDispatcher
) -> None:
    def audit(view: AsyncEventDispatcher) -> None:
        view.add_listener("x", real)

    real, fake = AsyncMock(), AsyncMock(side_effect=LookupError)
    async with Plugins(d, policy=Policy(on_failure="ignore"), report=lambda _: None) as plugins:
        await plugins.load(audit)
        events.replace(real, fake)
        await d.adispatch("x")
    assert (real.await_count, fake.await_count) == (0, 1)


async def test_view_of_a_plugin_is_not_watched(events: EventRecorder) -> None:
    """The host's dispatcher is: the test has it."""
    views: list[AsyncEventDispatcher] = []
    async with Plugins(AsyncEventDispatcher()) as plugins:
        await plugins.load(views.append, name="audit")
        with pytest.raises(PluginForbidden, match="observe"):
            events.watch(views[0])
