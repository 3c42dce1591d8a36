"""The recorder's assertions return events of the name's class; no line here may be an error."""

from __future__ import annotations

from typing import Any, assert_type

from silbo import AsyncEventDispatcher, EventName, Message, NotificationEvent
from silbo.brokers.memory import DeadLetter
from silbo.testing import EventRecorder


class Paid(NotificationEvent):
    order: int = 0


PAID = EventName("order.paid", Paid)


class Host(AsyncEventDispatcher):
    region = "eu"


async def test(silbo_events: EventRecorder) -> None:
    assert_type(silbo_events.watch(Host()).region, str)
    assert_type(silbo_events.assert_dispatched(PAID, order=7), Paid)
    assert_type(silbo_events.assert_consumed(PAID), Paid)
    assert_type(silbo_events.dispatched(PAID), list[Paid])
    assert_type(silbo_events.consumed("order.*"), list[Any])
    assert_type(silbo_events.assert_dispatched("order.paid"), Any)
    assert_type(silbo_events.assert_published(PAID), Message)
    assert_type(silbo_events.assert_dead("order.paid"), DeadLetter)
    with silbo_events.mute(Host().adispatch), silbo_events.in_order():
        silbo_events.freeze().advance(30)
        await silbo_events.settle(within=1)
