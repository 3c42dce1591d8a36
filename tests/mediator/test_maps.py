"""The maps of requests and events to their handlers."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import pytest

from silbo import (
    AsyncEventDispatcher,
    DomainEvent,
    Event,
    EventHandler,
    EventMap,
    EventName,
    Mediator,
    Request,
    RequestHandler,
    RequestMap,
    Response,
    name_of,
)
from silbo.errors import AlreadyBound, NameInvalid
from tests.support.mediator import Do, DoHandler, Local, World


class OtherHandler(DoHandler):
    pass


class Hears(EventHandler[Event]):
    async def handle(self, event: Event) -> None: ...


def test_a_request_has_one_handler() -> None:
    requests = RequestMap()
    requests.bind(Do, DoHandler)
    assert requests.handler_of(Do) is DoHandler
    with pytest.raises(
        AlreadyBound, match="^Do is handled by DoHandler already, not also by OtherHandler: a request has"
    ):
        requests.bind(Do, OtherHandler)
    with pytest.raises(AlreadyBound, match="^Do is bound to DoHandler already; bind it once"):
        requests.bind(Do, DoHandler)
    assert requests.handler_of(Do) is DoHandler


def test_a_handler_needs_an_async_handle() -> None:
    class Sync:
        def handle(self, request: Do) -> None: ...

    class Nothing: ...

    wrong: Any
    for wrong in (Sync, Nothing):
        with pytest.raises(TypeError, match=f"{wrong.__name__} has no async handle.*write 'async def handle'"):
            RequestMap().bind(Do, wrong)
        with pytest.raises(TypeError, match=f"{wrong.__name__} is a class without an async handle"):
            EventMap().bind(Local, wrong)


def test_a_class_that_only_looks_like_a_handler_is_one() -> None:
    """No base class is needed."""

    class Plain:
        async def handle(self, request: Do) -> str:
            return ""

    requests = RequestMap()
    requests.bind(Do, Plain)
    assert requests.handler_of(Do) is Plain


@pytest.mark.parametrize("wrong", [(Do(), DoHandler), (Do, DoHandler()), ("Do", DoHandler)])
def test_objects_are_refused_where_classes_are_meant(wrong: Any) -> None:
    with pytest.raises(TypeError, match="bind takes two classes"):
        RequestMap().bind(*wrong)


def test_and_so_are_they_of_events() -> None:
    wrong: Any = Hears()
    with pytest.raises(TypeError, match="bind takes a class of handlers"):
        EventMap().bind(Local, wrong)
    wrong = "Local"
    with pytest.raises(TypeError, match="class of events or an EventName, not 'Local'"):
        EventMap().bind(wrong, Hears)


async def test_an_event_is_bound_by_its_class_or_by_its_name() -> None:
    """One queue: the second is what the first looks up."""

    class Named(Event):
        pass

    heard: list[str] = []

    class First(EventHandler[Named]):
        async def handle(self, event: Named) -> None:
            heard.append("first")

    class Second(EventHandler[Named]):
        async def handle(self, event: Named) -> None:
            heard.append("second")

    name = EventName("it.is.named", Named)
    world = World()
    world.events.bind(Named, First)
    world.events.bind(name, Second)
    await world.send(Named())
    assert heard == ["first", "second"] and world.dispatcher.get_listeners(name) == (First, Second)
    with pytest.raises(AlreadyBound, match=r"^it\.is\.named is bound to .*First already; bind it once"):
        world.events.bind(name, First)


def test_a_class_with_two_names_is_bound_by_one_of_them() -> None:
    class Twice(Event):
        pass

    several = [EventName("one", Twice)]
    several.append(two := EventName("two", Twice))
    with pytest.raises(NameInvalid, match="several names"):
        EventMap().bind(Twice, Hears)
    EventMap().bind(two, Hears)


async def test_one_map_serves_several_dispatchers() -> None:
    one, other = World(), World()
    one.events.listen(other.dispatcher, other.container)
    await other.send(Local(1))
    assert one.heard == [1] == other.heard


def test_a_handler_without_events_has_none() -> None:
    class Ask(Request[int]): ...

    class Answers(RequestHandler[Ask, int]):
        async def handle(self, request: Ask) -> int:
            return 1

    assert Answers().events == () == Hears().events


# -- what is bound by mistake ---------------------------------------------------------------------------------------


class Misspelled(RequestHandler[Do, str]):
    async def handel(self, request: Do) -> str:
        return ""


class MisspelledToo(EventHandler[Local]):
    async def handel(self, event: Local) -> None: ...


class NoArgument:
    async def handle(self) -> None: ...


class OneMore:
    async def handle(self, request: Do, again: int) -> None: ...


class Static:
    @staticmethod
    async def handle() -> None: ...


class Streams:
    async def handle(self, request: Do) -> AsyncIterator[str]:
        yield ""


class Answer(Response): ...


OWN = "has no handle of its own: write 'async def handle"
ALONE = r"handle can't be called with the {} alone: write 'async def handle\(self, {}\)'"


@pytest.mark.parametrize(
    ("request_type", "handler", "problem"),
    [
        (Do, Misspelled, f"Misspelled {OWN}"),
        (Do, RequestHandler, f"RequestHandler {OWN}"),
        (Do, NoArgument, ALONE.format("request", "request")),
        (Do, OneMore, ALONE.format("request", "request")),
        (Do, Static, ALONE.format("request", "request")),
        (
            Do,
            Streams,
            r"Streams\.handle has a 'yield', so it is a generator: a request is answered once, with 'return'",
        ),
        (Do, Hears, "Hears handles events: bind it in the EventMap"),
        (Local, DoHandler, "Local is no class of requests: derive one from silbo.Request"),
        (Answer, DoHandler, "Answer is no class of requests"),
        (Request, DoHandler, "Request is no class of requests"),
        (int, DoHandler, "int is no class of requests"),
        (DoHandler, OtherHandler, "^DoHandler is a handler: bind takes the request first, then its handler$"),
    ],
)
def test_what_can_never_work_is_refused_for_requests(request_type: Any, handler: Any, problem: str) -> None:
    """When it is bound, not when the first request comes."""
    with pytest.raises(TypeError, match=problem):
        RequestMap().bind(request_type, handler)


@pytest.mark.parametrize(
    ("event", "handler", "problem"),
    [
        (Local, MisspelledToo, f"MisspelledToo {OWN}"),
        (Local, EventHandler, f"EventHandler {OWN}"),
        (Local, NoArgument, ALONE.format("event", "event")),
        (Local, DoHandler, "DoHandler handles requests: bind it in the RequestMap"),
        (Do, Hears, "Do is no class of events: derive one from silbo.Event"),
        (EventName("done", Do), Hears, "Do is no class of events"),
        (Answer, Hears, "Answer is no class of events"),
        (int, Hears, "int is no class of events"),
    ],
)
def test_and_for_events(event: Any, handler: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        EventMap().bind(event, handler)


def test_what_may_work_is_taken() -> None:
    """An interface that the container knows, a decorated method, one of the class, an exception as an event."""

    class Interface(RequestHandler[Do, str]):
        @abstractmethod
        async def handle(self, request: Do) -> str: ...

    def injected(method: Any) -> Any:
        @functools.wraps(method)
        async def call(self: object, given: object) -> Any:
            return await method(self, given, 1)

        return call

    class Decorated:
        handle = injected(OneMore.handle)

    class OfTheClass:
        @classmethod
        async def handle(cls, given: Any) -> None: ...

    class StaticToo:
        @staticmethod
        async def handle(given: Any) -> None: ...

    class Plain: ...

    class Both(Request[None], DomainEvent): ...

    handler: Any
    event: Any
    for handler in (Interface, Decorated, OfTheClass, StaticToo):
        RequestMap().bind(Do, handler)
    for handler in (Decorated, OfTheClass, StaticToo):
        for event in (Plain, LookupError, Both, EventName("any")):
            EventMap().bind(event, handler)
    plain: Any = Plain
    RequestMap().bind(plain, OfTheClass)
    RequestMap().bind(Both, OfTheClass)


# -- two classes of events with one name ----------------------------------------------------------------------------


def joined(module: str, **more: Any) -> Any:
    return type("UserJoined", (DomainEvent,), {"__module__": module, **more})


def hearing(heard: list[object]) -> Any:
    class Heard:
        async def handle(self, event: object) -> None:
            heard.append(event)

    return Heard


ONE_NAME = (
    r"'UserJoined': meetings\.UserJoined and billing\.UserJoined have one name, so handlers of one would hear the events of "
    "the other: give each an EventName"
)


def test_two_classes_of_one_name_are_refused_in_a_map() -> None:
    """Also where one class is to handle both: that is not the same event twice."""
    events, handler = EventMap(), hearing([])
    events.bind(joined("meetings"), handler)
    for other in (hearing([]), handler):
        with pytest.raises(NameInvalid, match=ONE_NAME):
            events.bind(joined("billing"), other)
    assert repr(events).count("UserJoined") == 1


def test_and_in_two_maps_on_one_dispatcher() -> None:
    """Whichever way round it is wired."""
    world, events = World(), EventMap()
    world.events.bind(joined("meetings"), hearing([]))
    events.bind(joined("billing"), hearing([]))
    with pytest.raises(NameInvalid, match=ONE_NAME):
        events.listen(world.dispatcher, world.container)
    late = EventMap()
    late.listen(world.dispatcher, world.container)
    with pytest.raises(NameInvalid, match=ONE_NAME):
        late.bind(joined("billing"), hearing([]))
    assert repr(late) == "<EventMap: empty>"
    events.listen(AsyncEventDispatcher(), world.container)


async def test_an_event_of_the_other_class_is_not_heard_but_an_error() -> None:
    """However it comes there: collected by a handler, or dispatched."""
    world, heard = World(), list[object]()
    mine, other = joined("meetings"), joined("billing")
    world.events.bind(mine, hearing(heard))
    with pytest.raises(NameInvalid, match=ONE_NAME):
        await world.send(other())
    event: Any = other()
    with pytest.raises(NameInvalid, match=ONE_NAME):
        await world.dispatcher.adispatch(name_of(event), event)
    event = mine()
    await world.dispatcher.adispatch(name_of(event), event)
    await world.dispatcher.adispatch("UserJoined")  # a plain event under the name
    assert heard[0] is event and type(heard[1]) is Event


def named(called: str, *bases: type) -> tuple[Any, Any]:
    """A class, and an EventName that was copied from another's, and not changed."""
    cls = type(called, bases or (DomainEvent,), {"__module__": "meetings"})
    return cls, EventName("user.joined", cls)


