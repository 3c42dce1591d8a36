"""The codec: every class of every kind leaves as its declared fields and comes back equal."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest
import whistle

from silbo.dispatch.dispatcher import AsyncEventDispatcher
from silbo.errors import EnvelopeConflict, MessageInvalid, MessageRefused
from silbo.event import ECSTEvent, Event, NotificationEvent
from silbo.message import Message
from silbo.names import EventName
from silbo.wire.decode import to_event
from silbo.wire.encode import to_message
from silbo.wire.formats import CLOUDEVENTS, DIATOR, JSON
from tests.support.wire_classes import (
    ORIGIN,
    Address,
    Card,
    Color,
    Joined,
    Level,
    Opaque,
    Person,
    Size,
    Wallet,
    message,
    payload_of,
    wire,
)

FORMATS = {"json": JSON, "diator": DIATOR, "cloudevents": CLOUDEVENTS}


# -- every library, every kind --------------------------------------------------------------------------------


SAMPLE: dict[str, Any] = {
    "user": UUID(int=5),
    "at": datetime(2026, 3, 7, 9, 26, 2, 588855, tzinfo=UTC),
    "local": datetime(2026, 3, 7, 9, 26, tzinfo=timezone(timedelta(hours=2))),
    "naive": datetime(2026, 3, 7, 9, 26),
    "day": date(2026, 3, 7),
    "hour": time(9, 26, 1),
    "every": timedelta(days=-1, microseconds=3),
    "price": Decimal("1.10"),
    "color": Color.MIX,
    "size": Size.BIG,
    "level": Level.LOW,
    "raw": b"\x00\xff",
    "tags": {"a", "b"},
    "pair": (1, "x"),
    "limits": {1: 0.5},
    "owners": {UUID(int=1): [date(2020, 1, 1)]},
    "address": Address("Gomera", (28.1, -17.1)),
    "wallets": [Wallet(Decimal("0.10"))],
    "card": Card(5),
    "person": Person(fullName="x", photo=b"\xfe"),
    "note": None,
    "big": 10**30,
}


def with_fields(decorate: Any, *bases: type, **options: Any) -> type:
    class Sample(*bases):
        user: UUID
        at: datetime
        local: datetime
        naive: datetime
        day: date
        hour: time
        every: timedelta
        price: Decimal
        color: Color
        size: Size
        level: Level
        raw: bytes
        tags: set[str]
        pair: tuple[int, str]
        limits: dict[int, float]
        owners: dict[UUID, list[date]]
        address: Address
        wallets: list[Wallet]
        card: Card
        person: Person
        note: str | None
        big: int
        plan: str = "free"

    return decorate(Sample, **options)


def plain_init(cls: Any) -> Any:
    def init(self: Any, user: UUID, **others: Any) -> None:
        self.user = user
        self.__dict__.update({"plan": "free"} | others)

    cls.__init__ = init
    return cls


def as_it_is(cls: Any) -> Any:
    return cls


STYLES: dict[str, Any] = {
    "dataclass": lambda *bases: with_fields(dataclass, *bases),
    "frozen dataclass": lambda *bases: with_fields(dataclass, *bases, frozen=True),
    "slots dataclass": lambda *bases: with_fields(dataclass, *bases, slots=True),
    "frozen slots kw_only dataclass": lambda *bases: with_fields(
        dataclass, *bases, frozen=True, slots=True, kw_only=True
    ),
    "attrs": lambda *bases: with_fields(attrs.define, *bases),
    "frozen attrs": lambda *bases: with_fields(attrs.frozen, *bases, kw_only=True),
    "dict attrs": lambda *bases: with_fields(attrs.define, *bases, slots=False),
    "struct": lambda *bases: with_fields(as_it_is, *bases, msgspec.Struct),
    "frozen struct": lambda *bases: with_fields(as_it_is, *bases, FrozenStruct),
    "pydantic": lambda *bases: with_fields(as_it_is, *bases, Model),
    "frozen pydantic": lambda *bases: with_fields(as_it_is, *bases, FrozenModel),
    "plain": lambda *bases: with_fields(plain_init, *bases),
}


class FrozenStruct(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)


class FrozenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, strict=True, extra="forbid", arbitrary_types_allowed=True)


BASES: dict[str, tuple[type, ...]] = {
    "notification": (NotificationEvent,),
    "ecst": (ECSTEvent,),
    "event": (Event,),
    "whistle": (whistle.Event,),
    "foreign": (),
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bases", BASES.values(), ids=BASES)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_class_of_every_kind_comes_back_equal(style: Any, bases: tuple[type, ...], form: Any) -> None:
    """The five libraries, as silbo's kinds and as a host's own classes: whoever dispatches them can bridge them."""
    cls = style(*bases)
    event = cls(**SAMPLE)
    sent = to_message(event, name="user.joined", kind="ecst")
    again = to_event(form.decode(form.encode(sent, ORIGIN)), cls)
    assert type(again) is cls
    assert {name: getattr(again, name) for name in SAMPLE} == SAMPLE
    assert again.plan == "free"
    if hasattr(again, "__dict__"):
        assert str(again.event_id) == sent.message_id == sent.payload["event_id"]
        assert again.event_timestamp == datetime.fromisoformat(sent.payload["event_timestamp"])
    if issubclass(cls, NotificationEvent | ECSTEvent):
        assert (again.event_id, again.event_timestamp) == (event.event_id, event.event_timestamp)


@pytest.mark.parametrize(
    ("style", "dispatcher"),
    [(style, AsyncEventDispatcher) for style in STYLES]
    # Whistle assigns its marks, which a frozen class and pydantic do not let it
    + [(style, whistle.AsyncEventDispatcher) for style in STYLES if "frozen" not in style and style != "pydantic"],
)
async def test_a_dispatch_leaves_nothing_in_the_payload(style: str, dispatcher: Any) -> None:
    """The marks of the envelope, and attributes with a private name, stay in the process."""
    event = STYLES[style](ECSTEvent)(**SAMPLE)
    before = payload_of(event)
    event.__dict__["_private"] = object()
    await dispatcher().adispatch("user.joined", event)
    assert event.name == "user.joined"
    assert payload_of(event) == before
    assert set(before) == {*SAMPLE, "plan"}


async def test_an_event_that_stock_whistle_dispatched_leaves_as_well() -> None:
    """The bridge may be a listener of a dispatcher that is not silbo's."""

    @dataclass
    class Joined(NotificationEvent):
        user_id: int

    event = Joined(5)
    await whistle.AsyncEventDispatcher().adispatch("user.joined", event)
    assert payload_of(event) == {"user_id": 5}
    assert to_event(wire(event), Joined) == event


