"""With an inbox, what comes again has no second effect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Bridge
from silbo.brokers.memory import MemoryBroker
from silbo.errors import MessageInvalid, StoreUnavailable
from silbo.message import Delivery, Origin
from silbo.protocols import Inbox
from silbo.wire.encode import to_message
from silbo.wire.formats import DIATOR, JSON
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    delivery,
    joined,
)


class Memory:
    """An inbox like one in a database: what fails is not remembered."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()
        self.away = 0

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        if self.away:
            self.away -= 1
            raise StoreUnavailable("locked")
        yield (group, publication) not in self.seen
        self.seen.add((group, publication))


async def test_publication_that_was_handled_is_acknowledged_and_no_more(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Whatever its entry is called: after a replay it has another id. The same fact published twice is heard twice."""
    inbox: Inbox = Memory()
    event = UserJoined(1)
    twice = [
        Delivery(
            JSON.encode(to_message(event, name="user.joined", kind="ecst"), Origin("other", "x")), "events", JSON, id_
        )
        for id_ in ("1", "2")
    ]
    again = Delivery(twice[0].raw, "events", JSON, "3", 2)
    subscription = Scripted([*twice, again])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(3)
    assert heard.ids == [1, 1]
    assert (consumer.stats.handled, consumer.stats.duplicates) == (2, 1)


async def test_failed_attempt_is_not_remembered(d: AsyncEventDispatcher) -> None:
    attempts: list[int] = []

    @d.listen("user.joined")
    async def fail_once(event: UserJoined) -> None:
        attempts.append(event.user_id)
        if len(attempts) == 1:
            raise ValueError("no")

    subscription = Scripted([delivery(1)])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=Memory(), on_error=lambda *_: None)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (attempts, consumer.stats.handled, consumer.stats.duplicates) == ([1, 1], 1, 0)


async def test_inbox_that_is_away_is_waited_for_and_costs_no_attempt(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No listener has run: it would be wrong to give up messages because a database restarts."""
    monkeypatch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.01)
    inbox = Memory()
    inbox.away = 7
    subscription = Scripted([delivery(1, key="a"), delivery(2, key="a")])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox, max_attempts=2)
    async with Running(consumer):
        await subscription.until_acked(2)
    assert heard.ids == [1, 2]
    assert (consumer.stats.failed, dict(subscription.attempts)) == (0, {})


class Swallowing(Memory):
    """An inbox that forgets to pass an error on."""

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
        try:
            yield True
        except Exception:
            return


