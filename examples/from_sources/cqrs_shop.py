"""A shop for the flow of events in python-cqrs: what a command collects, what comes of that, and what leaves."""

import asyncio
from dataclasses import dataclass

import pydantic

from silbo import (
    DomainEvent,
    Event,
    EventHandler,
    EventMap,
    EventName,
    NotificationEvent,
    Request,
    RequestHandler,
    RequestMap,
)


@dataclass(frozen=True)
class PlaceOrder(Request[int]):
    """Is answered with the number of items."""

    order_id: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class ItemOrdered(DomainEvent):
    """One for each item."""

    item: str


class ItemReserved(DomainEvent, pydantic.BaseModel, frozen=True):
    """What comes of it; a pydantic model does take `frozen=True` as a class keyword."""

    item: str


@dataclass(frozen=True)
class OrderEmpty(DomainEvent):
    """Nobody has been told to handle it."""

    order_id: str


@dataclass(frozen=True)
class OrderPlaced(NotificationEvent):
    """For other programs."""

    order_id: str


ORDER_PLACED = EventName("order.placed", OrderPlaced, key="order_id")


class PlaceOrderHandler(RequestHandler[PlaceOrder, int]):
    """Collects, in this order."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: PlaceOrder) -> int:
        self._events += [ItemOrdered(item) for item in request.items] or [OrderEmpty(request.order_id)]
        self._events.append(OrderPlaced(request.order_id))
        return len(request.items)


class Warehouse:
    """Says what happened, and how much of it at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.at_work = self.most_at_work = 0

    async def reserve(self, item: str) -> None:
        """Takes a moment."""
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        await asyncio.sleep(0.01)
        self.at_work -= 1
        self.log.append(f"{item} ordered")


class ReserveItem(EventHandler[ItemOrdered]):
    """Has a follow-up of its own."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, event: ItemOrdered) -> None:
        await self._warehouse.reserve(event.item)
        self._events.append(ItemReserved(item=event.item))


class CountReserved(EventHandler[ItemReserved]):
    """Hears the follow-ups."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse

    async def handle(self, event: ItemReserved) -> None:
        self._warehouse.log.append(f"{event.item} reserved")


def commands_mapper(mapper: RequestMap) -> None:
    """What handles which command."""
    mapper.bind(PlaceOrder, PlaceOrderHandler)


def events_mapper(mapper: EventMap) -> None:
    """Who hears which event."""
    mapper.bind(ItemOrdered, ReserveItem)
    mapper.bind(ItemReserved, CountReserved)
