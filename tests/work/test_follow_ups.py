"""Events that handlers collect: they follow in order, at the end of the unit of work, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from silbo import AsyncEventDispatcher, Event, EventName
from silbo.errors import FollowUpsExceeded, HandlerShared, NameInvalid
from silbo.names import name_of
from silbo.work.unit_of_work import unit_of_work
from tests.support.simple_container import SimpleContainer


class Start(Event):
    def __init__(self, *follow: Event, then: Callable[[], Awaitable[object]] | None = None) -> None:
        self.follow, self.then = follow, then


class Next(Event):
    def __init__(self, label: object, *follow: Event) -> None:
        self.label, self.follow = label, follow


class Last(Next):
    pass


LAST = EventName("it.ended", Last)


class Collects:
    """As the handlers of Diator and python-cqrs do it."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    @property
    def events(self) -> list[Event]:
        return self._events

    async def handle(self, event: Any) -> None:
        for one in event.follow:
            self._events.append(one)
        if isinstance(event, Start) and event.then is not None:
            await event.then()


class Copies(Collects):
    @property
    def events(self) -> Any:
        return tuple(self._events)


class ListCopies(Collects):
    @property
    def events(self) -> list[Event]:
        return list(self._events)


class Renews(Collects):
    async def handle(self, event: Any) -> None:
        self._events = []
        await super().handle(event)


LISTS = [Collects, Renews]
COPIES = [Copies, ListCopies]


@pytest.fixture
def container() -> SimpleContainer:
    return SimpleContainer()


@pytest.fixture
def d(container: SimpleContainer) -> AsyncEventDispatcher:
    return AsyncEventDispatcher(container=container)


@pytest.fixture
def heard(d: AsyncEventDispatcher) -> list[object]:
    """The labels of what followed, in order."""
    labels: list[object] = []
    for name in ("Next", LAST):
        d.add_listener(name, listener(lambda event: labels.append(event.label)), priority=-1)
    return labels


def listener(does: Callable[[Any], object]) -> Callable[[Any], Awaitable[None]]:
    async def listen(event: Any) -> None:
        does(event)

    return listen


async def fail() -> None:
    raise LookupError("listener")


# -- what follows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*LISTS, *COPIES])
async def test_collected_events_follow_in_their_order(
    d: AsyncEventDispatcher, heard: list[object], cls: type[Any]
) -> None:
    d.add_listener("start", cls)
    await d.adispatch("start", Start(Next(1), Last(2), Next(3)))
    assert heard == [1, 2, 3]


async def test_those_of_the_followers_go_behind(d: AsyncEventDispatcher, heard: list[object]) -> None:
    """Breadth first, all in one unit of work."""
    for name in ("start", "Next"):
        d.add_listener(name, Collects)
    await d.adispatch("start", Start(Next(1, Next("1a", Last("1aa")), Last("1b")), Next(2, Last("2a"))))
    assert heard == [1, 2, "1a", "1b", "2a", "1aa"]


