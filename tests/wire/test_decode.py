"""Rebuilding: through the constructor where there is one to call, and errors that name the field."""

from __future__ import annotations

import dataclasses
import enum
import gc
import json
import weakref
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import (
    Annotated,
    Any,
    Generic,
    LiteralString,
    NamedTuple,
    NewType,
    NotRequired,
    Required,
    Self,
    TypedDict,
    TypeVar,
    TypeVarTuple,
    Union,
)
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
import whistle

from silbo.errors import ClassUnreadable, MessageInvalid, MessageRefused
from silbo.event import ECSTEvent, Event
from silbo.message import Origin
from silbo.wire.decode import check_class, to_event
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON
from tests.support.wire_classes import (
    ORIGIN,
    Address,
    Cat,
    Opaque,
    Person,
    message,
    payload_of,
    wire,
)

# -- rebuilding -----------------------------------------------------------------------------------------------


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


def test_a_frozen_class_gets_the_fields_that_are_not_arguments_too() -> None:
    @dataclass(frozen=True)
    class Counted(Event):
        visits: int = field(init=False, default=0)

    assert to_event(message(visits=3), Counted).visits == 3


def test_a_private_attribute_with_a_public_name_on_the_wire_comes_back() -> None:
    """attrs calls its argument differently from the attribute."""

    @attrs.frozen
    class Hidden(Event):
        _pin: int = attrs.field(metadata={"wire": "pin"}, validator=attrs.validators.gt(0))

    assert to_event(wire(Hidden(pin=7)), Hidden) == Hidden(pin=7)
    with pytest.raises(MessageInvalid, match="Hidden refuses it: ValueError: "):
        to_event(message(pin=-7), Hidden)


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
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(user_id=5, site="https://example.org", age=0), Checked)
    assert caught.value.field == "payload.age"
    assert isinstance(caught.value.__cause__, pydantic.ValidationError)


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
    for hint in (Opaque, list[Opaque], dict[tuple[int, int], int], Cat | Address | dict[str, int], bytes | str):
        cls = dataclasses.make_dataclass("D", [("x", hint)])
        with pytest.raises(ClassUnreadable, match="D can't be rebuilt from messages: x: "):
            check_class(cls)
        with pytest.raises(MessageInvalid, match="can't"):
            to_event(message(x={}), cls)


# -- plain classes --------------------------------------------------------------------------------------------


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
        __slots__ = ("note", "user_id", "when")
        when: datetime

        def __init__(self, user_id: int, /) -> None:
            self.user_id = user_id

    event = Slotted(5)
    event.when, event.note = datetime(2026, 1, 2, tzinfo=UTC), ["x"]
    again = to_event(wire(event), Slotted)
    assert (again.user_id, again.when, again.note) == (5, event.when, ["x"])


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


# -- the knowledge about classes ------------------------------------------------------------------------------


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

    assert type(to_event(message(a=1), Base)) is Base
    copied = dataclass(slots=True)(Base)
    assert to_event(message(a=1), copied) == copied(1)


@pytest.mark.parametrize("cls", [int, dict, type, Decimal, Exception, whistle.Event, object])
def test_a_class_that_is_no_event_gives_an_object_or_message_invalid(cls: type) -> None:
    try:
        event = to_event(message(user_id=5), cls)
    except MessageInvalid:
        return
    assert isinstance(event, cls)


def test_instances_of_a_class_written_in_c_leave_too() -> None:
    assert json.loads(JSON.encode(to_message(Decimal(1), name="a", kind="ecst"), ORIGIN))["message_name"] == "a"


# -- what an event can have, its nested classes can have ------------------------------------------------------


T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Changed(Generic[T, U]):
    old: T
    new: list[U]


@dataclass
class Swapped(Changed[U, T], Generic[T, U]):
    """The same parameters in another order: each class has its own."""

    more: T | None = None


@dataclass
class DateChanged(Swapped[date, UUID]):
    pass


Many = TypeVarTuple("Many")
Number = NewType("Number", int)


@dataclass
class Spread(ECSTEvent, Generic[T, *Many, U]):
    row: tuple[*Many]
    ends: dict[Number, tuple[T, U]]


class Half(Spread[int, date, *Many, UUID]): ...


class Fixed(Half[UUID]): ...


class OpenModel(ECSTEvent, pydantic.BaseModel, Generic[T]):
    items: list[T]


