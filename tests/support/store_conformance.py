"""The tests that every store of an outbox must pass.

A store's own tests derive from :class:`Conformance` and give the fixture ``make``: a function that makes one more handle on
one and the same store, as another process would have it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from silbo._checks import LONGEST
from silbo.brokers.memory import MemoryBroker
from silbo.errors import LeadLost, MessageInvalid, MessageRefused, OutboxFull, StoreInvalid
from silbo.message import Message
from silbo.outbox.relay import Relay
from silbo.outbox.rows import Lead, OutboxStore, Packed, Quota, Row, State, pack
from silbo.protocols import Sequenced

Make = Callable[[], OutboxStore]

LONG = 60.0
"""A lease, or a delay, that doesn't end while a test runs."""
SHORT = 0.05
PLENTY = Quota()
FAR = datetime(2100, 1, 1, tzinfo=UTC)
PAST = datetime(2000, 1, 1, tzinfo=UTC)


def message(number: int, key: str | None = None) -> Message:
    headers = {"app": "web", "instance": "1", "publication": f"p-{number}", "version": "1"}
    headers |= {} if key is None else {"key": key}
    return Message("ecst_event", "counted", f"id-{number}", {"n": number}, headers, "orders", "Counted")


def packed(*numbers: int, key: str | None = None, partitions: int = 1) -> list[Packed]:
    return [pack(message(number, key), partitions) for number in numbers]


def numbers(rows: Sequence[Row]) -> list[int]:
    return [row.message.payload["n"] for row in rows]


def sequences(rows: Sequence[Row]) -> list[int]:
    found = [row.sequence for row in rows if row.sequence is not None]
    assert len(found) == len(rows)
    return found


def ids(rows: Sequence[Row]) -> list[int]:
    return [row.id for row in rows]


async def leader(store: OutboxStore, owner: str = "a", partition: int = 0, lease: float = LONG) -> Lead:
    """The lead of a partition, as soon as it is free."""
    async with asyncio.timeout(10):
        while (lead := await store.lead(partition, owner, lease=lease)) is None:
            await asyncio.sleep(0.005)
    return lead


async def taken(store: OutboxStore, lead: Lead, limit: int = 100) -> Sequence[Row]:
    """What is taken, as soon as it is something."""
    async with asyncio.timeout(10):
        while not (rows := await store.take(lead, limit)):
            await asyncio.sleep(0.005)
    return rows


async def send(store: OutboxStore, lead: Lead, limit: int = 100) -> Sequence[Row]:
    """Take, and settle as sent."""
    rows = await taken(store, lead, limit)
    await store.settle(lead, ids(rows), {})
    return rows


async def bury(store: OutboxStore, lead: Lead, limit: int = 100) -> Sequence[Row]:
    rows = await taken(store, lead, limit)
    await store.settle(lead, (), dict.fromkeys(ids(rows), "too odd"))
    return rows


async def in_state(store: OutboxStore, state: State) -> list[int]:
    return numbers(await store.rows(state))


