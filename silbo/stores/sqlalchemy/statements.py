"""The statements of the store in the host's database. Each function runs in its caller's transaction.

The functions carry the names of ``OutboxStore``'s methods; import the module, not the functions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple
from uuid import uuid4

import sqlalchemy
from sqlalchemy import (
    Column,
    ColumnElement,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.errors import LeadLost, StoreInvalid
from silbo.outbox.rows import (
    FOUND_AT_MOST,
    LARGEST_ATTEMPTS,
    NO_SEQUENCE,
    STATES,
    ColumnCheck,
    Lead,
    Packed,
    Roster,
    Row,
    State,
    UnreadableMessage,
    View,
    has_to_wait,
    mark_unreadable,
    to_number,
    unpack,
)
from silbo.stores.sqlalchemy.dialect import (
    begin_writing,
    end_frozen_sessions,
    insert_missing,
    is_among,
    is_in_no_state,
    is_in_state,
    limit_idling,
    read_clock,
    readable,
    statement_time,
    to_text,
    to_time,
    to_utc,
    without_locked_rows,
)
from silbo.stores.sqlalchemy.tables import message, outbox, partition, relay
from silbo.stores.sqlalchemy.urls import describe_url

UNSENT: Final = ("pending", "sending")
_UNKNOWN_TIME: Final = datetime(1970, 1, 1, tzinfo=UTC)
_columns: Final = ColumnCheck(datetime, _UNKNOWN_TIME)


async def open_store(connection: AsyncConnection, partitions: int | None) -> tuple[str, int]:
    """Make the rows that the store needs, and give it its partitions.

    Args:
        connection: With a transaction.
        partitions: The number that the store is to have; None keeps its number, or takes 1 for a new store.

    Returns:
        The store's id, and the number of its partitions.

    Raises:
        StoreInvalid: rows or a relay still use another number of partitions.
    """
    row = {"number": 1, "id": uuid4().hex, "partitions": partitions or 1}
    await connection.execute(insert_missing(connection.dialect.name, outbox), row)
    identity, has = (await connection.execute(select(outbox.c.id, outbox.c.partitions))).one()
    if partitions is not None and partitions != has:
        await _change_partitions(connection, has, partitions)
        has = partitions
    rows = [{"number": number, "epoch": 0, "sequence": 0} for number in range(has)]
    await connection.execute(insert_missing(connection.dialect.name, partition), rows)
    return identity, has


async def cut_leases(connection: AsyncConnection, partitions: int, lease: float) -> None:
    """Let every lease end within ``lease`` seconds, if the store is to have another number of partitions.

    A lease that would end later is from a clock that was ahead, and would keep the number for so long.
    """
    if await connection.scalar(select(outbox.c.partitions)) in (None, partitions):
        return
    end = await read_clock(connection) + timedelta(seconds=lease)
    await connection.execute(update(partition).where(partition.c.until > end).values(until=end))


async def _change_partitions(connection: AsyncConnection, has: int, partitions: int) -> None:
    """Give the store another number of partitions, while no other transaction stores messages.

    Raises:
        StoreInvalid: a relay leads, or messages wait. A message's partition depends on the number, so relays with the new
            number would look for the waiting messages in other partitions.
    """
    if connection.dialect.name == "postgresql":  # waits for the transactions that have inserted a row
        await connection.execute(text("LOCK TABLE silbo_message IN EXCLUSIVE MODE"))
    leases = await connection.execute(
        select(*readable(connection, partition.c.owner, partition.c.until)).with_for_update()
    )
    now = await read_clock(connection)
    if any(lease.owner is not None and _to_end(lease.until) > now for lease in leases):
        problem = f"a relay sends from its {has} partitions; stop the relays before it has {partitions}"
        raise StoreInvalid(describe_url(connection.engine.url), problem)
    waiting = await connection.scalar(select(func.count()).where(is_in_state("pending", "sending", "dead")))
    if waiting:
        problem = f"holds {waiting} messages in {has} partitions; send them all before it has {partitions}"
        raise StoreInvalid(describe_url(connection.engine.url), problem)
    await connection.execute(update(outbox).values(partitions=partitions))


async def add(connection: AsyncConnection, messages: Sequence[Packed], partitions: int) -> list[int]:
    """Insert messages, in this order; return the ids of their rows.

    Raises:
        StoreInvalid: the store has another number of partitions by now; nothing was stored.
    """
    has = select(outbox.c.partitions).scalar_subquery()  # read while the inserts keep a change of the number away
    now = statement_time(connection.dialect)
    inserted = await connection.execute(
        insert(message)
        .values(stored_at=now, state_at=now)
        .returning(message.c.id, has.label("has"), sort_by_parameter_order=True),
        [
            {
                "partition": each.partition,
                "state": "pending",
                "message": each.raw.decode(),
                "size": len(each.raw),
                "attempts": 0,
                "sequence": NO_SEQUENCE,
            }
            for each in messages
        ],
    )
    rows = inserted.all()
    ids = [row.id for row in rows]
    if any(row.has != partitions for row in rows):
        await connection.execute(delete(message).where(message.c.id.in_(ids)))
        problem = f"has {rows[0].has} partitions by now, not {partitions}; open it again"
        raise StoreInvalid(describe_url(connection.engine.url), problem)
    return ids


# -- the relay's --------------------------------------------------------------------------------------------


class _Partition(NamedTuple):
    """A partition's row. A value of another type or out of range counts as none: see ``to_number``."""

    owner: str | None
    epoch: int
    until: datetime
    sequence: int


