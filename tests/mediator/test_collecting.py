"""Handlers that collect in one list, as in that of a unit of work: nothing is lost in silence, nothing is sent twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias

import pytest
import rodi
from hypothesis import given, settings
from hypothesis import strategies as st

from silbo import AsyncEventDispatcher, Bridge, Event, EventMap, Mediator, RequestMap
from silbo.containers.rodi import RodiContainer
from silbo.errors import FollowUpsExceeded, HandlerShared
from tests.support.mediator import Do, Leaves, Local, Recorder, Then, World, fail


class Uow:
    """Scoped: what the aggregates of one request have recorded."""

    def __init__(self) -> None:
        self.events: list[Event] = []


class DoHandler:
    def __init__(self, uow: Uow) -> None:
        self.uow = uow

    @property
    def events(self) -> Any:
        return self.uow.events

    async def handle(self, request: Do) -> str:
        for event in request.events:
            self.record(event)
        if request.then is not None:
            await request.then()
        return "done"

    def record(self, event: Event) -> None:
        self.uow.events.append(event)


class Copies(DoHandler):
    @property
    def events(self) -> Any:
        return self.uow.events.copy()


class Tuples(DoHandler):
    @property
    def events(self) -> Any:
        return tuple(self.uow.events)


class Replaces(DoHandler):
    def record(self, event: Event) -> None:
        self.uow.events = [*self.uow.events, event]


SHOWN: list[type[DoHandler]] = [Copies, Tuples]
"""Handlers whose events can't be removed, for they show a copy of the list."""
Kind: TypeAlias = type[DoHandler]


