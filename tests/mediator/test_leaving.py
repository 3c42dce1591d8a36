"""What leaves the process leaves when the command has succeeded: in order, or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from silbo import LAST, AsyncEventDispatcher, Bridge, ECSTEvent, Mediator, Message, RequestMap
from silbo.errors import BrokerUnavailable, MessageRefused
from silbo.protocols import JoiningPublisher
from tests.mediator.support import Do, DoHandler, Leaves, Local, Recorder, World, fail
from tests.shelf import Shelf


@pytest.fixture
def world() -> World:
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    return world


async def test_messages_leave_in_order_when_all_is_done(world: World) -> None:
    """All handlers of all events, and the scope with its clean-up, which may be a commit."""

    async def nothing_yet() -> None:
        assert world.broker.got == []

    world.shelf.closing = nothing_yet
    await world.send(Leaves(1), Local("a", [Leaves(3)], nothing_yet), Leaves(2), Local("b", then=nothing_yet))
    assert world.broker.got == [1, 2, 3] and world.heard == ["a", "b"]
    assert world.shelf.scopes[0].closed


async def test_a_middleware_that_fails_after_the_handler_sends_nothing() -> None:
    """Such as a transaction that can't be committed."""

    async def commit(request: Any, handle: Any) -> Any:
        await handle(request)
        raise ConnectionError("commit")

    world = World(middlewares=[commit])
    world.dispatcher.add_subscriber(Bridge(world.broker))
    with pytest.raises(ConnectionError):
        await world.send(Leaves(1), Local("done"))
    assert world.broker.got == [] and world.heard == ["done"]


async def test_a_scope_that_fails_to_close_sends_nothing(world: World) -> None:
    world.shelf.closing = fail
    with pytest.raises(LookupError):
        await world.send(Leaves(1))
    assert world.broker.got == []


async def test_what_a_handler_dispatches_itself_waits_too(world: World) -> None:
    """As services written for Whistle do it."""

    async def dispatch() -> None:
        await world.dispatcher.adispatch("now", Leaves(1))
        assert world.broker.got == []

    await world.send(Leaves(2), then=dispatch)
    assert world.broker.got == [1, 2]
    await world.dispatcher.adispatch("now", Leaves(3))
    assert world.broker.got == [1, 2, 3]  # outside of commands at once


async def test_of_a_command_within_a_command_it_leaves_with_the_outermost(world: World) -> None:
    async def inner() -> None:
        await world.also(Leaves("inner"))
        assert world.broker.got == []

    await world.send(Leaves("outer"), then=inner)
    assert world.broker.got == ["inner", "outer"]

    async def inner_then_fail() -> None:
        await world.also(Leaves("lost"))
        raise LookupError

    with pytest.raises(LookupError):
        await world.send(then=inner_then_fail)
    assert world.broker.got == ["inner", "outer"]


async def test_also_where_the_two_have_containers_of_their_own(world: World) -> None:
    other = World()
    other.dispatcher.add_subscriber(Bridge(other.broker))

    async def inner() -> None:
        await other.send(Leaves("inner"))
        assert other.broker.got == []

    await world.send(Leaves("outer"), then=inner)
    assert (other.broker.got, world.broker.got) == (["inner"], ["outer"])


async def test_a_command_of_a_listener_is_an_outermost_one(world: World) -> None:
    """A consumer's dispatch is none: when its command is done the messages leave."""

    class Starts:
        async def handle(self, event: Local) -> None:
            await world.send(Leaves(1))
            assert world.broker.got == [1]

    world.dispatcher.add_listener("arrived", Starts)
    await world.dispatcher.adispatch("arrived", Local(0))
    assert len(world.shelf.scopes) == 1


async def test_a_task_of_its_own_does_not_wait_for_the_command(world: World) -> None:
    """It may end later than the command."""
    over = asyncio.Event()
    tasks = []

    async def later() -> None:
        await over.wait()
        await world.dispatcher.adispatch("later", Leaves("later"))

    async def begin() -> None:
        tasks.append(asyncio.create_task(later()))

    await world.send(Leaves(1), then=begin)
    over.set()
    await tasks[0]
    assert world.broker.got == [1, "later"]


