"""A shop for the flow of events in python-cqrs: events that a command collects, their follow-ups, and an event that leaves."""

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
    """A command whose response is the number of items."""

    order_id: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class ItemOrdered(DomainEvent):
    """An event for each item."""

    item: str


class ItemReserved(DomainEvent, pydantic.BaseModel, frozen=True):
    """A follow-up. A pydantic model may take `frozen=True` as a class keyword."""

    item: str


@dataclass(frozen=True)
class OrderEmpty(DomainEvent):
    """An event without a handler."""

    order_id: str


@dataclass(frozen=True)
class OrderPlaced(NotificationEvent):
    """An event for other programs."""

    order_id: str


ORDER_PLACED = EventName("order.placed", OrderPlaced, key="order_id")


class PlaceOrderHandler(RequestHandler[PlaceOrder, int]):
    """A handler that collects events, in this order."""

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
    """A service that prints what happened, and counts how much happens at the same time."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.at_work = self.most_at_work = 0

    async def reserve(self, item: str) -> None:
        """Reserve an item, which takes a moment."""
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        await asyncio.sleep(0.01)
        self.at_work -= 1
        self.log.append(f"{item} ordered")


class ReserveItem(EventHandler[ItemOrdered]):
    """A handler that collects a follow-up."""

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
    """A handler of the follow-ups."""

    def __init__(self, warehouse: Warehouse) -> None:
        self._warehouse = warehouse

    async def handle(self, event: ItemReserved) -> None:
        self._warehouse.log.append(f"{event.item} reserved")


def commands_mapper(mapper: RequestMap) -> None:
    """Bind commands to their handlers."""
    mapper.bind(PlaceOrder, PlaceOrderHandler)


def events_mapper(mapper: EventMap) -> None:
    """Bind events to their handlers."""
    mapper.bind(ItemOrdered, ReserveItem)
    mapper.bind(ItemReserved, CountReserved)
