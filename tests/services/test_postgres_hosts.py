"""Relays of several hosts on one PostgreSQL: they divide its partitions evenly, whichever of them comes, goes, dies or freezes."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from silbo.errors import StoreUnavailable
from silbo.outbox import division
from silbo.outbox.division import Division
from silbo.outbox.rows import Lead, partition_of
from silbo.stores.sqlalchemy import SQLAlchemyStore, dialect
from tests.services.test_postgres_processes import Process, end, in_order, program, stream, table
from tests.support.postgres_process import TABLES
from tools.postgres import PostgresServer
from tools.redis_server import RedisServer

pytestmark = pytest.mark.postgresql

PARTITIONS = 8
FOR_GOOD = "600"
"""A lease that never ends within a test."""
LEASE = "2"


@pytest.fixture
async def engine(own_postgres: PostgresServer) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(own_postgres.url)
    await SQLAlchemyStore(engine).create()
    async with engine.begin() as connection:
        for statement in TABLES:
            await connection.execute(text(statement))
    yield engine
    await engine.dispose()


@pytest.fixture
async def store(engine: AsyncEngine) -> AsyncIterator[SQLAlchemyStore]:
    store = SQLAlchemyStore(engine)
    await store.open(PARTITIONS)
    yield store
    await store.aclose()


async def until_led(store: SQLAlchemyStore, *counts: int) -> Counter[str]:
    """Wait until as many relays lead so many partitions each, the most first. Return the numbers by relay."""
    found: Counter[str] = Counter()
    try:
        async with asyncio.timeout(60):
            while sorted(found.values(), reverse=True) != list(counts):
                await asyncio.sleep(0.05)
                found = Counter(lead.owner for lead in (await store.status()).leads.values())
    except TimeoutError:
        pytest.fail(f"partitions are led {found}, not {counts}")
    return found


class Hosts:
    """Relays in processes of their own."""

    def __init__(self, stack: AsyncExitStack, postgres: PostgresServer, redis: RedisServer, prefix: str) -> None:
        self.stack, self.postgres, self.redis, self.prefix = stack, postgres, redis, prefix

    async def start(self, lease: str) -> Process:
        return await self.stack.enter_async_context(
            program("relay", self.postgres.url, self.redis.url, self.prefix, lease)
        )


@pytest.fixture
async def hosts(own_postgres: PostgresServer, own_redis: RedisServer, prefix: str) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        yield Hosts(stack, own_postgres, own_redis, prefix)


@pytest.mark.timeout(240)  # 5 seconds on an idle machine
async def test_relays_that_come_and_go_divide_the_partitions_at_once(store: SQLAlchemyStore, hosts: Hosts) -> None:
    """A relay that joins gets its share, and one that stops gives its share away, long before any lease ends."""
    first = await hosts.start(FOR_GOOD)
    await until_led(store, 8)
    second, _ = await asyncio.gather(hosts.start(FOR_GOOD), hosts.start(FOR_GOOD))
    await until_led(store, 3, 3, 2)
    first.terminate()
    led = await until_led(store, 4, 4)
    assert not any(f":{first.pid}:" in owner for owner in led)
    assert await first.wait() == 0
    second.terminate()
    await until_led(store, 8)


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_relays_that_die_freeze_and_thaw_lose_and_double_nothing(
    engine: AsyncEngine, store: SQLAlchemyStore, hosts: Hosts
) -> None:
    """Two minutes under load: the partitions are divided evenly after each change, one of which is a minute of frost."""
    async with program("host", hosts.postgres.url, "a", str(PARTITIONS)) as host:
        relays = await asyncio.gather(*(hosts.start(LEASE) for _ in range(3)))
        await until_led(store, 3, 3, 2)
        for round_ in range(4):
            first, second, third = relays
            first.kill()
            await until_led(store, 4, 4)
            second.send_signal(signal.SIGSTOP)
            led = await until_led(store, 8)
            assert f":{third.pid}:" in next(iter(led))
            if round_ == 0:
                await asyncio.sleep(60)
            second.send_signal(signal.SIGCONT)
            await until_led(store, 4, 4)
            third.terminate()
            await until_led(store, 8)
            relays = [second, *await asyncio.gather(*(hosts.start(LEASE) for _ in range(2)))]
            await until_led(store, 3, 3, 2)
        told = await end(host)
    await check_stream(engine, hosts, told)


async def check_stream(engine: AsyncEngine, hosts: Hosts, told: Collection[tuple[str, int]]) -> None:
    """Wait until all orders of the database are in the stream; each is there once, and those of a key are in order."""
    orders = await table(engine, "orders")
    found: list[tuple[str, int]] = []
    async with asyncio.timeout(60):
        while len(set(found)) < len(orders):
            await asyncio.sleep(0.1)
            found = await stream(hosts.redis, hosts.prefix)
    assert len(told) > 5, "the host stored hardly anything"
    assert set(told) <= set(orders)
    assert sorted(found) == sorted(orders)
    assert in_order(found)
    assert len({partition_of(name, PARTITIONS) for name, _ in orders}) > 1


async def take_over(store: SQLAlchemyStore) -> Lead:
    """Lead the first partition, as soon as nobody else does. Fails if its row stays locked for 10 seconds."""
    while (lead := await store.lead(0, "other", lease=60.0)) is None:
        pass
    return lead


async def test_relay_that_is_frozen_in_a_transaction_holds_up_nobody(
    engine: AsyncEngine, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between two statements: the database ends its transaction, and with it the lock of the partition."""
    monkeypatch.setattr(dialect, "FROZEN_AFTER_MS", 200)
    frozen = SQLAlchemyStore(engine)
    await frozen.open()
    lead = await frozen.lead(0, "frozen", lease=0.1)
    assert lead is not None
    asleep, awake = asyncio.Event(), asyncio.Event()

    async def sleep(*_: object) -> None:
        asleep.set()
        await awake.wait()

    with monkeypatch.context() as patched:
        patched.setattr("silbo.stores.sqlalchemy.statements._settle", sleep)
        patched.setattr("silbo.stores.sqlalchemy.store.TIMEOUT", 600.0)  # a frozen process has no clock
        taking = asyncio.create_task(frozen.take(lead, 10, sent=[1]))
        await asleep.wait()
    taken_over = await take_over(store)
    awake.set()
    with pytest.raises(StoreUnavailable):
        await taking
    assert taken_over.epoch == lead.epoch + 1
    await frozen.aclose()