class Conformance:
    """The behaviours; the numbers are the messages', in the order in which they are stored."""

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    async def move_times(self, store: Any, ahead: timedelta) -> None:
        """Change the stored times of the rows to those of a clock that was ahead."""
        raise NotImplementedError

    async def damage(self, store: Any, row: int, raw: bytes) -> None:
        """Overwrite a row's message."""
        raise NotImplementedError

    @pytest.fixture
    async def store(self, make: Make) -> AsyncIterator[OutboxStore]:
        store = make()
        await store.open()
        yield store
        await store.aclose()

    @pytest.fixture
    async def other(self, make: Make, store: OutboxStore) -> AsyncIterator[OutboxStore]:
        """The same store, as another process has it."""
        other = make()
        await other.open()
        yield other
        await other.aclose()

    # -- storing ------------------------------------------------------------------------------------------------

    async def test_is_a_store(self, store: OutboxStore) -> None:
        members = {name for name in vars(OutboxStore) if not name.startswith("_")}
        assert {name for name in members if not hasattr(store, name)} == set()

    async def test_what_was_added_waits_in_its_order(self, store: OutboxStore) -> None:
        before = datetime.now(UTC) - timedelta(seconds=1)
        await store.add(packed(1, 2), PLENTY)
        await store.add(packed(3), PLENTY)
        rows = await store.rows("pending")
        assert numbers(rows) == [1, 2, 3]
        for row in rows:
            assert before < row.stored_at == row.state_at < before + timedelta(minutes=1)
            assert row.stored_at.utcoffset() == timedelta(0)
            assert (row.attempts, row.error, row.sequence, row.owner, row.epoch, row.next_attempt_at) == (
                0,
                *5 * [None],
            )

    async def test_message_comes_back_whole(self, store: OutboxStore) -> None:
        """Also its address, and its class name, which Diator's format needs."""
        await store.add([pack(message(1, "a key"), 1)], PLENTY)
        (row,) = await store.rows("pending")
        assert row.message == message(1, "a key")

    async def test_nothing_is_stored_of_nothing(self, store: OutboxStore) -> None:
        await store.add([], PLENTY)
        assert await in_state(store, "pending") == []

    async def test_call_past_the_quota_of_rows_stores_nothing(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2), Quota(rows=3))
        with pytest.raises(OutboxFull, match=r"2 messages .* 3 messages or") as error:
            await store.add(packed(3, 4), Quota(rows=3))
        assert (error.value.rows, error.value.size) == (2, sum(len(each.raw) for each in packed(1, 2)))
        assert await in_state(store, "pending") == [1, 2]
        await store.add(packed(5), Quota(rows=3))
        assert await in_state(store, "pending") == [1, 2, 5]

    async def test_call_past_the_quota_of_bytes_stores_nothing(self, store: OutboxStore) -> None:
        quota = Quota(size=sum(len(each.raw) for each in packed(1, 2, 3)))
        await store.add(packed(1, 2), quota)
        with pytest.raises(OutboxFull):
            await store.add(packed(3, 4), quota)
        await store.add(packed(5), quota)
        assert await in_state(store, "pending") == [1, 2, 5]

    async def test_quota_counts_what_is_not_sent(self, store: OutboxStore) -> None:
        """What a relay has in hand and what is dead counts; what is sent is free again."""
        quota = Quota(rows=2)
        await store.add(packed(1, 2), quota)
        lead = await leader(store)
        rows = await store.take(lead, 2)
        with pytest.raises(OutboxFull):
            await store.add(packed(3), quota)
        await store.settle(lead, [rows[0].id], {rows[1].id: "too odd"})
        await store.add(packed(4), quota)
        with pytest.raises(OutboxFull):
            await store.add(packed(5), quota)
        assert await store.purge("dead", before=FAR) == 1
        await store.add(packed(6), quota)
        assert await in_state(store, "pending") == [4, 6]

    async def test_what_was_sent_makes_room_for_new(self, store: OutboxStore) -> None:
        """The oldest first: what is kept for a replay never takes the store past its quota, and never stops a publish."""
        quota = Quota(rows=4)
        await store.add(packed(1, 2, 3, 4), quota)
        await send(store, await leader(store), 1)
        await send(store, await leader(store))
        await store.add(packed(5), quota)
        assert 1 not in await in_state(store, "sent")
        assert len(await in_state(store, "sent")) <= 3
        await store.add(packed(6, 7, 8), quota)
        assert (await in_state(store, "sent"), await in_state(store, "pending")) == ([], [5, 6, 7, 8])

    async def test_concurrent_calls_are_all_stored_each_key_in_order(
        self, store: OutboxStore, other: OutboxStore
    ) -> None:
        async def add(store: OutboxStore, key: str) -> None:
            for number in range(20):
                await store.add(packed(number, key=key), PLENTY)

        await asyncio.gather(*(add(handle, key) for handle, key in zip(4 * [store, other], "abcdefgh", strict=True)))
        rows = await store.rows("pending", limit=1000)
        for key in "abcdefgh":
            assert numbers([row for row in rows if row.message.key == key]) == list(range(20))

    async def test_calls_of_one_handle_that_are_not_awaited_in_turn_keep_their_order(self, store: OutboxStore) -> None:
        await asyncio.gather(*(store.add(packed(number, key="a"), PLENTY) for number in range(50)))
        assert await in_state(store, "pending") == list(range(50))

    async def test_quota_holds_for_concurrent_calls(self, store: OutboxStore, other: OutboxStore) -> None:
        handles = 10 * [store, other]
        adding = (handle.add(packed(number, number), Quota(rows=15)) for number, handle in enumerate(handles))
        answers = await asyncio.gather(*adding, return_exceptions=True)
        assert sum(isinstance(answer, OutboxFull) for answer in answers) == 13
        assert [answer for answer in answers if answer is not None and not isinstance(answer, OutboxFull)] == []
        assert len(await store.rows("pending")) == 14

    # -- who leads ----------------------------------------------------------------------------------------------

    async def test_only_one_leads(self, store: OutboxStore, other: OutboxStore) -> None:
        lead = await store.lead(0, "a", lease=LONG)
        assert lead is not None
        assert (lead.partition, lead.owner) == (0, "a")
        assert timedelta(seconds=50) < lead.until - datetime.now(UTC) < timedelta(seconds=70)
        assert await other.lead(0, "b", lease=LONG) is None
        assert await other.lead(0, "b", lease=LONG, above=1000) is None

    async def test_renewal_keeps_the_epoch(self, store: OutboxStore) -> None:
        first = await leader(store, lease=LONG)
        again = await leader(store, lease=2 * LONG)
        assert (again.epoch, again.owner) == (first.epoch, "a")
        assert again.until > first.until

    async def test_late_renewal_keeps_the_epoch_where_nobody_has_taken_over(self, store: OutboxStore) -> None:
        first = await leader(store, lease=0.001)
        await asyncio.sleep(0.002)
        assert (await leader(store)).epoch == first.epoch

    async def test_lease_of_a_clock_that_was_ahead_is_waited_for_at_most_one_lease(
        self, store: OutboxStore, other: OutboxStore
    ) -> None:
        """To the store such a lease looks like one of an hour. The next leader's epoch fences the old one."""
        ahead = await leader(store, "ahead", lease=3600)
        assert await other.lead(0, "b", lease=LONG) is None
        assert (await store.status()).leads[0].until <= datetime.now(UTC) + timedelta(seconds=LONG + 10)
        assert await other.lead(0, "b", lease=SHORT) is None  # it may be alive: not at once
        assert (await leader(other, "b", lease=SHORT)).epoch > ahead.epoch
        with pytest.raises(LeadLost):
            await store.take(ahead, 1)

    async def test_lease_that_ends_in_time_is_not_cut(self, store: OutboxStore, other: OutboxStore) -> None:
        lead = await leader(store, lease=LONG)
        assert await other.lead(0, "b", lease=2 * LONG) is None
        assert (await store.status()).leads[0].until == lead.until

    async def test_next_leader_has_a_greater_epoch(self, store: OutboxStore, other: OutboxStore) -> None:
        first = await leader(store, "a", lease=SHORT)
        second = await leader(other, "b", lease=SHORT)
        third = await leader(store, "a")
        assert 0 < first.epoch < second.epoch < third.epoch

    async def test_resigned_lead_is_free_at_once(self, store: OutboxStore, other: OutboxStore) -> None:
        first = await leader(store)
        await store.resign(first)
        second = await other.lead(0, "b", lease=LONG)
        assert second is not None
        assert second.epoch > first.epoch

    async def test_old_leader_can_not_resign_for_the_new_one(self, store: OutboxStore, other: OutboxStore) -> None:
        old = await leader(store, "a", lease=SHORT)
        await leader(other, "b")
        await store.resign(old)
        assert await store.lead(0, "c", lease=LONG) is None

    async def test_epoch_can_be_asked_for_above_another(self, store: OutboxStore) -> None:
        """As the broker knows it, where the store was restored from an older copy."""
        first = await store.lead(0, "a", lease=LONG, above=41)
        assert first is not None
        assert first.epoch > 41
        raised = await store.lead(0, "a", lease=LONG, above=first.epoch)
        assert raised is not None
        assert raised.epoch > first.epoch
        kept = await store.lead(0, "a", lease=LONG, above=5)
        assert kept is not None
        assert kept.epoch == raised.epoch

    async def test_each_partition_has_its_leader(self, make: Make) -> None:
        store = make()
        await store.open(2)
        try:
            assert (await leader(store, "a", 0)).partition == 0
            assert (await leader(store, "b", 1)).partition == 1
            assert await store.lead(1, "a", lease=LONG) is None
        finally:
            await store.aclose()

    @pytest.mark.parametrize("step", ["take", "settle", "settle dead", "postpone", "renumber"])
    async def test_old_leader_changes_nothing(self, store: OutboxStore, other: OutboxStore, step: str) -> None:
        await store.add(packed(1, 2), PLENTY)
        old = await leader(store, "a", lease=SHORT)
        rows = await store.take(old, 1)
        await leader(other, "b")
        before = [await store.rows("pending"), await store.rows("sending")]
        calls = {
            "take": lambda: store.take(old, 5),
            "settle": lambda: store.settle(old, ids(rows), {}),
            "settle dead": lambda: store.settle(old, (), {rows[0].id: "too odd"}),
            "postpone": lambda: store.postpone(old, ids(rows), error="away", delay=1.0),
            "renumber": lambda: store.renumber(old, above=5),
        }
        with pytest.raises(LeadLost) as error:
            await calls[step]()
        assert (error.value.partition, error.value.epoch) == (0, old.epoch)
        assert [await store.rows("pending"), await store.rows("sending")] == before

    async def test_resigned_leader_takes_nothing(self, store: OutboxStore) -> None:
        await store.add(packed(1), PLENTY)
        lead = await leader(store)
        await store.resign(lead)
        with pytest.raises(LeadLost):
            await store.take(lead, 5)

    # -- taking -------------------------------------------------------------------------------------------------

    async def test_taken_rows_are_in_order_with_their_sequences(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        lead = await leader(store)
        rows = await store.take(lead, 2)
        assert numbers(rows) == [1, 2]
        first, second = sequences(rows)
        assert 0 < first < second
        for row in rows:
            assert (row.state, row.attempts, row.owner, row.epoch) == ("sending", 1, "a", lead.epoch)
            assert row.state_at >= row.stored_at
        assert await store.rows("sending") == list(rows)
        assert await in_state(store, "pending") == [3]

    async def test_new_sequences_are_not_below_the_clock(self, store: OutboxStore) -> None:
        """In microseconds: so a store that was restored from an older copy never gives one for a second time, which the
        broker would take for sent. And below 2**53, up to where Redis's scripts count exactly.
        """
        await store.add(packed(1, 2), PLENTY)
        rows = await store.take(await leader(store), 2)
        for row, sequence in zip(rows, sequences(rows), strict=True):
            assert row.stored_at.timestamp() * 1e6 - 10 <= sequence < 2**53

    async def test_what_was_taken_comes_first_again_with_its_sequence(self, store: OutboxStore) -> None:
        """After a crash, say: one more attempt at the same place."""
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        first = await store.take(lead, 2)
        await store.add(packed(3), PLENTY)
        again = await store.take(lead, 10)
        assert numbers(again) == [1, 2, 3]
        assert sequences(again)[:2] == sequences(first)
        assert sequences(again) == sorted(sequences(again))
        assert [row.attempts for row in again] == [2, 2, 1]

    async def test_sequences_are_kept_by_the_next_leader(self, store: OutboxStore, other: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        first = await store.take(await leader(store, "a", lease=SHORT), 2)
        lead = await leader(other, "b")
        again = await other.take(lead, 10)
        assert numbers(again) == [1, 2, 3]
        assert sequences(again)[:2] == sequences(first)
        assert [(row.attempts, row.owner, row.epoch) for row in again] == [
            (2, "b", lead.epoch),
            (2, "b", lead.epoch),
            (1, "b", lead.epoch),
        ]

    async def test_postponed_rows_say_why_and_until_when(self, store: OutboxStore) -> None:
        await store.add(packed(1), PLENTY)
        lead = await leader(store)
        rows = await store.take(lead, 1)
        await store.postpone(lead, ids(rows), error="away", delay=LONG)
        (row,) = await store.rows("pending")
        assert (row.error, row.attempts, row.sequence) == ("away", 1, rows[0].sequence)
        assert row.next_attempt_at is not None
        assert timedelta(seconds=50) < row.next_attempt_at - datetime.now(UTC) < timedelta(seconds=70)
        assert row.state_at >= rows[0].state_at

    async def test_waiting_row_holds_back_its_partition(self, make: Make) -> None:
        """That is what order is; the other partition goes on."""
        store = make()
        await store.open(2)
        try:
            ours, theirs = packed(1, 2, partitions=2), packed(3, key="b", partitions=2)
            assert [each.partition for each in ours + theirs] == [0, 0, 1]
            await store.add(ours + theirs, PLENTY)
            lead, another = await leader(store, partition=0), await leader(store, partition=1)
            rows = await store.take(lead, 1)
            await store.postpone(lead, ids(rows), error="away", delay=LONG)
            assert await store.take(lead, 10) in ([], ())
            assert numbers(await store.take(another, 10)) == [3]
        finally:
            await store.aclose()

    async def test_postponed_row_comes_after_its_delay_with_its_sequence(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        first = await store.take(lead, 1)
        await store.postpone(lead, ids(first), error="away", delay=SHORT)
        again = await taken(store, lead)
        assert numbers(again) == [1, 2]
        assert again[0].sequence == first[0].sequence
        assert [(row.attempts, row.next_attempt_at) for row in again] == [(2, None), (1, None)]
        assert again[0].state_at >= first[0].state_at + timedelta(seconds=SHORT)

    async def test_row_postponed_by_a_clock_that_was_ahead_comes_again_with_its_sequence(
        self, store: OutboxStore
    ) -> None:
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        first = await store.take(lead, 1)
        await store.postpone(lead, ids(first), error="away", delay=LONG)
        assert not await store.take(lead, 10)
        await self.move_times(store, timedelta(hours=1))
        again = await store.take(lead, 10)
        assert numbers(again) == [1, 2]
        assert again[0].sequence == first[0].sequence

    async def test_sequences_never_come_again(self, make: Make) -> None:
        """Not when all rows are gone, not after the store was closed and opened."""
        given: list[int] = []
        for owner in "abc":
            store = make()
            await store.open()
            try:
                await store.add(packed(1, 2), PLENTY)
                lead = await leader(store, owner)
                given += sequences(await send(store, lead))
                await store.forget(keep_sent=0)
                await store.resign(lead)
            finally:
                await store.aclose()
        assert len(given) == 6
        assert given == sorted(set(given))

    @pytest.mark.parametrize("damage", [b"{", b"[]", b'{"message_name": "\xff"}', b"{}"], ids=str)
    async def test_damaged_row_is_named_and_put_aside_and_the_others_are_sent(
        self, store: OutboxStore, damage: bytes
    ) -> None:
        await store.add(packed(1, 2, 3, key="a"), PLENTY)
        damaged = ids(await store.rows("pending"))[1]
        await self.damage(store, damaged, damage)
        told: list[tuple[Exception, object]] = []
        broker = MemoryBroker()
        relay = Relay(store, broker, on_error=lambda error, message: told.append((error, message)))
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(relay.run())
            while not await store.rows("dead"):
                await asyncio.sleep(0.005)
            relay.stop()
        assert await in_state(store, "sent") == [1, 3]
        (row,) = await store.rows("dead")
        assert (row.id, relay.stats.sent, relay.stats.dead, relay.stats.postponed) == (damaged, 2, 1, 0)
        ((error, _),) = told
        assert isinstance(error, MessageInvalid)
        assert row.error == str(error)
        assert f"row {damaged} " in str(error)
        assert await store.purge("dead", before=FAR) == 1

    DAMAGED_COLUMNS: Sequence[tuple[str, str]] = ()
    """Columns and values of another type, in SQL, as far as the database lets a program write them."""
    DAMAGED_TEXTS: Sequence[tuple[str, str]] = ()
    """The same of texts with a byte that is no UTF-8."""

    async def damage_column(self, store: Any, row: int, column: str, value: str) -> None:
        """Overwrite a column of a row, with a value in SQL."""
        raise NotImplementedError

    @pytest.mark.long
    async def test_row_with_a_column_of_another_type_is_put_aside_and_the_others_are_sent(
        self, store: OutboxStore, make: Make
    ) -> None:
        """The row is named by its id and its column; its message can be read, and is sent after a retry."""
        for column, value in self.DAMAGED_COLUMNS:
            await store.add(packed(1, 2, 3, key="a"), PLENTY)
            damaged = ids(await store.rows("pending"))[1]
            await self.damage_column(store, damaged, column, value)
            assert (await store.status()).oldest_at is not None, column  # of the others
            await store.rows("pending")
            told: list[tuple[Exception, Any]] = []
            relay = Relay(
                store, MemoryBroker(), on_error=lambda error, message, told=told: told.append((error, message))
            )
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                tasks.create_task(relay.run())
                while len(await in_state(store, "sent")) < 2 or not await store.rows("dead"):
                    await asyncio.sleep(0.005)
                relay.stop()
            case = f"{column} = {value}"
            assert await in_state(store, "sent") == [1, 3], case
            (row,) = await store.rows("dead")
            assert (row.id, row.message.payload["n"]) == (damaged, 2), case
            ((error, message),) = told
            assert f"row {damaged} can't be read: its column {column} has the value" in str(error), case
            assert message.payload["n"] == 2, case
            status = await store.status()
            assert (status.counts["pending"], status.counts["dead"]) == (0, 1), case
            if column != "partition":
                assert await store.retry() == [row.id]
                relay = Relay(
                    store, MemoryBroker(), on_error=lambda error, message, told=told: told.append((error, message))
                )
                async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                    tasks.create_task(relay.run())
                    while len(await in_state(store, "sent")) < 3:
                        await asyncio.sleep(0.005)
                    relay.stop()
                assert len(told) == 1, case
            await store.purge("sent", before=FAR)
            await store.purge("dead", before=FAR)

    async def test_column_of_another_type_in_a_row_that_is_not_to_be_sent_hides_no_other_row(
        self, store: OutboxStore
    ) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        lead = await leader(store)
        await bury(store, lead, 1)
        await send(store, lead, 1)
        for state in ("dead", "sent"):
            for column, value in (*self.DAMAGED_COLUMNS, *self.DAMAGED_TEXTS):
                if column == "state":
                    continue
                (row,) = await store.rows(state)
                await self.damage_column(store, row.id, column, value)
                assert ids(await store.rows(state)) == [row.id], column
                assert (await store.status()).counts[state] == 1, column

    @pytest.mark.parametrize("text", ["a\0b", "a\ud800b"], ids=ascii)
    async def test_error_whose_text_no_database_takes_holds_up_nothing(
        self, store: OutboxStore, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def refuse(_: object, lead: Lead, rows: Sequence[Row]) -> Sequenced:
            return Sequenced(refused={row.sequence or 0: MessageRefused("counted", text) for row in rows})

        await store.add(packed(1), PLENTY)
        monkeypatch.setattr(Relay, "_publish", refuse)
        relay = Relay(store, MemoryBroker(), on_error=lambda error, message: None)
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(relay.run())
            while not await store.rows("dead"):
                await asyncio.sleep(0.005)
            relay.stop()
        (row,) = await store.rows("dead")
        assert row.error is not None
        assert row.error.startswith("'counted': a\\")

    # -- settling -----------------------------------------------------------------------------------------------

    async def test_settled_rows_are_sent_or_dead(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        lead = await leader(store)
        rows = await store.take(lead, 3)
        await store.settle(lead, [rows[0].id, rows[2].id], {rows[1].id: "too odd"})
        sent, (dead,) = await store.rows("sent"), await store.rows("dead")
        assert numbers(sent) == [1, 3]
        assert [row.error for row in sent] == [None, None]
        assert sent[0].state_at >= rows[0].state_at
        assert (dead.message.payload["n"], dead.error, dead.attempts) == (2, "too odd", 1)
        assert await store.take(lead, 10) in ([], ())

    async def test_dead_row_frees_its_partition(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        await bury(store, lead, 1)
        assert numbers(await store.take(lead, 10)) == [2]

    async def test_settling_again_counts_nothing_twice(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        lead = await leader(store)
        rows = await send(store, lead, 1)
        size = (await store.status()).size
        await store.settle(lead, ids(rows), {})
        await store.settle(lead, (), dict.fromkeys(ids(rows), "too odd"))
        status = await store.status()
        assert (status.size, status.counts["sent"], status.counts["dead"]) == (size, 1, 0)
        dead = await bury(store, lead, 1)
        await store.settle(lead, ids(dead), {})
        assert (await in_state(store, "sent"), await in_state(store, "dead")) == ([1], [2])

    @pytest.mark.parametrize("step", ["settle", "settle dead", "postpone"])
    async def test_lead_settles_what_was_taken_under_it_alone(
        self, store: OutboxStore, other: OutboxStore, step: str
    ) -> None:
        """Not what it took under an earlier one: the leader in between has sent it, or will."""
        await store.add(packed(1, 2), PLENTY)
        rows = await store.take(await leader(store, "a", lease=SHORT), 1)
        await other.take(await leader(other, "b", lease=SHORT), 1)
        lead = await leader(store, "a")
        if step == "settle":
            await store.settle(lead, ids(rows), {})
        elif step == "settle dead":
            await store.settle(lead, (), {rows[0].id: "too odd"})
        else:
            await store.postpone(lead, ids(rows), error="away", delay=LONG)
        assert (await in_state(store, "sending"), await in_state(store, "pending")) == ([1], [2])
        again = await store.take(lead, 2)
        assert (numbers(again), again[0].sequence) == ([1, 2], rows[0].sequence)

    async def test_answers_can_be_settled_with_the_next_taking(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3, 4), PLENTY)
        lead = await leader(store)
        first = await store.take(lead, 2)
        second = await store.take(lead, 1, sent=[first[0].id], dead={first[1].id: "too odd"})
        assert numbers(second) == [3]
        assert (await in_state(store, "sent"), await in_state(store, "dead")) == ([1], [2])
        assert numbers(await store.take(lead, 1, sent=ids(second))) == [4]
        assert await in_state(store, "sent") == [1, 3]

    async def test_old_leader_settles_nothing_with_its_next_taking(
        self, store: OutboxStore, other: OutboxStore
    ) -> None:
        await store.add(packed(1, 2), PLENTY)
        old = await leader(store, lease=SHORT)
        rows = await store.take(old, 1)
        await leader(other, "b")
        with pytest.raises(LeadLost):
            await store.take(old, 1, sent=ids(rows))
        assert (await in_state(store, "sent"), await in_state(store, "sending")) == ([], [1])

    # -- to mend ------------------------------------------------------------------------------------------------

    async def test_dead_rows_can_be_retried(self, store: OutboxStore) -> None:
        """All of them, or those that are named; with new sequences, in their old order."""
        await store.add(packed(1, 2, 3, 4), PLENTY)
        lead = await leader(store)
        rows = await bury(store, lead, 3)
        assert await store.retry([rows[2].id, rows[0].id, rows[2].id, 999_999]) == [rows[0].id, rows[2].id]
        assert (await in_state(store, "dead"), await in_state(store, "pending")) == ([2], [1, 3, 4])
        assert [(row.sequence, row.attempts) for row in await store.rows("pending")] == 3 * [(None, 0)]
        again = await store.take(lead, 2)
        assert numbers(again) == [1, 3]
        assert min(sequences(again)) > max(sequences(rows))
        assert [row.attempts for row in again] == [1, 1]
        assert await store.retry() == [rows[1].id]
        assert await store.retry() == []
        assert await in_state(store, "dead") == []

    async def test_retry_goes_in_steps_by_id(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3, 4), PLENTY)
        first, second, third, fourth = ids(await bury(store, await leader(store)))
        assert await store.retry(limit=1) == [first]
        assert await store.retry(after=second, limit=1) == [third]
        assert await store.retry([second, fourth], after=second) == [fourth]
        assert await in_state(store, "dead") == [2]

    async def test_row_is_found_by_the_id_of_its_message(self, store: OutboxStore) -> None:
        """In whatever state it is, each sending of it, and not a row that only mentions the id."""
        wanted = "01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3"
        told = Message("notification_event", "told", wanted, {"n": 1})
        mention = Message("notification_event", "told", "01976c3e-5f0a-7c4e-8f14-46d3a8aa17b4", {"cause": wanted})
        await store.add([pack(mention, 1), pack(told, 1), pack(told, 1)], PLENTY)
        found = await store.find(wanted)
        assert [row.message.message_id for row in found] == [wanted, wanted]
        assert [row.id for row in found] == sorted(row.id for row in await store.rows("pending"))[1:]
        assert await store.find("01976c3e-5f0a-7c4e-8f14-46d3a8aa17b5") == []

    async def test_clock_is_the_one_that_its_rows_show(self, store: OutboxStore) -> None:
        before = await store.read_clock()
        await store.add(packed(1), PLENTY)
        (row,) = await store.rows("pending")
        assert before <= row.stored_at <= await store.read_clock()
        assert before.utcoffset() == timedelta(0)

    async def test_only_dead_rows_are_retried(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        lead = await leader(store)
        rows = [*await send(store, lead, 1), *await store.take(lead, 1), *await store.rows("pending")]
        assert await store.retry(ids(rows)) == []
        assert await in_state(store, "sent") == [1]

    async def test_replay_sends_again_what_was_sent_in_a_time(self, store: OutboxStore) -> None:
        """From ``since`` on and before ``before``, each as exact as the rows show it."""
        await store.add(packed(1, 2, 3, 4), PLENTY)
        lead = await leader(store)
        for _ in range(4):
            await send(store, lead, 1)
        times = [row.state_at for row in await store.rows("sent")]
        assert await store.replay(since=times[1], before=times[3]) == 2
        assert (await in_state(store, "pending"), await in_state(store, "sent")) == ([2, 3], [1, 4])

    async def test_replay_comes_before_what_was_not_taken_yet(self, store: OutboxStore) -> None:
        """With new sequences, above all that were given, and as if it had never been tried."""
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        first = await send(store, lead)
        await store.add(packed(3, 4), PLENTY)
        in_hand = await store.take(lead, 1)
        assert await store.replay(since=PAST, before=FAR) == 2
        again = await store.take(lead, 10)
        assert numbers(again) == [3, 1, 2, 4]
        assert again[0].sequence == in_hand[0].sequence
        assert sequences(again) == sorted(sequences(again))
        assert min(sequences(again)) > max(sequences(first))
        assert [row.attempts for row in again] == [2, 1, 1, 1]

    async def test_replay_goes_in_steps_from_the_oldest_on(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3), PLENTY)
        await send(store, await leader(store))
        assert await store.replay(since=PAST, before=FAR, limit=2) == 2
        assert await in_state(store, "pending") == [1, 2]
        assert await store.replay(since=PAST, before=FAR, limit=2) == 1
        assert await store.replay(since=PAST, before=FAR, limit=2) == 0

    async def test_replayed_rows_count_for_the_quota_until_they_are_sent(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store)
        await send(store, lead)
        await store.replay(since=PAST, before=FAR)
        assert (await store.status()).size == sum(len(each.raw) for each in packed(1, 2))
        with pytest.raises(OutboxFull):
            await store.add(packed(3), Quota(rows=2))
        await send(store, lead)
        assert (await store.status()).size == 0
        await store.add(packed(3), Quota(rows=2))

    async def test_purge_deletes_what_is_sent_or_dead(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3, 4, 5), PLENTY)
        lead = await leader(store)
        await send(store, lead, 2)
        await bury(store, lead, 2)
        assert await store.purge("sent", before=PAST) == await store.purge("dead", before=PAST) == 0
        assert await store.purge("sent", before=FAR, limit=1) == 1
        assert await in_state(store, "sent") == [2]
        assert await store.purge("dead", before=FAR) == 2
        assert await store.purge("sent", before=FAR) == 1
        assert (await store.status()).counts == {"pending": 1, "sending": 0, "sent": 0, "dead": 0}

    async def test_old_sent_rows_are_forgotten_in_steps(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3, 4, 5), PLENTY)
        lead = await leader(store)
        await send(store, lead, 3)
        await bury(store, lead, 1)
        assert await store.forget(keep_sent=LONG) == 0
        assert await store.forget(keep_sent=0, limit=2) == 2
        assert await in_state(store, "sent") == [3]
        assert await store.forget(keep_sent=0, limit=2) == 1
        assert await store.forget(keep_sent=0, limit=2) == 0
        assert (await store.status()).counts == {"pending": 1, "sending": 0, "sent": 0, "dead": 1}

    async def test_longest_durations_work(self, store: OutboxStore) -> None:
        """Fifty years, the most that a relay takes."""
        await store.add(packed(1, 2), PLENTY)
        lead = await leader(store, lease=LONGEST)
        await send(store, lead, 1)
        assert await store.forget(keep_sent=LONGEST) == 0
        (row,) = await store.take(lead, 1)
        await store.postpone(lead, [row.id], error="away", delay=LONGEST)
        (row,) = await store.rows("pending")
        assert row.next_attempt_at is not None
        assert abs(row.next_attempt_at - row.state_at - timedelta(seconds=LONGEST)) < timedelta(seconds=1)
        assert (await store.status()).next_attempt_at == row.next_attempt_at

    async def test_replayed_row_is_not_forgotten(self, store: OutboxStore) -> None:
        """Neither while it waits, nor by the time of its first sending."""
        await store.add(packed(1), PLENTY)
        lead = await leader(store)
        await send(store, lead)
        await store.replay(since=PAST, before=FAR)
        assert await store.forget(keep_sent=0) == 0
        assert numbers(await send(store, lead)) == [1]
        assert await store.forget(keep_sent=LONG) == 0
        assert await store.forget(keep_sent=0) == 1

    async def test_renumbered_rows_are_taken_anew_above(self, store: OutboxStore) -> None:
        """Those that were taken once only; what was tried before keeps its place."""
        await store.add(packed(1, 2, 3, 4), PLENTY)
        lead = await leader(store)
        await store.take(lead, 1)
        rows = await store.take(lead, 3)
        above = max(sequences(rows)) + 1_000_000_000
        await store.renumber(lead, above=above)
        again = await store.take(lead, 10)
        assert numbers(again) == [1, 2, 3, 4]
        assert [row.attempts for row in again] == [3, 1, 1, 1]
        assert again[0].sequence == rows[0].sequence
        assert min(sequences(again)[1:]) > above

    # -- to look at ---------------------------------------------------------------------------------------------

    async def test_status_says_what_there_is(self, store: OutboxStore) -> None:
        empty = await store.status()
        assert empty.counts == {"pending": 0, "sending": 0, "sent": 0, "dead": 0}
        assert (empty.size, empty.oldest_at, empty.next_attempt_at, dict(empty.leads)) == (0, None, None, {})
        await store.add(packed(1, 2, 3, 4, 5, 6, 7), PLENTY)
        lead = await leader(store)
        await send(store, lead, 1)
        await bury(store, lead, 2)
        in_hand = await store.take(lead, 3)
        status = await store.status()
        assert status.counts == {"pending": 1, "sending": 3, "sent": 1, "dead": 2}
        assert status.size == sum(len(each.raw) for each in packed(2, 3, 4, 5, 6, 7))
        assert status.oldest_at == in_hand[0].stored_at
        assert status.next_attempt_at is None
        assert {number: (its.owner, its.epoch) for number, its in status.leads.items()} == {0: ("a", lead.epoch)}
        await store.postpone(lead, ids(in_hand), error="away", delay=LONG)
        waiting = await store.status()
        assert waiting.counts == {"pending": 4, "sending": 0, "sent": 1, "dead": 2}
        assert waiting.next_attempt_at == (await store.rows("pending"))[0].next_attempt_at
        await store.resign(lead)
        assert dict((await store.status()).leads) == {}

    async def test_status_says_how_far_back_a_replay_reaches(self, store: OutboxStore) -> None:
        """To the oldest that is kept: what was sent before it is gone."""
        await store.add(packed(1, 2, 3), PLENTY)
        assert (await store.status()).oldest_sent_at is None
        lead = await leader(store)
        for _ in range(2):
            await send(store, lead, 1)
            await asyncio.sleep(0.002)
        first, second = await store.rows("sent")
        assert (await store.status()).oldest_sent_at == first.state_at < second.state_at
        assert await store.purge("sent", before=second.state_at) == 1
        assert (await store.status()).oldest_sent_at == second.state_at
        assert await store.replay(since=second.state_at, before=FAR) == 1
        assert (await store.status()).oldest_sent_at is None

    async def test_lease_that_has_ended_is_no_lead(self, store: OutboxStore) -> None:
        await leader(store, lease=0.001)
        await asyncio.sleep(0.002)
        assert dict((await store.status()).leads) == {}

    async def test_rows_are_read_page_by_page(self, store: OutboxStore) -> None:
        await store.add(packed(1, 2, 3, 4, 5), PLENTY)
        first = await store.rows("pending", limit=2)
        second = await store.rows("pending", after=first[-1].id, limit=2)
        third = await store.rows("pending", after=second[-1].id, limit=2)
        assert [numbers(page) for page in (first, second, third)] == [[1, 2], [3, 4], [5]]
        assert await in_state(store, "sent") == await in_state(store, "dead") == []

    # -- opening and closing ------------------------------------------------------------------------------------

    async def test_opened_again_it_is_the_same_store(self, make: Make) -> None:
        names = set()
        for number in range(3):
            store = make()
            await store.open()
            names.add(store.id)
            await store.add(packed(number), PLENTY)
            await store.aclose()
            await store.aclose()
        assert len(names) == 1
        assert all(names)
        store = make()
        await store.open()
        assert await in_state(store, "pending") == [0, 1, 2]
        await store.aclose()

    async def test_partitions_are_the_stores(self, make: Make) -> None:
        for wanted, has in [(None, 1), (3, 3), (None, 3), (2, 2), (5, 5)]:
            store = make()
            await store.open(wanted)
            assert store.partitions == has
            await leader(store, f"owner {wanted}", has - 1, lease=0.001)
            await asyncio.sleep(0.002)
            await store.aclose()

    async def test_partitions_can_not_change_while_messages_wait(self, make: Make) -> None:
        """They would not be where their keys are looked for."""
        store, other = make(), make()
        await store.open(2)
        await store.add(packed(1, partitions=2), PLENTY)
        with pytest.raises(StoreInvalid, match="2 partitions.*1 message|1 message.*2 partitions"):
            await other.open(3)
        lead = await leader(store)
        await send(store, lead)
        await store.resign(lead)
        await other.open(3)
        assert other.partitions == 3
        await store.aclose()
        await other.aclose()

    async def test_partitions_can_change_one_lease_after_a_clock_that_was_ahead(self, make: Make) -> None:
        """To the store such a lease looks like one of an hour; its relay may be alive, so it is not cut at once."""
        store = make()
        await store.open(2)
        await leader(store, "ahead", partition=1, lease=3600)
        await store.aclose()
        other = make()
        with pytest.raises(StoreInvalid, match="relay"):
            await other.open(3, lease=LONG)
        await other.aclose()
        async with asyncio.timeout(30):
            while True:
                last = make()
                with suppress(StoreInvalid):
                    await last.open(3, lease=SHORT)
                    break
                await last.aclose()
        assert last.partitions == 3
        await last.aclose()

    async def test_lease_that_ends_in_time_is_not_cut_for_other_partitions(self, make: Make) -> None:
        store = make()
        await store.open(2)
        lead = await leader(store, lease=LONG)
        with pytest.raises(StoreInvalid, match="relay"):
            await make().open(3, lease=2 * LONG)
        assert (await store.status()).leads[0].until == lead.until
        await store.aclose()

    async def test_partitions_can_not_change_while_a_relay_leads(self, make: Make) -> None:
        """It would never look at the new ones."""
        store, other = make(), make()
        await store.open(2)
        lead = await leader(store, partition=1)
        with pytest.raises(StoreInvalid, match="relay"):
            await other.open(3)
        await store.resign(lead)
        await other.open(3)
        await store.aclose()
        await other.aclose()

    async def test_keys_stay_in_their_partition(self, make: Make) -> None:
        store = make()
        await store.open(4)
        try:
            rows = [each for key in "abcdefghij" for each in packed(1, 2, key=key, partitions=store.partitions)]
            await store.add(rows, PLENTY)
            found: dict[str, set[int]] = {}
            for partition in range(4):
                for row in await store.take(await leader(store, partition=partition), 100):
                    assert row.partition == partition
                    found.setdefault(row.message.key or "", set()).add(partition)
            assert len(found) == 10
            assert all(len(partitions) == 1 for partitions in found.values())
        finally:
            await store.aclose()
