"""The statements of the SQLite store; all of this runs in its thread."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

from silbo.errors import LeadLost, OutboxFull, StoreInvalid
from silbo.stored import Lead, OutboxStatus, Packed, Quota, Row, State, unpack

_T = TypeVar("_T")

APPLICATION: Final = 0x73696C62  # "silb"
STATES: Final[tuple[State, ...]] = ("pending", "sending", "sent", "dead")
PENDING, SENDING, SENT, DEAD = range(4)
NO_SEQUENCE: Final = 1 << 62
"""Behind every sequence, so that one index has the rows in the order in which they are taken."""

# What brings a file from version n to n + 1, where n is the position; a new file goes through all.
MIGRATIONS: Final[list[Sequence[str]]] = [
    (
        # rows and size: what is pending, sending or dead; all_rows and all_size: what is sent, too.
        (
            "CREATE TABLE outbox (id TEXT NOT NULL, partitions INTEGER NOT NULL, rows INTEGER NOT NULL DEFAULT 0,"
            " size INTEGER NOT NULL DEFAULT 0, all_rows INTEGER NOT NULL DEFAULT 0, all_size INTEGER NOT NULL DEFAULT 0)"
        ),
        (
            "CREATE TABLE partition (partition INTEGER PRIMARY KEY, owner TEXT, epoch INTEGER NOT NULL DEFAULT 0,"
            " until REAL NOT NULL DEFAULT 0, sequence INTEGER NOT NULL DEFAULT 0)"
        ),
        (
            "CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, partition INTEGER NOT NULL,"
            " state INTEGER NOT NULL DEFAULT 0, raw BLOB NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, error TEXT,"
            f" sequence INTEGER NOT NULL DEFAULT {NO_SEQUENCE}, owner TEXT, epoch INTEGER, stored_at REAL NOT NULL,"
            " state_at REAL NOT NULL, next_attempt_at REAL)"
        ),
        "CREATE INDEX message_unsent ON message (partition, sequence, id) WHERE state < 2",
        "CREATE INDEX message_sent ON message (state_at, id) WHERE state = 2",
        "CREATE INDEX message_dead ON message (id) WHERE state = 3",
    ),
]

COLUMNS: Final = (
    "id, partition, state, raw, attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at"
)


def connect(path: Path, *, timeout: float, create: bool) -> sqlite3.Connection:
    if not create and not path.exists():
        raise StoreInvalid(str(path), "there is no such file")
    connection = sqlite3.connect(path, timeout=timeout, isolation_level=None)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode == "wal":
            problem = "is in WAL mode, which can lose data in this SQLite: run PRAGMA journal_mode=DELETE on it"
            raise StoreInvalid(str(path), problem)
        connection.execute("PRAGMA journal_mode=PERSIST").fetchone()
        connection.execute("PRAGMA synchronous=FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def transaction(connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], _T]) -> _T:
    """All of it or nothing; the lock is there from the beginning, so that two never wait for one another."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return result


def open_store(connection: sqlite3.Connection, path: Path, partitions: int | None) -> tuple[str, int]:
    """Its id and its partitions, once its schema is this version's.

    Raises:
        StoreInvalid: it is something else, newer, or has other partitions that are in use.
    """
    try:
        return transaction(connection, lambda connection: _open(connection, path, partitions))
    except sqlite3.DatabaseError as error:
        if "not a database" in str(error):
            raise StoreInvalid(str(path), "is no SQLite file") from error
        raise


def _open(connection: sqlite3.Connection, path: Path, partitions: int | None) -> tuple[str, int]:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION and (tables or application or version):
        raise StoreInvalid(str(path), "is a database of something else; give the outbox a file of its own")
    if version > len(MIGRATIONS):
        raise StoreInvalid(str(path), f"has schema version {version}, this silbo knows {len(MIGRATIONS)}: update silbo")
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA application_id={APPLICATION}")
    connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    if not version:
        connection.execute("INSERT INTO outbox (id, partitions) VALUES (?, ?)", (uuid4().hex, partitions or 1))
    identity, has, rows = connection.execute("SELECT id, partitions, rows FROM outbox").fetchone()
    if partitions not in (None, has):
        if rows:
            problem = f"holds {rows} messages in {has} partitions; send them all before it has {partitions}"
            raise StoreInvalid(str(path), problem)
        connection.execute("UPDATE outbox SET partitions = ?", (partitions,))
        has = partitions
    connection.executemany("INSERT OR IGNORE INTO partition (partition) VALUES (?)", [(one,) for one in range(has)])
    return identity, has


