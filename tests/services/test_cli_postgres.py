"""The command line on an outbox in PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from silbo import Outbox
from silbo.brokers.memory import MemoryBroker
from silbo.stores.sqlalchemy import SQLAlchemyStore
from tests.support.command_line import message, relay, silbo, stopped
from tests.support.redis_streams import eventually
from tools.postgres import PostgresServer

pytestmark = pytest.mark.postgresql

MANY, KEYS = 20_000, 7


@pytest.fixture
async def outbox(own_postgres: PostgresServer) -> AsyncIterator[Outbox]:
    engine = create_async_engine(own_postgres.url)
    store = SQLAlchemyStore(engine)
    await store.create()
    async with Outbox(store, MemoryBroker(app="shop"), relay=False, partitions=2) as outbox:
        await outbox.publish(*(message(number, number % KEYS) for number in range(MANY)))
        yield outbox
    await engine.dispose()


async def test_a_killed_relay_and_a_restarted_database_lose_nothing(
    outbox: Outbox, own_postgres: PostgresServer, redis: Redis, redis_url: str, prefix: str
) -> None:
    async def has(many: int) -> bool:
        return int(await redis.xlen(f"{prefix}:{{events}}")) >= many

    arguments = ("--store", own_postgres.url, "--redis", redis_url, "--prefix", prefix, "--lease", "1s")
    async with relay(*arguments) as first, relay(*arguments) as second:
        await eventually(lambda: has(1), 10)
        first.kill()
        await first.communicate()
        assert not await has(MANY), "killed in the middle"
        own_postgres.kill()
        own_postgres.restart()
        await eventually(lambda: has(MANY), 20)
        await stopped(second)
    assert int(await redis.xlen(f"{prefix}:{{events}}")) == MANY
    status = await silbo("outbox", "status", "--store", own_postgres.url, "--json")
    assert status.object["rows"] == {"pending": 0, "sending": 0, "sent": MANY, "dead": 0}
    assert status.object["partitions"] == 2


async def test_database_that_is_away_is_an_error_of_one_line_without_its_password() -> None:
    done = await silbo("outbox", "status", "--store", "postgresql+asyncpg://shop:secret@127.0.0.1:1/shop")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert "silbo: " in done.err and "secret" not in done.err
