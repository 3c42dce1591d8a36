"""PostgreSQL, Redis, hosts, relays and consumers, each killed in the middle (SIGKILL)."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from silbo.stores.sqlalchemy import SQLAlchemyStore
from tests.support.postgres_process import TABLES
from tools.postgres import PostgresServer
from tools.redis_server import RedisServer

pytestmark = pytest.mark.postgresql

ROOT = Path(__file__).resolve().parents[2]
Process = asyncio.subprocess.Process


@pytest.fixture
async def engine(own_postgres: PostgresServer) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(own_postgres.url, pool_pre_ping=True)
    await SQLAlchemyStore(engine).create()
    async with engine.begin() as connection:
        for table in TABLES:
            await connection.execute(text(table))
    yield engine
    await engine.dispose()


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[Process]:
    """One that is open; killed at the latest when the test ends."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "tests.support.postgres_process", *arguments],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"open\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def end(host: Process) -> set[tuple[str, int]]:
    """Let a host end; what it was told to be committed."""
    async with asyncio.timeout(20):
        out, _ = await host.communicate(b"\n")
    assert host.returncode == 0
    return {(name, int(n)) for name, n in (line.split() for line in out.decode().splitlines())}


async def table(engine: AsyncEngine, name: str) -> list[tuple[str, int]]:
    async with engine.connect() as connection:
        return [(name, n) for name, n in await connection.execute(text(f"SELECT name, n FROM {name}"))]


async def stream(redis: RedisServer, prefix: str) -> list[tuple[str, int]]:
    """What is in it, in its order."""
    async with Redis.from_url(redis.url) as client:
        entries = await client.xrange(f"{prefix}:{{events}}")
    payloads = [json.loads(fields[b"message"])["payload"] for _, fields in entries]
    return [(payload["name_of"], payload["n"]) for payload in payloads]


def in_order(found: list[tuple[str, int]]) -> bool:
    by_name: dict[str, list[int]] = {}
    for name, n in found:
        by_name.setdefault(name, []).append(n)
    return all(numbers == sorted(numbers) for numbers in by_name.values())


async def test_committed_survives_a_killed_database(own_postgres: PostgresServer, engine: AsyncEngine) -> None:
    """Each order has its event, and each event its order: also those of which the host heard nothing any more."""
    dice = random.Random(4)
    async with program("host", own_postgres.url, "a") as host:
        for _ in range(3):
            await asyncio.sleep(0.3 + dice.random() * 0.3)
            await asyncio.to_thread(own_postgres.restart)
        await asyncio.sleep(0.3)
        told = await end(host)
    orders = await table(engine, "orders")
    store = SQLAlchemyStore(engine)
    await store.open()
    rows = await store.rows("pending", limit=1_000_000)
    await store.aclose()
    events = [(row.message.payload["name_of"], row.message.payload["n"]) for row in rows]
    assert len(told) > 5, "the host stored hardly anything"
    assert told <= set(orders)
    assert sorted(events) == sorted(orders)
    assert in_order(events)


async def test_killed_relays_lose_and_double_nothing(
    own_postgres: PostgresServer, engine: AsyncEngine, own_redis: RedisServer, prefix: str
) -> None:
    """Two of them, each killed again and again in the middle of its work; the stream has each event once, in order."""
    dice = random.Random(5)
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(program("host", own_postgres.url, "a"))
        relays = [await start_relay(stack, own_postgres, own_redis, prefix) for _ in range(2)]
        for round_ in range(6):
            await asyncio.sleep(0.2 + dice.random() * 0.4)
            relays[round_ % 2].kill()
            relays[round_ % 2] = await start_relay(stack, own_postgres, own_redis, prefix)
        told = await end(host)
        orders = await table(engine, "orders")
        async with asyncio.timeout(20):
            while len(found := await stream(own_redis, prefix)) < len(orders):
                await asyncio.sleep(0.05)
    assert len(told) > 5, "the host stored hardly anything"
    assert told <= set(orders)
    assert sorted(found) == sorted(orders)
    assert in_order(found)


async def start_relay(stack: AsyncExitStack, postgres: PostgresServer, redis: RedisServer, prefix: str) -> Process:
    return await stack.enter_async_context(program("relay", postgres.url, redis.url, prefix))


@pytest.mark.timeout(240)  # a minute on an idle machine
async def test_effects_happen_once_whatever_is_killed(
    own_postgres: PostgresServer, engine: AsyncEngine, own_redis: RedisServer, prefix: str
) -> None:
    """Effectively once, from a host's transaction to the effect in the consumer's: a row for each order, and one only."""
    dice = random.Random(6)
    async with AsyncExitStack() as stack:
        host = await stack.enter_async_context(program("host", own_postgres.url, "a"))
        relay = await start_relay(stack, own_postgres, own_redis, prefix)
        start = ("consumer", own_postgres.url, own_redis.url, prefix)
        consumers = [await stack.enter_async_context(program(*start)) for _ in range(2)]
        for round_ in range(10):
            await asyncio.sleep(0.1 + dice.random() * 0.4)
            if round_ == 3:
                await asyncio.to_thread(own_redis.restart)
            elif round_ in (5, 8):
                await asyncio.to_thread(own_postgres.restart)
            elif round_ == 6:
                relay.kill()
                relay = await start_relay(stack, own_postgres, own_redis, prefix)
            else:
                consumers[round_ % 2].kill()
                consumers[round_ % 2] = await stack.enter_async_context(program(*start))
        told = await end(host)
        orders = await table(engine, "orders")
        async with asyncio.timeout(30):
            while len(set(await table(engine, "effects"))) < len(orders):
                await asyncio.sleep(0.1)
    assert len(told) > 5, "the host stored hardly anything"
    assert told <= set(orders)
    effects = Counter(await table(engine, "effects"))
    assert effects == dict.fromkeys(orders, 1)
    assert sorted(await stream(own_redis, prefix)) == sorted(orders)
