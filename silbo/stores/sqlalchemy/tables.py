"""The tables in the host's database, and whether they are there."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Dialect,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    func,
    inspect,
    literal,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable

from silbo.errors import StoreInvalid

__all__ = ["NO_SEQUENCE", "inbox", "message", "metadata", "outbox", "partition"]

NO_SEQUENCE: Final = 1 << 62
"""Behind every sequence, so that one index has the rows in the order in which they are taken."""
LOCKS: Final = 0x73696C62  # "silb"
"""The first half of every advisory lock of ours."""
CREATING: Final = -1
"""The second half of one."""

_ROW_ID = BigInteger().with_variant(Integer, "sqlite")  # on SQLite only INTEGER counts up by itself
_UNSENT = text("state IN ('pending', 'sending')")

metadata: Final[MetaData] = MetaData()
"""Silbo's tables, for Alembic's ``target_metadata`` or for ``metadata.create_all``."""

outbox: Final = Table(
    "silbo_outbox",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False, comment="1: there is one row"),
    Column("id", String(32), nullable=False),
    Column("partitions", Integer, nullable=False),
)

partition: Final = Table(
    "silbo_partition",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("until", DateTime(timezone=True), comment="the end of the owner's lease"),
    Column("sequence", BigInteger, nullable=False, comment="the last that was given"),
)

message: Final = Table(
    "silbo_message",
    metadata,
    Column("id", _ROW_ID, primary_key=True),
    Column("partition", Integer, nullable=False),
    Column("state", Text, nullable=False, comment="pending, sending, sent or dead"),
    Column("message", Text, nullable=False, comment="JSON"),
    Column("size", Integer, nullable=False, comment="bytes of the message"),
    Column("attempts", Integer, nullable=False),
    Column("error", Text),
    Column("sequence", BigInteger, nullable=False, comment=f"{NO_SEQUENCE}: none yet"),
    Column("owner", Text),
    Column("epoch", BigInteger),
    Column("stored_at", DateTime(timezone=True), nullable=False),
    Column("state_at", DateTime(timezone=True), nullable=False),
    Column("next_attempt_at", DateTime(timezone=True)),
    Index("silbo_message_unsent", "partition", "sequence", "id", postgresql_where=_UNSENT, sqlite_where=_UNSENT),
    Index(
        "silbo_message_sent",
        "state_at",
        "id",
        postgresql_where=text("state = 'sent'"),
        sqlite_where=text("state = 'sent'"),
    ),
    Index("silbo_message_dead", "id", postgresql_where=text("state = 'dead'"), sqlite_where=text("state = 'dead'")),
    sqlite_autoincrement=True,
)

inbox: Final = Table(
    "silbo_inbox",
    metadata,
    Column("consumer_group", Text, primary_key=True),
    Column("publication", Text, primary_key=True),
    Column("handled_at", DateTime(timezone=True), nullable=False),
    Index("silbo_inbox_handled", "handled_at"),
)


async def create(connection: AsyncConnection) -> None:
    """Make the tables that are not there; several processes may do so at once."""
    if connection.dialect.name == "postgresql":  # where even IF NOT EXISTS is an error for the second of two
        await connection.execute(select(func.pg_advisory_xact_lock(LOCKS, CREATING)))
    for table in metadata.sorted_tables:
        await connection.execute(CreateTable(table, if_not_exists=True))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            await connection.execute(CreateIndex(index, if_not_exists=True))


async def check(connection: AsyncConnection, *tables: Table) -> None:
    """Look whether tables are there, and as this version of silbo has them.

    Raises:
        StoreInvalid: with what to do.
    """
    problem = await connection.run_sync(_problem, tables)
    if problem is not None:
        raise StoreInvalid(str(connection.engine.url), problem)


def _problem(connection: Connection, tables: tuple[Table, ...]) -> str | None:
    inspector = inspect(connection)
    missing = [table.name for table in tables if not inspector.has_table(table.name)]
    if missing:
        return (
            f"there is no table {', '.join(missing)}. With Alembic: add silbo.stores.sqlalchemy.metadata to the "
            "target_metadata in env.py, then `alembic revision --autogenerate` and `alembic upgrade head`. "
            "Without it: `await SQLAlchemyStore(engine).create()`"
        )
    for table in tables:
        has, wants = {column["name"] for column in inspector.get_columns(table.name)}, set(table.columns.keys())
        if wants - has:
            return (
                f"table {table.name} is an older silbo's, without {', '.join(sorted(wants - has))}: "
                "`alembic revision --autogenerate` and `alembic upgrade head` bring it up to date"
            )
        if has - wants:
            return f"table {table.name} is a newer silbo's, with {', '.join(sorted(has - wants))}: update silbo"
    return None


async def open_store(connection: AsyncConnection, partitions: int | None) -> tuple[str, int]:
    """The store's id and its partitions.

    Raises:
        StoreInvalid: it has other partitions, which are in use.
    """
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    first = {"number": 1, "id": uuid4().hex, "partitions": partitions or 1}
    await connection.execute(insert(outbox).on_conflict_do_nothing(), [first])
    identity, has = (await connection.execute(select(outbox.c.id, outbox.c.partitions))).one()
    if partitions is not None and partitions != has:
        await _change(connection, has, partitions)
        has = partitions
    rows = [{"number": number, "epoch": 0, "sequence": 0} for number in range(has)]
    await connection.execute(insert(partition).on_conflict_do_nothing(), rows)
    return identity, has


async def _change(connection: AsyncConnection, has: int, partitions: int) -> None:
    """Give the store other partitions, with no transaction beside us that stores.

    Raises:
        StoreInvalid: a relay leads, or messages wait: their keys would be looked for elsewhere.
    """
    if connection.dialect.name == "postgresql":  # whoever has inserted a row holds a lock that this one waits for
        await connection.execute(text("LOCK TABLE silbo_message IN EXCLUSIVE MODE"))
    leases = await connection.execute(select(partition.c.owner, partition.c.until).with_for_update())
    now = await clock(connection)
    if any(owner is not None and utc(until) > now for owner, until in leases):
        problem = f"a relay sends from its {has} partitions; stop the relays before it has {partitions}"
        raise StoreInvalid(str(connection.engine.url), problem)
    waiting = await connection.scalar(select(func.count()).where(state_is("pending", "sending", "dead")))
    if waiting:
        problem = f"holds {waiting} messages in {has} partitions; send them all before it has {partitions}"
        raise StoreInvalid(str(connection.engine.url), problem)
    await connection.execute(update(outbox).values(partitions=partitions))


def state_is(*states: str) -> ColumnElement[bool]:
    """Written out, for PostgreSQL uses a partial index only where it sees that the index has all rows."""
    return message.c.state.in_([literal_column(f"'{state}'") for state in states])


def free(which: Select[*tuple[Any, ...]], connection: AsyncConnection) -> Select[*tuple[Any, ...]]:
    """The rows that nobody else is about to change, for a statement that changes them."""
    if connection.dialect.name != "postgresql":  # has one writer; and after a WITH, Python's sqlite3 counts no rows
        return which
    # Not as a subquery, which PostgreSQL may run more than once, each time with other rows.
    return select(which.with_for_update(skip_locked=True).cte("free"))


async def begin(connection: AsyncConnection) -> None:
    """Begin an SQLite transaction that reads first with a write: so it waits for its turn, and can't fail half-way."""
    if connection.dialect.name != "postgresql":
        await connection.execute(update(outbox).values(number=outbox.c.number))


# -- time ---------------------------------------------------------------------------------------------------


async def clock(connection: AsyncConnection) -> datetime:
    """The database's; SQLite has none but this machine's."""
    if connection.dialect.name == "postgresql":
        return utc(await connection.scalar(select(func.clock_timestamp(type_=DateTime(timezone=True)))))
    return datetime.now(UTC)


def now(dialect: Dialect) -> ColumnElement[datetime]:
    """The database's clock, within a statement: the same all over it."""
    if dialect.name == "postgresql":
        return func.statement_timestamp(type_=DateTime(timezone=True))
    return literal(datetime.now(UTC), DateTime(timezone=True))


def utc(time: datetime | None) -> datetime:
    """As it was stored: SQLite keeps no zone."""
    assert time is not None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
