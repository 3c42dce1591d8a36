"""The statements of the SQLite store. Each function runs in its caller's transaction.

The functions carry the names of ``OutboxStore``'s methods; import the module, not the functions. Times in the file are
integers: microseconds since 1970.

Rows that are taken for the first time are not written one by one: a record in the table ``taken`` says which they are, and
their sequences, which ascend as their ids do. If all of them are settled as sent, one statement does so. Whatever else is
done or asked first writes them down, see :func:`_write_down`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, Final

from silbo._read_budget import READ_SIZE
from silbo.errors import LeadLost, OutboxFull
from silbo.outbox.rows import (
    FOUND_AT_MOST,
    NO_SEQUENCE,
    STATES,
    ColumnCheck,
    Lead,
    OutboxStatus,
    Row,
    State,
    has_to_wait,
    mark_unreadable,
    to_number,
    unpack,
)
from silbo.stores._group_commit import Addition

FREE_STEP: Final = 1000
"""Sent rows that are deleted at a time to make room."""
COLUMNS: Final = (  # state: the position in STATES
    "id, partition, state, raw, attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at"
)
STRAY: Final = "state >= 2 AND state NOT IN (2, 3)"
"""The condition that a row that is not unsent is in no state: something else was written there."""
UNSENT: Final = (0, 1)
"""The states of rows to send. They are asked for as ``state < 2``, and so come with rows whose state is negative."""
_1970: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)
_LAST_TIME: Final = 253_402_300_799_999_999
"""The last microsecond of the year 9999."""
_columns: Final = ColumnCheck(int, 0)


def read_clock() -> int:
    """Return this machine's clock, in microseconds since 1970."""
    return time.time_ns() // 1000


def add(connection: sqlite3.Connection, additions: Sequence[Addition]) -> list[OutboxFull | None]:
    """Store the messages of each addition that its quota allows, in order. Sent rows are deleted where room is needed.

    Returns:
        For each addition None, or the error because of which it was not stored.
    """
    rows, size, all_rows, all_size = _read_totals(connection)
    stored_at = read_clock()
    errors: list[OutboxFull | None] = []
    for addition in additions:
        more = len(addition.messages)
        larger = addition.size
        quota = addition.quota
        if rows + more > quota.rows or size + larger > quota.size:
            errors.append(OutboxFull(rows, size, str(quota)))
            continue
        while (all_rows + more > quota.rows or all_size + larger > quota.size) and all_rows > rows:
            _delete(connection, "state = 2 ORDER BY state_at, id", (), FREE_STEP)
            *_, all_rows, all_size = _read_totals(connection)
        connection.executemany(
            "INSERT INTO message (partition, raw, stored_at, state_at) VALUES (?, ?, ?, ?)",
            [(message.partition, message.raw, stored_at, stored_at) for message in addition.messages],
        )
        rows += more
        size += larger
        all_rows += more
        all_size += larger
        errors.append(None)
    return errors


