"""Acknowledgement: after the listeners, in batches, and again when it is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from silbo import (
    AsyncEventDispatcher,
)
from silbo.consumer import acknowledgements as acks_module
from silbo.consumer.loop_turns import TURN
from silbo.errors import BrokerUnavailable, Gap
from silbo.message import Batch, Delivery
from tests.support.consumer import USER_JOINED, Consumer, Heard, Running, Scripted, UserJoined, delivery


async def test_what_is_done_is_acknowledged_while_a_slow_listener_runs(d: AsyncEventDispatcher) -> None:
    """A crash in a long listener does not repeat all that came before it."""
    release = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 3:
            await release.wait()

    subscription = Scripted([delivery(1), delivery(2), delivery(3), delivery(4)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(2)
        assert subscription.acked == ["1", "2"]
        release.set()
        await subscription.until_acked(4)


async def test_acknowledgements_go_in_batches_and_at_once_when_all_is_done(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for many: a round trip for each would be most of the work. And nothing is waited for that can't come."""
    monkeypatch.setattr(acks_module, "ACK_WITHIN", 3600)
    subscription = Scripted([delivery(number) for number in range(80)])
    calls: list[int] = []

    async def ack(*deliveries: Delivery) -> None:
        calls.append(len(deliveries))
        await Scripted.ack(subscription, *deliveries)

    subscription.ack = ack  # type: ignore[method-assign]
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(80)
    assert calls == [80]


class ScriptedBatches(Scripted):
    """One whose calls cost a round trip."""

    ack_delay = 3600.0

    async def receive_batches(self, limit: int) -> Sequence[Delivery | Batch | Gap]:
        return await self.receive(limit)


