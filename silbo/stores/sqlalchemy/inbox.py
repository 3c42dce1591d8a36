"""An inbox in the host's own database, in the same transaction as the changes that listeners make there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count
from typing import Any, Final, cast

from sqlalchemy import CursorResult, Dialect, Insert, delete, func, select, tuple_
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from silbo._checks import check_seconds
from silbo._loops import LoopBinding
from silbo.errors import MessageInvalid, StoreUnavailable
from silbo.stores.sqlalchemy.dialect import (
    ZONED,
    insert_missing,
    is_refusal_of_data,
    read_clock,
    without_locked_rows,
)
from silbo.stores.sqlalchemy.session import in_session
from silbo.stores.sqlalchemy.tables import create_tables, inbox

__all__ = ["SQLAlchemyInbox"]

PURGE_EVERY: Final = 100
"""Deliveries between two calls of ``purge``; one call deletes many more publications than are stored in between."""
PURGE_LIMIT: Final = 1000
"""Publications that one call of ``purge`` deletes, at most."""


class SQLAlchemyInbox:
    """Remembers handled publications in the transaction in which their listeners work: effectively once.

    Each delivery gets a session of its own, which its listeners get from :func:`current_session`. The session is committed
    when all listeners have run, and rolled back if one of them fails. So the changes that listeners make in this session
    take effect once, however often the delivery comes. That can't be promised for what listeners do elsewhere, such as
    sending a mail. Events that listeners dispatch go into an outbox on the same database, in the same transaction.

    A listener must not commit, and must not swallow an error of the database::

        sessions = async_sessionmaker(engine, expire_on_commit=False)
        async with Consumer(dispatcher, streams.group("billing", start="new"), inbox=SQLAlchemyInbox(sessions)) as consumer:
            await consumer.run()

    Args:
        sessions: The host's ``async_sessionmaker``, or its engine. A session's transaction lasts as long as the listeners
            run; SQLite has one such transaction at a time.
        keep: Seconds for which a publication is remembered, more than 0 and at most fifty years. Take more than the time after which a delivery
            may still come again: with the retention of the stream itself, every delivery that comes again is known.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession] | AsyncEngine, *, keep: float = 7 * 86400.0) -> None:
        self._sessions = (
            async_sessionmaker(sessions, expire_on_commit=False) if isinstance(sessions, AsyncEngine) else sessions
        )
        self._keep = check_seconds("keep", keep)
        self._handled = count()
        self._binding = LoopBinding("SQLAlchemyInbox")

    async def create(self) -> None:
        """Make all of silbo's tables that are missing; for hosts without migrations."""
        async with self._sessions() as session, session.begin():
            await create_tables(await session.connection(bind_arguments={"clause": inbox}))

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncGenerator[bool]:
        """See :class:`~silbo.protocols.Inbox`. A second consumer of the same publication waits for the first.

        Raises:
            StoreUnavailable: the database can't be used; safe to repeat. The listeners' own errors pass unchanged.
            MessageInvalid: the database refuses this publication, now and whenever it comes again: it has a NUL, is too long
                for an index, or fails a constraint of the host's.
            LoopConflict: another event loop uses the inbox.
        """
        self._binding.enter("handling")
        step = "enter"
        try:
            if next(self._handled) % PURGE_EVERY == 0:
                await self.purge()
            async with self._sessions() as session, session.begin() as transaction:
                dialect = session.get_bind(clause=inbox).dialect
                new = await self._remember(session, dialect, group, publication)
                step = "listen"
                with in_session(session):
                    yield new
                step = "leave"
                # Fails if a listener has ended the transaction; and in a failed one, whose commit PostgreSQL takes for a
                # rollback without an error.
                if new and (dialect.name == "postgresql" or not transaction.is_active):
                    await session.execute(select(1), bind_arguments={"clause": inbox})
        except Exception as error:
            lost = isinstance(error, OSError) or (isinstance(error, DBAPIError) and error.connection_invalidated)
            if step == "enter" and is_refusal_of_data(error):
                problem = f"the inbox's database refuses its publication: {error}"
                raise MessageInvalid(problem, field="headers.publication") from error
            if step == "enter" or (step == "leave" and lost):
                raise StoreUnavailable(f"the inbox can't be used: {error}") from error
            raise

    async def purge(self, *, limit: int = PURGE_LIMIT) -> int:
        """Forget the oldest publications that were handled more than ``keep`` seconds ago, at most ``limit``.

        The inbox calls this itself while deliveries come.

        Returns:
            The number of publications that were forgotten.
        """
        async with self._sessions() as session, session.begin():
            connection = await session.connection(bind_arguments={"clause": inbox})
            before = await read_clock(connection) - timedelta(seconds=self._keep)
            key = (inbox.c.consumer_group, inbox.c.publication)
            oldest = select(*key).where(inbox.c.handled_at < before).order_by(inbox.c.handled_at).limit(limit)
            chosen = tuple_(*key).in_(without_locked_rows(oldest, connection))
            return (await connection.execute(delete(inbox).where(chosen))).rowcount

    async def _remember(self, session: AsyncSession, dialect: Dialect, group: str, publication: str) -> bool:
        """Store a publication of a group. Return True if it is new."""
        row: dict[str, Any] = {"consumer_group": group, "publication": publication}
        if dialect.name != "postgresql":  # SQLite has no clock but this machine's
            row["handled_at"] = datetime.now(UTC)
        # By the session: its connection would have to be asked for first, in a call that takes a tenth of the whole.
        stored = await session.execute(_store_publication(dialect.name), row, bind_arguments={"clause": inbox})
        return cast("CursorResult[Any]", stored).rowcount == 1


@cache  # to make it anew for each delivery takes a tenth of the whole
def _store_publication(dialect_name: str) -> Insert:
    """Return the statement that stores a publication; on PostgreSQL with the time of its clock."""
    statement = insert_missing(dialect_name, inbox)
    if dialect_name == "postgresql":
        return statement.values(handled_at=func.statement_timestamp(type_=ZONED))
    return statement
