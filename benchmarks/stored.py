"""Scenarios of the outbox, of an inbox in a database, and of the host's loop beside a consumer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from redis.asyncio import Redis

from benchmarks import consume
from benchmarks.at_redis import in_tasks
from benchmarks.outbox import (
    PREFIX,
    QUOTA,
    STREAM,
    ByHand,
    fill_outbox,
    message,
    run_relay,
    send_in_pipelines,
)
from benchmarks.redis_publish import by_hand
from benchmarks.scenario import Contenders, Scenario
from benchmarks.timing import Contender, Measured
from silbo import Outbox
from silbo.brokers.redis import RedisStreams
from silbo.stores.sqlite import SQLiteStore
from tools.redis_server import RedisServer

__all__ = ["SCENARIOS"]

DRAINED = 100_000
CONSUMED = 5_000
TICK = 0.001
"""A host's other task wakes up every millisecond."""
LATEST = 0.003
"""The 99th percentile of its delay is 3 milliseconds at most."""


@asynccontextmanager
async def open_client() -> AsyncGenerator[tuple[Redis, Path]]:
    """A client of a Redis of one's own, and a folder."""
    with RedisServer(port=True) as server, TemporaryDirectory(prefix="silbo-benchmark-") as folder:
        async with Redis.from_url(server.url) as client:
            yield client, Path(folder)


# -- outbox ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_drain() -> AsyncGenerator[Contenders]:
    """Bring a full outbox to Redis; by hand, bytes in a list go there in pipelines of 500."""
    async with open_client() as (client, folder):
        numbers = count()

        async def relay(times: int) -> Measured:
            path = folder / f"drain-{next(numbers)}.db"
            await fill_outbox(client, path, times)
            taken = await run_relay(client, path, times)
            await client.delete(STREAM, f"{STREAM}:outbox")
            path.unlink()
            return Measured(taken / times)

        async def pipelines(times: int) -> Measured:
            raws = [by_hand(number).encode() for number in range(times)]
            taken = await send_in_pipelines(client, raws)
            await client.delete(STREAM)
            return Measured(taken / times)

        yield {"redis-py, pipelines": pipelines, "silbo": relay}


def open_stored(many: int) -> Callable[[], AbstractAsyncContextManager[Contenders]]:
    """Return the context of so many callers that store one message after another."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[Contenders]:
        async with AsyncExitStack() as stack:
            client, folder = await stack.enter_async_context(open_client())
            peer = ByHand(folder / "by-hand.db")
            stack.callback(peer.close)
            streams = await stack.enter_async_context(RedisStreams(client, app="benchmark", prefix=PREFIX))
            storing, sending = [
                await stack.enter_async_context(
                    Outbox(
                        SQLiteStore(folder / f"relay-{relay}.db"),
                        RedisStreams(client, app="benchmark", prefix=f"{PREFIX}-{relay}"),
                        relay=relay,
                        quota=QUOTA,
                    )
                )
                for relay in (False, True)
            ]
            yield {
                "by hand": in_tasks(many, lambda number: peer.publish(by_hand(number))),
                "silbo": in_tasks(many, lambda number: storing.publish(message(number))),
                "silbo, and its relay": in_tasks(many, lambda number: sending.publish(message(number))),
                "silbo, not stored": in_tasks(many, lambda number: streams.publish(message(number))),
            }

    return opened


# -- an inbox in a database -----------------------------------------------------------------------------------


@asynccontextmanager
async def open_inbox() -> AsyncGenerator[Contenders]:
    """An SQLite file through SQLAlchemy; by hand, a transaction for each message, in which its publication is stored.

    The publications have the time that one needs to forget them again.
    """
    from sqlalchemy import Column, DateTime, MetaData, String, Table
    from sqlalchemy.dialects.sqlite import insert
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from silbo import Consumer
    from silbo.stores.sqlalchemy import SQLAlchemyInbox

    async with open_client() as (client, folder):
        await consume.fill(client, CONSUMED + consume.MORE)
        engines = [create_async_engine(f"sqlite+aiosqlite:///{folder}/{name}.db") for name in ("hand", "silbo")]
        of_hand, of_silbo = (async_sessionmaker(engine, expire_on_commit=False) for engine in engines)
        known = Table(
            "known",
            MetaData(),
            Column("publication", String, primary_key=True),
            Column("handled_at", DateTime(timezone=True), nullable=False, index=True),
        )
        async with engines[0].begin() as connection:
            await connection.run_sync(known.metadata.create_all)
        inbox = SQLAlchemyInbox(of_silbo)
        await inbox.create()
        groups = count()
        group_number = 0

        async def handle(entries: list[Any]) -> None:
            for _, fields in entries:
                headers, event = consume.rebuild(fields[b"message"])
                publication = f"{headers['publication']}-{group_number}"
                async with of_hand.begin() as session:
                    row = {"publication": publication, "handled_at": datetime.now(UTC)}
                    stored = await session.execute(insert(known).on_conflict_do_nothing(), row)
                    if stored.rowcount:
                        await consume.listen(event)

        async def hand(times: int) -> None:
            nonlocal group_number
            group_number = next(groups)
            await consume.read_all(client, times, handle)

        async def ours(times: int) -> Measured:
            dispatcher, done, began_at = consume.AsyncEventDispatcher(), 0, perf_counter()

            async def note(event: object) -> None:
                nonlocal done
                done += 1
                if done >= times:
                    consumer.stop()

            dispatcher.add_listener(consume.MEETING_JOINED, note)
            streams = RedisStreams(client, app="benchmark", prefix=PREFIX)
            group = streams.group(f"silbo-{next(groups)}", start="oldest")
            events = [consume.MEETING_JOINED]
            async with Consumer(dispatcher, group, events=events, own="handle", inbox=inbox) as consumer:
                await consumer.run()
            await streams.aclose()
            return Measured((perf_counter() - began_at) / done)  # it has handled what it had read

        try:
            yield {"by hand": hand, "silbo": ours}
        finally:
            for engine in engines:
                await engine.dispose()


# -- the host's loop ------------------------------------------------------------------------------------------


def ticking(work: Callable[[int], Any]) -> Contender:
    """Return a contender that measures how late a task of the host's wakes up beside some work."""

    async def run(times: int) -> Measured:
        loop, late = asyncio.get_running_loop(), []
        working = asyncio.ensure_future(work(times))
        while not working.done():
            due = loop.time() + TICK
            await asyncio.sleep(TICK)
            late.append(loop.time() - due)
        await working
        late.sort()
        figures = {key: late[int(part * len(late))] for key, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))}
        return Measured(figures["p99"], figures)

    return run


