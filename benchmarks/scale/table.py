"""The outbox's table in PostgreSQL with millions of rows: plans, the state of the outbox, and clean-up beside other transactions.

    python -m benchmarks.scale.table --rows 10_000_000

Starts a PostgreSQL of its own, with every commit on its disk, and drops its data. Ten million rows take 9 GB and some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any, Final

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.outbox import message
from benchmarks.scale.processor import cpu_of
from silbo.outbox.rows import Packed, Quota, pack
from silbo.stores.sqlalchemy import SQLAlchemyStore
from tools.postgres import PostgresServer

CHUNK: Final = 250_000
"""Rows that one statement fills in."""
PARTITIONS: Final = 8
BATCHES: Final = (1_000, 5_000, 20_000)
"""Sizes of the batches of a clean-up that are compared."""
CLEANED: Final = 100_000
"""Rows that are deleted with each size."""
PROBE_EVERY: Final = 0.01
"""Seconds between two publishes beside a clean-up."""
QUOTA: Final = Quota(rows=10_000_000, size=1 << 40)
FILL: Final = text(
    "INSERT INTO silbo_message (partition, state, message, size, attempts, sequence, owner, epoch, stored_at, state_at)"
    " SELECT n % 8, :state, :message, :size, :attempts, CASE WHEN :attempts = 0 THEN 1::bigint << 62 ELSE n END, 'a', 1,"
    " now() - interval '2 hours' + n * interval '1 hour' / 10000000, now() - interval '2 hours' + n * interval '1 hour' / 10000000"
    " FROM generate_series(CAST(:first AS bigint), :last) AS n"
)


def a_message(number: int) -> Packed:
    """A message of 430 bytes with a key."""
    return pack(message(number), PARTITIONS)


async def fill(engine: AsyncEngine, rows: int, waiting: int) -> None:
    """Insert sent rows, then waiting ones."""
    raw = a_message(0).raw.decode()
    values: dict[str, Any] = {"message": raw, "size": len(raw)}
    parts = [("sent", 1, first, min(first + CHUNK, rows)) for first in range(0, rows, CHUNK)]
    parts += [("pending", 0, first, min(first + CHUNK, rows + waiting)) for first in range(rows, rows + waiting, CHUNK)]
    for state, attempts, first, last in parts:
        async with engine.begin() as connection:
            await connection.execute(
                FILL, {**values, "state": state, "attempts": attempts, "first": first + 1, "last": last}
            )
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("VACUUM ANALYZE silbo_message"))


async def print_plans(engine: AsyncEngine, server: int, what: str, call: Callable[[], Awaitable[object]]) -> None:
    """Print the time of a call, the server's processor time for it, and what its statements read."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "silbo_message" in statement and not statement.startswith("INSERT"):
            asked.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    before, began = cpu_of([server]), perf_counter()
    await call()
    seconds = perf_counter() - began
    used = cpu_of([server]) - before
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    reads: list[str] = []
    async with engine.connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        for statement, parameters in asked:
            explained = [line[0] for line in await raw.fetch(f"EXPLAIN {statement}", *parameters)]
            reads += [line.split("(cost")[0].strip(" ->") for line in explained if "Scan" in line and "silbo_m" in line]
    print(
        f"{what}: {1000 * seconds:.1f} ms, {1000 * used:.0f} of processor time; {'; '.join(dict.fromkeys(reads))}",
        flush=True,
    )


async def probe(store: SQLAlchemyStore, stop: asyncio.Event) -> list[float]:
    """Publish every few milliseconds until the stop. Return the milliseconds that each took."""
    taken: list[float] = []
    while not stop.is_set():
        began = perf_counter()
        await store.add([a_message(len(taken))], QUOTA)
        taken.append(1000 * (perf_counter() - began))
        await asyncio.sleep(PROBE_EVERY)
    return taken