def _read_totals(connection: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Return rows and bytes that are not sent, then rows and bytes in all."""
    rows, size, all_rows, all_size = connection.execute("SELECT rows, size, all_rows, all_size FROM outbox").fetchone()
    return rows, size, all_rows, all_size


# -- the relay's --------------------------------------------------------------------------------------------


def lead(connection: sqlite3.Connection, partition: int, owner: str, lease: float, above: int) -> Lead | None:
    """Take or renew the lead of a partition; None while another owner's lease runs. See ``OutboxStore.lead``."""
    holder, epoch, until = connection.execute(
        "SELECT owner, epoch, until FROM lead WHERE partition = ?", (partition,)
    ).fetchone()
    epoch, until = to_number(epoch), to_number(until)
    now = read_clock()
    end = now + int(lease * 1e6)
    if holder not in (None, owner) and until > now:
        if until > end:
            connection.execute("UPDATE lead SET until = ? WHERE partition = ?", (end, partition))
        return None
    if holder != owner or epoch <= above:
        epoch = max(epoch, above) + 1
    connection.execute(
        "UPDATE lead SET owner = ?, epoch = ?, until = ? WHERE partition = ?", (owner, epoch, end, partition)
    )
    return Lead(partition=partition, owner=owner, epoch=epoch, until=to_datetime(end))


def resign(connection: sqlite3.Connection, lead: Lead) -> None:
    """End a lease, if it is still this lead's. See ``OutboxStore.resign``."""
    connection.execute(
        "UPDATE lead SET owner = NULL WHERE partition = ? AND owner = ? AND epoch = ?",
        (lead.partition, lead.owner, lead.epoch),
    )


def _check_lead(connection: sqlite3.Connection, lead: Lead) -> int:
    """Check that the lead is still the partition's. Return the last sequence that was given in the partition.

    Raises:
        LeadLost: another relay leads the partition.
    """
    owner, epoch, sequence = connection.execute(
        "SELECT owner, epoch, sequence FROM lead WHERE partition = ?", (lead.partition,)
    ).fetchone()
    if (owner, epoch) != (lead.owner, lead.epoch):
        raise LeadLost(lead.partition, lead.epoch)
    return to_number(sequence)


def take(
    connection: sqlite3.Connection, lead: Lead, limit: int, sent: Collection[int], dead: Mapping[int, str]
) -> list[Row]:
    """Settle rows, then take the next ones of the lead's partition. See ``OutboxStore.take``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    settle(connection, lead, sent, dead)
    _write_down(connection)
    last = _check_lead(connection, lead)
    now = read_clock()
    # Not below the clock: so a file that was restored from an older copy never gives the same sequence again.
    next_sequence = max(last + 1, now)
    if fresh := _take_fresh(connection, lead, limit, next_sequence, now):
        return fresh
    found = _select_next(connection, lead.partition, limit)
    if not found or _is_waiting(found[0], now):
        # A relay that has just sent something asks again soon, with nothing to settle.
        found = [] if sent or dead else _select_strays(connection, lead.partition, limit)
    if not found:
        return []
    rows = []
    damaged = []
    for row, partition, state, raw, *others in found:
        (attempts, error, sequence, _, _, stored_at, _, _), problem = _columns.mend(others)
        if partition != lead.partition:
            problem = f"its column partition has the value {partition!r:.100}"
            partition = lead.partition
        if state not in UNSENT:
            problem = f"its column state has the value {state!r:.100}"
        if problem:
            damaged.append((now, row))
        if sequence == NO_SEQUENCE:
            sequence = last = next_sequence
            next_sequence += 1
        taken = (row, partition, 1, raw, attempts + 1, error, sequence, lead.owner, lead.epoch, stored_at, now, None)
        rows.append(_to_row(taken, problem))
    connection.executemany(
        "UPDATE message SET state = 1, attempts = ?, sequence = ?, owner = ?, epoch = ?, state_at = ?,"
        " next_attempt_at = NULL WHERE id = ?",
        [(row.attempts, row.sequence, lead.owner, lead.epoch, now, row.id) for row in rows],
    )
    # The other columns have right values by now, so that a retry can send the row.
    connection.executemany("UPDATE message SET stored_at = ? WHERE id = ? AND typeof(stored_at) <> 'integer'", damaged)
    connection.execute("UPDATE lead SET sequence = ? WHERE partition = ?", (last, lead.partition))
    return rows


_IS_FRESH: Final = (
    f"state = 0 AND attempts = 0 AND sequence = {NO_SEQUENCE} AND error IS NULL AND owner IS NULL AND epoch IS NULL"
    " AND next_attempt_at IS NULL AND typeof(stored_at) = 'integer' AND state_at = stored_at"
)
"""The condition that a row is as it was stored, its message aside."""


def _take_fresh(connection: sqlite3.Connection, lead: Lead, limit: int, sequence: int, now: int) -> list[Row]:
    """Take the first rows to send with one write, as long as each is as it was stored. Empty if the first one is not.

    Fewer than ``limit`` if their messages reach READ_SIZE before.

    Args:
        connection: To the file.
        lead: The lead.
        limit: The most rows.
        sequence: The first row's. The others' are as far above it as their ids are above the first one's.
        now: The time of the taking.
    """
    cursor = connection.execute(
        f"SELECT id, raw, stored_at, {_IS_FRESH} FROM message WHERE state < 2 AND partition = ? ORDER BY sequence, id LIMIT ?",
        (lead.partition, limit),
    )
    partition, owner, epoch = lead.partition, lead.owner, lead.epoch
    rows: list[Row] = []
    size = 0
    above = None
    taken_at = to_datetime(now)
    stored, stored_at = now, taken_at
    for row, raw, at, is_fresh in cursor:
        if not is_fresh or type(raw) is not bytes:
            break
        if above is None:
            above = sequence - row
        if at != stored:
            stored, stored_at = at, to_datetime(at)
        message = unpack(raw)
        rows.append(
            Row(row, partition, "sending", message, 1, None, above + row, owner, epoch, stored_at, taken_at, None)
        )
        size += len(raw)
        if size >= READ_SIZE:
            break
    cursor.close()
    if rows:
        first, last = rows[0].id, rows[-1].id
        connection.execute(
            "INSERT INTO taken (partition, first, last, sequence, size, owner, epoch, taken_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (partition, first, last, sequence, size, owner, epoch, now),
        )
        connection.execute("UPDATE lead SET sequence = ? WHERE partition = ?", (rows[-1].sequence, partition))
    return rows


def _write_down(connection: sqlite3.Connection) -> None:
    """Write into each row that was taken with others by one write what the record of the taking says of it."""
    for partition, first, last, sequence, _, owner, epoch, taken_at in _read_taken(connection):
        connection.execute(
            "UPDATE message SET state = 1, attempts = attempts + 1, sequence = id + ?, owner = ?, epoch = ?, state_at = ?"
            f" WHERE {_TAKEN}",
            (sequence - first, owner, epoch, taken_at, partition, first, last),
        )
        connection.execute("DELETE FROM taken WHERE partition = ?", (partition,))


_TAKEN: Final = f"state < 2 AND partition = ? AND sequence = {NO_SEQUENCE} AND id BETWEEN ? AND ?"
"""The rows of a record in ``taken``."""


def _read_taken(connection: sqlite3.Connection, partition: int | None = None) -> list[tuple[Any, ...]]:
    """Read the records of rows that were taken by one write: of a partition, or of all."""
    if partition is None:
        return connection.execute("SELECT * FROM taken").fetchall()
    return connection.execute("SELECT * FROM taken WHERE partition = ?", (partition,)).fetchall()


def _settle_taken(connection: sqlite3.Connection, lead: Lead, sent: Collection[int], now: int) -> bool:
    """Mark the rows of the lead's record in ``taken`` as sent by one statement, if they are the sent ones. True if so."""
    for partition, first, last, sequence, size, owner, epoch, _ in _read_taken(connection, lead.partition):
        (count,) = connection.execute(
            f"SELECT count(*) FROM message WHERE {_TAKEN}", (partition, first, last)
        ).fetchone()
        is_settled = set(sent)
        if (epoch, count) != (lead.epoch, len(is_settled)) or not first <= min(is_settled) <= max(is_settled) <= last:
            return False
        if count <= last - first:  # else the ids are all those from first to last: no need to read them
            found = connection.execute(f"SELECT id FROM message WHERE {_TAKEN}", (partition, first, last))
            if any(row not in is_settled for (row,) in found.fetchall()):
                return False
        connection.execute(
            "UPDATE message SET state = 2, error = NULL, attempts = attempts + 1, sequence = id + ?, owner = ?, epoch = ?,"
            f" state_at = ? WHERE {_TAKEN}",
            (sequence - first, owner, epoch, now, partition, first, last),
        )
        connection.execute("UPDATE outbox SET rows = rows - ?, size = size - ?", (count, size))
        connection.execute("DELETE FROM taken WHERE partition = ?", (partition,))
        return True
    return False


def _is_waiting(values: Sequence[Any], now: int) -> bool:
    """Return True if the row with these values of COLUMNS waits for its next attempt."""
    (*_, state_at, next_attempt_at), _ = _columns.mend(values[4:])
    return has_to_wait(state_at, next_attempt_at, now)


def _select_next(connection: sqlite3.Connection, partition: int, limit: int) -> list[tuple[Any, ...]]:
    """Read the first rows to send: at most ``limit``, fewer if their messages reach READ_SIZE before."""
    cursor = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state < 2 AND partition = ? ORDER BY sequence, id LIMIT ?",
        (partition, limit),
    )
    return _fetch_up_to_size(cursor)


