"""The broker inside one process: what it promises is what Streams promise, but for the process's end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from silbo.brokers.memory import MemoryBroker
from silbo.errors import AddressInvalid, BrokerUnavailable, Gap, MessageRefused
from silbo.message import Delivery, instance
from silbo.protocols import SequencedPublisher
from silbo.wire.formats import DIATOR
from tests.support.memory_broker import everything, message, numbers


def test_is_a_publisher() -> None:
    assert isinstance(MemoryBroker(), SequencedPublisher)


async def test_message_arrives_as_bytes_with_its_origin() -> None:
    """It has crossed the wire's format, so a program that works here works across processes."""
    broker = MemoryBroker("web")
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    (delivery,) = await everything(receiver)
    assert b'"message_name":"counted"' in delivery.raw
    assert delivery.message().origin == ("web", instance())
    assert (delivery.address, delivery.attempt) == ("events", 1)
    assert delivery.id


async def test_route_sends_a_message_to_its_address() -> None:
    broker = MemoryBroker()
    """A group hears the addresses that it names, as on Streams; else the default one."""
    receiver = await broker.group("billing", start="new").open()
    orders = await broker.group("billing", start="new", streams=["orders"]).open()
    await broker.publish(message(1, to="orders"), message(2))
    assert [delivery.address for delivery in await everything(receiver)] == ["events"]
    assert [delivery.address for delivery in await everything(orders)] == ["orders"]
    with pytest.raises(TypeError, match=r"\['orders'\]"):
        broker.group("billing", start="new", streams="orders")


async def test_each_group_gets_everything_in_order() -> None:
    broker = MemoryBroker()
    groups = [await broker.group(name, start="new").open() for name in ("a", "b")]
    await broker.publish(message(1), message(2))
    await broker.publish(message(3))
    for receiver in groups:
        assert numbers(await receiver.receive(10)) == [1, 2, 3]


async def test_receivers_of_one_group_share_the_work() -> None:
    """Each message goes to one of them."""
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    first, second = await group.open(), await group.open()
    await broker.publish(*map(message, range(6)))
    shares = [numbers(await first.receive(2)), numbers(await second.receive(3)), numbers(await first.receive(9))]
    assert shares == [[0, 1], [2, 3, 4], [5]]


async def test_receive_waits_for_a_message() -> None:
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    receiving = asyncio.create_task(receiver.receive(10))
    await asyncio.sleep(0)
    assert not receiving.done()
    await broker.publish(message(1))
    assert numbers(await receiving) == [1]


async def test_receive_comes_back_empty_after_half_a_second() -> None:
    """So that a consumer sees in time that it is to stop."""
    receiver = await MemoryBroker().group("billing", start="new").open()
    before = asyncio.get_running_loop().time()
    assert not await receiver.receive(10)
    assert 0.4 < asyncio.get_running_loop().time() - before < 5


@pytest.mark.parametrize(("start", "expected"), [("new", [3]), ("oldest", [1, 2, 3])])
async def test_start_says_where_a_new_group_begins(start: Any, expected: list[int]) -> None:
    broker = MemoryBroker()
    await broker.publish(message(1), message(2))
    receiver = await broker.group("billing", start=start).open()
    await broker.publish(message(3))
    assert numbers(await receiver.receive(10)) == expected


async def test_group_that_exists_goes_on_where_it_was() -> None:
    """What came while nobody was there waits, whatever start says."""
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    receiver = await group.open()
    await broker.publish(message(1))
    await receiver.ack(*await everything(receiver))
    await receiver.aclose()
    await broker.publish(message(2))
    assert numbers(await (await group.open()).receive(10)) == [2]


async def test_describing_a_group_makes_none() -> None:
    """It begins when it is opened: nothing is kept for a subscription that nobody uses."""
    broker = MemoryBroker(limit=1, timeout=0.01)
    group = broker.group("billing", start="new")
    await broker.publish(message(1))
    await broker.publish(message(2))
    receiver = await group.open()
    await broker.publish(message(3))
    assert numbers(await receiver.receive(10)) == [3]


