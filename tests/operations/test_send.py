"""A message by hand is the one that the program itself would send, or is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pydantic
import pytest

from silbo import AsyncEventDispatcher, ECSTEvent, EventName, NotificationEvent
from silbo.errors import MessageRefused, NameInvalid
from silbo.operations.app import App, open_app
from silbo.operations.send import make_message

IDENTITY = "9f62e977-73f7-462b-92cb-8ea658d3bcb5"


async def test_message_of_an_app_has_its_kind_key_version_and_all_fields(folder: Path) -> None:
    async with open_app("shop.web:dispatcher", app_dir=str(folder)) as app:
        message = make_message("order.paid", {"order": 7}, app=app)
    assert (message.message_type, message.key, message.version) == ("notification_event", "7", 1)
    assert message.payload["order"] == 7 and message.payload["tags"] is None
    assert message.message_id == message.payload["event_id"] and message.headers["publication"]
    assert UUID(message.message_id).version == 7


async def test_message_without_an_app_is_as_it_was_given() -> None:
    message = make_message("order.paid", {"order": [1]}, kind="ecst", key="k", to="orders")
    assert (message.message_type, message.key, message.to) == ("ecst_event", "k", "orders")
    assert UUID(message.message_id).version == 7, "`silbo why` finds it by its time"
    assert message.payload["event_timestamp"].endswith("Z")
    assert make_message("order.paid", {"event_id": IDENTITY}).message_id == IDENTITY


@pytest.mark.parametrize(
    ("name", "payload", "problem"),
    [
        ("order.pad", {}, "'order.pad': shop.web:dispatcher has no such name; did you mean 'order.paid'?"),
        ("cart.emptied", {"cart": "x"}, "shop.events.CartEmptied is a domain event, and stays in its process"),
        ("order.paid", {}, "field 'order': missing; events of this name are shop.events.OrderPaid"),
        ("order.paid", {"order": "7"}, "field 'order': Expected `int`, got `str`"),
        (
            "order.paid",
            {"order": 7, "tag": []},
            "field 'tag': shop.events.OrderPaid has no such field; did you mean 'tags'?",
        ),
    ],
)
async def test_message_that_does_not_fit_is_refused(
    folder: Path, name: str, payload: dict[str, object], problem: str
) -> None:
    async with open_app("shop.web:dispatcher", app_dir=str(folder)) as app:
        with pytest.raises(MessageRefused) as caught:
            make_message(name, payload, app=app)
    assert problem.lower() in str(caught.value).lower()


class Struct(ECSTEvent, msgspec.Struct):
    a: int
    b: str = msgspec.field(default="", name="B")


class Model(NotificationEvent, pydantic.BaseModel):
    user: int = pydantic.Field(alias="userId")
    note: str = pydantic.Field(default="", alias="Note")


class Open(NotificationEvent, pydantic.BaseModel):
    model_config = {"extra": "allow"}
    user: int = 0


class Choices(NotificationEvent, pydantic.BaseModel):
    user: int = pydantic.Field(default=0, validation_alias=pydantic.AliasChoices("user", "who"))


class Plain(NotificationEvent):
    def __init__(self, a: int) -> None:
        self.a = a


@pytest.mark.parametrize(
    ("cls", "read", "misspelt"),
    [
        (Struct, {"a": 1, "B": "x"}, {"a": 1, "b": "x"}),
        (Model, {"userId": 1, "Note": "x"}, {"userId": 1, "note": "x"}),
        (Open, {"any": 1}, None),
        (Choices, {"who": 1}, None),
        (Plain, {"a": 1}, None),
    ],
)
def test_field_is_refused_that_a_consumer_would_ignore(
    cls: type[Any], read: dict[str, object], misspelt: dict[str, object] | None
) -> None:
    """Also the name of an attribute that has another one on the wire."""
    dispatcher = AsyncEventDispatcher(names=[EventName("it", cls)])
    app = App(reference="x:y", dispatchers={"x:y": dispatcher}, consumers=(), plugins=())
    assert make_message("it", read, app=app).message_name == "it"
    if misspelt is not None:
        with pytest.raises(MessageRefused, match="has no such field; (did you mean|known)"):
            make_message("it", misspelt, app=app)


async def test_kind_that_the_class_does_not_have_is_refused(folder: Path) -> None:
    async with open_app("shop.web:dispatcher", app_dir=str(folder)) as app:
        with pytest.raises(MessageRefused, match="of the kind notification, not ecst"):
            make_message("order.paid", {"order": 7}, kind="ecst", app=app)
        assert make_message("order.payed", {"any": 1}, app=app).payload["any"] == 1, "a name that a listener alone has"


def test_pattern_is_no_name() -> None:
    with pytest.raises(NameInvalid):
        make_message("order.*", {})
