"""Generated classes and values: what leaves comes back equal, or its class is refused when it is first named.

A class is a tree of at most three levels, each of another library, with annotations of every kind. Values are generated for
the annotations.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from typing import Any, Literal, NamedTuple
from uuid import UUID

import attrs
import hypothesis.strategies as st
import msgspec
import pydantic
from hypothesis import HealthCheck, event, given, settings

from silbo.errors import ClassUnreadable
from silbo.event import ECSTEvent
from silbo.wire.decode import check_class, to_event
from tests.support.wire_classes import wire

FIELDS = ("one", "two", "six")
numbers = itertools.count()


class Mixed(Enum):
    TEXT = "text"
    NUMBER = 7
    PAIR = (1, 2)


class Word(StrEnum):
    YES = "yes"


class Rank(IntEnum):
    LOW = 1


class Right(Flag):
    READ = 1
    WRITE = 2


class Typed(NamedTuple):
    """A type and the values it has."""

    hint: Any
    values: st.SearchStrategy[Any]


SCALARS = [
    Typed(bool, st.booleans()),
    Typed(int, st.integers()),
    Typed(float, st.floats(allow_nan=False, allow_infinity=False)),
    Typed(str, st.text(st.characters(exclude_categories=["Cs"]))),
    Typed(bytes, st.binary()),
    Typed(UUID, st.uuids()),
    Typed(date, st.dates()),
    Typed(time, st.times()),
    Typed(datetime, st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1), timezones=st.none() | st.just(UTC))),
    Typed(timedelta, st.timedeltas(timedelta(days=-9999), timedelta(days=9999))),
    Typed(Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    Typed(Mixed, st.sampled_from(Mixed)),
    Typed(Word, st.sampled_from(Word)),
    Typed(Rank, st.sampled_from(Rank)),
    Typed(Right, st.sampled_from([Right.READ, Right.READ | Right.WRITE, Right(0)])),
    Typed(Literal["a", 1] | None, st.sampled_from(["a", 1, None])),
    Typed(Literal[Mixed.TEXT, Word.YES], st.sampled_from([Mixed.TEXT, Word.YES])),
]


def plain_class(fields: dict[str, Any], bases: tuple[type, ...]) -> type:
    def init(self: Any, one: Any, **more: Any) -> None:
        self.one = one
        self.__dict__.update(more)

    def equal(self: Any, other: Any) -> bool:
        return all(getattr(self, name) == getattr(other, name) for name in fields)

    return type("Plain", bases, {"__annotations__": fields, "__init__": init, "__eq__": equal, "__hash__": None})


LIBRARIES: dict[str, Callable[[dict[str, Any], tuple[type, ...]], Any]] = {
    "dataclass": lambda fields, bases: dataclasses.make_dataclass(
        "Data", [(name, hint) for name, hint in fields.items()], bases=bases
    ),
    "odd dataclass": lambda fields, bases: dataclasses.make_dataclass(
        "Odd",
        [
            (name, hint, dataclasses.field(metadata={"wire": f"{name}-wire"}, init=False, default=None))
            if name == "two"
            else (name, hint)
            for name, hint in fields.items()
        ]
        + [("seed", dataclasses.InitVar[int], 3)],
        bases=bases,
    ),
    "attrs": lambda fields, bases: attrs.make_class(
        "Attrs", {name: attrs.field(type=hint) for name, hint in fields.items()}, bases=bases or (object,)
    ),
    "attrs with a converter": lambda fields, bases: attrs.make_class(
        "Attrs",
        {name: attrs.field(type=hint, converter=lambda value: value) for name, hint in fields.items()},
        bases=bases or (object,),
    ),
    "struct": lambda fields, bases: msgspec.defstruct(
        "Struct", list(fields.items()), bases=(*bases, msgspec.Struct), rename="camel"
    ),
    "tagged struct": lambda fields, bases: msgspec.defstruct(
        "Tagged", list(fields.items()), bases=(*bases, msgspec.Struct), tag=True
    ),
    "pydantic": lambda fields, bases: pydantic.create_model(
        "Model", __base__=(*bases, AnyModel), **{name: (hint, ...) for name, hint in fields.items()}
    ),
    "pydantic with aliases": lambda fields, bases: pydantic.create_model(
        "Model",
        __base__=(*bases, AnyModel),
        **{
            name: (
                hint,
                pydantic.Field(
                    serialization_alias=f"{name}-out", validation_alias=pydantic.AliasPath("deep", f"{name}-in")
                ),
            )
            for name, hint in fields.items()
        },
    ),
    "plain": plain_class,
}


class AnyModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True, validate_by_name=True)


def make_object(cls: Any, values: dict[str, Any]) -> Any:
    """Make an object as a host does, also the field that is no argument."""
    if issubclass(cls, pydantic.BaseModel):
        return cls.model_validate(values, by_name=True)
    late = {field.name for field in getattr(cls, "__dataclass_fields__", {}).values() if not field.init}
    made = cls(**{name: value for name, value in values.items() if name not in late})
    for name in late:
        setattr(made, name, values[name])
    return made


@st.composite
def class_types(draw: st.DrawFn, depth: int, bases: tuple[type, ...] = ()) -> Typed:
    names = list(LIBRARIES) if bases else [name for name in LIBRARIES if name != "plain"]
    library = draw(st.sampled_from(names))
    fields = {name: draw(types(depth)) for name in FIELDS[: draw(st.integers(1, 3))]}
    cls: Any = LIBRARIES[library]({name: typed.hint for name, typed in fields.items()}, bases)
    values = st.fixed_dictionaries({name: typed.values for name, typed in fields.items()})
    return Typed(cls, values.map(lambda found: make_object(cls, found)))


@st.composite
def types(draw: st.DrawFn, depth: int) -> Typed:
    if depth == 0:
        return draw(st.sampled_from(SCALARS))
    shape = draw(st.sampled_from(["scalar", "class", "class", "list", "dict", "pair", "union", "union"]))
    if shape == "scalar":
        return draw(st.sampled_from(SCALARS))
    if shape == "class":
        return draw(class_types(depth - 1))
    inner = draw(types(depth - 1))
    if shape == "list":
        return Typed(list[inner.hint], st.lists(inner.values, max_size=2))  # type: ignore[name-defined]
    if shape == "dict":
        key = draw(st.sampled_from([typed for typed in SCALARS if typed.hint in (str, int, UUID, date, Word)]))
        return Typed(dict[key.hint, inner.hint], st.dictionaries(key.values, inner.values, max_size=2))  # type: ignore[name-defined]
    other = draw(types(depth - 1) | st.just(Typed(None, st.none())))
    if shape == "pair":
        return Typed(tuple[inner.hint, other.hint], st.tuples(inner.values, other.values))  # type: ignore[name-defined]
    return Typed(inner.hint | other.hint if inner.hint != other.hint else inner.hint, inner.values | other.values)


def is_same(one: Any, other: Any) -> bool:
    """True if two values are equal and of the same types; a bool is no number, an enum no text."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    found = [name for name in FIELDS if hasattr(one, name)]
    if found and not isinstance(one, Enum):
        return all(hasattr(other, name) and is_same(getattr(one, name), getattr(other, name)) for name in found)
    return bool(one == other)


# The same classes in each run of the suite; SILBO_ROUND_TRIPS=1000 tries other ones, and more.
EXAMPLES = int(os.environ.get("SILBO_ROUND_TRIPS", "0"))


@settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_a_generated_class_comes_back_equal_or_is_refused(data: st.DataObject) -> None:
    """Never a value that differs in silence, and no error once the class is accepted."""
    typed = data.draw(class_types(3, (ECSTEvent,)))
    try:
        check_class(typed.hint)
    except ClassUnreadable as error:
        event(f"refused: {str(error).rpartition(': ')[2].split()[0]}")
        return
    event("accepted")
    for sent in data.draw(st.lists(typed.values, min_size=1, max_size=3)):
        again = to_event(wire(sent), typed.hint)
        assert is_same(sent, again), f"sent {vars(sent)!r}, got {vars(again)!r}"
