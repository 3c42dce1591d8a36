"""The relay, on the store and the broker in memory: what it does when either of them fails, or another relay leads."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from silbo._retry import Backoff
from silbo.brokers.memory import MemoryBroker
from silbo.errors import (
    BrokerUnavailable,
    DeliveryUnknown,
    Fenced,
    LeadLost,
    MessageRefused,
    PublishError,
    StoreUnavailable,
)
from silbo.message import Message
from silbo.outbox import relay as relaying
from silbo.outbox.relay import OUTAGE_RETRY, Relay
from silbo.outbox.rows import Lead, OutboxStore, Quota, Row, pack
from silbo.protocols import Publisher, Sequenced
from silbo.stores.memory import MemoryStore
from tests.support.relay import FailingBroker, GroupReader, message, wait_until, wait_until_sent

pytestmark = pytest.mark.usefixtures("quick_relay")

LONG = 60.0


async def store_of(*numbers: int, partitions: int = 1) -> MemoryStore:
    store = MemoryStore()
    await store.open(partitions)
    await put(store, *numbers)
    return store


async def put(store: OutboxStore, *numbers: int, key: str | None = "a") -> None:
    await store.add([pack(message(number, key), store.partitions) for number in numbers], Quota())


@asynccontextmanager
async def running(
    store: OutboxStore, publisher: Publisher, *, drain: float = 0.0, lease: float = LONG, **settings: Any
) -> AsyncIterator[Relay]:
    relay = Relay(store, publisher, drain=drain, lease=lease, **settings)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        relay.stop()
        async with asyncio.timeout(10):
            await task


def texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


# -- sending -------------------------------------------------------------------------------------------------


async def test_stored_messages_are_sent_in_their_order(broker: FailingBroker, heard: GroupReader) -> None:
    store = await store_of(*range(1200))
    async with running(store, broker) as relay:
        assert await heard.until(1200) == list(range(1200))
        await wait_until_sent(store)
    assert (relay.stats.sent, relay.stats.known, relay.stats.dead) == (1200, 0, 0)
    assert (await store.status()).counts["sent"] == 1200
    assert {source for source, _, _ in broker.calls} == {f"{store.id}/0"}
    assert max(len(sequences) for _, _, sequences in broker.calls) == 500


async def test_message_is_sent_as_it_was_stored(broker: FailingBroker, heard: GroupReader) -> None:
    """With the origin of the process that stored it, not of the one that sends it."""
    store = MemoryStore()
    headers = {"publication": "p-1", "app": "host", "instance": "elsewhere"}
    await store.add([pack(Message("ecst_event", "counted", "id", {"n": 1}, headers), 1)], Quota())
    async with running(store, broker):
        await heard.until(1)
    assert heard.deliveries[0].message().headers == headers


async def test_waking_it_sends_at_once_in_each_partition(
    broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "POLL", LONG)
    store = await store_of(partitions=4)
    async with running(store, broker) as relay:
        await wait_until(lambda: len(relay._wake_events) == 4)
        for number in range(8):
            for key in "1234567890":
                await put(store, number, key=key)
            relay.wake()
            await heard.until(10 * (number + 1))
    assert len({source for source, _, _ in broker.calls}) == 4


async def test_partition_that_is_busy_when_it_is_woken_looks_again(
    broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the others do meanwhile: one partition does not take the call away from another."""
    monkeypatch.setattr(relaying, "POLL", LONG)
    store = await store_of(partitions=2)
    looked, go_on = asyncio.Event(), asyncio.Event()

    async def take(lead: Lead, limit: int, **answered: Any) -> Sequence[Row]:
        rows = await store.take(lead, limit, **answered)
        if lead.partition == 1 and not looked.is_set():
            looked.set()
            await go_on.wait()
        return rows

    async with running(_with(store, take=take), broker, lease=600) as relay:
        await looked.wait()
        await put(store, 1, key="1")  # of partition 1, which has just found nothing
        await put(store, 2, key=None)
        relay.wake()
        assert await heard.until(1) == [2]
        await asyncio.sleep(0.05)
        go_on.set()
        assert await heard.until(2) == [2, 1]


async def test_what_another_process_has_stored_is_found(broker: FailingBroker, heard: GroupReader) -> None:
    store = await store_of()
    async with running(store, broker):
        await wait_until(lambda: store._leads[0].epoch)
        await put(store, 1)
        await heard.until(1)


async def test_draining_a_store_in_memory_lets_others_run(broker: FailingBroker) -> None:
    """Neither store nor broker ever waits there."""
    store = await store_of(*range(5000))
    async with running(store, broker) as relay:
        turns = 0
        while relay.stats.sent < 5000:
            turns += 1
            await asyncio.sleep(0)
    assert turns >= 10


async def test_old_sent_messages_are_forgotten(broker: FailingBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "FORGET_EVERY", 0.01)
    store = await store_of(*range(10))
    async with running(store, broker, keep_sent=LONG) as relay:
        await wait_until(lambda: relay.stats.sent == 10)
    assert (await store.status()).counts["sent"] == 10
    async with running(store, broker, keep_sent=0.0):
        await wait_until(lambda: not store._rows)


