"""A shop: its tables, its command, and the handlers of its events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import rodi
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from silbo import (
    DomainEvent,
    Event,
    EventHandler,
    EventMap,
    EventName,
    Mediator,
    NotificationEvent,
    Publisher,
    Request,
    RequestHandler,
    RequestMap,
    bootstrap,
)
from silbo.stores.sqlalchemy import current_session, in_session


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    quantity: Mapped[int]


class Stock(Base):
    __tablename__ = "stock"

    item: Mapped[str] = mapped_column(primary_key=True)
    left: Mapped[int]


class OutOfStock(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class PlaceOrder(Request[int]):
    item: str
    quantity: int


@dataclass(frozen=True, kw_only=True)
class OrderPlaced(DomainEvent):
    """An event for the shop itself."""

    item: str
    quantity: int


@dataclass(frozen=True, kw_only=True)
class OrderConfirmed(NotificationEvent):
    """An event for other programs."""

    order_id: int


ORDER_CONFIRMED = EventName("order.confirmed", OrderConfirmed, key="order_id")


class PlaceOrderHandler(RequestHandler[PlaceOrder, int]):
    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, request: PlaceOrder) -> int:
        order = Order(item=request.item, quantity=request.quantity)
        self._session.add(order)
        await self._session.flush()
        self._events.append(OrderConfirmed(order_id=order.id))
        self._events.append(OrderPlaced(item=request.item, quantity=request.quantity))
        return order.id


class TakeFromStock(EventHandler[OrderPlaced]):
    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    async def handle(self, event: OrderPlaced) -> None:
        stock = await self._session.get_one(Stock, event.item)
        if stock.left < event.quantity:
            raise OutOfStock(f"{event.quantity} {event.item} ordered, {stock.left} left")
        stock.left -= event.quantity


class Transaction:
    """A middleware with the transaction of a command and its events: everything is committed at the end, or nothing."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def __call__(self, request: object, handle: Callable[[Any], Awaitable[Any]]) -> Any:
        async with self._sessions.begin() as session:
            with in_session(session):  # the outbox stores in it, too
                return await handle(request)


def commands(mapper: RequestMap) -> None:
    mapper.bind(PlaceOrder, PlaceOrderHandler)


def events(mapper: EventMap) -> None:
    mapper.bind(OrderPlaced, TakeFromStock)


def shop(engine: AsyncEngine, broker: Publisher) -> Mediator:
    """Return the mediator of a shop that keeps its data in a database and sends to a broker."""
    container = rodi.Container()
    container.add_transient_by_factory(current_session, AsyncSession)  # the one that Transaction opened
    container.register(PlaceOrderHandler)
    container.register(TakeFromStock)
    return bootstrap(
        di_container=container,
        commands_mapper=commands,
        domain_events_mapper=events,
        message_broker=broker,
        middlewares=[Transaction(engine)],
    )
