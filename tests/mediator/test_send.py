"""A request, its handler, and the events that come of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import whistle

from silbo import (
    AsyncEventDispatcher,
    Bridge,
    Event,
    EventHandler,
    EventMap,
    EventName,
    Mediator,
    Request,
    RequestMap,
    Route,
)
from silbo.errors import FollowUpsExceeded, HandlerShared, RequestUnbound, Unresolvable
from silbo.work import unit_of_work
from tests.support.mediator import Collects, Do, DoHandler, Leaves, Local, World, fail
from tests.support.simple_container import SimpleContainer


async def test_the_handler_answers() -> None:
    world = World()
    assert await world.send() == "done"
    assert world.container.asked == [DoHandler] and world.container.scopes[0].closed


async def test_events_go_out_in_the_order_they_were_collected_when_the_handler_is_done() -> None:
    """Diator sends the last one first."""
    world = World()

    async def nothing_yet() -> None:
        assert world.heard == []

    await world.send(Local(1), Local(2), Local(3), then=nothing_yet)
    assert world.heard == [1, 2, 3]


async def test_what_handlers_of_events_collect_follows_behind() -> None:
    """Breadth first, in one scope."""
    world = World()
    await world.send(Local(1, [Local("1a", [Local("1aa")]), Local("1b")]), Local(2, [Local("2a")]))
    assert world.heard == [1, 2, "1a", "1b", "2a", "1aa"]
    assert len(world.container.scopes) == 1 and world.container.scopes[0].closed


async def test_several_handlers_of_an_event_run_in_the_order_they_were_bound() -> None:
    world = World()
    heard = world.heard

    class Second(EventHandler[Local]):
        async def handle(self, event: Local) -> None:
            heard.append("second")

    world.events.bind(Local, Second)  # the map is registered: it counts at once
    await world.send(Local("first"), Local("again"))
    assert heard == ["first", "second", "again", "second"]


async def test_events_are_dispatched_as_all_others() -> None:
    """Plain listeners, patterns and priorities; under their EventName, where they have one."""

    class Named(Event):
        pass

    name = EventName("room.closed", Named)
    world = World()

    @world.dispatcher.listen("**", priority=-1)
    async def all_of_them(event: Event) -> None:
        world.heard.append(event.name)

    await world.send(Local(1), Named())
    assert world.heard == ["Local", 1, "room.closed"] and world.heard[-1] is name


@pytest.mark.parametrize("where", ["request", "event"])
async def test_a_command_that_fails_sends_nothing(where: str) -> None:
    """Neither what its handler collected, nor what others did, nor later."""
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    events = [Leaves("lost"), Local("fails", then=fail if where == "event" else None), Local("later")]
    with pytest.raises(LookupError) as caught:
        await world.send(*events, then=fail if where == "request" else None)
    assert world.heard == (["fails"] if where == "event" else []) and world.broker.got == []
    assert world.container.scopes[0].error is caught.value
    await world.send(Local("next"))
    assert world.heard[-1] == "next" and world.broker.got == []


async def test_a_handler_that_is_used_again_never_sends_old_events_again() -> None:
    """A container may have made it once for all; neither after a success nor after a failure."""
    world = World()
    one = DoHandler()
    world.container.factories[DoHandler] = lambda: one
    await world.send(Local(1))
    with pytest.raises(LookupError):
        await world.send(Local("lost"), then=fail)
    await world.send(Local(2))
    await world.send()
    assert world.heard == [1, 2]


async def test_one_handler_at_work_for_two_requests_at_once_is_an_error() -> None:
    world = World()
    one, both = DoHandler(), asyncio.Barrier(2)
    world.container.factories[DoHandler] = lambda: one
    errors = await asyncio.gather(*(world.send(Local(n), then=both.wait) for n in range(2)), return_exceptions=True)
    assert [type(error) for error in errors] == [HandlerShared] * 2 and world.heard == []


async def test_the_error_policy_is_the_dispatchers() -> None:
    failed: list[object] = []
    world = World(on_error=lambda error, event, listener: failed.append((event.label, listener)))
    await world.send(Local(1, then=fail), Local(2))
    assert world.heard == [1, 2] and failed == [(1, world.hears)]
    world = World(on_error="collect")
    with pytest.raises(ExceptionGroup, match="1 listeners of 'Local' failed"):
        await world.send(Local(1, then=fail), Local(2))
    assert world.heard == [1]


async def test_a_cancelled_command_closes_its_scope_and_sends_nothing_more() -> None:
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    begun = asyncio.Event()

    async def hang() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(world.send(Leaves(0), Local(1, then=hang), Local(2), Leaves(3)))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.heard == [1] and world.broker.got == []
    assert world.container.scopes[0].closed and isinstance(world.container.scopes[0].error, asyncio.CancelledError)


async def test_events_that_bring_about_each_other_for_ever_are_stopped() -> None:
    class Answers(Collects, EventHandler[Local]):
        async def handle(self, event: Local) -> None:
            self._events.append(Local(event.label))

    world = World(max_follow_ups=5)
    world.events.bind(Local, Answers)
    with pytest.raises(FollowUpsExceeded, match="^5 events"):
        await world.send(*map(Local, range(10)))
    assert world.heard == [*range(10), 0, 1, 2, 3, 4]


async def test_so_are_commands_that_bring_about_each_other() -> None:
    world = World(max_follow_ups=5)

    async def again() -> None:
        await world.send(Local("again", then=again))

    with pytest.raises(FollowUpsExceeded):
        await again()
    assert len(world.heard) == 6


@pytest.mark.parametrize("sender", ["handler", "listener"])
async def test_what_the_commands_of_a_handler_collect_is_not_counted_but_what_those_of_listeners_do_is(
    sender: str,
) -> None:
    world = World(max_follow_ups=3)

    async def four() -> None:
        for number in range(4):
            await world.also(Local(number))

    if sender == "handler":
        await world.send(then=four)
        assert world.heard == [0, 1, 2, 3]
        return
    with pytest.raises(FollowUpsExceeded):
        await world.send(Local("first", then=four))
    assert world.heard == ["first", 0, 1, 2]


async def test_an_event_nobody_handles_is_a_warning_once_for_its_name(caplog: pytest.LogCaptureFixture) -> None:
    class Forgotten(Event):
        pass

    class Overlooked(Event):
        pass

    for world in (World(), World(max_concurrent_event_handlers=2)):
        caplog.clear()
        for _ in range(2):
            await world.send(Forgotten(), Local(1), Overlooked(), Forgotten())
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
            "nobody handles Forgotten",
            "nobody handles Overlooked",
        ]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}


async def test_events_nobody_handles_under_ever_new_names_are_remembered_up_to_a_limit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program can make a class, and so a name, for each tenant."""
    monkeypatch.setattr(unit_of_work, "MAX_WARNED", 2)
    world = World()
    for name in "abcab":
        await world.send(type(name, (Event,), {})())
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "nobody handles a",
        "nobody handles b",
    ]


