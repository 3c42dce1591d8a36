"""How messages get into the host's database: the order of their commits, and the quota."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from time import monotonic
from typing import Any, Final
from zlib import crc32

from sqlalchemy import ARRAY, BigInteger, Integer, any_, bindparam, delete, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from silbo.errors import OutboxFull, StoreInvalid
from silbo.outbox.rows import Packed, Quota
from silbo.stores.sqlalchemy.tables import LOCKS, NO_SEQUENCE, message, now, outbox, state_is

LINES: Final = 1024
"""Into so many the keys are divided for their locks, so that a transaction with very many keys does not use up
PostgreSQL's table of locks (``max_locks_per_transaction``), which is everybody's."""
COUNT_EVERY: Final = 1.0
"""Seconds between two counts of what is stored, at least."""
COUNT_SHARE: Final = 20
"""And at least so many times as long as a count takes."""

_STORED: Final = "silbo.outbox.rows"  # in a session's ``info``

# Made once: that takes as long as they do.
_LINE: Final = func.unnest(bindparam("lines", type_=ARRAY(Integer))).column_valued("line")
_LOCK: Final = select(func.pg_advisory_xact_lock(LOCKS, _LINE))
_MINE: Final = (
    delete(message).where(message.c.id == any_(bindparam("rows", type_=ARRAY(BigInteger)))).returning(message).cte()
)
_REST: Final = [column.key for column in message.columns if column is not message.c.id]
_AGAIN: Final = insert(message).from_select(_REST, select(*(_MINE.c[key] for key in _REST)).order_by(_MINE.c.id))


def lines_of(messages: Sequence[Packed]) -> set[int]:
    """Those of the messages that have a key; the others have no order to keep."""
    return {crc32(each.key.encode()) % LINES for each in messages if each.key is not None}


async def lock(connection: AsyncConnection, lines: Collection[int]) -> None:
    """Wait for every transaction that is about to commit messages of these lines; the others wait for ours.

    Always in the same order, so that no two wait for one another.
    """
    await connection.execute(_LOCK, {"lines": sorted(lines)})


async def store(connection: AsyncConnection, messages: Sequence[Packed], partitions: int) -> list[int]:
    """Insert messages, in this order; their ids.

    Raises:
        StoreInvalid: the store has other partitions by now.
    """
    has = select(outbox.c.partitions).scalar_subquery()  # read when the table is locked against a change of them
    time = now(connection.dialect)
    stored = insert(message).values(stored_at=time, state_at=time)
    inserted = await connection.execute(
        stored.returning(message.c.id, has.label("has"), sort_by_parameter_order=True),
        [_values(each) for each in messages],
    )
    rows = inserted.all()
    if any(row.has != partitions for row in rows):
        await connection.execute(delete(message).where(message.c.id.in_([row.id for row in rows])))
        problem = f"has {rows[0].has} partitions by now, not {partitions}; open it again"
        raise StoreInvalid(str(connection.engine.url), problem)
    return [row.id for row in rows]


def _values(each: Packed) -> dict[str, Any]:
    return {
        "partition": each.partition,
        "state": "pending",
        "message": each.raw.decode(),
        "size": len(each.raw),
        "attempts": 0,
        "sequence": NO_SEQUENCE,
    }


# -- in a session -------------------------------------------------------------------------------------------


class _Stored:
    """What was stored in one transaction of a session."""

    def __init__(self, transaction: SessionTransaction | None) -> None:
        self.transaction = transaction
        self.rows: list[int] = []
        self.lines: set[int] = set()
        self.committed: set[Callable[[], object]] = set()


def at_commit(
    session: Session, rows: Sequence[int], lines: Collection[int], committed: Callable[[], object] | None
) -> None:
    """Have what was stored in a session's transaction get its place in the order when that commits.

    PostgreSQL gives an id at the insert and makes the row visible at the commit. Were the lines locked from the insert on,
    every other transaction with the same key would have to wait until the end of this one, and two that store keys in
    different orders would wait for one another. So the lock and the ids that count are taken just before the commit, when
    nothing else is left to be waited for.

    Args:
        session: With the transaction.
        rows: What was stored.
        lines: Of it; none where the ids are in the right order anyway.
        committed: Called after the commit.
    """
    stored: _Stored | None = session.info.get(_STORED)
    if stored is None or stored.transaction is not session.get_transaction():
        session.info[_STORED] = stored = _Stored(session.get_transaction())
    if lines:
        stored.lines |= set(lines)
    stored.rows += rows
    if committed is not None:
        stored.committed.add(committed)
    if not event.contains(session, "before_commit", _order):
        event.listen(session, "before_commit", _order)
        event.listen(session, "after_commit", _tell)


def _order(session: Session) -> None:
    stored = _stored(session)
    if stored is None or not stored.lines:
        return
    session.flush()  # what it may wait for comes before the lines
    connection = session.connection(bind_arguments={"clause": message})
    connection.execute(_LOCK, {"lines": sorted(stored.lines)})
    connection.execute(_AGAIN, {"rows": stored.rows})


def _tell(session: Session) -> None:
    stored = _stored(session)
    if stored is not None:
        del session.info[_STORED]
        for committed in stored.committed:
            committed()


def _stored(session: Session) -> _Stored | None:
    """What is about to be committed; None also where only a savepoint ends."""
    stored: _Stored | None = session.info.get(_STORED)
    if stored is None or session.in_nested_transaction() or stored.transaction is not session.get_transaction():
        return None
    return stored


async def connection_of(session: AsyncSession, pool: object, url: object) -> AsyncConnection:
    """The connection of a session's transaction.

    Raises:
        ValueError: the session is another database's.
    """
    connection = await session.connection(bind_arguments={"clause": message})
    engine = connection.engine.sync_engine
    if engine.pool is not pool and engine.url != url:
        raise ValueError(
            f"the session writes to {engine.url}, the outbox stores in {url}: give it a session of its database"
        )
    return connection


# -- the quota ----------------------------------------------------------------------------------------------


class Fill:
    """How much waits, as far as is known: counted now and then, what this process has added since on top of it.

    So a publish is refused only on a fresh count, and accepted on one that is a second old or, in a store so large that the
    counting takes long, older. A count kept in a row would make all who store wait for one another.
    """

    def __init__(self) -> None:
        self._rows = self._size = 0
        self._count_at = 0.0

    async def look(self, connection: AsyncConnection, wanted: Sequence[tuple[Sequence[Packed], Quota]]) -> None:
        """Count anew, if that was long ago or there seems to be no room for all that is wanted."""
        rows, size = sum(len(messages) for messages, _ in wanted), sum(_size(messages) for messages, _ in wanted)
        if monotonic() >= self._count_at or not all(self._fits(rows, size, quota) for _, quota in wanted):
            await self._count(connection)

    def take(self, messages: Sequence[Packed], quota: Quota) -> None:
        """Make room for messages.

        Raises:
            OutboxFull: there is none.
        """
        rows, size = len(messages), _size(messages)
        if not self._fits(rows, size, quota):
            raise OutboxFull(self._rows, self._size, str(quota))
        self._rows += rows
        self._size += size

    def _fits(self, rows: int, size: int, quota: Quota) -> bool:
        return self._rows + rows <= quota.rows and self._size + size <= quota.size

    async def _count(self, connection: AsyncConnection) -> None:
        began = monotonic()
        counted = select(func.count(), func.coalesce(func.sum(message.c.size), 0))
        unsent = (await connection.execute(counted.where(state_is("pending", "sending")))).one()
        dead = (await connection.execute(counted.where(state_is("dead")))).one()  # each by its own index
        self._rows, self._size = unsent[0] + dead[0], int(unsent[1] + dead[1])
        took = monotonic() - began
        self._count_at = monotonic() + max(COUNT_EVERY, COUNT_SHARE * took)


def _size(messages: Sequence[Packed]) -> int:
    return sum(len(each.raw) for each in messages)