ONE_EVENT_NAME = (
    r"'user\.joined': meetings\.UserJoined and meetings\.UserLeft have one name, .*: give each an EventName of its own$"
)


def test_two_event_names_of_one_string_for_two_classes_are_refused() -> None:
    """Bound by class or by name, in a map and in two on one dispatcher; also beside a class that is called so."""
    (mine, name), (other, its) = named("UserJoined"), named("UserLeft")
    for first, second in ((mine, other), (name, its), (mine, its), (name, other)):
        events = EventMap()
        events.bind(first, hearing([]))
        with pytest.raises(NameInvalid, match=ONE_EVENT_NAME):
            events.bind(second, hearing([]))
        world, late = World(), EventMap()
        events.listen(world.dispatcher, world.container)
        late.listen(world.dispatcher, world.container)
        with pytest.raises(NameInvalid, match=ONE_EVENT_NAME):
            late.bind(second, hearing([]))
    called = EventMap()
    called.bind(EventName("UserJoined", joined("meetings")), hearing([]))
    with pytest.raises(NameInvalid, match=ONE_NAME):
        called.bind(joined("billing"), hearing([]))


async def test_nor_does_a_handler_hear_the_event_of_the_other() -> None:
    world, heard = World(), list[object]()
    (mine, name), (other, _) = named("UserJoined"), named("UserLeft")
    world.events.bind(mine, hearing(heard))
    with pytest.raises(NameInvalid, match=ONE_EVENT_NAME):
        await world.send(other())
    with pytest.raises(NameInvalid, match=ONE_EVENT_NAME):
        await world.dispatcher.adispatch(name, other())
    await world.send(mine())
    await world.dispatcher.adispatch(name, Event())  # a plain one
    await world.dispatcher.adispatch(name, Local(1))  # of a class that has another: whoever says so means it
    assert list(map(type, heard)) == [mine, Event, Local]