class Room:
    """A mediator on rodi, whose handlers share a scoped ``Uow``. ``heard`` has the labels in the order of their handling.

    ``kind`` handles the requests and the events. With ``own`` each handler has a ``Uow`` of its own.
    """

    def __init__(
        self,
        kind: Kind = DoHandler,
        *,
        scoped: bool = False,
        on_error: Any = "raise",
        notes: bool = False,
        uow: Uow | None = None,
        own: bool = False,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.heard: list[Any] = []
        self.uows: list[Uow] = []
        heard, uows, container = self.heard, self.uows, rodi.Container()

        class Hears(kind):  # type: ignore[misc, valid-type]
            async def handle(self, request: Any) -> Any:
                heard.append(request.label)
                for event in request.follow:
                    self.record(event)
                if request.then is not None:
                    await request.then()

        def make() -> Uow:
            uows.append(uow or Uow())
            return uows[-1]

        (container.add_transient_by_factory if own else container.add_scoped_by_factory)(make, Uow)
        for cls in (kind, Hears, Notes):
            (container.add_scoped if scoped else container.add_transient)(cls)
        self.container = container
        self.dispatcher = AsyncEventDispatcher(container=RodiContainer(container), on_error=on_error)
        self.broker = Recorder()
        self.dispatcher.add_subscriber(Bridge(self.broker))
        requests, events = RequestMap(), EventMap()
        requests.bind(Do, kind)
        events.bind(Local, Hears)
        options["middlewares"] = [Notes] * notes + options.get("middlewares", [])
        self.mediator = Mediator(request_map=requests, dispatcher=self.dispatcher, event_map=events, **options)

    async def send(self, *events: Event, then: Then | None = None) -> str:
        return await self.mediator.send(Do(events=events, then=then))

    def record(self, event: Event) -> None:
        """As an aggregate does it, whatever handler is at work."""
        self.kind(self.uows[-1]).record(event)


class Notes:
    """A middleware that records, before and after."""

    def __init__(self, uow: Uow) -> None:
        self.uow = uow

    async def __call__(self, request: Do, handle: Any) -> Any:
        self.uow.events.append(Local("begins"))
        response = await handle(request)
        self.uow.events.append(Local("ends"))
        return response


# -- one after another -----------------------------------------------------------------------------------------


async def test_what_a_middleware_records_before_the_handler_goes_with_it_and_what_comes_later_follows() -> None:
    room = Room(notes=True)
    await room.send(Local("first", [Local("of first")]), Local("second"))
    assert room.heard == ["begins", "first", "second", "of first", "ends"]


async def test_what_others_record_while_events_follow_comes_last_and_is_counted() -> None:
    """For it might go on for ever."""
    room = Room(max_follow_ups=3)

    @room.dispatcher.listen("Local")
    async def record(event: Local) -> None:
        if event.label in ("first", "again"):
            room.record(Local("recorded" if event.label == "first" else "again"))

    await room.send(Local("first"), Local("next"))
    assert room.heard == ["first", "next", "recorded"]
    with pytest.raises(FollowUpsExceeded):
        await room.send(Local("again"))
    assert room.heard[3:] == ["again"] * 5  # the first, what was recorded meanwhile, and three more


async def test_one_event_in_two_lists_is_two() -> None:
    """As where an event that says nothing more is made once for all."""
    world, event = World(), Local("once for all")

    async def inner() -> None:
        await world.also(event, event)

    await world.send(event, then=inner)
    assert world.heard == ["once for all"] * 3


async def test_one_event_that_is_recorded_again_is_sent_again() -> None:
    """By the same object, in one unit of work."""
    room, event = Room(scoped=True, own=True), Local("again")

    async def twice() -> None:
        for _ in range(2):
            await room.send(event)

    await room.dispatcher.adispatch("Local", Local("first", then=twice))
    assert room.heard == ["first", "again", "again"]


async def test_a_command_within_a_command_takes_its_own_events_alone() -> None:
    room = Room(own=True)

    async def inner() -> None:
        await room.send(Local("inner"), then=lambda: room.send(Local("innermost")))

    await room.send(Local("outer"), then=inner)
    assert room.heard == ["innermost", "inner", "outer"]


@pytest.mark.parametrize(("scoped", "shared"), [(False, "list"), (True, "object")])
async def test_a_command_within_a_command_on_one_list_or_object_is_an_error(scoped: bool, shared: str) -> None:
    """The inner command would have the events of the outer one, which may fail."""
    room = Room(scoped=scoped)
    errors: list[HandlerShared] = []

    async def inner() -> None:
        with pytest.raises(HandlerShared) as caught:
            await room.send(Local("inner"))
        errors.append(caught.value)

    with pytest.raises(HandlerShared) as caught:
        await room.send(Local("outer"), then=inner)
    errors.append(caught.value)
    assert [error.shared for error in errors] == [shared] * 2 and room.heard == []


async def test_a_handler_that_fails_leaves_nothing_to_the_one_around_it() -> None:
    room = Room(own=True)

    async def inner() -> None:
        with pytest.raises(LookupError):
            await room.send(Local("lost"), then=fail)
        await room.send(Local("inner"))

    await room.send(Local("outer"), then=inner)
    assert room.heard == ["inner", "outer"]


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", [DoHandler, Replaces])
async def test_a_middleware_may_try_again(kind: Kind, scoped: bool) -> None:
    tries: list[int] = []

    async def twice(request: Do, handle: Any) -> Any:
        try:
            return await handle(request)
        except LookupError:
            return await handle(request)

    async def fail_once() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise LookupError

    room = Room(kind, scoped=scoped, middlewares=[twice])
    await room.send(Local("one"), then=fail_once)
    assert room.heard == ["one"] and len(tries) == 2


async def test_a_try_again_keeps_what_was_recorded_before() -> None:
    async def twice(request: Do, handle: Any) -> Any:
        with pytest.raises(LookupError):
            await handle(request)
        return await handle(Do(events=[Local("second")]))

    room = Room(notes=True, middlewares=[twice])
    await room.send(Local("lost"), then=fail)
    assert room.heard == ["begins", "second", "ends"]


Tree: TypeAlias = tuple[bool, Sequence["Tree | int"]]
"""A command: whether it fails at the end; and what it does: records an event, or has another command."""
TREES: st.SearchStrategy[Any] = st.recursive(
    st.just(0), lambda inner: st.tuples(st.booleans(), st.lists(inner, max_size=4)), max_leaves=12
).filter(lambda tree: tree != 0)


@pytest.mark.parametrize("kind", [DoHandler, Replaces, *SHOWN])
@settings(max_examples=40, deadline=None)
@given(tree=TREES)
async def test_what_leaves_is_what_succeeded_however_commands_are_within_commands(kind: Kind, tree: Tree) -> None:
    """Each event of a command that has succeeded, as have all those around it: once. And no other."""
    room, labels = Room(kind, own=True), iter(range(100))

    async def command(tree: Tree) -> list[object]:
        fails, parts = tree
        recorded: list[object] = []

        async def body() -> None:
            handler = kind(room.uows[-1])
            for part in parts:
                if isinstance(part, int):
                    recorded.append(next(labels))
                    handler.record(Leaves(recorded[-1]))
                else:
                    recorded.extend(await command(part))
            if fails:
                await fail()

        try:
            await room.send(then=body)
        except LookupError:
            return []
        return recorded

    expected = await command(tree)
    assert sorted(map(str, room.broker.got)) == sorted(map(str, expected))


# -- copies of one list: what can't be removed is refused ------------------------------------------------------


@pytest.mark.parametrize("kind", SHOWN)
async def test_a_copy_will_do_for_a_handler_that_has_the_list_alone(kind: Kind) -> None:
    room = Room(kind, own=True)
    await room.send(Local(1, [Local("1a")]), Local(2))
    await room.send(Local(3))
    assert room.heard == [1, 2, "1a", 3]


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", SHOWN)
async def test_events_that_a_handler_finds_in_a_copy_are_refused(kind: Kind, scoped: bool) -> None:
    """Nobody could tell which of them were sent."""
    room = Room(kind, scoped=scoped)
    text = (
        rf"^{kind.__name__}\.events is not empty when {kind.__name__} begins, and events can't be removed from a tuple or a copy: "
        rf"give the list itself, 'return self\._events', or register {kind.__name__} as transient, so that each run has a new one$"
    )
    with pytest.raises(TypeError, match=text):
        await room.send(Local("outer"), Leaves("lost"), then=lambda: room.send(Local("inner")))
    assert room.heard == [] and room.broker.got == []


@pytest.mark.parametrize("kind", SHOWN)
async def test_no_second_try_with_a_copy_finds_the_events_of_the_first(kind: Kind) -> None:
    async def twice(request: Do, handle: Any) -> Any:
        with pytest.raises(LookupError):
            await handle(request)
        return await handle(Do())

    room = Room(kind, middlewares=[twice])
    with pytest.raises(TypeError, match="give the list itself"):
        await room.send(Leaves("lost"), then=fail)
    assert room.broker.got == []


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", SHOWN)
async def test_a_copy_does_not_show_again_what_another_one_has_taken_inside_of_it(kind: Kind, fails: bool) -> None:
    """Nor what that one has dropped."""
    room = Room(kind)

    async def inner() -> None:
        if fails:
            with pytest.raises(LookupError):
                await room.send(Leaves("inner"), then=fail)
        else:
            await room.send(Leaves("inner"))

    with pytest.raises(HandlerShared, match="gives events of a list that another handler had at the same time"):
        await room.send(then=inner)
    assert room.broker.got == []


# -- side by side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
async def test_side_by_side_one_list_is_an_error_that_says_so(scoped: bool) -> None:
    """Or one handler: nobody could tell whose the events are, and one of the two may fail."""
    room, both = Room(scoped=scoped, max_concurrent_event_handlers=2), asyncio.Barrier(2)
    with pytest.raises(BaseExceptionGroup) as caught:
        await room.send(*(Local(n, [Local(f"of {n}")], both.wait) for n in range(2)))
    errors = caught.value.exceptions
    assert [type(error) for error in errors] == [HandlerShared] * 2 and sorted(room.heard) == [0, 1]
    expected = "Hears object was in use twice at the same time" if scoped else "gives events of a list that another"
    assert all(expected in str(error) for error in errors)


async def test_side_by_side_handlers_with_lists_of_their_own_lose_none() -> None:
    world, both = World(max_concurrent_event_handlers=2), asyncio.Barrier(2)
    world.container.factories[world.hears] = world.hears
    await world.send(*(Local(n, [Local(f"of {n}")], both.wait) for n in range(2)))
    assert world.heard == [0, 1, "of 0", "of 1"]


@pytest.mark.parametrize("fails", [(True, False), (False, True), (True, True)], ids=["first", "last", "both"])
async def test_side_by_side_a_failure_drops_nothing_of_the_other_in_silence(fails: tuple[bool, bool]) -> None:
    """An error policy that lets the others go on hears of each that lost its events."""
    errors: list[BaseException] = []
    room = Room(max_concurrent_event_handlers=2, on_error=lambda error, *_: errors.append(error))
    both = asyncio.Barrier(2)

    def work(number: int) -> Any:
        async def run() -> None:
            await both.wait()
            if fails[number]:
                raise LookupError

        return run

    await room.send(*(Local(n, [Local(f"of {n}")], work(n)) for n in range(2)))
    kinds = sorted(type(error).__name__ for error in errors)
    assert kinds == sorted("LookupError" if failed else "HandlerShared" for failed in fails)
    assert sorted(room.heard) == [0, 1]


async def test_concurrent_listeners_on_one_list_are_an_error() -> None:
    room, both = Room(), asyncio.Barrier(2)

    class Other(DoHandler):
        async def handle(self, request: Any) -> Any:
            self.record(Local(type(self).__name__))
            await both.wait()

    class Another(Other): ...

    for cls in (Other, Another):
        room.container.add_transient(cls)
        room.dispatcher.add_listener("start", cls, concurrent=True)
    with pytest.raises(BaseExceptionGroup) as caught:
        await room.dispatcher.adispatch("start")
    assert [type(error) for error in caught.value.exceptions] == [HandlerShared] * 2 and room.heard == []


@pytest.mark.parametrize("kind", [DoHandler, Replaces])
async def test_a_list_that_a_handler_takes_over_from_another_at_work_is_an_error(kind: Kind) -> None:
    """As where it sets ``self._events`` to a list that it got elsewhere."""
    room, began = Room(uow=Uow()), asyncio.Event()

    class TakesOver(DoHandler):
        def __init__(self) -> None:
            self.own: list[Event] = []

        @property
        def events(self) -> Any:
            return self.own

        async def handle(self, request: Any) -> Any:
            await began.wait()
            self.own = room.uows[0].events
            self.own.append(Local("whose"))

    room.container.add_transient(TakesOver)
    room.dispatcher.add_listener("start", TakesOver)
    other = asyncio.create_task(room.dispatcher.adispatch("start"))

    async def wait() -> None:
        began.set()
        with pytest.raises(HandlerShared):
            await other

    with pytest.raises(HandlerShared):
        await room.send(Local("first"), then=wait)
    assert room.heard == []


# -- across units of work --------------------------------------------------------------------------------------


async def test_a_list_that_two_requests_have_at_once_is_an_error_that_says_so() -> None:
    """As a unit of work that was registered as a singleton."""
    room, both = Room(uow=Uow()), asyncio.Barrier(2)
    errors = await asyncio.gather(*(room.send(Local(n), then=both.wait) for n in range(2)), return_exceptions=True)
    assert [type(error) for error in errors] == [HandlerShared] * 2 and room.heard == []
    assert str(errors[0]) == (
        "DoHandler.events gives events of a list that another handler had at the same time, so nobody knows whose they are; "
        "give each handler a list of its own"
    )
    await room.send(Local("alone"))
    assert room.heard == ["alone"]


async def test_of_two_requests_one_after_another_in_a_shared_list_each_has_its_own() -> None:
    """While the first one's events follow, the second one's handler is at work."""
    room, done, go_on = Room(uow=Uow()), asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        done.set()
        await go_on.wait()

    async def second() -> None:
        go_on.set()
        await first
        raise LookupError

    @room.dispatcher.listen("Local")
    async def listen(event: Local) -> None:
        if event.label == "first":
            await hold()

    first = asyncio.create_task(room.send(Local("first")))
    await done.wait()
    with pytest.raises(LookupError):
        await room.send(Local("lost"), then=second)
    assert room.heard == ["first"]
    await room.send(Local("third"))
    assert room.heard == ["first", "third"]
