"""`silbo why`: an event is placed wherever it is, by its id alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from silbo import Message, Origin, Outbox
from silbo.brokers.redis import RedisStreams
from silbo.event import new_id
from silbo.message import Delivery
from silbo.operations import why as module
from silbo.operations.why import find_event
from silbo.protocols import Receiver
from silbo.stores.sqlite import SQLiteStore
from silbo.wire.formats import CLOUDEVENTS, JSON
from tests.support.command_line import SILBO, silbo
from tests.support.redis_streams import opened, receive

ABSENT = "01976c3e-5f0a-7c4e-8f14-46d3a8aa17b3"


def told(identity: str | None = None, **payload: Any) -> Message:
    return Message("notification_event", "order.paid", identity or new_id(), payload)


async def deliveries(receiver: Receiver, many: int) -> list[Delivery]:
    return [item for item in await receive(receiver, many) if isinstance(item, Delivery)]


@pytest.mark.every_redis
async def test_event_is_placed_with_each_group(redis: Redis, redis_url: str, prefix: str) -> None:
    """One event, and groups that acknowledged it, have it in hand after a failure, gave it up, were not given it."""
    where = ("--redis", redis_url, "--prefix", prefix)
    event = told(n=1)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        groups = [streams.group(name, start="new") for name in ("done", "failing", "late", "poisoned")]
        async with (
            opened(groups[0]) as done,
            opened(groups[1]) as failing,
            opened(groups[2]),
            opened(groups[3]) as poisoned,
        ):
            await streams.publish(told(), event, told(mentions=event.message_id))
            await done.ack(*await deliveries(done, 2))
            _, second, _ = await deliveries(failing, 3)
            await failing.count(second, error="KeyError: 'order'")
            _, third, _ = await deliveries(poisoned, 3)
            assert await poisoned.bury(third, error="ValueError: never", attempts=5)
            table, program = await asyncio.gather(
                silbo("why", event.message_id, *where, command=SILBO), silbo("why", event.message_id, *where, "--json")
            )
    assert (table.code, program.code, program.err) == (0, 0, "")
    (entry,) = program.object["entries"]
    assert (entry["entry"], entry["event"], entry["stream"]) == (second.id, "order.paid", f"{prefix}:{{events}}")
    places = {place["group"]: place for place in entry["groups"]}
    assert {name: place["state"] for name, place in places.items()} == {
        "done": "done",
        "failing": "in hand",
        "late": "waiting",
        "poisoned": "dead",
    }
    in_hand, dead = places["failing"], places["poisoned"]
    assert (in_hand["attempts"], in_hand["error"]) == (1, "KeyError: 'order'") and in_hand["pid"] is not None
    assert (dead["attempts"], dead["error"]) == (5, "ValueError: never")
    assert [letter["id"] for letter in program.object["dead"]] == [dead["letter"]]
    for text in ("group done", "acknowledged", "KeyError: 'order'", f"dead letter {dead['letter']}", "waiting"):
        assert text in table.out, table.out


async def test_event_is_found_by_its_entry_and_by_its_dead_letter(redis: Redis, redis_url: str, prefix: str) -> None:
    """The ids that the log, `silbo groups` and `silbo dead list` show."""
    event, where = told(), ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as billing:
            await streams.publish(told(), event)
            _, delivery = await deliveries(billing, 2)
            assert await billing.bury(delivery, error="ValueError: never", attempts=5)
    rows: Any = await redis.xrange(f"{prefix}:{{events}}:dead")
    letter: str = rows[0][0].decode()
    by_entry, by_letter, by_none, shown = await asyncio.gather(
        silbo("why", delivery.id, *where, "--json"),
        silbo("why", letter, *where, "--json"),
        silbo("why", "17-0", *where),
        silbo("dead", "show", event.message_id, *where),
    )
    assert by_entry.object["event_id"] == by_letter.object["event_id"] == event.message_id
    assert (by_none.code, by_none.out) == (1, "") and "an entry 17-0" in by_none.err
    assert shown.code == 2 and f"silbo why {event.message_id}" in shown.err


async def test_event_that_was_given_back_waits_for_the_next_consumer(redis: Redis, redis_url: str, prefix: str) -> None:
    event, where = told(), ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as billing:
            await streams.publish(event)
            (delivery,) = await deliveries(billing, 1)
            assert await billing.bury(delivery, error="ValueError: never", attempts=5)
        assert (await silbo("dead", "retry", "--all", "--yes", *where)).code == 0
    found, groups = await asyncio.gather(silbo("why", event.message_id, *where), silbo("groups", "--json", *where))
    oldest = groups.object["oldest"]
    assert (oldest["consumer"], oldest["kept_at"]) == ("silbo-retry", None), "no sign of 1970"
    assert " ".join(found.out.splitlines()[-1].split()).startswith("group billing given back the next consumer 0")


async def test_event_is_placed_in_the_outbox(redis: Redis, redis_url: str, prefix: str, tmp_path: Path) -> None:
    """It waits there, and nowhere else: also where no stream exists yet."""
    event = told()
    async with Outbox(
        SQLiteStore(tmp_path / "outbox.db"), RedisStreams(redis, app="shop", prefix=prefix), relay=False
    ) as outbox:
        await outbox.publish(told(), event)
    where = ("--redis", redis_url, "--prefix", prefix)
    found, table, without = await asyncio.gather(
        silbo("why", event.message_id, *where, "--store", tmp_path / "outbox.db", "--json"),
        silbo("why", event.message_id, *where, "--store", tmp_path / "outbox.db"),
        silbo("why", event.message_id, *where),
    )
    (row,) = found.object["outbox"]
    assert (row["state"], row["row"], found.object["entries"]) == ("pending", 2, [])
    assert "outbox, row 2" in table.out and "pending" in table.out
    assert without.code == 1 and "there is no stream" in without.err


async def test_event_that_is_nowhere_says_where_it_was_looked_for(redis: Redis, redis_url: str, prefix: str) -> None:
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(told(mentions=ABSENT))
    nowhere, program, timeless, malformed = await asyncio.gather(
        silbo("why", ABSENT, "--redis", redis_url, "--prefix", prefix),
        silbo("why", ABSENT, "--redis", redis_url, "--prefix", prefix, "--json"),
        silbo("why", str(uuid4()), "--redis", redis_url, "--prefix", prefix),
        silbo("why", "17", "--redis", redis_url),
    )
    assert (nowhere.code, nowhere.out) == (1, "") and "not among the 1 entry of " in nowhere.err, nowhere.err
    assert f"of {prefix}:{{events}} since 2025-06-1" in nowhere.err, "a minute before the time in the id"
    assert (program.object["searched"]["entries"], program.object["searched"]["since"][:9]) == (1, "2025-06-1")
    assert "1 entry of" in timeless.err and "from the newest back to the oldest" in timeless.err
    assert malformed.code == 2 and "'17' is no id of an event" in malformed.err


async def test_hanging_message_and_those_behind_it_are_told(redis: Redis, redis_url: str, prefix: str) -> None:
    """One whose consumer has kept it for more than a minute is in work; the others wait behind it."""
    where = ("--redis", redis_url, "--prefix", prefix)
    events = [told() for _ in range(4)]
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("mail", start="new")) as mail:
            await streams.publish(*events)
            (delivery,) = await deliveries(mail, 1)
            (row,) = await redis.xpending_range(f"{prefix}:{{events}}", "mail", "-", "+", 1)
            kept = {"name": f"{prefix}:{{events}}", "groupname": "mail", "consumername": row["consumer"]}
            await redis.xclaim(**kept, min_idle_time=0, message_ids=[delivery.id], retrycount=10)
            hangs, last, first = await asyncio.gather(
                silbo("why", events[0].message_id, *where),
                silbo("why", events[3].message_id, *where),
                silbo("why", events[1].message_id, *where),
            )
    assert "in work for 90 s: a listener may hang" in hangs.out, hangs.out
    assert "waiting behind 2" in last.out and "waiting behind" not in first.out


@pytest.mark.every_redis
@pytest.mark.parametrize("identity", [None, str(uuid4())], ids=["with its time", "without a time"])
async def test_event_is_found_before_and_long_after_its_time(
    redis: Redis, prefix: str, identity: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender's clock was ahead, or the outbox kept it for an hour; other entries are all around."""
    monkeypatch.setattr(module, "PAGE", 3)
    now = int(time.time() * 1000)
    for late in (-30_000, 0, 3_600_000):
        stream, event = f"{prefix}-{late}:{{events}}", told(identity)
        for step in range(-20, 21):
            await redis.xadd(stream, {"message": JSON.encode(told(), Origin("a", "b"))}, id=f"{now + late + step}-0")
        place = f"{now + late + 21}-7"
        await redis.xadd(stream, {"message": JSON.encode(event, Origin("a", "b"))}, id=place)
        await redis.xadd(stream, {"message": b"not a message"}, id=f"{now + late + 30}-0")
        found = await find_event(redis, event.message_id, prefix=f"{prefix}-{late}")
        assert [entry.entry for entry in found.entries] == [place], late


