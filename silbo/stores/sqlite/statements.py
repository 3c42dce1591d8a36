"""The statements of the SQLite store, each function in a transaction of its caller's. Times are microseconds since 1970."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from silbo.errors import LeadLost, OutboxFull
from silbo.outbox.rows import Lead, OutboxStatus, Packed, Quota, Row, State, unpack

STATES: Final[tuple[State, ...]] = ("pending", "sending", "sent", "dead")
"""Stored as their positions: 0, 1, 2, 3."""
NO_SEQUENCE: Final = 1 << 62
"""Behind every sequence, so that one index has the rows in the order in which they are taken."""
STEP: Final = 1000
TAKE_SIZE: Final = 4 << 20
"""Bytes after which no more rows are taken at once."""
COLUMNS: Final = (
    "id, partition, state, raw, attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at"
)
_1970: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)


def now() -> int:
    """Return this machine's clock, in microseconds since 1970."""
    return time.time_ns() // 1000


def add(connection: sqlite3.Connection, calls: Iterable[tuple[Sequence[Packed], Quota]]) -> list[OutboxFull | None]:
    """Store the messages of each call, as far as its quota allows; why not, for each."""
    rows, size, all_rows, all_size = _totals(connection)
    stored_at = now()
    answers: list[OutboxFull | None] = []
    for messages, quota in calls:
        more, larger = len(messages), sum(len(message.raw) for message in messages)
        if rows + more > quota.rows or size + larger > quota.size:
            answers.append(OutboxFull(rows, size, str(quota)))
            continue
        while (all_rows + more > quota.rows or all_size + larger > quota.size) and all_rows > rows:
            _delete(connection, "state = 2 ORDER BY state_at, id", (), STEP)  # what was sent makes room
            *_, all_rows, all_size = _totals(connection)
        connection.executemany(
            "INSERT INTO message (partition, raw, stored_at, state_at) VALUES (?, ?, ?, ?)",
            [(message.partition, message.raw, stored_at, stored_at) for message in messages],
        )
        rows, size, all_rows, all_size = rows + more, size + larger, all_rows + more, all_size + larger
        answers.append(None)
    return answers


