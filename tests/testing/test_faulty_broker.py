"""The broker with faults: each fault is what a real broker does, of the messages that it is meant for, and then over."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from unittest.mock import AsyncMock

import pytest

from silbo import AsyncEventDispatcher, Outbox
from silbo.errors import BrokerUnavailable, DeliveryUnknown, MessageRefused
from silbo.protocols import Receiver
from silbo.stores.memory import MemoryStore
from silbo.testing import EventRecorder, FaultyBroker
from silbo.testing.conformance import CHECKS, Check
from silbo.wire.encode import to_message
from tests.support.broker_rigs import groups
from tests.support.consumer import USER_JOINED, Consumer, Running, UserJoined, UserLeft
from tests.support.memory_broker import everything, message, numbers


@pytest.fixture
def broker() -> FaultyBroker:
    return FaultyBroker("web")


@pytest.fixture
async def receiver(broker: FaultyBroker) -> Receiver:
    return await broker.group("g", start="new").open()


@pytest.fixture
def events() -> Iterator[EventRecorder]:
    recorder = EventRecorder()
    yield recorder
    recorder.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_without_a_fault_it_is_a_good_publisher(check: Check, broker: FaultyBroker) -> None:
    async with groups(broker, broker) as rig:
        await check(rig)


async def test_refused_message_does_not_arrive_and_the_others_do(broker: FaultyBroker, receiver: Receiver) -> None:
    broker.refuse()
    with pytest.raises(MessageRefused, match="the test refuses it"):
        await broker.publish(message(1), message(2))
    await broker.publish(message(3))
    assert numbers(await everything(receiver)) == [2, 3]


async def test_fault_is_of_the_messages_that_its_pattern_matches(broker: FaultyBroker, receiver: Receiver) -> None:
    left = to_message(UserLeft(1), name="user.left", kind="notification")
    joined = to_message(UserJoined(1), name="user.joined", kind="ecst")
    broker.refuse("user.*", times=2)
    broker.refuse(USER_JOINED)
    await broker.publish(message(1))
    for bad in (left, joined, joined):
        with pytest.raises(MessageRefused):
            await broker.publish(bad)
    await broker.publish(left, joined)
    assert len(await everything(receiver)) == 3
    for times in (0, True):
        with pytest.raises((TypeError, ValueError)):
            broker.refuse(times=times)


@pytest.mark.parametrize("arrives", [True, False])
async def test_call_without_an_answer_may_have_arrived(broker: FaultyBroker, receiver: Receiver, arrives: bool) -> None:
    broker.lose_answers(arrives=arrives)
    with pytest.raises(DeliveryUnknown, match="lost the broker's answer"):
        await broker.publish(message(1), message(2))
    await broker.publish(message(3))
    assert numbers(await everything(receiver)) == ([1, 2, 3] if arrives else [3])


@pytest.mark.parametrize("arrives", [True, False])
async def test_outbox_sends_again_what_had_no_answer_and_nothing_is_doubled(
    broker: FaultyBroker, receiver: Receiver, events: EventRecorder, arrives: bool
) -> None:
    clock = events.freeze()
    broker.lose_answers(arrives=arrives)
    async with Outbox(MemoryStore(clock=clock), broker) as outbox:
        events.watch(outbox)
        await outbox.publish(message(1), message(2))
        await events.settle()
        clock.advance(5)
        await events.settle()
        assert numbers(await everything(receiver)) == [1, 2]
        assert outbox.stats is not None and outbox.stats.postponed == 1
        assert outbox.stats.known == (2 if arrives else 0)


async def test_delayed_message_is_overtaken_until_it_is_due(
    broker: FaultyBroker, receiver: Receiver, events: EventRecorder
) -> None:
    clock = events.freeze()
    broker.delay(10)
    await broker.publish(message(1))
    await broker.publish(message(2))
    clock.advance(9.5)
    await events.settle()
    assert numbers(await everything(receiver)) == [2]
    clock.advance(0.5)
    await events.settle()
    assert numbers(await everything(receiver)) == [1]


async def test_duplicate_is_two_deliveries_of_one_publication(broker: FaultyBroker, receiver: Receiver) -> None:
    broker.duplicate()
    await broker.publish(message(1), message(2))
    first, again, second = await everything(receiver)
    assert numbers([first, again, second]) == [1, 1, 2]
    assert first.id != again.id and first.message().headers == again.message().headers


async def test_reordered_message_comes_behind_the_next(broker: FaultyBroker, receiver: Receiver) -> None:
    broker.reorder(times=2)
    await broker.publish(message(1))
    await broker.publish(message(2))
    receiving = asyncio.create_task(everything(receiver))
    await asyncio.sleep(0)
    assert not receiving.done()
    await broker.publish(message(3), message(4))
    assert numbers(await receiving) == [3, 1, 2, 4]


async def test_broker_that_is_away_refuses_every_call_and_keeps_its_messages(
    broker: FaultyBroker, receiver: Receiver
) -> None:
    await broker.publish(message(1), message(2))
    first, _ = await everything(receiver)
    with broker.away(), broker.away():
        with broker.away():
            pass
        for call in (
            broker.publish(message(3)),
            broker.publish_sequenced("s/0", 1, [(1, message(3))]),
            broker.group("g", start="new").open(),
            receiver.receive(1),
            receiver.ack(first),
            receiver.keep(first),
            receiver.offer(first),
            receiver.count(first),
            receiver.bury(first, error="", attempts=1),
        ):
            with pytest.raises(BrokerUnavailable, match="taken the broker away"):
                await call
        await receiver.aclose()
    again = await broker.group("g", start="new").open()
    assert numbers(await everything(again)) == [1, 2]


async def test_receiver_that_waits_learns_at_once_that_the_broker_is_away(
    broker: FaultyBroker, receiver: Receiver, events: EventRecorder
) -> None:
    events.freeze()  # else the end of its half second would tell it, too
    receiving = asyncio.create_task(receiver.receive(1))
    await events.settle()
    with broker.away():
        await events.settle()
        assert isinstance(receiving.exception(), BrokerUnavailable)


async def test_consumer_goes_on_when_its_broker_is_back(broker: FaultyBroker, events: EventRecorder) -> None:
    clock = events.freeze()
    d = events.watch(AsyncEventDispatcher())
    d.add_listener(USER_JOINED, AsyncMock())
    async with Running(Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])):
        await events.settle()
        with broker.away():
            await events.settle()
        await broker.publish(to_message(UserJoined(1), name="user.joined", kind="ecst"))
        await events.settle()
        assert events.consumed() == []
        clock.advance(1)
        await events.settle()
        events.assert_consumed(USER_JOINED, user_id=1)


async def test_acknowledged_delivery_comes_again_with_a_higher_attempt(
    broker: FaultyBroker, events: EventRecorder
) -> None:
    """To its own group alone, each time that the test asks for it, and not what was buried or is in hand."""
    other = await broker.group("other", start="new").open()
    d = events.watch(AsyncEventDispatcher())
    d.add_listener(USER_JOINED, AsyncMock())
    consumer = Consumer(d, broker.group("billing", start="new"), events=[USER_JOINED])
    async with Running(consumer):
        await broker.publish(to_message(UserJoined(1), name="user.joined", kind="ecst"))
        await events.settle()
        for times in (2, 3):
            assert broker.redeliver("user.left") == 0
            assert (broker.redeliver(), broker.redeliver()) == (1, 0)
            await events.settle()
            assert len(events.consumed(USER_JOINED)) == times
    assert consumer.stats.claimed == 2
    [kept] = await everything(other)
    assert await other.bury(kept, error="no", attempts=1)
    assert broker.redeliver(USER_JOINED) == 1  # billing's
