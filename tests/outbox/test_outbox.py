"""The outbox: a publisher that stores, and what one does with what is stored."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from whistle import AsyncEventDispatcher as WhistleDispatcher
from whistle import Event as WhistleEvent

from silbo import AsyncEventDispatcher, Bridge, ECSTEvent, Route
from silbo.brokers.memory import MemoryBroker
from silbo.errors import BrokerUnavailable, MessageRefused, OutboxFull, StoreInvalid, StoreUnavailable
from silbo.message import Message, instance
from silbo.outbox.outbox import Outbox
from silbo.outbox.relay import Relay
from silbo.outbox.rows import OutboxStore, Quota
from silbo.protocols import Publisher
from silbo.stores.memory import MemoryStore
from silbo.stores.sqlite import SQLiteStore
from tests.support.relay import FailingBroker, GroupReader, message, wait_until, wait_until_sent
from tests.support.store_conformance import FAR, PAST, in_state

pytestmark = pytest.mark.usefixtures("quick_relay")

Stores = Callable[[], OutboxStore]


@pytest.fixture(params=["memory", "sqlite"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    """Makes handles on one and the same store."""
    if request.param == "memory":
        store = MemoryStore()
        return lambda: store
    return lambda: SQLiteStore(tmp_path / "outbox.db")


async def stored(stores: Stores, state: Any = "pending") -> list[int]:
    store = stores()
    await store.open()
    try:
        return await in_state(store, state)
    finally:
        await store.aclose()


# -- as a publisher ------------------------------------------------------------------------------------------


def test_is_a_publisher_under_the_brokers_name() -> None:
    outbox = Outbox(MemoryStore(), MemoryBroker("web"))
    assert isinstance(outbox, Publisher)
    assert outbox.app == "web"


async def test_publish_returns_when_the_messages_are_stored(stores: Stores, broker: FailingBroker) -> None:
    """Whatever the broker does; what another process finds then is what it will send."""
    broker.away = BrokerUnavailable("away")
    async with Outbox(stores(), broker, drain=0) as outbox:
        await outbox.publish(message(1), message(2))
        await outbox.publish(message(3))
        counts = (await outbox.status()).counts
        assert counts["pending"] + counts["sending"] == 3
    assert await stored(stores) + await stored(stores, "sending") == [1, 2, 3]


async def test_what_was_published_is_sent(stores: Stores, broker: FailingBroker, heard: GroupReader) -> None:
    async with Outbox(stores(), broker) as outbox:
        for number in range(50):
            await outbox.publish(message(number))
        assert await heard.until(50) == list(range(50))
        assert outbox.stats is not None
        await wait_until(lambda: outbox.stats.sent == 50)


async def test_what_was_published_is_sent_at_once(
    stores: Stores, broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay is woken, and need not look."""
    monkeypatch.setattr("silbo.outbox.relay.POLL", 60.0)
    async with Outbox(stores(), broker, lease=600) as outbox:
        for number in range(20):
            await outbox.publish(message(number))
            await heard.until(number + 1)
            await wait_until_sent(outbox._store)  # then it rests