def _totals(connection: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Rows and bytes that are not sent, rows and bytes in all."""
    rows, size, all_rows, all_size = connection.execute("SELECT rows, size, all_rows, all_size FROM outbox").fetchone()
    return rows, size, all_rows, all_size


# -- the relay's --------------------------------------------------------------------------------------------


def lead(connection: sqlite3.Connection, partition: int, owner: str, lease: float, above: int) -> Lead | None:
    """Take or renew the lead of a partition; None while another owner's lease runs. See ``OutboxStore.lead``."""
    holder, epoch, until = connection.execute(
        "SELECT owner, epoch, until FROM partition WHERE partition = ?", (partition,)
    ).fetchone()
    at = now()
    if holder not in (None, owner) and until > at:
        return None
    if holder != owner or epoch <= above:
        epoch = max(epoch, above) + 1
    until = at + int(lease * 1e6)
    connection.execute(
        "UPDATE partition SET owner = ?, epoch = ?, until = ? WHERE partition = ?", (owner, epoch, until, partition)
    )
    return Lead(partition, owner, epoch, _utc(until))


def resign(connection: sqlite3.Connection, lead: Lead) -> None:
    """End a lease, if it is still this lead's. See ``OutboxStore.resign``."""
    connection.execute(
        "UPDATE partition SET owner = NULL WHERE partition = ? AND owner = ? AND epoch = ?",
        (lead.partition, lead.owner, lead.epoch),
    )


def _sequence(connection: sqlite3.Connection, lead: Lead) -> int:
    """The last that was given in the partition.

    Raises:
        LeadLost: another relay leads it.
    """
    owner, epoch, sequence = connection.execute(
        "SELECT owner, epoch, sequence FROM partition WHERE partition = ?", (lead.partition,)
    ).fetchone()
    if (owner, epoch) != (lead.owner, lead.epoch):
        raise LeadLost(lead.partition, lead.epoch)
    return int(sequence)


def take(
    connection: sqlite3.Connection, lead: Lead, limit: int, sent: Collection[int], dead: Mapping[int, str]
) -> list[Row]:
    """Settle rows, then take the next ones of the lead's partition. See ``OutboxStore.take``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    settle(connection, lead, sent, dead)
    last, at = _sequence(connection, lead), now()
    found = _first(connection, lead.partition, limit)
    if not found or (found[0][-1] or 0) > at:
        return []
    # Not below the clock: then a file that was restored from an older copy gives no sequence for a second time.
    fresh = max(last + 1, at)
    rows = []
    for row, partition, _, raw, attempts, error, sequence, _, _, stored_at, _, _ in found:
        if sequence == NO_SEQUENCE:
            sequence = last = fresh
            fresh += 1
        rows.append(
            _row((row, partition, 1, raw, attempts + 1, error, sequence, lead.owner, lead.epoch, stored_at, at, None))
        )
    connection.executemany(
        "UPDATE message SET state = 1, attempts = attempts + 1, sequence = ?, owner = ?, epoch = ?, state_at = ?,"
        " next_attempt_at = NULL WHERE id = ?",
        [(row.sequence, lead.owner, lead.epoch, at, row.id) for row in rows],
    )
    connection.execute("UPDATE partition SET sequence = ? WHERE partition = ?", (last, lead.partition))
    return rows


def _first(connection: sqlite3.Connection, partition: int, limit: int) -> list[tuple[Any, ...]]:
    """As many as are to be sent together: of large ones fewer."""
    cursor = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state < 2 AND partition = ? ORDER BY sequence, id LIMIT ?",
        (partition, limit),
    )
    found, size = [], 0
    for values in cursor:
        found.append(values)
        size += len(values[3])
        if size >= TAKE_SIZE:
            cursor.close()
            break
    return found


def settle(connection: sqlite3.Connection, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
    """Mark rows as sent or dead. See ``OutboxStore.settle``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _sequence(connection, lead)
    at = now()
    connection.executemany(
        "UPDATE message SET state = 2, error = NULL, state_at = ? WHERE id = ? AND state = 1 AND epoch = ?",
        [(at, row, lead.epoch) for row in sent],
    )
    connection.executemany(
        "UPDATE message SET state = 3, error = ?, state_at = ? WHERE id = ? AND state = 1 AND epoch = ?",
        [(error, at, row, lead.epoch) for row, error in dead.items()],
    )


def postpone(connection: sqlite3.Connection, lead: Lead, rows: Collection[int], error: str, delay: float) -> None:
    """Put rows back to pending for ``delay`` seconds. See ``OutboxStore.postpone``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _sequence(connection, lead)
    at = now()
    connection.executemany(
        "UPDATE message SET state = 0, error = ?, state_at = ?, next_attempt_at = ? WHERE id = ? AND state = 1"
        " AND epoch = ?",
        [(error, at, at + int(delay * 1e6), row, lead.epoch) for row in rows],
    )


def renumber(connection: sqlite3.Connection, lead: Lead, above: int) -> None:
    """Let rows that were taken once get new sequences, above ``above``. See ``OutboxStore.renumber``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    sequence = max(_sequence(connection, lead), above)
    connection.execute("UPDATE partition SET sequence = ? WHERE partition = ?", (sequence, lead.partition))
    connection.execute(
        f"UPDATE message SET state = 0, attempts = 0, sequence = {NO_SEQUENCE}, state_at = ?"
        " WHERE state < 2 AND partition = ? AND attempts = 1",
        (now(), lead.partition),
    )


# -- to look at and to mend ---------------------------------------------------------------------------------


def status(connection: sqlite3.Connection, partitions: int) -> OutboxStatus:
    """Count rows and bytes, and read the leads of all partitions. See ``OutboxStore.status``."""
    rows, size, all_rows, _ = _totals(connection)
    (dead,) = connection.execute("SELECT count(*) FROM message WHERE state = 3").fetchone()
    (sent_at,) = connection.execute("SELECT min(state_at) FROM message WHERE state = 2").fetchone()
    sending, oldest, due, leads = 0, [], [], {}
    for partition in range(partitions):  # the index has few rows with a sequence, and the oldest of the others first
        begun = (
            "SELECT sum(state = 1), min(stored_at), min(next_attempt_at) FROM message WHERE state < 2 AND partition = ?"
        )
        many, first, soonest = connection.execute(f"{begun} AND sequence < {NO_SEQUENCE}", (partition,)).fetchone()
        waiting = connection.execute(
            "SELECT stored_at FROM message WHERE state < 2 AND partition = ?"
            f" AND sequence = {NO_SEQUENCE} ORDER BY id LIMIT 1",
            (partition,),
        ).fetchone()
        sending += many or 0
        oldest += [at for at in (first, waiting and waiting[0]) if at is not None]
        due += [soonest] if soonest is not None else []
        owner, epoch, until = connection.execute(
            "SELECT owner, epoch, until FROM partition WHERE partition = ?", (partition,)
        ).fetchone()
        if owner is not None and until > now():
            leads[partition] = Lead(partition, owner, epoch, _utc(until))
    counts: dict[State, int] = {
        "pending": rows - sending - dead,
        "sending": sending,
        "sent": all_rows - rows,
        "dead": dead,
    }
    return OutboxStatus(
        counts,
        size,
        _utc(min(oldest)) if oldest else None,
        None if sent_at is None else _utc(sent_at),
        _utc(min(due)) if due else None,
        leads,
    )


def rows(connection: sqlite3.Connection, state: State, after: int, limit: int) -> list[Row]:
    """Return at most ``limit`` rows in a state with ids above ``after``, by id."""
    found = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state = {STATES.index(state)} AND id > ? ORDER BY id LIMIT ?",
        (after, limit),
    ).fetchall()
    return [_row(values) for values in found]