async def test_time_in_the_id_leads_to_the_place(redis: Redis, prefix: str) -> None:
    """Of a long stream, one page is read, wherever the event is."""
    stream, event = f"{prefix}:{{events}}", told()
    now = int(time.time() * 1000)
    pipe = redis.pipeline(transaction=False)
    for number in range(-3000, 3000):
        pipe.xadd(stream, {"message": b"{}"}, id=f"{now + 200 * number}-0")
        if not number:
            pipe.xadd(stream, {"message": JSON.encode(event, Origin("a", "b"))}, id=f"{now + 100}-0")
    await pipe.execute()
    found = await find_event(redis, event.message_id, prefix=prefix)
    assert found.entries and found.searched == module.PAGE


async def test_message_of_another_format_is_found(redis: Redis, prefix: str) -> None:
    event = told()
    async with RedisStreams(redis, app="shop", prefix=prefix, format=CLOUDEVENTS) as streams:
        await streams.publish(event)
    found = await find_event(redis, event.message_id, prefix=prefix, format=CLOUDEVENTS)
    assert [entry.name for entry in found.entries] == ["order.paid"]


async def test_dead_letter_outlives_its_entry(redis: Redis, redis_url: str, prefix: str) -> None:
    event = told()
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(event)
            (delivery,) = await deliveries(receiver, 1)
            assert await receiver.bury(delivery, error="ValueError: never", attempts=5)
    await redis.xdel(f"{prefix}:{{events}}", delivery.id)
    done = await silbo("why", event.message_id, "--redis", redis_url, "--prefix", prefix)
    assert done.code == 0 and f"{prefix}:{{events}}, group billing" in done.out and "ValueError: never" in done.out


