"""Handlers that collect in one place, as in the list of a unit of work: nothing is lost, nothing is sent twice."""

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


class Generates(DoHandler):
    @property
    def events(self) -> Any:
        yield from self.uow.events


class Replaces(DoHandler):
    def record(self, event: Event) -> None:
        self.uow.events = [*self.uow.events, event]


KINDS = [DoHandler, Copies, Tuples, Generates]
Kind: TypeAlias = type[DoHandler]


class Room:
    """A mediator on rodi, whose handlers share a scoped ``Uow``. ``heard`` has the labels in the order of their handling.

    ``kind`` handles the requests, ``follows`` the events, by default the same.
    """

    def __init__(
        self,
        kind: Kind = DoHandler,
        *,
        scoped: bool = False,
        on_error: Any = "raise",
        notes: bool = False,
        uow: Uow | None = None,
        follows: Kind | None = None,
        **options: Any,
    ) -> None:
        self.kind = kind
        self.heard: list[Any] = []
        self.uows: list[Uow] = []
        heard, uows, container = self.heard, self.uows, rodi.Container()

        class Hears(follows or kind):  # type: ignore[misc]
            async def handle(self, request: Any) -> Any:
                heard.append(request.label)
                for event in request.follow:
                    self.record(event)
                if request.then is not None:
                    await request.then()

        def make() -> Uow:
            uows.append(uow or Uow())
            return uows[-1]

        container.add_scoped_by_factory(make, Uow)
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


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_command_within_a_command_takes_its_own_events_alone(kind: Kind, scoped: bool) -> None:
    """Also where it is of the same kind, and its handler the same object."""
    room = Room(kind, scoped=scoped)

    async def inner() -> None:
        await room.send(Local("inner"), then=lambda: room.send(Local("innermost")))

    await room.send(Local("outer"), then=inner)
    assert room.heard == ["innermost", "inner", "outer"]


async def test_what_a_middleware_records_before_the_handler_goes_with_it_and_what_comes_later_follows() -> None:
    room = Room(notes=True)
    await room.send(Local("outer"), then=lambda: room.send(Local("inner", [Local("of inner")])))
    # The inner command's own are nobody's: what it finds is that of the command around it.
    assert room.heard == ["inner", "of inner", "begins", "outer", "begins", "ends", "ends"]


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


@pytest.mark.parametrize("kind", KINDS)
async def test_one_event_that_is_recorded_again_is_sent_again(kind: Kind) -> None:
    """By the same object, in one unit of work."""
    room, event = Room(kind, scoped=True), Local("again")

    async def twice() -> None:
        for _ in range(2):
            await room.send(event)
            room.uows[-1].events.clear()

    await room.dispatcher.adispatch("Local", Local("first", then=twice))
    assert room.heard == ["first", "again", "again"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handler_that_fails_leaves_nothing_to_the_one_around_it(kind: Kind) -> None:
    room = Room(kind)

    async def inner() -> None:
        with pytest.raises(LookupError):
            await room.send(Local("lost"), then=fail)
        await room.send(Local("inner"))

    await room.send(Local("outer"), then=inner)
    assert room.heard == ["inner", "outer"]


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, Replaces])
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


@pytest.mark.parametrize("kind", [DoHandler, Replaces])
async def test_a_try_again_keeps_what_was_recorded_before(kind: Kind) -> None:
    async def twice(request: Do, handle: Any) -> Any:
        with pytest.raises(LookupError):
            await handle(request)
        return await handle(Do(events=[Local("second")]))

    room = Room(kind, notes=True, middlewares=[twice])
    await room.send(Local("lost"), then=fail)
    assert room.heard == ["begins", "second", "ends"]


Tree: TypeAlias = tuple[bool, Sequence["Tree | int"]]
"""A command: whether it fails at the end; and what it does: records an event, or has another command."""
TREES: st.SearchStrategy[Any] = st.recursive(
    st.just(0), lambda inner: st.tuples(st.booleans(), st.lists(inner, max_size=4)), max_leaves=12
).filter(lambda tree: tree != 0)


@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(tree=TREES)
async def test_what_leaves_is_what_succeeded_however_commands_are_within_commands(
    kind: Kind, scoped: bool, tree: Tree
) -> None:
    """Each event of a command that has succeeded, as have all those around it: once. And no other."""
    room, labels = Room(kind, scoped=scoped), iter(range(100))

    async def command(tree: Tree) -> list[object]:
        fails, parts = tree
        recorded: list[object] = []

        async def body() -> None:
            for part in parts:
                if isinstance(part, int):
                    recorded.append(next(labels))
                    room.record(Leaves(recorded[-1]))
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


@pytest.mark.parametrize(("first", "then"), [(Tuples, DoHandler), (Copies, Generates), (DoHandler, Copies)])
async def test_what_was_taken_is_not_taken_again_where_another_handler_shows_it_too(first: Kind, then: Kind) -> None:
    """One gives a copy of the shared list, the next one the list itself."""
    room = Room(first, follows=then)
    await room.send(Local(1, [Local(2)]), Leaves(3))
    assert room.heard == [1, 2] and room.broker.got == [3]


@pytest.mark.parametrize(("first", "then"), [(Tuples, DoHandler), (Copies, Generates), (DoHandler, Copies)])
async def test_nor_what_was_dropped(first: Kind, then: Kind) -> None:
    async def twice(request: Do, handle: Any) -> Any:
        with pytest.raises(LookupError):
            await handle(request)
        return await handle(Do(events=[Local(1, [Local(2)])]))

    room = Room(first, follows=then, middlewares=[twice])
    await room.send(Local("lost"), Leaves("lost"), then=fail)
    assert room.heard == [1, 2] and room.broker.got == []


