"""The durable store: an SQLite file, used by any number of processes of one machine."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from os import PathLike, fspath
from pathlib import Path
from typing import Final, Literal, TypeVar

from silbo.outbox.rows import NOTHING, Lead, OutboxStatus, Packed, Quota, Row, State
from silbo.stores._group_commit import Call, GroupCommit
from silbo.stores.sqlite import statements as sql
from silbo.stores.sqlite.file import SQLiteFile

__all__ = ["SQLiteStore"]

_T = TypeVar("_T")


class SQLiteStore:
    """Keeps messages in a file. What ``add`` has returned for is on the disk.

    One thread and one connection; concurrent calls of ``add`` are committed together, with one flush of the disk. Written
    with ``synchronous=FULL`` and a rollback journal, not in WAL mode, which can damage a file in the SQLite versions that
    many Pythons ship (3.7.0 to 3.51.2).

    The file is not in the transaction of any other database: what a program writes elsewhere and what it stores here
    can part when it dies in between. It is as durable as its disk: a folder that goes with its container goes with its
    messages. It can't be on a network file system, whose locks SQLite can't rely on. A process that is frozen in the
    middle of a transaction keeps the file locked for the others; after 10 s of that they get StoreUnavailable.

    Args:
        path: Of the file. Beside it there is another, with ``-journal`` at its end, which belongs to it.
        create: Whether to make it where there is none.

    Source: https://www.sqlite.org/wal.html#walresetbug, https://www.sqlite.org/howtocorrupt.html
    """

    def __init__(self, path: str | PathLike[str], *, create: bool = True) -> None:
        if fspath(path) in ("", ":memory:"):
            raise ValueError(f"{fspath(path)!r} is no file: silbo.stores.memory.MemoryStore keeps messages in memory")
        self.path: Final = Path(fspath(path)).absolute()
        self._file = SQLiteFile(self.path, create=create)  # the thread's
        self._thread: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._group = GroupCommit(self._store)

    @property
    def id(self) -> str:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return self._file.id

    @property
    def partitions(self) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return self._file.partitions

    async def open(self, partitions: int | None = None) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        if self._thread is not None:
            raise RuntimeError(f"{self.path} is open already; each outbox and relay takes a store of its own")
        self._thread, self._loop = ThreadPoolExecutor(1, "silbo-outbox"), asyncio.get_running_loop()
        try:
            await self._run(lambda: self._file.open(partitions))
        except BaseException:
            await self.aclose()
            raise

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`. A cancelled call may have been stored."""
        self._check()
        await self._group.add(messages, quota)

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.lead(connection, partition, owner, lease, above))

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._change(lambda connection: sql.resign(connection, lead))

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.take(connection, lead, limit, sent, dead))

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._change(lambda connection: sql.settle(connection, lead, sent, dead))

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._change(lambda connection: sql.postpone(connection, lead, rows, error, delay))

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._change(lambda connection: sql.renumber(connection, lead, above))

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.forget(connection, retain, limit))

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.status(connection, self.partitions))

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.rows(connection, state, after, limit))

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.retry(connection, rows))

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.replay(connection, since, before, limit))

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._change(lambda connection: sql.purge(connection, state, before, limit))

    async def aclose(self) -> None:
        """Commit what waits, and close the file. May be called twice."""
        await self._group.finish()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(self._file.close)
            try:
                await asyncio.wrap_future(thread.submit(int))  # to wait for; a cancellation may take this one back
            finally:
                thread.shutdown(wait=False)

    async def _store(self, calls: Sequence[Call]) -> Sequence[Exception | None]:
        adding = [(call.messages, call.quota) for call in calls]
        return await self._change(lambda connection: self._add(connection, adding))

    def _add(
        self, connection: sqlite3.Connection, calls: Sequence[tuple[Sequence[Packed], Quota]]
    ) -> Sequence[Exception | None]:
        self._file.check(connection)
        return sql.add(connection, calls)

    # -- the thread -----------------------------------------------------------------------------------------

    async def _change(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it in a transaction of its own."""
        return await self._run(lambda: self._file.transaction(work))

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.wrap_future(self._check().submit(work))

    def _check(self) -> ThreadPoolExecutor:
        if self._thread is None:
            raise RuntimeError(f"{self.path} is not open: use the outbox in an 'async with'")
        if asyncio.get_running_loop() is not self._loop:  # a child process that was forked has another loop, too
            raise RuntimeError(f"{self.path} was opened in another event loop or process; make a store in each")
        return self._thread
