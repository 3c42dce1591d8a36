"""Classes that can't be rebuilt are refused when a consumer is made, not found out by its first messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, EventName
from silbo.brokers.memory import MemoryBroker
from silbo.errors import ClassUnreadable

if TYPE_CHECKING:
    from decimal import Decimal


@dataclass
class Paid(ECSTEvent):
    amount: Decimal


@dataclass
class Refunded(ECSTEvent):
    reason: bytes | str


@pytest.mark.parametrize(("cls", "problem"), [(Paid, "'Decimal' is not defined"), (Refunded, "reason")])
async def test_a_class_that_can_not_be_rebuilt_is_refused_at_the_start(cls: type, problem: str) -> None:
    name = EventName(cls.__name__, cls)
    with pytest.raises(ClassUnreadable, match=problem) as caught:
        Consumer(AsyncEventDispatcher(), MemoryBroker(app="shop").group("g", start="new"), events=[name])
    assert caught.value.cls is cls
