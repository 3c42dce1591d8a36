"""``max_concurrent_event_handlers``: the events of a command side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from silbo import Bridge
from tests.support.mediator import Leaves, Local, World, fail

Then = Callable[[], Awaitable[object]]


class Count:
    """How many are at work, and were at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def work(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(5):
            await asyncio.sleep(0)
        self.now -= 1


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 2), (4, 4), (100, 9)])
async def test_so_many_at_a_time_and_no_more(limit: int, most: int) -> None:
    world, count = World(max_concurrent_event_handlers=limit), Count()
    await world.send(*(Local(n, then=count.work) for n in range(9)))
    assert count.most == most and count.now == 0 and sorted(map(str, world.heard)) == [*map(str, range(9))]


async def test_each_needs_the_other() -> None:
    """They really run side by side, and in the command's scope."""
    world, both = World(max_concurrent_event_handlers=2), asyncio.Barrier(2)
    async with asyncio.timeout(5):
        await world.send(Local(1, then=both.wait), Local(2, then=both.wait))
    assert len(world.container.scopes) == 1 and world.container.scopes[0].closed


async def test_what_they_collect_follows_in_the_order_of_the_events() -> None:
    """Whoever was done first."""
    world, second_done = World(max_concurrent_event_handlers=2), asyncio.Event()
    world.dispatcher.add_subscriber(Bridge(world.broker))

    async def done() -> None:
        second_done.set()

    await world.send(
        Local(1, [Leaves("1a")], second_done.wait), Leaves(2), Local(3, [Leaves("3a"), Leaves("3b")], done)
    )
    assert world.broker.got == [2, "1a", "3a", "3b"]


async def test_messages_leave_in_the_order_of_their_events() -> None:
    """Whichever was handled first."""
    world, second = World(max_concurrent_event_handlers=2), asyncio.Event()
    world.dispatcher.add_subscriber(Bridge(world.broker))

    @world.dispatcher.listen("Leaves")
    async def wait(event: Leaves) -> None:
        if event.label == 1:
            await second.wait()
        else:
            second.set()

    await world.send(Leaves(1), Leaves(2))
    assert world.broker.got == [1, 2]


async def test_where_one_fails_the_others_are_waited_for() -> None:
    world, count, failed = World(max_concurrent_event_handlers=3), Count(), asyncio.Event()
    world.dispatcher.add_subscriber(Bridge(world.broker))
    over: list[str] = []

    async def fail_first() -> None:
        failed.set()
        raise LookupError

    async def go_on() -> None:
        await failed.wait()
        await count.work()
        over.append("over")

    with pytest.raises(LookupError):
        await world.send(Local(1, then=fail_first), *(Local(n, [Leaves(n)], go_on) for n in range(2, 6)), Leaves(6))
    assert over == ["over"] * 4 and count.now == 0 and world.broker.got == []
    assert world.heard[0] == 1 and sorted(map(str, world.heard)) == ["1", "2", "3", "4", "5"]


async def test_where_several_fail_the_caller_has_all_errors() -> None:
    world = World(max_concurrent_event_handlers=3)
    with pytest.raises(ExceptionGroup, match="2 events of one command failed") as caught:
        await world.send(Local(1, then=fail), Local(2), Local(3, then=fail))
    assert [type(error) for error in caught.value.exceptions] == [LookupError, LookupError]
    assert 2 in world.heard


async def test_a_cancelled_command_leaves_none_of_them_behind() -> None:
    world, begun = World(max_concurrent_event_handlers=2), asyncio.Event()
    ended: list[int] = []

    async def hang() -> None:
        if len(world.heard) == 2:
            begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            assert not world.container.scopes[0].closed
            ended.append(1)

    task = asyncio.create_task(world.send(*(Local(n, then=hang) for n in range(3))))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [1, 1] and world.container.scopes[0].closed and len(world.heard) == 2


async def test_a_handler_may_send_a_command_without_waiting_for_itself() -> None:
    """The limit is one command's: a command within has its own."""
    world = World(max_concurrent_event_handlers=2)

    async def inner() -> None:
        await world.also(Local("in"), Local("in"))

    async with asyncio.timeout(5):
        await world.send(*(Local("out", then=inner) for _ in range(4)))
    assert sorted(map(str, world.heard)) == ["in"] * 8 + ["out"] * 4