# -- storing ------------------------------------------------------------------------------------------------


def add(
    connection: sqlite3.Connection, calls: Iterable[tuple[Sequence[Packed], Quota]]
) -> list[OutboxFull | Exception | None]:
    """Store the messages of each call, as far as its quota allows; why not, for each."""
    rows, size, all_rows, all_size = connection.execute("SELECT rows, size, all_rows, all_size FROM outbox").fetchone()
    now = time.time()
    answers: list[OutboxFull | Exception | None] = []
    for messages, quota in calls:
        more, larger = len(messages), sum(len(message.raw) for message in messages)
        if rows + more > quota.rows or size + larger > quota.size:
            answers.append(OutboxFull(rows, size, str(quota)))
            continue
        while (all_rows + more > quota.rows or all_size + larger > quota.size) and all_rows > rows:
            _delete(connection, "state = 2 ORDER BY state_at, id LIMIT 1000", ())  # what was sent makes room
            all_rows, all_size = connection.execute("SELECT all_rows, all_size FROM outbox").fetchone()
        connection.executemany(
            "INSERT INTO message (partition, raw, stored_at, state_at) VALUES (?, ?, ?, ?)",
            [(message.partition, message.raw, now, now) for message in messages],
        )
        _count(connection, more, larger, more, larger)
        rows, size, all_rows, all_size = rows + more, size + larger, all_rows + more, all_size + larger
        answers.append(None)
    return answers


def _count(connection: sqlite3.Connection, rows: int, size: int, all_rows: int = 0, all_size: int = 0) -> None:
    connection.execute(
        "UPDATE outbox SET rows = rows + ?, size = size + ?, all_rows = all_rows + ?, all_size = all_size + ?",
        (rows, size, all_rows, all_size),
    )


# -- the relay's --------------------------------------------------------------------------------------------


def lead(connection: sqlite3.Connection, partition: int, owner: str, lease: float, above: int) -> Lead | None:
    holder, epoch, until = connection.execute(
        "SELECT owner, epoch, until FROM partition WHERE partition = ?", (partition,)
    ).fetchone()
    now = time.time()
    if holder not in (None, owner) and until > now:
        return None
    if holder != owner or epoch <= above:
        epoch = max(epoch, above) + 1
    connection.execute(
        "UPDATE partition SET owner = ?, epoch = ?, until = ? WHERE partition = ?",
        (owner, epoch, now + lease, partition),
    )
    return Lead(partition, owner, epoch, _utc(now + lease))


def resign(connection: sqlite3.Connection, lead: Lead) -> None:
    connection.execute(
        "UPDATE partition SET owner = NULL WHERE partition = ? AND epoch = ?", (lead.partition, lead.epoch)
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


def take(connection: sqlite3.Connection, lead: Lead, limit: int) -> list[Row]:
    sequence, now = _sequence(connection, lead), time.time()
    found = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state < 2 AND partition = ? ORDER BY sequence, id LIMIT ?",
        (lead.partition, limit),
    ).fetchall()
    if not found or (found[0][-1] is not None and found[0][-1] > now):
        return []
    rows = []
    for values in found:
        row = _row(values)
        number = row.sequence
        if number is None:
            number = sequence = sequence + 1
        rows.append(_taken(row, lead, number, now))
    connection.executemany(
        "UPDATE message SET state = 1, attempts = attempts + 1, sequence = ?, owner = ?, epoch = ?, state_at = ?,"
        " next_attempt_at = NULL WHERE id = ?",
        [(row.sequence, lead.owner, lead.epoch, now, row.id) for row in rows],
    )
    connection.execute("UPDATE partition SET sequence = ? WHERE partition = ?", (sequence, lead.partition))
    return rows


