"""The state of an outbox in the host's database: counts, sizes and ages. PostgreSQL estimates the number of rows if there are millions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import func, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.outbox.rows import STATES, OutboxStatus, State
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
from silbo.stores.sqlalchemy.tables import message

__all__ = ["read_status"]

UNSENT_COUNTED: Final = 1_000_000
"""Pending and sending rows, and dead ones, that PostgreSQL counts one by one. As many wait at most, by the default quota."""
SENT_COUNTED: Final = 100_000
"""Sent rows that PostgreSQL counts one by one. To count ten million takes seconds, and they have no alarm."""


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


async def _tally_all(connection: AsyncConnection) -> dict[str, _Tally]:
    """Read all rows."""
    found = await connection.execute(
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
    tallies: dict[str, _Tally] = {}
    for states in (sql.UNSENT, ("dead",)):
        some = select(message).where(is_in_state(*states)).limit(UNSENT_COUNTED).subquery()
        found = await connection.execute(
            select(
                some.c.state,
                func.count(),
                func.sum(some.c.size),
                earliest(connection, some.c.stored_at),
                earliest(connection, some.c.state_at),
                earliest(connection, some.c.next_attempt_at),
            ).group_by(some.c.state)
        )
        tallies |= {state: _Tally(rows, int(size), *times) for state, rows, size, *times in found}
    counted = sum(tallies[state].rows for state in sql.UNSENT if state in tallies)
    if counted >= UNSENT_COUNTED and "pending" in tallies:  # those that are being sent are few
        pending = tallies["pending"]
        rows = pending.rows + max(0, await _estimate(connection, "silbo_message_unsent") - counted)
        tallies["pending"] = pending._replace(rows=rows, size=pending.size * rows // pending.rows)
        estimated.add("pending")
    if "dead" in tallies and (dead := tallies["dead"]).rows >= UNSENT_COUNTED:
        rows = max(dead.rows, await _estimate(connection, "silbo_message_dead"))
        tallies["dead"] = dead._replace(rows=rows, size=dead.size * rows // dead.rows)
        estimated.add("dead")
    some_sent = select(literal_column("1")).where(is_in_state("sent")).limit(SENT_COUNTED).subquery()
    sent = await connection.scalar(select(func.count()).select_from(some_sent)) or 0
    if sent >= SENT_COUNTED:
        sent = max(sent, await _estimate(connection, "silbo_message_sent"))
        estimated.add("sent")
    if sent:
        first = select(message.c.state_at).where(is_in_state("sent"), message.c.state_at.between(FIRST_TIME, LAST_TIME))
        state_at = await connection.scalar(first.order_by(message.c.state_at).limit(1))
        tallies["sent"] = _Tally(rows=sent, size=0, state_at=state_at)
    return tallies


async def _estimate(connection: AsyncConnection, index: str) -> int:
    """Return the number of entries of an index as of PostgreSQL's last ANALYZE or VACUUM; 0 before the first."""
    statement = text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:index)")
    return max(0, int(await connection.scalar(statement, {"index": index}) or 0))
