"""A real PostgreSQL for every test that asks for one.

postgres         a server shared by the tests of one worker; `engine` has a schema of its own on it
own_postgres     a server that this test alone may kill, with every commit on its disk
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from silbo.stores.sqlalchemy import SQLAlchemyStore
from tools.postgres import PostgresNotFound, PostgresServer, find_postgres
from tools.rabbitmq import RabbitMQNotFound, find_rabbitmq


def pytest_configure() -> None:
    """Missing servers are a failure, and no skip: each with the line to install it."""
    missing: list[str] = []
    for find in (find_postgres, find_rabbitmq):
        try:
            find()
        except (PostgresNotFound, RabbitMQNotFound) as error:
            missing.append(str(error))
    if missing:
        raise pytest.UsageError("\n".join(missing))


def pytest_report_header() -> str:
    return f"postgresql: {find_postgres()}; rabbitmq: {find_rabbitmq()}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer(fsync=False, config={"track_commit_timestamp": "on"}) as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture
async def schema(postgres: PostgresServer) -> AsyncIterator[str]:
    """Fresh in every test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = create_async_engine(postgres.url)
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE SCHEMA {name}"))
    yield name
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    await engine.dispose()


@pytest.fixture
async def make_engine(postgres: PostgresServer, schema: str) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Engines on the schema, as several processes have each their own."""
    engines: list[AsyncEngine] = []

    def make(**options: object) -> AsyncEngine:
        settings = {"server_settings": {"search_path": schema}}
        engines.append(create_async_engine(postgres.url, connect_args=settings, **options))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


@pytest.fixture
async def engine(make_engine: Callable[..., AsyncEngine]) -> AsyncEngine:
    """The host's, with silbo's tables."""
    engine = make_engine()
    await SQLAlchemyStore(engine).create()
    return engine
