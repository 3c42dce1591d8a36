"""The ids of events: version 7 UUIDs, whose time leads to the place of an event in a stream."""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import RFC_4122, UUID

from silbo import AsyncEventDispatcher, Bridge, NotificationEvent
from silbo.brokers.memory import MemoryBroker
from silbo.event import find_id_maker


@dataclass
class Told(NotificationEvent):
    n: int = 0


def milliseconds(identity: UUID) -> int:
    return identity.int >> 80


def test_an_id_has_the_time_at_which_it_was_made() -> None:
    """Read as a UUID or made as text for the wire: both ways."""
    before = time.time_ns() // 1_000_000
    make = find_id_maker(Told)
    assert make is not None
    text = make(Told())
    assert text is not None
    made = [Told().event_id, UUID(text)]
    after = time.time_ns() // 1_000_000
    assert {(each.version, each.variant) for each in made} == {(7, RFC_4122)}
    assert all(before <= milliseconds(each) <= after for each in made)


def test_later_ids_have_a_later_time() -> None:
    first = Told().event_id
    while time.time_ns() // 1_000_000 <= milliseconds(first):
        pass
    assert milliseconds(Told().event_id) > milliseconds(first)


def test_ids_differ() -> None:
    assert len({Told().event_id for _ in range(10_000)}) == 10_000


async def test_id_that_was_sent_is_the_event_s() -> None:
    dispatcher = AsyncEventDispatcher()
    async with MemoryBroker(app="web") as broker:
        dispatcher.add_subscriber(Bridge(broker))
        event = Told()
        await dispatcher.adispatch("told", event)
        assert event.event_id.version == 7
