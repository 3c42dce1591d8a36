"""silbo's tables in the host's database: their columns, making them, and checking that the database has them."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable

from silbo.errors import StoreInvalid
from silbo.outbox.rows import NO_SEQUENCE
from silbo.stores.sqlalchemy.urls import describe_url

__all__ = [
    "ADVISORY_LOCKS",
    "check_tables",
    "create_tables",
    "inbox",
    "message",
    "metadata",
    "outbox",
    "partition",
    "relay",
]

ADVISORY_LOCKS: Final = 0x73696C62
"""The first half of the key of silbo's advisory locks: "silb" in ASCII. A lock of a message key has its number as second half."""
CREATE_LOCK: Final = -1
"""The second half of the lock under which tables are made."""

_ROW_ID = BigInteger().with_variant(Integer, "sqlite")  # on SQLite only INTEGER counts up by itself
_UNSENT = text("state IN ('pending', 'sending')")
_STRAY = text("state NOT IN ('pending', 'sending', 'sent', 'dead')")

metadata: Final[MetaData] = MetaData()
"""silbo's tables, for Alembic's ``target_metadata`` or for ``metadata.create_all``."""

outbox: Final[Table] = Table(
    "silbo_outbox",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False, comment="1: there is one row"),
    Column("id", String(32), nullable=False),
    Column("partitions", Integer, nullable=False),
)

partition: Final[Table] = Table(
    "silbo_partition",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("owner", Text),
    Column("epoch", BigInteger, nullable=False),
    Column("until", DateTime(timezone=True), comment="the end of the owner's lease"),
    Column("sequence", BigInteger, nullable=False, comment="the last that was given"),
)

relay: Final[Table] = Table(
    "silbo_relay",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("joined_at", DateTime(timezone=True), nullable=False),
    Column("until", DateTime(timezone=True), nullable=False, comment="counts no longer after this time"),
)

message: Final[Table] = Table(
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
    Index("silbo_message_stray", "partition", postgresql_where=_STRAY, sqlite_where=_STRAY),
    sqlite_autoincrement=True,
)

inbox: Final[Table] = Table(
    "silbo_inbox",
    metadata,
    Column("consumer_group", Text, primary_key=True),
    Column("publication", Text, primary_key=True),
    Column("handled_at", DateTime(timezone=True), nullable=False),
    Index("silbo_inbox_handled", "handled_at"),
)


async def create_tables(connection: AsyncConnection) -> None:
    """Make the tables and indexes that are missing. Several processes may do so at the same time."""
    if connection.dialect.name == "postgresql":  # of two at once, even IF NOT EXISTS fails for the second
        await connection.execute(select(func.pg_advisory_xact_lock(ADVISORY_LOCKS, CREATE_LOCK)))
    for table in metadata.sorted_tables:
        await connection.execute(CreateTable(table, if_not_exists=True))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            await connection.execute(CreateIndex(index, if_not_exists=True))


async def check_tables(connection: AsyncConnection, *tables: Table) -> None:
    """Check that the database has these tables with the columns of this version of silbo.

    Raises:
        StoreInvalid: a table is missing, or older or newer than this silbo; the text says what to do.
    """
    problem = await connection.run_sync(_find_problem, tables)
    if problem is not None:
        raise StoreInvalid(describe_url(connection.engine.url), problem)


def _find_problem(connection: Connection, tables: tuple[Table, ...]) -> str | None:
    inspector = inspect(connection)
    missing = [table.name for table in tables if not inspector.has_table(table.name)]
    if missing:
        return (
            f"there is no table {', '.join(missing)}. With Alembic: add silbo.stores.sqlalchemy.metadata to the "
            "target_metadata in env.py, then `alembic revision --autogenerate` and `alembic upgrade head`. "
            "Without it: `await SQLAlchemyStore(engine).create()`"
        )
    for table in tables:
        has = {column["name"] for column in inspector.get_columns(table.name)}
        wants = set(table.columns.keys())
        if wants - has:
            return (
                f"table {table.name} is an older silbo's, without {', '.join(sorted(wants - has))}: "
                "`alembic revision --autogenerate` and `alembic upgrade head` bring it up to date"
            )
        if has - wants:
            return f"table {table.name} is a newer silbo's, with {', '.join(sorted(has - wants))}: update silbo"
    return None