async def beside(store: SQLAlchemyStore, work: Callable[[], Awaitable[list[float]]]) -> tuple[list[float], list[float]]:
    """Run some work beside the probe. Return the milliseconds of its steps, and of the probe's publishes."""
    stop = asyncio.Event()
    probing = asyncio.create_task(probe(store, stop))
    steps = await work()
    stop.set()
    return steps, await probing


def spread(values: list[float]) -> str:
    """Return the median, the 99th percentile and the greatest of some milliseconds."""
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered):.1f}, p99 {ordered[int(0.99 * (len(ordered) - 1))]:.1f}, most {ordered[-1]:.1f} ms"


async def measure_cleaning(store: SQLAlchemyStore, server: int, size: int) -> None:
    """Delete sent rows in batches beside publishes, and compare with publishes alone."""

    async def idle() -> list[float]:
        await asyncio.sleep(3.0)
        return []

    async def clean() -> list[float]:
        taken: list[float] = []
        for _ in range(CLEANED // size):
            began = perf_counter()
            assert await store.forget(keep_sent=3600.0, limit=size) == size
            taken.append(1000 * (perf_counter() - began))
        return taken

    _, alone = await beside(store, idle)
    before = cpu_of([server])
    steps, disturbed = await beside(store, clean)
    used = 1e6 * (cpu_of([server]) - before) / CLEANED
    rate = 1000 * CLEANED / sum(steps)
    print(
        f"batches of {size}: {spread(steps)}; {rate:,.0f} rows a second, {used:.0f} us of processor time each",
        flush=True,
    )
    print(f"  publishes alone: {spread(alone)}; beside it: {spread(disturbed)}", flush=True)


async def run(rows: int, waiting: int) -> None:
    """Fill the table, and measure."""
    with PostgresServer(config={"max_wal_size": "8GB", "shared_buffers": "1GB"}) as server:
        engine = create_async_engine(server.url)
        store = SQLAlchemyStore(engine)
        await store.create()
        await store.open(PARTITIONS)
        began = perf_counter()
        await fill(engine, rows, waiting)
        print(f"{rows:,} sent rows and {waiting:,} that wait: filled in {perf_counter() - began:.0f} s", flush=True)
        async with engine.connect() as connection:
            sizes = "SELECT relname, pg_size_pretty(pg_relation_size(oid)) FROM pg_class WHERE relname LIKE 'silbo_message%'"
            for name, size in await connection.execute(text(sizes)):
                print(f"  {name}: {size}")
        lead = await store.lead(0, "a", lease=3600.0)
        assert lead is not None
        ids: list[int] = []

        async def take() -> None:
            ids[:] = [row.id for row in await store.take(lead, 2000)]

        await print_plans(engine, server.pid, "look", lambda: store.look([lead]))
        await print_plans(engine, server.pid, "take 2000 (a look first)", take)
        await print_plans(engine, server.pid, "settle 2000", lambda: store.settle(lead, ids, {}))
        await print_plans(engine, server.pid, "status", store.status)
        await print_plans(engine, server.pid, "status again", store.status)
        await print_plans(engine, server.pid, "dead rows", lambda: store.rows("dead"))
        await print_plans(engine, server.pid, "clean 1000", lambda: store.forget(keep_sent=3600.0))
        for size in BATCHES:
            await measure_cleaning(store, server.pid, size)
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            began = perf_counter()
            await connection.execute(text("VACUUM silbo_message"))
            print(f"VACUUM after {len(BATCHES) * CLEANED:,} deletions: {perf_counter() - began:.1f} s", flush=True)
        await print_plans(engine, server.pid, "clean 1000 after VACUUM", lambda: store.forget(keep_sent=3600.0))
        await store.aclose()
        await engine.dispose()


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.table", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="sent rows")
    parser.add_argument("--waiting", type=int, default=50_000, help="rows that wait")
    options = parser.parse_args()
    asyncio.run(run(options.rows, options.waiting))


if __name__ == "__main__":
    main()
