"""The outbox's store in the host's own database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, Literal

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.pool import StaticPool

from silbo.errors import DeliveryUnknown, OutboxFull, SilboError, StoreInvalid, StoreUnavailable
from silbo.outbox.rows import NOTHING, Lead, OutboxStatus, Packed, Quota, Row, State
from silbo.stores._group_commit import Call, GroupCommit
from silbo.stores.sqlalchemy import statements as sql
from silbo.stores.sqlalchemy import tables
from silbo.stores.sqlalchemy.inserts import Fill, at_commit, connection_of, lines_of, lock, store
from silbo.stores.sqlalchemy.session import session_in_turn, session_or_none

__all__ = ["SQLAlchemyStore"]

ANSWER: Final = 10.0
"""Seconds that the database has for a transaction of ours, a lock that somebody else holds included."""


class SQLAlchemyStore:
    """Keeps messages in the host's database.

    Within :func:`in_session`, and through ``outbox.add(session, ...)``, messages are stored in the transaction of that
    session, which is the host's to commit: they are committed with the host's own changes, or not at all. Other publishes
    commit a transaction of their own.

    The tables are silbo's ``metadata``, for the host's migrations; :meth:`create` makes them without. They are looked for
    in the schema that the connections begin with (PostgreSQL's ``search_path``).

    The quota is approximate: what other processes have stored in the last seconds may not be counted. What is sent and
    kept for a replay doesn't count.

    Args:
        engine: The host's, which stays the host's to dispose. PostgreSQL, or SQLite 3.35 or later.

    Raises:
        StoreInvalid: another database.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        name = engine.dialect.name
        if name not in ("postgresql", "sqlite"):
            raise StoreInvalid(str(engine.url), f"an outbox can be in PostgreSQL or SQLite, not in {name}")
        if isinstance(engine.pool, StaticPool):
            problem = "has one connection for everybody, so that each commit is everybody's: use a file"
            raise StoreInvalid(str(engine.url), problem)
        self.id, self.partitions = "", 0
        self._locks = name == "postgresql"
        # Whatever the host's default is: what is committed while we wait for a lock has to be seen after it.
        self._engine = engine.execution_options(isolation_level="READ COMMITTED") if self._locks else engine
        self._fill, self._group = Fill(), GroupCommit(self._store)
        self.on_commit: Callable[[], object] | None = None
        self._open = False

    async def create(self) -> None:
        """Make the tables that are missing; for hosts without migrations. Changes none that are there."""
        async with self._transaction() as connection:
            await tables.create(connection)

    async def open(self, partitions: int | None = None) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`. Makes no tables.

        Raises:
            StoreInvalid: also where the tables are missing, or of another version: with what to do.
        """
        async with self._transaction() as connection:
            await tables.check(connection, tables.outbox, tables.partition, tables.message)
        async with self._transaction() as connection:
            self.id, self.partitions = await tables.open_store(connection, partitions)
        self._open = True

    @property
    def in_session(self) -> bool:
        """Whether an :func:`in_session` is around the caller."""
        return session_or_none() is not None

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store in the session of the :func:`in_session` around the caller, else in a transaction of its own.

        See :class:`~silbo.outbox.rows.OutboxStore`. In a session it is the host that commits, and the session's own errors
        come out.
        """
        async with session_in_turn() as session:
            if session is not None:
                await self.add_in(session, messages, quota)
            elif messages:
                self._check_open()
                await self._group.add(messages, quota)

    async def add_in(self, session: AsyncSession, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.SessionStore`.

        Raises:
            ValueError: the session is another database's.
            StoreInvalid: the store has other partitions by now.
        """
        self._check_open()
        if not isinstance(session, AsyncSession):
            raise TypeError(f"messages are stored in an AsyncSession of SQLAlchemy's, not in {session!r}")
        if not messages:
            return
        engine = self._engine.sync_engine
        connection = await connection_of(session, engine.pool, engine.url)
        await self._fill.look(connection, [(messages, quota)])
        self._fill.take(messages, quota)
        rows = await store(connection, messages, self.partitions)
        lines = lines_of(messages) if self._locks else ()
        at_commit(session.sync_session, rows, lines, self.on_commit)

    async def _store(self, calls: Sequence[Call]) -> Sequence[OutboxFull | None]:
        """Commit what waits together, as far as the quota of each call allows."""
        answers: list[OutboxFull | None] = []
        async with self._transaction(unknown=True) as connection:
            messages: list[Packed] = []
            await tables.begin(connection)
            await self._fill.look(connection, [(call.messages, call.quota) for call in calls])
            for call in calls:
                try:
                    self._fill.take(call.messages, call.quota)
                except OutboxFull as full:
                    answers.append(full)
                else:
                    answers.append(None)
                    messages += call.messages
            if self._locks and (lines := lines_of(messages)):
                await lock(connection, lines)
            if messages:
                await store(connection, messages, self.partitions)
        return answers

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.lead(connection, partition, owner, lease, above)

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            await sql.resign(connection, lead)

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        if not sent and not dead:
            async with self._transaction() as connection:
                if not await sql.due(connection, lead):
                    return ()
        async with self._transaction() as connection:
            return await sql.take(connection, lead, limit, sent, dead)

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            await sql.settle(connection, lead, sent, dead)

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            await sql.postpone(connection, lead, rows, error, delay)

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            await sql.renumber(connection, lead, above)

    async def forget(self, *, retain: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.forget(connection, retain, limit)

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.status(connection, self.partitions)

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.rows(connection, state, after, limit)

    async def retry(self, rows: Collection[int] | None = None) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.retry(connection, rows)

    async def replay(self, *, since: datetime, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.replay(connection, since, before, limit)

    async def purge(self, state: Literal["sent", "dead"], *, before: datetime, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        async with self._transaction() as connection:
            return await sql.purge(connection, state, before, limit)

    async def aclose(self) -> None:
        """Finish what is under way; the engine stays open. May be called twice."""
        await self._group.finish()
        self._open = False

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError(f"{self._engine.url} is not open: use the outbox in an 'async with'")

    @asynccontextmanager
    async def _transaction(self, *, unknown: bool = False) -> AsyncGenerator[AsyncConnection]:
        """One of the store's own. With ``unknown``, an unanswered commit is told apart from one that failed."""
        connected = committing = False
        try:
            async with asyncio.timeout(ANSWER), self._engine.connect() as connection:
                connected = True
                yield connection
                committing = True
                await connection.commit()
        except SilboError:
            raise
        except Exception as error:
            answered = isinstance(error, DBAPIError) and not error.connection_invalidated
            if unknown and committing and not answered:
                raise DeliveryUnknown(f"{self._engine.url}: {_text(error)}; the commit was not answered") from error
            away = (DBAPIError, NoConnection, OSError)
            if connected and not isinstance(error, away):  # before, it is whatever the driver raises
                raise
            raise StoreUnavailable(f"{self._engine.url}: {_text(error)}; nothing was stored") from error


def _text(error: Any) -> str:
    cause = getattr(error, "orig", None) or error
    return str(cause) or (f"no answer within {ANSWER:g} s" if isinstance(cause, TimeoutError) else repr(cause))