async def test_unacknowledged_deliveries_of_a_closed_receiver_go_to_the_others() -> None:
    """In their old places, before what is newer, and marked as redelivered."""
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    first, second = await group.open(), await group.open()
    await broker.publish(*map(message, range(5)))
    taken = [item for item in await first.receive(4) if isinstance(item, Delivery)]
    await first.ack(taken[1])
    await first.aclose()
    await first.aclose()
    again = await everything(second)
    assert numbers(again) == [0, 2, 3, 4]
    assert [delivery.attempt for delivery in again] == [2, 2, 2, 1]
    assert [delivery.id for delivery in again[:3]] == [taken[0].id, taken[2].id, taken[3].id]


async def test_redelivery_wakes_a_receiver_that_waits() -> None:
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    first, second = await group.open(), await group.open()
    await broker.publish(message(1))
    await everything(first)
    waiting = asyncio.create_task(second.receive(10))
    await asyncio.sleep(0)
    await first.aclose()
    assert numbers(await waiting) == [1]


async def test_redelivery_says_how_many_attempts_are_counted() -> None:
    """To be given back is none."""
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    await (await group.open()).aclose()
    await broker.publish(message(1))
    attempts = []
    for number in range(4):
        receiver = await group.open()
        (delivery,) = await everything(receiver)
        attempts.append(delivery.attempt)
        if number:
            await receiver.count(delivery)
        await receiver.aclose()
    assert attempts == [1, 2, 3, 4]


async def test_cancelled_receive_takes_nothing() -> None:
    """A shutdown in the moment of arrival loses nothing."""
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    receiving = asyncio.create_task(receiver.receive(10))
    await asyncio.sleep(0)
    await broker.publish(message(1))
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert numbers(await receiver.receive(10)) == [1]


async def test_publish_waits_for_room_and_calls_keep_their_order() -> None:
    """A slow group slows its publishers down; nobody overtakes, a small call no large one either."""
    broker = MemoryBroker(limit=3)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1), message(2))
    calls = [asyncio.create_task(broker.publish(*map(message, batch))) for batch in ([3, 4], [5], [6])]
    await asyncio.sleep(0)
    assert not any(call.done() for call in calls)
    taken = await everything(receiver)
    assert numbers(taken) == [1, 2]
    await receiver.ack(taken[0])
    await receiver.ack(taken[1])
    await asyncio.gather(calls[0], calls[1])
    assert not calls[2].done()
    await receiver.ack(*await everything(receiver))
    await calls[2]
    assert numbers(await receiver.receive(10)) == [6]


async def test_publish_without_room_fails_after_its_timeout_and_publishes_nothing() -> None:
    broker = MemoryBroker(limit=2, timeout=0.02)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    with pytest.raises(BrokerUnavailable, match="2 messages"):
        await broker.publish(message(2), message(3))
    assert numbers(await receiver.receive(10)) == [1]


async def test_call_that_gives_up_lets_a_smaller_one_behind_it_pass() -> None:
    broker = MemoryBroker(limit=2, timeout=5)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    large = asyncio.create_task(broker.publish(message(2), message(3)))
    small = asyncio.create_task(broker.publish(message(4)))
    await asyncio.sleep(0)
    large.cancel()
    await asyncio.wait_for(small, 2)
    assert numbers(await receiver.receive(10)) == [1, 4]


async def test_cancelled_publish_is_passed_over_when_there_is_room() -> None:
    """Room may come in the very moment of the cancellation: it goes to the next."""
    broker = MemoryBroker(limit=1)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    calls = [asyncio.create_task(broker.publish(message(number))) for number in (2, 3)]
    await asyncio.sleep(0)
    taken = await everything(receiver)
    calls[0].cancel()
    await receiver.ack(*taken)
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    await asyncio.wait_for(calls[1], 5)
    assert numbers(await receiver.receive(10)) == [3]


async def test_publish_that_got_room_at_its_deadline_has_succeeded() -> None:
    """To call it refused would have the caller send it twice."""
    broker = MemoryBroker(limit=1, timeout=0)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    taken = await everything(receiver)
    publishing = asyncio.create_task(broker.publish(message(2)))
    await asyncio.sleep(0)  # it waits, and its deadline is the next thing to happen
    await receiver.ack(*taken)
    await publishing
    assert numbers(await receiver.receive(10)) == [2]