async def test_they_wait_for_the_end_of_the_outermost_dispatch_and_are_in_its_scope(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    d.add_listener("start", Collects)
    d.add_listener("inner", Other)
    d.listen("start", priority=1)(listener(lambda event: heard.append("outer")))
    d.add_listener("Next", Other, priority=1)
    await d.adispatch("start", Start(Next(1), then=lambda: d.adispatch("inner", Start(Next(2)))))
    assert heard == ["outer", 2, 1]  # the inner dispatch succeeded before the handler around it
    assert len(container.scopes) == 1 and container.scopes[0].closed
    assert container.asked == [Collects, Other, Other, Other]


class Other(Collects):
    pass


async def test_listeners_of_every_sort_hear_them(d: AsyncEventDispatcher, heard: list[object]) -> None:
    """They are dispatched as any other event: a pattern, a bridge hear them too."""
    d.add_listener("start", Collects)
    d.listen("**", priority=1)(listener(lambda event: heard.append(event.name)))
    await d.adispatch("start", Start(Next(1), Last(2)))
    assert heard == ["start", 1, "Next", 2, "it.ended"]
    assert isinstance(heard[-1], EventName)


async def test_concurrent_listeners_collect_into_one_queue(d: AsyncEventDispatcher, heard: list[object]) -> None:
    for cls in (Collects, Other):
        d.add_listener("start", cls, concurrent=True)
    await d.adispatch("start", Start(Next(1)))
    assert heard == [1, 1]


async def test_a_unit_of_work_by_hand_has_them_at_its_end(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    """As a command has."""
    async with unit_of_work(container) as unit:
        handler = await unit.resolve(Collects)
        with unit.collecting(handler, d):
            await handler.handle(Start(Next(1), Last(2)))
        assert heard == []
    assert heard == [1, 2]


class Records:
    def __init__(self) -> None:
        self.events: list[Event] = []

    async def handle(self, event: Event) -> None:
        self.events.append(event)


class RecordsInASlot(Records):
    __slots__ = ("events",)


@pytest.mark.parametrize("cls", [Records, RecordsInASlot])
async def test_an_attribute_of_a_listener_is_the_hosts_own(
    d: AsyncEventDispatcher, container: SimpleContainer, cls: type[Records]
) -> None:
    """It may well keep in ``events`` what it has heard."""
    recorder = cls()
    container.factories[cls] = lambda: recorder
    d.add_listener("start", cls)
    event = await d.adispatch("start", Start())
    assert recorder.events == [event]


async def test_run_by_hand_without_a_dispatcher_they_stay_where_they_are(
    d: AsyncEventDispatcher, container: SimpleContainer
) -> None:
    d.add_listener("start", Collects)
    await d.get_listeners("start")[0](Start(Next(1)))
    [made] = container.scopes[0].made.values()
    assert [event.label for event in made.events] == [1]


# -- what does not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LISTS)
async def test_an_object_that_is_used_again_sends_nothing_twice(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object], cls: type[Any]
) -> None:
    """Neither after a success nor after a failure."""
    one = cls()
    container.factories[cls] = lambda: one
    d.add_listener("start", cls)
    await d.adispatch("start", Start(Next(1)))
    with pytest.raises(LookupError):
        await d.adispatch("start", Start(Next("lost"), then=fail))
    await d.adispatch("start", Start(Next(2)))
    await d.adispatch("start", Start())
    again = Next(3)
    await d.adispatch("start", Start(again, again))
    await d.adispatch("start", Start(again))
    assert heard == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("cls", COPIES)
@pytest.mark.parametrize("fails", [False, True])
async def test_an_object_that_is_used_again_has_to_give_the_list_itself(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object], cls: type[Any], fails: bool
) -> None:
    """Events can't be removed from a copy, and nobody could tell which of them were sent."""
    one = cls()
    container.factories[cls] = lambda: one
    d.add_listener("start", cls)
    with pytest.raises(LookupError) if fails else nullcontext():
        await d.adispatch("start", Start(Next(1), then=fail if fails else None))
    text = rf"^{cls.__name__}\.events is not empty when {cls.__name__} begins.*: give the list itself, 'return self\._events'"
    with pytest.raises(TypeError, match=text):
        await d.adispatch("start", Start(Next(2)))
    assert heard == [1] * (not fails)


@pytest.mark.parametrize("cls", LISTS)
async def test_what_was_recorded_before_is_sent_once_where_it_is_in_a_list(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object], cls: type[Any]
) -> None:
    """By whomever."""
    one = cls()
    container.factories[cls] = lambda: one
    d.add_listener("start", cls)
    one._events.append(Next("before"))
    for number in range(2):
        await d.adispatch("start", Start(Next(number)))
    assert sorted(map(str, heard)) == ["0", "1", "before"]


async def test_a_list_is_empty_afterwards_whatever_happens(d: AsyncEventDispatcher, container: SimpleContainer) -> None:
    """A handler that is never thrown away does not grow, and finds nothing of another run."""
    one = Collects()
    container.factories[Collects] = lambda: one
    d.add_listener("start", Collects)
    late = True

    async def record_late() -> None:
        if late:
            one.events.append(Next("while the scope closes"))

    async def record_late_and_fail() -> None:
        await record_late()
        if late:
            raise LookupError

    container.closing = record_late
    await d.adispatch("start", Start(Next(1)))
    assert one.events == []
    with pytest.raises(LookupError):
        await d.adispatch("start", Start(Next(1), then=fail))
    container.closing = record_late_and_fail
    with pytest.raises(LookupError):
        await d.adispatch("start", Start())
    late = False

    async def look() -> None:
        assert len(one.events) == 1

    await d.adispatch("start", Start(Next(1), then=look))
    assert one.events == []


async def test_none_is_no_events(d: AsyncEventDispatcher) -> None:
    class Lazy(Collects):
        @property
        def events(self) -> Any:
            return None

    d.add_listener("start", Lazy)
    await d.adispatch("start", Start(Next(1)))


@pytest.mark.parametrize("options", [{}, {"on_error": "collect"}, {"timeout": 5}], ids=str)
async def test_a_dispatch_that_fails_sends_nothing(d: AsyncEventDispatcher, heard: list[object], options: Any) -> None:
    """Also what a handler collected that succeeded."""
    d.add_listener("start", Collects, **options)
    d.listen("start", priority=1, **options)(listener(lambda event: [][0]))
    with pytest.raises((IndexError, ExceptionGroup)):
        await d.adispatch("start", Start(Next(1)))
    assert heard == []


async def test_a_failure_inside_takes_its_own_alone(d: AsyncEventDispatcher, heard: list[object]) -> None:
    """A dispatch inside of another fails, and the handler around it goes on."""
    d.add_listener("start", Collects)
    d.add_listener("inner", Other)
    d.listen("inner", priority=1)(listener(lambda event: [][0]))

    async def try_inner() -> None:
        with pytest.raises(IndexError):
            await d.adispatch("inner", Start(Next("inner")))

    await d.adispatch("start", Start(Next("outer"), then=try_inner))
    assert heard == ["outer"]


