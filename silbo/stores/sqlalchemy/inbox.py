"""An inbox in the host's own database: what listeners do there, and that it is done, are one transaction."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import count
from typing import Final

from sqlalchemy import delete, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from silbo.errors import StoreUnavailable
from silbo.stores.sqlalchemy import tables as tables
from silbo.stores.sqlalchemy.session import in_session
from silbo.stores.sqlalchemy.tables import clock, free, inbox

__all__ = ["SQLAlchemyInbox"]

PURGE_EVERY: Final = 100
"""Deliveries between two steps of purging; a step deletes many more than are stored in between."""
PURGE_LIMIT: Final = 1000


class SQLAlchemyInbox:
    """Remembers handled publications in the transaction in which their listeners work: effectively once.

    Each delivery gets a session of its own, which listeners have from :func:`current_session`. It is committed when all of
    them have run, and rolled back when one fails. What they change in it has its effect once, however often the delivery
    comes; for what they do elsewhere, as sending a mail, that can't be promised. Events that they dispatch go into an
    outbox on the same database in the same transaction.

    A listener must not commit, nor swallow an error of the database::

        sessions = async_sessionmaker(engine, expire_on_commit=False)
        async with Consumer(dispatcher, streams.group("billing", start="new"), inbox=SQLAlchemyInbox(sessions)) as consumer:
            await consumer.run()

    Args:
        sessions: The host's ``async_sessionmaker``, or its engine. The session's transaction lasts as long as the
            listeners run; SQLite has one such transaction at a time.
        keep: Seconds that a publication is remembered. Longer than a delivery may take to come again: with the stream's
            own retention nothing comes again that is forgotten here.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession] | AsyncEngine, *, keep: float = 7 * 86400.0) -> None:
        if not keep > 0:
            raise ValueError(f"keep is seconds, more than 0, not {keep!r}")
        self._sessions = (
            async_sessionmaker(sessions, expire_on_commit=False) if isinstance(sessions, AsyncEngine) else sessions
        )
        self._keep, self._handled = keep, count()

    async def create(self) -> None:
        """Make silbo's tables where they are missing; for hosts without migrations."""
        async with self._sessions() as session, session.begin():
            await tables.create(await session.connection(bind_arguments={"clause": inbox}))

    @asynccontextmanager
    async def handling(self, group: str, publication: str) -> AsyncGenerator[bool]:
        """See :class:`~silbo.protocols.Inbox`. A second consumer of the same publication waits for the first.

        Raises:
            StoreUnavailable: the database can't be used; safe to repeat. Errors of the listeners' own come out as they are.
        """
        step = "enter"
        try:
            if next(self._handled) % PURGE_EVERY == 0:
                await self.purge()
            async with self._sessions() as session, session.begin():
                new = await self._remember(session, group, publication)
                step = "listen"
                with in_session(session):
                    yield new
                step = "leave"
                if new:  # PostgreSQL takes the commit of a failed transaction for a rollback, and says nothing
                    await session.execute(select(1))
        except Exception as error:
            lost = isinstance(error, OSError) or (isinstance(error, DBAPIError) and error.connection_invalidated)
            if step == "enter" or (step == "leave" and lost):
                raise StoreUnavailable(f"the inbox can't be used: {error}") from error
            raise

    async def purge(self, *, limit: int = PURGE_LIMIT) -> int:
        """Forget the oldest publications that were handled more than ``keep`` seconds ago; how many, at most ``limit``.

        Done by itself while deliveries come.
        """
        async with self._sessions() as session, session.begin():
            connection = await session.connection(bind_arguments={"clause": inbox})
            before = await clock(connection) - timedelta(seconds=self._keep)
            key = (inbox.c.consumer_group, inbox.c.publication)
            oldest = select(*key).where(inbox.c.handled_at < before).order_by(inbox.c.handled_at).limit(limit)
            its = tuple_(*key).in_(free(oldest, connection))
            return (await connection.execute(delete(inbox).where(its))).rowcount

    async def _remember(self, session: AsyncSession, group: str, publication: str) -> bool:
        connection = await session.connection(bind_arguments={"clause": inbox})
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        row = {"consumer_group": group, "publication": publication, "handled_at": await clock(connection)}
        return (await connection.execute(insert(inbox).values(row).on_conflict_do_nothing())).rowcount == 1
