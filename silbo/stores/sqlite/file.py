"""An SQLite file as the outbox's: the connection, the schema, what its errors mean. For the store's thread alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Final, TypeVar
from uuid import uuid4

from silbo.errors import DeliveryUnknown, StoreInvalid, StoreUnavailable
from silbo.stores.sqlite.statements import NO_SEQUENCE, now

__all__ = ["MIGRATIONS", "SQLiteFile"]

_T = TypeVar("_T")

APPLICATION: Final = 0x73696C62
"""In the file's head: "silb"."""
LOCKED: Final = 10.0
"""Seconds to wait for a lock that another process holds."""
POLL: Final = 0.005
"""Seconds for which SQLite itself waits: the longer it does, the longer it sleeps between two tries."""
MOVED: Final = "it was moved, replaced or deleted while it was open; the next call opens it anew"

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
]
"""What brings a file from version n to n + 1, where n is the position; a new file goes through all of them."""

_REASONS: Final = {
    sqlite3.SQLITE_BUSY: f"another process has held its lock for {LOCKED:g} s; look for a long transaction in it",
    sqlite3.SQLITE_FULL: "its disk is full; make room",
    sqlite3.SQLITE_READONLY: "it is read-only; this process has to be able to write the file and its folder",
    sqlite3.SQLITE_READONLY_DBMOVED: MOVED,
    sqlite3.SQLITE_IOERR_FSTAT: MOVED,
    sqlite3.SQLITE_CANTOPEN: "it can't be opened; its folder has to be there, and writable for this process",
    sqlite3.SQLITE_IOERR: "its disk can't be read or written, or is full",
    sqlite3.SQLITE_CORRUPT: "it is damaged; put it aside, or a copy of it in its place",
}


class SQLiteFile:
    """One connection to a file; after an error that may be the connection's, the next call makes another.

    Attributes:
        id: The store's, once it was opened.
        partitions: How many it has, once it was opened.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.id, self.partitions = "", 0
        self._path, self._create = path, create
        self._connection: sqlite3.Connection | None = None

    def open(self, partitions: int | None) -> None:
        """Connect, and bring the schema to this version's.

        Raises:
            StoreInvalid: it is something else, newer, or has other partitions, which are in use.
            StoreUnavailable: it can't be used at the moment.
        """
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            raise self._failure(error) from error
        try:
            self.transaction(lambda connection: self._open(connection, partitions))
        except StoreInvalid:
            self.close()
            raise

    def transaction(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """All of it or nothing; the lock is taken at the beginning, so that two never wait for one another.

        Raises:
            StoreUnavailable: nothing was changed.
            DeliveryUnknown: the disk failed in the commit; all or nothing was changed.
        """
        if self._connection is None:
            self.open(self.partitions)  # perhaps another file: replaced, restored
        assert self._connection is not None
        committing = False
        try:
            _patiently(self._connection, "BEGIN IMMEDIATE")
            result = work(self._connection)
            committing = True
            _patiently(self._connection, "COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._failure(error, committing=committing) from error
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        return result

    def _failure(self, error: sqlite3.DatabaseError, *, committing: bool = False) -> Exception:
        """What an error means. The connection is closed, which undoes what is not committed; the next call begins anew."""
        self.close()
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_NOTADB:
            return StoreInvalid(str(self._path), "is no SQLite file")
        if committing and code & 0xFF == sqlite3.SQLITE_IOERR:
            return DeliveryUnknown(f"{self._path}: its disk failed in the commit ({error}); it may be stored")
        reason = _REASONS.get(code) or _REASONS.get(code & 0xFF) or "it can't be used"
        return StoreUnavailable(f"{self._path}: {reason} ({error}). Nothing was stored")

    def check(self, connection: sqlite3.Connection) -> None:
        """Nobody has given it other partitions since.

        Raises:
            StoreInvalid: somebody has; what is partitioned by the old number would not be found.
        """
        (has,) = connection.execute("SELECT partitions FROM outbox").fetchone()
        if has != self.partitions:
            problem = f"has {has} partitions now, and had {self.partitions} when it was opened; open it again"
            raise StoreInvalid(str(self._path), problem)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not self._create and not self._path.exists():
            raise StoreInvalid(str(self._path), "there is no such file")
        connection = sqlite3.connect(self._path, timeout=POLL, isolation_level=None)
        try:
            (mode,) = _patiently(connection, "PRAGMA journal_mode").fetchone()
            if mode == "wal":  # to change it here would do so under the feet of others
                problem = (
                    "is in WAL mode, which can damage it in many versions of SQLite: run PRAGMA journal_mode=DELETE"
                )
                raise StoreInvalid(str(self._path), problem)
            _patiently(connection, "PRAGMA journal_mode=PERSIST")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")  # on macOS a plain fsync does not reach the disk
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, connection: sqlite3.Connection, partitions: int | None) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION and (tables or application or version):
            raise StoreInvalid(str(self._path), "is a database of something else; give the outbox a file of its own")
        if version > len(MIGRATIONS):
            problem = f"has schema version {version}, and this silbo knows {len(MIGRATIONS)}: update silbo"
            raise StoreInvalid(str(self._path), problem)
        if not version and not self._create:
            raise StoreInvalid(str(self._path), "is empty, no outbox")
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        if version < len(MIGRATIONS):
            connection.execute(f"PRAGMA application_id={APPLICATION}")
            connection.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
        if not version:
            connection.execute("INSERT INTO outbox (id, partitions) VALUES (?, ?)", (uuid4().hex, partitions or 1))
        self.id, self.partitions = self._partitioned(connection, partitions)

    def _partitioned(self, connection: sqlite3.Connection, partitions: int | None) -> tuple[str, int]:
        identity, has, rows = connection.execute("SELECT id, partitions, rows FROM outbox").fetchone()
        if partitions not in (None, has):
            (leads,) = connection.execute(
                "SELECT count(*) FROM partition WHERE owner IS NOT NULL AND until > ?", (now(),)
            ).fetchone()
            in_use = f"{rows} messages wait in it" if rows else "a relay runs on it" if leads else ""
            if in_use:
                problem = (
                    f"has {has} partitions and {in_use}; send them all and stop its relays before it has {partitions}"
                )
                raise StoreInvalid(str(self._path), problem)
            connection.execute("UPDATE outbox SET partitions = ?", (partitions,))
            has = partitions
        known = [(partition,) for partition in range(has)]
        connection.executemany("INSERT OR IGNORE INTO partition (partition) VALUES (?)", known)
        return identity, has


def _patiently(connection: sqlite3.Connection, statement: str) -> sqlite3.Cursor:
    """Execute what needs a lock, however busy the other processes are: left to itself, SQLite would starve beside them."""
    deadline = monotonic() + LOCKED
    while True:
        try:
            return connection.execute(statement)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise
