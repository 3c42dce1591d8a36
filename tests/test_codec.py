"""The codec: every kind of class leaves as its declared fields and comes back equal, and errors name the field."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import weakref
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypedDict
from uuid import UUID, uuid4

import attrs
import msgspec
import pydantic
import pytest
import whistle
from hypothesis import given, settings
from hypothesis import strategies as st

from silbo.codec import to_event, to_message
from silbo.dispatcher import AsyncEventDispatcher
from silbo.errors import EnvelopeConflict, MessageInvalid, MessageRefused
from silbo.event import ECSTEvent, Event, NotificationEvent
from silbo.formats import CLOUDEVENTS, DIATOR, JSON
from silbo.message import Message, Origin
from silbo.names import EventName
from silbo.payload import MAX_DEPTH

ORIGIN = Origin("web", "0" * 32)
FORMATS = {"json": JSON, "diator": DIATOR, "cloudevents": CLOUDEVENTS}


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


# -- every library, every kind -------------------------------------------------------------------------------


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
    """What the envelope carries, and what a host keeps under a private name, stays in the process."""
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


# -- the message ---------------------------------------------------------------------------------------------


@dataclass
class Joined(NotificationEvent):
    user_id: int
    tags: list[list[str]] = field(default_factory=list)


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
    """What a listener changes later, however deep, does not reach what is on its way."""
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


# -- the event's id and time ---------------------------------------------------------------------------------


@dataclass
class Foreign:
    user_id: int


def test_an_event_without_an_id_gets_one_for_each_message() -> None:
    event = Foreign(5)
    first, second = (to_message(event, name="a", kind="ecst") for _ in range(2))
    assert first.message_id == first.payload["event_id"] != second.message_id
    assert UUID(first.message_id).version == 4
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


# -- without a class -----------------------------------------------------------------------------------------


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


# -- names on the wire ---------------------------------------------------------------------------------------


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


# -- what stays ----------------------------------------------------------------------------------------------


def test_private_fields_and_class_variables_stay_in_the_process() -> None:
    @dataclass
    class Secretive(Event):
        user_id: int
        _cached: str = "secret"
        _shared: str = field(default="public", metadata={"wire": "shared"})
        table: ClassVar[str] = "users"
        seed: InitVar[int] = 0

    assert payload_of(Secretive(5)) == {"user_id": 5, "shared": "public"}


def test_excluded_and_computed_fields_and_extras_of_a_model_stay() -> None:
    class Account(ECSTEvent, pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")
        user_id: int
        card: str
        password: str = pydantic.Field("x", exclude=True)

        @pydantic.computed_field
        def double(self) -> int:
            return 2 * self.user_id

        @pydantic.field_serializer("card")
        def mask(self, card: str) -> str:
            return f"***{card[-2:]}"

    event = Account(user_id=5, card="12345678", password="secret", extra=1)  # type: ignore[call-arg]
    event.__dict__["dispatcher"] = object()
    assert payload_of(event) == {"user_id": 5, "card": "***78"}


def test_a_field_that_was_never_set_is_left_out() -> None:
    @dataclass
    class Partial(Event):
        user_id: int
        later: int = field(init=False)

    class Unset(Event, msgspec.Struct):
        user_id: int
        later: int | msgspec.UnsetType = msgspec.UNSET

    for cls in (Partial, Unset):
        assert payload_of(cls(5)) == {"user_id": 5}
        again = to_event(wire(cls(5)), cls)
        assert (again.user_id, getattr(again, "later", msgspec.UNSET)) == (5, msgspec.UNSET)


# -- what can't be written -----------------------------------------------------------------------------------


class Opaque:
    pass


LOOP: list[Any] = []
LOOP.append(LOOP)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (math.nan, ""),
        (-math.inf, ""),
        (Decimal("NaN"), ""),
        (Decimal("Infinity"), ""),
        ([1, {"a": (math.nan,)}], "[1].a[0]"),
        (Address("x", (math.inf, 1.0)), ".geo[0]"),
        (Wallet(Decimal("sNaN")), ".amount"),
        ({"w": [Card(math.nan)]}, ".w[0].cardNumber"),  # type: ignore[arg-type]
        ("\udc80", ""),
        (["\udc80"], "[0]"),
        ({"\udc80": 1}, ".\udc80"),
        (10**5000, ""),
        (Opaque(), ""),
        ([{"x": Opaque()}], "[0].x"),
        (Opaque, ""),
        (1j, ""),
        ({None: 1}, ".None"),
        ({True: 1}, ".True"),
        ({(1, 2): 3}, ".(1, 2)"),
        ({1: "a", "1": "b"}, ""),
        (datetime.max.replace(tzinfo=timezone(timedelta(seconds=-1))), ""),
        (LOOP, "[0]" * (MAX_DEPTH - 1)),
        (deep(MAX_DEPTH), "[0]" * (MAX_DEPTH - 1)),
    ],
    ids=range(23),
)
@pytest.mark.parametrize("cls", [dataclasses.make_dataclass("D", ["x"]), Event])
def test_what_json_can_not_carry_is_refused_with_its_place(cls: Any, value: Any, where: str) -> None:
    """Never written as null, never as something that can't be read back."""
    event = cls(value) if cls is not Event else Event()
    event.x = value
    with pytest.raises(MessageRefused) as caught:
        to_message(event, name="a", kind="ecst")
    assert caught.value.field == f"x{where}"
    assert caught.value.name == "a"