async def test_calls_that_are_not_awaited_in_turn_keep_their_order(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    async with Outbox(stores(), broker) as outbox:
        await asyncio.gather(*(outbox.publish(message(number)) for number in range(200)))
        assert await heard.until(200) == list(range(200))


async def test_message_carries_the_origin_of_the_process_that_published_it() -> None:
    """Not of the process that sends it; one that it has already stays."""
    store = MemoryStore()
    async with Outbox(store, MemoryBroker("web"), relay=False) as outbox:
        await outbox.publish(message(1))
        await outbox.publish(Message("ecst_event", "counted", "id", {"n": 2}, {"app": "other", "instance": "x"}))
    sender = FailingBroker("relay")
    heard = GroupReader(await sender.group("all", start="oldest").open())
    relay = Relay(store, sender)
    relay.stop()
    await relay.run()
    await heard.until(2)
    assert [delivery.message().origin for delivery in heard.deliveries] == [("web", instance()), ("other", "x")]


async def test_address_that_a_route_chose_is_kept(stores: Stores, broker: FailingBroker) -> None:
    receiver = await broker.group("orders", start="oldest", streams=["orders"]).open()
    async with Outbox(stores(), broker) as outbox:
        dispatcher = AsyncEventDispatcher()
        dispatcher.add_subscriber(Bridge(outbox, routes=[Route("order.**", to="orders")]))
        await dispatcher.adispatch("order.placed", ECSTEvent())
        (delivery,) = await receiver.receive(1)
    assert delivery.message().message_name == "order.placed"


async def test_refused_message_does_not_hold_up_the_others(stores: Stores, broker: FailingBroker) -> None:
    odd = [Message("ecst_event", f"odd.{number}", "id", {"x": object()}) for number in (1, 2)]
    async with Outbox(stores(), broker, relay=False) as outbox:
        with pytest.raises(MessageRefused, match=r"odd\.1") as error:
            await outbox.publish(message(1), odd[0], message(2), odd[1])
        assert "odd.2" in error.value.__notes__[0]
        await outbox.publish()
        with pytest.raises(MessageRefused):
            await outbox.publish(odd[0])
    assert await stored(stores) == [1, 2]


async def test_publish_past_the_quota_fails_at_once_having_stored_nothing(
    stores: Stores, broker: FailingBroker
) -> None:
    async with Outbox(stores(), broker, relay=False, quota=Quota(rows=2)) as outbox:
        await outbox.publish(message(1))
        with pytest.raises(OutboxFull, match="nothing of this call was stored"):
            await outbox.publish(message(2), message(3))
        await outbox.publish(message(4))
    assert await stored(stores) == [1, 4]


# -- in a host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["the broker", "an outbox"])
@pytest.mark.parametrize("kind", ["silbo's", "whistle's"])
async def test_host_moves_to_the_outbox_by_one_line(
    stores: Stores, broker: FailingBroker, heard: GroupReader, kind: str, through: str
) -> None:
    """What its consumers hear is the same."""

    class UserJoined(ECSTEvent):
        n: int

        def __init__(self, n: int) -> None:
            self.n = n

    async with Outbox(stores(), broker) as outbox:
        publisher = broker if through == "the broker" else outbox  # the line
        bridge = Bridge(publisher)
        if kind == "silbo's":
            dispatcher: Any = AsyncEventDispatcher()
            dispatcher.add_subscriber(bridge)
        else:
            dispatcher = WhistleDispatcher()
            dispatcher.add_listener("user.joined", bridge.forward, priority=1000)
        order: list[str] = []

        async def listener(event: WhistleEvent) -> None:
            order.append("listener")

        dispatcher.add_listener("user.joined", listener)
        for number in range(3):
            await dispatcher.adispatch("user.joined", UserJoined(number))
        assert await heard.until(3) == [0, 1, 2]
    (first, *_) = heard.deliveries
    assert first.message().message_name == "user.joined"
    assert first.message().origin == ("web", instance())
    assert order == 3 * ["listener"]


# -- entering and leaving ------------------------------------------------------------------------------------


async def test_leaving_sends_what_waits(stores: Stores, broker: FailingBroker, heard: GroupReader) -> None:
    async with Outbox(stores(), broker) as outbox:
        await outbox.publish(*map(message, range(1500)))
    assert await heard.until(1500) == list(range(1500))
    assert broker.closed == 1


async def test_leaving_keeps_what_can_not_be_sent(stores: Stores, broker: FailingBroker, heard: GroupReader) -> None:
    """A broker that is away is not waited for; the next one sends it."""
    broker.away = BrokerUnavailable("away")
    async with Outbox(stores(), broker) as outbox:
        await outbox.publish(message(1))
        await broker.wait_for_calls(1)
    assert await stored(stores) == [1]
    broker.away = None
    async with Outbox(stores(), broker):
        assert await heard.until(1) == [1]


async def test_one_process_can_store_and_another_send(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    async with Outbox(stores(), MemoryBroker("web"), relay=False) as outbox:
        assert outbox.stats is None
        await outbox.publish(message(1))
        async with Relay(stores(), broker) as relay:
            running = asyncio.create_task(relay.run())
            assert await heard.until(1) == [1]
            await outbox.publish(message(2))
            assert await heard.until(2) == [1, 2]
            relay.stop()
            await running


async def test_publish_outside_its_block_says_so(stores: Stores, broker: FailingBroker) -> None:
    """A mistake in the program, and no trouble that passes: not what a caller would repeat."""
    outbox = Outbox(stores(), broker)
    with pytest.raises(RuntimeError, match="not open.*async with"):
        await outbox.publish(message(1))
    async with outbox:
        await outbox.publish(message(2))
    with pytest.raises(RuntimeError, match="before it is left"):
        await outbox.publish(message(3))
    assert await stored(stores) == []


async def test_outbox_is_entered_once(stores: Stores, broker: FailingBroker) -> None:
    outbox = Outbox(stores(), broker)
    async with outbox:
        pass
    with pytest.raises(RuntimeError, match="make another"):
        await outbox.__aenter__()


async def test_outbox_whose_store_could_not_be_opened_can_be_entered_later(
    tmp_path: Path, broker: FailingBroker
) -> None:
    outbox = Outbox(SQLiteStore(tmp_path / "folder" / "outbox.db"), broker)
    with pytest.raises(StoreUnavailable, match="folder"):
        await outbox.__aenter__()
    (tmp_path / "folder").mkdir()
    async with outbox:
        await outbox.publish(message(1))


async def test_closing_twice_or_at_the_same_time_is_fine(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    outbox = await Outbox(stores(), broker).__aenter__()
    await outbox.publish(*map(message, range(600)))
    await asyncio.gather(outbox.aclose(), outbox.aclose())
    await outbox.aclose()
    assert await heard.until(600) == list(range(600))


async def test_closing_sends_what_is_just_being_stored(broker: FailingBroker, heard: GroupReader) -> None:
    """Else it would be left in the store until the next program opens it."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(MemoryStore):
        async def add(self, *arguments: Any) -> None:
            begun.set()
            await go_on.wait()
            await super().add(*arguments)

    outbox = await Outbox(Slow(), broker).__aenter__()
    publishing = asyncio.create_task(outbox.publish(message(1)))
    await begun.wait()
    closing = asyncio.create_task(outbox.aclose())
    await asyncio.sleep(0.05)  # the relay could have ended by then
    go_on.set()
    await publishing
    await closing
    assert await heard.until(1) == [1]


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
async def test_cancelled_leaving_loses_nothing_and_leaves_nothing(
    stores: Stores, broker: FailingBroker, heard: GroupReader, turns: int
) -> None:
    outbox = await Outbox(stores(), broker, drain=60, lease=0.2).__aenter__()
    await outbox.publish(*map(message, range(1000)))
    leaving = asyncio.create_task(outbox.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    await outbox.aclose()
    for thread in threading.enumerate():
        if thread.name.startswith("silbo-outbox"):
            thread.join(10)
    async with Outbox(stores(), broker):
        assert await heard.until(1000) == list(range(1000))


async def test_cancelled_leaving_does_not_wait_for_the_broker(stores: Stores, broker: FailingBroker) -> None:
    async def publish_sequenced(*_: object) -> Any:
        broker.called.set()
        await asyncio.Event().wait()

    broker.publish_sequenced = publish_sequenced  # type: ignore[method-assign]
    outbox = await Outbox(stores(), broker, drain=60).__aenter__()
    await outbox.publish(message(1))
    await broker.called.wait()
    leaving = asyncio.create_task(outbox.aclose())
    await asyncio.sleep(0.01)
    assert not leaving.done()
    leaving.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([leaving])
    assert outbox._relaying is not None
    assert outbox._relaying.done()


async def test_cancelled_publish_may_be_stored_and_disturbs_nobody(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    async with Outbox(stores(), broker) as outbox:
        tasks = [asyncio.create_task(outbox.publish(message(number))) for number in range(30)]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await outbox.publish(message(99))
        await wait_until_sent(outbox._store)
    await heard.more()
    answered = [number for number, answer in enumerate(answers) if answer is None]
    assert set(answered) | {99} <= set(heard.numbers) <= {*range(30), 99}
    assert heard.numbers == sorted(set(heard.numbers))


@pytest.mark.parametrize("partitions", [0, -1])
def test_impossible_number_of_partitions_is_refused(partitions: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Outbox(MemoryStore(), MemoryBroker(), partitions=partitions)


@pytest.mark.parametrize(
    ("store", "publisher", "settings", "text"),
    [
        ("outbox.db", MemoryBroker(), {}, "keeps its messages in a store, as SQLiteStore.*, not in 'outbox.db'"),
        (MemoryBroker(), MemoryStore(), {}, "in a store.*MemoryBroker"),
        (MemoryStore(), Redis(), {}, "sends to a broker, as RedisStreams.*, not to.*Redis"),
        (MemoryStore(), MemoryBroker(), {"quota": 5}, "quota is a Quota, as .*, not 5"),
        (MemoryStore(), MemoryBroker(), {"keep_sent": "1h"}, "keep_sent is a number of seconds"),
    ],
    ids=["path", "swapped", "client", "quota", "keep_sent"],
)
@pytest.mark.parametrize("relay", [True, False])
def test_what_an_outbox_is_not_made_of_is_refused(
    store: Any, publisher: Any, settings: Any, text: str, relay: bool
) -> None:
    """Where it is made, and not when the first message comes; of the relay's settings, where it has one."""
    if relay or "keep_sent" not in settings:
        with pytest.raises(TypeError, match=text):
            Outbox(store, publisher, relay=relay, **settings)


async def test_what_is_no_message_no_time_and_no_row_is_refused(stores: Stores, broker: FailingBroker) -> None:
    """With what belongs there; nothing is stored, sent or deleted."""
    wrong: Any
    async with Outbox(stores(), broker, relay=False) as outbox:
        for wrong in (ECSTEvent(), [message(1)]):
            with pytest.raises(TypeError, match="stores Messages, which a Bridge makes of events, not "):
                await outbox.publish(message(1), wrong)
        assert (await outbox.status()).counts["pending"] == 0
        for time in ({"since": datetime(2026, 3, 7)}, {"since": PAST, "before": datetime(2026, 3, 7)}):
            with pytest.raises(ValueError, match=r"(since|before) needs its time zone, as datetime.now\(UTC\)"):
                await outbox.replay(**time)
        wrong = "1h"
        with pytest.raises(TypeError, match="since is a datetime, not '1h'"):
            await outbox.replay(since=wrong)
        with pytest.raises(ValueError, match="before needs its time zone"):
            await outbox.purge("sent", before=datetime(2026, 3, 7))
        for wrong in ("pending", "snet"):
            with pytest.raises(ValueError, match=f'purged that are "sent" or "dead", not {wrong!r}'):
                await outbox.purge(wrong, before=FAR)
        wrong = 17
        with pytest.raises(TypeError, match=r"rows is a list of ids: \[17\]"):
            await outbox.retry(wrong)


async def test_several_partitions_keep_each_key_in_order(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    async with Outbox(stores(), broker, partitions=4) as outbox:
        await asyncio.gather(
            *(outbox.publish(message(number, key)) for number in range(50) for key in ("a", "b", "c", None))
        )
        await heard.until(200)
    for key in ("a", "b", "c", None):
        its = [each.message() for each in heard.deliveries if each.message().key == key]
        assert [each.payload["n"] for each in its] == list(range(50))
    assert len({source for source, _, _ in broker.calls}) > 1


async def test_other_partitions_while_messages_wait_are_refused(stores: Stores, broker: FailingBroker) -> None:
    async with Outbox(stores(), broker, relay=False) as outbox:
        await outbox.publish(message(1))
    with pytest.raises(StoreInvalid, match="partitions"):
        await Outbox(stores(), broker, partitions=2).__aenter__()


# -- to look at and to mend ----------------------------------------------------------------------------------


async def test_replay_sends_again_in_steps(
    stores: Stores, broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had been sent when it began: it does not go on with what it has itself caused."""
    monkeypatch.setattr("silbo.outbox.outbox.STEP", 4)
    begin = datetime.now(UTC) - timedelta(seconds=1)
    async with Outbox(stores(), broker) as outbox:
        await outbox.publish(*map(message, range(10)))
        await wait_until(lambda: outbox.stats.sent == 10)
        steps: list[int] = []
        assert await outbox.replay(since=begin, progress=steps.append) == 10
        assert steps == [4, 8, 10]
        await wait_until(lambda: outbox.stats.sent == 20)
        assert await outbox.replay(since=begin, before=begin) == 0
        times: list[datetime] = []

        async def replay(*, since: datetime, before: datetime, limit: int) -> int:
            times.append(before)
            return len(times) % 2

        with monkeypatch.context() as patch:
            patch.setattr(outbox._store, "replay", replay)
            await outbox.replay(since=begin)
        assert times[0] == times[1] <= datetime.now(UTC)
        assert await outbox.replay(since=FAR) == 0
    assert await heard.until(20) == [*range(10), *range(10)]
    publications = [delivery.message().headers["publication"] for delivery in heard.deliveries]
    assert publications[:10] == publications[10:]


async def test_dead_messages_can_be_retried_or_purged(
    stores: Stores, broker: FailingBroker, heard: GroupReader
) -> None:
    async with Outbox(stores(), broker, relay=False) as outbox:
        await outbox.publish(*map(message, range(3)))
        store = outbox._store
        lead = await store.lead(0, "a", lease=60)
        assert lead is not None
        rows = await store.take(lead, 10)
        await store.settle(lead, (), {row.id: "too odd" for row in rows})
        await store.resign(lead)
        assert await outbox.retry([rows[1].id]) == 1
        assert await outbox.purge("dead", before=PAST) == 0
        assert await outbox.purge("dead", before=FAR) == 2
        assert await outbox.retry() == 0
    async with Outbox(stores(), broker):
        assert await heard.until(1) == [1]


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("before", [None, FAR])
async def test_replay_ends_by_the_clock_of_the_store(
    broker: FailingBroker, monkeypatch: pytest.MonkeyPatch, hours: int, before: datetime | None
) -> None:
    """The machine that asks for it may have another time. No end is later: rows that the replay sends are not replayed."""
    store = MemoryStore(clock=lambda: time.time() + hours * 3600)
    ends: list[datetime] = []
    replay = store.replay

    async def note(*, since: datetime, before: datetime, limit: int) -> int:
        ends.append(before)
        return await replay(since=since, before=before, limit=limit)

    monkeypatch.setattr(store, "replay", note)
    async with Outbox(store, broker) as outbox:
        await outbox.publish(*map(message, range(3)))
        await wait_until(lambda: outbox.stats.sent == 3)
        begun = await store.read_clock()
        assert await outbox.replay(since=PAST, before=before) == 3
        assert begun <= ends[0] <= await store.read_clock()
        assert len(set(ends)) == 1


async def bury_all(store: OutboxStore) -> list[int]:
    """Let a relay have all rows that wait refused. Return their ids."""
    lead = await store.lead(0, "a", lease=60)
    assert lead is not None
    rows = await store.take(lead, 100)
    await store.settle(lead, (), {row.id: "too odd" for row in rows})
    await store.resign(lead)
    return [row.id for row in rows]


@pytest.mark.parametrize("chosen", [True, False])
async def test_retry_goes_in_steps(
    stores: Stores, broker: FailingBroker, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    """However many ids are given; rows that die again meanwhile are left alone."""
    monkeypatch.setattr("silbo.outbox.outbox.STEP", 4)
    async with Outbox(stores(), broker, relay=False) as outbox:
        await outbox.publish(*map(message, range(10)))
        store = outbox._store
        rows = await bury_all(store)
        retry = store.retry
        asked: list[int] = []

        async def retry_and_bury(*arguments: Any, **options: Any) -> Any:
            asked.extend(len(ids) for ids in arguments if ids)
            changed = await retry(*arguments, **options)
            await bury_all(store)
            return changed

        monkeypatch.setattr(store, "retry", retry_and_bury)
        steps: list[int] = []
        ids = [*rows, *rows, -1, 1 << 70, 999_999] if chosen else None
        async with asyncio.timeout(30):
            assert await outbox.retry(ids, progress=steps.append) == 10
        assert steps == [4, 8, 10]
        assert asked == ([4, 4, 3] if chosen else [])


async def test_store_that_is_in_no_host_database_can_not_store_in_a_session(
    stores: Stores, broker: FailingBroker
) -> None:
    async with Outbox(stores(), broker, relay=False) as outbox:
        with pytest.raises(TypeError, match="SQLAlchemyStore"):
            await outbox.add(object(), message(1))