def settle(connection: sqlite3.Connection, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
    _sequence(connection, lead)
    now = time.time()
    connection.executemany(
        "UPDATE message SET state = 3, error = ?, state_at = ? WHERE id = ?",
        [(error, now, row) for row, error in dead.items()],
    )
    if sent:
        freed = 0
        for row in sent:
            (size,) = connection.execute(
                "UPDATE message SET state = 2, error = NULL, state_at = ? WHERE id = ? RETURNING length(raw)",
                (now, row),
            ).fetchone()
            freed += size
        _count(connection, -len(sent), -freed)


def postpone(connection: sqlite3.Connection, lead: Lead, rows: Collection[int], error: str, delay: float) -> None:
    _sequence(connection, lead)
    now = time.time()
    connection.executemany(
        "UPDATE message SET state = 0, error = ?, state_at = ?, next_attempt_at = ? WHERE id = ?",
        [(error, now, now + delay, row) for row in rows],
    )


def renumber(connection: sqlite3.Connection, lead: Lead, above: int) -> None:
    sequence = max(_sequence(connection, lead), above)
    connection.execute("UPDATE partition SET sequence = ? WHERE partition = ?", (sequence, lead.partition))
    connection.execute(
        f"UPDATE message SET state = 0, attempts = 0, sequence = {NO_SEQUENCE}, state_at = ?"
        " WHERE state < 2 AND partition = ? AND attempts = 1",
        (time.time(), lead.partition),
    )


def forget(connection: sqlite3.Connection, retain: float, limit: int) -> int:
    return _delete(
        connection, "state = 2 AND state_at <= ? ORDER BY state_at, id LIMIT ?", (time.time() - retain, limit)
    )


# -- to look at and to mend ---------------------------------------------------------------------------------


def status(connection: sqlite3.Connection, partitions: int) -> OutboxStatus:
    found = dict(connection.execute("SELECT state, count(*) FROM message GROUP BY state").fetchall())
    (size,) = connection.execute("SELECT size FROM outbox").fetchone()
    oldest, due = connection.execute(
        "SELECT min(stored_at), min(next_attempt_at) FROM message WHERE state < 2"
    ).fetchone()
    leads = {
        partition: Lead(partition, owner, epoch, _utc(until))
        for partition, owner, epoch, until in connection.execute(
            "SELECT partition, owner, epoch, until FROM partition WHERE owner IS NOT NULL AND until > ?"
            " AND partition < ? ORDER BY partition",
            (time.time(), partitions),
        ).fetchall()
    }
    counts: dict[State, int] = {state: found.get(number, 0) for number, state in enumerate(STATES)}
    return OutboxStatus(counts, size, _maybe(oldest), _maybe(due), leads)


def rows(connection: sqlite3.Connection, state: State, after: int, limit: int) -> list[Row]:
    found = connection.execute(
        f"SELECT {COLUMNS} FROM message WHERE state = {STATES.index(state)} AND id > ? ORDER BY id LIMIT ?",
        (after, limit),
    ).fetchall()
    return [_row(values) for values in found]


def retry(connection: sqlite3.Connection, chosen: Collection[int] | None) -> int:
    again = (
        f"UPDATE message SET state = 0, sequence = {NO_SEQUENCE}, state_at = ?, next_attempt_at = NULL WHERE state = 3"
    )
    if chosen is None:
        return connection.execute(again, (time.time(),)).rowcount
    return sum(connection.execute(f"{again} AND id = ?", (time.time(), row)).rowcount for row in chosen)


def replay(connection: sqlite3.Connection, since: datetime, before: datetime, limit: int) -> int:
    again = connection.execute(
        f"UPDATE message SET state = 0, sequence = {NO_SEQUENCE}, state_at = ? WHERE id IN"
        " (SELECT id FROM message WHERE state = 2 AND state_at >= ? AND state_at < ? ORDER BY state_at, id LIMIT ?) RETURNING length(raw)",
        (time.time(), since.timestamp(), before.timestamp(), limit),
    ).fetchall()
    _count(connection, len(again), sum(size for (size,) in again))
    return len(again)


def purge(connection: sqlite3.Connection, state: str, before: datetime, limit: int) -> int:
    if state == "sent":
        return _delete(
            connection, "state = 2 AND state_at < ? ORDER BY state_at, id LIMIT ?", (before.timestamp(), limit)
        )
    return _delete(connection, "state = 3 AND state_at < ? ORDER BY id LIMIT ?", (before.timestamp(), limit), dead=True)


def _delete(connection: sqlite3.Connection, where: str, arguments: Sequence[Any], *, dead: bool = False) -> int:
    gone = connection.execute(
        f"DELETE FROM message WHERE id IN (SELECT id FROM message WHERE {where}) RETURNING length(raw)", arguments
    ).fetchall()
    rows, size = len(gone), sum(one for (one,) in gone)
    _count(connection, -rows if dead else 0, -size if dead else 0, -rows, -size)
    return rows


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
        _maybe(next_attempt_at),
    )


def _taken(row: Row, lead: Lead, sequence: int, now: float) -> Row:
    return Row(
        row.id,
        row.partition,
        "sending",
        row.message,
        row.attempts + 1,
        row.error,
        sequence,
        lead.owner,
        lead.epoch,
        row.stored_at,
        _utc(now),
        None,
    )


def _utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _maybe(seconds: float | None) -> datetime | None:
    return None if seconds is None else _utc(seconds)
