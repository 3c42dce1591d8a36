"""The store and the Redis that the arguments name."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from silbo.cli.arguments import UsageError
from silbo.errors import StoreInvalid
from silbo.outbox.rows import OutboxStore
from silbo.stores.sqlite import SQLiteStore

__all__ = ["opened_store", "redis_at", "store_at"]

FILE: Final = "sqlite:///"
DRIVERS: Final = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


@asynccontextmanager
async def store_at(place: str | None) -> AsyncGenerator[OutboxStore]:
    """The store, not opened yet. It is never made: a mistaken path must not become a new, empty store.

    Raises:
        UsageError: the place says nothing, or nothing that is understood.
        MissingExtra: it needs SQLAlchemy.
    """
    if not place:
        raise UsageError("where is the outbox? Give --store, or SILBO_STORE in the environment")
    scheme, has_scheme, _ = place.partition("://")
    if not has_scheme:
        yield SQLiteStore(place, create=False)
    elif place.startswith(FILE) and place != FILE:
        yield SQLiteStore(place.removeprefix(FILE), create=False)
    elif "+" in scheme:
        async with _database(place) as store:
            yield store
    else:
        hint = f"{DRIVERS.get(scheme, 'postgresql+asyncpg')}://... for a database, outbox.db or sqlite:///outbox.db"
        raise UsageError(f"{scheme}:// is no store: write {hint} for a file")


@asynccontextmanager
async def opened_store(place: str | None) -> AsyncGenerator[OutboxStore]:
    """The store, open.

    Raises:
        StoreInvalid: there is none, or it is another version's.
        StoreUnavailable: it can't be opened.
    """
    async with store_at(place) as store:
        await store.open()
        try:
            yield store
        finally:
            await store.aclose()


@asynccontextmanager
async def redis_at(url: str | None) -> AsyncGenerator[Redis]:
    """A client; it has not connected yet.

    Raises:
        UsageError: no URL, or none that is understood.
    """
    if not url:
        raise UsageError("where is Redis? Give --redis, or SILBO_REDIS_URL in the environment")
    try:
        client = Redis.from_url(url)
    except ValueError as error:
        raise UsageError(f"--redis: {error}") from error
    async with client:
        yield client


@asynccontextmanager
async def _database(url: str) -> AsyncGenerator[OutboxStore]:
    from silbo.stores.sqlalchemy import SQLAlchemyStore  # first: its MissingExtra says what to install

    from sqlalchemy.exc import SQLAlchemyError  # isort: skip
    from sqlalchemy.ext.asyncio import create_async_engine  # isort: skip

    try:
        engine = create_async_engine(url)
    except SQLAlchemyError as error:
        raise UsageError(f"--store: {error}") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--store: its driver is not installed: pip install {error.name}") from error
    try:
        if engine.url.get_backend_name() == "sqlite":
            _must_exist(engine.url.database or ":memory:")
        yield SQLAlchemyStore(engine)
    finally:
        await engine.dispose()


def _must_exist(file: str) -> None:
    """Or SQLite would make it."""
    if not Path(file).exists():
        raise StoreInvalid(file, "there is no such file")
