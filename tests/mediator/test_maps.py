"""What is bound to what."""

from __future__ import annotations

from typing import Any

import pytest

from silbo import Event, EventHandler, EventMap, EventName, Request, RequestHandler, RequestMap
from silbo.errors import AlreadyBound, NameInvalid
from tests.mediator.support import Do, DoHandler, Local, World


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

    EventName("one", Twice)
    two = EventName("two", Twice)
    with pytest.raises(NameInvalid, match="several names"):
        EventMap().bind(Twice, Hears)
    EventMap().bind(two, Hears)


async def test_one_map_serves_several_dispatchers() -> None:
    one, other = World(), World()
    one.events.listen(other.dispatcher, other.shelf)
    await other.send(Local(1))
    assert one.heard == [1] == other.heard


def test_a_handler_without_events_has_none() -> None:
    class Ask(Request[int]): ...

    class Answers(RequestHandler[Ask, int]):
        async def handle(self, request: Ask) -> int:
            return 1

    assert Answers().events == () == Hears().events