async def test_the_message_is_what_the_event_was_when_it_was_dispatched(world: World) -> None:
    """Not what another handler makes of it later."""

    class Changes(ECSTEvent):
        label = "new"

        def __init__(self) -> None:
            self.label = "then"

    event = Changes()

    async def change() -> None:
        event.label = "later"

    await world.send(event, Local(1, then=change))
    assert world.broker.got == ["then"]


async def test_the_brokers_error_reaches_the_caller_when_all_else_is_done(world: World) -> None:
    world.broker.error = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable):
        await world.send(Leaves(1), Local("done"))
    assert world.heard == ["done"] and world.shelf.scopes[0].error is None
    with pytest.raises(ExceptionGroup, match="2 messages of one command failed"):
        await world.send(Leaves(1), Leaves(2))


async def test_what_cannot_be_a_message_fails_the_command(world: World) -> None:
    with pytest.raises(MessageRefused):
        await world.send(Leaves(1), Leaves(object()))
    assert world.broker.got == []


async def test_its_error_goes_to_the_dispatchers_policy() -> None:
    failed: list[tuple[str, object]] = []
    world = World(on_error=lambda error, event, listener: failed.append((str(error), event.label)))
    world.dispatcher.add_subscriber(Bridge(world.broker))
    world.broker.error = BrokerUnavailable("away")
    assert await world.send(Leaves(1), Leaves(2)) == "done"
    assert [label for _, label in failed] == [1, 2] and "away" in str(failed[0])


async def test_or_to_the_bridges_own_options() -> None:
    world = World(on_error=print)
    bridge = Bridge(world.broker)
    world.dispatcher.add_listener("**", bridge.forward, priority=LAST, on_error="raise")
    world.broker.error = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable):
        await world.send(Leaves(1))


async def test_or_to_the_bridges_hook(world: World) -> None:
    failed: list[Message] = []
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker, on_error=lambda error, message: failed.append(message)))
    world.broker.error = BrokerUnavailable("away")
    await world.send(Leaves(1), Leaves(2))
    assert [message.payload["label"] for message in failed] == [1, 2]


async def test_a_bridge_that_does_not_wait_still_waits_for_the_command() -> None:
    world = World()
    async with Bridge(world.broker, wait=False) as bridge:
        world.dispatcher.add_subscriber(bridge)
        with pytest.raises(LookupError):
            await world.send(Leaves("lost"), Local(0, then=fail))
        released = asyncio.Event()
        world.broker.meanwhile = released.wait
        await world.send(Leaves(1), Leaves(2))
        released.set()
    assert world.broker.got == [1, 2]


async def test_a_command_cancelled_while_it_sends_is_over() -> None:
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    sending = asyncio.Event()

    async def hang() -> None:
        sending.set()
        await asyncio.Event().wait()

    world.broker.meanwhile = hang
    task = asyncio.create_task(world.send(Leaves(1), Leaves(2)))
    await sending.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.shelf.scopes[0].closed


class Joins(Recorder):
    """In the host's transaction, or not."""

    in_transaction = True


async def test_a_publisher_in_the_hosts_transaction_has_them_at_once() -> None:
    """For they are to be committed with the rest; what another one has waits."""
    world, joins = World(), Joins()
    assert isinstance(joins, JoiningPublisher)
    world.dispatcher.add_subscriber(Bridge(joins))
    world.dispatcher.add_subscriber(Bridge(world.broker))

    async def stored() -> None:
        assert (joins.got, world.broker.got) == ([1], [])
        joins.in_transaction = False

    await world.send(Leaves(1), Local(0, [Leaves(2)], stored))
    assert joins.got == [1, 2] == world.broker.got


async def test_on_a_dispatcher_without_containers_as_well() -> None:
    """The container of the mediator counts."""
    requests, broker, dispatcher = RequestMap(), Recorder(), AsyncEventDispatcher()
    requests.bind(Do, DoHandler)
    dispatcher.add_subscriber(Bridge(broker))

    async def after(request: Any, handle: Any) -> Any:
        await handle(request)
        assert broker.got == []

    mediator = Mediator(request_map=requests, dispatcher=dispatcher, container=Shelf(), middlewares=[after])
    await mediator.send(Do(events=[Leaves(1)]))
    assert broker.got == [1]