async def test_call_larger_than_the_limit_waits_for_an_empty_group() -> None:
    """It is taken whole: to be refused for ever would help nobody."""
    broker = MemoryBroker(limit=2)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(0))
    large = asyncio.create_task(broker.publish(*map(message, range(1, 6))))
    await asyncio.sleep(0)
    assert not large.done()
    await receiver.ack(*await everything(receiver))
    await large
    assert numbers(await receiver.receive(10)) == [1, 2, 3, 4, 5]


async def test_what_one_group_has_no_room_for_no_group_gets() -> None:
    """So a caller may repeat what was refused, and nobody hears it twice."""
    broker = MemoryBroker(limit=1, timeout=0.02)
    slow = await broker.group("slow", start="new").open()
    fast = await broker.group("fast", start="new").open()
    await broker.publish(message(1))
    await fast.ack(*await everything(fast))
    with pytest.raises(BrokerUnavailable):
        await broker.publish(message(2))
    await slow.ack(*await everything(slow))
    await broker.publish(message(2))
    assert numbers(await fast.receive(10)) == [2]


async def test_without_groups_nothing_is_refused_and_the_newest_are_kept() -> None:
    broker = MemoryBroker(limit=3, timeout=0.01)
    for number in range(10):
        await broker.publish(message(number))
    receiver = await broker.group("late", start="oldest").open()
    assert numbers(await receiver.receive(10)) == [7, 8, 9]


async def test_drop_loses_the_oldest_and_reports_how_many() -> None:
    """Publishers are never held up; the consumer knows what it missed."""
    broker = MemoryBroker(limit=3, overflow="drop", timeout=0.01)
    receiver = await broker.group("billing", start="new").open()
    for number in range(5):
        await broker.publish(message(number))
    gap, *rest = await receiver.receive(10)
    assert isinstance(gap, Gap)
    assert (gap.address, gap.count) == ("billing", 2)
    assert numbers(rest) == [2, 3, 4]
    await broker.publish(message(5))
    gap, *rest = await receiver.receive(10)
    assert isinstance(gap, Gap)
    assert (gap.count, rest) == (1, [])  # what a receiver has in hand is not taken from it


async def test_refused_message_does_not_take_the_others_of_its_call_with_it() -> None:
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    too_large = {**message(2).payload, "text": "x" * 2_000_000}
    with pytest.raises(MessageRefused):
        await broker.publish(message(1), message(2, payload=too_large), message(3))
    assert numbers(await receiver.receive(10)) == [1, 3]


async def test_format_is_the_brokers() -> None:
    broker = MemoryBroker(format=DIATOR)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    (delivery,) = await everything(receiver)
    assert delivery.format is DIATOR
    assert b'"message_name":"Counted"' in delivery.raw


def test_serves_several_event_loops_one_after_another() -> None:
    """What one left, the next receives; nothing in the broker remembers a loop that is gone."""
    broker = MemoryBroker(limit=2, timeout=0.02)
    group = broker.group("billing", start="new")

    async def first() -> None:
        receiver = await group.open()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receiver.receive(1), 0.01)
        await broker.publish(message(1), message(2))
        await everything(receiver)
        with pytest.raises(BrokerUnavailable):
            await broker.publish(message(3))
        await receiver.aclose()

    async def second() -> list[int]:
        receiver = await group.open()
        publishing = asyncio.create_task(broker.publish(message(3)))
        got = await everything(receiver)
        await receiver.ack(*got)
        await publishing
        return numbers([*got, *await everything(receiver)])

    asyncio.run(first())
    assert not any(backlog._sleepers for backlog in broker._backlogs.values())
    assert not broker._room_waiters
    assert asyncio.run(second()) == [1, 2, 3]


async def test_closes_as_other_brokers_do() -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(MemoryBroker())
        await broker.aclose()


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"overflow": "block"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MemoryBroker(**wrong)


def test_app_and_group_are_names_that_fit_into_addresses() -> None:
    with pytest.raises(AddressInvalid, match="an app"):
        MemoryBroker("my app")
    with pytest.raises(AddressInvalid, match="a group"):
        MemoryBroker().group("my group", start="new")
    with pytest.raises(ValueError, match="newest"):
        MemoryBroker().group("billing", start="newest")  # type: ignore[arg-type]