async def _lock_partition(connection: AsyncConnection, number: int) -> tuple[_Partition, datetime]:
    """Lock a partition's row until the end of the transaction. Return the row, and the database's time."""
    await begin_writing(connection)
    columns = (*readable(connection, *partition.c), *limit_idling(connection.dialect))
    chosen = select(*columns, statement_time(connection.dialect).label("now")).where(partition.c.number == number)
    found = (await connection.execute(chosen.with_for_update())).one()
    row = _Partition(
        owner=to_text(found.owner),
        epoch=to_number(found.epoch),
        until=_to_end(found.until),
        sequence=to_number(found.sequence),
    )
    return row, to_utc(found.now)


def _to_end(until: Any) -> datetime:
    """Return the end of a lease; a lease whose end can't be read has ended."""
    end = to_time(until)
    return end if isinstance(end, datetime) else _UNKNOWN_TIME


async def _lock_lead(connection: AsyncConnection, lead: Lead) -> tuple[int, datetime]:
    """Lock the lead's partition. Return the last sequence that was given in it, and the database's time.

    Raises:
        LeadLost: another relay leads the partition.
    """
    found, now = await _lock_partition(connection, lead.partition)
    if (found.owner, found.epoch) != (lead.owner, lead.epoch):
        raise LeadLost(lead.partition, lead.epoch)
    return found.sequence, now


async def lead(connection: AsyncConnection, number: int, owner: str, lease: float, above: int) -> Lead | None:
    """Take or renew the lead of a partition; None while another owner's lease runs. See ``OutboxStore.lead``."""
    found, now = await _lock_partition(connection, number)
    until = now + timedelta(seconds=lease)
    change = update(partition).where(partition.c.number == number)
    if found.owner not in (None, owner) and found.until > now:
        if found.until > until:
            await connection.execute(change.values(until=until))
        return None
    epoch = found.epoch
    if found.owner != owner or epoch <= above:
        epoch = max(epoch, above) + 1
    await connection.execute(change.values(owner=owner, epoch=epoch, until=until))
    return Lead(partition=number, owner=owner, epoch=epoch, until=until)


async def resign(connection: AsyncConnection, lead: Lead) -> None:
    """End a lease, if it is still this lead's. See ``OutboxStore.resign``."""
    await _lock_partition(connection, lead.partition)  # as every change, so that a frozen relay does not keep the lock
    led = (partition.c.number == lead.partition) & (partition.c.epoch == lead.epoch)
    await connection.execute(update(partition).where(led).values(owner=None))