async def test_reads_of_single_messages_share_an_acknowledgement(
    d: AsyncEventDispatcher, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a few thousand messages a second each read brings one: a call for each would cost as much as the read."""
    monkeypatch.setattr(acks_module, "ACK_WITHIN", 3600)
    subscription = ScriptedBatches(*([delivery(number)] for number in range(20)))
    calls: list[int] = []

    async def ack(*done: Delivery | Batch) -> None:
        deliveries = [each for one in done for each in (one if isinstance(one, Batch) else [one])]
        calls.append(len(deliveries))
        await Scripted.ack(subscription, *deliveries)

    subscription.ack = ack  # type: ignore[method-assign]
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await heard.until(20)
        await subscription.empty.wait()
        assert calls == []
    assert calls == [20]


async def test_many_done_are_acknowledged_without_waiting_for_more(
    d: AsyncEventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acks_module, "ACK_BATCH", 3)
    monkeypatch.setattr(acks_module, "ACK_WITHIN", 3600)
    release = asyncio.Event()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        if event.user_id == 4:
            await release.wait()

    subscription = Scripted([delivery(number) for number in (1, 2, 3, 4)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(3)
        release.set()


async def test_stop_lets_an_acknowledgement_under_way_finish(d: AsyncEventDispatcher) -> None:
    """To cancel it would cost a connection, and leave it open whether it was heard."""
    cancelled: list[bool] = []

    class SlowAck(Scripted):
        async def ack(self, *deliveries: Delivery) -> None:
            consumer.stop()
            try:
                await asyncio.sleep(0.2)  # longer than the reading that the stop waits for
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            await super().ack(*deliveries)

    subscription = SlowAck([delivery(1)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with consumer:
        await consumer.run()
    assert (subscription.acked, cancelled) == (["1"], [])


async def test_what_is_done_during_an_acknowledgement_goes_with_the_next(d: AsyncEventDispatcher) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    calls: list[list[str]] = []

    class SlowAck(Scripted):
        async def ack(self, *deliveries: Delivery) -> None:
            calls.append([delivery.id for delivery in deliveries])
            if len(calls) == 1:
                first.set()
                await second.wait()
            await super().ack(*deliveries)

    @d.listen("user.joined")
    async def work(event: UserJoined) -> None:
        if event.user_id == 2:
            await first.wait()  # so the first batch is under way
        if event.user_id == 3:
            second.set()

    subscription = SlowAck([delivery(1), delivery(2), delivery(3)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(3)
    assert calls == [["1"], ["2", "3"]]


async def test_refused_acknowledgements_are_kept_and_repeated(d: AsyncEventDispatcher, heard: Heard) -> None:
    subscription = Scripted([delivery(1), delivery(2)])
    subscription.refuse_acks = 3
    async with Running(Consumer(d, subscription, events=[USER_JOINED])):
        await subscription.until_acked(2)
    assert subscription.acked == ["1", "2"]
    assert heard.ids == [1, 2]


async def test_delivery_that_is_still_in_hand_is_not_handled_twice(d: AsyncEventDispatcher) -> None:
    """After a lost connection a broker sends again what it has no answer for."""
    release = asyncio.Event()
    heard = Heard()

    @d.listen("user.joined")
    async def slow(event: UserJoined) -> None:
        await release.wait()
        await heard.hear(event)

    subscription = Scripted([delivery(1), delivery(2)], BrokerUnavailable("lost"), [delivery(1), delivery(2)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await subscription.empty.wait()
        release.set()
        await subscription.until_acked(2)
    assert (heard.ids, consumer.stats.received) == ([1, 2], 2)


@pytest.mark.parametrize("after", ["a turn of the loop", "the host is told of a gap"])
async def test_delivery_acknowledged_just_after_it_was_read_again_is_not_handled_twice(
    d: AsyncEventDispatcher, after: str
) -> None:
    """It was in hand when it was read: whatever runs before the consumer comes to it does not make it a new one."""
    heard = Heard()
    d.add_subscriber(heard)
    release = asyncio.Event()

    class Repeats(Scripted):
        async def receive(self, limit: int) -> Sequence[Delivery | Gap]:
            items = await super().receive(limit)
            if (
                items and heard.events and after == "a turn of the loop"
            ):  # once more, with its acknowledgement under way
                time.sleep(2 * TURN)
                release.set()
            return items

        async def ack(self, *deliveries: Delivery) -> None:
            await release.wait()
            self.acked += [delivery.id for delivery in deliveries]
            self.changed.set()

    async def on_error(error: Exception, about: object) -> None:
        release.set()
        await subscription.until_acked(1)
        await asyncio.sleep(0)

    again: list[Delivery | Gap] = [delivery(1)]
    if after == "the host is told of a gap":
        again.insert(0, Gap("events", "trimmed"))
    subscription = Repeats([delivery(1)], [], again, [delivery(2)])
    async with Running(Consumer(d, subscription, events=[USER_JOINED], on_error=on_error)):
        await heard.until(2)
        await subscription.until_acked(2)
    assert heard.ids == [1, 2]


async def test_consumer_outlives_its_broker(
    d: AsyncEventDispatcher, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    """An outage is waited for, with pauses that grow, and told when it begins and when it is over."""
    outage = [BrokerUnavailable("away") for _ in range(4)]
    before = asyncio.get_running_loop().time()
    async with Running(Consumer(d, Scripted([delivery(1)], *outage, [delivery(2)]), events=[USER_JOINED])):
        await heard.until(2)
    assert asyncio.get_running_loop().time() - before > 0.3
    away, back = [record.message for record in caplog.records]
    assert away == "broker unavailable, trying again: away"
    assert back.startswith("broker back after ")


async def test_error_that_is_no_outage_ends_the_run(d: AsyncEventDispatcher) -> None:
    """A broken adapter is no weather: it is seen."""
    async with Consumer(d, Scripted(ZeroDivisionError("bug"))) as consumer:
        with pytest.raises(ZeroDivisionError):
            await consumer.run()


async def test_what_leaves_its_batch_while_the_broker_is_asked_is_still_lost(d: AsyncEventDispatcher) -> None:
    """A consumer that was frozen begins nothing that another one has taken over meanwhile."""
    asked, answer, release = asyncio.Event(), asyncio.Event(), asyncio.Event()
    begun: list[int] = []

    class Asked(Scripted):
        keep_every = 0.001

        async def keep(self, *deliveries: Delivery) -> Sequence[Delivery]:
            if asked.is_set():
                return ()
            asked.set()
            await answer.wait()
            return [each for each in deliveries if each.id in "24"]

    @d.listen("user.joined")
    async def listener(event: UserJoined) -> None:
        begun.append(event.user_id)
        if event.user_id == 1:
            await release.wait()

    subscription = Asked([delivery(number, key=str(number)) for number in (1, 2, 3, 4)])
    consumer = Consumer(d, subscription, events=[USER_JOINED])
    async with Running(consumer):
        await asked.wait()
        await asyncio.sleep(0.01)  # longer than what is kept is surely kept
        release.set()
        for _ in range(50):
            await asyncio.sleep(0)
        answer.set()
        await subscription.until_acked(2)
    assert not {2, 4} & set(begun)
    assert consumer.stats.lost == 2