def test_many_type_parameters_at_once_are_resolved_through_the_bases() -> None:
    """And the key of a dict may be a NewType."""
    values: dict[str, Any] = {"row": (date(2026, 1, 2), UUID(int=1)), "ends": {Number(1): (2, UUID(int=3))}}
    event = Fixed(**values)
    found = to_event(JSON.decode(JSON.encode(to_message(event, name="x", kind="ecst"), ORIGIN)), Fixed)
    assert (found.row, found.ends) == (event.row, event.ends)


@pytest.mark.parametrize("cls", [Half, OpenModel])
def test_type_parameters_that_no_class_fixes_are_refused(cls: type) -> None:
    """A value would come back as its JSON, in silence; pydantic takes it."""
    with pytest.raises(ClassUnreadable):
        check_class(cls)
    check_class(OpenModel[UUID])


def test_type_parameters_are_resolved_through_the_bases() -> None:
    @dataclass
    class Event1(ECSTEvent, DateChanged):
        pass

    class Struct1(ECSTEvent, msgspec.Struct, Generic[T]):
        x: T

    class Struct2(Struct1[date]):
        pass

    @dataclass
    class Holder(ECSTEvent):
        inside: Changed[date, UUID]

    for event in (
        Event1(UUID(int=1), [date(2024, 1, 1)], date(2024, 1, 2)),
        Struct2(date(2024, 1, 1)),
        dataclasses.make_dataclass("D", [("x", DateChanged)])(DateChanged(UUID(int=1), [])),
        dataclasses.make_dataclass("D", [("x", Changed[date, UUID])])(Changed(date(2024, 1, 1), [UUID(int=1)])),
    ):
        assert to_event(wire(event), type(event)) == event
    for open_class in (Changed, Swapped, Struct1):
        with pytest.raises(ClassUnreadable, match="type parameter"):
            check_class(open_class)


@attrs.define
class Twice:
    a: int
    b: int = attrs.field(default=attrs.Factory(lambda self: self.a * 2, takes_self=True))


@dataclass
class Area:
    a: int
    factor: InitVar[int] = 3
    area: int = 0

    def __post_init__(self, factor: int) -> None:
        self.area = self.a * factor


class Tags(pydantic.RootModel[dict[str, date]]):
    pass


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    a: int


class ByPath(pydantic.BaseModel):
    a: int = pydantic.Field(0, validation_alias=pydantic.AliasPath("data", 0))


@dataclass
class Tree:
    at: date
    children: list[Tree]