# -- the message ----------------------------------------------------------------------------------------------


JOINED = EventName("user.joined", Joined)


def test_a_message_names_the_event_its_kind_and_this_sending() -> None:
    event = Joined(5)
    first = to_message(event, name=JOINED, kind="notification", key="5", to="users", version=3)
    again = to_message(event, name=JOINED, kind="notification")
    assert (first.message_type, first.message_name, first.class_name) == ("notification_event", "user.joined", "Joined")
    assert type(first.message_name) is str
    assert first.message_id == again.message_id == str(event.event_id)
    assert (first.key, first.to, first.headers["version"]) == ("5", "users", "3")
    assert (again.key, again.to, again.headers["version"]) == (None, None, "1")
    assert first.headers["publication"] != again.headers["publication"]
    assert list(first.headers) == ["publication", "version", "key"]


def test_the_payload_begins_with_id_and_time_then_fields_in_declared_order() -> None:
    payload = to_message(Joined(5), name=JOINED, kind="notification").payload
    assert list(payload) == ["event_id", "event_timestamp", "user_id", "tags"]
    assert payload["event_timestamp"].endswith("Z")


def test_a_message_is_a_snapshot() -> None:
    """A listener's later changes, however deep, do not reach a message that is on its way."""
    event = Joined(5, [["a"]])
    sent = to_message(event, name=JOINED, kind="notification")
    before = copy.deepcopy(sent.payload)
    event.user_id = 6
    event.tags[0].append("b")
    event.tags.append([])
    assert sent.payload == before


def test_an_event_shares_nothing_with_its_message() -> None:
    """Each attempt gets an event of its own."""
    sent = message(user_id=5, tags=[["a"]], extra={"x": [1]})
    for cls in (Joined, Event, None):
        event = to_event(sent, cls)
        holder = event.payload if cls is None else vars(event)
        holder["tags"][0].append("b")
        holder.get("extra", {"x": []})["x"].append(2)
    assert sent.payload == {"user_id": 5, "tags": [["a"]], "extra": {"x": [1]}}