async def test_a_bridge_handles_what_it_sends_alone(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    await world.send(Leaves(1))
    assert "nobody handles Leaves" in caplog.text
    caplog.clear()
    world.dispatcher.add_subscriber(Bridge(world.broker, routes=[Route("Routed", kind="notification")]))
    await world.send(Leaves(2), Routed())
    assert not caplog.records and world.broker.got == [2, "routed"]

    class Stays(Event):
        pass

    await world.send(Stays())
    assert "nobody handles Stays" in caplog.text


class Routed(Event):
    def __init__(self) -> None:
        self.label = "routed"


async def test_commands_of_several_tasks_have_scopes_of_their_own() -> None:
    world = World()
    both = asyncio.Barrier(2)
    await asyncio.gather(*(world.send(Local(n), then=both.wait) for n in range(2)))
    assert sorted(map(str, world.heard)) == ["0", "1"] and len(world.container.scopes) == 2


async def test_a_command_within_a_command_is_part_of_it_but_its_events_go_first() -> None:
    """When its ``send`` returns, they have been handled."""
    world = World()

    async def inner() -> None:
        await world.also(Local("inner"))
        assert world.heard == ["inner"]

    await world.send(Local("outer"), then=inner)
    assert world.heard == ["inner", "outer"] and len(world.container.scopes) == 1


async def test_a_command_within_a_command_may_fail_alone() -> None:
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))

    async def inner() -> None:
        with pytest.raises(LookupError):
            await world.also(Leaves("lost"), Local("heard", then=fail))

    await world.send(Local("outer"), Leaves("sent"), then=inner)
    assert world.heard == ["heard", "outer"] and world.broker.got == ["sent"]


async def test_a_listener_may_send_a_command_too() -> None:
    world = World()
    await world.send(Local(1, then=lambda: world.also(Local("of the command"))), Local(2))
    assert world.heard == [1, "of the command", 2]


