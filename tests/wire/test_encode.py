"""Payloads: which attributes leave, how each value is written and read, and what is refused, with its place."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silbo.errors import MessageInvalid, MessageRefused
from silbo.event import ECSTEvent, Event
from silbo.names import EventName
from silbo.wire.decode import to_event
from silbo.wire.encode import MAX_DEPTH, to_message
from silbo.wire.faults import to_message_invalid
from tests.support.wire_classes import (
    Address,
    Card,
    Cat,
    Color,
    Dog,
    Level,
    Opaque,
    Size,
    Wallet,
    message,
    payload_of,
    wire,
)

# -- what stays -----------------------------------------------------------------------------------------------


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


def test_computed_fields_of_a_model_inside_of_another_stay_too() -> None:
    """Or the model that forbids extras could not be read back."""

    class Square(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        side: int

        @pydantic.computed_field
        def area(self) -> int:
            return self.side**2

    class Drawn(ECSTEvent, pydantic.BaseModel):
        square: Square

    for cls in (Drawn, dataclasses.make_dataclass("Drawn", [("square", Square)])):
        event = cls(square=Square(side=2))
        assert payload_of(event) == {"square": {"side": 2}}
        assert to_event(wire(event), cls) == event


def test_a_model_that_a_listener_changed_leaves_as_it_is_now() -> None:
    """pydantic warns of a value that is not of its field's type; warnings are not for whoever dispatches."""

    class Scored(ECSTEvent, pydantic.BaseModel):
        score: int

    event = Scored(score=1)
    event.score = "many"  # type: ignore[assignment]
    assert payload_of(event) == {"score": "many"}


def test_an_error_in_the_hosts_own_code_is_message_refused_with_its_cause() -> None:
    """A publish answers with one of three errors."""

    class Broken(ECSTEvent, pydantic.BaseModel):
        x: int

        @pydantic.field_serializer("x")
        def fail(self, x: int) -> str:
            raise LookupError("no such thing")

    with pytest.raises(MessageRefused, match="no such thing") as caught:
        to_message(Broken(x=1), name="a", kind="ecst")
    assert caught.value.__cause__ is not None


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


# -- what can't be written ------------------------------------------------------------------------------------


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


# -- values ---------------------------------------------------------------------------------------------------


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
    with pytest.raises(MessageInvalid, match="fits none of 3 types: ") as caught:
        to_event(message(x="y"), cls)
    assert caught.value.field == "payload.x"


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (float, 10**400),  # up to 0.21 msgspec let a SystemError out
        (UUID, "\ud800"),
        (datetime, "\ud800"),
        (bytes, "\ud800"),
        (dict[str, int], {"\ud800": "x"}),
    ],
    ids=["float", "uuid", "datetime", "bytes", "key"],
)
def test_what_msgspec_breaks_on_is_message_invalid_too(hint: Any, value: Any) -> None:
    with pytest.raises(MessageInvalid) as caught:
        to_event(message(x=value), dataclasses.make_dataclass("Holder", [("w", int, 0), ("x", hint, None)]))
    assert (caught.value.field or "").startswith("payload.x")


def test_a_fault_that_msgspec_words_in_another_way_has_its_place_all_the_same() -> None:
    """Its texts are not its interface."""
    fault = to_message_invalid(msgspec.ValidationError("in other words"), under="payload.x")
    assert (fault.problem, fault.field) == ("in other words", "payload.x")


def test_an_enum_takes_its_values_and_nothing_like_them() -> None:
    for value in (True, 1.0, "1", [1], None):
        with pytest.raises(MessageInvalid, match="enum value"):
            to_event(message(x=value), dataclasses.make_dataclass("Holder", [("x", Pair)]))


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


def test_a_time_whose_zone_needs_a_date_is_refused() -> None:
    """JSON would carry it without its zone, in silence; an offset is carried."""
    cls = dataclasses.make_dataclass("Holder", [("x", time)])
    with pytest.raises(MessageRefused, match="time without a date"):
        payload_of(cls(time(9, 30, tzinfo=ZoneInfo("Europe/Madrid"))))
    offset = cls(time(9, 30, tzinfo=timezone(timedelta(hours=2))))
    assert to_event(wire(offset), cls) == offset
