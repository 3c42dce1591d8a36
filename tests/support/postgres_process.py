"""A program on PostgreSQL and Redis. Run by the tests: ``python -m tests.support.postgres_process WHAT POSTGRES [REDIS PREFIX]``.

host POSTGRES NAME [PARTITIONS]  commits an order and its event until it gets a line on stdin; prints each after its commit
relay POSTGRES REDIS PREFIX [LEASE]  sends until SIGTERM, or until it is killed
consumer POSTGRES REDIS PREFIX   has an effect in the database for each event, until it is killed
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from contextlib import suppress
from itertools import count

from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from silbo import AsyncEventDispatcher, Bridge, Consumer, ECSTEvent, EventName, Outbox
from silbo._retry import Backoff
from silbo.brokers.redis import RedisStreams
from silbo.outbox.relay import Relay
from silbo.stores.sqlalchemy import SQLAlchemyInbox, SQLAlchemyStore, current_session, in_session

TABLES = (
    "CREATE TABLE orders (name text, n int, PRIMARY KEY (name, n))",
    "CREATE TABLE effects (name text, n int)",  # an effect that comes twice is there twice
)


class Ordered(ECSTEvent):
    def __init__(self, name: str, n: int) -> None:
        self.name_of, self.n = name, n


ORDERED = EventName("ordered", Ordered, key="name_of")


class Nowhere:
    app = "shop"

    async def publish(self, *messages: object) -> None: ...

    async def aclose(self) -> None: ...


async def host(engine: AsyncEngine, name: str, partitions: str = "1") -> None:
    """The order and its event in one transaction, through the bridge."""
    sessions, dispatcher = async_sessionmaker(engine), AsyncEventDispatcher()
    async with Outbox(SQLAlchemyStore(engine), Nowhere(), relay=False, partitions=int(partitions)) as outbox:
        dispatcher.add_subscriber(Bridge(outbox))
        print("open", flush=True)
        numbers, told = count(1), asyncio.create_task(asyncio.to_thread(sys.stdin.readline))

        async def lane(which: int) -> None:
            for n in numbers:
                if told.done():
                    return
                with suppress(Exception):  # the database is away: this order is perhaps committed, perhaps not
                    async with sessions.begin() as session:
                        with in_session(session):
                            await session.execute(
                                text("INSERT INTO orders VALUES (:name, :n)"), {"name": f"{name}{which}", "n": n}
                            )
                            await dispatcher.adispatch(ORDERED, Ordered(f"{name}{which}", n))
                    print(f"{name}{which}", n, flush=True)
                    continue
                await asyncio.sleep(0.05)

        await asyncio.gather(*map(lane, range(4)))


async def relay(engine: AsyncEngine, redis: str, prefix: str, lease: str = "1") -> None:
    async with Redis.from_url(redis) as client:
        streams = RedisStreams(client, app="shop", prefix=prefix, timeout=2)
        async with Relay(SQLAlchemyStore(engine), streams, lease=float(lease)) as sending:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sending.stop)
            print("open", flush=True)
            await sending.run()


async def consumer(engine: AsyncEngine, redis: str, prefix: str) -> None:
    dispatcher = AsyncEventDispatcher()

    @dispatcher.listen(ORDERED)
    async def on_ordered(event: Ordered) -> None:
        await current_session().execute(
            text("INSERT INTO effects VALUES (:name, :n)"), {"name": event.name_of, "n": event.n}
        )

    async with Redis.from_url(redis) as client:
        streams = RedisStreams(client, app="billing", prefix=prefix, timeout=2)
        group = streams.group("billing", start="oldest", claim_after=1.0)
        inbox = SQLAlchemyInbox(engine)
        backoff = Backoff(initial=0.05, cap=0.2)
        async with Consumer(
            dispatcher, group, events=[ORDERED], concurrency=4, inbox=inbox, max_attempts=1000, backoff=backoff
        ) as consuming:
            print("open", flush=True)
            await consuming.run()


async def main(what: str, postgres: str, *arguments: str) -> None:
    logging.disable(logging.CRITICAL)  # outages are what these tests are made of
    engine = create_async_engine(postgres)
    try:
        await {"host": host, "relay": relay, "consumer": consumer}[what](engine, *arguments)
    finally:
        await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
