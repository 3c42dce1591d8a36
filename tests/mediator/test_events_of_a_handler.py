"""The ``events`` of a handler: the shapes that count, and the errors for the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from silbo import Event, Request, RequestHandler
from silbo.errors import HandlerShared
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


Derived: Any = type("Derived", (Attribute, RequestHandler), {})  # to type checkers the base's is read only
ATTRIBUTES: list[type[Any]] = [Attribute, Field, SlottedField, OfTheClass, MadeLate, Derived]


@pytest.mark.parametrize(
    ("cls", "reused"), [(Tuple, False), *((cls, reused) for cls in ATTRIBUTES for reused in (False, True))]
)
async def test_an_attribute_of_a_handler_of_requests_will_do(cls: type[Any], reused: bool) -> None:
    """Nobody has to write a property."""
    world = World()
    world.requests.bind(Ask, cls)
    if reused:
        one = cls()
        world.container.factories[cls] = lambda: one
    await world.mediator.send(Ask("first"))
    await world.mediator.send(Ask("second"))
    assert world.heard == ["first", "second"]


async def test_a_tuple_will_not_do_for_a_handler_that_is_used_again() -> None:
    """Its events can't be removed, and would be sent a second time."""
    world, one = World(), Tuple()
    world.requests.bind(Ask, Tuple)
    world.container.factories[Tuple] = lambda: one
    await world.mediator.send(Ask("first"))
    with pytest.raises(TypeError, match=r"^Tuple\.events is not empty when Tuple begins.* register Tuple as transient"):
        await world.mediator.send(Ask("second"))
    assert world.heard == ["first"]


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


class Generator(Handles):
    @property
    def events(self) -> Iterator[Event]:
        yield Event()


class Reader(Handles):
    @property
    def events(self) -> Iterator[Event]:
        return iter([Event()])


class Deque(Handles):
    @property
    def events(self) -> deque[Event]:
        return deque()


class Set(Handles):
    events = frozenset[Event]()


@pytest.mark.parametrize(
    ("cls", "gives"),
    [
        (Method, "<bound method"),
        (Async, "<coroutine"),
        (AsyncGenerator, "<async_generator"),
        (Text, "'joined'"),
        (Generator, "<generator"),
        (Reader, "<list_iterator"),
        (Deque, r"deque\("),
        (Set, r"frozenset\("),
    ],
)
async def test_events_that_are_none_are_an_error_that_says_what_they_have_to_be(cls: type[Any], gives: str) -> None:
    """Of a handler of requests, and of one of events."""
    world = World()
    world.requests.bind(Ask, cls)
    text = (
        rf"^{cls.__name__}\.events gives {gives}.*, neither a list nor a tuple: make it a property, no method, not async and "
        r"without 'yield', that returns a list of events: 'return self\._events'$"
    )
    with pytest.raises(TypeError, match=text):
        await world.mediator.send(Ask())
    world.events.bind(Local, cls)
    with pytest.raises(TypeError, match=text):
        await world.send(Local(1))


async def test_an_attribute_that_is_another_sequence_is_refused_too() -> None:
    """The host may mean it to collect: its events would be lost in silence."""

    class Has:
        def __init__(self) -> None:
            self.events = deque[Event]()

        async def handle(self, request: Ask) -> str:
            return "done"

    world = World()
    world.requests.bind(Ask, Has)
    with pytest.raises(TypeError, match=r"Has\.events gives deque\(\[\]\), neither a list nor a tuple"):
        await world.mediator.send(Ask())


@pytest.mark.parametrize("wrong", [None, "joined", 7, ("joined", Event()), {"user_id": 1}, object(), Local], ids=type)
async def test_what_is_no_event_is_an_error_that_names_the_handler(
    wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is raised where it was collected; and nothing of that handler is dispatched, now or later."""
    world, one = World(), DoHandler()
    world.container.factories[DoHandler] = lambda: one
    with pytest.raises(
        TypeError, match=r"^DoHandler\.events has .* in it, which is no event: put objects of event classes the"
    ):
        await world.send(Local(1), wrong)
    await world.send(Local(2))
    assert world.heard == [2] and not caplog.records


class Pops:
    """Reading takes them away, as in ``return self.uow.pop_events()``."""

    def __init__(self) -> None:
        self.seen: list[Event] = []

    @property
    def events(self) -> list[Event]:
        found, self.seen = self.seen, []
        return found

    async def handle(self, request: Ask) -> str:
        self.seen += [Local(request.label), Local("more")]
        if request.label == "fails":
            raise LookupError
        return "done"


async def test_reading_may_remove_for_it_is_read_once() -> None:
    """When the handler has succeeded, and the same when it has failed."""
    world, one = World(), Pops()
    world.requests.bind(Ask, Pops)
    world.container.factories[Pops] = lambda: one
    await world.mediator.send(Ask("first"))
    with pytest.raises(LookupError):
        await world.mediator.send(Ask("fails"))
    await world.mediator.send(Ask("second"))
    assert world.heard == ["first", "more", "second", "more"]


async def test_reading_may_not_remove_what_was_there_before() -> None:
    """It would be lost in silence: the handler has yet to begin, and may fail."""
    world, one = World(), Pops()
    world.requests.bind(Ask, Pops)
    world.container.factories[Pops] = lambda: one
    one.seen.append(Local("before"))
    with pytest.raises(TypeError, match=r"^Pops\.events is not empty when Pops begins"):
        await world.mediator.send(Ask())
    assert world.heard == []


async def test_reading_that_removes_is_not_overlooked_where_another_one_has_read_them_away() -> None:
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
    world.container.factories[Shared] = lambda: one
    world.requests.bind(Ask, Shared)
    other = asyncio.create_task(world.mediator.send(Ask()))
    await recorded.wait()
    one.seen, kept = [], one.seen  # so that the second one may begin
    failing = asyncio.create_task(world.mediator.send(Ask("fails")))
    await asyncio.sleep(0)
    one.seen += kept
    with pytest.raises(LookupError):
        await failing
    failed.set()
    with pytest.raises(HandlerShared):
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
    world.container.factories[DoHandler] = Order
    await world.send(Local("one"), Local("more"))
    with pytest.raises(LookupError):
        await world.send(Local("lost"), then=_fail)
    await world.send(Local("two"))
    assert world.heard == ["one", "more", "two"] and not caplog.records
    assert orders == [[]] * 3


async def _fail() -> None:
    raise LookupError