async def join(connection: AsyncConnection, owner: str, lease: float, idle: Collection[int], partitions: int) -> Roster:
    """Count a relay among those that divide the partitions, and renew its idle leads. See ``SharedStore.join``."""
    await begin_writing(connection)
    now_and_limit = select(statement_time(connection.dialect), *limit_idling(connection.dialect))
    now = to_utc(await connection.scalar(now_and_limit))
    until = now + timedelta(seconds=lease)
    counted = await connection.execute(update(relay).where(relay.c.owner == owner).values(until=until))
    if not counted.rowcount:
        await connection.execute(insert(relay).values(owner=owner, joined_at=now, until=until))
    led = (partition.c.owner == owner) & partition.c.number.in_(idle)
    await connection.execute(update(partition).where(or_(led, partition.c.until > until)).values(until=until))
    rows = (await connection.execute(select(relay).order_by(relay.c.joined_at, relay.c.owner))).all()
    ends = [to_utc(row.until) for row in rows]
    if any(end > until for end in ends):  # by a clock that was ahead
        await connection.execute(update(relay).where(relay.c.until > until).values(until=until))
    if any(end <= now for end in ends):
        gone = without_locked_rows(select(relay.c.owner).where(relay.c.until <= now), connection)
        await connection.execute(delete(relay).where(relay.c.owner.in_(gone)))
    leads = await select_leads(connection, partitions, now)
    if len(leads) < partitions:  # perhaps because a frozen relay has locked one, for which others wait
        await end_frozen_sessions(connection)
    return Roster(relays=[row.owner for row, end in zip(rows, ends, strict=True) if end > now], leads=leads)


async def leave(connection: AsyncConnection, owner: str) -> None:
    """Count a relay no longer among those that divide the partitions. See ``SharedStore.leave``."""
    await connection.execute(delete(relay).where(relay.c.owner == owner))


async def look(connection: AsyncConnection, leads: Collection[Lead], partitions: int) -> View:
    """Return the state of the partitions, by one query without a lock, because relays ask often. See ``SharedStore.look``."""
    now = statement_time(connection.dialect)
    its_numbers = partition.c.number.in_([lead.partition for lead in leads])
    has_strays = (select(message.c.id).where(each).correlate(partition).exists() for each in _find_strays(None))
    relays = select(func.count()).select_from(relay).where(relay.c.until > now).scalar_subquery()
    found = await connection.execute(
        select(
            *readable(connection, partition.c.number, partition.c.owner, partition.c.epoch, partition.c.until),
            *(_read_first(connection, column, its_numbers) for column in _FIRST),
            (its_numbers & or_(*has_strays)).label("has_strays"),
            relays.label("relays"),
            now.label("now"),
        )
        .select_from(partition)
        .where(partition.c.number < partitions)
    )
    rows = found.all()
    by_number = {lead.partition: lead for lead in leads}
    return View(
        due=[row.number for row in rows if row.number in by_number and _is_due(row, by_number[row.number])],
        relays=rows[0].relays if rows else 0,
        free=sum(row.owner is None or _to_end(row.until) <= to_utc(row.now) for row in rows),
    )


_FIRST: Final = (message.c.id, message.c.state_at, message.c.next_attempt_at)


def _read_first(
    connection: AsyncConnection, column: Column[Any], its_numbers: ColumnElement[bool]
) -> ColumnElement[Any]:
    """Return a column of the first message that waits in the partition of the row beside.

    A subquery for each column reads one entry of an index; a join reads all messages, whenever PostgreSQL thinks that they are few.
    """
    first = (
        select(*readable(connection, column))
        .where(its_numbers, is_in_state(*UNSENT), message.c.partition == partition.c.number)
        .order_by(message.c.sequence, message.c.id)
        .limit(1)
    )
    return first.correlate(partition).scalar_subquery().label(column.name)


def _is_due(row: Any, lead: Lead) -> bool:
    """Return True if ``take`` would return rows of the lead's partition, or raise LeadLost."""
    if row.has_strays or (to_text(row.owner), to_number(row.epoch)) != (lead.owner, lead.epoch):
        return True
    state_at, next_attempt_at = to_time(row.state_at), to_time(row.next_attempt_at)
    if row.id is None or not isinstance(state_at, datetime) or not isinstance(next_attempt_at, datetime):
        return row.id is not None
    return not has_to_wait(state_at, next_attempt_at, to_utc(row.now))


