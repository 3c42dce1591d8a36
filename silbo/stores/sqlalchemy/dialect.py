"""The differences between PostgreSQL and SQLite: locks, clocks, arrays and partial indexes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    CursorResult,
    DateTime,
    Dialect,
    LargeBinary,
    Select,
    Table,
    any_,
    cast,
    func,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.stores.sqlalchemy.tables import message, outbox

__all__ = [
    "begin_writing",
    "insert_missing",
    "is_among",
    "is_in_state",
    "is_refusal_of_data",
    "read_clock",
    "select_rows",
    "statement_time",
    "to_utc",
    "without_locked_rows",
]

ZONED: Final[DateTime] = DateTime(timezone=True)


async def begin_writing(connection: AsyncConnection) -> None:
    """Begin an SQLite transaction that reads first with a write: it waits for its turn, and can't fail half-way."""
    if connection.dialect.name != "postgresql":
        await connection.execute(update(outbox).values(number=outbox.c.number))


async def insert_missing(
    connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]]
) -> CursorResult[Any]:
    """Insert those of the rows whose key the table does not have yet."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return await connection.execute(insert(table).on_conflict_do_nothing(), rows)


def is_refusal_of_data(error: object) -> bool:
    """Return True if the database refused values of a statement: no outage, and the same values are refused again.

    Source: SQLSTATE classes 22 (data exception), 23 (integrity constraint violation: of the host's, for silbo has none that its
    own rows violate) and 54 (program limit exceeded), PostgreSQL's appendix A.
    """
    if isinstance(error, UnicodeError):  # half of a surrogate pair
        return True
    if not isinstance(error, DBAPIError) or error.connection_invalidated or error.statement is None:
        return False
    state = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, (DataError, IntegrityError)) or state[:2] in ("22", "23", "54")


def select_rows(connection: AsyncConnection) -> Select[*tuple[Any, ...]]:
    """Select all columns of messages. On SQLite the JSON comes as bytes: a damaged text would make its driver fail for all rows."""
    if connection.dialect.name == "postgresql":
        return select(message)
    others = [column for column in message.c if column.name != "message"]
    return select(*others, cast(message.c.message, LargeBinary).label("message"))


def is_in_state(*states: str) -> ColumnElement[bool]:
    """Return the condition that a message is in one of the states.

    The states are literals, not parameters: PostgreSQL uses a partial index only where the statement itself shows that the
    index has all rows.
    """
    return message.c.state.in_([literal_column(f"'{state}'") for state in states])


def is_among(rows: Collection[int], connection: AsyncConnection) -> ColumnElement[bool]:
    """Return the condition that a message's id is one of these; on PostgreSQL one statement text for any number of ids."""
    if connection.dialect.name == "postgresql":
        return message.c.id == any_(literal(list(rows), ARRAY(BigInteger)))
    return message.c.id.in_(rows)


def without_locked_rows(chosen: Select[*tuple[Any, ...]], connection: AsyncConnection) -> Select[*tuple[Any, ...]]:
    """Return a selection without the rows that another transaction is about to change, for a statement that changes them."""
    if connection.dialect.name != "postgresql":  # has one writer; and after a WITH, Python's sqlite3 counts no rows
        return chosen
    # Not as a subquery, which PostgreSQL may run more than once, each time with other rows.
    return select(chosen.with_for_update(skip_locked=True).cte("free"))


# -- time ---------------------------------------------------------------------------------------------------


async def read_clock(connection: AsyncConnection) -> datetime:
    """Return the time of the database's clock, in UTC. SQLite has no clock but this machine's."""
    if connection.dialect.name == "postgresql":
        return to_utc(await connection.scalar(select(func.clock_timestamp(type_=ZONED))))
    return datetime.now(UTC)


def statement_time(dialect: Dialect) -> ColumnElement[datetime]:
    """Return an expression for the database's clock within a statement: the same value in all of the statement."""
    if dialect.name == "postgresql":
        return func.statement_timestamp(type_=ZONED)
    return literal(datetime.now(UTC), ZONED)


def to_utc(time: datetime | None) -> datetime:
    """Return a stored time, which must not be None, with its zone: SQLite keeps none, and all times are stored in UTC."""
    assert time is not None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
