"""`silbo top`: figures that move, at a terminal and for programs."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.operations.top import watch
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import fill, message, silbo, terminal
from tests.support.redis_streams import eventually, opened, receive
from tools.redis_server import RedisServer


@pytest.mark.every_redis
async def test_rates_are_those_between_two_looks(redis: Redis, prefix: str) -> None:
    """Added messages, and those that a group is done with: acknowledged or given up."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*(message(number) for number in range(10)))
            snapshots = watch(redis, prefix=prefix, every=0.05)
            before = await anext(snapshots)
            await streams.publish(*(message(number) for number in range(20)))
            items = await receive(receiver, 12)
            await receiver.ack(*items[:5])
            assert await receiver.bury(items[5], error="ValueError", attempts=1)
            now = await anext(snapshots)
            await snapshots.aclose()
    (first,), (second,) = before.groups, now.groups
    assert (first.added_rate, first.done_rate, first.status.lag) == (None, None, 10)
    seconds = (now.at - before.at).total_seconds()
    assert second.added_rate is not None and second.done_rate is not None
    assert (round(second.added_rate * seconds), round(second.done_rate * seconds)) == (20, 6)
    assert (second.status.lag, second.status.in_hand, second.status.dead) == (18, 6, 1)


async def test_screen_is_drawn_until_ctrl_c(redis: Redis, redis_url: str, prefix: str, tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 3)
    await redis.xgroup_create(f"{prefix}:{{events}}", "billing", "0", mkstream=True)
    where = ("--redis", redis_url, "--prefix", prefix)
    env = {"COLUMNS": "160"}
    async with terminal("top", *where, "--store", tmp_path / "outbox.db", "--every", "0.1s", env=env) as screen:
        await screen.until("3 pending")
        await redis.xadd(f"{prefix}:{{events}}", {"message": "{}"})
        await screen.until("silbo top")
        screen.type("\x03")
        assert await screen.end() == 130
    assert "billing" in screen.shown and "outbox: NO RELAY; 3 pending, 0 sending, 0 sent, 0 dead rows" in screen.shown
    assert "\x1b[31moutbox: NO RELAY" in screen.shown, "red"


async def test_programs_get_each_look(redis: Redis, redis_url: str, prefix: str, tmp_path: Path) -> None:
    await fill(tmp_path / "outbox.db", 3)
    await redis.xgroup_create(f"{prefix}:{{events}}", "billing", "0", mkstream=True)
    where = ("--redis", redis_url, "--prefix", prefix)
    program, text = await asyncio.gather(
        silbo("top", *where, "--store", tmp_path / "outbox.db", "--every", "0.01s", "--limit", 2, "--json"),
        silbo("top", *where),
    )
    first, second = program.objects
    assert first["groups"][0]["added_rate"] is None and second["groups"][0]["added_rate"] == 0
    assert second["outbox"]["rows"]["pending"] == 3 and second["groups"][0]["group"] == "billing"
    assert text.code == 2 and "needs a terminal" in text.err


async def test_stream_that_is_missing_is_waited_for(redis: Redis, prefix: str, tmp_path: Path) -> None:
    """Meanwhile the outbox is shown, with the error that keeps its messages from the stream."""
    await fill(tmp_path / "outbox.db", 3)
    store = SQLiteStore(tmp_path / "outbox.db")
    await store.open()
    try:
        lead = await store.lead(0, "web-1:12:0f", lease=30.0)
        assert lead is not None
        (row, *_) = await store.take(lead, limit=1)
        await store.postpone(lead, [row.id], error="OOM command not allowed", delay=60.0)
        snapshots = watch(redis, prefix=prefix, store=store, every=0.01)
        nothing = await anext(snapshots)
        await redis.xgroup_create(f"{prefix}:{{events}}", "billing", "0", mkstream=True)
        there = await anext(snapshots)
        await snapshots.aclose()
    finally:
        await store.aclose()
    assert nothing.missing is not None and f"there is no stream {prefix}:{{events}}" in nothing.missing
    assert nothing.outbox is not None and nothing.outbox_error == "OOM command not allowed"
    assert (there.missing, [each.status.group for each in there.groups]) == (None, ["billing"])


async def test_outage_is_told_and_ends(own_redis: RedisServer, prefix: str) -> None:
    async with Redis.from_url(own_redis.url) as client:
        await client.xgroup_create(f"{prefix}:{{events}}", "billing", "0", mkstream=True)
        snapshots = watch(client, prefix=prefix, every=0.01)
        assert (await anext(snapshots)).error is None
        await asyncio.to_thread(own_redis.kill)
        away = await anext(snapshots)
        await asyncio.to_thread(own_redis.restart)

        async def is_back() -> bool:
            return (await anext(snapshots)).error is None

        await eventually(is_back)
        await snapshots.aclose()
    assert away.error is not None and away.groups[0].status.group == "billing"


@pytest.mark.parametrize(
    ("columns", "name", "titles"),
    [
        (60, "mail", ["group", "added/s", "done/s", "lag", "in hand", "dead", "cons."]),
        (60, "notifications-of-customers", ["group", "lag", "in hand", "dead", "cons."]),
        (80, "notifications-of-customers", ["group", "added/s", "done/s", "lag", "for", "in hand", "dead", "cons."]),
    ],
)
async def test_narrow_and_low_terminal_shows_what_is_needed_most(
    redis: Redis, redis_url: str, prefix: str, columns: int, name: str, titles: list[str]
) -> None:
    """No title and no figure is cut. Groups that do not fit are counted, and those without a consumer come first then."""
    key = f"{prefix}:{{events}}"
    for number in range(12):
        await redis.xgroup_create(key, f"{name}-{number:02}", "0", mkstream=True)
        if number < 11:
            await redis.xgroup_createconsumer(key, f"{name}-{number:02}", "one")
    await redis.xadd(key, {"message": "{}"})
    where = ("--redis", redis_url, "--prefix", prefix, "--limit", 1)
    async with terminal("top", *where, env={"COLUMNS": str(columns), "LINES": "12"}) as screen:
        assert await screen.end() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.shown.replace("\r", ""))
    _, head, _, *lines = text[text.rindex("silbo top") :].splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("and "))
    rows, worst = lines[:at], " ".join(line.strip() for line in lines[at + 1 :])
    assert re.split(r"\s{2,}", head.strip()) == titles
    groups = [row.split()[titles.index("group")] for row in rows]
    assert lines[at] == f"and {12 - len(groups)} more groups" and len(groups) >= 6 and len(lines) <= 9
    assert worst.startswith(f"{name}-11 at") and "it has no consumer, and 1 message waits" in worst
    assert all(group.startswith(name[:19]) for group in groups)
    assert name != "mail" or groups[:2] == ["mail-11", "mail-00"]
    assert all(len(row) <= columns for row in (head, *rows))
    if titles[-1] == "cons.":
        assert " of " not in "".join(rows), "all are alive, as `silbo groups` writes it"