def _find_strays(number: int | None) -> list[ColumnElement[bool]]:
    """Return conditions of messages that are to be put aside: an index answers each. None is for the partition of the row beside.

    They are in a state that does not exist; the first partition also has those of partitions that do not exist. Something else was
    written into that column.
    """
    its_number = partition.c.number if number is None else literal(number)
    strays: list[ColumnElement[bool]] = [is_in_no_state() & (message.c.partition == its_number)]
    if not number:
        partitions = select(outbox.c.partitions).scalar_subquery()
        outside = message.c.partition < 0, message.c.partition >= partitions
        is_first = [its_number == 0] if number is None else []
        strays += [and_(*is_first, kind, each) for kind in (is_in_state(*UNSENT), is_in_no_state()) for each in outside]
    return strays


async def _select_strays(connection: AsyncConnection, number: int, limit: int, size: int) -> list[Row]:
    for condition in _find_strays(number):
        chosen = _select_up_to(connection, condition, [message.c.id], limit, size)
        if found := (await connection.execute(chosen)).all():
            return [_to_row(each, number) for each in found]
    return []


async def take(
    connection: AsyncConnection, lead: Lead, limit: int, size: int, sent: Collection[int], dead: Mapping[int, str]
) -> list[Row]:
    """Settle rows, then take the next ones of the lead's partition, fewer if they reach ``size`` bytes before.

    See ``OutboxStore.take``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    # The rows are read before the partition is locked: PostgreSQL never ends a transaction that waits to hand a large result to a
    # frozen relay, and others would wait for its lock. Nobody but this lead changes these rows, or _lock_lead raises.
    await begin_writing(connection)
    waiting = is_in_state(*UNSENT) & (message.c.partition == lead.partition)
    if sent or dead:
        waiting &= not_(is_among([*sent, *dead], connection))
    chosen = _select_up_to(connection, waiting, [message.c.sequence, message.c.id], limit, size)
    rows = [_to_row(each) for each in await connection.execute(chosen)]
    last, now = await _lock_lead(connection, lead)
    await _settle(connection, lead, sent, dead, now)
    if not rows or has_to_wait(rows[0].state_at, rows[0].next_attempt_at, now):
        # A relay that has just sent something asks again soon, with nothing to settle.
        rows = [] if sent or dead else await _select_strays(connection, lead.partition, limit, size)
    if not rows:
        return []
    # Not below the clock: so a database that was restored from an older copy never gives the same sequence again.
    last = max(last, int(now.timestamp() * 1_000_000))
    numbered = [row.id for row in rows if row.sequence is not None]
    fresh = [row.id for row in rows if row.sequence is None]
    taken = update(message).values(
        state="sending",
        attempts=case((message.c.attempts.between(0, LARGEST_ATTEMPTS), message.c.attempts + 1), else_=1),
        owner=lead.owner,
        epoch=lead.epoch,
        state_at=now,
        next_attempt_at=None,
    )
    if numbered:
        await connection.execute(taken.where(is_among(numbered, connection)))
    if fresh:
        place = func.row_number().over(order_by=message.c.id) + last
        given = select(message.c.id, place.label("sequence")).where(is_among(fresh, connection)).subquery()
        await connection.execute(taken.where(message.c.id == given.c.id).values(sequence=given.c.sequence))
        await _set_last_sequence(connection, lead, last + len(fresh))
    damaged = [row.id for row in rows if isinstance(row.message, UnreadableMessage)]
    if damaged:  # so that a retry can send them, if only another column of theirs was wrong
        await connection.execute(update(message).where(is_among(damaged, connection)).values(attempts=1, stored_at=now))
    sequences = {row: sequence for sequence, row in enumerate(fresh, last + 1)}
    return [
        row._replace(
            state="sending",
            attempts=row.attempts + 1,
            sequence=sequences.get(row.id, row.sequence),
            owner=lead.owner,
            epoch=lead.epoch,
            state_at=now,
            next_attempt_at=None,
        )
        for row in rows
    ]


async def _set_last_sequence(connection: AsyncConnection, lead: Lead, sequence: int) -> None:
    await connection.execute(update(partition).where(partition.c.number == lead.partition).values(sequence=sequence))


async def settle(connection: AsyncConnection, lead: Lead, sent: Collection[int], dead: Mapping[int, str]) -> None:
    """Mark rows as sent or dead. See ``OutboxStore.settle``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _, now = await _lock_lead(connection, lead)
    await _settle(connection, lead, sent, dead, now)


