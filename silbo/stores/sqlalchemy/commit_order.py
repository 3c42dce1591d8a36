"""The order of messages in PostgreSQL: messages of one key get their ids in the order in which they are committed.

PostgreSQL gives an id at the insert, and makes the row visible at the commit: a relay could send the later of two
messages first. So each key has an advisory lock, which a transaction takes just before its commit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final
from zlib import crc32

from sqlalchemy import ARRAY, BigInteger, Integer, any_, bindparam, delete, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import Session, SessionTransaction

from silbo.outbox.rows import Packed
from silbo.stores.sqlalchemy.tables import ADVISORY_LOCKS, message

__all__ = ["key_locks_of", "lock_keys", "order_at_commit"]

KEY_LOCKS: Final = 1024
"""Keys share this many advisory locks. A lock for each key could use up PostgreSQL's table of locks
(``max_locks_per_transaction``), which all transactions share."""

_INFO: Final = "silbo.outbox.rows"  # the key of _SessionRows in a session's ``info``

# Made once: to make them takes as long as to execute them.
_KEY_LOCK: Final = func.unnest(bindparam("key_locks", type_=ARRAY(Integer))).column_valued("key_lock")
_LOCK_KEYS: Final = select(func.pg_advisory_xact_lock(ADVISORY_LOCKS, _KEY_LOCK))
_DELETED: Final = (
    delete(message).where(message.c.id == any_(bindparam("rows", type_=ARRAY(BigInteger)))).returning(message).cte()
)
_COLUMNS: Final = [column.key for column in message.columns if column is not message.c.id]
_INSERT_AGAIN: Final = insert(message).from_select(
    _COLUMNS, select(*(_DELETED.c[key] for key in _COLUMNS)).order_by(_DELETED.c.id)
)


def key_locks_of(messages: Sequence[Packed]) -> set[int]:
    """Return the numbers of the locks of the messages' keys. Messages without a key have no order, and need no lock."""
    return {crc32(each.key.encode()) % KEY_LOCKS for each in messages if each.key is not None}


async def lock_keys(connection: AsyncConnection, key_locks: Collection[int]) -> None:
    """Wait for every transaction that is about to commit messages of these keys; the others wait for this transaction.

    The locks are always taken in the same order, so that no two transactions wait for one another.
    """
    await connection.execute(_LOCK_KEYS, {"key_locks": sorted(key_locks)})


class _SessionRows:
    """The rows that were stored in one transaction of a session."""

    def __init__(self, transaction: SessionTransaction | None) -> None:
        self.transaction = transaction
        self.ids: list[int] = []
        self.key_locks: set[int] = set()
        self.on_commit: set[Callable[[], object]] = set()


def order_at_commit(
    session: Session, rows: Sequence[int], key_locks: Collection[int], on_commit: Callable[[], object] | None
) -> None:
    """Give the rows of a session's transaction their final ids just before the commit.

    If the keys were locked from the insert on, every other transaction with the same key would wait until the end of this
    transaction, and two that store keys in different orders would wait for one another. So the locks are taken, and the
    rows inserted again with new ids, when the commit has nothing else left to wait for.

    Args:
        session: With the transaction.
        rows: Ids of the rows that were stored.
        key_locks: Of their keys; empty if the ids are in the right order anyway.
        on_commit: Called after the commit.
    """
    stored: _SessionRows | None = session.info.get(_INFO)
    if stored is None or stored.transaction is not session.get_transaction():
        session.info[_INFO] = stored = _SessionRows(session.get_transaction())
    stored.key_locks.update(key_locks)
    stored.ids += rows
    if on_commit is not None:
        stored.on_commit.add(on_commit)
    if not event.contains(session, "before_commit", _insert_again):
        event.listen(session, "before_commit", _insert_again)
        event.listen(session, "after_commit", _call_on_commit)


def _insert_again(session: Session) -> None:
    stored = _committed_rows(session)
    if stored is None or not stored.key_locks:
        return
    session.flush()  # whatever the flush waits for comes before the locks
    connection = session.connection(bind_arguments={"clause": message})
    connection.execute(_LOCK_KEYS, {"key_locks": sorted(stored.key_locks)})
    connection.execute(_INSERT_AGAIN, {"rows": stored.ids})


def _call_on_commit(session: Session) -> None:
    stored = _committed_rows(session)
    if stored is not None:
        del session.info[_INFO]
        for on_commit in stored.on_commit:
            on_commit()


def _committed_rows(session: Session) -> _SessionRows | None:
    """Return the rows that this commit commits; None if there are none, or if only a savepoint ends."""
    stored: _SessionRows | None = session.info.get(_INFO)
    if stored is None or session.in_nested_transaction() or stored.transaction is not session.get_transaction():
        return None
    return stored