async def test_relay_that_is_frozen_while_it_prepares_a_statement_holds_up_nobody(
    engine: AsyncEngine, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL's own limit does not count then, so a relay that joins ends the transaction."""
    monkeypatch.setattr(dialect, "FROZEN_AFTER_MS", 200)
    frozen = SQLAlchemyStore(engine)
    await frozen.open()
    lead = await frozen.lead(0, "frozen", lease=0.1)
    assert lead is not None
    asleep, awake = asyncio.Event(), asyncio.Event()
    prepare = asyncpg.Connection.prepare

    async def sleep_after(self: Any, query: str, **options: Any) -> Any:
        prepared = await prepare(self, query, **options)
        if query.startswith("UPDATE silbo_message"):
            asleep.set()
            await awake.wait()
        return prepared

    with monkeypatch.context() as patched:
        patched.setattr(asyncpg.Connection, "prepare", sleep_after)
        patched.setattr("silbo.stores.sqlalchemy.store.TIMEOUT", 600.0)  # a frozen process has no clock
        taking = asyncio.create_task(frozen.take(lead, 10, sent=[1]))
        await asleep.wait()
    leading = asyncio.create_task(take_over(store))
    while not leading.done():
        await store.join("other", lease=60.0)
        await asyncio.sleep(0.05)
    awake.set()
    with pytest.raises(StoreUnavailable):
        await taking
    assert (await leading).epoch == lead.epoch + 1
    await frozen.aclose()


async def test_quiet_outbox_is_asked_a_few_times_a_minute(
    engine: AsyncEngine, store: SQLAlchemyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute without messages takes about 120 looks and 18 renewals, whatever the number of partitions."""
    clock = 1000.0
    monkeypatch.setattr(division, "_now", lambda: clock)
    mine = Division(store, "me", lease=10.0)
    await mine.look()
    assert mine.wanted == set(range(PARTITIONS))
    leads: list[Lead] = []
    for number in range(PARTITIONS):
        lead = await store.lead(number, "me", lease=10.0)
        assert lead is not None
        leads.append(lead)
    resting = [asyncio.ensure_future(mine.rest(lead, asyncio.Event(), has_sent=False)) for lead in leads]
    await asyncio.sleep(0)
    statements: list[str] = []

    def count(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", count)
    try:
        while clock < 1060.0:
            assert not await mine.look()
            clock += mine.interval
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", count)
        for task in resting:
            task.cancel()
    assert {lead.epoch for lead in (await store.status()).leads.values()} == {1}
    assert len(statements) < 240