async def test_a_handler_hears_what_derives_from_its_class() -> None:
    """With a name of its own, with the same name, and where its base was defined again."""
    world, heard = World(), list[object]()
    (base, name), (again, _) = named("UserJoined"), named("UserJoined")
    world.events.bind(base, hearing(heard))
    world.events.bind(again, hearing(heard))
    events = [type("Sub", (base,), {})(), named("Sub", base)[0](), named("Sub", again)[0](), again()]
    for event in events:
        await world.dispatcher.adispatch(name, event)
    assert len(heard) == 8 and set(heard) == set(events)


async def test_an_event_name_without_a_class_is_beside_one_that_has_one() -> None:
    """A consumer's, say: it takes whatever comes under the name."""
    world, heard, all_of_them = World(), list[object](), list[object]()
    (mine, name), (other, _) = named("UserJoined"), named("UserLeft")
    bare: Any = EventName("user.joined")
    world.events.bind(bare, hearing(all_of_them))
    await world.send(other())
    world.events.bind(name, hearing(heard))
    await world.send(mine())
    assert [list(map(type, both)) for both in (heard, all_of_them)] == [[mine], [other, mine]]


async def test_with_names_of_their_own_each_has_its_handlers() -> None:
    world, heard, others = World(), list[object](), list[object]()
    mine, other = joined("meetings"), joined("billing")
    name = EventName("billing.user_joined", other)
    world.events.bind(mine, hearing(heard))
    world.events.bind(other, hearing(others))
    await world.send(mine(), other())
    assert [list(map(type, both)) for both in (heard, others)] == [[mine], [other]]
    assert name_of(other) is name