_WAIT_AGAIN: Final = f"UPDATE message SET state = 0, attempts = 0, sequence = {NO_SEQUENCE}, state_at = ?"


def retry(connection: sqlite3.Connection, chosen: Collection[int] | None) -> int:
    """Make dead rows pending again, the chosen ones or all; return their number."""
    if chosen is None:
        return connection.execute(f"{_WAIT_AGAIN} WHERE state = 3", (now(),)).rowcount
    again = f"{_WAIT_AGAIN} WHERE state = 3 AND id = ?"
    return sum(connection.execute(again, (now(), row)).rowcount for row in chosen)


def replay(connection: sqlite3.Connection, since: datetime, before: datetime, limit: int) -> int:
    """Make at most ``limit`` rows pending again that were sent from ``since`` on and before ``before``; return their number."""
    chosen = "SELECT id FROM message WHERE state = 2 AND state_at >= ? AND state_at < ? ORDER BY state_at, id LIMIT ?"
    return connection.execute(
        f"{_WAIT_AGAIN} WHERE id IN ({chosen})", (now(), _since_1970(since), _since_1970(before), limit)
    ).rowcount


def forget(connection: sqlite3.Connection, retain: float, limit: int) -> int:
    """Delete at most ``limit`` rows that were sent more than ``retain`` seconds ago, the oldest first; return their number."""
    return _delete(connection, "state = 2 AND state_at <= ? ORDER BY state_at, id", (now() - int(retain * 1e6),), limit)


def purge(connection: sqlite3.Connection, state: str, before: datetime, limit: int) -> int:
    """Delete at most ``limit`` rows that are sent or dead since before a time; return their number."""
    where = "state = 2 AND state_at < ? ORDER BY state_at, id" if state == "sent" else "state = 3 AND state_at < ?"
    return _delete(connection, where, (_since_1970(before),), limit)


def _delete(connection: sqlite3.Connection, where: str, arguments: tuple[int, ...], limit: int) -> int:
    chosen = f"SELECT id FROM message WHERE {where} LIMIT ?"
    return connection.execute(f"DELETE FROM message WHERE id IN ({chosen})", (*arguments, limit)).rowcount


# -- rows ---------------------------------------------------------------------------------------------------


def _row(values: Sequence[Any]) -> Row:
    row, partition, state, raw, attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at = values
    return Row(
        row,
        partition,
        STATES[state],
        unpack(raw),
        attempts,
        error,
        None if sequence == NO_SEQUENCE else sequence,
        owner,
        epoch,
        _utc(stored_at),
        _utc(state_at),
        None if next_attempt_at is None else _utc(next_attempt_at),
    )


def _utc(microseconds: int) -> datetime:
    return _1970 + microseconds * _US


def _since_1970(at: datetime) -> int:
    return (at - _1970) // _US
