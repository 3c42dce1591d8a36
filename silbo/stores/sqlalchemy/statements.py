"""The statements of the relay, and those to look at a store and to mend it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    any_,
    bindparam,
    delete,
    func,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.errors import LeadLost
from silbo.outbox.rows import Lead, OutboxStatus, Row, State, unpack
from silbo.stores.sqlalchemy.tables import NO_SEQUENCE, begin, clock, free, message, now, partition, state_is, utc

STATES: Final[tuple[State, ...]] = ("pending", "sending", "sent", "dead")
UNSENT: Final = ("pending", "sending")


def among(rows: Collection[int], connection: AsyncConnection) -> ColumnElement[bool]:
    """One statement for any number of rows, where the database knows arrays."""
    if connection.dialect.name == "postgresql":
        return message.c.id == any_(literal(list(rows), ARRAY(BigInteger)))
    return message.c.id.in_(rows)


# -- the relay's --------------------------------------------------------------------------------------------


async def _lock(connection: AsyncConnection, number: int) -> tuple[sqlalchemy.Row[Any], datetime]:
    """A partition's row, which nobody else changes until the end of the transaction, and the time."""
    await begin(connection)
    its = select(partition, now(connection.dialect).label("now")).where(partition.c.number == number)
    found = (await connection.execute(its.with_for_update())).one()
    return found, utc(found.now)


async def _own(connection: AsyncConnection, lead: Lead) -> tuple[int, datetime]:
    """Lock the partition; the last sequence that was given in it, and the time.

    Raises:
        LeadLost: another relay leads it.
    """
    its, time = await _lock(connection, lead.partition)
    if (its.owner, its.epoch) != (lead.owner, lead.epoch):
        raise LeadLost(lead.partition, lead.epoch)
    return its.sequence, time


async def lead(connection: AsyncConnection, number: int, owner: str, lease: float, above: int) -> Lead | None:
    """Take or renew the lead of a partition; None while another owner's lease runs. See ``OutboxStore.lead``."""
    its, time = await _lock(connection, number)
    if its.owner not in (None, owner) and utc(its.until) > time:
        return None
    epoch, until = its.epoch, time + timedelta(seconds=lease)
    if its.owner != owner or epoch <= above:
        epoch = max(epoch, above) + 1
    values = {"owner": owner, "epoch": epoch, "until": until}
    await connection.execute(update(partition).where(partition.c.number == number).values(values))
    return Lead(number, owner, epoch, until)


async def resign(connection: AsyncConnection, lead: Lead) -> None:
    """End a lease, if it is still this lead's. See ``OutboxStore.resign``."""
    its = (partition.c.number == lead.partition) & (partition.c.epoch == lead.epoch)
    await connection.execute(update(partition).where(its).values(owner=None))


async def due(connection: AsyncConnection, lead: Lead) -> bool:
    """Whether there is something to take: read without a lock, for that is asked four times a second.

    Raises:
        LeadLost: another relay leads.
    """
    first = (
        select(message.c.id, message.c.next_attempt_at)
        .where(state_is(*UNSENT), message.c.partition == lead.partition)
        .order_by(message.c.sequence, message.c.id)
        .limit(1)
        .subquery()
    )
    columns = (partition.c.owner, partition.c.epoch, first.c.id, first.c.next_attempt_at)
    its = (
        await connection.execute(
            select(*columns, now(connection.dialect).label("now"))
            .select_from(partition.outerjoin(first, true()))
            .where(partition.c.number == lead.partition)
        )
    ).one()
    if (its.owner, its.epoch) != (lead.owner, lead.epoch):
        raise LeadLost(lead.partition, lead.epoch)
    return its.id is not None and (its.next_attempt_at is None or utc(its.next_attempt_at) <= utc(its.now))