async def test_failure_that_the_inbox_swallows_is_a_failure(d: AsyncEventDispatcher) -> None:
    errors: list[Any] = []

    @d.listen("user.joined")
    async def fail(event: UserJoined) -> None:
        raise ValueError("no disk")

    subscription = Scripted([delivery(1)])
    consumer = Consumer(
        d,
        subscription,
        events=[USER_JOINED],
        inbox=Swallowing(),
        max_attempts=2,
        on_error=lambda error, what: errors.append(error),
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (consumer.stats.handled, consumer.stats.failed, consumer.stats.dead) == (0, 2, 1)
    assert "no disk" in str(errors[0])


@pytest.mark.parametrize(
    "error", [ConnectionError("refused"), TimeoutError(), OSError("no route"), RuntimeError("pool")]
)
async def test_inbox_that_can_not_be_entered_costs_no_attempt_whatever_it_raises(
    d: AsyncEventDispatcher, heard: Heard, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database's own errors, of an inbox of the host's."""

    class Refusing(Memory):
        @asynccontextmanager
        async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
            if self.away:
                self.away -= 1
                raise error
            yield True

    monkeypatch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.01)
    inbox = Refusing()
    inbox.away = 5
    subscription = Scripted([delivery(1)])
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox, max_attempts=2)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (heard.ids, consumer.stats.handled, consumer.stats.failed, consumer.stats.dead) == ([1], 1, 0, 0)


async def test_inbox_that_can_not_remember_costs_no_attempt(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Its commit was lost, and the effect with it; what a listener itself finds away is a failure like any other."""

    class Commits(Memory):
        lost = 3

        @asynccontextmanager
        async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
            yield True
            if self.lost:
                self.lost -= 1
                raise StoreUnavailable("gone")

    errors: list[Any] = []

    @d.listen("user.joined", priority=1)
    async def fail_once(event: UserJoined) -> None:
        if event.user_id == 2 and not errors:
            raise StoreUnavailable("the listener's own")

    subscription = Scripted([delivery(1), delivery(2)])
    consumer = Consumer(
        d,
        subscription,
        events=[USER_JOINED],
        inbox=Commits(),
        max_attempts=2,
        on_error=lambda error, what: errors.append(str(error)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("silbo.consumer.attempts.INBOX_RETRY", 0.01)
        async with Running(consumer):
            await subscription.until_acked(2)
    assert (consumer.stats.handled, consumer.stats.dead) == (2, 0)
    assert errors == ["the listener's own"]


async def test_publication_that_the_inbox_can_never_remember_is_a_dead_letter_at_once(
    d: AsyncEventDispatcher, heard: Heard
) -> None:
    """Trying again helps as little as with other data that can't be read; a listener's own MessageInvalid is a failure."""

    class Refuses(Memory):
        asked = 0

        @asynccontextmanager
        async def handling(self, group: str, publication: str) -> AsyncIterator[bool]:
            self.asked += 1
            if self.asked == 1:
                raise MessageInvalid("refused")
            async with super().handling(group, publication) as new:
                yield new

    errors: list[Any] = []

    @d.listen("user.joined", priority=1)
    async def fail_once(event: UserJoined) -> None:
        if "the listener's own" not in errors:
            raise MessageInvalid("the listener's own")

    subscription = Scripted([delivery(1, key="a"), delivery(2, key="a")])
    consumer = Consumer(
        d,
        subscription,
        events=[USER_JOINED],
        inbox=Refuses(),
        on_error=lambda error, what: errors.append(str(error)),
    )
    async with Running(consumer):
        await subscription.until_acked(2)
    assert set(heard.ids) == {2}
    stats = consumer.stats
    assert (stats.malformed, stats.failed, stats.handled, stats.dead) == (1, 1, 1, 1)
    assert errors[0] == "refused" and errors[-1] == "the listener's own"


async def test_inbox_is_not_asked_about_what_nobody_listens_to(d: AsyncEventDispatcher, heard: Heard) -> None:
    """One stream carries everything: that must not become a row for each message in every consumer's database."""
    inbox = Memory()
    only = AsyncEventDispatcher()
    only.add_listener("user.left", heard.hear)
    only.add_subscriber(Bridge(MemoryBroker("web")))
    subscription = Scripted([delivery(1)])
    consumer = Consumer(only, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(1)
    assert (consumer.stats.handled, consumer.stats.unheard, inbox.seen) == (0, 1, set())


async def test_message_that_names_no_publication_is_known_by_its_entry(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Formats without headers: the broker's redelivery is recognised, more can't be."""
    raw = DIATOR.encode(joined(1), Origin("other", "x"))
    items = [Delivery(raw, "events", DIATOR, "1"), Delivery(raw, "events", DIATOR, "2"), delivery(3)]
    inbox = Memory()
    inbox.seen.add(("billing", "events/1"))
    subscription = Scripted(items)
    consumer = Consumer(d, subscription, events=[USER_JOINED], inbox=inbox)
    async with Running(consumer):
        await subscription.until_acked(3)
    assert heard.ids == [1, 3]
    assert consumer.stats.duplicates == 1


async def test_cancelled_listener_is_not_remembered(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    begun = asyncio.Event()
    inbox = Memory()

    @d.listen("user.joined")
    async def endless(event: Any) -> None:
        begun.set()
        await asyncio.sleep(3600)

    async with Consumer(d, broker.group("billing", start="new"), inbox=inbox) as consumer:
        running = asyncio.create_task(consumer.run())
        await broker.publish(joined(1))
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert inbox.seen == set()


def test_inbox_is_for_groups(d: AsyncEventDispatcher) -> None:
    """Where everybody hears everything there is nobody whose redelivery it could be."""
    subscription = Scripted()
    subscription.name = ""
    with pytest.raises(ValueError, match="no group"):
        Consumer(d, subscription, inbox=Memory())
