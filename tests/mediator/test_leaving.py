"""Messages leave the process when the command has succeeded: in order, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from silbo import (
    LAST,
    AsyncEventDispatcher,
    Backoff,
    Bridge,
    Consumer,
    ECSTEvent,
    EventName,
    Mediator,
    Message,
    NotificationEvent,
    RequestMap,
)
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, DeliveryGivenUp, DeliveryUnknown, MessageRefused
from silbo.protocols import JoiningPublisher
from tests.support.mediator import Collects, Do, DoHandler, Leaves, Local, Recorder, World, fail
from tests.support.simple_container import SimpleContainer


@pytest.fixture
def world() -> World:
    world = World()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    return world


async def test_messages_leave_in_order_when_all_is_done(world: World) -> None:
    """All handlers of all events, and the scope with its clean-up, which may be a commit."""

    async def nothing_yet() -> None:
        assert world.broker.got == []

    world.container.closing = nothing_yet
    await world.send(Leaves(1), Local("a", [Leaves(3)], nothing_yet), Leaves(2), Local("b", then=nothing_yet))
    assert world.broker.got == [1, 2, 3] and world.heard == ["a", "b"]
    assert world.container.scopes[0].closed


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
    world.container.closing = fail
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


class Sends:
    """A listener that sends a command, in the world of the test."""

    world: World

    async def handle(self, event: Local) -> None:
        before = list(self.world.broker.got)
        await self.world.send(Leaves(event.label))
        assert self.world.broker.got == before


@pytest.fixture
def listening(world: World) -> World:
    """``arrived`` has a listener that sends a command; the next one does what the event says."""

    class Next:
        async def handle(self, event: Local) -> None:
            if event.then is not None:
                await event.then()

    class Here(Sends): ...

    Here.world = world
    world.dispatcher.add_listener("arrived", Here)
    world.dispatcher.add_listener("arrived", Next)
    return world


async def test_of_a_command_of_a_listener_it_leaves_with_the_dispatch(listening: World) -> None:
    """Its scope, and so its clean-up, which may be a commit, is the one around the command."""

    async def nothing_yet() -> None:
        assert listening.broker.got == []

    listening.container.closing = nothing_yet
    await listening.dispatcher.adispatch("arrived", Local(1, then=nothing_yet))
    assert listening.broker.got == [1] and len(listening.container.scopes) == 1


async def test_and_not_where_the_dispatch_fails(listening: World) -> None:
    with pytest.raises(LookupError):
        await listening.dispatcher.adispatch("arrived", Local(1, then=fail))
    listening.container.closing = fail
    with pytest.raises(LookupError):
        await listening.dispatcher.adispatch("arrived", Local(2))
    assert listening.broker.got == []


async def test_so_a_delivery_that_is_given_up_has_sent_nothing(listening: World) -> None:
    assert await deliver(listening, failures=3) == 3
    assert listening.broker.got == []


async def test_nor_of_what_its_handlers_have_collected_but_of_the_attempt_that_succeeds(world: World) -> None:
    """Also what is dispatched before one of those events fails."""

    class Collector(Collects):
        async def handle(self, event: Arrived) -> None:
            self._events += [Leaves("collected"), Local("then")]

    world.dispatcher.add_listener("arrived", Collector)
    assert await deliver(world, failures=2, where="Local") == 3
    assert world.broker.got == ["collected"] and world.heard == ["then"] * 3
    assert await deliver(world, failures=3, where="Local") == 3
    assert world.broker.got == ["collected"]


async def deliver(world: World, *, failures: int, where: str = "arrived") -> int:
    """Deliver a message that is given up after three attempts, of which so many fail at this event; answers how many were made."""
    tries: list[int] = []
    over: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def fail_so_often() -> None:
        tries.append(1)
        if len(tries) <= failures:
            raise LookupError
        over.set_result(None)

    listen = then_listener(fail_so_often)
    world.dispatcher.add_listener(where, listen, priority=1)
    memory, elsewhere = MemoryBroker(app="elsewhere"), AsyncEventDispatcher()
    elsewhere.add_subscriber(Bridge(memory))
    consumer = Consumer(
        world.dispatcher,
        memory.group("rooms", start="new"),
        events=[EventName("arrived", Arrived)],
        max_attempts=3,
        backoff=Backoff(initial=0.001, factor=1, cap=0.001),
        on_error=lambda error, _: over.set_result(error) if isinstance(error, DeliveryGivenUp) else None,
    )
    async with consumer, asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(consumer.run())
        await elsewhere.adispatch("arrived", Arrived(1))
        await over
        consumer.stop()
    world.dispatcher.remove_listener(where, listen)
    return len(tries)


@dataclass(frozen=True)
class Arrived(NotificationEvent):
    label: int
    then: None = None


def then_listener(then: Callable[[], Awaitable[object]]) -> Callable[[Any], Awaitable[None]]:
    async def listen(event: Any) -> None:
        await then()

    return listen


def collects(world: World) -> World:
    """Give its ``start`` a listener that collects what the event says, and its dispatcher a bridge."""

    class Collector(Collects):
        async def handle(self, event: Local) -> None:
            self._events += event.follow

    world.dispatcher.add_listener("start", Collector)
    world.dispatcher.add_subscriber(Bridge(world.broker))
    return world


async def test_what_is_collected_in_a_dispatch_leaves_when_all_is_done() -> None:
    """As of a command."""
    world = collects(World())

    async def nothing_yet() -> None:
        assert world.broker.got == []

    world.container.closing = nothing_yet
    follow = [Leaves(1), Local("a", [Leaves(3)], nothing_yet), Leaves(2)]
    await world.dispatcher.adispatch("start", Local("start", follow))
    assert world.broker.got == [1, 2, 3] and world.heard == ["a"] and world.container.scopes[0].closed


@pytest.mark.parametrize("on_error", ["raise", "collect"])
async def test_and_not_where_one_of_these_events_fails(on_error: Any) -> None:
    world = collects(World(on_error=on_error))
    with pytest.raises((LookupError, ExceptionGroup)):
        await world.dispatcher.adispatch("start", Local("start", [Leaves(1), Local(2, then=fail)]))
    assert world.broker.got == [] and world.heard == [2]


async def test_nor_where_its_scope_fails_to_close() -> None:
    world = collects(World())
    world.container.closing = fail
    with pytest.raises(LookupError):
        await world.dispatcher.adispatch("start", Local("start", [Leaves(1)]))
    assert world.broker.got == []


@pytest.mark.parametrize("on_error", ["raise", "collect"])
async def test_the_brokers_error_reaches_the_caller_of_the_dispatch_as_well(on_error: Any) -> None:
    world = collects(World(on_error=on_error))
    world.broker.error = BrokerUnavailable("away")
    with pytest.raises(BrokerUnavailable):
        await world.dispatcher.adispatch("start", Local("start", [Leaves(1), Local("done")]))
    assert world.heard == ["done"] and world.container.scopes[0].error is None


async def test_what_the_dispatch_itself_sends_does_not_wait_for_its_end(listening: World) -> None:
    """Only what commands in it send does, and what comes of collected events."""
    seen: list[object] = []

    async def see() -> None:
        seen.extend(listening.broker.got)

    listening.dispatcher.add_listener("arrived", then_listener(see), priority=LAST)
    listening.dispatcher.listen("arrived")(lambda_listener(listening))
    await listening.dispatcher.adispatch("arrived", Local(1))
    assert seen == ["of the listener"] and listening.broker.got == ["of the listener", 1]


def lambda_listener(world: World) -> Callable[[Any], Awaitable[None]]:
    async def listen(event: Any) -> None:
        await world.dispatcher.adispatch("now", Leaves("of the listener"))

    return listen


async def test_of_a_function_in_a_dispatch_without_classes_it_leaves_at_the_commands_end(world: World) -> None:
    """There is no unit of work around it."""

    async def send() -> None:
        await world.send(Leaves(1))
        assert world.broker.got == [1]
        raise LookupError

    world.dispatcher.add_listener("arrived", then_listener(send))
    with pytest.raises(LookupError):
        await world.dispatcher.adispatch("arrived")
    assert world.container.scopes[0].error is None


async def test_it_waits_for_a_dispatch_of_another_container_too(listening: World) -> None:
    other = World()
    other.container.transient.add(DoHandler)  # for a command within a command
    other.dispatcher.add_subscriber(Bridge(other.broker))

    class Here(Sends): ...

    Here.world = other
    listening.dispatcher.add_listener("both", Here)
    await listening.dispatcher.adispatch("both", Local(1))
    assert other.broker.got == [1]
    with pytest.raises(LookupError):
        await other.send(then=lambda: fail_after(listening, Local("lost")))
    assert other.broker.got == [1] and listening.broker.got == []


async def fail_after(world: World, event: Local) -> None:
    await world.dispatcher.adispatch("both", event)
    raise LookupError


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
    assert world.heard == ["done"] and world.container.scopes[0].error is None


@pytest.mark.parametrize(("texts", "note"), [("xx.", "2 of 3 messages failed"), (".xy", "2 of 3 messages failed\ny")])
async def test_several_errors_of_one_class_are_one(texts: str, note: str) -> None:
    """So ``except BrokerUnavailable`` goes on to work when a handler collects another event."""
    world = World()
    world.dispatcher.add_subscriber(
        Bridge(Fails(*(BrokerUnavailable(text) if text != "." else None for text in texts)))
    )
    with pytest.raises(BrokerUnavailable, match="^x") as caught:
        await world.send(*map(Leaves, range(3)))
    assert caught.value.__notes__ == [note]


async def test_several_of_several_classes_are_a_group() -> None:
    world = World()
    away, unknown = BrokerUnavailable("away"), DeliveryUnknown("no answer")
    world.dispatcher.add_subscriber(Bridge(Fails(away, None, unknown)))
    with pytest.raises(ExceptionGroup, match="2 of 3 messages failed") as caught:
        await world.send(*map(Leaves, range(3)))
    assert caught.value.exceptions == (away, unknown)


class Fails(Recorder):
    """A broker that answers so to one message after another."""

    def __init__(self, *answers: Exception | None) -> None:
        super().__init__()
        self.answers = iter(answers)

    async def publish(self, *messages: Message) -> None:
        answer = next(self.answers)
        await super().publish(*messages)
        if answer is not None:
            raise answer


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
    assert world.container.scopes[0].closed


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

    mediator = Mediator(request_map=requests, dispatcher=dispatcher, container=SimpleContainer(), middlewares=[after])
    await mediator.send(Do(events=[Leaves(1)]))
    assert broker.got == [1]
