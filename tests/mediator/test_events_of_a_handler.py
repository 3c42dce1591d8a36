"""What counts as the ``events`` of a handler, and what is said of what can't be."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from silbo import Event, Request, RequestHandler
from tests.support.mediator import Do, DoHandler, Local, World


@dataclass(frozen=True)
class Ask(Request[str]):
    label: str = "heard"


class Attribute:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def handle(self, request: Ask) -> str:
        self.events.append(Local(request.label))
        return "done"


@dataclass
class Field:
    events: list[Event] = field(default_factory=list, init=False)

    handle = Attribute.handle


@dataclass(slots=True)
class SlottedField:
    events: list[Event] = field(default_factory=list, init=False)

    handle = Attribute.handle


class OfTheClass:
    events: list[Event] = []  # noqa: RUF012  # as it is written now and then

    handle = Attribute.handle


class MadeLate:
    async def handle(self, request: Ask) -> str:
        self.events = [Local(request.label)]
        return "done"


class Tuple(Attribute):
    events: Any

    async def handle(self, request: Ask) -> str:
        self.events = (*self.events, Local(request.label))
        return "done"


class Deque(Attribute):
    events: Any

    def __init__(self) -> None:
        self.events = deque()


Derived: Any = type("Derived", (Attribute, RequestHandler), {})  # to type checkers the base's is read only
ATTRIBUTES: list[type[Any]] = [Attribute, Field, SlottedField, OfTheClass, MadeLate, Tuple, Deque, Derived]


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("cls", ATTRIBUTES)
async def test_an_attribute_of_a_handler_of_requests_will_do(cls: type[Any], reused: bool) -> None:
    """Nobody has to write a property."""
    world = World()
    world.requests.bind(Ask, cls)
    if reused:
        one = cls()
        world.shelf.factories[cls] = lambda: one
    await world.mediator.send(Ask("first"))
    await world.mediator.send(Ask("second"))
    assert world.heard == ["first", "second"]


class Bus:
    """A collaborator that a handler has under this name."""


@pytest.mark.parametrize("other", [None, Bus(), "events", b"", {"a": 1}, lambda: None], ids=type)
async def test_an_attribute_that_is_something_else_is_the_hosts_own(other: object) -> None:
    class Has:
        def __init__(self) -> None:
            self.events = other

        async def handle(self, request: Ask) -> str:
            return "done"

    world = World()
    world.requests.bind(Ask, Has)
    assert await world.mediator.send(Ask()) == "done" and world.heard == []


class Handles:
    async def handle(self, _: Any) -> str:
        return "done"


class Method(Handles):
    def events(self) -> list[Event]:
        return []


class Async(Handles):
    @property
    async def events(self) -> list[Event]:
        return []


class AsyncGenerator(Handles):
    @property
    async def events(self) -> AsyncIterator[Event]:
        yield Event()


class Text(Handles):
    events = "joined"


@pytest.mark.parametrize(
    ("cls", "gives"),
    [(Method, "<bound method"), (Async, "<coroutine"), (AsyncGenerator, "<async_generator"), (Text, "'joined'")],
)
async def test_events_that_are_none_are_an_error_that_says_what_they_have_to_be(cls: type[Any], gives: str) -> None:
    """Of a handler of requests, and of one of events."""
    world = World()
    world.requests.bind(Ask, cls)
    text = rf"^{cls.__name__}\.events gives {gives}.* make it a property, neither a method nor async, that returns one$"
    with pytest.raises(TypeError, match=text):
        await world.mediator.send(Ask())
    world.events.bind(Local, cls)
    with pytest.raises(TypeError, match=text):
        await world.send(Local(1))


@pytest.mark.parametrize("wrong", [None, "joined", 7, ("joined", Event()), {"user_id": 1}, object(), Local], ids=type)
async def test_what_is_no_event_is_an_error_that_names_the_handler(
    wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it was collected; and nothing of that handler is dispatched, now or later."""
    world, one = World(), DoHandler()
    world.shelf.factories[DoHandler] = lambda: one
    with pytest.raises(
        TypeError, match=r"^DoHandler\.events has .* in it, which is no event: put objects of event classes the"
    ):
        await world.send(Local(1), wrong)
    await world.send(Local(2))
    assert world.heard == [2] and not caplog.records


