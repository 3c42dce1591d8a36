"""PostgreSQL's NOTIFY and LISTEN: a relay learns of a commit at once. By choice only, for commits then wait for one another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from silbo.errors import StoreInvalid
from silbo.stores.sqlalchemy.urls import describe_url

__all__ = ["check_driver", "listen", "notify"]

CHANNEL: Final = "silbo_message"
CHECK_EVERY: Final = 30.0
"""Seconds after which a connection that has brought nothing is asked if it still stands."""
CHECK_TIMEOUT: Final = 10.0
_NOTIFY: Final = select(func.pg_notify(CHANNEL, ""))


def check_driver(engine: AsyncEngine) -> None:
    """Refuse an engine that can't be listened on.

    Raises:
        StoreInvalid: it is not one of PostgreSQL with asyncpg.
    """
    if (engine.dialect.name, engine.dialect.driver) != ("postgresql", "asyncpg"):
        problem = "notify=True needs PostgreSQL, and an engine of postgresql+asyncpg://"
        raise StoreInvalid(describe_url(engine.url), problem)


async def notify(connection: AsyncConnection) -> None:
    """Tell all who listen that something is stored, when this transaction commits."""
    await connection.execute(_NOTIFY)


async def listen(engine: AsyncEngine, heard: Callable[[], object]) -> None:
    """Call ``heard`` now, and after each commit that was notified, until the connection ends.

    Raises:
        OSError: the connection broke, or is not answered; or an error of the driver's, if it can't be made.
    """
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        ended = asyncio.Event()

        def hear(*_: object) -> None:
            heard()

        try:
            driver.add_termination_listener(lambda _: ended.set())
            await driver.add_listener(CHANNEL, hear)
            heard()  # of what was committed before
            while not ended.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(CHECK_EVERY):
                        await ended.wait()
                if not ended.is_set():
                    await driver.execute("SELECT 1", timeout=CHECK_TIMEOUT)
        finally:
            await connection.invalidate()  # the pool's next user wants no listener
    raise ConnectionError("the connection that listens has ended")