async def _settle(
    connection: AsyncConnection, lead: Lead, sent: Collection[int], dead: Mapping[int, str], now: datetime
) -> None:
    if sent:
        chosen = update(message).where(is_among(sent, connection), _is_taken_under(lead))
        await connection.execute(chosen.values(state="sent", error=None, state_at=now))
    if dead:
        chosen = update(message).where(message.c.id == bindparam("row"), _is_taken_under(lead))
        await connection.execute(
            chosen.values(state="dead", error=bindparam("why"), state_at=now),
            [{"row": row, "why": error} for row, error in dead.items()],
        )


def _is_taken_under(lead: Lead) -> ColumnElement[bool]:
    """Return the condition that a message is being sent, and was taken under this very lead."""
    return is_in_state("sending") & (message.c.epoch == lead.epoch)


async def postpone(connection: AsyncConnection, lead: Lead, rows: Collection[int], error: str, delay: float) -> None:
    """Put rows back to pending for ``delay`` seconds. See ``OutboxStore.postpone``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    _, now = await _lock_lead(connection, lead)
    values = {"state": "pending", "error": error, "state_at": now, "next_attempt_at": now + timedelta(seconds=delay)}
    await connection.execute(update(message).where(is_among(rows, connection), _is_taken_under(lead)).values(values))


async def renumber(connection: AsyncConnection, lead: Lead, above: int) -> None:
    """Let rows that were taken once get new sequences, above ``above``. See ``OutboxStore.renumber``.

    Raises:
        LeadLost: another relay leads the partition.
    """
    last, now = await _lock_lead(connection, lead)
    await _set_last_sequence(connection, lead, max(last, above))
    taken_once = (message.c.partition == lead.partition) & (message.c.attempts == 1)
    await connection.execute(update(message).where(is_in_state(*UNSENT), taken_once).values(_without_sequence(now)))


async def forget(connection: AsyncConnection, keep_sent: float, limit: int) -> int:
    """Delete at most ``limit`` rows that were sent more than ``keep_sent`` seconds ago, the oldest first; return their number."""
    before = await read_clock(connection) - timedelta(seconds=keep_sent)
    return await _delete(connection, _is_oldest(connection, "sent", message.c.state_at <= before, limit))


# -- to look at and to mend ---------------------------------------------------------------------------------


async def select_leads(connection: AsyncConnection, partitions: int, now: datetime) -> dict[int, Lead]:
    """Return the leads whose lease runs, by partition."""
    leads = await connection.execute(
        select(*readable(connection, *partition.c))
        .where(partition.c.owner.is_not(None), partition.c.number < partitions)
        .order_by(partition.c.number)
    )
    return {
        row.number: Lead(
            partition=row.number, owner=to_text(row.owner), epoch=to_number(row.epoch), until=_to_end(row.until)
        )
        for row in leads
        if _to_end(row.until) > now
    }


async def rows(connection: AsyncConnection, state: State, after: int, limit: int, size: int) -> list[Row]:
    """Return at most ``limit`` rows in a state with ids above ``after``, by id; fewer if they reach ``size`` bytes before."""
    chosen = _select_up_to(connection, is_in_state(state) & (message.c.id > after), [message.c.id], limit, size)
    return [_to_row(found) for found in await connection.execute(chosen)]


async def find(connection: AsyncConnection, message_id: str) -> list[Row]:
    """Return the rows of a message's id. See ``OutboxStore.find``."""
    chosen = select(*readable(connection, *message.c)).where(message.c.message.contains(message_id, autoescape=True))
    found = await connection.execute(chosen.order_by(message.c.id).limit(FOUND_AT_MOST))
    return [row for row in map(_to_row, found) if row.message.message_id == message_id]


