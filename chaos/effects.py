"""Effects in a database, in one transaction with the inbox that remembers them."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import create_async_engine

from chaos.events import Counted
from silbo.stores.sqlalchemy import SQLAlchemyInbox, current_session

__all__ = ["Effects"]

TABLE = "CREATE TABLE IF NOT EXISTS effect (event TEXT NOT NULL)"


class Effects:
    """A listener whose effect is a row; nothing but the inbox keeps it from having two."""

    def __init__(self, path: str) -> None:
        self._engine = create_async_engine(f"sqlite+aiosqlite:///{path}", connect_args={"timeout": 30})
        event.listen(self._engine.sync_engine, "connect", _quickly)
        self.inbox = SQLAlchemyInbox(self._engine)

    async def __aenter__(self) -> Self:
        await self.inbox.create()
        async with self._engine.begin() as connection:
            await connection.execute(text(TABLE))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._engine.dispose()

    async def have(self, charged: Counted) -> None:
        """One more row."""
        await current_session().execute(text("INSERT INTO effect VALUES (:event)"), {"event": str(charged.event_id)})


def _quickly(connection: Any, record: object) -> None:
    """Processes are killed here, machines are not."""
    connection.execute("PRAGMA synchronous=OFF")