async def take(
    connection: AsyncConnection, lead: Lead, limit: int, sent: Collection[int], dead: Mapping[int, str]
) -> list[Row]:
    """Settle rows, then take the next ones of the lead's partition. See ``OutboxStore.take``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    last, time = await _own(connection, lead)
    await _settle(connection, lead, sent, dead, time)
    found = await connection.execute(
        select(message)
        .where(state_is(*UNSENT), message.c.partition == lead.partition)
        .order_by(message.c.sequence, message.c.id)
        .limit(limit)
    )
    rows = [_row(each) for each in found]
    if not rows or (rows[0].next_attempt_at is not None and rows[0].next_attempt_at > time):
        return []
    # A sequence never comes again, not even where the database was restored from an older copy.
    last = max(last, int(time.timestamp() * 1_000_000))
    again, fresh = (
        [row.id for row in rows if row.sequence is not None],
        [row.id for row in rows if row.sequence is None],
    )
    taken = update(message).values(
        state="sending",
        attempts=message.c.attempts + 1,
        owner=lead.owner,
        epoch=lead.epoch,
        state_at=time,
        next_attempt_at=None,
    )
    if again:
        await connection.execute(taken.where(among(again, connection)))
    if fresh:
        place = func.row_number().over(order_by=message.c.id) + last
        numbered = select(message.c.id, place.label("sequence")).where(among(fresh, connection)).subquery()
        await connection.execute(taken.where(message.c.id == numbered.c.id).values(sequence=numbered.c.sequence))
        await _give(connection, lead, last + len(fresh))
    given = {row: last + place for place, row in enumerate(fresh, 1)}
    return [
        replace(
            row,
            state="sending",
            attempts=row.attempts + 1,
            sequence=given.get(row.id, row.sequence),
            owner=lead.owner,
            epoch=lead.epoch,
            state_at=time,
            next_attempt_at=None,
        )
        for row in rows
    ]


async def _give(connection: AsyncConnection, lead: Lead, sequence: int) -> None:
    await connection.execute(update(partition).where(partition.c.number == lead.partition).values(sequence=sequence))


async def settle(connection: AsyncConnection, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
    """Mark rows as sent or dead. See ``OutboxStore.settle``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _, time = await _own(connection, lead)
    await _settle(connection, lead, sent, dead, time)


async def _settle(
    connection: AsyncConnection, lead: Lead, sent: Collection[int], dead: Mapping[int, str], time: datetime
) -> None:
    if sent:
        its = among(sent, connection)
        done = update(message).where(its, _taken_under(lead)).values(state="sent", error=None, state_at=time)
        await connection.execute(done)
    if dead:
        its = message.c.id == bindparam("row")
        buried = (
            update(message).where(its, _taken_under(lead)).values(state="dead", error=bindparam("why"), state_at=time)
        )
        await connection.execute(buried, [{"row": row, "why": error} for row, error in dead.items()])


def _taken_under(lead: Lead) -> ColumnElement[bool]:
    """Being sent, under this very lead."""
    return state_is("sending") & (message.c.epoch == lead.epoch)


async def postpone(connection: AsyncConnection, lead: Lead, rows: Collection[int], error: str, delay: float) -> None:
    """Put rows back to pending for ``delay`` seconds. See ``OutboxStore.postpone``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _, time = await _own(connection, lead)
    values = {"state": "pending", "error": error, "state_at": time, "next_attempt_at": time + timedelta(seconds=delay)}
    await connection.execute(update(message).where(among(rows, connection), _taken_under(lead)).values(values))


async def renumber(connection: AsyncConnection, lead: Lead, above: int) -> None:
    """Let rows that were taken once get new sequences, above ``above``. See ``OutboxStore.renumber``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    last, time = await _own(connection, lead)
    await _give(connection, lead, max(last, above))
    once = (message.c.partition == lead.partition) & (message.c.attempts == 1)
    await connection.execute(update(message).where(state_is(*UNSENT), once).values(_anew(time)))


async def forget(connection: AsyncConnection, retain: float, limit: int) -> int:
    """Delete at most ``limit`` rows that were sent more than ``retain`` seconds ago, the oldest first; return their number."""
    before = await clock(connection) - timedelta(seconds=retain)
    return await _delete(connection, _oldest(connection, "sent", message.c.state_at <= before, limit))


# -- to look at and to mend ---------------------------------------------------------------------------------