# -- a broker that fails -------------------------------------------------------------------------------------


async def test_broker_that_is_away_is_waited_for(
    broker: FailingBroker, heard: GroupReader, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is dead, everything says why it waits; one line in the log; then it is sent, once, in order."""
    store = await store_of(*range(20))
    broker.away = BrokerUnavailable("Redis is away")
    async with running(store, broker) as relay:
        await broker.wait_for_calls(4)
        await put(store, 20)
        relay.wake()
        await broker.wait_for_calls(1)
        await wait_until(lambda: all(row.state == "pending" for row in store._rows.values()))
        status = await store.status()
        assert status.counts == {"pending": 21, "sending": 0, "sent": 0, "dead": 0}
        first, *_ = await store.rows("pending")
        assert (first.error, first.attempts >= 4) == ("Redis is away", True)
        assert first.next_attempt_at is not None
        assert first.next_attempt_at > first.state_at
        broker.away = None
        assert await heard.until(21) == list(range(21))
        await wait_until_sent(store)
    assert relay.stats.postponed >= 5
    assert relay.stats.dead == relay.stats.known == 0
    away, back = texts(caplog)
    assert away == "broker unavailable, trying again: Redis is away"
    assert back.startswith("broker back after ")


async def test_broker_that_is_away_at_the_start_is_told_though_nothing_is_to_be_sent(
    broker: FailingBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong address must not look healthy until the first message comes."""
    store = await store_of()
    broker.away = BrokerUnavailable("Redis is away")
    async with running(store, broker) as relay:
        await broker.wait_for_calls(3)
        assert texts(caplog) == ["broker unavailable, trying again: Redis is away"]
        broker.away = None
        await wait_until(lambda: len(caplog.records) == 2)
        assert texts(caplog)[1].startswith("broker back after ")
        asked = len(broker.calls)
        await asyncio.sleep(0.05)
        assert len(broker.calls) == asked, "once it has answered it is left alone"
    assert {tuple(sequences) for _, _, sequences in broker.calls} == {()}
    assert relay.stats.postponed == relay.stats.sent == 0


async def test_stop_does_not_wait_for_a_broker_to_which_nothing_is_owed(broker: FailingBroker) -> None:
    store = await store_of()
    broker.away = BrokerUnavailable("Redis is away")
    begun = asyncio.get_running_loop().time()
    async with running(store, broker, drain=LONG):
        await broker.wait_for_calls(3)
    assert asyncio.get_running_loop().time() - begun < LONG / 2


async def test_relay_learns_at_once_that_it_is_an_old_leader(broker: FailingBroker) -> None:
    """Also where nothing is to be sent."""
    store = await store_of()
    await broker.publish_sequenced(f"{store.id}/0", 7, [(1, message(1))])
    async with running(store, broker) as relay:
        await wait_until(lambda: relay.stats.fenced)
        await wait_until(lambda: broker.calls[-1][1] > 7)


async def test_partitions_share_the_line_about_an_outage(
    broker: FailingBroker, caplog: pytest.LogCaptureFixture
) -> None:
    store = await store_of(partitions=4)
    broker.away = BrokerUnavailable("Redis is away")
    async with running(store, broker):
        await broker.wait_for_calls(20)
        broker.away = None
        await wait_until(lambda: len(caplog.records) == 2)
    assert [text.split(" ")[1] for text in texts(caplog)] == ["unavailable,", "back"]


def test_tries_come_slower_and_slower_but_not_too_slow() -> None:
    """So that a broker that is back is found within seconds."""
    delays = [OUTAGE_RETRY.delay(attempt) or 0 for attempt in range(1, 30)]
    assert 0 < delays[0] <= 0.1
    assert 1.0 <= max(delays) <= 2.0


async def test_one_line_a_minute_is_logged_about_one_outage(
    broker: FailingBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "OUTAGE_RETRY", Backoff(initial=0.001, cap=0.001))
    seconds = 1000.0
    monkeypatch.setattr("silbo._reports.time", SimpleNamespace(monotonic=lambda: seconds))
    store = await store_of(1)
    broker.away = BrokerUnavailable("Redis is away")
    async with running(store, broker):
        await broker.wait_for_calls(10)
        assert len(caplog.records) == 1
        seconds += 59.0
        await broker.wait_for_calls(5)
        assert len(caplog.records) == 1
        seconds += 2.0
        await broker.wait_for_calls(5)
        assert len(caplog.records) == 2
        broker.away = None
        await wait_until_sent(store)
    assert caplog.records[1].__dict__["withheld"] >= 10


async def test_broker_that_is_away_is_not_asked_sooner_because_more_is_stored(broker: FailingBroker) -> None:
    """Nor is the store."""
    store, takes = await store_of(1), 0

    async def take(*arguments: Any, **named: Any) -> Sequence[Row]:
        nonlocal takes
        takes += 1
        return await store.take(*arguments, **named)

    broker.away = BrokerUnavailable("Redis is away")
    async with running(_with(store, take=take), broker) as relay:
        await broker.wait_for_calls(3)
        calls, before = len(broker.calls), takes
        for number in range(100):
            await put(store, number)
            relay.wake()
            await asyncio.sleep(0)
        # Asked at each of them, it would be about a hundred; a busy machine may need a few delays for the loop above.
        assert len(broker.calls) <= calls + 10
        assert takes <= before + 20


@pytest.mark.parametrize("lost", [1, 5])
async def test_send_whose_answer_was_lost_is_repeated_without_duplicates(
    broker: FailingBroker, heard: GroupReader, lost: int
) -> None:
    """With the same sequences, so that the broker knows them."""
    store = await store_of(*range(30))
    broker.after.extend(DeliveryUnknown("the connection broke") for _ in range(lost))
    async with running(store, broker) as relay:
        await wait_until(lambda: relay.stats.sent == 30)
        await put(store, 30)
        relay.wake()
        await wait_until(lambda: relay.stats.sent == 31)
    assert await heard.until(31) == list(range(31))
    assert (relay.stats.known, relay.stats.postponed) == (30, lost)
    assert len({tuple(sequences) for _, _, sequences in broker.calls[: lost + 1]}) == 1
    assert (await store.status()).counts["dead"] == 0


async def test_crash_before_the_answer_was_written_down_leads_to_no_duplicate(
    broker: FailingBroker, heard: GroupReader
) -> None:
    store = await store_of(*range(10))
    sent = asyncio.Event()

    async def take(lead: Lead, limit: int, **answered: Any) -> Sequence[Row]:
        if answered["sent"]:
            sent.set()
            await asyncio.Event().wait()
        return await store.take(lead, limit, **answered)

    first = asyncio.create_task(Relay(_with(store, take=take), broker, lease=0.05).run())
    await sent.wait()
    first.cancel()
    await asyncio.wait([first])
    async with running(store, broker) as relay:
        await wait_until(lambda: relay.stats.sent == 10)
    assert await heard.until(10) == list(range(10))
    assert relay.stats.known == 10


async def test_refused_message_is_dead_and_frees_its_partition(heard: GroupReader, broker: FailingBroker) -> None:
    """Only a refusal for good does that. The hook gets the error and the message."""
    store = await store_of(1, 2, 3)
    odd = Message("ecst_event", "counted", "id-4", {"n": 4, "odd": "x" * 2_000_000}, {"key": "a"})
    store._rows[2] = store._rows[2]._replace(message=odd)  # no outbox stores it: a broker's format may refuse more
    told: list[tuple[Exception, Any]] = []
    async with running(store, broker, on_error=lambda error, what: told.append((error, what))) as relay:
        await wait_until_sent(store)
    assert await heard.until(2) == [1, 3]
    assert (relay.stats.sent, relay.stats.dead) == (2, 1)
    (dead,) = await store.rows("dead")
    ((error, what),) = told
    assert isinstance(error, MessageRefused)
    assert what == odd == dead.message
    assert dead.error == str(error)
    assert "2000" in str(error)


async def test_any_other_failure_of_a_publisher_is_tried_again(
    broker: FailingBroker, heard: GroupReader, caplog: pytest.LogCaptureFixture
) -> None:
    """A relay never ends by itself: the outbox would fill up and nobody would know why."""
    store = await store_of(1, 2)
    broker.before.extend([RuntimeError("a defect"), ValueError("another")])
    async with running(store, broker):
        assert await heard.until(2) == [1, 2]
        await wait_until_sent(store)
    assert any(text.startswith("relay failed, trying again: ") for text in texts(caplog))
    assert (await store.status()).counts["dead"] == 0


# -- publishers without sequences ----------------------------------------------------------------------------


class Plain:
    """A publisher that knows no sequences."""

    app = "web"

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.failures: deque[PublishError] = deque()

    async def publish(self, *messages: Message) -> None:
        for each in messages:
            if each.payload["n"] < 0:
                raise MessageRefused(each.message_name, "negative")
            if self.failures:
                raise self.failures.popleft()
            self.sent.append(each.payload["n"])

    async def aclose(self) -> None: ...


async def test_publisher_without_sequences_is_given_what_is_stored() -> None:
    store, plain = await store_of(1, -2, 3, -4, 5), Plain()
    async with running(store, plain) as relay:
        await wait_until_sent(store)
    assert plain.sent == [1, 3, 5]
    assert [row.message.payload["n"] for row in await store.rows("dead")] == [-2, -4]
    assert (relay.stats.sent, relay.stats.dead) == (3, 2)


async def test_backlog_is_taken_at_once_where_the_broker_has_a_record(
    broker: FailingBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has answered once: it refuses what a crash would send again. Any other publisher would double all of it."""
    monkeypatch.setattr(relaying, "BATCH", 2)
    takings: list[int] = []

    async def take(lead: Lead, limit: int, **named: Any) -> Sequence[Row]:
        rows = await store.take(lead, limit, **named)
        takings.append(len(rows))
        return rows

    for publisher, expected in ((broker, [2, 9]), (Plain(), [2, 2, 2, 2, 2, 1])):
        store = await store_of(*range(11))
        takings.clear()
        async with running(_with(store, take=take), publisher):
            await wait_until_sent(store)
        assert [many for many in takings if many] == expected
    assert [len(sequences) for _, _, sequences in broker.calls if sequences] == [2, 2, 2, 2, 2, 1]


async def test_lead_is_renewed_between_the_calls_of_one_taking(
    broker: FailingBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow link they take longer than a lease."""
    monkeypatch.setattr(relaying, "BATCH", 2)
    store = await store_of(*range(7))
    lead = await store.lead(0, "a", lease=LONG)
    assert lead is not None
    calls_so_far: list[int] = []

    async def renew() -> None:
        calls_so_far.append(len(broker.calls))

    await Relay(store, broker)._send(lead, await store.take(lead, 7), 0.0, renew)
    assert calls_so_far == [1, 2, 3] and len(broker.calls) == 4


async def test_failed_call_lets_the_calls_before_it_be_settled(
    broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the rows of later calls wait with its own."""
    monkeypatch.setattr(relaying, "BATCH", 2)
    store = await store_of(*range(7))
    lead = await store.lead(0, "a", lease=LONG)
    assert lead is not None

    async def renew() -> None:
        broker.away = BrokerUnavailable("away")

    relay = Relay(store, broker, on_error=lambda *_: None)
    assert await relay._send(lead, await store.take(lead, 7), LONG, renew) is None
    assert await heard.until(2) == [0, 1]
    assert [row.message.payload["n"] for row in await store.rows("sent")] == [0, 1]
    assert {row.error for row in await store.rows("pending")} == {"away"} and relay.stats.sent == 2


async def test_value_that_a_publisher_returns_is_no_error() -> None:
    """Else what it has published would be published again without an end."""

    class Counting(Plain):
        async def publish(self, *messages: Message) -> int:  # type: ignore[override]
            await super().publish(*messages)
            return len(messages)

    store, plain = await store_of(1, -2, 3), Counting()
    async with running(store, plain) as relay:
        await wait_until_sent(store)
    assert (plain.sent, relay.stats.sent, relay.stats.dead) == ([1, 3], 2, 1)


@pytest.mark.parametrize("kind", [Plain, FailingBroker])
async def test_publisher_that_is_cancelled_does_not_end_the_relay(kind: Any) -> None:
    """Nobody has cancelled the relay: a library's own future was."""

    class Cancelled(kind):  # type: ignore[misc]
        times = 2

        async def publish(self, *messages: Message) -> None:
            self._cancel()
            await super().publish(*messages)

        async def publish_sequenced(self, *arguments: Any) -> Any:
            self._cancel()
            return await super().publish_sequenced(*arguments)

        def _cancel(self) -> None:
            self.times -= 1
            if self.times >= 0:
                raise asyncio.CancelledError

    if kind is Plain:
        del Cancelled.publish_sequenced
    store, errors = await store_of(1), []
    async with running(store, Cancelled(), on_error=lambda error, about: errors.append(str(error))):
        await wait_until_sent(store)
    assert errors and set(errors) == {"a publisher was cancelled, but not by its relay"}


async def test_publisher_without_sequences_gets_everything_again_that_may_have_failed() -> None:
    """At least once: that is what sequences are for."""
    store, plain = await store_of(1, 2, 3), Plain()
    plain.failures.append(BrokerUnavailable("away"))
    async with running(store, plain):
        await wait_until_sent(store)
    assert plain.sent == [2, 3, 1, 2, 3]


class Picky(Plain):
    """A publisher that fails for some messages, by their number, for as long as the errors are there."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[int, BaseException] = {}
        self.tries: Counter[int] = Counter()

    async def publish(self, *messages: Message) -> None:
        number = messages[0].payload["n"]
        self.tries[number] += 1
        if (error := self.errors.get(number)) is not None:
            raise error
        await super().publish(*messages)


@pytest.mark.parametrize(
    "error",
    [
        BrokerUnavailable("no permission"),
        DeliveryUnknown("no answer"),
        ValueError("a defect"),
        asyncio.CancelledError(),
    ],
    ids=["unavailable", "unknown", "defect", "cancelled"],
)
async def test_message_that_fails_again_and_again_lets_the_others_be_sent_once(error: BaseException) -> None:
    """A message that the publisher took is settled, whatever becomes of its neighbours."""
    store, plain = await store_of(), Picky()
    for number in range(1, 7):
        await put(store, number, key=str(number))
    plain.errors[3] = error
    async with running(store, plain) as relay:
        await wait_until(lambda: plain.tries[3] >= 5)
        assert plain.sent == [1, 2, 4, 5, 6]
        assert relay.stats.sent == 5
        assert [row.message.payload["n"] for row in await store.rows("sent")] == [1, 2, 4, 5, 6]
        await put(store, 7, key="7")
        await wait_until(lambda: 7 in plain.sent)
        plain.errors.clear()
        await wait_until_sent(store)
    assert plain.sent == [1, 2, 4, 5, 6, 7, 3]


async def test_failed_message_holds_back_those_of_its_key_and_address() -> None:
    """Messages sent behind it go once more after it; later ones wait for it, and are not sent at each attempt."""
    store, plain = await store_of(1, 2), Picky()
    await put(store, 3, key=None)
    await store.add([pack(replace(message(4), to="other"), 1)], Quota())
    plain.errors[1] = BrokerUnavailable("no permission")
    async with running(store, plain):
        await wait_until(lambda: plain.tries[1] >= 3)
        assert plain.sent == [2, 3, 4]
        await put(store, 5)
        before = plain.tries[1]
        await wait_until(lambda: plain.tries[1] >= before + 3)
        assert plain.sent == [2, 3, 4]
        plain.errors.clear()
        await wait_until_sent(store)
    assert plain.sent == [2, 3, 4, 1, 2, 5]


async def test_error_of_each_row_is_its_own() -> None:
    store, plain = await store_of(), Picky()
    plain.errors = {1: BrokerUnavailable("no permission"), 2: DeliveryUnknown("no answer")}
    for number in (1, 2):
        await put(store, number, key=str(number))
    async with running(store, plain):
        await wait_until(lambda: min(plain.tries[1], plain.tries[2]) >= 2)
    rows = [*await store.rows("pending"), *await store.rows("sending")]
    assert [row.error for row in sorted(rows, key=lambda row: row.id)] == ["no permission", "no answer"]


class OneAway(FailingBroker):
    """The broker in memory, of which one address is away."""

    is_away = True

    async def publish_sequenced(self, source: str, epoch: int, messages: Sequence[tuple[int, Message]]) -> Sequenced:
        away = {sequence for sequence, each in messages if each.to == "away" and self.is_away}
        rest = [(sequence, each) for sequence, each in messages if sequence not in away]
        answer = await super().publish_sequenced(source, epoch, rest)
        return replace(answer, unsent=dict.fromkeys(away, BrokerUnavailable("no such stream")))


async def test_address_that_fails_lets_the_others_be_settled() -> None:
    """A publisher with sequences says which messages did not go."""
    store, broker = await store_of(1, 2), OneAway()
    await store.add([pack(replace(message(3), to="away"), 1)], Quota())
    async with running(store, broker) as relay:
        await broker.wait_for_calls(3)
        assert (await store.status()).counts["sent"] == 2
        assert (relay.stats.sent, relay.stats.known) == (2, 0)
        broker.is_away = False
        await wait_until_sent(store)


@pytest.mark.parametrize("leads_anew", [False, True])
async def test_broker_counts_as_back_when_it_takes_what_it_refused(
    leads_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty batch between two attempts is no answer."""
    store, postpones = await store_of(), Counter[str]()

    async def postpone(lead: Lead, rows: Any, *, error: str, delay: float) -> None:
        await store.postpone(lead, rows, error=error, delay=delay + 0.1)  # the relay looks again before
        postpones[error] += 1
        if leads_anew:
            raise StoreUnavailable("gone for a moment")

    await store.add([pack(replace(message(1), to="away"), 1)], Quota())
    broker: Any = Picky() if leads_anew else OneAway()
    if leads_anew:
        broker.errors = {1: BrokerUnavailable("no such stream")}
    async with running(_with(store, postpone=postpone), broker):
        await wait_until(lambda: postpones["no such stream"] >= 3)
        assert not [text for text in texts(caplog) if text.startswith("broker back")]
        broker.is_away, broker.errors = False, {}
        await wait_until_sent(store)
        await wait_until(lambda: [text for text in texts(caplog) if text.startswith("broker back")])


# -- who leads -----------------------------------------------------------------------------------------------


def _with(store: OutboxStore, **methods: Any) -> Any:
    """The same store, with some methods of another's."""

    class Other:
        def __getattr__(self, name: str) -> Any:
            return methods.get(name) or getattr(store, name)

    return Other()


async def test_one_of_two_relays_sends_and_the_other_takes_over_when_it_stops(
    broker: FailingBroker, heard: GroupReader
) -> None:
    """At once: who stops resigns."""
    store = await store_of(1, 2)
    first = asyncio.create_task(Relay(store, broker, lease=LONG).run())
    await heard.until(2)
    async with running(store, broker) as second:
        await put(store, 3)
        await heard.until(3)
        await wait_until_sent(store)
        first.cancel()
        await asyncio.wait([first])
        await put(store, 4)
        await wait_until(lambda: second.stats.sent == 1)
    assert await heard.until(4) == [1, 2, 3, 4]
    assert [epoch for _, epoch, sent in broker.calls if sent] == [
        1,
        1,
        2,
    ]  # one that finds nothing to send asks the broker


async def test_relay_takes_over_from_one_that_is_silent(broker: FailingBroker, heard: GroupReader) -> None:
    store = await store_of(1)
    silent = await store.lead(0, "silent", lease=0.2)
    assert silent is not None
    async with running(store, broker) as relay:
        assert await heard.until(1) == [1]
        await wait_until(lambda: relay.stats.sent == 1)
    assert datetime.now(UTC) >= silent.until
    assert broker.calls[0][1] == silent.epoch + 1


async def test_lease_is_renewed_in_time_also_under_load(broker: FailingBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a third of it: no other relay gets a chance."""
    monkeypatch.setattr(relaying, "BATCH", 1)
    store, leads = await store_of(*range(2000)), 0

    async def lead(*arguments: Any, **named: Any) -> Lead | None:
        nonlocal leads
        leads += 1
        return await store.lead(*arguments, **named)

    async with running(_with(store, lead=lead), broker, lease=0.3) as relay:
        await wait_until(lambda: relay.stats.sent)
        until_then = store._leads[0].until
        for renewal in range(1, 5):
            await wait_until(lambda: store._leads[0].until > until_then + 0.1 * renewal)  # noqa: B023  # awaited here
            assert await store.lead(0, "other", lease=LONG) is None
    assert {epoch for _, epoch, _ in broker.calls} == {1}
    assert leads <= 20


async def test_lease_is_renewed_while_the_broker_is_away(broker: FailingBroker) -> None:
    store = await store_of(1)
    broker.away = BrokerUnavailable("away")
    async with running(store, broker, lease=0.3):
        await broker.wait_for_calls(1)
        until_then = store._leads[0].until
        await wait_until(lambda: store._leads[0].until > until_then + 0.5)
        assert {epoch for _, epoch, _ in broker.calls} == {1}


async def test_leader_that_was_taken_over_stands_by(broker: FailingBroker, heard: GroupReader) -> None:
    """It leaves the rows to the other one, and leads again when that has gone."""
    store = await store_of(1)
    reported: list[Exception] = []
    async with running(store, broker, on_error=lambda error, _: reported.append(error)) as relay:
        await wait_until(lambda: relay.stats.sent == 1)
        store._leads[0].until = 0.0  # it was frozen for so long
        other = await store.lead(0, "other", lease=LONG)
        assert other is not None
        await put(store, 2)
        await wait_until(lambda: reported)
        calls = len(broker.calls)
        assert isinstance(reported[0], LeadLost)
        assert (await store.rows("pending"))[0].attempts == 0
        await store.resign(other)
        assert await heard.until(2) == [1, 2]
        assert broker.calls[calls][1] == other.epoch + 1


async def test_fenced_leader_gives_up_and_leads_above_if_the_store_lets_it(
    broker: FailingBroker, heard: GroupReader
) -> None:
    """The broker has seen a newer epoch, as of a store that was restored from an older copy: the store decides."""
    store = await store_of(1)
    await broker.publish_sequenced(f"{store.id}/0", 41, [(1, message(-1))])
    reported: list[Exception] = []
    async with running(store, broker, on_error=lambda error, _: reported.append(error)) as relay:
        await put(store, 2)
        await wait_until_sent(store)
    assert relay.stats.fenced == 1
    assert [type(error) for error in reported] == [Fenced]
    assert sorted(await heard.until(3)) == [-1, 1, 2]
    assert broker.calls[-1][1] > 41


async def test_epoch_out_of_range_is_not_copied_into_the_store(broker: FailingBroker) -> None:
    """When the broker's record is mended, the relay goes on as before."""
    store = await store_of(1)
    broker.away = Fenced("box/0", 2**53)
    async with running(store, broker) as relay:
        await broker.wait_for_calls(3)
        broker.away = None
        await wait_until_sent(store)
    assert relay.stats.fenced >= 3
    assert max(epoch for _, epoch, _ in broker.calls) < 100


async def test_fenced_leader_stands_by_while_another_leads(broker: FailingBroker) -> None:
    store = await store_of(1)
    other: list[Any] = []

    async def publish_sequenced(source: str, epoch: int, messages: Any) -> Sequenced:
        store._leads[0].until = 0.0
        other.append(await store.lead(0, "other", lease=LONG))
        raise Fenced(source, other[0].epoch)

    broker.publish_sequenced = publish_sequenced  # type: ignore[method-assign]
    async with running(store, broker) as relay:
        await wait_until(lambda: relay.stats.fenced)
        await asyncio.sleep(0.05)
        assert len(other) == 1
        assert store._leads[0].owner == "other"


async def test_rows_that_nobody_sent_and_the_broker_knows_get_new_sequences(
    broker: FailingBroker, heard: GroupReader, caplog: pytest.LogCaptureFixture
) -> None:
    """The store is older than the broker, and its sequences were another's: to take them for sent would lose them."""
    store = await store_of(1, 2, 3)
    await broker.publish_sequenced(f"{store.id}/0", 1, [(2**52, message(-1)), (2**52 + 1, message(-2))])
    async with running(store, broker) as relay:
        await wait_until_sent(store)
    assert sorted(await heard.until(5)) == [-2, -1, 1, 2, 3]
    assert (relay.stats.sent, relay.stats.known) == (3, 0)
    assert "outbox is older than its broker, restored from a copy: giving new sequences" in texts(caplog)


async def test_rows_of_a_later_call_that_the_broker_knows_get_new_sequences(
    broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They and those behind them; not those of an earlier call, which are sent, though not settled yet."""
    monkeypatch.setattr(relaying, "BATCH", 2)
    store = await store_of(1, 2, 3, 4)
    await store.add([pack(replace(message(number), to="other"), 1) for number in (5, 6)], Quota())
    await put(store, 7, 8)
    await broker.publish_sequenced(f"{store.id}/0", 1, [(2**52, replace(message(-1), to="other"))])
    async with running(store, broker) as relay:
        await wait_until_sent(store)
    assert await heard.until(6) == [1, 2, 3, 4, 7, 8]
    assert [delivery.message().payload["n"] for delivery in broker._kept] == [-1, 1, 2, 3, 4, 5, 6, 7, 8]
    assert (relay.stats.sent, relay.stats.known) == (8, 0)


# -- a store that fails --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lead", "take", "postpone", "forget", "resign"])
async def test_store_that_is_away_is_waited_for(
    broker: FailingBroker,
    heard: GroupReader,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(relaying, "FORGET_EVERY", 0.01)
    store = await store_of(*range(10))
    failures, works = deque(3 * [StoreUnavailable("locked")]), getattr(store, method)

    async def fails(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.popleft()
        return await works(*arguments, **named)

    if method == "postpone":
        broker.before.extend(3 * [BrokerUnavailable("away")])
    if method == "resign":
        broker.before.extend(3 * [Fenced("it", 5)])
    async with running(_with(store, **{method: fails}), broker, lease=0.5):
        await heard.until(10)
        await wait_until_sent(store)
        await wait_until(lambda: not failures)
    assert heard.numbers == list(range(10))
    if method != "resign":
        assert len([text for text in texts(caplog) if text.startswith("outbox store unavailable, trying again")]) == 1


# -- stopping ------------------------------------------------------------------------------------------------


async def test_stop_sends_what_waits(broker: FailingBroker, heard: GroupReader) -> None:
    """Also what was stored before it had begun."""
    store = await store_of(*range(3000))
    relay = Relay(store, broker)
    relay.stop()
    await relay.run()
    assert await heard.until(3000) == list(range(3000))
    assert (await store.status()).counts["sent"] == 3000


async def test_stop_sends_what_is_stored_while_the_relay_looks(broker: FailingBroker, heard: GroupReader) -> None:
    """A program that stores and ends at once: the relay's look at the store has begun before, and finds nothing."""

    class Late(MemoryStore):
        async def take(self, *arguments: Any, **options: Any) -> Sequence[Row]:
            rows = await super().take(*arguments, **options)
            if not relay._stopping.is_set():
                await put(self, 1)
                relay.stop()
            return rows

    relay = Relay(store := Late(), broker)
    await store.open(1)
    await asyncio.wait_for(relay.run(), 20)
    assert await heard.until(1) == [1]


async def test_stop_still_sends_what_waits_for_its_next_attempt(
    broker: FailingBroker, heard: GroupReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that broke a moment before does not keep it from that."""
    monkeypatch.setattr(relaying, "OUTAGE_RETRY", Backoff(initial=0.2, cap=0.2, jitter=0))
    store = await store_of(1, 2)
    broker.before.append(BrokerUnavailable("a connection broke"))
    async with running(store, broker, drain=LONG):
        await wait_until(lambda: any(row.next_attempt_at for row in store._rows.values()))
    assert await heard.until(2) == [1, 2]
    assert (await store.status()).counts["sent"] == 2


async def test_stop_does_not_wait_for_a_broker_that_is_away(broker: FailingBroker) -> None:
    """It tries once more."""
    store = await store_of(1)
    broker.away = BrokerUnavailable("away")
    async with running(store, broker, drain=LONG):
        await broker.wait_for_calls(1)
    assert (await store.status()).counts["pending"] == 1


async def test_stop_ends_after_drain_seconds(broker: FailingBroker) -> None:
    """Where a broker does not answer; what is left stays in the store, and nobody has to wait for the lease."""
    store = await store_of(1, 2)

    async def publish_sequenced(*_: object) -> Sequenced:
        broker.called.set()
        return await asyncio.Event().wait()  # type: ignore[return-value]

    broker.publish_sequenced = publish_sequenced  # type: ignore[method-assign]
    async with running(store, broker, drain=0.05):
        await broker.called.wait()
    assert (await store.status()).counts == {"pending": 0, "sending": 2, "sent": 0, "dead": 0}
    assert await store.lead(0, "other", lease=LONG) is not None


@pytest.mark.parametrize("turns", range(12))
async def test_cancellation_leaves_at_once_and_loses_nothing(
    broker: FailingBroker, heard: GroupReader, turns: int
) -> None:
    store = await store_of(*range(1000))
    task = asyncio.create_task(Relay(store, broker, drain=LONG).run())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert (await store.status()).leads == {}
    async with running(store, broker):
        await wait_until_sent(store)
    assert await heard.until(1000) == list(range(1000))


async def test_cancelled_relay_does_not_wait_for_its_store(
    broker: FailingBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To resign is a courtesy."""
    store = await store_of(1)

    async def resign(_: object) -> None:
        await asyncio.Event().wait()

    broker.away = BrokerUnavailable("away")
    task = asyncio.create_task(Relay(_with(store, resign=resign), broker).run())
    await broker.wait_for_calls(1)
    task.cancel()
    begin = asyncio.get_running_loop().time()
    await asyncio.wait([task])
    assert asyncio.get_running_loop().time() - begin < 20


async def test_relay_opens_and_closes_what_it_was_given(broker: FailingBroker, heard: GroupReader) -> None:
    store = await store_of(1)
    calls: list[str] = []

    async def opening(partitions: int | None = None) -> None:
        calls.append(f"open {partitions}")

    async def closing() -> None:
        calls.append("close")

    async with Relay(_with(store, open=opening, aclose=closing), broker) as relay:
        assert calls == ["open None"]
        task = asyncio.create_task(relay.run())
        await heard.until(1)
    assert task.done()
    assert (calls, broker.closed) == (["open None", "close"], 1)


async def test_store_is_closed_also_where_the_broker_fails_to(broker: FailingBroker) -> None:
    store, calls = await store_of(1), []

    async def closing() -> None:
        calls.append("close")

    async def fails() -> None:
        raise OSError("a defect")

    broker.aclose = fails  # type: ignore[method-assign]
    with pytest.raises(OSError, match="a defect"):
        async with Relay(_with(store, aclose=closing), broker):
            pass
    assert calls == ["close"]


async def test_relay_that_has_to_wait_for_a_lease_says_so_once(
    broker: FailingBroker, heard: GroupReader, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a kill -9, when the next process seems to do nothing; one that leads at once says nothing."""
    caplog.set_level(logging.INFO, "silbo.outbox.relay")
    store = await store_of(1)
    killed = await store.lead(0, "killed", lease=LONG)
    assert killed is not None
    async with running(store, broker):
        async with asyncio.timeout(10):
            while not caplog.records:
                await asyncio.sleep(0.005)
        await asyncio.sleep(5 * relaying.STANDBY)
        await store.resign(killed)
        assert await heard.until(1) == [1]
    said = [(record.levelname, record.getMessage(), vars(record)["partition"]) for record in caplog.records]
    assert said == [
        ("INFO", "another relay leads, standing by until its lease ends", 0),
        ("INFO", "leading now", 0),
    ]
    caplog.clear()
    async with running(store, broker):
        await put(store, 2)
        assert await heard.until(2) == [1, 2]
    assert not caplog.records


async def test_relay_runs_once(broker: FailingBroker) -> None:
    relay = Relay(await store_of(), broker)
    relay.stop()
    await relay.run()
    with pytest.raises(RuntimeError, match="runs once"):
        await relay.run()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"lease": 0}, ValueError, "lease is seconds, more than 0, not 0"),
        ({"lease": float("nan")}, ValueError, "lease is seconds"),
        ({"keep_sent": -1}, ValueError, "keep_sent is seconds, 0 or more, not -1"),
        ({"keep_sent": float("inf")}, ValueError, "keep_sent is seconds"),
        ({"drain": -1}, ValueError, "drain is seconds"),
        ({"keep_sent": "1h"}, TypeError, "keep_sent is a number of seconds, not '1h'"),
        ({"lease": timedelta(seconds=10)}, TypeError, "lease is a number of seconds, not datetime.timedelta"),
        ({"on_error": "log"}, TypeError, "on_error is a function, sync or async, .* not 'log'"),
    ],
)
def test_impossible_settings_are_refused(settings: Any, error: type[Exception], text: str) -> None:
    """When they are given, by their names."""
    with pytest.raises(error, match=text):
        Relay(MemoryStore(), MemoryBroker(), **settings)


# -- the hook ------------------------------------------------------------------------------------------------


async def test_hook_hears_of_every_error_instead_of_the_log(
    broker: FailingBroker, heard: GroupReader, caplog: pytest.LogCaptureFixture
) -> None:
    """Sync or async; one that fails does no harm."""
    store = await store_of(1)
    away = BrokerUnavailable("away")
    broker.before.extend([away, away])
    told: list[tuple[Exception, Any]] = []

    async def hook(error: Exception, what: Any) -> None:
        told.append((error, what))
        if len(told) == 2:
            raise RuntimeError("the hook's own")

    async with running(store, broker, on_error=hook):
        await heard.until(1)
        await wait_until_sent(store)
    assert told == [(away, None), (away, None)]
    assert [(record.message, record.levelno) for record in caplog.records] == [("error hook failed", logging.ERROR)]
