"""Names that nobody hears, and names without a key: told when the consumer is made or starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import silbo
from silbo import AsyncEventDispatcher, EventName
from silbo._reports import RateLimitedLog
from silbo.brokers.memory import MemoryBroker
from silbo.consumer import consumer as module
from silbo.errors import Gap
from silbo.message import Batch, Delivery, Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON
from tests.support.consumer import (
    USER_JOINED,
    Consumer,
    Heard,
    Running,
    Scripted,
    UserJoined,
    UserLeft,
    delivery,
    left_over,
)

USER_LEFT = EventName("user.left", UserLeft)
ROUTED = EventName("user.moved", UserJoined)


def test_names_without_a_key_are_refused_with_concurrency(broker: MemoryBroker, d: AsyncEventDispatcher) -> None:
    """Known at the start: else each of their messages would be a dead letter."""
    group = broker.group("billing", start="new")
    with pytest.raises(ValueError, match=r"user\.left, user\.moved have none.*key=.*concurrency=1"):
        Consumer(d, group, events=(name for name in (USER_JOINED, USER_LEFT, ROUTED)), concurrency=2)
    Consumer(d, group, events=[USER_JOINED, USER_LEFT])
    Consumer(d, group, events=[USER_JOINED], concurrency=2)


async def stats_after(d: AsyncEventDispatcher) -> silbo.consumer.stats.ConsumerStats:
    subscription = Scripted([delivery(1)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.until_acked(1)
    assert await left_over(MemoryBroker("other")) == []
    return consumer.stats


@pytest.mark.parametrize("beside", [(), ("user.left",), ("**", "user.left"), ("user.*.x", "**")])
async def test_name_that_nobody_hears_is_a_warning_and_counted_apart(
    beside: tuple[str, ...], d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener for everything, beside others, would hide a misspelt name; it is acknowledged all the same."""
    heard = Heard()
    for name in beside:
        d.add_listener(name, heard.hear)
    stats = await stats_after(d)
    assert (stats.received, stats.handled, stats.unheard) == (1, 0, 1)
    (record,) = (record for record in caplog.records if "nobody hears" in record.getMessage())
    assert record.levelname == "WARNING"
    assert record.__dict__["event_names"] == ["user.joined"]


@pytest.mark.parametrize("listened", [("user.joined",), ("user.*", "user.left"), ("**",), ("**.joined",)])
async def test_name_that_somebody_hears_is_no_warning(
    listened: tuple[str, ...], d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    """By its name, by a pattern, or by a program's only listener, for everything."""
    heard = Heard()
    for name in listened:
        d.add_listener(name, heard.hear)
    stats = await stats_after(d)
    assert (stats.handled, stats.unheard) == (1, 0)
    assert "nobody hears" not in caplog.text


async def test_warning_names_what_may_be_meant(d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture) -> None:
    d.add_listener("user.joind", Heard().hear)
    await stats_after(d)
    assert "nobody hears 'user.joined' (a listener hears 'user.joind') of events=" in caplog.text


class Batched(Scripted):
    """Gives out batches, which take the express lane."""

    async def receive_batches(self, limit: int) -> Sequence[Batch | Gap]:
        items = [item for item in await self.receive(limit) if isinstance(item, Delivery)]
        return [Batch("events", JSON, [item.raw for item in items], [item.id for item in items])] if items else []

    async def ack(self, *deliveries: Any) -> None:
        await super().ack(*(each for item in deliveries for each in (item if isinstance(item, Batch) else [item])))


@pytest.mark.parametrize("kind", [Scripted, Batched])
async def test_warning_comes_again_while_messages_are_acknowledged_unheard(
    kind: type[Scripted], d: AsyncEventDispatcher, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their number since the last one; messages of names that are not in `events=` are no reason for it."""
    monkeypatch.setattr(module, "UNHEARD_EVERY", 0.0)
    monkeypatch.setattr(RateLimitedLog.__init__, "__kwdefaults__", {"every": 0.0})
    left = JSON.encode(to_message(UserLeft(4), name="user.left", kind="notification"), Origin("other", "elsewhere"))
    subscription = kind([delivery(1), delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    d.add_listener("user.joind", Heard().hear)
    async with Running(consumer):
        await subscription.until_acked(2)
        subscription.batches.append([delivery(3, raw=left)])
        await subscription.until_acked(3)
        subscription.batches += [[delivery(4)], []]
        await subscription.until_acked(4)
        subscription.empty.clear()
        await subscription.empty.wait()
    told = [record.__dict__.get("missed") for record in caplog.records if "nobody hears" in record.getMessage()]
    assert told == [None, 2, 1]
    assert "are acknowledged as unheard, 2 since the last warning; is a" in caplog.text
    assert consumer.health().unheard == consumer.stats.unheard == 4


async def test_listener_that_comes_later_is_heard_from_then_on(d: AsyncEventDispatcher) -> None:
    """A plugin may be loaded while the consumer runs, and go again."""
    first, second = Scripted([delivery(1)]), [delivery(2)]
    heard = Heard()
    consumer = Consumer(d, first, events=[USER_JOINED])
    async with Running(consumer):
        await first.until_acked(1)
        registration = d.add_listener("user.joined", heard.hear)
        first.batches.append(second)
        await first.until_acked(2)
        registration.remove()
        first.batches.append([delivery(3)])
        await first.until_acked(3)
    assert (consumer.stats.handled, consumer.stats.unheard) == (1, 2)