@pytest.mark.parametrize("name", [5, ("a", "b"), None, Joined])
def test_only_a_string_names_a_message(name: Any) -> None:
    with pytest.raises(MessageRefused, match="string"):
        to_message(Joined(5), name=name, kind="notification")


def test_an_enum_of_strings_is_a_name() -> None:
    class Names(str, Enum):  # noqa: UP042  # its str() is not its value
        JOINED = "user.joined"

    assert to_message(Joined(5), name=Names.JOINED, kind="notification").message_name == "user.joined"


# -- the event's id and time ----------------------------------------------------------------------------------


@dataclass
class Foreign:
    user_id: int


def test_an_event_without_an_id_gets_one_for_each_message() -> None:
    event = Foreign(5)
    first, second = (to_message(event, name="a", kind="ecst") for _ in range(2))
    assert first.message_id == first.payload["event_id"] != second.message_id
    assert UUID(first.message_id).version == 7
    assert abs(datetime.fromisoformat(first.payload["event_timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert vars(event) == {"user_id": 5}
    again = to_event(first, Foreign)
    assert (again, str(again.event_id)) == (event, first.message_id)


def test_a_class_may_declare_id_and_time_as_fields() -> None:
    """As Diator's do; a naive time of theirs is UTC."""

    @dataclass(frozen=True, kw_only=True)
    class Declared(NotificationEvent):
        event_id: UUID = field(default_factory=uuid4)
        event_timestamp: datetime = datetime(2023, 3, 6, 12, 11, 35)
        user_id: int

    event = Declared(user_id=5)
    sent = wire(event)
    assert list(sent.payload) == ["event_id", "event_timestamp", "user_id"]
    assert (sent.message_id, sent.payload["event_timestamp"]) == (str(event.event_id), "2023-03-06T12:11:35Z")
    again = to_event(sent, Declared)
    assert again == dataclasses.replace(event, event_timestamp=datetime(2023, 3, 6, 12, 11, 35, tzinfo=UTC))


def test_a_declared_id_comes_back_as_its_annotation_says() -> None:
    @dataclass
    class Textual(ECSTEvent):
        event_id: str  # type: ignore[assignment]

    event = Textual(str(UUID(int=7)))
    assert to_event(wire(event), Textual) == event


def test_id_and_time_may_be_text_and_have_names_of_their_own() -> None:
    @dataclass
    class Legacy:
        id: str = field(metadata={"wire": "event_id"})
        at: str = field(metadata={"wire": "event_timestamp"})

    event = Legacy(str(UUID(int=7)), "2023-03-06T14:11:35+02:00")
    sent = wire(event)
    assert sent.payload == {"event_id": event.id, "event_timestamp": "2023-03-06T12:11:35Z"}
    assert to_event(sent, Legacy) == Legacy(event.id, "2023-03-06T12:11:35Z")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("event_id", 5),
        ("event_id", "x"),
        ("event_timestamp", 5.0),
        ("event_timestamp", "soon"),
        ("event_timestamp", "0001-01-01T00:00:00+14:00"),
    ],
)
def test_an_id_or_time_that_is_none_is_refused(attribute: str, value: Any) -> None:
    event = Event()
    event.__dict__[attribute] = value
    with pytest.raises(MessageRefused) as caught:
        to_message(event, name="a", kind="ecst")
    assert caught.value.field == attribute


def test_a_message_without_id_and_time_in_its_payload_is_named_by_its_message_id() -> None:
    """So a bare publisher need not say it twice."""
    sent = message(user_id=5)
    event = to_event(sent, Joined)
    assert str(event.event_id) == sent.message_id
    assert event.event_timestamp.tzinfo is UTC


def test_a_message_made_by_hand_that_holds_no_json_is_message_invalid() -> None:
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(user_id=Opaque()), Joined)
    assert caught.value.field == "payload"


@pytest.mark.parametrize(
    ("payload", "wrong"),
    [
        ({"event_id": "x"}, "payload.event_id"),
        ({"event_id": 5}, "payload.event_id"),
        ({"event_id": None}, "payload.event_id"),
        ({"event_timestamp": "soon"}, "payload.event_timestamp"),
        ({"event_timestamp": None}, "payload.event_timestamp"),
        ({"event_timestamp": "0001-01-01T00:00:00+14:00"}, "payload.event_timestamp"),
    ],
)
@pytest.mark.parametrize("cls", [None, Joined, Event])
def test_a_wrong_id_or_time_is_named(cls: type | None, payload: dict[str, Any], wrong: str) -> None:
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(user_id=5, **payload), cls)
    assert caught.value.field == wrong


