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

from silbo.errors import OutboxFull, StoreUnavailable
from silbo.stored import Lead, OutboxStatus, Packed, Quota, Row, State
from silbo.stores import _sqlite as sql

__all__ = ["SQLiteStore"]

_T = TypeVar("_T")

LOCKED: Final = 10.0
"""Seconds to wait for a lock that another process holds."""


class _Call:
    """One call of ``add``, while it waits for its commit."""

    __slots__ = ("committed", "messages", "quota")

    def __init__(self, messages: Sequence[Packed], quota: Quota) -> None:
        self.messages, self.quota = messages, quota
        self.committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class SQLiteStore:
    """Keeps messages in a file. What ``add`` has returned for is on the disk.

    One thread and one connection; concurrent calls of ``add`` are committed together, with one flush of the disk. Written
    with ``synchronous=FULL`` and a rollback journal, not in WAL mode, which can damage a file in the SQLite versions that
    many Pythons ship (3.7.0 to 3.51.2).

    The file is not in the transaction of any other database: what a program writes elsewhere and what it stores here
    can part when it dies in between. It is as durable as its disk: a folder that goes with its container goes with its
    messages. It can't be on a network file system, whose locks SQLite can't rely on.

    Args:
        path: Of the file.
        create: Whether to make it where there is none.

    Source: https://www.sqlite.org/wal.html#walresetbug, https://www.sqlite.org/howtocorrupt.html
    """

    def __init__(self, path: str | PathLike[str], *, create: bool = True) -> None:
        self.path: Final = Path(fspath(path))
        self.id, self.partitions = "", 0
        self._create = create
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None  # the thread's
        self._waiting: list[_Call] = []
        self._committing: asyncio.Task[None] | None = None

    async def open(self, partitions: int | None = None) -> None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="silbo-outbox")
        try:
            self.id, self.partitions = await self._run(
                lambda connection: sql.open_store(connection, self.path, partitions)
            )
        except BaseException:
            await self.aclose()
            raise

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.protocols.OutboxStore`. A cancelled call may have been stored."""
        if self._thread is None:
            raise self._closed()
        call = _Call(messages, quota)
        self._waiting.append(call)
        if self._committing is None or self._committing.done():
            self._committing = asyncio.get_running_loop().create_task(self._commit())
        await call.committed

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.lead(connection, partition, owner, lease, above))

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        await self._change(lambda connection: sql.resign(connection, lead))

    async def take(self, lead: Lead, limit: int) -> Sequence[Row]:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.take(connection, lead, limit))

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        await self._change(lambda connection: sql.settle(connection, lead, sent, dead))

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        await self._change(lambda connection: sql.postpone(connection, lead, rows, error, delay))

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.protocols.OutboxStore`."""
        await self._change(lambda connection: sql.renumber(connection, lead, above))

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.forget(connection, retain, limit))

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._run(lambda connection: sql.status(connection, self.partitions))

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._run(lambda connection: sql.rows(connection, state, after, limit))

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.retry(connection, rows))

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.replay(connection, since, before, limit))

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.protocols.OutboxStore`."""
        return await self._change(lambda connection: sql.purge(connection, state, before, limit))

    async def aclose(self) -> None:
        """Commit what waits, and close the file. May be called twice."""
        while self._committing is not None and not self._committing.done():
            await asyncio.wait([self._committing])
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.wrap_future(thread.submit(self._disconnect))
            thread.shutdown(wait=False)  # it has nothing left to do

    # -- group commit ---------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Commit what waits together, and again while more came meanwhile."""
        while self._waiting:
            calls, self._waiting = self._waiting, []
            adding = [(call.messages, call.quota) for call in calls]
            try:
                answers = await self._change(lambda connection, adding=adding: sql.add(connection, adding))  # type: ignore[misc]
            except Exception as error:  # noqa: BLE001  # to each caller
                answers = [error] * len(calls)
            except BaseException:
                for call in [*calls, *self._waiting]:
                    call.committed.cancel()
                raise
            for call, answer in zip(calls, answers, strict=True):
                if call.committed.done():  # its caller has gone away
                    continue
                if answer is None:
                    call.committed.set_result(None)
                else:
                    call.committed.set_exception(_own(answer))

    # -- the thread -----------------------------------------------------------------------------------------

    async def _change(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do it in a transaction of its own."""
        return await self._run(lambda connection: sql.transaction(connection, work))

    async def _run(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        if self._thread is None:
            raise self._closed()
        return await asyncio.wrap_future(self._thread.submit(self._work, work))

    def _work(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        try:
            if self._connection is None:
                self._connection = sql.connect(self.path, timeout=LOCKED, create=self._create)
            return work(self._connection)
        except sqlite3.Error as error:
            if not isinstance(error, sqlite3.OperationalError | sqlite3.DatabaseError):
                raise
            self._disconnect()  # whatever is wrong with it, the next call begins anew
            raise StoreUnavailable(f"{self.path}: {error}; nothing was stored") from error

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _closed(self) -> StoreUnavailable:
        return StoreUnavailable(f"{self.path} is not open: use the outbox in an 'async with'")


def _own(answer: Exception) -> Exception:
    """An exception of each caller's own, for it gets a traceback."""
    if isinstance(answer, OutboxFull):
        return answer
    copy = type(answer)(*answer.args)
    copy.__cause__ = answer.__cause__
    return copy
