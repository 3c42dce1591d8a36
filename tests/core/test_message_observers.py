"""Observers of messages: what a bridge, a consumer and a relay tell them, and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Attempt, Bridge, EventName, NotificationEvent, Outbox, Publishing, RelayedBatch
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable
from silbo.message import Message
from silbo.stores.memory import MemoryStore
from tests.support.consumer import USER_JOINED, Consumer, Running, joined


class Watcher:
    """An observer that notes the hooks it is called with, and the outcome at that time."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Any]] = []
        self.changed = asyncio.Event()

    def before_dispatch(self, dispatch: object) -> None: ...
    def after_dispatch(self, dispatch: object) -> None: ...
    def before_listener(self, call: object) -> None: ...
    def after_listener(self, call: object) -> None: ...

    def __getattr__(self, hook: str) -> Any:
        if not hook.startswith(("before_", "after_")):
            raise AttributeError(hook)

        def note(*arguments: Any) -> None:
            self.log.append((hook, arguments))
            self.changed.set()

        return note

    async def until(self, hook: str, many: int = 1) -> list[Any]:
        async with asyncio.timeout(30):
            while len(found := [arguments for name, arguments in self.log if name == hook]) < many:
                self.changed.clear()
                await self.changed.wait()
        return found

    @property
    def hooks(self) -> list[str]:
        return [hook for hook, _ in self.log]


class Away:
    """A broker that can't be reached."""

    app = "web"

    async def publish(self, *messages: Message) -> None:
        raise BrokerUnavailable("nobody there")

    async def aclose(self) -> None: ...


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.mark.parametrize("wait", [True, False])
async def test_a_publish_is_observed_from_its_call_to_its_answer(watcher: Watcher, wait: bool) -> None:
    """Also where the dispatch does not wait for it; and whichever of bridge and observer came first."""
    broker = Away()
    d = AsyncEventDispatcher()
    errors: list[Any] = []
    async with Bridge(broker, wait=wait, on_error=lambda error, message: errors.append(error)) as bridge:
        d.add_subscriber(bridge)
        with d.observe(watcher):
            await d.adispatch("user.joined", NotificationEvent())
        await bridge.aclose()
        assert watcher.hooks == ["before_publish", "after_publish"]
        (before,), (after,) = (arguments for _, arguments in watcher.log)
        assert isinstance(after, Publishing) and before is after
        assert (after.name, after.outcome, after.publisher) == ("user.joined", "failed", broker)
        assert after.error is errors[0] and after.duration > 0
        await d.adispatch("user.joined", NotificationEvent())
    assert len(watcher.log) == 2, "the observation has ended"


async def test_a_cancelled_publish_is_observed_as_such(watcher: Watcher) -> None:
    class Silent(Away):
        async def publish(self, *messages: Message) -> None:
            await asyncio.Event().wait()

    d = AsyncEventDispatcher(observers=[watcher])
    d.add_subscriber(Bridge(Silent()))
    task = asyncio.create_task(d.adispatch("user.joined", NotificationEvent()))
    await watcher.until("before_publish")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [(publishing,)] = await watcher.until("after_publish")
    assert publishing.outcome == "cancelled" and isinstance(publishing.error, asyncio.CancelledError)


async def test_an_observer_may_add_headers_and_its_error_keeps_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    class Adding(Watcher):
        def before_publish(self, publishing: Publishing) -> None:
            publishing.message = replace(publishing.message, headers={**publishing.message.headers, "seen": "yes"})
            raise LookupError("of the observer")

    broker, sent = MemoryBroker(), []
    receiver = await broker.group("test", start="new").open()
    d = AsyncEventDispatcher(observers=[Adding()])
    d.add_subscriber(Bridge(broker))
    with caplog.at_level(logging.ERROR, "silbo"):
        await d.adispatch("user.joined", NotificationEvent())
    sent += await receiver.receive(10)
    assert [delivery.message().headers["seen"] for delivery in sent] == ["yes"]
    assert [(record.message, record.__dict__["hook"]) for record in caplog.records] == [
        ("observer failed", "before_publish")
    ]