@asynccontextmanager
async def open_ticker() -> AsyncGenerator[Contenders]:
    """A consumer at full speed, a loop by hand, and nothing at all."""

    async def allowed(times: int) -> Measured:
        return Measured(LATEST, dict.fromkeys(("p50", "p99", "p99.9"), LATEST))

    async with open_client() as (client, _):
        await consume.fill(client, 4 * CONSUMED + consume.MORE)
        yield {
            "3 ms": allowed,
            "silbo": ticking(consume.consuming(client)),
            "by hand": ticking(consume.by_hand(client)),
            "an idle loop": ticking(lambda times: asyncio.sleep(0.3)),
        }


SCENARIOS = [
    Scenario(
        name="relay, drain of 100,000",
        group="outbox",
        open=open_drain,
        reference="redis-py, pipelines",
        unit="messages",
        more_is_better=True,
        targets={"redis-py, pipelines": 1.3},
        times=DRAINED,
        rounds=4,
        notes={"redis-py, pipelines": "bytes that are ready, 500 XADDs a pipeline; nothing is stored or marked"},
    ),
    *(
        Scenario(
            name=f"store, {many} {'caller' if many == 1 else 'callers'}",
            group="outbox",
            open=open_stored(many),
            reference="by hand",
            unit="messages",
            more_is_better=True,
            times=times,
            rounds=8,
            notes={"by hand": "an INSERT and a COMMIT for each message, synchronous=FULL"},
        )
        for many, times in ((1, 200), (100, 2_000))
    ),
    Scenario(
        name="Streams consumer, with an inbox in SQLite",
        group="consumers",
        open=open_inbox,
        reference="by hand",
        unit="messages",
        more_is_better=True,
        targets={"by hand": 1.0},
        times=200,
        rounds=5,
        notes={"by hand": "for each message a transaction with one INSERT ... ON CONFLICT DO NOTHING"},
    ),
    Scenario(
        name="a task of the host's beside a consumer",
        group="host's loop",
        open=open_ticker,
        reference="3 ms",
        unit="p99 of the delay",
        measures="latency",
        targets={"3 ms": 1.0},
        times=4 * CONSUMED,
        rounds=7,
    ),
]