def test_what_is_as_deep_as_allowed_goes_through() -> None:
    event = Event()
    event.x = deep(MAX_DEPTH - 1)  # type: ignore[attr-defined]
    assert to_event(wire(event), Event).x == event.x  # type: ignore[attr-defined]


# -- values --------------------------------------------------------------------------------------------------


class Text(str):
    pass


class Whole(int):
    pass


class Ratio(float):
    pass


class Moment(datetime):
    pass


class Id(UUID):
    pass


class Money(Decimal):
    pass


class Point(NamedTuple):
    x: int
    y: int = 0


class Options(TypedDict):
    a: int


class Tagged(msgspec.Struct, tag=True):
    a: int


class Row(msgspec.Struct, array_like=True):
    a: int
    b: str


class Pair(Enum):
    A = (1, 2)
    ONE = 1
    TRUE = True


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    name: str
    tail: int


@pytest.mark.parametrize(
    ("hint", "value", "written"),
    [
        (Text, Text("x"), "x"),
        (Whole, Whole(3), 3),
        (Ratio, Ratio(0.5), 0.5),
        (Moment, Moment(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00Z"),
        (Id, Id(int=1), str(UUID(int=1))),
        (Money, Money("1.50"), "1.50"),
        (EventName, EventName("user.joined"), "user.joined"),
        (Point, Point(1, 2), [1, 2]),
        (Options, {"a": 1}, {"a": 1}),
        (Tagged, Tagged(1), {"type": "Tagged", "a": 1}),
        (Row, Row(1, "x"), [1, "x"]),
        (Pair, Pair.A, [1, 2]),
        (Pair, Pair.ONE, 1),
        (UUID | int | str, UUID(int=1), str(UUID(int=1))),
        (UUID | int | str, "x", "x"),
        (UUID | int | str, 5, 5),
        (date | datetime, datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
        (Cat | Dog, Dog("x", 3), {"name": "x", "tail": 3}),
        (Cat | Dog, Cat("x"), {"name": "x"}),
        (Annotated[Cat | Dog | None, "pet"], None, None),
        (list[Cat | Dog], [Dog("x", 3), Cat("y")], [{"name": "x", "tail": 3}, {"name": "y"}]),
        (dict[str, set[Pair]], {"a": {Pair.ONE}}, {"a": [1]}),
        (bytearray, bytearray(b"x"), "eA=="),
        (frozenset[int], frozenset([1]), [1]),
        (list[Any], [1, "x", None], [1, "x", None]),
        (object, {"x": [1]}, {"x": [1]}),
        (datetime, datetime(1930, 1, 1, tzinfo=timezone(timedelta(minutes=19, seconds=32))), "1929-12-31T23:40:28Z"),
        (float, 1.0, 1.0),
        (str, "kénd", "kénd"),
        (int, 10**30, 10**30),
        (Final[int], 5, 5),
        (Literal["x", 5], 5, 5),
        (Decimal | UUID, Decimal("1E+2"), "1E+2"),
    ],
    ids=range(33),
)
def test_a_value_is_written_as_json_and_read_by_its_annotation(hint: Any, value: Any, written: Any) -> None:
    cls = dataclasses.make_dataclass("Holder", [("x", hint)], bases=(Event,))
    sent = wire(cls(value))
    assert sent.payload["x"] == written
    again = to_event(sent, cls)
    assert again.x == value
    assert type(again.x) is type(value)


def test_of_a_union_that_nothing_gives_back_exactly_the_first_that_fits_counts() -> None:
    """As from another program, that writes its numbers in other words."""
    cls = dataclasses.make_dataclass("Holder", [("x", UUID | Decimal | date)])
    assert to_event(message(x="00000000000000000000000000000001"), cls).x == UUID(int=1)
    with pytest.raises(MessageInvalid, match=r"Invalid UUID; .*Invalid.*; .*Invalid") as caught:
        to_event(message(x="y"), cls)
    assert caught.value.field == "payload.x"


def test_a_naive_datetime_stays_naive() -> None:
    """No zone is guessed: what was written without one is read without one."""
    cls = dataclasses.make_dataclass("Holder", [("x", datetime)])
    assert to_event(wire(cls(datetime(2026, 1, 2, 3))), cls).x == datetime(2026, 1, 2, 3)


PLAIN_VALUES = st.one_of(
    st.uuids(),
    st.datetimes(),
    st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.just(UTC) | st.timezones()),
    st.dates(),
    st.timedeltas(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.binary(max_size=8),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.booleans(),
    st.none(),
    st.sampled_from([*Color, *Size, *Level]),
)


@settings(deadline=None, max_examples=300)
@given(value=PLAIN_VALUES)
def test_any_value_comes_back_equal(value: Any) -> None:
    cls = dataclasses.make_dataclass("Holder", [("x", type(value)), ("xs", list[type(value)])], bases=(ECSTEvent,))
    again = to_event(wire(cls(value, [value, value])), cls)
    if isinstance(value, datetime) and value.tzinfo is not None:  # in a repeated hour no two zones are ever equal
        assert again.x.astimezone(UTC) == again.xs[1].astimezone(UTC) == value.astimezone(UTC)
    else:
        assert again == cls(value, [value, value])
    assert type(again.x) is type(value)


# -- rebuilding ----------------------------------------------------------------------------------------------


def test_a_class_is_rebuilt_through_its_constructor() -> None:
    """Its ``__post_init__`` runs; fields that are not its arguments get what was sent."""

    @dataclass
    class Counted(Event):
        user_id: int
        visits: int = field(init=False, default=0)
        ready: bool = field(init=False, default=False, metadata={"wire": "is_ready"})

        def __post_init__(self) -> None:
            self._checked = True

    event = Counted(5)
    event.visits, event.ready = 3, True
    again = to_event(wire(event), Counted)
    assert (again.visits, again.ready, again._checked) == (3, True, True)


def test_new_fields_get_their_defaults_and_unknown_ones_are_ignored() -> None:
    """Programs of different ages understand each other."""
    for cls in (
        dataclasses.make_dataclass("D", [("a", int), ("b", int, 2)]),
        attrs.make_class("A", {"a": attrs.field(type=int), "b": attrs.field(type=int, default=2)}),
        msgspec.defstruct("S", [("a", int), ("b", int, 2)], forbid_unknown_fields=True),
        pydantic.create_model("P", __config__={"extra": "forbid"}, a=int, b=(int, 2)),
    ):
        again: Any = to_event(message(a=1, c=3), cls)
        assert (again.a, again.b) == (1, 2)


@pytest.mark.parametrize("library", ["dataclass", "attrs", "struct", "pydantic"])
@pytest.mark.parametrize(
    ("payload", "wrong"),
    [
        ({}, "payload.user_id"),
        ({"user_id": "5"}, "payload.user_id"),
        ({"user_id": 5, "address": {"city": "x"}}, "payload.address.geo"),
        ({"user_id": 5, "address": {"city": "x", "geo": [1, "x"]}}, "payload.address.geo[1]"),
    ],
    ids=["missing", "type", "nested missing", "nested type"],
)
def test_a_field_that_does_not_fit_is_named(library: str, payload: dict[str, Any], wrong: str) -> None:
    cls: Any = {
        "dataclass": dataclasses.make_dataclass("D", [("user_id", int), ("address", Address | None, None)]),
        "attrs": attrs.make_class(
            "A", {"user_id": attrs.field(type=int), "address": attrs.field(type=Address | None, default=None)}
        ),
        "struct": msgspec.defstruct("S", [("user_id", int), ("address", Address | None, None)]),
        "pydantic": pydantic.create_model(
            "P", __config__={"strict": True}, user_id=int, address=(Address | None, None)
        ),
    }[library]
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(**payload), cls)
    assert (caught.value.field or "").startswith(wrong if library != "pydantic" else wrong.removesuffix("[1]"))


def test_bytes_that_are_no_base64_are_named_also_in_a_model() -> None:
    """pydantic alone would take the text itself for the bytes."""

    class Photo(Event, pydantic.BaseModel):
        raw: bytes
        people: list[Person] = []

    with pytest.raises(MessageInvalid) as caught:
        to_event(message(raw="%"), Photo)
    assert caught.value.field == "payload.raw"
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(raw="", people=[{"fullName": "x", "photo": "%"}]), Photo)
    assert (caught.value.field or "").startswith("payload.people")


def test_a_constructor_that_refuses_is_message_invalid_with_its_cause() -> None:
    @dataclass
    class Positive(Event):
        amount: int

        def __post_init__(self) -> None:
            if self.amount < 0:
                raise LookupError("below zero")

    with pytest.raises(MessageInvalid, match="below zero") as caught:
        to_event(message(amount=-1), Positive)
    assert isinstance(caught.value.__cause__, LookupError)


def test_pydantics_own_conversions_and_validators_count() -> None:
    class Checked(Event, pydantic.BaseModel):
        user_id: int
        site: pydantic.HttpUrl
        age: Annotated[int, pydantic.Field(gt=0)] = 1

    assert to_event(message(user_id="5", site="https://example.org"), Checked).user_id == 5
    with pytest.raises(MessageInvalid, match="greater than 0") as caught:
        to_event(message(user_id=5, site="https://example.org", age=0), Checked)
    assert caught.value.field == "payload.age"


def test_msgspecs_constraints_count() -> None:
    cls = dataclasses.make_dataclass("D", [("age", Annotated[int, msgspec.Meta(gt=0)])])
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(age=0), cls)
    assert caught.value.field == "payload.age"


def test_an_argument_that_no_message_has_leaves_the_constructor_out() -> None:
    @dataclass
    class Seeded(Event):
        user_id: int
        seed: InitVar[int]

        def __post_init__(self, seed: int) -> None:
            self.user_id += seed

    assert to_event(wire(Seeded(5, 2)), Seeded).user_id == 7


def test_classes_inside_of_functions_are_rebuilt_where_their_annotations_can_be_resolved() -> None:
    @dataclass
    class Inner:
        x: int

    @dataclass
    class Known(Event):
        user: UUID

    @dataclass
    class Unknown(Event):
        inner: Inner

    assert to_event(wire(Known(UUID(int=1))), Known).user == UUID(int=1)
    with pytest.raises(MessageInvalid, match=r"annotations of .*Unknown can't be resolved .*'Inner' is not defined"):
        to_event(wire(Unknown(Inner(1))), Unknown)


def test_an_annotation_that_json_can_not_give_is_a_clear_error() -> None:
    cls = dataclasses.make_dataclass("D", [("x", dict[int, Cat | Dog])])
    with pytest.raises(MessageInvalid, match="can't be read from JSON") as caught:
        to_event(message(x={}), cls)
    assert caught.value.field == "payload.x"
    with pytest.raises(MessageInvalid, match="Opaque can't be read from JSON") as caught:
        to_event(message(x={}), dataclasses.make_dataclass("D", [("x", Opaque)]))
    assert caught.value.field == "payload.x"


