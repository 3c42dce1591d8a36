"""The durable store: an SQLite file, used by any number of processes of one machine."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from os import PathLike, fspath
from pathlib import Path
from typing import Concatenate, Final, Literal, ParamSpec, TypeVar

from silbo._loops import LoopBinding
from silbo.outbox.rows import LEASE, NOTHING, Lead, OutboxStatus, Packed, Quota, Row, State
from silbo.stores._group_commit import Addition, GroupCommit
from silbo.stores.sqlite import statements as sql
from silbo.stores.sqlite.connection import FileConnection

__all__ = ["SQLiteStore"]

P = ParamSpec("P")
T = TypeVar("T")


class SQLiteStore:
    """Keeps messages in a file. When ``add`` returns, its messages are on the disk.

    One thread and one connection; concurrent calls of ``add`` are committed together, with one flush of the disk. Written
    with ``synchronous=FULL`` and a rollback journal, not in WAL mode, which can damage a file in the SQLite versions that
    many Pythons ship (3.7.0 to 3.51.2).

    The file is not in the transaction of any other database: if a program dies between a change in its database and the
    message that it stores here, one of the two is missing. The file is as durable as its disk: a folder that is deleted
    with its container takes the messages with it. The file must not be on a network file system, whose locks SQLite can't
    rely on. A process that is frozen in the middle of a transaction keeps the file locked for the others; after 10 s they
    get StoreUnavailable.

    Args:
        path: Of the file. Beside it SQLite keeps another file, with ``-journal`` at its end, which belongs to it.
        create: Make the file if it does not exist.

    Source: https://www.sqlite.org/wal.html#walresetbug, https://www.sqlite.org/howtocorrupt.html
    """

    def __init__(self, path: str | PathLike[str], *, create: bool = True) -> None:
        if fspath(path) in ("", ":memory:"):
            raise ValueError(f"{fspath(path)!r} is no file: silbo.stores.memory.MemoryStore keeps messages in memory")
        self.path: Final = Path(fspath(path)).absolute()
        self._connection = FileConnection(self.path, create=create)  # used by the thread only
        self._thread: ThreadPoolExecutor | None = None
        self._group_commit = GroupCommit(self._add)
        self._binding = LoopBinding(
            f"SQLiteStore({str(self.path)!r})",
            is_busy=lambda: self._group_commit.is_busy,
            forget=self._group_commit.forget,
        )

    @property
    def id(self) -> str:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return self._connection.id

    @property
    def partitions(self) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return self._connection.partitions

    async def open(self, partitions: int | None = None, *, lease: float = LEASE) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        if self._thread is not None:
            raise RuntimeError(f"{self.path} is open already; each outbox and relay takes a store of its own")
        self._binding.enter("open")
        self._thread = ThreadPoolExecutor(1, "silbo-outbox")
        try:
            await self._run(lambda: self._connection.open(partitions, lease))
        except BaseException:
            await self.aclose()
            raise

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`. The messages of a cancelled call may have been stored."""
        self._check_open()
        await self._group_commit.add(messages, quota, self._binding.check("add"))

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.lead, partition, owner, lease, above)

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.resign, lead)

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.take, lead, limit, sent, dead)

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.settle, lead, sent, dead)

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.postpone, lead, rows, error, delay)

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.renumber, lead, above)

    async def forget(self, *, keep_sent: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.forget, keep_sent, limit)

    async def read_clock(self) -> datetime:
        """See :class:`~silbo.outbox.rows.OutboxStore`. The clock of this machine."""
        return sql.to_datetime(sql.read_clock())

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.status, self.partitions)

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.rows, state, after, limit)

    async def find(self, message_id: str) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.find, message_id)

    async def retry(self, rows: Collection[int] | None = None, *, after: int = 0, limit: int = 1000) -> Sequence[int]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.retry, rows, after, limit)

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.replay, since, before, limit)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.purge, state, before, limit)

    async def aclose(self) -> None:
        """Commit the additions that wait, and close the file. May be called twice."""
        self._binding.enter("aclose")
        await self._group_commit.finish()
        thread = self._thread
        self._thread = None
        if thread is not None:
            thread.submit(self._connection.close)
            try:
                # Wait for the thread with a call of its own: a cancellation may take this one back, but not the close.
                await asyncio.wrap_future(thread.submit(int))
            finally:
                thread.shutdown(wait=False)

    async def _add(self, additions: Sequence[Addition]) -> Sequence[Exception | None]:
        def add(connection: sqlite3.Connection) -> Sequence[Exception | None]:
            self._connection.check_partitions(connection)
            return sql.add(connection, additions)

        return await self._transact(add)

    # -- the thread -----------------------------------------------------------------------------------------

    async def _transact(
        self, statement: Callable[Concatenate[sqlite3.Connection, P], T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """Run a function of ``statements.py`` in the store's thread, in one transaction; an error rolls it back."""
        return await self._run(
            lambda: self._connection.run(lambda connection: statement(connection, *arguments, **options))
        )

    async def _run(self, work: Callable[[], T]) -> T:
        thread = self._check_open()
        return await asyncio.wrap_future(thread.submit(work), loop=self._binding.check())

    def _check_open(self) -> ThreadPoolExecutor:
        """Return the thread.

        Raises:
            RuntimeError: the store is not open.
        """
        if self._thread is None:
            raise RuntimeError(f"{self.path} is not open: use the outbox in an 'async with'")
        return self._thread
