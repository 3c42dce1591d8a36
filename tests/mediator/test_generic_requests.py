"""Requests and events with type parameters of their own, in every library."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

import attrs
import msgspec
import pydantic
import pytest

from silbo import DomainEvent, EventName, Request, RequestMap, name_of
from silbo.errors import RequestUnbound
from tests.support.mediator import World

T = TypeVar("T")
A = TypeVar("A")


class Plain(Request[A], Generic[T, A]):
    def __init__(self, value: T) -> None:
        self.value = value


@dataclass(frozen=True)
class Data(Request[A], Generic[T, A]):
    value: T


@attrs.frozen
class Attrs(Request[A], Generic[T, A]):
    value: T


class Struct(Request[A], msgspec.Struct, Generic[T, A], frozen=True):
    value: T


class Model(Request[A], pydantic.BaseModel, Generic[T, A], frozen=True):
    value: T


ALL = [Plain, Data, Attrs, Struct, Model]


@pytest.mark.parametrize("cls", ALL)
async def test_a_generic_request_is_handled_with_and_without_type_arguments(cls: Any) -> None:
    """One handler, bound to the class, gets the requests of every argument."""

    class Handler:
        async def handle(self, request: Any) -> Any:
            return request.value, type(request)

    world = World()
    world.requests.bind(cls, Handler)
    for request in (cls(value=1), cls[int, str](value=1)):
        value, seen = await world.mediator.send(request)
        assert value == 1 and issubclass(seen, cls)


@pytest.mark.parametrize("cls", [Plain, Data, Attrs, Struct])
def test_type_arguments_are_kept(cls: Any) -> None:
    """As the library keeps them: a derived class knows what it was derived from."""
    assert get_args(cls[int, str]) == (int, str)

    class Derived(cls[int, str]):  # type: ignore[misc]  # a parameter of the test
        pass

    [base] = Derived.__orig_bases__  # type: ignore[attr-defined]
    assert get_args(base) == (int, str) and Derived(value=1).value == 1


def test_a_msgspec_request_is_read_with_its_type_arguments() -> None:
    """The arguments have effect."""
    assert msgspec.convert({"value": 1}, Struct[int, str]) == Struct(1)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"value": "text"}, Struct[int, str])


def test_a_pydantic_request_is_validated_with_its_type_arguments() -> None:
    """pydantic makes a class of its own for them."""
    assert Model[int, str](value=1).value == 1
    with pytest.raises(pydantic.ValidationError):
        Model[int, str](value="text")  # type: ignore[arg-type]


async def test_a_pydantic_request_with_type_arguments_may_have_a_handler_of_its_own() -> None:
    """It comes before that of the generic class."""

    class Own:
        async def handle(self, request: Any) -> str:
            return "own"

    class General:
        async def handle(self, request: Any) -> str:
            return "general"

    requests = RequestMap()
    requests.bind(Model[int, str], Own)
    with pytest.raises(RequestUnbound):
        requests.handler_of(Model)
    requests.bind(Model, General)
    assert requests.handler_of(Model[int, str]) is Own
    assert requests.handler_of(Model[str, str]) is requests.handler_of(Model) is General


def test_binding_to_type_arguments_that_make_no_class_is_refused() -> None:
    """Such a binding could not be told from that of other arguments."""

    class Handler:
        async def handle(self, request: Any) -> None: ...

    with pytest.raises(TypeError, match="bind Data$"):
        RequestMap().bind(Data[int, None], Handler)


def test_a_class_without_type_parameters_of_its_own_stays_itself() -> None:
    """To type checkers ``Query`` is generic in the answer alone, for whichever library."""

    class Query(Request[A]): ...

    class ModelQuery(Request[A], pydantic.BaseModel): ...

    assert Query[int] is Query and ModelQuery[int] is ModelQuery and Request[int] is Request
    assert type(ModelQuery[int]()) is ModelQuery


def test_an_event_with_type_arguments_has_the_name_of_its_generic_class() -> None:
    """``Page[int]`` is a class of its own in pydantic; it may have a name of its own."""

    class Page(DomainEvent, pydantic.BaseModel, Generic[T]):
        items: list[T]

    assert name_of(Page[int](items=[1])) == "Page[int]"
    loaded = EventName("page.loaded", Page)
    assert name_of(Page[int](items=[1])) is loaded
    numbers = EventName("numbers.loaded", Page[int])
    assert name_of(Page[int](items=[1])) is numbers and name_of(Page[str](items=[])) is loaded


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax of PEP 695 came with 3.12")
@pytest.mark.parametrize(
    ("head", "bases"),
    [
        ("", "Request"),
        ("@dataclass(frozen=True)", "Request[T]"),
        ("@attrs.frozen", "Request[T]"),
        ("", "Request[T], msgspec.Struct"),
        ("", "Request[T], pydantic.BaseModel"),
    ],
)
async def test_a_request_in_the_syntax_of_pep_695_is_handled(head: str, bases: str) -> None:
    """``class Find[T](...)`` derives from Generic without saying so."""
    given = "def __init__(self, value): self.value = value" if (head, bases) == ("", "Request") else "value: T"
    names: dict[str, Any] = {"__name__": __name__, **globals()}
    exec(f"{head}\nclass Find[T]({bases}):\n    {given}\n", names)  # no 3.11 can read it
    find = names["Find"]

    class Handler:
        async def handle(self, request: Any) -> Any:
            return request.value

    requests = RequestMap()
    requests.bind(find, Handler)
    assert requests.handler_of(type(find[int](value=1))) is Handler
    assert get_args(find[int]) == (int,) or issubclass(find[int], find)
    assert find[int](value=1).value == 1
