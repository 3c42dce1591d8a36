"""The state of an outbox in the host's database: counts, sizes and ages. PostgreSQL estimates the number of rows if there are millions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import Column, ColumnElement, Select, case, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.outbox.rows import NO_SEQUENCE, STATES, OutboxStatus, State
from silbo.stores.sqlalchemy import statements as sql
from silbo.stores.sqlalchemy.dialect import (
    FIRST_TIME,
    LAST_TIME,
    earliest,
    is_in_state,
    read_clock,
    readable,
    to_text,
    to_time,
)
from silbo.stores.sqlalchemy.tables import message, partition

__all__ = ["read_status"]

SUMMED: Final = 100_000
"""Rows of a state whose sizes and ages PostgreSQL reads. If there are more, the sum of the sizes is extrapolated, and sent rows, for which
there is no alarm, are not counted but estimated."""
COUNTED: Final = 1_000_000
"""Rows that wait, and dead ones, that PostgreSQL counts. As many may wait, by the default quota."""


_UNSENT: Final = (
    is_in_state(*sql.UNSENT),
    (message.c.partition, message.c.sequence, message.c.id),
    "silbo_message_unsent",
)
_DEAD: Final = is_in_state("dead"), (message.c.id,), "silbo_message_dead"
_SENT: Final = is_in_state("sent"), (message.c.state_at, message.c.id), "silbo_message_sent"
"""Conditions, each with the order of the rows in its index, and the name of the index."""


class _Tally(NamedTuple):
    """The rows in a state: their number, bytes and earliest times."""

    rows: int
    size: int
    stored_at: Any = None
    state_at: Any = None
    next_attempt_at: Any = None


async def read_status(connection: AsyncConnection, partitions: int) -> OutboxStatus:
    """Read counts, bytes, ages and the leads of all partitions. See ``OutboxStore.status``."""
    now = await read_clock(connection)
    estimated: set[State] = set()
    if connection.dialect.name == "postgresql":
        tallies = await _tally_by_indexes(connection, estimated)
    else:
        tallies = await _tally_all(connection)
    waiting = [tallies[state] for state in sql.UNSENT if state in tallies]
    return OutboxStatus(
        counts={state: tallies[state].rows if state in tallies else 0 for state in STATES},
        size=sum(tally.size for state, tally in tallies.items() if state != "sent"),
        oldest_at=_find_first(tally.stored_at for tally in waiting),
        oldest_sent_at=_find_first([tallies["sent"].state_at] if "sent" in tallies else []),
        next_attempt_at=_find_first(tally.next_attempt_at for tally in waiting),
        leads=await sql.select_leads(connection, partitions, now),
        estimated=frozenset(estimated),
    )


def _find_first(values: Iterable[Any]) -> datetime | None:
    times = map(to_time, values)
    return min((time for time in times if isinstance(time, datetime)), default=None)


async def count_for_quota(connection: AsyncConnection, most: int) -> tuple[int, int]:
    """Return the number and the bytes of the rows that wait or are dead. On PostgreSQL the bytes of many are extrapolated.

    Args:
        connection: With a transaction.
        most: More rows than this are not counted.
    """
    if connection.dialect.name != "postgresql":
        counted = select(func.count(), func.coalesce(func.sum(message.c.size), 0))
        unsent = (await connection.execute(counted.where(is_in_state(*sql.UNSENT)))).one()
        dead = (await connection.execute(counted.where(is_in_state("dead")))).one()  # each count by its own index
        return unsent[0] + dead[0], int(unsent[1] + dead[1])
    all_rows = all_bytes = 0
    for condition, order, index in (_UNSENT, _DEAD):
        tallies = (await _tally_first(connection, condition, order)).values()
        rows, size = sum(tally.rows for tally in tallies), sum(tally.size for tally in tallies)
        if rows >= SUMMED:
            read, rows = rows, await _count(connection, condition, order, index, limit=most + 1)
            size = size * rows // read
        all_rows += rows
        all_bytes += size
    return all_rows, all_bytes


async def _tally_all(connection: AsyncConnection) -> dict[str, _Tally]:
    """Read all rows."""
    found: Any = await connection.execute(
        select(
            *readable(connection, message.c.state),
            func.count().label("rows"),
            func.sum(message.c.size).label("size"),
            earliest(connection, message.c.stored_at),
            earliest(connection, message.c.state_at),
            earliest(connection, message.c.next_attempt_at),
        ).group_by(message.c.state)
    )
    return {to_text(state): _Tally(rows, int(size), *times) for state, rows, size, *times in found}


async def _tally_by_indexes(connection: AsyncConnection, estimated: set[State]) -> Mapping[str, _Tally]:
    """Read the rows of each state by its index, a limited number of them. Add to ``estimated`` the states with more."""
    # To compile these statements takes PostgreSQL longer than to run them: 0.5 s of 1.1 for a million rows that wait.
    await connection.execute(text("SET LOCAL jit = off"))
    tallies = await _tally_first(connection, *_UNSENT[:2])
    read = sum(tally.rows for tally in tallies.values())
    if read >= SUMMED:
        rows = await _count(connection, *_UNSENT, limit=COUNTED)
        sending, *firsts = (await connection.execute(_READ_PARTITIONS)).one()
        size = sum(tally.size for tally in tallies.values()) * rows // read
        tallies = {"sending": _Tally(sending, 0), "pending": _Tally(max(0, rows - sending), size, *firsts)}
        if rows >= COUNTED:
            estimated.add("pending")
    tallies |= await _tally_first(connection, *_DEAD[:2])
    if "dead" in tallies and (dead := tallies["dead"]).rows >= SUMMED:
        rows = await _count(connection, *_DEAD, limit=COUNTED)
        tallies["dead"] = dead._replace(rows=rows, size=dead.size * rows // dead.rows)
        if rows >= COUNTED:
            estimated.add("dead")
    if rows := await _count(connection, *_SENT, limit=SUMMED):
        condition, order, _ = _SENT
        first = select(message.c.state_at).where(condition, message.c.state_at.between(FIRST_TIME, LAST_TIME))
        state_at = await connection.scalar(first.order_by(*order).limit(1))
        tallies["sent"] = _Tally(rows=rows, size=0, state_at=state_at)
        if rows >= SUMMED:
            estimated.add("sent")
    return tallies


async def _tally_first(
    connection: AsyncConnection, condition: ColumnElement[bool], order: Sequence[Column[Any]]
) -> dict[str, _Tally]:
    """Read the first rows that fulfil a condition, in the order of an index, so that PostgreSQL reads nothing else."""
    some = select(message).where(condition).order_by(*order).limit(SUMMED).subquery()
    times = (earliest(connection, some.c[name]) for name in ("stored_at", "state_at", "next_attempt_at"))
    found: Any = await connection.execute(
        select(some.c.state, func.count(), func.sum(some.c.size), *times).group_by(some.c.state)
    )
    return {state: _Tally(rows, int(size), *times) for state, rows, size, *times in found}


async def _count(
    connection: AsyncConnection,
    condition: ColumnElement[bool],
    order: Sequence[Column[Any]],
    index: str,
    *,
    limit: int,
) -> int:
    """Count the rows that fulfil a condition, in the order of an index; from a limit on, as many as the index is estimated to have."""
    some = select(message.c.id).where(condition).order_by(*order).limit(limit).subquery()
    rows = await connection.scalar(select(func.count()).select_from(some)) or 0
    return rows if rows < limit else max(rows, await _estimate(connection, index))


def _of_partition(what: Any) -> Select[Any]:
    """Select from the rows that wait in the partition of the row beside."""
    return select(what).where(is_in_state(*sql.UNSENT), message.c.partition == partition.c.number).correlate(partition)


def _earliest_of_first(column: Column[Any]) -> ColumnElement[Any]:
    """Return the earliest value that the first rows of all partitions have: those that are sent next, and are the oldest."""
    first = _of_partition(column).order_by(message.c.sequence, message.c.id).limit(1).scalar_subquery()
    return func.min(case((first.between(FIRST_TIME, LAST_TIME), first)))


_READ_PARTITIONS: Final = select(
    func.coalesce(
        func.sum(
            _of_partition(func.count())
            .where(message.c.sequence < NO_SEQUENCE, is_in_state("sending"))
            .scalar_subquery()
        ),
        0,
    ),
    _earliest_of_first(message.c.stored_at),
    _earliest_of_first(message.c.state_at),
    _earliest_of_first(message.c.next_attempt_at),
).select_from(partition)
"""The number of rows that are being sent, which have a sequence, and the times of the first rows; one index gives both."""


async def _estimate(connection: AsyncConnection, index: str) -> int:
    """Return the number of entries of an index as of PostgreSQL's last ANALYZE or VACUUM; 0 before the first."""
    statement = text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:index)")
    return max(0, int(await connection.scalar(statement, {"index": index}) or 0))