@pytest.mark.parametrize(
    "value",
    [
        Twice(1, 7),
        Area(2, 5),
        Tags({"a": date(2024, 1, 1)}),
        Open(a=1, z=[5]),
        ByPath(data=[7]),
        Tree(date(2024, 1, 1), [Tree(date(2024, 1, 2), [])]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_class_inside_of_an_event_is_rebuilt_as_the_event_is(value: Any) -> None:
    for fields in (("x", type(value)), ("x", type(value) | None), ("x", Any)):
        if fields[1] is not Any:
            cls = dataclasses.make_dataclass("D", [fields])
            assert to_event(wire(cls(value)), cls) == cls(value)
    holder: Any = dataclasses.make_dataclass("Holder", [("y", list[type(value)])])
    cls = dataclasses.make_dataclass("D", [("x", dict[int, holder])])
    assert to_event(wire(cls({1: holder([value])})), cls) == cls({1: holder([value])})


def test_a_plain_class_passes_arguments_on_to_the_constructors_of_its_bases() -> None:
    class Named(ECSTEvent):
        def __init__(self, who: str, when: date) -> None:
            self.who, self.when, self.is_made = who, when, "by init"

    class Renamed(Named):
        def __init__(self, before: str, **more: Any) -> None:
            super().__init__(**more)
            self.before = before

    class Listed(Named):
        def __init__(self, before: str, *more: Any) -> None:
            super().__init__(*more)
            self.before = before

    class Fixed(Named):
        def __init__(self, before: str, **more: Any) -> None:
            super().__init__(who="always", **more)
            self.before = before

    for event in (
        Renamed("a", who="b", when=date(2024, 1, 1)),
        Listed("a", "b", date(2024, 1, 1)),
        Fixed("a", when=date(2024, 1, 1)),
    ):
        again = to_event(wire(event), type(event))
        assert (again.before, again.who, again.when) == (event.before, event.who, event.when)  # type: ignore[attr-defined]


def test_a_serializer_that_nothing_reads_is_refused() -> None:
    class Masked(ECSTEvent, pydantic.BaseModel):
        card: str

        @pydantic.field_serializer("card")
        def mask(self, card: str) -> str:
            return f"***{card[-2:]}"

    class Reversed(ECSTEvent, pydantic.BaseModel):
        card: str

        @pydantic.field_serializer("card")
        def write(self, card: str) -> str:
            return card[::-1]

        @pydantic.field_validator("card", mode="before")
        @classmethod
        def read(cls, card: str) -> str:
            return card[::-1]

    for cls in (Masked, dataclasses.make_dataclass("D", [("x", Masked)])):
        with pytest.raises(ClassUnreadable, match="serializer"):
            check_class(cls)
    event = Reversed.model_validate({"card": "321"})
    assert to_event(wire(event), Reversed) == event


@pytest.mark.parametrize("error", [LookupError, NotImplementedError, RuntimeError])
def test_any_error_of_a_class_inside_of_an_event_is_message_invalid(error: type[Exception]) -> None:
    @dataclass
    class Strict:
        a: int

        def __post_init__(self) -> None:
            raise error("no")

    with pytest.raises(MessageInvalid, match="no") as caught:
        to_event(message(x={"a": 1}), dataclasses.make_dataclass("D", [("x", Strict)]))
    assert caught.value.field == "payload.x"


class Perm(enum.Flag):
    READ = 1
    WRITE = 2


class Notes(TypedDict):
    perm: Perm  # read by silbo; the same without it is read by msgspec
    note: NotRequired[str]


class PlainNotes(TypedDict):
    number: int
    note: NotRequired[str]


class LooseNotes(TypedDict, total=False):
    perm: Required[Perm]
    note: str


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Notes, {"perm": Perm.READ}), (PlainNotes, {"number": 1}), (LooseNotes, {"perm": Perm.WRITE})],
)
def test_keys_of_a_typed_dict_are_required_as_written(kind: Any, value: dict[str, Any]) -> None:
    """Also where annotations are strings, as in this module."""
    cls = dataclass(type("Noted", (ECSTEvent,), {"__annotations__": {"row": kind}, "__module__": __name__}))
    for row in (value, value | {"note": "n"}):
        message = to_message(cls(row), name="x", kind="ecst")
        assert to_event(message, cls).row == row
    lacking = dataclasses.replace(message, payload={**message.payload, "row": {"note": "n"}})
    with pytest.raises(MessageInvalid, match=next(iter(value))):
        to_event(lacking, cls)


class Encoded(ECSTEvent, pydantic.BaseModel):
    blob: pydantic.Base64Bytes
    text: pydantic.Base64Str
    parsed: pydantic.Json
    numbers: pydantic.Json[list[int]]
    many: list[pydantic.Base64UrlBytes]
    maybe: pydantic.Base64Bytes | None = None
    plain: bytes = b"\xff"


@pytest.mark.parametrize("parsed", ["5", 5, [1, "2"], {"a": None}, None, True])
def test_fields_with_a_text_of_their_own_keep_their_value(parsed: Any) -> None:
    """pydantic reads their text alone: of the decoded value it would make another one, in silence."""
    event = Encoded(
        blob=b"YWJjZA==",
        text="YWJjZA==",
        parsed=json.dumps(parsed),
        numbers="[5]",
        many=[b"YWJjZA=="],  # type: ignore[list-item]
        maybe=b"eA==",
    )
    assert (event.blob, event.text, event.parsed, event.maybe) == (b"abcd", "abcd", parsed, b"x")
    check_class(Encoded)
    again = to_event(JSON.decode(JSON.encode(to_message(event, name="x", kind="ecst"), Origin("a", "i"))), Encoded)
    assert again == event


S = TypeVar("S", bound=object)


class Boxed(TypedDict, Generic[S]):
    item: S


class DateBox(Boxed[date]):
    label: str


class BoxOfBoxes(Boxed[list[DateBox]]):
    label: NotRequired[str]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (DateBox, {"item": date(2020, 1, 1), "label": "a"}),
        (Boxed[date], {"item": date(2020, 1, 1)}),
        (BoxOfBoxes, {"item": [{"item": date(2020, 1, 1), "label": "a"}]}),
    ],
)
def test_typed_dict_has_the_parameters_that_it_fixes(kind: Any, value: Any) -> None:
    """A TypedDict has none of its bases in its ``__mro__``."""
    cls = dataclass(type("Packed", (ECSTEvent,), {"__annotations__": {"box": kind}, "__module__": __name__}))
    assert to_event(to_message(cls(value), name="x", kind="ecst"), cls).box == value


