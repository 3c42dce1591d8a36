"""The connection to an outbox's SQLite file: locks, transactions, and errors with their reasons.

Only the store's own thread may use it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, TypeVar

from silbo.errors import DeliveryUnknown, StoreInvalid, StoreUnavailable
from silbo.outbox.rows import LEASE
from silbo.stores.sqlite.schema import open_schema

__all__ = ["FileConnection"]

T = TypeVar("T")

LOCK_TIMEOUT: Final = 10.0
"""Seconds to wait for a lock that another process holds."""
BUSY_TIMEOUT: Final = 0.005
"""Seconds that SQLite itself waits for a lock. With more, SQLite sleeps longer and longer between its tries."""
MOVED: Final = "it was moved, replaced or deleted while it was open; the next call opens it anew"

REASONS: Final = {
    sqlite3.SQLITE_BUSY: f"another process has held its lock for {LOCK_TIMEOUT:g} s; look for a long transaction in it",
    sqlite3.SQLITE_FULL: "its disk is full; make room",
    sqlite3.SQLITE_READONLY: "it is read-only; this process has to be able to write the file and its folder",
    sqlite3.SQLITE_READONLY_DBMOVED: MOVED,
    sqlite3.SQLITE_IOERR_FSTAT: MOVED,
    sqlite3.SQLITE_CANTOPEN: "it can't be opened; its folder has to be there, and writable for this process",
    sqlite3.SQLITE_IOERR: "its disk can't be read or written, or is full",
    sqlite3.SQLITE_CORRUPT: "it is damaged; put it aside, or a copy of it in its place",
}
"""The text of an error, by SQLite's extended or primary result code."""


class FileConnection:
    """One connection to a file. After an error it is closed, and the next transaction opens the file anew.

    Args:
        path: Of the file.
        create: Make the file if it does not exist.

    Attributes:
        id: The outbox's id; empty until the file was opened.
        partitions: The number of the outbox's partitions; 0 until the file was opened.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.id = ""
        self.partitions = 0
        self._path = path
        self._create = create
        self._connection: sqlite3.Connection | None = None

    def open(self, partitions: int | None, lease: float = LEASE) -> None:
        """Connect, and bring the schema to this version's.

        Args:
            partitions: The number that the outbox is to have; None keeps the file's number, or takes 1 for a new file.
            lease: See :meth:`OutboxStore.open <silbo.outbox.rows.OutboxStore.open>`.

        Raises:
            StoreInvalid: the file is missing (without ``create``), no outbox, of a newer schema, in WAL mode, or has
                another number of partitions that rows or a relay still use.
            StoreUnavailable: the file can't be used at the moment; safe to repeat.
        """
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as error:
            raise self._close_after(error) from error
        try:
            self.id, self.partitions, problem = self.run(
                lambda connection: open_schema(
                    connection, self._path, create=self._create, partitions=partitions, lease=lease
                )
            )
            if problem:  # only now: the lease that was cut is committed
                raise StoreInvalid(str(self._path), problem)
        except StoreInvalid:
            self.close()
            raise

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run work in a transaction that is committed at its end, and rolled back if the work fails.

        The write lock is taken at the beginning, so that two transactions never wait for one another.

        Raises:
            StoreUnavailable: nothing was changed; safe to repeat.
            DeliveryUnknown: the disk failed in the commit; either everything was changed or nothing.
        """
        if self._connection is None:
            self.open(self.partitions)  # perhaps another file now: replaced, restored
        assert self._connection is not None
        committing = False
        try:
            _execute_locking(self._connection, "BEGIN IMMEDIATE")
            result = work(self._connection)
            committing = True
            _execute_locking(self._connection, "COMMIT")
        except sqlite3.DatabaseError as error:
            raise self._close_after(error, committing=committing) from error
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        return result

    def _close_after(self, error: sqlite3.DatabaseError, *, committing: bool = False) -> Exception:
        """Close the connection, which undoes what is not committed. Return silbo's error for SQLite's."""
        self.close()
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_NOTADB:
            return StoreInvalid(str(self._path), "is no SQLite file")
        if committing and code & 0xFF == sqlite3.SQLITE_IOERR:
            return DeliveryUnknown(f"{self._path}: its disk failed in the commit ({error}); it may be stored")
        reason = REASONS.get(code) or REASONS.get(code & 0xFF) or "it can't be used"
        return StoreUnavailable(f"{self._path}: {reason} ({error}). Nothing was stored")

    def check_partitions(self, connection: sqlite3.Connection) -> None:
        """Check that no other process has changed the number of partitions since the file was opened.

        Raises:
            StoreInvalid: the number was changed. Relays would look for messages of the old number in other partitions.
        """
        (has,) = connection.execute("SELECT partitions FROM outbox").fetchone()
        if has != self.partitions:
            problem = f"has {has} partitions now, and had {self.partitions} when it was opened; open it again"
            raise StoreInvalid(str(self._path), problem)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        connection = self._connection
        self._connection = None
        if connection is not None:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        if not self._create and not self._path.exists():
            raise StoreInvalid(str(self._path), "there is no such file")
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None)
        # A damaged text would otherwise make a read of all rows fail.
        connection.text_factory = partial(str, encoding="utf-8", errors="backslashreplace")
        try:
            is_other = "SELECT 1 FROM sqlite_master WHERE name = 'silbo_outbox'"
            if _execute_locking(connection, is_other).fetchone():
                problem = f"is the outbox of a SQLAlchemyStore: its URL is sqlite+aiosqlite:///{self._path}"
                raise StoreInvalid(str(self._path), problem)
            (mode,) = _execute_locking(connection, "PRAGMA journal_mode").fetchone()
            if mode == "wal":  # not changed here: other processes may have the file open in this mode
                problem = (
                    "is in WAL mode, which can damage it in many versions of SQLite: run PRAGMA journal_mode=DELETE"
                )
                raise StoreInvalid(str(self._path), problem)
            _execute_locking(connection, "PRAGMA journal_mode=PERSIST")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA fullfsync=ON")  # on macOS a plain fsync does not reach the disk
        except BaseException:
            connection.close()
            raise
        return connection


def _execute_locking(connection: sqlite3.Connection, statement: str) -> sqlite3.Cursor:
    """Execute a statement that needs a lock, trying again for ``LOCK_TIMEOUT`` seconds.

    SQLite's own waiting would get no lock as long as busier processes take it again and again.
    """
    deadline = monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return connection.execute(statement)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                raise