# -- plain classes -------------------------------------------------------------------------------------------


class Request(Event):
    """As in HARP's pages: a context, wrapped."""

    def __init__(self, context: UUID) -> None:
        super().__init__()
        self.context = context
        self.started = True


def test_a_plain_class_comes_back_through_its_init_with_all_its_attributes() -> None:
    event = Request(UUID(int=1))
    event.status = 404  # type: ignore[attr-defined]
    event.started = False
    event._private = object()  # type: ignore[attr-defined]
    again = to_event(wire(event), Request)
    assert (again.context, again.started, again.status) == (UUID(int=1), False, 404)
    assert not hasattr(again, "_private")


def test_a_plain_class_whose_init_asks_for_more_comes_back_without_it() -> None:
    class Booked(Event):
        amount: Decimal

        def __init__(self, service: object, amount: Decimal) -> None:
            self._service, self.amount = service, amount

    again = to_event(wire(Booked(object(), Decimal("1.10"))), Booked)
    assert again.amount == Decimal("1.10")
    assert not hasattr(again, "_service")


def test_positional_only_arguments_and_slots_of_a_plain_class() -> None:
    class Slotted(Event):
        __slots__ = ("user_id", "when")
        when: datetime

        def __init__(self, user_id: int, /) -> None:
            self.user_id = user_id

    event = Slotted(5)
    event.when = datetime(2026, 1, 2, tzinfo=UTC)
    again = to_event(wire(event), Slotted)
    assert (again.user_id, again.when) == (5, event.when)