@pytest.mark.parametrize(("first", "then"), [(Tuples, DoHandler), (Copies, Generates), (DoHandler, Copies)])
async def test_what_a_handler_shows_is_not_for_one_inside_of_it_that_shows_it_too(first: Kind, then: Kind) -> None:
    room = Room(first, follows=then)
    await room.send(Local("outer"), then=lambda: room.send(Local("inner", [Local("of inner")])))
    assert room.heard == ["inner", "of inner", "outer"]


@pytest.mark.parametrize(("first", "then"), [(DoHandler, Tuples), (Generates, Copies), (Copies, DoHandler)])
async def test_so_it_is_not_sent_where_its_handler_fails(first: Kind, then: Kind) -> None:
    room = Room(first, follows=then)

    async def inner() -> None:
        await room.send(Local("inner"), then=lambda: room.send(Local("innermost")))
        raise LookupError

    with pytest.raises(LookupError):
        await room.send(Local("fails", [Local("lost")], inner))
    assert room.heard == ["fails", "innermost", "inner"]


# -- side by side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_side_by_side_none_is_lost_and_none_doubled(kind: Kind, scoped: bool, at_once: int) -> None:
    room = Room(kind, scoped=scoped, max_concurrent_event_handlers=at_once)

    async def turns() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    await room.send(*(Local(n, [Local(f"{n}a"), Local(f"{n}b")], turns) for n in range(3)))
    assert sorted(map(str, room.heard)) == ["0", "0a", "0b", "1", "1a", "1b", "2", "2a", "2b"]


@pytest.mark.parametrize("fails", [(True, False), (False, True), (True, True)], ids=["first", "last", "both"])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("kind", [DoHandler, Copies])
async def test_one_that_fails_takes_nothing_of_its_neighbour_along(
    kind: Kind, within: bool, fails: tuple[bool, bool]
) -> None:
    """Where the error policy lets the others go on. Where all fail nothing is left, also not to a handler around them."""
    room = Room(kind, max_concurrent_event_handlers=2, on_error=lambda *_: None)
    both, first_done = asyncio.Barrier(2), asyncio.Event()

    async def first() -> None:
        await both.wait()
        first_done.set()
        if fails[0]:
            raise LookupError

    async def last() -> None:
        await both.wait()
        await first_done.wait()
        await asyncio.sleep(0)
        if fails[1]:
            raise LookupError

    async def side_by_side() -> None:
        await room.send(Local(1, [Local("of first")], first), Local(2, [Local("of last")], last))

    if within:
        await room.send(Local("outer"), then=side_by_side)
    else:
        await side_by_side()
    kept = {label for label, failed in zip(("of first", "of last"), fails, strict=True) if not failed}
    assert room.heard[:2] == [1, 2] and len(set(room.heard)) == len(room.heard)
    assert kept <= set(room.heard) and (room.heard[-1] == "outer") == within
    if not kept:
        assert len(room.heard) == 2 + within


async def test_one_that_fails_beside_another_sends_nothing_when_it_is_used_again() -> None:
    """Each has its own events, which can't be removed."""
    room, both = Room(max_concurrent_event_handlers=2, on_error=lambda *_: None), asyncio.Barrier(2)

    class Keeps:
        tries = 0

        def __init__(self) -> None:
            self.kept: list[Event] = []

        @property
        def events(self) -> tuple[Event, ...]:
            return tuple(self.kept)

        async def handle(self, event: Event) -> None:
            self.tries += 1
            self.kept.append(Local(self.tries))
            if self.tries == 1:
                await both.wait()
                raise LookupError

    class Beside(Keeps):
        async def handle(self, event: Any) -> None:
            if event.label == "beside":
                await both.wait()
                await asyncio.sleep(0)

    for cls in (Keeps, Beside):
        room.container.add_scoped(cls)
    room.dispatcher.add_listener("Leaves", Keeps)
    room.dispatcher.add_listener("Local", Beside, priority=-1)

    @room.dispatcher.listen("Local", priority=1)
    async def once_more(event: Local) -> None:
        if event.label == "beside":
            await room.dispatcher.adispatch("Leaves", Leaves(2))

    await room.send(Leaves(1), Local("beside"))
    assert room.heard == ["beside", 2]


async def test_concurrent_listeners_on_one_list() -> None:
    room, both = Room(), asyncio.Barrier(2)

    class Other(DoHandler):
        async def handle(self, request: Any) -> Any:
            self.record(Local(type(self).__name__))
            await both.wait()

    class Another(Other): ...

    for cls in (Other, Another):
        room.container.add_transient(cls)
        room.dispatcher.add_listener("start", cls, concurrent=True)
    await room.dispatcher.adispatch("start")
    assert sorted(room.heard) == ["Another", "Other"]


# -- across units of work --------------------------------------------------------------------------------------


async def test_a_list_that_two_requests_have_at_once_is_an_error_that_says_so() -> None:
    """As a unit of work that was registered as a singleton."""
    room, both = Room(uow=Uow()), asyncio.Barrier(2)
    errors = await asyncio.gather(*(room.send(Local(n), then=both.wait) for n in range(2)), return_exceptions=True)
    assert [type(error) for error in errors] == [HandlerShared] * 2 and room.heard == []
    assert str(errors[0]) == (
        "two units of work collected events in the one list that DoHandler.events gives at the same time, so nobody knows "
        "whose they are; register what has the list as transient, or as scoped so that each request has its own"
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
