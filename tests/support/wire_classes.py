"""Tools of the wire's tests: sending an event through a format, and event classes with fields of many types."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Any
from uuid import uuid4

import attrs
import msgspec
import pydantic

from silbo.event import NotificationEvent
from silbo.message import Message, Origin
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON

ORIGIN = Origin("web", "0" * 32)


def wire(event: Any, form: Any = JSON) -> Message:
    """An event as another process sees it."""
    sent = to_message(event, name="user.joined", kind="ecst")
    return form.decode(form.encode(sent, ORIGIN))


def payload_of(event: Any) -> dict[str, Any]:
    payload = dict(to_message(event, name="user.joined", kind="ecst").payload)
    del payload["event_id"], payload["event_timestamp"]
    return payload


def message(**payload: Any) -> Message:
    return Message("ecst_event", "user.joined", str(uuid4()), payload)


class Color(Enum):
    RED = "red"
    MIX = 7


class Size(StrEnum):
    BIG = "big"


class Level(IntEnum):
    LOW = 1


@dataclass
class Address:
    city: str
    geo: tuple[float, float]
    seal: bytes = b"\x00\xff"


@attrs.define
class Wallet:
    amount: Decimal


class Card(msgspec.Struct, rename="camel"):
    card_number: int


class Person(pydantic.BaseModel):
    full_name: str = pydantic.Field(alias="fullName")
    photo: bytes


@dataclass
class Joined(NotificationEvent):
    user_id: int
    tags: list[list[str]] = field(default_factory=list)


class Opaque:
    pass


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    name: str
    tail: int
