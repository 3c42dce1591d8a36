"""The overview of a host: everything at one moment, with nothing written and no payload shown unasked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from silbo import AsyncEventDispatcher, Consumer, DomainEvent, EventName, Plugins, Trace
from silbo.brokers.redis import RedisStreams
from silbo.operations.app import find_app
from silbo.operations.overview import AT_ONCE, read_overview
from silbo.operations.page import render_page
from silbo.stores.sqlalchemy import SQLAlchemyStore
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import fill, settle
from tests.support.redis_streams import message, opened, receive
from tools.server import free_port

SECRET = "4111-1111"


@dataclass
class Paid(DomainEvent):
    card: str = SECRET


PAID = EventName("order.paid", Paid)


async def listener(event: Any) -> None: ...


async def bury(redis: Redis, prefix: str, many: int) -> None:
    """Send messages, and give them up in the group billing."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*(message(number, card=SECRET) for number in range(many + 1)))
            for item in (await receive(receiver, many + 1))[:many]:
                assert await receiver.bury(item, error="ValueError: no such order", attempts=2)


@pytest.mark.every_redis
async def test_streams_groups_and_the_newest_dead_letters(redis: Redis, prefix: str) -> None:
    await bury(redis, prefix, 23)
    overview = await read_overview(find_app([], "shop"), client=redis, prefix=prefix)
    assert overview.problems == [] and overview.streams is not None
    (stream,) = overview.streams
    assert (stream.key, stream.length, stream.dead, len(stream.letters)) == (f"{prefix}:{{events}}", 24, 23, 20)
    assert stream.first_at is not None and stream.last_at is not None and stream.first_at <= stream.last_at
    (group,) = stream.groups
    assert (group.group, group.in_hand, group.dead) == ("billing", 1, 23)
    ids = [tuple(map(int, letter.id.split("-"))) for letter in stream.letters]
    assert ids == sorted(ids, reverse=True), "the newest first"
    letter = stream.letters[0]
    assert (letter.group, letter.name, letter.error, letter.attempts) == (
        "billing",
        "user.joined",
        "ValueError: no such order",
        2,
    )
    assert letter.event_id == message().message_id and letter.payload is None


async def test_stream_that_nobody_reads_is_told(redis: Redis, prefix: str) -> None:
    await redis.xadd(f"{prefix}:{{events}}", {"message": "{}"})
    overview = await read_overview(find_app([], "shop"), client=redis, prefix=prefix)
    assert overview.streams is not None and overview.streams[0].groups == []
    assert "1 message: the oldest " in render_page(overview) and "No consumer group has been here yet." in render_page(
        overview
    )


async def test_nothing_is_written(redis: Redis, prefix: str, tmp_path: Path) -> None:
    await bury(redis, prefix, 2)
    await fill(tmp_path / "outbox.db", 3)
    await settle(tmp_path / "outbox.db", dead=1)
    store = SQLiteStore(tmp_path / "outbox.db")
    await store.open()
    before = (tmp_path / "outbox.db").read_bytes()
    written = (await redis.info("persistence"))["rdb_changes_since_last_save"]
    overview = await read_overview(find_app([], "shop"), client=redis, prefix=prefix, store=store)
    assert (await redis.info("persistence"))["rdb_changes_since_last_save"] == written
    await store.aclose()
    assert (tmp_path / "outbox.db").read_bytes() == before
    assert overview.streams and overview.outbox


async def test_payloads_are_shown_if_the_host_says_so(redis: Redis, prefix: str, tmp_path: Path) -> None:
    """Of dispatches, dead letters and dead rows alike; also where the trace keeps them."""
    await bury(redis, prefix, 1)
    await redis.xadd(f"{prefix}:{{events}}:dead", {"message": f"no JSON {SECRET}", "group": "billing", "id": "1-1"})
    await fill(tmp_path / "outbox.db", 2)
    await settle(tmp_path / "outbox.db", dead=1)
    dispatcher = AsyncEventDispatcher(observers=[Trace(payloads=True)])
    await dispatcher.adispatch(PAID, Paid())
    store = SQLiteStore(tmp_path / "outbox.db")
    await store.open()
    app = find_app(dispatcher, "shop")
    shown = [
        await read_overview(app, client=redis, prefix=prefix, store=store, payloads=payloads)
        for payloads in (False, True)
    ]
    await store.aclose()
    hidden, told = map(render_page, shown)
    assert SECRET not in hidden and "payload" not in hidden
    assert told.count(SECRET) == 3 and told.count("<summary>payload</summary>") == 3
    outbox = shown[1].outbox
    assert outbox is not None and outbox.status.counts["dead"] == 1
    (row,) = outbox.rows
    assert row.payload is not None and row.name and row.error and row.group == ""
    assert shown[0].outbox is not None and shown[0].outbox.rows[0].payload is None


