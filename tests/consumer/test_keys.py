"""A message without a key, under a name that has one here: it gets the key that its publisher would have given it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, EventName
from silbo.bridge import routing_key
from silbo.brokers.memory import MemoryBroker
from silbo.message import Delivery, Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import DIATOR, JSON
from tests.support.consumer import Consumer, Heard, Running, Scripted


class Area(Enum):
    NORTH = "n"
    SOUTH = "s"


@dataclass
class Moved(ECSTEvent):
    user_id: int
    area: Area = Area.NORTH
    fails: bool = False


def moved(number: int, area: Area, *, key: str | None = None, fails: bool = False, written: Any = JSON) -> Delivery:
    message = to_message(Moved(number, area, fails), name="user.moved", kind="ecst", key=key)
    return Delivery(written.encode(message, Origin("other", "x")), "events", written, str(number))


AREA = EventName("user.moved", Moved, key="area")


@pytest.mark.parametrize(
    "name",
    [
        AREA,
        EventName("user.moved", Moved, key=lambda event: event.area),
        EventName("user.moved", key="area"),
    ],
    ids=["attribute", "function", "without a class"],
)
async def test_order_is_kept_by_the_key_of_the_consumers_own_name(d: AsyncEventDispatcher, name: Any) -> None:
    """A publisher that writes a plain string sends none: that makes no dead letters, and costs no order."""
    heard: list[int] = []
    failures = 1

    @d.listen("user.moved")
    async def work(event: Any) -> None:
        nonlocal failures
        number = event.payload["user_id"] if name.cls is None else event.user_id
        if number == 0 and failures:
            failures -= 1
            raise ValueError("not now")
        heard.append(number)

    areas = [Area.NORTH, Area.NORTH, Area.SOUTH, Area.NORTH]
    subscription = Scripted([moved(number, area) for number, area in enumerate(areas)])
    consumer = Consumer(d, subscription, events=[name], concurrency=3, on_error=lambda error, what: None)
    async with Running(consumer):
        await subscription.until_acked(4)
    assert heard == [2, 0, 1, 3]
    assert (consumer.stats.malformed, consumer.stats.dead) == (0, 0)


async def test_key_that_was_sent_and_key_that_was_not_are_one(d: AsyncEventDispatcher) -> None:
    """Both have the text that the publisher's own constant gives: here that of the enum, not of its value on the wire."""
    release, heard = asyncio.Event(), Heard()

    @d.listen("user.moved")
    async def work(event: Moved) -> None:
        if event.user_id == 0:
            await release.wait()
        await heard.hear(event)

    sent = routing_key(Moved(0, Area.NORTH), "user.moved", "area")
    subscription = Scripted([moved(0, Area.NORTH, key=sent), moved(1, Area.NORTH), moved(2, Area.SOUTH)])
    async with Running(Consumer(d, subscription, events=[AREA], concurrency=3)):
        await heard.until(1)
        assert heard.ids == [2]
        release.set()
        await heard.until(3)
    assert heard.ids == [2, 0, 1]


async def test_key_that_was_sent_goes_before_the_consumers_own(d: AsyncEventDispatcher) -> None:
    """A route may have given another: the publisher decides what keeps its order."""
    release, heard = asyncio.Event(), Heard()

    @d.listen("user.moved")
    async def work(event: Moved) -> None:
        if event.user_id == 0:
            await release.wait()
        await heard.hear(event)

    subscription = Scripted(
        [moved(0, Area.NORTH, key="a"), moved(1, Area.NORTH, key="b"), moved(2, Area.SOUTH, key="a")]
    )
    async with Running(Consumer(d, subscription, events=[AREA], concurrency=3)):
        await heard.until(1)
        release.set()
        await heard.until(3)
    assert heard.ids == [1, 0, 2]


async def test_format_without_headers_has_keys_all_the_same(d: AsyncEventDispatcher, heard: Heard) -> None:
    """Diator's messages have no place for one."""
    subscription = Scripted([moved(number, Area.NORTH, written=DIATOR) for number in range(3)])
    consumer = Consumer(d, subscription, events=[AREA], concurrency=3)
    async with Running(consumer):
        await subscription.until_acked(3)
    assert (heard.ids, consumer.stats.dead) == ([0, 1, 2], 0)


@pytest.mark.parametrize(
    "name",
    [
        EventName("user.moved", key="nothing_like_it"),
        EventName("user.moved", Moved, key=lambda event: 1 / 0),
        EventName("user.moved", Moved, key=lambda event: None),
    ],
    ids=["missing", "bug", "None"],
)
async def test_name_that_gives_no_key_leaves_it_without_one(d: AsyncEventDispatcher, heard: Heard, name: Any) -> None:
    """And the error says what to do."""
    subscription = Scripted([moved(1, Area.NORTH)])
    errors: list[str] = []
    consumer = Consumer(
        d, subscription, events=[name], concurrency=2, on_error=lambda error, what: errors.append(str(error))
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    assert heard.events == []
    assert errors[0].startswith("headers.key: no key, which concurrency needs: give one to its EventName")


async def test_misfit_is_told_once_and_as_what_it_is(d: AsyncEventDispatcher) -> None:
    """Looking for its key must not hide what is wrong with it."""
    raw = moved(1, Area.NORTH).raw.replace(b'"user_id":1', b'"user_id":"one"')
    subscription = Scripted([Delivery(raw, "events", JSON, "1")])
    errors: list[str] = []
    consumer = Consumer(
        d, subscription, events=[AREA], concurrency=2, on_error=lambda error, what: errors.append(str(error))
    )
    async with Running(consumer):
        await subscription.until_acked(1)
    assert len(errors) == 2
    assert errors[0].startswith("payload.user_id: ")
    assert "given up at once: payload.user_id: " in errors[1]


async def test_plain_string_published_is_consumed_with_concurrency() -> None:
    """As in the tutorial, from a dispatch to a listener in another program."""
    broker = MemoryBroker("web")
    web, d, heard = AsyncEventDispatcher(), AsyncEventDispatcher(), Heard()
    web.add_subscriber(Bridge(broker))
    d.add_subscriber(heard)
    consumer = Consumer(d, broker.group("billing", start="new"), events=[AREA], concurrency=4)
    async with Running(consumer):
        await web.adispatch("user.moved", Moved(1))
        await heard.until(1)
    assert (heard.ids, consumer.stats.dead) == ([1], 0)
