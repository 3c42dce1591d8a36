"""The differences between PostgreSQL and SQLite: locks, clocks, arrays and partial indexes."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Dialect,
    LargeBinary,
    Select,
    String,
    Table,
    any_,
    case,
    cast,
    func,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from silbo.outbox.rows import STATES
from silbo.stores.sqlalchemy.tables import message, outbox

__all__ = [
    "FIRST_TIME",
    "LAST_TIME",
    "begin_writing",
    "check_constraints",
    "earliest",
    "end_frozen_sessions",
    "insert_missing",
    "is_among",
    "is_in_no_state",
    "is_in_state",
    "is_refusal_of_data",
    "limit_idling",
    "read_clock",
    "readable",
    "statement_time",
    "to_text",
    "to_time",
    "to_utc",
    "without_locked_rows",
]

ZONED: Final[DateTime] = DateTime(timezone=True)
FROZEN_AFTER_MS: Final = 5000
"""Milliseconds after which a relay's transaction that gets no further statement is ended, which frees what it has locked."""
_END_FROZEN: Final = text(
    """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE wait_event_type = 'Client' AND state <> 'idle' AND usename = current_user
      AND state_change < clock_timestamp() - make_interval(secs => :seconds)
      AND pid IN (
        SELECT pid FROM pg_locks
        WHERE relation = CAST('silbo_partition' AS regclass) AND mode IN ('RowShareLock', 'RowExclusiveLock') AND granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      )
    """
)
FIRST_TIME: Final = datetime(2, 1, 1, tzinfo=UTC)
LAST_TIME: Final = datetime(9998, 12, 31, tzinfo=UTC)
NO_TIME: Final = datetime(1, 1, 2, tzinfo=UTC)
"""Stands for a time that Python does not have, as PostgreSQL's infinity."""
TIME_PATTERN: Final = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9] *"
"""The beginning of a time as SQLAlchemy stores it in SQLite."""


async def begin_writing(connection: AsyncConnection) -> None:
    """Begin an SQLite transaction that reads first with a write: it waits for its turn, and can't fail half-way."""
    if connection.dialect.name != "postgresql":
        await connection.execute(update(outbox).values(number=outbox.c.number))


def limit_idling(dialect: Dialect) -> list[ColumnElement[Any]]:
    """Return a column to select, by which PostgreSQL ends this transaction if its process is frozen in it; none on SQLite.

    Without it other relays wait for the locks of a frozen one for as long as it is frozen. A column, to save the round trip.
    """
    if dialect.name != "postgresql":
        return []
    return [func.set_config("idle_in_transaction_session_timeout", str(FROZEN_AFTER_MS), True).label("idle_limit")]


async def end_frozen_sessions(connection: AsyncConnection) -> None:
    """End sessions of the same user on PostgreSQL that may have locked a partition, and wait for their client for too long.

    :func:`limit_idling` does not count while a driver prepares a statement (asyncpg then waits without a Sync), nor while
    PostgreSQL waits to hand over a result; no other limit does before PostgreSQL 17.
    """
    if connection.dialect.name == "postgresql":
        await connection.execute(_END_FROZEN, {"seconds": FROZEN_AFTER_MS / 1000})


async def check_constraints(connection: AsyncConnection) -> None:
    """Check now what is to be checked at the commit: constraints and triggers of the host's that are deferred."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))


def insert_missing(dialect_name: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    """Return a statement that inserts those rows whose key the table does not have yet."""
    insert = postgresql.insert if dialect_name == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing()


def is_refusal_of_data(error: object, *, at_commit: bool = False) -> bool:
    """Return True if the database refused values of a statement: no outage, and the same values are refused again.

    Args:
        error: Of a statement.
        at_commit: Also of a commit, where constraints and triggers of the host's may be checked that are deferred.

    Source: SQLSTATE classes 22 (data exception), 23 (integrity constraint violation: of the host's, for silbo has none that its
    own rows violate), 44 (WITH CHECK OPTION violation) and 54 (program limit exceeded), and P0001 (RAISE EXCEPTION, in a trigger
    of the host's), PostgreSQL's appendix A.
    """
    if isinstance(error, UnicodeError):  # half of a surrogate pair
        return True
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return False
    if error.statement is None and not at_commit:
        return False
    state = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, (DataError, IntegrityError)) or state[:2] in ("22", "23", "44", "54") or state == "P0001"


def readable(connection: AsyncConnection, *columns: Column[Any]) -> list[ColumnElement[Any]]:
    """Return columns to select whose values can be read whatever is stored there; :func:`to_text` and :func:`to_time` read them.

    On SQLite texts and times come as bytes: one that is damaged, or of another type, would make the driver fail for all rows. On
    PostgreSQL a time that Python does not have comes as one of the year 1.
    """
    if connection.dialect.name == "postgresql":
        return [_within_python(column) if isinstance(column.type, DateTime) else column for column in columns]
    return [
        cast(column, LargeBinary).label(column.name) if isinstance(column.type, String | DateTime) else column
        for column in columns
    ]


def earliest(connection: AsyncConnection, column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return an expression for the earliest time in a column of a group of rows, without values that are no times."""
    if connection.dialect.name == "postgresql":
        return func.min(case((column.between(FIRST_TIME, LAST_TIME), column)))
    return cast(func.min(case((column.op("GLOB")(TIME_PATTERN), column))), LargeBinary)


def _within_python(column: Column[Any]) -> ColumnElement[Any]:
    within = column.is_(None) | column.between(FIRST_TIME, LAST_TIME)
    return case((within, column), else_=literal(NO_TIME, ZONED)).label(column.name)


def to_text(value: Any) -> Any:
    """Return a text as :func:`readable` selects it; a byte that is no UTF-8 as a backslash escape."""
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else value


def to_time(value: Any) -> Any:
    """Return a time as :func:`readable` selects it, with its zone; None, or the text of a value that is no time."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return str(value) if value.year == NO_TIME.year else to_utc(value)
    written = to_text(value)
    try:
        return to_utc(datetime.fromisoformat(written))
    except ValueError:
        return written


def is_in_state(*states: str) -> ColumnElement[bool]:
    """Return the condition that a message is in one of the states.

    The states are literals, not parameters: PostgreSQL uses a partial index only where the statement itself shows that the
    index has all rows.
    """
    return message.c.state.in_([literal_column(f"'{state}'") for state in states])


def is_in_no_state() -> ColumnElement[bool]:
    """Return the condition that a message is in a state that does not exist; see :func:`is_in_state`."""
    return message.c.state.not_in([literal_column(f"'{state}'") for state in STATES])


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