async def status(connection: AsyncConnection, partitions: int) -> OutboxStatus:
    """Count rows and bytes, and read the leads of all partitions. See ``OutboxStore.status``."""
    time = await clock(connection)
    found = await connection.execute(
        select(
            message.c.state,
            func.count().label("rows"),
            func.sum(message.c.size).label("size"),
            func.min(message.c.stored_at).label("stored_at"),
            func.min(message.c.state_at).label("state_at"),
            func.min(message.c.next_attempt_at).label("next_attempt_at"),
        ).group_by(message.c.state)
    )
    by_state = {row.state: row for row in found}
    counts: dict[State, int] = {state: by_state[state].rows if state in by_state else 0 for state in STATES}
    waiting = [by_state[state] for state in UNSENT if state in by_state]
    leads = await connection.execute(
        select(partition)
        .where(partition.c.owner.is_not(None), partition.c.number < partitions)
        .order_by(partition.c.number)
    )
    return OutboxStatus(
        counts,
        sum(int(row.size) for state, row in by_state.items() if state != "sent"),
        min((utc(row.stored_at) for row in waiting), default=None),
        utc(by_state["sent"].state_at) if "sent" in by_state else None,
        min((utc(row.next_attempt_at) for row in waiting if row.next_attempt_at is not None), default=None),
        {its.number: Lead(its.number, its.owner, its.epoch, utc(its.until)) for its in leads if utc(its.until) > time},
    )


async def rows(connection: AsyncConnection, state: State, after: int, limit: int) -> list[Row]:
    """Return at most ``limit`` rows in a state with ids above ``after``, by id."""
    its = state_is(state) & (message.c.id > after)
    return [
        _row(each) for each in await connection.execute(select(message).where(its).order_by(message.c.id).limit(limit))
    ]


async def retry(connection: AsyncConnection, chosen: Collection[int] | None) -> int:
    """Make dead rows pending again, the chosen ones or all; return their number."""
    its = state_is("dead") if chosen is None else state_is("dead") & among(chosen, connection)
    again = await connection.execute(update(message).where(its).values(_anew(await clock(connection))))
    return again.rowcount


async def replay(connection: AsyncConnection, since: datetime, before: datetime, limit: int) -> int:
    """Make at most ``limit`` rows pending again that were sent from ``since`` on and before ``before``; return their number."""
    its = _oldest(connection, "sent", (message.c.state_at >= utc(since)) & (message.c.state_at < utc(before)), limit)
    again = await connection.execute(update(message).where(its).values(_anew(await clock(connection))))
    return again.rowcount


async def purge(connection: AsyncConnection, state: Literal["sent", "dead"], before: datetime, limit: int) -> int:
    """Delete at most ``limit`` rows that are sent or dead since before a time; return their number."""
    return await _delete(connection, _oldest(connection, state, message.c.state_at < utc(before), limit))


async def _delete(connection: AsyncConnection, which: ColumnElement[bool]) -> int:
    return (await connection.execute(delete(message).where(which))).rowcount


def _oldest(
    connection: AsyncConnection, state: State, condition: ColumnElement[bool], limit: int
) -> ColumnElement[bool]:
    places = (message.c.state_at, message.c.id) if state == "sent" else (message.c.id,)
    which = select(message.c.id).where(state_is(state), condition).order_by(*places).limit(limit)
    return message.c.id.in_(free(which, connection))


def _anew(time: datetime) -> dict[str, Any]:
    """What a row becomes that is to get another sequence."""
    return {"state": "pending", "attempts": 0, "sequence": NO_SEQUENCE, "state_at": time, "next_attempt_at": None}


def _row(found: sqlalchemy.Row[Any]) -> Row:
    return Row(
        found.id,
        found.partition,
        found.state,
        unpack(found.message.encode()),
        found.attempts,
        found.error,
        None if found.sequence == NO_SEQUENCE else found.sequence,
        found.owner,
        found.epoch,
        utc(found.stored_at),
        utc(found.state_at),
        None if found.next_attempt_at is None else utc(found.next_attempt_at),
    )
