"""The store in an SQLite file: what it promises beyond what every store does."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from silbo.errors import LoopConflict, OutboxFull, StoreInvalid, StoreUnavailable
from silbo.message import Message
from silbo.outbox.rows import NO_SEQUENCE, Quota, UnreadableMessage, pack
from silbo.stores.sqlite import SQLiteStore, schema
from tests.support.store_conformance import (
    FAR,
    LONG,
    PLENTY,
    Conformance,
    Make,
    bury,
    ids,
    in_state,
    leader,
    numbers,
    packed,
    send,
    sequences,
)


class TestSQLiteStore(Conformance):
    @pytest.fixture
    def make(self, path: Path) -> Make:
        return lambda: SQLiteStore(path)

    DAMAGED_COLUMNS = (
        *(
            (column, "'abc'")
            for column in ("attempts", "sequence", "epoch", "stored_at", "state_at", "next_attempt_at")
        ),
        *((column, "x'ff00'") for column in ("attempts", "sequence", "error", "owner", "stored_at", "next_attempt_at")),
        ("sequence", "1.5"),
        ("sequence", f"{NO_SEQUENCE - 1}"),
        ("sequence", "-1"),
        *((column, value) for column in ("attempts", "epoch") for value in ("-1", "9223372036854775807")),
        ("stored_at", "1.5"),
        ("partition", "'abc'"),
        ("partition", "7"),
        ("partition", "-1"),
        *(("state", value) for value in ("7", "-1", "1.5", "2.5", "'abc'", "x'ff'")),
    )
    DAMAGED_TEXTS = (("error", "CAST(x'ff' AS TEXT)"), ("owner", "CAST(x'ff' AS TEXT)"))

    async def damage(self, store: SQLiteStore, row: int, raw: bytes) -> None:
        change(store.path, f"UPDATE message SET raw = x'{raw.hex()}' WHERE id = {row}")

    async def damage_column(self, store: SQLiteStore, row: int, column: str, value: str) -> None:
        change(store.path, f"UPDATE message SET {column} = {value} WHERE id = {row}")

    @pytest.mark.parametrize("value", ["12345", "1.5", "'[]'", "''"])
    async def test_message_of_another_type_is_unreadable(self, store: SQLiteStore, value: str) -> None:
        """SQLite keeps whatever a program writes into a column; the row can be put aside like a damaged one."""
        await store.add(packed(1, 2), PLENTY)
        first, second = await store.rows("pending")
        change(store.path, f"UPDATE message SET raw = {value} WHERE id = {first.id}")
        damaged, other = await store.rows("pending")
        assert isinstance(damaged.message, UnreadableMessage) and damaged.message.problem
        assert (damaged.id, other.message) == (first.id, second.message)
        taken = await store.take(await leader(store), 10)
        assert [row.message for row in taken] == [damaged.message, second.message]

    @pytest.mark.parametrize("value", ["'abc'", "9223372036854775807", "-1"])
    @pytest.mark.parametrize("column", ["epoch", "until", "sequence"])
    async def test_damaged_column_of_a_partition_stops_nothing(
        self, store: SQLiteStore, column: str, value: str
    ) -> None:
        """A lease that can't be read has ended; a broker knows the newest epoch, and the clock a new sequence."""
        await store.add(packed(1), PLENTY)
        await leader(store, lease=LONG)
        change(store.path, f"UPDATE lead SET {column} = {value}")
        await store.status()
        lead = await leader(store, owner="another" if column == "until" else "a")
        (row,) = await store.take(lead, 10)
        assert row.sequence is not None and row.sequence > 10**15

    async def move_times(self, store: SQLiteStore, ahead: timedelta) -> None:
        more = int(ahead.total_seconds() * 1e6)
        change(
            store.path, f"UPDATE message SET state_at = state_at + {more}, next_attempt_at = next_attempt_at + {more}"
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(path)
    await store.open()
    yield store
    await store.aclose()


def look(path: Path, statement: str) -> list[tuple]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def is_sound(path: Path) -> bool:
    return look(path, "PRAGMA integrity_check") == [("ok",)]


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def commits(path: Path) -> int:
    """How many transactions have changed the file: a counter in its head."""
    return int.from_bytes(path.read_bytes()[24:28], "big")


# -- how it is written ---------------------------------------------------------------------------------------


async def test_concurrent_calls_share_few_commits(store: SQLiteStore, path: Path) -> None:
    before = commits(path)
    await asyncio.gather(*(store.add(packed(number), PLENTY) for number in range(500)))
    assert commits(path) - before <= 3
    assert len(await store.rows("pending", limit=1000)) == 500


async def test_one_full_call_does_not_hold_up_those_committed_with_it(store: SQLiteStore) -> None:
    quotas = [PLENTY, Quota(rows=1), PLENTY]
    adding = (store.add(packed(number), quota) for number, quota in enumerate(quotas))
    first, second, third = await asyncio.gather(*adding, return_exceptions=True)
    assert (first, third) == (None, None)
    assert isinstance(second, OutboxFull)
    assert await in_state(store, "pending") == [0, 2]


async def test_commits_are_flushed_to_the_disk_in_a_rollback_journal(store: SQLiteStore, path: Path) -> None:
    """``synchronous=FULL``, and never WAL, which can lose data in many versions of SQLite."""
    await store.add(packed(1), PLENTY)

    def pragma(name: str) -> Callable[[sqlite3.Connection], object]:
        return lambda connection: connection.execute(f"PRAGMA {name}").fetchone()[0]

    names = ["synchronous", "journal_mode", "fullfsync"]
    assert [await store._transact(pragma(name)) for name in names] == [2, "persist", 1]
    assert path.with_name("outbox.db-journal").exists()
    assert look(path, "PRAGMA journal_mode") == [("delete",)]  # as any other program sees it: no WAL


async def test_large_messages_are_taken_in_small_numbers(store: SQLiteStore) -> None:
    """So that a backlog of them does not come into memory at once."""
    large = [pack(Message("ecst_event", "counted", "id", {"n": n, "text": "x" * 1_000_000}), 1) for n in range(7)]
    await store.add(large, PLENTY)
    assert numbers(await store.rows("pending")) == [0, 1, 2, 3, 4]
    lead = await leader(store)
    assert [len(await send(store, lead, 500)) for _ in range(2)] == [5, 2]


async def test_quota_counters_are_what_is_there(store: SQLiteStore, path: Path) -> None:
    """Through every state; they are kept by triggers."""
    await store.add(packed(*range(20)), PLENTY)
    lead = await leader(store)
    await send(store, lead, 8)
    await bury(store, lead, 4)
    await store.take(lead, 3)
    await store.replay(since=(await store.rows("sent"))[0].state_at, before=FAR, limit=2)
    await store.forget(keep_sent=0, limit=1)
    await store.retry([(await store.rows("dead"))[0].id])
    await store.purge("dead", before=FAR, limit=1)
    counted = look(path, "SELECT rows, size, all_rows, all_size FROM outbox")
    assert counted == look(
        path,
        "SELECT sum(state <> 2), sum((state <> 2) * length(raw)), count(*), sum(length(raw)) FROM message",
    )
    status = await store.status()
    assert list(status.counts.items()) == [
        (state, len(await store.rows(state))) for state in ("pending", "sending", "sent", "dead")
    ]


# -- rows that are taken by one write --------------------------------------------------------------------------


def written(path: Path) -> list[tuple]:
    """The rows as they are in the file, and the records of those taken by one write."""
    return look(path, "SELECT state, attempts FROM message ORDER BY id") + look(path, "SELECT first, last FROM taken")


async def test_rows_taken_first_are_written_once_when_they_are_sent(store: SQLiteStore, path: Path) -> None:
    await store.add(packed(*range(4)), PLENTY)
    lead = await leader(store)
    rows = await store.take(lead, 3)
    assert written(path) == [*4 * [(0, 0)], (1, 3)]
    await store.settle(lead, [row.id for row in rows], {})
    assert written(path) == [*3 * [(2, 1)], (0, 0)]
    sent = await store.rows("sent")
    assert [(row.sequence, row.owner, row.epoch) for row in sent] == [
        (row.sequence, row.owner, row.epoch) for row in rows
    ]
    (status,) = look(path, "SELECT rows, size, all_rows, all_size FROM outbox")
    raw = len(packed(0)[0].raw)
    assert status == (1, raw, 4, 4 * raw)
    (last,) = await store.take(lead, 3)
    assert last.sequence is not None and last.sequence > max(sequences(rows))


async def test_rows_that_are_not_all_sent_are_written_each_as_it_is(store: SQLiteStore) -> None:
    await store.add(packed(*range(5)), PLENTY)
    lead = await leader(store)
    rows = await store.take(lead, 5)
    first, second, *_, last = [row.id for row in rows]
    await store.settle(lead, [first, last, 1000], {second: "too odd"})
    assert [await in_state(store, state) for state in ("sent", "dead", "sending")] == [[0, 4], [1], [2, 3]]
    again = await store.take(lead, 5)
    assert [(row.sequence, row.attempts) for row in again] == [(row.sequence, 2) for row in rows[2:4]]


@pytest.mark.parametrize(
    ("partitions", "settled", "sent"),
    [(1, [2, 2, 2, 2, 2], [1]), (1, [2, 3, 4, 5, 9], [1, 2, 3, 4]), (2, [1, 2, 4], [0]), (2, [1, 3], [0, 2])],
)
async def test_only_taken_rows_are_settled_by_one_write(
    path: Path, partitions: int, settled: list[int], sent: list[int]
) -> None:
    """If other rows are named with them, or too few, each is looked at."""
    store = SQLiteStore(path)
    await store.open(partitions)
    rows = [replace(each, partition=number % partitions) for number, each in enumerate(packed(*range(5)))]
    await store.add(rows, PLENTY)
    lead = await leader(store)
    assert ids(await store.take(lead, 5)) == [*range(1, 6, partitions)]
    await store.settle(lead, settled, {})
    assert await in_state(store, "sent") == sent
    await store.aclose()


@pytest.mark.parametrize("how", ["retry", "replay"])
async def test_row_that_waits_again_among_taken_ones_is_not_settled_with_them(store: SQLiteStore, how: str) -> None:
    """It was neither taken nor sent, and its sequence is to be above theirs."""
    await store.add(packed(1, 2, 3), PLENTY)
    lead = await leader(store)
    first, second, third = await store.take(lead, 3)
    if how == "retry":
        await store.settle(lead, (), {second.id: "too odd"})
    else:
        await store.settle(lead, [second.id], {})
    await store.renumber(lead, above=third.sequence or 0)
    taken = await store.take(lead, 3)
    assert numbers(taken) == [1, 3]
    if how == "retry":
        assert await store.retry() == [second.id]
    else:
        assert await store.replay(since=first.stored_at, before=FAR) == 1
    await store.settle(lead, [first.id, third.id], {})
    assert (await in_state(store, "sent"), await in_state(store, "pending")) == ([1, 3], [2])
    (last,) = await store.take(lead, 3)
    assert last.sequence is not None and last.sequence > max(sequences(taken)) and last.attempts == 1


async def test_row_that_was_deleted_by_hand_leaves_the_others_their_sequences(store: SQLiteStore, path: Path) -> None:
    """The broker may have them under these already."""
    await store.add(packed(*range(4)), PLENTY)
    lead = await leader(store)
    rows = await store.take(lead, 4)
    change(path, f"DELETE FROM message WHERE id = {rows[1].id}")
    again = await store.take(lead, 4)
    assert sequences(again) == [row.sequence for row in rows if row.id != rows[1].id]


async def test_relay_of_an_older_silbo_stops_where_the_file_is_migrated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows nothing of rows that are taken by one write. What it has stored stays, and what it stores is sent."""
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        with closing(sqlite3.connect(path, isolation_level=None)) as older:
            older.execute("PRAGMA user_version=0")
            for statement in schema.MIGRATIONS[0]:
                older.execute(statement)
            older.execute(f"PRAGMA application_id={schema.APPLICATION}")
            older.execute("PRAGMA user_version=1")
            older.execute("INSERT INTO outbox (id, partitions) VALUES ('one', 1)")
            older.execute("INSERT INTO partition (partition, owner, epoch, sequence) VALUES (0, 'old', 7, 5)")
    store = SQLiteStore(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as older:
        add = "INSERT INTO message (partition, raw, stored_at, state_at) VALUES (0, ?, 1, 1)"
        older.execute(add, (packed(1)[0].raw,))
        older.execute("UPDATE partition SET until = 0")
        await store.open()
        older.execute(add, (packed(2)[0].raw,))
        with pytest.raises(sqlite3.OperationalError, match="partition"):
            older.execute("UPDATE partition SET until = 0")
    lead = await leader(store)
    assert (store.id, lead.epoch) == ("one", 8)
    assert numbers(await send(store, lead)) == [1, 2]
    assert look(path, "SELECT rows, size, all_rows FROM outbox") == [(0, 0, 2)]
    await store.aclose()


# -- what is no store ----------------------------------------------------------------------------------------


async def opened(path: Path, *, create: bool = True) -> SQLiteStore:
    store = SQLiteStore(path, create=create)
    try:
        await store.open()
    finally:
        await store.aclose()
    return store


async def test_other_database_is_left_alone(path: Path) -> None:
    change(path, "CREATE TABLE users (id)")
    before = path.read_bytes()
    with pytest.raises(StoreInvalid, match="something else.*file of its own"):
        await opened(path)
    assert path.read_bytes() == before


async def test_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"a letter to my aunt\n" * 500)
    with pytest.raises(StoreInvalid, match="no SQLite file"):
        await opened(path)
    assert path.read_bytes() == b"a letter to my aunt\n" * 500


async def test_database_in_wal_mode_is_refused(path: Path) -> None:
    """It is somebody's who has decided so; to change it under their feet is what damages files."""
    change(path, "PRAGMA journal_mode=WAL", "CREATE TABLE users (id)")
    with pytest.raises(StoreInvalid, match="WAL"):
        await opened(path)
    assert look(path, "PRAGMA journal_mode") == [("wal",)]


async def test_newer_schema_is_refused(path: Path) -> None:
    await opened(path)
    change(path, "PRAGMA user_version=99")
    with pytest.raises(StoreInvalid, match=r"version 99.*update silbo"):
        await opened(path)


async def test_older_schema_is_brought_up_to_date_on_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is in it; a migration that fails changes nothing."""
    store = SQLiteStore(path)
    await store.open()
    await store.add(packed(1, 2), PLENTY)
    await store.aclose()
    now = schema.MIGRATIONS
    broken = ("ALTER TABLE message ADD COLUMN later TEXT", "ALTER TABLE nowhere ADD COLUMN later TEXT")
    monkeypatch.setattr(schema, "MIGRATIONS", [*now, broken])
    with pytest.raises(StoreUnavailable, match="nowhere"):
        await opened(path)
    assert look(path, "PRAGMA user_version") == [(len(now),)]
    monkeypatch.setattr(schema, "MIGRATIONS", [*now, broken[:1]])
    store = SQLiteStore(path)
    await store.open()
    assert await in_state(store, "pending") == [1, 2]
    await store.aclose()
    assert look(path, "PRAGMA user_version") == [(len(now) + 1,)]
    assert look(path, "SELECT later FROM message") == [(None,), (None,)]


async def test_store_can_be_asked_for_that_is_there_already(path: Path) -> None:
    """As the tools do, for which a misspelt path must not make a new outbox."""
    with pytest.raises(StoreInvalid, match="no such file"):
        await opened(path, create=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(StoreInvalid, match="empty"):
        await opened(path, create=False)
    first = await opened(path)
    assert (await opened(path, create=False)).id == first.id


async def test_each_file_is_another_store(tmp_path: Path) -> None:
    assert (await opened(tmp_path / "a")).id != (await opened(tmp_path / "b")).id


@pytest.mark.parametrize("path", ["", ":memory:"])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="MemoryStore"):
        SQLiteStore(path)


async def test_path_stays_the_same_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = SQLiteStore("outbox.db")
    monkeypatch.chdir("/")
    await store.open()
    await store.aclose()
    assert (tmp_path / "outbox.db").exists()


async def test_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"outbox\.db.*folder has to be there"):
        await opened(tmp_path / "nowhere" / "outbox.db")


# -- other handles -------------------------------------------------------------------------------------------


async def test_handle_with_other_partitions_than_there_are_by_now_stores_nothing(
    path: Path, store: SQLiteStore
) -> None:
    """Another process has opened the empty store with more of them; a key would be in two of them."""
    other = SQLiteStore(path)
    await other.open(3)
    with pytest.raises(StoreInvalid, match=r"3 partitions now.*open it again"):
        await store.add(packed(1), PLENTY)
    await other.aclose()
    await store.aclose()
    await store.open(3)
    await store.add(packed(1), PLENTY)
    assert await in_state(store, "pending") == [1]


async def test_file_restored_from_an_older_copy_gives_no_sequence_twice(path: Path) -> None:
    """The broker has those that were given after the copy was made, and would take nothing under them."""
    given = []
    for run in range(3):
        store = SQLiteStore(path)
        await store.open()
        if run == 0:
            await store.add(packed(1), PLENTY)
            given += sequences(await send(store, await leader(store, "a", lease=0.001)))
            shutil.copy(path, path.with_name("copy"))
        await store.add(packed(2, 3, 4), PLENTY)
        given += sequences(await send(store, await leader(store, f"run {run}", lease=0.001)))
        await store.aclose()
        shutil.copy(path.with_name("copy"), path)
    assert len(given) == 10
    assert given == sorted(set(given))


@pytest.mark.parametrize("replace", [False, True], ids=["deleted", "replaced"])
async def test_file_that_was_taken_away_is_told_and_opened_anew(path: Path, store: SQLiteStore, replace: bool) -> None:
    """Nothing is written to a file that has no name any more: what it holds would be gone with the process."""
    await store.add(packed(1), PLENTY)
    old = store.id
    shutil.copy(path, path.with_name("copy"))
    await store.add(packed(2), PLENTY)
    path.unlink()
    if replace:
        path.with_name("copy").rename(path)
    with pytest.raises(StoreUnavailable, match="moved, replaced or deleted"):
        await store.add(packed(3), PLENTY)
    await store.add(packed(4), PLENTY)
    assert await in_state(store, "pending") == ([1, 4] if replace else [4])
    assert (store.id == old) is replace


async def test_file_replaced_by_something_else_is_no_store(path: Path, store: SQLiteStore) -> None:
    await store.add(packed(1), PLENTY)
    path.unlink()
    change(path, "CREATE TABLE users (id)")
    for error in (StoreUnavailable, StoreInvalid, StoreInvalid):
        with pytest.raises(error):
            await store.add(packed(2), PLENTY)
    assert look(path, "SELECT name FROM sqlite_master") == [("users",)]


# -- opening, closing, where it may be used ------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


async def test_nothing_is_left_after_closing(path: Path) -> None:
    """Neither its thread nor an open file."""
    before = open_files()
    store = SQLiteStore(path)
    for _ in range(3):
        await store.open()
        await store.add(packed(1), PLENTY)
        assert any(thread.name.startswith("silbo-outbox") for thread in threading.enumerate())
        await store.aclose()
        await store.aclose()
    for thread in threading.enumerate():
        if thread.name.startswith("silbo-outbox"):
            thread.join(10)
            assert not thread.is_alive()
    assert open_files() == before


async def test_closing_commits_what_waits(path: Path) -> None:
    store = SQLiteStore(path)
    await store.open()
    adding = [asyncio.create_task(store.add(packed(number), PLENTY)) for number in range(20)]
    await asyncio.sleep(0)
    await store.aclose()
    assert await asyncio.gather(*adding) == 20 * [None]
    await store.open()
    assert len(await store.rows("pending")) == 20
    await store.aclose()


async def test_failed_opening_leaves_nothing_open(path: Path) -> None:
    change(path, "CREATE TABLE users (id)")
    before = open_files()
    store = SQLiteStore(path)
    with pytest.raises(StoreInvalid):
        await store.open()
    assert open_files() == before
    path.unlink()
    await store.open()
    await store.aclose()


async def test_closed_store_says_so(path: Path) -> None:
    store = SQLiteStore(path)
    with pytest.raises(RuntimeError, match="not open.*async with"):
        await store.add(packed(1), PLENTY)
    await store.open()
    with pytest.raises(RuntimeError, match="open already"):
        await store.open()
    await store.aclose()
    with pytest.raises(RuntimeError, match="not open"):
        await store.status()


def test_other_event_loop_is_a_clear_error(path: Path) -> None:
    """Instead of a wait without an end."""
    store = SQLiteStore(path)
    asyncio.run(store.open())
    with pytest.raises(
        LoopConflict, match=r"SQLiteStore\(.*\).add\(\) was called in <.*>, .* belongs to <.*>, which is closed"
    ):
        asyncio.run(store.add(packed(1), PLENTY))
    asyncio.run(store.aclose())
    asyncio.run(opened(path))


def test_forked_process_is_told_to_open_its_own(path: Path) -> None:
    """The thread is not in it; and SQLite forbids to take a connection across a fork."""
    code = f"""
import asyncio, os
from silbo.stores.sqlite import SQLiteStore
from tests.support.store_conformance import PLENTY, in_state, packed

async def main():
    await store.open()
    if os.fork() == 0:
        raise SystemExit(7)
    os.wait()

async def child():
    try:
        await store.add(packed(1), PLENTY)
    except RuntimeError as error:
        print(error)
    own = SQLiteStore({str(path)!r})
    await own.open()
    await own.add(packed(2), PLENTY)
    await own.aclose()

store = SQLiteStore({str(path)!r})
loop = asyncio.new_event_loop()
loop.run_until_complete(store.open())
if child_id := os.fork():
    assert os.waitpid(child_id, 0)[1] == 0
    loop.run_until_complete(store.add(packed(3), PLENTY))
    print(loop.run_until_complete(in_state(store, "pending")))
    loop.run_until_complete(store.aclose())
else:
    asyncio.run(child())
    os._exit(0 if os.write(1, b"child ended\\n") else 1)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-u", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "another process" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[2, 3]"


# -- cancellation --------------------------------------------------------------------------------------------


async def test_cancelled_calls_leave_the_store_as_it_should_be(path: Path, store: SQLiteStore) -> None:
    """Each of them is stored once or not at all; whoever was answered is stored; later ones go well."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    answered, cancelled = [], []
    for round_ in range(40):
        adding = {number: asyncio.create_task(store.add(packed(number), PLENTY)) for number in _range(round_, 10)}
        for number, task in adding.items():
            if chance.random() < 0.5:
                await asyncio.sleep(chance.choice([0, 0, 0.0005, 0.002]))
                task.cancel()
            del number
        outcomes = await asyncio.gather(*adding.values(), return_exceptions=True)
        for number, outcome in zip(adding, outcomes, strict=True):
            (answered if outcome is None else cancelled).append(number)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError), seed
    stored = numbers(await store.rows("pending", limit=1000))
    assert cancelled, seed
    assert len(stored) == len(set(stored)), seed
    assert set(answered) <= set(stored) <= set(answered) | set(cancelled), seed
    assert is_sound(path)
    await store.add(packed(9999), PLENTY)
    assert 9999 in numbers(await store.rows("pending", limit=1000))


def _range(round_: int, many: int) -> range:
    return range(round_ * many, (round_ + 1) * many)


async def test_call_that_was_cancelled_before_its_turn_is_not_stored(store: SQLiteStore) -> None:
    first = asyncio.create_task(store.add(packed(1), PLENTY))
    second = asyncio.create_task(store.add(packed(2), PLENTY))
    await asyncio.sleep(0)
    second.cancel()
    await first
    assert await in_state(store, "pending") == [1]


async def test_cancelled_opening_leaves_nothing_open(path: Path) -> None:
    before = open_files()
    for turns in range(6):
        store = SQLiteStore(path)
        opening = asyncio.create_task(store.open())
        for _ in range(turns):
            await asyncio.sleep(0.0002)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await store.aclose()
    for thread in threading.enumerate():
        if thread.name.startswith("silbo-outbox"):
            thread.join(10)
    assert open_files() == before


# -- the disk ------------------------------------------------------------------------------------------------


async def test_full_disk_is_a_clear_error_and_no_false_success(path: Path, store: SQLiteStore) -> None:
    """SQLite's own limit gives the same error as a disk without room."""

    def most(pages: int) -> Callable[[sqlite3.Connection], object]:
        return lambda connection: connection.execute(f"PRAGMA max_page_count={pages}").fetchone()

    await store.add(packed(0), PLENTY)
    await store._transact(most(30))
    stored = [0]
    with pytest.raises(StoreUnavailable, match="disk is full.*make room.*[Nn]othing was stored"):
        for number in range(1, 10_000, 20):
            await store.add(packed(*range(number, number + 20)), PLENTY)
            stored += range(number, number + 20)
    assert numbers(await store.rows("pending", limit=1000)) == stored
    assert is_sound(path)
    await store.add(packed(99_999), PLENTY)  # the limit was the connection's, which is another now
    assert numbers(await store.rows("pending", limit=1000)) == [*stored, 99_999]


async def test_relay_can_go_on_where_nothing_more_can_be_stored(store: SQLiteStore) -> None:
    """What is sent and forgotten makes room: a full file mends itself."""
    await store.add(packed(*range(200)), PLENTY)
    lead = await leader(store, lease=LONG)

    def most(connection: sqlite3.Connection) -> object:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        return connection.execute(f"PRAGMA max_page_count={pages + 4}").fetchone()  # the indexes of sent rows

    await store._transact(most)
    for _ in range(4):
        await send(store, lead, 50)
    assert await store.forget(keep_sent=0) == 200
    await store.add(packed(999), PLENTY)
