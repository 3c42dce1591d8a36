"""The outbox's store in the host's own database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.pool import StaticPool

from silbo._loops import LoopBinding, describe_lookup
from silbo._read_budget import ReadBudget
from silbo.errors import DeliveryUnknown, MessageRefused, OutboxFull, SilboError, StoreInvalid, StoreUnavailable
from silbo.outbox.rows import LEASE, NOTHING, Lead, OutboxStatus, Packed, Quota, Roster, Row, State, View, unpack
from silbo.stores._group_commit import Addition, GroupCommit
from silbo.stores.sqlalchemy import statements as sql
from silbo.stores.sqlalchemy.commit_order import key_locks_of, lock_keys, order_at_commit
from silbo.stores.sqlalchemy.dialect import begin_writing, check_constraints, is_refusal_of_data, read_clock
from silbo.stores.sqlalchemy.notifications import check_driver, listen, notify
from silbo.stores.sqlalchemy.quota import QuotaEstimate
from silbo.stores.sqlalchemy.session import find_session, lock_session
from silbo.stores.sqlalchemy.status import read_status
from silbo.stores.sqlalchemy.tables import check_tables, create_tables, message, outbox, partition, relay
from silbo.stores.sqlalchemy.urls import describe_url

__all__ = ["SQLAlchemyStore"]

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT: Final = 10.0
"""Seconds that the database has for one transaction of the store, including the wait for locks of others."""


class SQLAlchemyStore:
    """Keeps messages in the host's database.

    Within :func:`in_session`, and through ``outbox.add(session, ...)``, messages are stored in the transaction of that
    session, which the host commits: they are committed with the host's own changes, or not at all. Every other publish
    commits a transaction of its own.

    The tables are in silbo's ``metadata``, for the host's migrations; without migrations, :meth:`create` makes them. They
    are looked for in the first schema of the connections (PostgreSQL's ``search_path``).

    The quota is approximate: messages that other processes have stored in the last seconds may not be counted. Sent
    messages that are kept for a replay don't count.

    Args:
        engine: The host's engine, which the host disposes of. PostgreSQL, or SQLite 3.35 or later.
        notify: True lets a relay hear of each commit at once, by PostgreSQL's ``NOTIFY``, which lets one transaction of the
            whole server commit at a time. Give it to the programs that store and to the relay; asyncpg only. A relay keeps
            one connection for it. A relay that does not hear looks often enough.

    Raises:
        StoreInvalid: the engine is for another database or driver, or has one connection for everybody.
    """

    def __init__(self, engine: AsyncEngine, *, notify: bool = False) -> None:
        name = engine.dialect.name
        if name not in ("postgresql", "sqlite"):
            raise StoreInvalid(describe_url(engine.url), f"an outbox can be in PostgreSQL or SQLite, not in {name}")
        if isinstance(engine.pool, StaticPool):
            problem = "has one connection for everybody, so that each commit is everybody's: use a file"
            raise StoreInvalid(describe_url(engine.url), problem)
        if notify:
            check_driver(engine)
        self.id = ""
        self.partitions = 0
        self.notifies = notify
        self.on_commit: Callable[[], object] | None = None
        self._locks_keys = name == "postgresql"
        # Whatever the host's default is: after the wait for a lock, the store must see what was committed meanwhile.
        self._engine = engine.execution_options(isolation_level="READ COMMITTED") if self._locks_keys else engine
        self._estimate = QuotaEstimate()
        self._read_budget = ReadBudget()
        self._group_commit = GroupCommit(self._add)
        self._binding = LoopBinding(
            "SQLAlchemyStore", is_busy=lambda: self._group_commit.is_busy, forget=self._group_commit.forget
        )
        self._due: set[int] = set()  # partitions in which a look has found rows, until they are taken
        self._is_open = False

    async def create(self) -> None:
        """Make the tables that are missing; for hosts without migrations. Tables that exist are not changed."""
        async with self._transaction() as connection:
            await create_tables(connection)

    async def open(self, partitions: int | None = None, *, lease: float = LEASE) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`. Makes no tables.

        Raises:
            StoreInvalid: also if tables are missing, or of another version; the text says what to do.
        """
        async with self._transaction() as connection:
            await check_tables(connection, outbox, partition, relay, message)
        if partitions is not None:
            await self._transact(sql.cut_leases, partitions, lease)
        self.id, self.partitions = await self._transact(sql.open_store, partitions)
        self._is_open = True

    @property
    def in_session(self) -> bool:
        """True if the calling task is inside of a block of the function ``in_session``."""
        return find_session() is not None

    async def add(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Store in the session of the :func:`in_session` block around the caller, else in a transaction of the store's own.

        See :class:`~silbo.outbox.rows.OutboxStore`. In a session the host commits, and the session's own errors are raised.
        """
        async with lock_session() as session:
            if session is not None:
                await self.add_in(session, messages, quota)
            elif messages:
                self._check_open()
                await self._group_commit.add(messages, quota, self._binding.enter("add"))

    async def add_in(self, session: AsyncSession, messages: Sequence[Packed], quota: Quota) -> None:
        """See :class:`~silbo.outbox.rows.SessionStore`.

        Raises:
            ValueError: the session is another database's.
            StoreInvalid: the store has another number of partitions by now.
            MessageRefused: the database refuses a message; PostgreSQL then takes nothing more in this transaction.
        """
        self._check_open()
        self._binding.enter("add_in")
        if not isinstance(session, AsyncSession):
            raise TypeError(f"messages are stored in an AsyncSession of SQLAlchemy's, not in {session!r}")
        if not messages:
            return
        connection = await self._connection_of(session)
        addition = Addition(messages, quota)
        await self._estimate.refresh(connection, [addition])
        self._estimate.reserve(addition)
        try:
            rows = await sql.add(connection, messages, self.partitions)
        except Exception as error:
            if not is_refusal_of_data(error):
                raise
            raise _refuse(messages[0], error) from error
        if self.notifies:
            await notify(connection)
        key_locks = key_locks_of(messages) if self._locks_keys else ()
        order_at_commit(session.sync_session, rows, key_locks, self.on_commit)

    async def _connection_of(self, session: AsyncSession) -> AsyncConnection:
        """Return the connection of a session's transaction.

        Raises:
            ValueError: the session is another database's.
        """
        connection = await session.connection(bind_arguments={"clause": message})
        theirs = connection.engine.sync_engine
        ours = self._engine.sync_engine
        if theirs.pool is not ours.pool and theirs.url != ours.url:
            raise ValueError(
                f"the session writes to {describe_url(theirs.url)}, the outbox stores in {describe_url(ours.url)}: give it a session of its database"
            )
        return connection

    async def _add(self, additions: Sequence[Addition]) -> Sequence[Exception | None]:
        """Commit the additions that their quotas allow in one transaction. See GroupCommit."""
        try:
            return await self._commit(additions, apart=False)
        except StoreUnavailable as error:
            if not is_refusal_of_data(error.__cause__, at_commit=True):
                raise
        return await self._commit(additions, apart=True)

    async def _commit(self, additions: Sequence[Addition], *, apart: bool) -> Sequence[Exception | None]:
        """Commit additions, all in one statement; or ``apart``, with a savepoint for each message that may be refused."""
        errors: list[Exception | None] = []
        stored: list[Addition] = []
        async with self._transaction(may_be_unknown=True) as connection:
            await begin_writing(connection)
            await self._estimate.refresh(connection, additions)
            for addition in additions:
                try:
                    self._estimate.reserve(addition)
                except OutboxFull as full:
                    errors.append(full)
                else:
                    errors.append(None)
                    stored.append(addition)
            messages = [message for addition in stored for message in addition.messages]
            if self.notifies:
                await notify(connection)
            if self._locks_keys and (key_locks := key_locks_of(messages)):
                await lock_keys(connection, key_locks)
            if apart:
                refusals = [await self._add_apart(connection, addition.messages) for addition in stored]
                following = iter(refusals)
                return [next(following) if error is None else error for error in errors]
            if messages:
                await sql.add(connection, messages, self.partitions)
        return errors

    async def _add_apart(self, connection: AsyncConnection, messages: Sequence[Packed]) -> MessageRefused | None:
        """Insert messages one by one. Return the error of those that the database refuses, if there are any."""
        refused: MessageRefused | None = None
        for packed in messages:
            try:
                async with connection.begin_nested():
                    await sql.add(connection, [packed], self.partitions)
                    await check_constraints(connection)
            except Exception as error:
                if not is_refusal_of_data(error):
                    raise
                refusal = _refuse(packed, error)
                if refused is None:
                    refused = refusal
                else:
                    refused.add_note(f"and in the same call: {refusal}")
        return refused

    async def lead(self, partition: int, owner: str, *, lease: float, above: int = 0) -> Lead | None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.lead, partition, owner, lease, above)

    async def resign(self, lead: Lead) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.resign, lead)

    async def join(self, owner: str, *, lease: float, idle: Collection[int] = ()) -> Roster:
        """See :class:`~silbo.outbox.rows.SharedStore`."""
        return await self._transact(sql.join, owner, lease, idle, self.partitions)

    async def leave(self, owner: str) -> None:
        """See :class:`~silbo.outbox.rows.SharedStore`."""
        await self._transact(sql.leave, owner)

    async def look(self, leads: Collection[Lead]) -> View:
        """See :class:`~silbo.outbox.rows.SharedStore`."""
        view = await self._transact(sql.look, leads, self.partitions)
        self._due.update(view.due)
        return view

    async def listen(self, heard: Callable[[], object]) -> None:
        """See :class:`~silbo.outbox.rows.SharedStore`."""
        self._binding.enter()
        try:
            await listen(self._engine, heard)
        except Exception as error:
            raise StoreUnavailable(
                f"{describe_url(self._engine.url)}: {_describe(error, self._engine.url.host)}; commits are not heard of"
            ) from error

    async def take(
        self, lead: Lead, limit: int, *, sent: Collection[int] = (), dead: Mapping[int, str] = NOTHING
    ) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        if not sent and not dead and lead.partition not in self._due:
            await self.look([lead])
            if lead.partition not in self._due:
                return ()
        self._due.discard(lead.partition)
        begun_at = time.monotonic()
        try:
            return await self._with_texts(
                lambda dead: self._transact(sql.take, lead, limit, self._read_budget.size, sent, dead), dead
            )
        finally:
            self._read_budget.note(time.monotonic() - begun_at)

    async def settle(self, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._with_texts(lambda dead: self._transact(sql.settle, lead, sent, dead), dead)

    async def postpone(self, lead: Lead, rows: Collection[int], *, error: str, delay: float) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._with_texts(lambda texts: self._transact(sql.postpone, lead, rows, texts[0], delay), {0: error})

    async def renumber(self, lead: Lead, *, above: int) -> None:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        await self._transact(sql.renumber, lead, above)

    async def forget(self, *, keep_sent: float, limit: int = 1000) -> int:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(sql.forget, keep_sent, limit)

    async def read_clock(self) -> datetime:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(read_clock)

    async def status(self) -> OutboxStatus:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        return await self._transact(read_status, self.partitions)

    async def rows(self, state: State, *, after: int = 0, limit: int = 100) -> Sequence[Row]:
        """See :class:`~silbo.outbox.rows.OutboxStore`."""
        begun_at = time.monotonic()
        try:
            return await self._transact(sql.rows, state, after, limit, self._read_budget.size)
        finally:
            self._read_budget.note(time.monotonic() - begun_at)

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
        """Commit the additions that wait; the engine stays open. May be called twice."""
        self._binding.enter("aclose")
        await self._group_commit.finish()
        self._is_open = False

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError(f"{describe_url(self._engine.url)} is not open: use the outbox in an 'async with'")

    async def _with_texts(self, transact: Callable[[Mapping[int, str]], Awaitable[T]], texts: Mapping[int, str]) -> T:
        """Run a transaction that stores texts of errors; in ASCII if the database's encoding lacks a character of them."""
        try:
            return await transact(texts)
        except StoreUnavailable as error:
            if not is_refusal_of_data(error.__cause__):
                raise
        return await transact({key: text.encode("ascii", "backslashreplace").decode() for key, text in texts.items()})

    async def _transact(
        self,
        statement: Callable[Concatenate[AsyncConnection, P], Awaitable[T]],
        *arguments: P.args,
        **options: P.kwargs,
    ) -> T:
        """Run a function of ``statements.py`` in a transaction of its own."""
        async with self._transaction() as connection:
            return await statement(connection, *arguments, **options)

    @asynccontextmanager
    async def _transaction(self, *, may_be_unknown: bool = False) -> AsyncGenerator[AsyncConnection]:
        """Run a block in a transaction of the store's own, which is committed at its end.

        Args:
            may_be_unknown: Tell a commit without an answer, after which everything may be stored, from a failed one.

        Raises:
            DeliveryUnknown: the commit was not answered. With ``may_be_unknown`` only.
            StoreUnavailable: the database can't be used, or took too long; nothing was stored.
            LoopConflict: another event loop uses the store.
        """
        self._binding.enter()
        connected = False
        committing = False
        try:
            async with asyncio.timeout(TIMEOUT), self._engine.connect() as connection:
                connected = True
                yield connection
                committing = True
                await connection.commit()
        except SilboError:
            raise
        except Exception as error:
            answered = isinstance(error, DBAPIError) and not error.connection_invalidated
            if may_be_unknown and committing and not answered:
                raise DeliveryUnknown(
                    f"{describe_url(self._engine.url)}: {_describe(error, self._engine.url.host)}; the commit was not answered"
                ) from error
            unavailable = (DBAPIError, NoConnection, OSError, UnicodeError)
            if connected and not isinstance(error, unavailable):  # while connecting, drivers raise errors of any class
                raise
            raise StoreUnavailable(
                f"{describe_url(self._engine.url)}: {_describe(error, self._engine.url.host)}; nothing was stored"
            ) from error


def _refuse(packed: Packed, error: Exception) -> MessageRefused:
    reason = getattr(error, "orig", None) or error
    refusal = MessageRefused(unpack(packed.raw).message_name, f"the database can't store it: {reason}")
    refusal.__cause__ = error
    return refusal


def _describe(error: Any, host: str | None) -> str:
    """Return the text of the driver's error; of a time limit, with its cause if that is known."""
    cause = getattr(error, "orig", None) or error
    if not str(cause) and isinstance(cause, TimeoutError):
        trouble = describe_lookup(host)
        return f"no answer within {TIMEOUT:g} s{f' ({trouble})' if trouble else ''}"
    return str(cause) or repr(cause)