class Pops:
    """What reads it away: as a whole, one by one, or as an iterator that is read once."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    @property
    def events(self) -> Any:
        found, self.seen = self.seen, []
        return found

    async def handle(self, request: Ask) -> str:
        self.seen += [Local(request.label), Local("more")]
        if request.label == "fails":
            raise LookupError
        return "done"


class Drains(Pops):
    @property
    def events(self) -> Any:
        while self.seen:
            yield self.seen.pop(0)


class Takes(Pops):
    """One each time."""

    @property
    def events(self) -> Any:
        found = self.seen.copy()
        del self.seen[:1]
        return found


class Once(Pops):
    def __init__(self) -> None:
        super().__init__()
        self.reader = iter(self.seen)

    @property
    def events(self) -> Any:
        return self.reader


@pytest.mark.parametrize("cls", [Pops, Drains, Takes, Once])
async def test_reading_that_removes_is_an_error_that_says_so(cls: type[Any]) -> None:
    """Nobody could put them back where they belong to another handler."""
    world = World()
    cls = type(cls.__name__, (cls,), {})  # a class that did so once is known
    world.requests.bind(Ask, cls)
    with pytest.raises(TypeError) as caught:
        await world.mediator.send(Ask())
    assert str(caught.value) == (
        f"{cls.__name__}.events gives fewer when it is read again; reading events must not remove them: give the list "
        "itself, or a copy"
    )
    assert world.heard == []


@pytest.mark.parametrize("cls", [Pops, Drains, Takes])
async def test_but_the_error_of_a_handler_that_fails_is_its_own(cls: type[Any]) -> None:
    world = World()
    cls = type(cls.__name__, (cls,), {})
    world.requests.bind(Ask, cls)
    with pytest.raises(LookupError):
        await world.mediator.send(Ask("fails"))
    with pytest.raises(TypeError, match="reading events must not remove them"):
        await world.mediator.send(Ask())
    assert world.heard == []


async def test_and_is_not_overlooked_where_another_one_has_read_them_away() -> None:
    """One that failed beside it, with an error of its own."""
    world, recorded, failed = World(), asyncio.Event(), asyncio.Event()

    class Shared(Pops):
        async def handle(self, request: Ask) -> str:
            if request.label == "fails":
                await recorded.wait()
                raise LookupError
            self.seen.append(Local(1))
            recorded.set()
            await failed.wait()
            return "done"

    one = Shared()
    world.shelf.factories[Shared] = lambda: one
    world.requests.bind(Ask, Shared)
    other = asyncio.create_task(world.mediator.send(Ask()))
    with pytest.raises(LookupError):
        await world.mediator.send(Ask("fails"))
    failed.set()
    with pytest.raises(TypeError, match="reading events must not remove them"):
        await other


async def test_an_error_in_the_property_is_raised_and_hides_no_error_of_the_handler() -> None:
    class Fails(RequestHandler[Ask, str]):
        asked = 0

        @property
        def events(self) -> list[Event]:
            if self.asked:
                raise AttributeError("order")
            return []

        async def handle(self, request: Ask) -> str:
            self.asked = 1
            if request.label == "fails":
                raise LookupError
            return "done"

    world = World()
    world.requests.bind(Ask, Fails)
    with pytest.raises(AttributeError, match="order"):
        await world.mediator.send(Ask())
    with pytest.raises(LookupError):
        await world.mediator.send(Ask("fails"))


async def test_events_of_what_the_handler_has_loaded_count(caplog: pytest.LogCaptureFixture) -> None:
    """As of an aggregate, which is not there when it begins."""
    orders: list[list[Event]] = []

    class Order(DoHandler):
        @property
        def events(self) -> list[Event]:
            return orders[-1] if orders else []

        async def handle(self, request: Do) -> str:
            orders.append([*request.events])
            return await super().handle(Do(then=request.then))

    world = World()
    world.shelf.factories[DoHandler] = Order
    await world.send(Local("inner"), Local("more"))
    with pytest.raises(LookupError):
        await world.send(Local("lost"), then=_fail)
    await world.send(Local("outer"), then=lambda: world.send(Local("inner")))
    assert world.heard == ["inner", "more", "inner", "outer"] and not caplog.records
    assert orders == [[]] * 4


async def _fail() -> None:
    raise LookupError