async def test_a_request_without_a_handler_is_an_error_that_says_what_to_do() -> None:
    class Unknown(Request): ...

    class Derived(Do): ...

    world = World()
    with pytest.raises(RequestUnbound, match=r"^no handler for .*Unknown: bind one, request_map\.bind\(.*Unknown, You"):
        await world.mediator.send(Unknown())
    with pytest.raises(RequestUnbound, match=r"\(Do has one, but each class is bound on its own\)"):
        await world.mediator.send(Derived())
    assert world.container.scopes == []


async def test_a_class_is_no_request() -> None:
    unfinished: Any = Do
    with pytest.raises(TypeError, match=r"^Do is a class; send an object of it: Do\(\.\.\.\)$"):
        await World().mediator.send(unfinished)


async def test_a_handler_that_the_container_cannot_make_is_an_error() -> None:
    world = World()

    def cannot() -> None:
        raise Unresolvable(DoHandler, world.container, "no MeetingAPI")

    world.container.factories[DoHandler] = cannot
    with pytest.raises(Unresolvable, match="^SimpleContainer can't make DoHandler: no MeetingAPI"):
        await world.send()
    assert world.container.scopes[0].closed


def test_without_a_container_a_mediator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a container that makes its handlers: container="):
        Mediator(request_map=RequestMap(), dispatcher=AsyncEventDispatcher())


def test_two_containers_are_refused() -> None:
    """Handlers of commands and of events would have different scopes."""
    with pytest.raises(ValueError, match=r"container of its own.*leave out container="):
        Mediator(
            request_map=RequestMap(),
            dispatcher=AsyncEventDispatcher(container=SimpleContainer()),
            container=SimpleContainer(),
        )


async def test_a_dispatcher_without_a_container_will_do() -> None:
    """The mediator's makes the handlers of events, too, in the command's scope."""
    container, heard = SimpleContainer(), []

    class Hears(EventHandler[Local]):
        async def handle(self, event: Local) -> None:
            heard.append(event.label)

    world = World()
    world.events.bind(Local, Hears)
    requests = RequestMap()
    requests.bind(Do, DoHandler)
    mediator = Mediator(
        request_map=requests, dispatcher=AsyncEventDispatcher(), container=container, event_map=world.events
    )
    await mediator.send(Do(events=[Local(1)]))
    assert heard == [1] and len(container.scopes) == 1


@pytest.mark.parametrize(
    ("option", "error", "problem"),
    [
        ({"max_concurrent_event_handlers": 0}, ValueError, "max_concurrent_event_handlers is 1 or more, not 0"),
        ({"max_concurrent_event_handlers": 1.5}, TypeError, "max_concurrent_event_handlers is a whole number, not 1.5"),
        (
            {"max_concurrent_event_handlers": True},
            TypeError,
            "max_concurrent_event_handlers is a whole number, not True",
        ),
        ({"max_follow_ups": -1}, ValueError, "max_follow_ups is 0 or more, not -1"),
        ({"max_follow_ups": "x"}, TypeError, "max_follow_ups is a whole number, not 'x'"),
        ({"request_map": {Do: DoHandler}}, TypeError, "request_map has to be a silbo.RequestMap, not {"),
        ({"request_map": EventMap()}, TypeError, "request_map has to be a silbo.RequestMap, not <EventMap: empty>"),
        ({"event_map": RequestMap()}, TypeError, "event_map has to be a silbo.EventMap, not <RequestMap: empty>"),
        ({"dispatcher": None}, TypeError, r"dispatcher is a silbo\.AsyncEventDispatcher \(.*\), not None"),
        ({"dispatcher": whistle.AsyncEventDispatcher()}, TypeError, r"dispatcher is a silbo\.Async.*, not <whistle"),
    ],
)
def test_what_cannot_be_meant_is_refused(option: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        Mediator(
            **{"request_map": RequestMap(), "dispatcher": AsyncEventDispatcher(container=SimpleContainer()), **option}
        )


async def test_no_follow_ups_at_all_may_be_wanted() -> None:
    world = World(max_follow_ups=0)
    await world.send(Local(1), Local(2))
    with pytest.raises(FollowUpsExceeded):
        await world.send(Local(3, [Local(4)]))
    assert world.heard == [1, 2, 3]


async def test_a_mediator_made_again_does_not_handle_events_twice() -> None:
    """As a web framework's dependency may make one for each call."""
    world = World()
    again = Mediator(request_map=RequestMap(), dispatcher=world.dispatcher, event_map=world.events)
    await world.send(Local(1))
    assert world.heard == [1] and again.container is world.container
    with pytest.raises(ValueError, match="another container"):
        world.events.listen(world.dispatcher, SimpleContainer())
