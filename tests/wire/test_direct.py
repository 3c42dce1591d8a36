"""The direct way from bytes to an event, beside the long way: the two accept and refuse the same, with the same events and errors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import attrs
import hypothesis.strategies as st
import msgspec
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings

from silbo.consumer.receive import EventRebuilder
from silbo.errors import ClassUnreadable, MessageInvalid, VersionTooNew
from silbo.event import ECSTEvent, Event, NotificationEvent
from silbo.message import Delivery
from silbo.names import EventName
from silbo.wire.decode import check_class, to_event
from silbo.wire.direct import read_directly
from silbo.wire.encode import MAX_DEPTH, to_message
from silbo.wire.formats import JSON, JsonFormat
from tests.support.wire_classes import ORIGIN, Cat, Level
from tests.wire.test_codec_fuzz import SEED, mutate_bytes, mutate_structure
from tests.wire.test_round_trip import class_types, is_same

MUTATIONS = 5_000


class LongWay(JsonFormat):
    """The same format; a consumer takes the long way with a format that it does not know."""


@dataclass(frozen=True)
class Placed(ECSTEvent):
    order: UUID
    at: datetime
    level: Level
    cat: Cat
    every: timedelta
    hour: time
    seal: bytes
    ratio: float
    more: Any
    tags: set[str] = field(default_factory=set)
    limits: dict[int, float] = field(default_factory=dict)
    day: date | None = None


@attrs.frozen(kw_only=True)
class Moved(NotificationEvent):
    cats: list[Cat]
    _count: int = attrs.field(alias="count", metadata={"wire": "count"})


class Scored(NotificationEvent, msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    high_score: float
    rank: int = 0


@dataclass
class Picky(ECSTEvent):
    number: int
    text: str = field(metadata={"wire": "the text"})

    def __post_init__(self) -> None:
        if self.number % 2:
            raise ValueError("odd")


EVENTS: list[Any] = [
    Placed(
        order=UUID(int=5),
        at=datetime(2026, 3, 7, 9, 26, tzinfo=UTC),
        level=Level.LOW,
        cat=Cat("Tom"),
        every=timedelta(days=1),
        hour=time(9, 26),
        seal=b"\x00",
        ratio=0.5,
        more={"a": [1, "x", None]},
        tags={"a"},
        limits={1: 0.5},
        day=date(2026, 3, 7),
    ),
    Moved(cats=[Cat("kénd"), Cat("Tim")], count=2),
    Scored(high_score=0.5, rank=7),
    Picky(4, "x"),
]


def sent(event: Any) -> bytes:
    """The same bytes in every run, or a seed would say nothing."""
    if "event_id" not in type(event).__dict__:
        event.__dict__.update(event_id=UUID(int=9))
        event.__dict__.update(event_timestamp=datetime(2026, 3, 7, tzinfo=UTC))
    return JSON.encode(to_message(event, name="it.happened", kind="ecst"), ORIGIN)


def directly(event: Any, raw: bytes | None = None) -> Any:
    return read_directly(JSON.open(raw or sent(event)).payload, type(event))


def outcome(raw: bytes, name: EventName[Any], form: JsonFormat) -> tuple[object, ...]:
    """The event in all its parts, or the error."""
    rebuilder = EventRebuilder([name], app="web", own="handle")
    try:
        rebuilt = rebuilder.rebuild(Delivery(raw, "events", form, "1-0"), skips_own_instance=False)
    except (MessageInvalid, VersionTooNew) as error:
        return type(error), str(error)
    assert rebuilt is not None
    shown = "" if type(rebuilt.event).__repr__ is object.__repr__ else repr(rebuilt.event)
    return type(rebuilt.event), shown, repr(sorted(rebuilt.event.__dict__.items(), key=str))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_the_direct_way_gives_the_event_that_the_long_way_gives(event: Any) -> None:
    raw = sent(event)
    made, slowly = directly(event), to_event(JSON.decode(raw), type(event))
    assert type(made) is type(event)
    assert made == slowly
    assert (made.event_id, made.event_timestamp) == (event.event_id, event.event_timestamp)
    assert made.event_timestamp.tzinfo is UTC


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_both_ways_make_the_same_of_mutated_messages(event: Any) -> None:
    print(f"SILBO_FUZZ_SEED={SEED}")
    chance, name = random.Random(SEED), EventName("it.happened", type(event))
    mutations: list[Callable[[random.Random, bytes], bytes]] = [mutate_bytes, mutate_structure]
    original = sent(event)
    accepted = direct = 0
    for number in range(MUTATIONS // len(EVENTS)):
        raw = mutations[number % 2](chance, original)
        found = outcome(raw, name, JSON)
        assert found == outcome(raw, name, LongWay()), f"{raw[:2000]!r}"
        if found[0] is type(event):
            accepted += 1
            direct += directly(event, raw) is not None
    assert 100 < direct < accepted, "the mutations are too wild, or too tame, to try anything"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"number":4', b'"number":"4"'),  # not of its type
        (b'"number":4', b'"number":1,"more":{"\\ud800":1}'),  # an unknown key that is not JSON
        (b'"number":4', b'"number":4,"more":"\xff"'),
        (b'"number":4', b'"number":4,"more":1e999'),
        (b'"number":4', b'"number":"x","number":4'),  # twice, and the last counts
        (b'"number":4', b'"number":4,"more":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH),
        (b'"payload":', b'"payload":3,"payload":'),
        (b'"payload":', b'"payload":{"x":"\xff"},"payload":'),
        (b'"event_id":', b'"id":'),
        (b'"event_timestamp":"', b'"event_timestamp":"x'),
        (b'"number":4', b'"number":5'),  # refused by the class
        (b"Z", b""),  # a naive time is read as UTC
        (b"Z", b"+02:00"),
    ],
)
def test_both_ways_make_the_same_of_an_odd_payload(old: bytes, new: bytes) -> None:
    raw = sent(Picky(4, "x"))
    assert old in raw
    name = EventName("it.happened", Picky)
    assert outcome(raw.replace(old, new), name, JSON) == outcome(raw.replace(old, new), name, LongWay())


@pytest.mark.parametrize("levels", [MAX_DEPTH - 3, MAX_DEPTH - 1, MAX_DEPTH])
def test_both_ways_make_the_same_of_a_deep_payload(levels: int) -> None:
    raw = sent(EVENTS[0]).replace(b'[1,"x",null]', b"[" * levels + b"]" * levels)
    name = EventName("it.happened", Placed)
    assert outcome(raw, name, JSON) == outcome(raw, name, LongWay())


def test_a_decimal_takes_the_long_way() -> None:
    """Of the bytes of a number msgspec makes another decimal than of a float."""

    @dataclass
    class Price(ECSTEvent):
        prices: dict[str, list[Decimal]]

    assert directly(Price({"x": [Decimal("1.10")]})) is None
    raw = sent(Price({"x": [Decimal("1.10")]})).replace(b'"1.10"', b"0.10000000000000000001")
    name = EventName("it.happened", Price)
    assert outcome(raw, name, JSON) == outcome(raw, name, LongWay())


def test_a_class_that_the_direct_way_cannot_serve_takes_the_long_way() -> None:
    class Model(ECSTEvent, pydantic.BaseModel):
        number: int

    class Plain(Event):
        def __init__(self, number: int) -> None:
            self.number = number

    @dataclass
    class WithOwnId(Event):
        number: int
        event_id: UUID

    @dataclass
    class SetLate(ECSTEvent):
        number: int = field(init=False, default=3)

    @dataclass
    class HidesTime(ECSTEvent):
        number: int

        @property
        def event_timestamp(self) -> datetime:
            return datetime(2026, 3, 7, tzinfo=UTC)

    @dataclass
    class PassesOn(ECSTEvent):
        number: int

        def __init__(self, /, *args: Any, **options: Any) -> None:
            super().__init__()
            self.number = options.get("number", 3)

    for event in (Model(number=3), Plain(3), WithOwnId(3, UUID(int=3)), SetLate(), HidesTime(3), PassesOn()):
        assert directly(event) is None, type(event)
        name = EventName("it.happened", type(event))
        assert outcome(sent(event), name, JSON) == outcome(sent(event), name, LongWay())
        assert outcome(sent(event), name, JSON)[0] is type(event)


def test_the_constructor_is_not_called_before_all_values_are_read() -> None:
    """A payload that does not fit is left to the long way, which calls it once."""
    calls: list[int] = []

    @dataclass
    class Counted(ECSTEvent):
        number: int
        more: int = 0

        def __post_init__(self) -> None:
            calls.append(self.number)

    raw = sent(Counted(3))
    calls.clear()
    payload = json.loads(raw)["payload"]
    del payload["more"]
    old = {**json.loads(raw), "payload": payload}
    rebuilder = EventRebuilder([EventName("it.happened", Counted)], app="web", own="handle")
    for written in (raw, json.dumps(old).encode()):
        assert rebuilder.rebuild(Delivery(written, "events", JSON), skips_own_instance=False) is not None
    assert calls == [3, 3]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_both_ways_make_the_same_of_a_generated_class(data: st.DataObject) -> None:
    typed = data.draw(class_types(2, (ECSTEvent,)))
    try:
        check_class(typed.hint)
    except ClassUnreadable:
        return
    for event in data.draw(st.lists(typed.values, min_size=1, max_size=3)):
        raw = sent(event)
        made, slowly = directly(event, raw), to_event(JSON.decode(raw), typed.hint)
        if made is not None:
            assert is_same(made, slowly), f"{vars(made)!r}, and the long way gives {vars(slowly)!r}"
            assert (made.event_id, made.event_timestamp) == (slowly.event_id, slowly.event_timestamp)