@dataclass
class Node(ECSTEvent):
    value: bytes
    parent: Self | None = None
    children: list[Self] = field(default_factory=list)
    named: dict[str, Annotated[Self, "a note"]] = field(default_factory=dict)


@dataclass
class Leaf(Node):
    at: date | None = None


@dataclass
class Cell(Generic[S]):
    item: S
    after: Self | None = None


@dataclass
class Cells(ECSTEvent):
    first: Cell[date]
    node: Node


@attrs.define
class AttrsNode(Event):
    value: bytes
    after: Self | None = None


class StructNode(msgspec.Struct):
    value: bytes
    after: Self | None = None


class ModelNode(pydantic.BaseModel):
    value: bytes
    after: Self | None = None


class ModelLeaf(ModelNode):
    at: date | None = None


@pytest.mark.parametrize(
    "value",
    [
        Node(b"\xff", Node(b"a"), [Node(b"b", Node(b"c"))], {"d": Node(b"d")}),
        Leaf(b"\xff", Leaf(b"a", at=date(2024, 1, 1)), [Leaf(b"b")]),
        Cells(Cell(date(2024, 1, 1), Cell(date(2024, 1, 2))), Node(b"a", Node(b"\xff"))),
        AttrsNode(b"\xff", AttrsNode(b"\xfe")),
        StructNode(b"\xff", StructNode(b"\xfe")),
        ModelNode(value=b"\xff", after=ModelNode(value=b"\xfe")),
        ModelLeaf(value=b"\xff", after=ModelLeaf(value=b"\xfe", at=date(2024, 1, 1))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_self_is_the_class_that_is_rebuilt(value: Any) -> None:
    """Also of a class that has the annotation from its base, and inside of another class."""
    check_class(type(value))
    assert to_event(wire(value), type(value)) == value
    holder: Any = dataclasses.make_dataclass("Holder", [("x", type(value))])
    assert to_event(wire(holder(value)), holder) == holder(value)


class Keyed(TypedDict):
    value: pydantic.JsonValue


class Numbered(NamedTuple):
    value: pydantic.JsonValue


class Modelled(pydantic.BaseModel):
    value: pydantic.JsonValue


@pytest.mark.parametrize("value", [None, 1, 1.5, True, "a", [1, [None, "2024-01-01"]], {"a": {"b": [{}]}}])
def test_json_value_is_any_json(value: Any) -> None:
    json_value = pydantic.JsonValue
    hints: tuple[tuple[Any, Any], ...] = (
        (json_value, value),
        (list[json_value], [value]),
        (dict[str, json_value], {"k": value}),
        (json_value | None, value),
        (Keyed, {"value": value}),
        (Numbered, Numbered(value)),
        (Modelled, Modelled(value=value)),
    )
    for hint, whole in hints:
        cls = dataclasses.make_dataclass("D", [("x", hint)])
        check_class(cls)
        read = to_event(wire(cls(whole)), cls).x
        assert (read, repr(read)) == (whole, repr(whole))
    with pytest.raises(ClassUnreadable, match="JSON can't tell"):
        check_class(dataclasses.make_dataclass("D", [("x", json_value | bytes)]))


def test_literal_string_is_a_text() -> None:
    cls = dataclasses.make_dataclass("D", [("x", LiteralString)])
    assert to_event(wire(cls("a")), cls) == cls("a")


Endless = Union[int, list["Endless"]]  # noqa: UP007  # | takes no text


def test_alias_in_the_old_form_that_names_itself_is_refused_with_what_to_write() -> None:
    cls = dataclasses.make_dataclass("D", [("x", Endless)], namespace={"__module__": __name__})
    with pytest.raises(
        ClassUnreadable, match=r"x: its annotation names 'Endless'.*TypeAliasType\('Endless', ...\), or Any"
    ):
        check_class(cls)


Unclear = (Decimal | str, str | Decimal | None, list[Decimal | str], dict[str, Decimal | str])


@pytest.mark.parametrize("hint", Unclear, ids=str)
def test_union_that_json_cannot_tell_apart_is_refused_in_a_model_too(hint: Any) -> None:
    """pydantic takes the text, and a Decimal would come back as one."""
    model = pydantic.create_model("M", x=(hint, ...))
    with pytest.raises(ClassUnreadable, match="x: .*JSON can't tell"):
        check_class(model)

    class Told(model):  # type: ignore[misc,valid-type]
        @pydantic.field_validator("x", mode="before")
        @classmethod
        def read(cls, value: Any) -> Any:
            return value

    check_class(Told)
