"""What the memory broker offers to an outbox, and to a consumer that survives."""

from __future__ import annotations

import asyncio

import pytest

from silbo.brokers.memory import MemoryBroker
from silbo.errors import Fenced
from tests.support.memory_broker import everything, message, numbers


async def test_sequenced_messages_are_added_once() -> None:
    """A repeated send adds what is new; what is known is told, with the last sequence there was."""
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    first = await broker.publish_sequenced("store/0", 1, [(10, message(1)), (12, message(2))])
    assert (first.known, first.refused, first.last) == (set(), {}, 0)
    again = await broker.publish_sequenced("store/0", 2, [(12, message(2)), (13, message(3))])
    assert (again.known, again.last) == ({12}, 12)
    assert numbers(await receiver.receive(10)) == [1, 2, 3]
    assert (await broker.publish_sequenced("store/1", 1, [(1, message(4))])).last == 0  # another source
    assert numbers(await receiver.receive(10)) == [4]


async def test_older_leader_is_fenced_and_publishes_nothing() -> None:
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    await broker.publish_sequenced("store/0", 2, [(1, message(1))])
    with pytest.raises(Fenced) as caught:
        await broker.publish_sequenced("store/0", 1, [(2, message(2))])
    assert (caught.value.source, caught.value.epoch) == ("store/0", 2)
    assert numbers(await receiver.receive(10)) == [1]


async def test_sequences_are_kept_for_each_address() -> None:
    """As on Streams, where each stream remembers its own."""
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new", streams=["events", "orders"]).open()
    await broker.publish_sequenced("store/0", 1, [(1, message(1)), (2, message(2, to="orders"))])
    outcome = await broker.publish_sequenced("store/0", 1, [(1, message(1, to="orders")), (2, message(3))])
    assert (outcome.known, outcome.last) == ({1}, 2)
    assert numbers(await receiver.receive(10)) == [1, 2, 3]


async def test_refused_message_of_a_sequence_is_told_and_the_others_are_added() -> None:
    broker = MemoryBroker()
    receiver = await broker.group("billing", start="new").open()
    bad = message(2, payload={"what": object()})
    outcome = await broker.publish_sequenced("store/0", 1, [(1, message(1)), (2, bad), (3, message(3))])
    assert (list(outcome.refused), outcome.known) == ([2], set())
    assert numbers(await receiver.receive(10)) == [1, 3]


async def test_fence_counts_when_there_is_room() -> None:
    """The leader that waited for room may have been replaced meanwhile."""
    broker = MemoryBroker(limit=1)
    receiver = await broker.group("billing", start="new").open()
    await broker.publish(message(1))
    new = asyncio.create_task(broker.publish_sequenced("store/0", 2, [(1, message(2))]))
    old = asyncio.create_task(broker.publish_sequenced("store/0", 1, [(2, message(3))]))
    await asyncio.sleep(0)
    await receiver.ack(*await everything(receiver))
    await new
    assert not old.done()
    await receiver.ack(*await everything(receiver))
    with pytest.raises(Fenced):
        await old


# -- what a consumer asks of it -----------------------------------------------------------------------------


async def test_dead_letters_are_acknowledged_and_kept_up_to_the_limit() -> None:
    broker = MemoryBroker(limit=2)
    receiver = await broker.group("billing", start="new").open()
    for number in range(3):
        await broker.publish(message(number))
        (delivery,) = await everything(receiver)
        assert [await receiver.count(delivery) for _ in range(2)] == [1, 2]
        assert await receiver.bury(delivery, error="ValueError: no", attempts=2)
        assert not await receiver.bury(delivery, error="ValueError: no", attempts=2)
    assert [letter.delivery.message().payload["number"] for letter in broker.dead] == [1, 2]
    assert (broker.dead[0].group, broker.dead[0].error, broker.dead[0].attempts) == ("billing", "ValueError: no", 2)


async def test_attempts_outlive_a_consumer_and_end_with_the_acknowledgement() -> None:
    broker = MemoryBroker()
    group = broker.group("billing", start="new")
    first = await group.open()
    await broker.publish(message(1))
    (delivery,) = await everything(first)
    assert await first.count(delivery) == 1
    await first.aclose()
    second = await group.open()
    (again,) = await everything(second)
    assert await first.keep(delivery) == [delivery]  # it is the other's now
    assert await second.keep(again) == []
    assert not await first.bury(delivery, error="", attempts=1)
    assert await second.count(again) == 2
    await second.ack(again)
    assert await second.count(again) == 1