async def test_what_can_not_be_read_is_a_problem_and_the_rest_is_there(
    redis: Redis, prefix: str, tmp_path: Path
) -> None:
    app = find_app(AsyncEventDispatcher(names=[PAID]), "shop")
    async with Redis(port=free_port()) as away:
        overview = await read_overview(app, client=away)
    assert overview.streams is None and len(overview.problems) == 1
    assert [name.name for name in overview.dispatchers[0].names] == ["order.paid"]
    missing = await read_overview(app, client=redis, prefix=prefix)
    assert missing.streams is None and prefix in missing.problems[0], "perhaps a mistaken prefix"
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/empty.db")
    without_tables = await read_overview(app, store=SQLAlchemyStore(engine))
    await engine.dispose()
    assert without_tables.outbox is None and "no such table" in without_tables.problems[0]


async def test_host_with_several_dispatchers_plugins_and_a_consumer(redis: Redis, prefix: str) -> None:
    """Each dispatcher has its own names; those that the consumer rebuilds belong to its dispatcher."""
    first = AsyncEventDispatcher(names=[EventName("order.sent")], unknown="allow", observers=[Trace(), Trace()])
    second = AsyncEventDispatcher()
    first.add_listener("order.*", listener)
    first.add_listener(("no", "text"), listener)
    second.add_listener("order.paid", listener)
    for name in ("cart.filled", "cart.filled", ("no", "text")):
        await first.adispatch(name)
    streams = RedisStreams(redis, app="shop", prefix=prefix)
    consumer = Consumer(second, streams.group("billing", start="new"), events=[PAID])

    def audit(view: AsyncEventDispatcher) -> None:
        view.add_listener("order.sent", listener)

    async with Plugins(first) as plugins:
        await plugins.load(audit)
        overview = await read_overview(find_app({"web": first, "billing": consumer}, "shop"))
    web, billing = overview.dispatchers
    assert (web.reference, billing.reference) == ("shop['web']", "shop['billing'].dispatcher")
    assert [name.name for name in web.names] == ["order.sent"] and [name.name for name in billing.names] == [
        "order.paid"
    ]
    assert [each.name for each in web.others] == ["('no', 'text')", "order.*"] and billing.others == []
    assert (web.is_traced, billing.is_traced) == (True, False)
    assert web.unheard == {"cart.filled": 2}
    assert billing.names[0].is_consumed and not billing.names[0].is_declared
    assert [plugin.name for plugin in overview.plugins] == ["audit"]
    (counts,) = overview.consumers
    assert (counts.app, counts.group, counts.health.is_running, counts.stats.received) == ("shop", "billing", False, 0)
    assert "order.sent" in render_page(overview) and overview.streams is overview.outbox is None


async def test_host_goes_on_while_its_names_are_read() -> None:
    dispatcher = AsyncEventDispatcher(names=[EventName(f"n{number}") for number in range(200)])
    reading = asyncio.create_task(read_overview(find_app(dispatcher, "shop")))
    turns = 0
    while not reading.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns >= 200 // AT_ONCE and len((await reading).dispatchers[0].names) == 200


async def test_newest_dispatches_come_first_and_are_limited() -> None:
    dispatcher = AsyncEventDispatcher(observers=[Trace()])
    for number in range(30):
        await dispatcher.adispatch(f"n{number}")
    (overview,) = (await read_overview(find_app(dispatcher, "shop"))).dispatchers
    assert [traced.name for traced in overview.dispatches] == [f"n{number}" for number in range(29, 9, -1)]
