"""Answers about names: class, key, fields, and who hears each."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import msgspec
import pydantic

from silbo import AsyncEventDispatcher, Consumer, ECSTEvent, Event, EventName
from silbo.brokers.memory import MemoryBroker
from silbo.operations.app import App, open_app
from silbo.operations.names import NameInfo, find_constants, list_names


def app_of(dispatcher: AsyncEventDispatcher, *consumers: Consumer) -> App:
    return App(reference="x:y", dispatchers={"x:y": dispatcher}, consumers=consumers, plugins=())


async def test_names_that_are_declared_come_first_with_all_that_they_carry(folder: Path) -> None:
    async with open_app("shop.web:opened", app_dir=str(folder)) as app:
        paid, emptied, payed = list_names(app)
    assert (paid.name, paid.cls, paid.kind, paid.key, paid.version) == (
        "order.paid",
        "shop.events.OrderPaid",
        "notification",
        "order",
        1,
    )
    assert [(field.name, field.type, field.is_required) for field in paid.fields] == [
        ("order", "int", True),
        ("tags", "list[str] | None", False),
    ]
    assert paid.description == "an order was paid" and paid.is_declared and not paid.is_consumed
    assert [row.listener for row in paid.listeners] == ["invoice", "audit.<locals>.note", "log_order"]
    assert (emptied.kind, emptied.version, emptied.upcasts, emptied.deprecated) == ("domain", 2, (1,), "say cart.left")
    assert emptied.listeners == () and not emptied.is_heard
    assert (payed.name, payed.is_declared, payed.similar, payed.cls) == ("order.payed", False, "order.paid", "")


async def test_names_of_consumers_and_listeners_count_where_nothing_is_declared() -> None:
    consumed, heard = EventName("user.joined", ECSTEvent), EventName("user.left")

    async def listener(event: object) -> None: ...

    dispatcher = AsyncEventDispatcher()
    dispatcher.add_listener(heard, listener)
    dispatcher.add_listener("user.*", listener)
    consumer = Consumer(dispatcher, MemoryBroker(app="x").group("x", start="new"), events=[consumed])
    found = list_names(app_of(dispatcher, consumer))
    assert [(name.name, name.is_consumed, name.kind) for name in found] == [
        ("user.joined", True, "ecst"),
        ("user.left", False, ""),
    ]
    assert find_constants(app_of(dispatcher, consumer)) == [consumed, heard]


async def test_constant_with_a_class_is_taken_before_one_without() -> None:
    bare, full = EventName("user.joined"), EventName("user.joined", ECSTEvent)
    consumer = Consumer(AsyncEventDispatcher(), MemoryBroker(app="x").group("x", start="new"), events=[full])
    (found,) = find_constants(app_of(AsyncEventDispatcher(names=[bare]), consumer))
    assert found is full


class Struct(msgspec.Struct):
    a: int = msgspec.field(name="A")
    b: str = ""


class Model(Event, pydantic.BaseModel):
    a: int = pydantic.Field(alias="A")
    b: str = ""


class Plain(Event): ...


class Place(TypedDict):
    x: int


def key_of(event: object) -> str:
    return "k"


async def test_fields_have_the_names_and_needs_of_the_wire() -> None:
    """Of a Struct and a model too; a class without declared fields has none, and no annotation can be an error."""

    class Hidden(Event):
        pass

    names = [
        EventName("struct", Struct, key=key_of),
        EventName("model", Model),
        EventName("plain", Plain),
        EventName("hidden", Hidden),
    ]
    found: list[NameInfo] = list_names(app_of(AsyncEventDispatcher(names=names)))
    for name in found[:2]:
        assert [(field.name, field.type, field.is_required) for field in name.fields] == [
            ("A", "int", True),
            ("b", "str", False),
        ], name.name
    assert found[0].key == "key_of" and found[2].kind == "plain" and found[2].fields == found[3].fields == ()