def _select_strays(connection: sqlite3.Connection, partition: int, limit: int) -> list[tuple[Any, ...]]:
    """Read rows in a state that does not exist; the first partition also has the rows of partitions that do not exist.

    Something else was written into that column. There is an index for each question.
    """
    questions = [f"{STRAY} AND partition = {partition}"]
    if partition == 0:
        questions += [
            f"{kind} AND partition {outside}"
            for kind in ("state < 2", STRAY)
            for outside in ("< 0", ">= (SELECT partitions FROM outbox)")
        ]
    for question in questions:
        found = _fetch_up_to_size(
            connection.execute(f"SELECT {COLUMNS} FROM message WHERE {question} LIMIT ?", (limit,))
        )
        if found:
            return found
    return []


def _fetch_up_to_size(cursor: sqlite3.Cursor) -> list[tuple[Any, ...]]:
    """Read rows of COLUMNS until their messages reach READ_SIZE."""
    found = []
    size = 0
    for values in cursor:
        found.append(values)
        size += len(values[3]) if isinstance(values[3], str | bytes) else 0
        if size >= READ_SIZE:
            cursor.close()
            break
    return found


def settle(connection: sqlite3.Connection, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
    """Mark rows as sent or dead. See ``OutboxStore.settle``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _check_lead(connection, lead)
    now = read_clock()
    if not sent and not dead:
        return
    if not dead and _settle_taken(connection, lead, sent, now):
        return
    _write_down(connection)
    connection.executemany(
        "UPDATE message SET state = 2, error = NULL, state_at = ? WHERE id = ? AND state = 1 AND epoch = ?",
        [(now, row, lead.epoch) for row in sent],
    )
    connection.executemany(
        "UPDATE message SET state = 3, error = ?, state_at = ? WHERE id = ? AND state = 1 AND epoch = ?",
        [(error, now, row, lead.epoch) for row, error in dead.items()],
    )


def postpone(connection: sqlite3.Connection, lead: Lead, rows: Collection[int], error: str, delay: float) -> None:
    """Put rows back to pending for ``delay`` seconds. See ``OutboxStore.postpone``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _check_lead(connection, lead)
    _write_down(connection)
    now = read_clock()
    connection.executemany(
        "UPDATE message SET state = 0, error = ?, state_at = ?, next_attempt_at = ? WHERE id = ? AND state = 1"
        " AND epoch = ?",
        [(error, now, now + int(delay * 1e6), row, lead.epoch) for row in rows],
    )


def renumber(connection: sqlite3.Connection, lead: Lead, above: int) -> None:
    """Let rows that were taken once get new sequences, above ``above``. See ``OutboxStore.renumber``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    sequence = max(_check_lead(connection, lead), above)
    _write_down(connection)
    connection.execute("UPDATE lead SET sequence = ? WHERE partition = ?", (sequence, lead.partition))
    connection.execute(
        f"UPDATE message SET state = 0, attempts = 0, sequence = {NO_SEQUENCE}, state_at = ?"
        " WHERE state < 2 AND partition = ? AND attempts = 1",
        (read_clock(), lead.partition),
    )


# -- to look at and to mend ---------------------------------------------------------------------------------


def status(connection: sqlite3.Connection, partitions: int) -> OutboxStatus:
    """Count rows and bytes, and read the leads of all partitions. See ``OutboxStore.status``."""
    _write_down(connection)
    rows, size, all_rows, _ = _read_totals(connection)
    (dead,) = connection.execute("SELECT count(*) FROM message WHERE state = 3").fetchone()
    (sent_at,) = connection.execute("SELECT min(state_at) FROM message WHERE state = 2").fetchone()
    sending = 0
    oldest: list[int] = []
    due: list[int] = []
    leads: dict[int, Lead] = {}
    for partition in range(partitions):
        # Two reads that follow the index: the few rows with a sequence, then the oldest of the others.
        begun = connection.execute(
            "SELECT sum(state = 1), min(stored_at), min(next_attempt_at) FROM message WHERE state < 2 AND partition = ?"
            f" AND sequence < {NO_SEQUENCE}",
            (partition,),
        ).fetchone()
        waiting = connection.execute(
            "SELECT stored_at FROM message WHERE state < 2 AND partition = ?"
            f" AND sequence = {NO_SEQUENCE} ORDER BY id LIMIT 1",
            (partition,),
        ).fetchone()
        sending += begun[0] or 0
        oldest += [at for at in (begun[1], waiting and waiting[0]) if type(at) is int]
        due += [at for at in (begun[2],) if type(at) is int]
        owner, epoch, until = connection.execute(
            "SELECT owner, epoch, until FROM lead WHERE partition = ?", (partition,)
        ).fetchone()
        if owner is not None and to_number(until) > read_clock():
            leads[partition] = Lead(partition=partition, owner=owner, epoch=to_number(epoch), until=to_datetime(until))
    return OutboxStatus(
        counts={"pending": rows - sending - dead, "sending": sending, "sent": all_rows - rows, "dead": dead},
        size=size,
        oldest_at=to_datetime(min(oldest)) if oldest else None,
        oldest_sent_at=to_datetime(sent_at) if type(sent_at) is int else None,
        next_attempt_at=to_datetime(min(due)) if due else None,
        leads=leads,
    )


def rows(connection: sqlite3.Connection, state: State, after: int, limit: int) -> list[Row]:
    """Return at most ``limit`` rows in a state with ids above ``after``, by id; fewer if they reach READ_SIZE before."""
    _write_down(connection)
    cursor = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state = {STATES.index(state)} AND id > ? ORDER BY id LIMIT ?",
        (after, limit),
    )
    found = _fetch_up_to_size(cursor)
    return [_to_row(values) for values in found]


def find(connection: sqlite3.Connection, message_id: str) -> list[Row]:
    """Return the rows of a message's id. See ``OutboxStore.find``."""
    cursor = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE instr(raw, ?) ORDER BY id LIMIT {FOUND_AT_MOST}", (message_id.encode(),)
    )
    return [row for row in map(_to_row, cursor.fetchall()) if row.message.message_id == message_id]