async def test_a_class_that_is_defined_again_is_the_same() -> None:
    """As in a notebook, where a cell is run again."""
    world, heard = World(), list[object]()
    world.events.bind(joined("meetings"), hearing(heard))
    world.events.bind(joined("meetings"), hearing(heard))
    await world.send(joined("meetings")())
    assert len(heard) == 2


async def test_an_event_name_that_comes_after_the_handlers_is_an_error() -> None:
    """They would not hear it: they are registered under the class's name."""
    world, cls = World(), joined("meetings")
    world.events.bind(cls, hearing([]))
    with pytest.raises(
        NameInvalid, match="^'user.joined': handlers are bound to UserJoined already.*make the EventName bef"
    ):
        EventName("user.joined", cls)
    assert name_of(cls) == "UserJoined"
    EventName("user.joined")  # of no class
    EventName("of.another", joined("meetings"))


def test_but_not_after_handlers_that_nobody_has_any_more() -> None:
    """A test's, say."""
    cls = joined("meetings")
    EventMap().bind(cls, hearing([]))
    name = EventName("user.joined", cls)
    EventMap().bind(cls, hearing([]))
    assert name_of(cls) is name and EventName("user.joined", cls) == name


def test_one_handler_of_two_maps_on_one_dispatcher_is_bound_twice() -> None:
    """It would handle each event twice; also where a guard is around it."""
    for options in ({}, {"on_error": "collect"}):
        world, events = World(**options), EventMap()
        events.bind(EventName("other"), Hears)
        events.bind(Local, world.hears)
        with pytest.raises(AlreadyBound, match=r"^Local is bound to World\..*Hears already; bind it once$"):
            Mediator(request_map=world.requests, event_map=events, dispatcher=world.dispatcher)
        assert world.dispatcher.get_listeners("other") == ()
        events = EventMap()
        events.listen(world.dispatcher, world.container)
        with pytest.raises(AlreadyBound):
            events.bind(Local, world.hears)


# -- what a debugger shows ------------------------------------------------------------------------------------------


def test_maps_and_mediators_show_what_is_bound() -> None:
    assert repr(RequestMap()) == "<RequestMap: empty>" and repr(EventMap()) == "<EventMap: empty>"
    world = World()
    hears = world.hears.__qualname__
    assert repr(world.mediator) == (
        f"<Mediator: <RequestMap: Do -> DoHandler, Also -> AlsoHandler>, <EventMap: Local -> {hears}>, SimpleContainer>"
    )
    assert (
        repr(Mediator(request_map=RequestMap(), dispatcher=world.dispatcher))
        == "<Mediator: <RequestMap: empty>, SimpleContainer>"
    )


def test_a_handler_of_a_map_is_described_as_any_listener() -> None:
    """By its class, with where it comes from."""
    events = EventMap()
    events.bind(Local, Hears)
    world = World()
    events.listen(world.dispatcher, world.container)
    [_, row] = world.dispatcher.describe("Local")
    assert row.listener is Hears and row.plugin == __name__ and __file__ in row.defined_at