def test_a_payload_can_not_hide_methods_or_marks_of_a_plain_class() -> None:
    """A payload is data of somebody else's; it does not take the place of code."""

    class Guarded(Event):
        @property
        def owner(self) -> str:
            return "host"

    sent = message(stop_propagation=1, dispatcher=2, name=3, owner=4, __class__=5, _x=6, note=7)
    event = to_event(sent, Guarded)
    assert {key for key in vars(event) if not key.startswith("event_")} == {"note"}
    assert event.owner == "host"


def test_an_attribute_that_can_not_be_written_names_itself() -> None:
    with pytest.raises(MessageRefused) as caught:
        to_message(Request(Opaque()), name="a", kind="ecst")  # type: ignore[arg-type]
    assert caught.value.field == "context"


# -- the knowledge about classes -----------------------------------------------------------------------------


def test_a_class_that_is_no_longer_used_is_forgotten() -> None:
    """Classes made at run time do not pile up, not even those whose annotations name themselves."""

    def use() -> weakref.ref[type]:
        @dataclass
        class Node(ECSTEvent):
            value: int
            parent: Any = None

        Node.__annotations__["parent"] = Node | None
        assert to_event(wire(Node(1)), Node) == Node(1)
        return weakref.ref(Node)

    kept = use()
    gc.collect()
    assert kept() is None


def test_a_subclass_does_not_inherit_what_is_known_about_its_base() -> None:
    @dataclass
    class Base(ECSTEvent):
        a: int

    assert payload_of(Base(1)) == {"a": 1}

    @dataclass
    class Derived(Base):
        b: int

    again = to_event(wire(Derived(1, 2)), Derived)
    assert (again.a, again.b) == (1, 2)


def test_what_a_decorator_copies_of_a_used_class_is_not_believed() -> None:
    class Base(ECSTEvent):
        a: int

    assert payload_of(Base()) == {}
    assert payload_of(dataclass(slots=True)(Base)(1)) == {"a": 1}


@pytest.mark.parametrize("cls", [int, dict, type, Decimal, Exception, whistle.Event, object])
def test_a_class_that_is_no_event_gives_an_object_or_message_invalid(cls: type) -> None:
    try:
        event = to_event(message(user_id=5), cls)
    except MessageInvalid:
        return
    assert isinstance(event, cls)


def test_instances_of_a_class_written_in_c_leave_too() -> None:
    assert json.loads(JSON.encode(to_message(Decimal(1), name="a", kind="ecst"), ORIGIN))["message_name"] == "a"