_WAIT_AGAIN: Final = f"UPDATE message SET state = 0, attempts = 0, sequence = {NO_SEQUENCE}, state_at = ?"


def retry(connection: sqlite3.Connection, chosen: Collection[int] | None, after: int, limit: int) -> list[int]:
    """Make dead rows pending again, the chosen ones or all; return their ids. See ``OutboxStore.retry``."""
    _write_down(connection)
    if chosen is None:
        found = connection.execute(
            "SELECT id FROM message WHERE state = 3 AND id > ? ORDER BY id LIMIT ?", (after, limit)
        )
        dead = [row for (row,) in found]
    else:
        is_dead = "SELECT 1 FROM message WHERE state = 3 AND id = ?"
        wanted = (row for row in sorted(set(chosen)) if row > after)
        dead = list(islice((row for row in wanted if connection.execute(is_dead, (row,)).fetchone()), limit))
    now = read_clock()
    connection.executemany(f"{_WAIT_AGAIN} WHERE id = ?", [(now, row) for row in dead])
    return dead


def replay(connection: sqlite3.Connection, since: datetime, before: datetime, limit: int) -> int:
    """Make at most ``limit`` rows pending again that were sent from ``since`` on and before ``before``; return their number."""
    _write_down(connection)
    chosen = "SELECT id FROM message WHERE state = 2 AND state_at >= ? AND state_at < ? ORDER BY state_at, id LIMIT ?"
    return connection.execute(
        f"{_WAIT_AGAIN} WHERE id IN ({chosen})",
        (read_clock(), _to_microseconds(since), _to_microseconds(before), limit),
    ).rowcount