async def test_a_handler_whose_error_is_isolated_sends_nothing(d: AsyncEventDispatcher, heard: list[object]) -> None:
    """The others do."""
    d.add_listener("start", Collects, on_error=lambda *_: None)
    d.add_listener("start", Sends)
    await d.adispatch("start", Start(Next("lost"), then=fail))
    assert heard == ["sent"]


class Sends(Collects):
    async def handle(self, event: Any) -> None:
        self.events.append(Next("sent"))


async def test_a_follower_that_fails_ends_it(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    """The error reaches the caller, and the scope."""
    d.add_listener("start", Collects)
    d.listen("Next", priority=1)(listener(lambda event: [][0]))
    with pytest.raises(IndexError) as caught:
        await d.adispatch("start", Start(Next(1), Last(2)))
    assert heard == [1] and container.scopes[0].error is caught.value


async def test_a_cancellation_takes_them_along(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    d.add_listener("start", Collects)
    d.listen("start", priority=1)(listener(lambda event: _cancelled()))
    with pytest.raises(asyncio.CancelledError):
        await d.adispatch("start", Start(Next(1)))
    assert heard == [] and container.scopes[0].closed


def _cancelled() -> None:
    raise asyncio.CancelledError


async def test_handlers_that_answer_each_other_for_ever_are_stopped(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    for name in ("start", "Next"):
        d.add_listener(name, Answers)
    with pytest.raises(FollowUpsExceeded, match="^1000 events have followed .* 'Next' would be the next"):
        await d.adispatch("start", Start())
    assert len(heard) == 1 + 1000 and container.scopes[0].closed


async def test_the_bound_is_for_what_follows_of_followers(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object]
) -> None:
    """A unit of work may collect as much as it likes: an import of 5,000 rows is no endless loop."""
    d.add_listener("Next", Collects)
    async with unit_of_work(container, max_follow_ups=2) as unit:
        unit.collected.extend((d, Next(number)) for number in range(4))
        unit.collected.append((d, Next(4, Last(5), Last(6))))
    assert heard == [0, 1, 2, 3, 4, 5, 6]
    heard.clear()
    with pytest.raises(FollowUpsExceeded, match=r"^2 events .* 'it\.ended' would"):
        async with unit_of_work(container, max_follow_ups=2) as unit:
            unit.collected.append((d, Next(0, *map(Last, range(1, 5)))))
    assert heard == [0, 1, 2]


class Answers(Collects):
    async def handle(self, event: Any) -> None:
        self.events.append(Next("again"))


# -- one object in two places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LISTS)
async def test_one_object_that_collects_in_two_dispatches_at_once_is_an_error(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object], cls: type[Any]
) -> None:
    """Nobody could tell whose events they are, and one of the dispatches may fail."""
    one = cls()
    container.factories[cls] = lambda: one
    d.add_listener("start", cls)
    both = asyncio.Barrier(2)
    dispatches = [d.adispatch("start", Start(Next(n), then=both.wait)) for n in range(2)]
    errors = await asyncio.gather(*dispatches, return_exceptions=True)
    assert [type(error) for error in errors] == [HandlerShared, HandlerShared] and heard == []
    assert str(errors[0]).startswith(
        f"one {cls.__name__} object was in use twice at the same time and has collected events, so nobody knows whose"
    )
    assert f"register {cls.__name__} as transient, so that each request and event has its own" in str(errors[0])
    await d.adispatch("start", Start(Next("alone")))
    assert heard == ["alone"]


@pytest.mark.parametrize("cls", [Collects, Copies])
async def test_one_object_in_two_places_is_fine_where_it_collects_nothing(
    d: AsyncEventDispatcher, container: SimpleContainer, heard: list[object], cls: type[Any]
) -> None:
    """It only has a property, from its base class say."""
    one = cls()
    container.factories[cls] = lambda: one
    d.add_listener("start", cls)
    both = asyncio.Barrier(2)
    await asyncio.gather(*(d.adispatch("start", Start(then=both.wait)) for _ in range(2)))
    assert heard == []


# -- names -----------------------------------------------------------------------------------------------------


def test_the_name_of_an_event_is_its_event_name_else_its_classs() -> None:
    class Local(Event):
        pass

    class Derived(Last):
        pass

    assert name_of(Last(1)) is name_of(Last) is LAST
    assert name_of(Local()) == name_of(Local) == "Local" and name_of(Derived) == "Derived"
    assert name_of(5) == "int" and EventName("number", int).cls is int
    assert name_of(5) == "int"


def test_a_class_with_two_names_has_to_be_dispatched_under_one_of_them() -> None:
    class Local(Event):
        pass

    names: Sequence[Any] = [EventName("one", Local), EventName("one", Local)]
    assert name_of(Local) is names[0]
    names = [*names, EventName("two", Local)]
    with pytest.raises(NameInvalid, match=r"'Local': .*several names \('one', 'two'\)"):
        name_of(Local)
