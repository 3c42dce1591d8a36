"""The schema of an outbox's SQLite file: its versions, and opening a file of any of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

from silbo.errors import StoreInvalid
from silbo.outbox.rows import NO_SEQUENCE
from silbo.stores.sqlite.statements import STRAY, read_clock

__all__ = ["MIGRATIONS", "open_schema"]

APPLICATION: Final = 0x73696C62
"""The ``application_id`` in the head of the file: "silb" in ASCII."""

MIGRATIONS: Final[list[Sequence[str]]] = [
    (
        # rows and size: of what is pending, sending or dead; all_rows and all_size: of what is sent, too.
        """
        CREATE TABLE outbox (
            id TEXT NOT NULL, partitions INTEGER NOT NULL, rows INTEGER NOT NULL DEFAULT 0, size INTEGER NOT NULL DEFAULT 0,
            all_rows INTEGER NOT NULL DEFAULT 0, all_size INTEGER NOT NULL DEFAULT 0)
        """,
        """
        CREATE TABLE partition (
            partition INTEGER PRIMARY KEY, owner TEXT, epoch INTEGER NOT NULL DEFAULT 0, until INTEGER NOT NULL DEFAULT 0,
            sequence INTEGER NOT NULL DEFAULT 0)
        """,
        f"""
        CREATE TABLE message (
            id INTEGER PRIMARY KEY AUTOINCREMENT, partition INTEGER NOT NULL, state INTEGER NOT NULL DEFAULT 0,
            raw BLOB NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, error TEXT,
            sequence INTEGER NOT NULL DEFAULT {NO_SEQUENCE}, owner TEXT, epoch INTEGER, stored_at INTEGER NOT NULL,
            state_at INTEGER NOT NULL, next_attempt_at INTEGER)
        """,
        "CREATE INDEX message_unsent ON message (partition, sequence, id) WHERE state < 2",
        "CREATE INDEX message_sent ON message (state_at, id) WHERE state = 2",
        "CREATE INDEX message_dead ON message (id) WHERE state = 3",
        """
        CREATE TRIGGER stored AFTER INSERT ON message BEGIN
            UPDATE outbox SET rows = rows + 1, size = size + length(new.raw),
                all_rows = all_rows + 1, all_size = all_size + length(new.raw);
        END
        """,
        """
        CREATE TRIGGER sent AFTER UPDATE OF state ON message WHEN new.state = 2 AND old.state <> 2 BEGIN
            UPDATE outbox SET rows = rows - 1, size = size - length(old.raw);
        END
        """,
        """
        CREATE TRIGGER replayed AFTER UPDATE OF state ON message WHEN old.state = 2 AND new.state <> 2 BEGIN
            UPDATE outbox SET rows = rows + 1, size = size + length(old.raw);
        END
        """,
        """
        CREATE TRIGGER deleted AFTER DELETE ON message BEGIN
            UPDATE outbox SET
                rows = rows - (old.state <> 2), size = size - (old.state <> 2) * length(old.raw),
                all_rows = all_rows - 1, all_size = all_size - length(old.raw);
        END
        """,
    ),
    (f"CREATE INDEX message_stray ON message (partition) WHERE {STRAY}",),
    (
        # A relay of an older silbo does not know of "taken": it would number those rows anew, and double them. It looks for
        # "partition" in vain, opens the file again, and is told to be updated. What only publishes goes on.
        "ALTER TABLE partition RENAME TO lead",
        """
        CREATE TABLE taken (
            partition INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL, sequence INTEGER NOT NULL,
            size INTEGER NOT NULL, owner TEXT NOT NULL, epoch INTEGER NOT NULL, taken_at INTEGER NOT NULL)
        """,
        # Not for pending rows that become sent at once: settle() counts those itself.
        "DROP TRIGGER sent",
        """
        CREATE TRIGGER sent AFTER UPDATE OF state ON message WHEN new.state = 2 AND old.state NOT IN (0, 2) BEGIN
            UPDATE outbox SET rows = rows - 1, size = size - length(old.raw);
        END
        """,
    ),
]
"""The statements that bring a file from version n to n + 1, at position n; a new file goes through all of them."""


def open_schema(
    connection: sqlite3.Connection, path: Path, *, create: bool, partitions: int | None, lease: float
) -> tuple[str, int, str]:
    """Bring the file's schema to this version's, and give the outbox its partitions. Call it in a transaction.

    Args:
        connection: To the file.
        path: The path of the file, for the text of errors.
        create: Make the schema if the file is empty.
        partitions: The number that the outbox is to have; None keeps the file's number, or takes 1 for a new file.
        lease: Seconds that the relays lead for.

    Returns:
        The outbox's id, the number of its partitions, and the reason why they can't be changed, empty if they can.

    Raises:
        StoreInvalid: the file is another program's, empty, or of a newer schema.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION and (tables or application or version):
        raise StoreInvalid(str(path), "is a database of something else; give the outbox a file of its own")
    if version > len(MIGRATIONS):
        problem = f"has schema version {version}, and this silbo knows {len(MIGRATIONS)}: update silbo"
        raise StoreInvalid(str(path), problem)
    if not version and not create:
        raise StoreInvalid(str(path), "is an empty file, not an outbox; check the path")
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    if version < len(MIGRATIONS):
        connection.execute(f"PRAGMA application_id={APPLICATION}")
        connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
    if not version:
        connection.execute("INSERT INTO outbox (id, partitions) VALUES (?, ?)", (uuid4().hex, partitions or 1))
    return _set_partitions(connection, partitions, lease)


def _set_partitions(connection: sqlite3.Connection, partitions: int | None, lease: float) -> tuple[str, int, str]:
    """Change the number of partitions if another one is wanted; return what :func:`open_schema` returns.

    It is not changed while messages wait or a relay leads. A message's partition depends on the number, so relays with the
    new number would look for the waiting messages in other partitions. A lease that would end later than after one
    ``lease`` is from a clock that was ahead, and is cut.
    """
    identity, has, rows = connection.execute("SELECT id, partitions, rows FROM outbox").fetchone()
    if partitions not in (None, has):
        now = read_clock()
        end = now + int(lease * 1e6)
        connection.execute("UPDATE lead SET until = ? WHERE until > ?", (end, end))
        (leads,) = connection.execute(
            "SELECT count(*) FROM lead WHERE owner IS NOT NULL AND until > ?", (now,)
        ).fetchone()
        in_use = f"{rows} messages wait in it" if rows else "a relay runs on it" if leads else ""
        if in_use:
            problem = f"has {has} partitions and {in_use}; send them all and stop its relays before it has {partitions}"
            return identity, has, problem
        connection.execute("UPDATE outbox SET partitions = ?", (partitions,))
        has = partitions
    numbers = [(number,) for number in range(has)]
    connection.executemany("INSERT OR IGNORE INTO lead (partition) VALUES (?)", numbers)
    return identity, has, ""