def forget(connection: sqlite3.Connection, keep_sent: float, limit: int) -> int:
    """Delete at most ``limit`` rows that were sent more than ``keep_sent`` seconds ago, the oldest first; return their number."""
    return _delete(
        connection, "state = 2 AND state_at <= ? ORDER BY state_at, id", (read_clock() - int(keep_sent * 1e6),), limit
    )


def purge(connection: sqlite3.Connection, state: str, before: datetime, limit: int) -> int:
    """Delete at most ``limit`` rows that are sent or dead since before a time; return their number."""
    where = "state = 2 AND state_at < ? ORDER BY state_at, id" if state == "sent" else "state = 3 AND state_at < ?"
    return _delete(connection, where, (_to_microseconds(before),), limit)


def _delete(connection: sqlite3.Connection, where: str, arguments: tuple[int, ...], limit: int) -> int:
    chosen = f"SELECT id FROM message WHERE {where} LIMIT ?"
    return connection.execute(f"DELETE FROM message WHERE id IN ({chosen})", (*arguments, limit)).rowcount


# -- rows ---------------------------------------------------------------------------------------------------


def _to_row(values: Sequence[Any], problem: str = "") -> Row:
    """Make a row of the values of COLUMNS; an unreadable one if there is a problem with them."""
    row, partition, state, raw, *others = values
    mended, found = _columns.mend(others)
    attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at = mended
    return Row(
        id=row,
        partition=partition,
        state=STATES[state],
        message=mark_unreadable(unpack(raw), problem or found),
        attempts=attempts,
        error=error,
        sequence=None if sequence == NO_SEQUENCE else sequence,
        owner=owner,
        epoch=epoch,
        stored_at=to_datetime(stored_at),
        state_at=to_datetime(state_at),
        next_attempt_at=None if next_attempt_at is None else to_datetime(next_attempt_at),
    )


def to_datetime(microseconds: int) -> datetime:
    """Return a time of the file; one that Python does not have as the nearest that it has."""
    return _1970 + max(0, min(microseconds, _LAST_TIME)) * _US


def _to_microseconds(at: datetime) -> int:
    return (at - _1970) // _US