async def retry(connection: AsyncConnection, chosen: Collection[int] | None, after: int, limit: int) -> list[int]:
    """Make dead rows pending again, the chosen ones or all; return their ids. See ``OutboxStore.retry``."""
    wanted = message.c.id > after
    if chosen is not None:
        wanted &= is_among(chosen, connection)
    dead = _is_oldest(connection, "dead", wanted, limit)
    values = _without_sequence(await read_clock(connection))
    changed = await connection.execute(update(message).where(dead).values(values).returning(message.c.id))
    return sorted(changed.scalars())


async def replay(connection: AsyncConnection, since: datetime, before: datetime, limit: int) -> int:
    """Make at most ``limit`` rows pending again that were sent from ``since`` on and before ``before``; return their number."""
    period = (message.c.state_at >= to_utc(since)) & (message.c.state_at < to_utc(before))
    chosen = _is_oldest(connection, "sent", period, limit)
    values = _without_sequence(await read_clock(connection))
    return (await connection.execute(update(message).where(chosen).values(values))).rowcount


async def purge(connection: AsyncConnection, state: Literal["sent", "dead"], before: datetime, limit: int) -> int:
    """Delete at most ``limit`` rows that are sent or dead since before a time; return their number."""
    return await _delete(connection, _is_oldest(connection, state, message.c.state_at < to_utc(before), limit))


async def _delete(connection: AsyncConnection, chosen: ColumnElement[bool]) -> int:
    return (await connection.execute(delete(message).where(chosen))).rowcount


def _is_oldest(
    connection: AsyncConnection, state: State, condition: ColumnElement[bool], limit: int
) -> ColumnElement[bool]:
    """Return the condition that a message is among the oldest in a state that fulfil a condition, at most ``limit``."""
    order = (message.c.state_at, message.c.id) if state == "sent" else (message.c.id,)
    chosen = select(message.c.id).where(is_in_state(state), condition).order_by(*order).limit(limit)
    return message.c.id.in_(without_locked_rows(chosen, connection))


def _select_up_to(
    connection: AsyncConnection, condition: ColumnElement[bool], order: Sequence[Column[Any]], limit: int, size: int
) -> Select[Any]:
    """Select the first messages that fulfil a condition: at most ``limit``, fewer if they reach ``size`` bytes before.

    PostgreSQL reads a large message, and sends it, only if its row is in the result.
    """
    first = select(*readable(connection, *message.c)).where(condition).order_by(*order).limit(limit).subquery()
    size_before = func.sum(first.c.size).over(order_by=[first.c[column.name] for column in order], rows=(None, -1))
    found = select(first, func.coalesce(size_before, 0).label("size_before")).subquery()
    return select(found).where(found.c.size_before < size).order_by(*(found.c[column.name] for column in order))


def _without_sequence(now: datetime) -> dict[str, Any]:
    """Return the values of a row that is to get a new sequence."""
    return {"state": "pending", "attempts": 0, "sequence": NO_SEQUENCE, "state_at": now, "next_attempt_at": None}


def _to_row(found: sqlalchemy.Row[Any], number: int | None = None) -> Row:
    """Make a row, of the partition with this number if one is given; an unreadable row if a column has a wrong value."""
    values = [
        found.attempts,
        to_text(found.error),
        found.sequence,
        to_text(found.owner),
        found.epoch,
        to_time(found.stored_at),
        to_time(found.state_at),
        to_time(found.next_attempt_at),
    ]
    mended, problem = _columns.mend(values)
    state, stored_in = to_text(found.state), found.partition
    if number not in (None, stored_in):
        problem = f"its column partition has the value {stored_in!r:.100}"
    if state not in STATES:
        problem = f"its column state has the value {state!r:.100}"
    attempts, error, sequence, owner, epoch, stored_at, state_at, next_attempt_at = mended
    return Row(
        id=found.id,
        partition=stored_in if number is None else number,
        state=state,
        message=mark_unreadable(unpack(found.message), problem),
        attempts=attempts,
        error=error,
        sequence=None if sequence == NO_SEQUENCE else sequence,
        owner=owner,
        epoch=epoch,
        stored_at=stored_at,
        state_at=state_at,
        next_attempt_at=next_attempt_at,
    )