@pytest.mark.parametrize("events", [(), (USER_JOINED,)], ids=["payload", "class"])
async def test_attempts_retries_and_dead_letters_are_observed(
    watcher: Watcher, events: Sequence[EventName[Any]]
) -> None:
    """The hooks run in the context of the listeners; the pause is that before this attempt, by this consumer."""
    broker = MemoryBroker("other")
    d = AsyncEventDispatcher(observers=[watcher])
    error = LookupError("as told")

    @d.listen("user.joined")
    async def fail(event: Any) -> None:
        raise error

    async with Running(Consumer(d, broker.group("billing", start="new"), events=events, max_attempts=2)):
        await broker.publish(joined(1, key="1"))
        [(delivery, given_up)] = await watcher.until("after_dead_letter")
    assert watcher.hooks == [
        "after_receive",
        *["before_attempt", "after_attempt"],
        "after_retry",
        *["before_attempt", "after_attempt"],
        "after_dead_letter",
    ]
    arguments = [given for _, given in watcher.log]
    assert [len(deliveries) for deliveries in arguments[0][:1]] == [1]
    first, second = arguments[2][0], arguments[5][0]
    assert isinstance(first, Attempt) and first.pause is None and first.delivery.attempt == 1
    assert second.pause == arguments[3][2] > 0 and second.delivery.attempt == 2
    assert (first.number, second.number) == (1, 2)
    assert (first.outcome, first.error) == ("failed", error) and arguments[3][1] is error
    assert first.message_id == delivery.message().message_id and first.headers == delivery.message().headers
    assert first.subscription.name == "billing" and given_up.attempts == 2 and delivery.id == first.delivery.id


async def test_an_unwanted_message_and_a_malformed_one_are_no_attempts(watcher: Watcher) -> None:
    """No listener runs for them."""
    broker = MemoryBroker("billing")
    d = AsyncEventDispatcher(observers=[watcher])
    done = asyncio.Event()

    @d.listen("last")
    async def last(event: Any) -> None:
        done.set()

    async with Running(Consumer(d, broker.group("billing", start="new"), own="skip")):
        await broker.publish(joined(1))
        await broker.publish(replace(joined(2), message_name="user.*"))
        await broker.publish(replace(joined(3), message_name="last", headers={"app": "other", "publication": "1"}))
        async with asyncio.timeout(30):
            await done.wait()
    names = [arguments[0].name for hook, arguments in watcher.log if hook == "before_attempt"]
    assert names == ["last"]


async def test_a_relay_is_observed_around_each_batch(watcher: Watcher) -> None:
    """An outbox hands its observers to its relay; without one there is nothing to observe."""
    broker = MemoryBroker("web")
    Outbox(MemoryStore(), broker, relay=False).observe(watcher)
    async with Outbox(MemoryStore(), broker) as outbox:
        outbox.observe(watcher)
        await outbox.publish(joined(1), joined(2))
        [(batch,)] = await watcher.until("after_relay")
    assert isinstance(batch, RelayedBatch) and batch.publisher is broker
    assert [message.message_name for message in batch.messages] == ["user.joined"] * 2
    assert batch.outcome == "completed" and batch.duration > 0
    assert watcher.hooks == ["before_relay", "after_relay"]


async def test_a_relay_goes_on_to_call_an_observer_until_each_of_its_registrations_is_removed(watcher: Watcher) -> None:
    """Two parts of a host may both observe with the same object: the end of the one is not that of the other."""
    async with Outbox(MemoryStore(), MemoryBroker("web")) as outbox:
        with outbox.observe(watcher):
            again = outbox.observe(watcher)
        await outbox.publish(joined(1))
        await watcher.until("after_relay")
        assert watcher.hooks == ["before_relay", "after_relay"]  # once, though it was given twice
        again.remove()
        again.remove()
        with outbox.observe(other := Watcher()):
            await outbox.publish(joined(2))
            await other.until("after_relay")
    assert watcher.hooks == ["before_relay", "after_relay"]