# -- without a class ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message_type", "cls"), [("notification_event", NotificationEvent), ("ecst_event", ECSTEvent)]
)
def test_an_unknown_name_arrives_as_its_kind_with_the_payload(message_type: str, cls: type) -> None:
    sent = Message(message_type, "never.heard.of", str(uuid4()), {"user_id": 5})
    event = to_event(sent, None)
    assert type(event) is cls
    assert event.payload == {"user_id": 5, "event_id": sent.message_id}
    assert str(event.event_id) == sent.message_id


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(MessageInvalid) as caught:
        to_event(Message("domain_event", "a", str(uuid4()), {}), None)
    assert caught.value.field == "message_type"


def test_an_event_that_arrived_without_a_class_leaves_as_it_came() -> None:
    """A program that passes on what it does not know does not wrap it once more."""
    sent = wire(Joined(5, [["a"]]))
    assert wire(to_event(sent, None)).payload == sent.payload


# -- names on the wire ----------------------------------------------------------------------------------------


@dataclass
class NamedDataclass(ECSTEvent):
    name_: str = field(metadata={"wire": "name"})


@attrs.define
class NamedAttrs(ECSTEvent):
    name_: str = attrs.field(metadata={"wire": "name"})


class NamedStruct(ECSTEvent, msgspec.Struct):
    name_: str = msgspec.field(name="name")


class RenamedStruct(ECSTEvent, msgspec.Struct, rename=lambda name: name.rstrip("_")):
    name_: str


class NamedModel(ECSTEvent, pydantic.BaseModel):
    name_: str = pydantic.Field(alias="name")


class BothAliases(ECSTEvent, pydantic.BaseModel):
    name_: str = pydantic.Field(serialization_alias="name", validation_alias="nombre")


class ChosenAlias(ECSTEvent, pydantic.BaseModel):
    name_: str = pydantic.Field(
        serialization_alias="name", validation_alias=pydantic.AliasChoices(pydantic.AliasPath("a", 0), "n")
    )


class GeneratedAlias(ECSTEvent, pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=lambda name: name.rstrip("_"))
    name_: str


@pytest.mark.parametrize(
    ("cls", "argument"),
    [
        (NamedDataclass, "name_"),
        (NamedAttrs, "name_"),
        (NamedStruct, "name_"),
        (RenamedStruct, "name_"),
        (NamedModel, "name"),
        (BothAliases, "nombre"),
        (ChosenAlias, "n"),
        (GeneratedAlias, "name"),
    ],
)
async def test_a_field_called_name_on_the_wire_comes_back(cls: Any, argument: str) -> None:
    """The four spellings that EnvelopeConflict shows, and the variants of pydantic and msgspec."""
    event = cls(**{argument: "Ana"})
    await AsyncEventDispatcher().adispatch("user.renamed", event)
    sent = wire(event)
    assert sent.payload["name"] == "Ana"
    assert to_event(sent, cls).name_ == "Ana"


def test_an_error_names_the_field_as_it_is_on_the_wire() -> None:
    with pytest.raises(MessageRefused) as refused:
        to_message(NamedDataclass(math.nan), name="a", kind="ecst")  # type: ignore[arg-type]
    assert refused.value.field == "name"
    with pytest.raises(MessageInvalid) as invalid:
        to_event(message(name=5), NamedDataclass)
    assert invalid.value.field == "payload.name"


def test_a_field_that_a_dispatch_would_overwrite_is_refused() -> None:
    """Also on a stock Whistle dispatcher, which overwrites it without a word."""

    @dataclass
    class Renamed(Event):
        name: str

    with pytest.raises(MessageRefused, match="metadata") as caught:
        to_message(Renamed("Ana"), name="a", kind="ecst")
    assert isinstance(caught.value.__cause__, EnvelopeConflict)


def test_two_fields_with_one_name_on_the_wire_are_refused() -> None:
    @dataclass
    class Twice(Event):
        a: int = 1
        b: int = field(default=2, metadata={"wire": "a"})

    with pytest.raises(MessageRefused, match="'a' and 'b' are both 'a'"):
        to_message(Twice(), name="x", kind="ecst")
    with pytest.raises(MessageInvalid, match="'a' and 'b' are both 'a'"):
        to_event(message(a=1), Twice)
