"""Connections from arguments: the outbox's store of ``--store``, the client of ``--redis``."""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from silbo.cli.arguments import Time, UsageError, find_moment
from silbo.errors import BrokerUnavailable, ClusterClientNeeded, StoreInvalid
from silbo.outbox.rows import OutboxStore
from silbo.stores.sqlite import SQLiteStore

if TYPE_CHECKING:
    from silbo.brokers.redis.connection import Client

__all__ = ["find_redis_moment", "make_redis", "make_store", "open_store", "refuse_node"]

FILE: Final = "sqlite:///"
"""The beginning of the URL of an SQLite file without SQLAlchemy."""
REDIS_FORM: Final = "write redis://user:password@host:6379/0, rediss://... or unix://..."
STORE_FORM: Final = "write postgresql+asyncpg://user:password@host:5432/database"
ESCAPES: Final = "in a password write %2F for /, %23 for #, %3F for ? and %40 for @"
LOOK_WITHIN: Final = 1.0
"""It is looked for at most 1 second if Redis is a node of a cluster."""
DRIVERS: Final = {"postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
"""URL schemes without a driver, with the scheme to suggest."""


@asynccontextmanager
async def make_store(url: str | None, *, notify: bool = False) -> AsyncGenerator[OutboxStore]:
    """Make the store object of a path or URL, without opening it.

    The store has to exist: a mistaken path must not become a new, empty store.

    Args:
        url: The path or URL.
        notify: As in ``SQLAlchemyStore``.

    Raises:
        UsageError: there is no URL, its scheme or driver is unknown, or it can't notify.
        MissingExtra: the URL needs SQLAlchemy.
        StoreInvalid: the URL is of an SQLite file that does not exist.
    """
    if not url:
        raise UsageError("where is the outbox? Give --store, or SILBO_STORE in the environment")
    scheme, has_scheme, _ = url.partition("://")
    if notify and scheme != "postgresql+asyncpg":
        raise UsageError("--notify needs an outbox in PostgreSQL: --store postgresql+asyncpg://user@host/database")
    if not has_scheme:
        if _is_torn_url(url):
            raise UsageError(f"--store is neither a file nor a URL: {STORE_FORM}, or the path of a file")
        yield SQLiteStore(url, create=False)
    elif url.startswith(FILE) and url != FILE:
        yield SQLiteStore(url.removeprefix(FILE), create=False)
    elif "+" in scheme:
        async with _make_database_store(url, notify) as store:
            yield store
    else:
        hint = f"{DRIVERS.get(scheme, 'postgresql+asyncpg')}://... for a database, outbox.db or sqlite:///outbox.db"
        raise UsageError(f"{scheme}:// is no store: write {hint} for a file")


@asynccontextmanager
async def open_store(url: str | None) -> AsyncGenerator[OutboxStore]:
    """Open the store of a path or URL; close it at the end of the block.

    Raises:
        UsageError: as :func:`make_store`.
        MissingExtra: as :func:`make_store`.
        StoreInvalid: there is no store, or it is of another version.
        StoreUnavailable: the store can't be opened at the moment; safe to repeat.
    """
    async with make_store(url) as store:
        await store.open()
        try:
            yield store
        finally:
            await store.aclose()


@asynccontextmanager
async def make_redis(options: argparse.Namespace) -> AsyncGenerator[Client]:
    """Make a client, whose settings silbo's own connections have; close it at the end of the block.

    Args:
        options: Those of ``add_redis_options``.

    Raises:
        UsageError: there is no URL, or it is not a URL of Redis, or not one of a cluster's node, or not one with TLS.
    """
    url: str | None = options.redis
    if not url:
        raise UsageError("where is Redis? Give --redis, or SILBO_REDIS_URL in the environment")
    from redis.asyncio import Redis, RedisCluster  # here: the commands of an outbox don't need it

    try:
        parts = urlsplit(url)
        if parts.scheme != "unix" and "@" in url and "@" not in parts.netloc:
            raise ValueError("its password ends the address")
        tls = {"ssl_ca_certs": options.cacert, "ssl_certfile": options.cert}
        tls = {name: path for name, path in tls.items() if path is not None}
        if tls and parts.scheme != "rediss":
            raise UsageError("--cacert and --cert are for a server with TLS: write rediss://user:password@host:6379/0")
        plain = Redis.from_url(url, **tls)
        plain.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # refuses unknown options
        if options.cluster and parts.scheme == "unix":
            raise UsageError("--cluster needs the host and port of a node: " + REDIS_FORM)
        client = RedisCluster.from_url(url, **tls) if options.cluster else plain
    except (ValueError, TypeError):  # whose text may have a part of the password
        raise UsageError(f"--redis is no URL of Redis, or has an unknown option: {REDIS_FORM}; {ESCAPES}") from None
    try:
        yield client
    finally:
        await client.aclose()


async def find_redis_moment(client: Client, time: Time) -> datetime:
    """Return the moment that a time means by Redis's clock, which gives entries their ids; this machine's may differ.

    Raises:
        BrokerUnavailable: Redis can't be reached, or refuses.
    """
    from silbo.operations.redis import opened, read_clock  # here: as in make_redis

    async with opened(client, 5.0) as connection:
        return find_moment(time, await read_clock(connection))


async def refuse_node(client: Client) -> None:
    """Refuse one of the nodes of a cluster at once, for a command that takes a trouble with Redis as something to wait for or to show.

    Raises:
        ClusterClientNeeded: the client is for a single server.
    """
    from silbo.operations.redis import opened, read_clock  # here: as in make_redis

    try:
        async with opened(client, LOOK_WITHIN) as connection:
            await read_clock(connection)
    except ClusterClientNeeded:
        raise
    except BrokerUnavailable:  # the command itself tells it
        pass


@asynccontextmanager
async def _make_database_store(url: str, notify: bool) -> AsyncGenerator[OutboxStore]:
    from silbo.stores.sqlalchemy import SQLAlchemyStore  # first: its MissingExtra says what to install

    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError  # isort: skip
    from sqlalchemy.ext.asyncio import create_async_engine  # isort: skip

    try:
        engine = create_async_engine(url)
    except NoSuchModuleError as error:
        raise UsageError(f"--store: {error}") from error
    except (SQLAlchemyError, ValueError, TypeError):  # as in make_redis
        raise UsageError(
            f"--store is no URL of a database, or has an unknown option: {STORE_FORM}; {ESCAPES}"
        ) from None
    except ModuleNotFoundError as error:
        raise UsageError(f"--store: its driver is not installed: pip install {error.name}") from error
    try:
        if engine.url.get_backend_name() == "sqlite":
            _check_exists(engine.url.database or ":memory:")
        yield SQLAlchemyStore(engine, notify=notify)
    finally:
        await engine.dispose()


def _is_torn_url(text: str) -> bool:
    """Return True for a URL without its ``//``, which is no path: an error must not show the password in it."""
    return "@" in text and not Path(text).exists()


def _check_exists(file: str) -> None:
    """Raise StoreInvalid if there is no such file: SQLite would make it."""
    if not Path(file).exists():
        raise StoreInvalid(file, "there is no such file")