async def test_every_event_is_placed_wherever_it_was_frozen(redis: Redis, prefix: str, tmp_path: Path) -> None:
    """100 events through an outbox, a relay and a group, each stopped at a random point of its way."""
    dice = random.Random(12)
    path = tmp_path / "outbox.db"
    wanted: dict[str, str] = {}
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            sent = [told() for _ in range(80)]
            async with Outbox(SQLiteStore(path), RedisStreams(redis, app="shop", prefix=prefix), relay=False) as outbox:
                await outbox.publish(*sent)
            await _relay(path, RedisStreams(redis, app="shop", prefix=prefix), 80)
            received = await deliveries(receiver, 60)
            for event in sent[60:]:
                wanted[event.message_id] = "waiting"
            for delivery in received:
                state = dice.choice(["in hand", "failed", "dead", "done"])
                wanted[delivery.message().message_id] = state
                if state == "failed":
                    await receiver.count(delivery, error="ValueError: no")
                elif state == "dead":
                    assert await receiver.bury(delivery, error="ValueError: never", attempts=5)
                elif state == "done":
                    await receiver.ack(delivery)
            async with Outbox(SQLiteStore(path), RedisStreams(redis, app="shop", prefix=prefix), relay=False) as outbox:
                stored = [told() for _ in range(20)]
                await outbox.publish(*stored)
                wanted |= {event.message_id: "stored" for event in stored}
            async with _open(path) as opened_store:
                for identity, state in wanted.items():
                    found = await find_event(redis, identity, store=opened_store, prefix=prefix)
                    assert _state(found) == state, identity


def _state(found: module.Whereabouts) -> str:
    if not found.entries:
        (row,) = found.rows
        assert row.state == "pending"
        return "stored"
    ((place,),) = [entry.groups for entry in found.entries]
    if place.state == "in hand":
        return "failed" if place.error else "in hand"
    return place.state


@asynccontextmanager
async def _open(path: Path) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(path)
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def _relay(path: Path, streams: RedisStreams, many: int) -> None:
    """Send everything that the outbox has."""
    async with Outbox(SQLiteStore(path), streams) as outbox:
        async with asyncio.timeout(30):
            while (await outbox.status()).counts["sent"] < many:
                await asyncio.sleep(0.01)
