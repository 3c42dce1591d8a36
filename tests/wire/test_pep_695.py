"""``class Loaded[T]``, ``type X = ...`` and ``*Ts``: what came with Python 3.12 makes the round trip, or is refused at first.

No Python 3.11 can read this syntax, so it stands in a text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NewType
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest

from silbo import ECSTEvent
from silbo.errors import ClassUnreadable
from silbo.message import Origin
from silbo.wire.decode import check_class, to_event
from silbo.wire.encode import to_message
from silbo.wire.formats import JSON

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax of PEP 695 came with 3.12")

ID = UUID("9f62e977-73f7-462b-92cb-8ea658d3bcb5")
Number = NewType("Number", int)

SOURCE = """
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Literal, NamedTuple, TypedDict
from uuid import UUID
import attrs, msgspec, pydantic
from silbo import ECSTEvent

type Key = str
type Ids = list[UUID]
type Maybe = UUID | None
type Word = Literal["a", "b"]
type Marked = Annotated[UUID, "mark"]
type Table[K, V] = dict[K, V]
type Some[T] = list[T] | None
type Tree = dict[str, Tree] | UUID
type Nest[T] = list[Nest[T]] | T
type Ever[T] = list[Ever[list[T]]] | T

@dataclass
class Box[T]:
    value: T

@attrs.define
class AttrsBox[T]:
    value: T

class Struct[T](msgspec.Struct):
    value: T

class Model[T](pydantic.BaseModel):
    value: T

class Entry[T](TypedDict):
    value: T

class Row[T](NamedTuple):
    value: T

@dataclass
class Loaded[T](ECSTEvent):
    item: T
    more: list[T]

@attrs.define(slots=False)
class AttrsLoaded[T](ECSTEvent):
    item: T
    more: list[T]

class StructLoaded[T](ECSTEvent, msgspec.Struct, dict=True):
    item: T
    more: list[T]

class ModelLoaded[T](ECSTEvent, pydantic.BaseModel):
    item: T
    more: list[T]

class PlainLoaded[T](ECSTEvent):
    def __init__(self, item: T, more: list[T]) -> None:
        self.item = item
        self.more = more

@dataclass
class Pairs[K, V](ECSTEvent):
    item: dict[K, V]
    more: Table[K, Box[V]]

class Middle[V](Pairs[str, V]): ...

@dataclass
class Star[A, *Many, Z](ECSTEvent):
    item: tuple[*Many]
    more: tuple[Z, A]

class Between[*Inner](Star[int, str, *Inner, UUID]): ...

@dataclass
class Within[**Arguments, T](ECSTEvent):
    item: T
    more: list[T]

class Fixed(Loaded[UUID]): ...
class AttrsFixed(AttrsLoaded[UUID]): ...
class StructFixed(StructLoaded[UUID]): ...
class ModelFixed(ModelLoaded[UUID]): ...
class PlainFixed(PlainLoaded[UUID]): ...
class TwiceFixed(Middle[UUID]): ...
class StarFixed(Between[UUID, date]): ...
class WithinFixed(Within[[int], UUID]): ...
"""


@pytest.fixture(scope="module", params=["", "from __future__ import annotations"], ids=["objects", "strings"])
def names(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The names of the source, with annotations as objects and as strings."""
    module = ModuleType(f"tests_of_pep_695_{request.param_index}")
    sys.modules[module.__name__] = module  # where string annotations are resolved
    exec(compile(f"{request.param}{SOURCE}", __file__, "exec", dont_inherit=True), vars(module))
    yield vars(module)
    del sys.modules[module.__name__]


def round_trip(event: Any) -> Any:
    message = to_message(event, name="x", kind="ecst", key=None, to=None, version=1)
    return to_event(JSON.decode(JSON.encode(message, Origin("a", "b"))), type(event))


@pytest.mark.parametrize(
    ("name", "item", "more"),
    [
        *((f"{library}Fixed", "ID", "[ID]") for library in ("", "Attrs", "Struct", "Model", "Plain", "Within")),
        ("ModelLoaded[UUID]", "ID", "[ID]"),
        ("TwiceFixed", "{'a': ID}", "{'b': Box(ID)}"),
        ("StarFixed", "('x', ID, date(2026, 1, 2))", "(ID, 1)"),
    ],
)
def test_a_generic_event_is_rebuilt_with_the_arguments_that_a_class_fixes(
    names: dict[str, Any], name: str, item: str, more: str
) -> None:
    """Through the bases, in every library."""
    scope = names | {"ID": ID}
    cls, expected = eval(name, scope), {"item": eval(item, scope), "more": eval(more, scope)}
    check_class(cls)
    event = round_trip(cls(**expected))
    assert type(event) is cls and {"item": event.item, "more": event.more} == expected


@pytest.mark.parametrize(
    "name", ["Loaded", "AttrsLoaded", "StructLoaded", "ModelLoaded", "PlainLoaded", "Pairs", "Star"]
)
def test_a_generic_event_whose_arguments_no_class_fixes_is_refused(names: dict[str, Any], name: str) -> None:
    """Its values would come back as the JSON that they were written as."""
    with pytest.raises(ClassUnreadable):
        check_class(names[name])


def make_event(library: str, hint: Any) -> Any:
    """Return a class of events with one field."""
    body: dict[str, Any] = {"__annotations__": {"item": hint}, "__module__": __name__}
    if library == "attrs":
        return attrs.define(slots=False)(type("Seen", (ECSTEvent,), body))
    if library == "struct":
        return type(msgspec.Struct)("Seen", (ECSTEvent, msgspec.Struct), body, dict=True)  # type: ignore[misc]
    body["model_config"] = {"arbitrary_types_allowed": True}
    return type(pydantic.BaseModel)("Seen", (ECSTEvent, pydantic.BaseModel), body)


@pytest.mark.parametrize("library", ["attrs", "struct", "pydantic"])
@pytest.mark.parametrize(
    ("hint", "value"),
    [
        ("Ids", "[ID]"),
        ("list[Maybe]", "[ID, None]"),
        ("Word", "'a'"),
        ("Marked", "ID"),
        ("Some[Some[UUID]]", "[[ID], None]"),
        ("Table[UUID, date]", "{ID: date(2026, 1, 2)}"),
        ("dict[Key, Ids]", "{'a': [ID]}"),
        ("dict[Word, Marked]", "{'a': ID}"),
        ("dict[Number, UUID]", "{1: ID}"),
        ("Tree", "{'a': {'b': ID}, 'c': ID}"),
        ("Nest[UUID]", "[[ID], ID]"),
        ("Box[Ids]", "Box([ID])"),
        ("AttrsBox[Maybe]", "AttrsBox(ID)"),
        ("Struct[UUID]", "Struct(ID)"),
        ("Model[Tree]", "Model[Tree](value={'a': ID})"),
        ("Entry[Ids]", "{'value': [ID]}"),
        ("Row[UUID]", "Row(ID)"),
        ("Box[Box[Tree]] | None", "Box(Box(ID))"),
        ("tuple[Ids, ...]", "([ID],)"),
    ],
)
def test_an_alias_is_what_it_stands_for(names: dict[str, Any], library: str, hint: str, value: str) -> None:
    """Also one that names itself, and as the key of a dict."""
    scope = names | {"ID": ID, "Number": Number}
    cls, expected = make_event(library, eval(hint, scope)), eval(value, scope)
    check_class(cls)
    found = round_trip(cls(item=expected)).item
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("hint", ["Ever[int]", "tuple[int, *tuple[UUID, ...]]", "list[Ever[UUID]]"])
def test_an_alias_without_end_and_a_part_of_a_tuple_are_refused(names: dict[str, Any], hint: str) -> None:
    """With the class, where it is first named."""
    with pytest.raises(ClassUnreadable, match="ever new forms|can't be read"):
        check_class(make_event("attrs", eval(hint, names)))
