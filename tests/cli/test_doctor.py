"""`silbo doctor` on servers and groups that break a promise, each in one way; and on one that is well."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer, Outbox
from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis.retention import RetentionPolicy
from silbo.cli.doctor import build_redis_cli, build_redis_options
from silbo.event import new_id
from silbo.message import Delivery, Message
from silbo.operations import doctor as module
from silbo.operations.doctor import Finding, examine
from silbo.operations.groups import read_groups
from silbo.stores.sqlite import SQLiteStore
from tests.support.command_line import SILBO, fill, message, settle, silbo
from tests.support.redis_streams import eventually, opened, receive
from tools.redis_binary import Binary
from tools.redis_server import RedisServer


async def findings(client: Redis, **options: Any) -> dict[str, Finding]:
    """The last finding of each check."""
    return {finding.check: finding async for finding in examine(client, **options)}


async def all_findings(client: Redis, **options: Any) -> list[Finding]:
    return [finding async for finding in examine(client, **options)]


@pytest.mark.every_redis
async def test_healthy_server_is_in_no_danger(own_redis: RedisServer, tmp_path: Path) -> None:
    """Exit code 0: with every write on disk, a consumer that lives, and an outbox that waits for nothing."""
    store = tmp_path / "outbox.db"
    await fill(store, 1)
    await settle(store, sent=1)
    async with Redis.from_url(own_redis.url) as client, RedisStreams(client, app="shop") as streams:
        await client.config_set("maxmemory-policy", "noeviction")
        async with opened(streams.group("billing", start="new")) as receiver:
            await receiver.receive(1)
            await streams.publish(message(1))
            text, program = await asyncio.gather(
                silbo("doctor", "--redis", own_redis.url, "--store", store, command=SILBO),
                silbo("doctor", "--redis", own_redis.url, "--store", store, "--json"),
            )
    assert (text.code, program.code, text.err) == (0, 0, "\nno danger\n"), text.out
    levels = {found["check"]: found["level"] for found in program.objects}
    # Not rewritten since the start: of that only Redis makes a danger.
    assert ("append-only file" in levels) == (not own_redis.name.startswith("valkey"))
    expected = {"version", "persistence", "eviction", "memory", "latency", "clocks", "silbo:{events}", "outbox"}
    assert {check for check, level in levels.items() if level == "ok"} >= expected - {"version"}, levels
    assert (
        "every write is on disk" in text.out
        and "silbo:{events} billing: lag 1, 0 in hand, 1 consumer alive" in text.out
    )


@pytest.mark.every_redis
async def test_server_that_forgets_or_evicts_is_a_danger(redis_binary: Binary | None) -> None:
    """Exit code 1, and with each danger the line that mends it: run as it stands, the danger is gone."""
    with RedisServer(binary=redis_binary) as server:
        async with Redis.from_url(server.url) as client:
            await client.config_set("appendonly", "no")
            await client.config_set("save", "")
            await client.config_set("maxmemory-policy", "allkeys-lru")
            await client.xadd("silbo:{events}", {"message": "{}"})
            done = await silbo("doctor", "--redis", server.url)
            found = await findings(client)
            assert done.code == 1 and "2 dangers" in done.err, done.out
            assert "restart of Redis loses all messages" in done.out and "deletes keys, whole streams" in done.out
            for check in ("persistence", "eviction"):
                mend = (found[check].mend or "").partition(" && ")[0].removeprefix("redis-cli ").split()
                await client.execute_command(*mend)
            loses_seconds = (await findings(client))["persistence"]
            assert (loses_seconds.level, (loses_seconds.mend or "").partition(":")[0]) == (
                "note",
                "only after a power loss",
            )
            await client.config_set("appendfsync", "always")
            mended = await findings(client)
            assert "append-only file" not in mended  # it was rewritten when it was switched on
            assert (mended["persistence"].level, mended["eviction"].level) == ("ok", "ok")
            await client.config_set("maxmemory-policy", "volatile-ttl")
            assert (await findings(client))["eviction"].level == "danger"


async def test_full_server_and_a_retention_that_has_no_room(own_redis: RedisServer) -> None:
    async with Redis.from_url(own_redis.url) as client:
        for number in range(100):
            await client.xadd("silbo:{events}", {"message": "x" * 1000}, id=f"{1_000_000 + number * 1000}-0")
        await findings(client)  # its connections take memory, too
        used = (await client.info())["used_memory"]
        await client.config_set("maxmemory", int(used * 1.06))
        full = await findings(client)
        await client.config_set("maxmemory", used // 2)
        refusing, missing = await findings(client), await findings(client, prefix="other")
        await client.config_set("maxmemory", used * 20)
        roomy, forever = await findings(client), await findings(client, retain=None)
        day = await findings(client, retain=90.0)
        await client.config_set("maxmemory-policy", "allkeys-lru")
        await client.config_set("maxmemory", used // 2)
        evicting = await findings(client)
    assert full["memory"].level == "danger" and "maxmemory" in (full["memory"].mend or "")
    assert roomy["memory"].level == "ok"
    assert full["memory"].text.endswith("are refused when it is full")
    assert refusing["memory"].level == "danger" and refusing["memory"].text.endswith("are refused now")
    assert not evicting["memory"].text.endswith("are refused now"), "it deletes keys instead"
    assert missing["streams"].level == "note" and "while Redis refuses writes" in missing["streams"].text
    room = roomy["silbo:{events}"]
    assert " KiB; at this rate" in room.text, "a small stream is not 0.0 MiB"
    assert room.level == "danger" and room.text.startswith("100 messages of 99 s, ")
    assert re.search(
        r"; at this rate it will hold [\d.]+ [MG]iB after its 7 days \(retain\), of [\d.]+ MiB \(", room.text
    )
    assert day["silbo:{events}"].level == "ok" and forever["silbo:{events}"].level == "note"


async def test_memory_that_is_advised_is_enough(
    own_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rate of the streams and their retention, with what waits in the outbox; run as it stands, nothing is to mend."""
    async with aclosing(SQLiteStore(tmp_path / "outbox.db")) as store, Redis.from_url(own_redis.url) as client:
        await store.open()
        for number in range(100):
            await client.xadd("silbo:{events}", {"message": "x" * 10_000}, id=f"{1_000_000 + number * 1000}-0")
        await client.config_set("maxmemory", int((await client.info())["used_memory"] * 1.05))
        full = (await findings(client, retain=60.0, store=store))["memory"]
        by_rate = (await findings(client, retain=100 * 1000.0, store=store))["memory"]
        await client.config_set("maxmemory", int((await client.info())["used_memory"] * 1.2))
        noted = (await findings(client, retain=60.0, store=store))["memory"]
        line, _, other = (full.mend or "").partition("\n")
        assert line == "redis-cli CONFIG SET maxmemory 256mb && redis-cli CONFIG REWRITE"
        assert other.startswith("or: RedisStreams(")
        await client.execute_command(*line.partition(" && ")[0].split()[1:])
        mended = (await findings(client, retain=60.0, store=store))["memory"]
        await client.config_set("maxmemory", int((await client.info())["used_memory"] * 1.05))
        monkeypatch.setattr(module, "SMALLEST_MEMORY", 1 << 20)
        async with Outbox(SQLiteStore(store.path), RedisStreams(client, app="shop"), relay=False) as outbox:
            for _ in range(20):
                await outbox.publish(Message("notification_event", "order.paid", new_id(), {"text": "x" * 500_000}))
            waiting = (await findings(client, retain=60.0, store=store))["memory"]
    assert (full.level, noted.level, mended.level) == ("danger", "note", "ok") and noted.mend == full.mend
    (needed,), (more,) = (re.findall(r"(\d+)mb", each.mend or "") for each in (by_rate, waiting))
    assert int(more) >= 12, "10 MB wait in the outbox"
    assert 1000 <= int(needed) <= 2048, "a megabyte in 99 s, for 100,000 s"


async def test_abandoned_group_and_one_that_falls_behind(redis: Redis, prefix: str) -> None:
    key = f"{prefix}:{{events}}"
    await redis.xadd(key, {"message": "{}"}, id="1000000-0")
    await redis.xgroup_create(key, "abandoned", "0")
    await redis.xgroup_create(key, "behind", "0")
    await redis.xgroup_createconsumer(key, "behind", "web-1:4711:0123456789ab-1")
    found = await findings(redis, prefix=prefix)
    abandoned, behind = found[f"{key} abandoned"], found[f"{key} behind"]
    assert abandoned.level == "danger" and "no consumer is alive, and 1 message waits" in abandoned.text
    mend = abandoned.mend or ""
    assert mend.startswith("start its consumers. Only if nobody needs the group: redis-cli XGROUP DESTROY")
    assert (
        f"'{key}' abandoned (its 1 unread message will never be handled, and the stream stays as large as it is)"
        in mend
    )
    await redis.hset(f"{key}:retention", "policy", RetentionPolicy(trim="acknowledged").to_text())  # type: ignore[misc]
    by_need = (await findings(redis, prefix=prefix))[f"{key} abandoned"].mend or ""
    assert "what no other group waits for is removed" in by_need
    assert behind.level == "danger" and "days old, and after 7 days it may be dropped" in behind.text


async def test_two_live_consumers_under_one_name(redis: Redis, prefix: str) -> None:
    """They have noticed each other, and wrote it down; one that has left is forgotten after some seconds."""
    key = f"{prefix}:{{events}}"
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", start="new", consumer="billing-0")
        async with opened(group) as one, opened(group) as other:
            reading = [asyncio.create_task(_read(receiver)) for receiver in (one, other)]
            try:
                await eventually(lambda: redis.hexists(f"{key}:live:billing", "!billing-0"))
                found = await findings(redis, prefix=prefix)
            finally:
                for task in reading:
                    task.cancel()
                await asyncio.gather(*reading, return_exceptions=True)
    await redis.hset(
        f"{key}:live:billing", "!billing-0", int(await redis.hget(f"{key}:live:billing", "!billing-0")) - 10_000
    )
    later = await findings(redis, prefix=prefix)
    shared = found[f"{key} billing"]
    assert shared.level == "danger" and "two live consumers have the name billing-0" in shared.text
    assert "two live" not in later[f"{key} billing"].text


async def test_listener_that_hangs_is_a_note_and_then_a_danger(redis: Redis, redis_url: str, prefix: str) -> None:
    """It raises nothing, so no attempt fails; its consumer keeps the message, again and again, while others come and go."""
    key = f"{prefix}:{{events}}"
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new", consumer="billing-0")) as receiver:
            await streams.publish(*(message(number) for number in range(4)))
            first, *others = [item for item in await receive(receiver, 3) if isinstance(item, Delivery)]
            await receiver.keep(*others)  # read ahead: the oldest changes
            for _ in range(6):
                await receiver.keep(first, *others)
            for _ in range(4):
                await receiver.keep(others[1])
            note = await all_findings(redis, prefix=prefix)
            table = await silbo("groups", "--redis", redis_url, "--prefix", prefix)
            program = await silbo("groups", "--redis", redis_url, "--prefix", prefix, "--json")
            for _ in range(24):
                await receiver.keep(first, *others)
            danger = await all_findings(redis, prefix=prefix)
            await redis.xclaim(key, "billing", "billing-0", 0, [first.id], idle=31_000, justid=True)
            silent = await all_findings(redis, prefix=prefix)
            await receiver.keep(first)
            await receiver.count(first, error="ValueError: no")
            failing = await all_findings(redis, prefix=prefix)
    (noted,) = [each for each in note if "hang" in each.text]
    (mended,) = [each for each in danger if "hang" in each.text]
    where = f"{re.sub(r'[^A-Za-z0-9._-]', '-', socket.gethostname())[:64]}, pid {os.getpid()}"
    assert (noted.check, noted.level, mended.level) == (f"{key} billing", "note", "danger")
    assert f"{first.id} is in work for 60 s at {where}" in noted.text and "5 min" in mended.text
    assert "its log names the listener" in (mended.mend or "")
    assert f"{first.id} is in work for 60 s at {where}: does a listener hang? Its log names the listener" in table.out
    assert program.object["hanging"]["entry"] == first.id and program.object["hanging"]["pid"] == os.getpid()
    assert not any("hang" in each.text for each in silent + failing)


async def test_group_that_stands_still_is_a_note(redis: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the minute after which a listener counts as hanging; and not a group that gets on, slowly."""
    key, added = f"{prefix}:{{events}}", int(time.time() * 1000) - 31_000
    for group in ("slow", "stuck"):
        await redis.xgroup_create(key, group, "0", mkstream=True)
    entries = [await redis.xadd(key, {"message": "{}"}, id=f"{added}-{number}") for number in range(3)]
    for group in ("slow", "stuck"):
        await redis.xreadgroup(group, "web-1:4711:0123456789ab-1", {key: ">"})
    read_places, looks = module._read_places, []

    async def look_and_go_on(connection: Any, of_stream: str) -> Any:
        looks.append(await read_places(connection, of_stream))
        await redis.xack(key, "slow", entries[1])
        return looks[-1]

    monkeypatch.setattr(module, "_read_places", look_and_go_on)
    monkeypatch.setattr(module, "LOOKS_APART", 0)
    found = await findings(redis, prefix=prefix)
    await redis.xack(key, "stuck", *entries)
    await redis.xack(key, "slow", *entries)
    await findings(redis, prefix=prefix)
    assert len(looks) == 2, "a second is taken only for a group in doubt"
    assert found[f"{key} slow"].level == "ok"
    stuck = found[f"{key} stuck"]
    assert (
        stuck.level == "note" and "lag 0, 3 in hand, 1 consumer alive; none was done in the last second" in stuck.text
    )
    assert re.search(r"the oldest is 3\d s old$", stuck.text)


async def test_consumer_shows_the_message_whose_listener_hangs(redis: Redis, prefix: str) -> None:
    """And none of those that wait behind it. Here three signs, not six, are a minute."""
    go_on, dispatcher = asyncio.Event(), AsyncEventDispatcher()

    @dispatcher.listen("order.paid")
    async def hang(_: object) -> None:
        await go_on.wait()

    async def look() -> Any:
        return (await read_groups(redis, prefix=prefix, silent_after=60))[0].hanging

    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", start="oldest", claim_after=0.3)
        await streams.publish(*(Message("notification_event", "order.paid", new_id(), {}) for _ in range(3)))
        (first, _), *_ = await redis.xrange(f"{prefix}:{{events}}")
        async with Consumer(dispatcher, group, own="handle") as consumer:
            running = asyncio.create_task(consumer.run())
            await eventually(look)
            found = await look()
            go_on.set()
            consumer.stop()
            await running
    assert (found.entry, found.process.pid) == (first.decode(), os.getpid())


async def test_lag_that_lasts_is_a_note(redis: Redis, prefix: str) -> None:
    """Its consumers live, and are slower than the senders."""
    key = f"{prefix}:{{events}}"
    await redis.xadd(key, {"message": "{}"}, id=f"{int(time.time() * 1000) - 180_000}-0")
    await redis.xgroup_create(key, "billing", "0")
    await redis.xgroup_createconsumer(key, "billing", "web-1:4711:0123456789ab-1")
    (found,) = [each for each in await all_findings(redis, prefix=prefix) if each.check == f"{key} billing"]
    assert found.level == "note" and "lag 1," in found.text
    assert found.text.endswith("1 consumer alive; its next message has waited for 3 min")
    assert "more consumers" in (found.mend or "")


async def test_messages_that_wait_for_a_newer_consumer_are_a_danger(redis: Redis, redis_url: str, prefix: str) -> None:
    """All commands say what they wait for, and not that a listener hangs. An attempt, or a dead letter, ends the wait."""
    key, identity, where = f"{prefix}:{{events}}", new_id(), ("--redis", redis_url, "--prefix", prefix)
    newer = Message("notification_event", "order.paid", identity, {}, {"publication": "p", "version": "2"})
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(newer, message(1))
            first, second = [item for item in await receive(receiver, 2) if isinstance(item, Delivery)]
            await receiver.offer(first, second)
            found = await all_findings(redis, prefix=prefix)
            groups, json, why, why_json = [
                await silbo(*arguments)
                for arguments in (
                    ("groups", *where),
                    ("groups", *where, "--json"),
                    ("why", identity, *where),
                    ("why", identity, *where, "--json"),
                )
            ]
            offered = int(time.time() * 1000) - 35_000
            await redis.zadd(f"{key}:offered:billing", {first.id: offered, second.id: offered})
            sooner = await all_findings(redis, prefix=prefix)
            await redis.zadd(f"{key}:offered:billing", {first.id: 1, second.id: 1})
            late = await all_findings(redis, prefix=prefix)
            await receiver.count(second)
            (one,) = await read_groups(redis, prefix=prefix)
            assert await receiver.bury(first, error="VersionTooNew: no", attempts=0)
            (none,) = await read_groups(redis, prefix=prefix)
            await redis.xclaim(key, "billing", "silbo-retry", 0, [first.id], force=True)
            (again,) = await read_groups(redis, prefix=prefix)
    (danger,) = [each for each in found if each.check == f"{key} billing"]
    assert danger.level == "danger" and "deploy the newer consumers" in (danger.mend or "")
    wanted = "a consumer that knows version 2 of order.paid"
    assert re.match(
        rf"2 wait for {wanted}, the first for \d+ s; it becomes a dead letter in \d min \d+ s ", danger.text
    )
    assert any("becomes a dead letter in 4 min 2" in each.text for each in sooner), "not in 5 min, nor in 4"
    assert any("becomes a dead letter after newer_version_wait" in each.text for each in late)
    assert f"2 messages in hand wait for {wanted}, the first for" in groups.out and "hang" not in groups.out
    assert (json.object["newer"]["count"], json.object["newer"]["version"]) == (2, 2)
    (place,) = why_json.object["entries"][0]["groups"]
    assert place["state"] == "newer" and place["left_at"] and "waits for a newer version" in why.out
    assert one.newer is not None and one.newer.count == 1 and none.newer is again.newer is None


@pytest.mark.parametrize(
    ("groups", "shown"), [(2, "group-0, group-1 at 2 streams"), (7, "group-4 and 2 more at 2 streams")]
)
async def test_groups_that_wait_for_one_version_are_one_danger(
    groups: int, shown: str, redis: Redis, prefix: str
) -> None:
    """As after a deploy in the wrong order: every group of every stream waits for the same consumer."""
    newer = Message("notification_event", "order.paid", new_id(), {}, {"publication": "p", "version": "2"})
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        await streams.publish(newer, replace(newer, to="orders"))
    for key in (f"{prefix}:{{events}}", f"{prefix}:{{orders}}"):
        ((entry, _),) = await redis.xrange(key)
        for each in range(groups):
            await redis.xgroup_create(key, f"group-{each}", "0")
            await redis.xreadgroup(f"group-{each}", "web-1:4711:0123456789ab-1", {key: ">"})
            await redis.zadd(f"{key}:offered:group-{each}", {entry: time.time() * 1000 - 90_000})
    found = await all_findings(redis, prefix=prefix)
    (danger,) = [each for each in found if "knows version 2" in each.text]
    assert danger.level == "danger" and shown in danger.text
    assert f": {2 * groups} wait for a consumer that knows version 2 of order.paid, the first for 90 s" in danger.text
    first, *lines = (danger.mend or "").splitlines()
    assert first.startswith("deploy the newer consumers")
    assert len(lines) == min(2 * groups, 6) and " --group group-0" in lines[0]
    assert not any(each.level == "ok" and each.check.endswith("group-0") for each in found)


async def test_version_that_can_not_be_read_is_a_newer_one(redis: Redis, prefix: str) -> None:
    """Diator's format tells none, an encrypted message neither."""
    key = f"{prefix}:{{events}}"
    await redis.xgroup_create(key, "billing", "0", mkstream=True)
    entry = await redis.xadd(key, {"message": "secret"})
    await redis.xreadgroup("billing", "web-1:4711:0123456789ab-1", {key: ">"})
    await redis.zadd(f"{key}:offered:billing", {entry: time.time() * 1000 - 90_000})
    found = await all_findings(redis, prefix=prefix)
    assert any("1 waits for a consumer that knows a newer version, the first for 90 s" in each.text for each in found)
    await redis.delete(f"{key}:offered:billing")
    await redis.set(f"{key}:offered:billing", "another program's")
    unknown = [each for each in await all_findings(redis, prefix=prefix) if each.check == f"{key} billing"]
    assert unknown and not any("newer version" in each.text for each in unknown)


async def _read(receiver: Any) -> None:
    while True:
        await receiver.receive(1)


async def test_wrong_prefix_is_a_danger(redis: Redis, prefix: str) -> None:
    await redis.xadd(f"{prefix}:{{events}}", {"message": "{}"})
    wrong = await findings(redis, prefix=f"{prefix}x")
    assert wrong["streams"].level == "danger" and f"{prefix}:{{events}}" in wrong["streams"].text
    right = await findings(redis, prefix=prefix)
    assert "streams" not in right


async def test_sender_and_consumers_with_different_prefixes_are_a_danger(redis: Redis, prefix: str) -> None:
    """Looked at from either side; and other prefixes that have messages and groups are none."""
    asked, other = f"{prefix}-a", f"{prefix}-b"
    await redis.xgroup_create(f"{asked}:{{events}}", "billing", "0", mkstream=True)
    await redis.xadd(f"{other}:{{events}}", {"message": "{}"})
    sender, consumers = await findings(redis, prefix=asked), await all_findings(redis, prefix=other)
    lost = sender["prefixes"]
    assert (lost.level, lost.text) == (
        "danger",
        f"{other}:{{events}} gets messages now, and no group reads it; the groups under {asked} get none",
    )
    assert "replay" not in (lost.mend or ""), "what comes meanwhile would not be in it"
    assert f"1. restart the relay or the program that sends there, with --prefix {asked}\n2. " in (lost.mend or "")
    (fed,) = [each for each in consumers if each.check == "prefixes" and prefix in each.text]
    assert fed.level == "danger" and f"no group reads {other}:{{events}}, and groups without new" in fed.text
    assert f"{asked}:{{events}}" in fed.text and fed.mend == f"give the consumers --prefix {other}"
    notes = [each.level for each in consumers if each.text == "no group reads it"]
    assert notes == ["note"], "of the prefix that was asked"
    await redis.xgroup_create(f"{other}:{{events}}", "billing", "0")
    assert (await findings(redis, prefix=asked))["prefixes"].level == "note"


async def test_messages_that_went_astray_are_sent_again_by_one_line(redis: Redis, redis_url: str, prefix: str) -> None:
    """From the first to the last entry of all streams under the wrong prefix, for a replay knows no stream; until those are gone."""
    asked, other = f"{prefix}-a", f"{prefix}-b"
    await redis.xgroup_create(f"{asked}:{{events}}", "billing", "0", mkstream=True)
    await redis.xadd(f"{other}:{{events}}", {"message": "{}"}, id="1772875336500-0")
    await redis.xadd(f"{other}:{{events}}", {"message": "{}"}, id="1772875354250-0")
    await redis.xadd(f"{other}:{{orders}}", {"message": "{}"}, id="1772875360000-0")
    done = await silbo("doctor", "--redis", redis_url, "--prefix", asked)
    ours = [each for each in await all_findings(redis, prefix=asked) if each.check == "prefixes" and other in each.text]
    await redis.xadd(f"{other}:{{orders}}", {"message": "{}"})
    fed = [each for each in await all_findings(redis, prefix=asked) if each.check == "prefixes" and other in each.text]
    await redis.delete(f"{other}:{{events}}", f"{other}:{{orders}}")
    gone = [each for each in await all_findings(redis, prefix=asked) if other in each.text]
    (found,) = ours
    assert (found.level, found.text) == (
        "danger",
        f"{other}:{{events}}, {other}:{{orders}} got 3 messages from 2026-03-07T09:22:16.500Z to 2026-03-07T09:22:40.000Z, and no group read them",
    )
    line = "silbo outbox replay --since 2026-03-07T09:22:16.500Z --before 2026-03-07T09:22:41.000Z"
    assert line in (found.mend or "").split("\n") and f"        {line}\n" in done.out, "a line to paste"
    assert ["replay" in (each.mend or "") for each in fed] == [False] and not gone


async def test_dead_letters_are_a_note_with_their_commonest_error(
    redis: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its type, for the texts differ; those of other groups don't count."""
    key = f"{prefix}:{{events}}"
    for group in ("billing", "mail"):
        await redis.xgroup_create(key, group, "0", mkstream=True)
    for error in (
        "KeyError: 'a'",
        "ValueError: no such order: 1",
        "ValueError: no such order: 2\nmore",
        "KeyError: 'b'",
    ):
        await redis.xadd(f"{key}:dead", {"group": "billing", "error": error, "message": "{}"})
    await redis.xadd(f"{key}:dead", {"group": "billing", "error": "ValueError: no such order: 3", "message": "{}"})
    for _ in range(4):
        await redis.xadd(f"{key}:dead", {"group": "mail", "error": "OSError: 1", "message": "{}"})
    (letters,) = [each for each in await all_findings(redis, prefix=prefix) if "5 dead" in each.text]
    assert letters == Finding(
        f"{key} billing",
        "note",
        "5 dead letters, 3 with ValueError, the latest: no such order: 3",
        f"silbo dead list --prefix {prefix} --group billing",
    )
    monkeypatch.setattr(module, "DEAD_LOOKED_AT", 6)
    texts = [each.text for each in await all_findings(redis, prefix=prefix)]
    assert "5 dead letters, 1 of the newest 2 with ValueError, the latest: no such order: 3" in texts


async def test_key_of_another_type_is_a_danger(redis: Redis, prefix: str) -> None:
    await redis.set(f"{prefix}:{{events}}", "text")
    found = await findings(redis, prefix=prefix, stream="events")
    assert found[f"{prefix}:{{events}}"].level == "danger"


@pytest.mark.every_redis
async def test_lines_that_mend_can_be_run_as_they_are(redis: Redis, prefix: str) -> None:
    """A group's name is any program's word; and the dead letters of another stream than events are told by it."""
    key, name = f"{prefix}:{{orders}}", "a; reboot"
    await redis.xadd(key, {"message": "{}"})
    await redis.xgroup_create(key, name, "0")
    await redis.xadd(f"{key}:dead", {"group": name, "error": "LookupError: no"})
    mends = [each.mend or "" for each in await all_findings(redis, prefix=prefix) if each.check == f"{key} {name}"]
    assert f"redis-cli XGROUP DESTROY '{key}' 'a; reboot' (" in mends[0]
    assert mends[1] == f"silbo dead list --prefix {prefix} --stream orders --group 'a; reboot'"


@pytest.mark.parametrize(
    ("url", "environment", "expected"),
    [
        ("redis://shop:s3cret@redis.example:6380/2", "same", 'redis-cli -u "$SILBO_REDIS_URL"'),
        (
            "redis://shop:s3cret@redis.example:6380/2",
            "",
            "redis-cli -u redis://redis.example:6380/2 --user shop --askpass",
        ),
        ("redis://redis.example", "redis://other", "redis-cli -u redis://redis.example"),
        ("rediss://:s3cret@redis.example?db=3", "same", "redis-cli -u rediss://redis.example -n 3 --askpass"),
        ("unix:///run/my%20redis.sock?db=1", "same", "redis-cli -s '/run/my redis.sock' -n 1"),
        ("unix:///run/redis.sock?password=s3cret", "same", "redis-cli -s /run/redis.sock --askpass"),
    ],
    ids=["set", "given", "given, another is set", "options", "socket", "socket with a password"],
)
def test_redis_cli_gets_the_address_and_never_the_password(
    url: str, environment: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password in a line that is pasted stands in the shell's history, and in the logs of whoever keeps the doctor's text."""
    monkeypatch.setenv("SILBO_REDIS_URL", url if environment == "same" else environment)
    options = argparse.Namespace(cluster=False, cacert=None, cert=None)
    assert build_redis_cli(url, options) == expected
    options = argparse.Namespace(cluster=True, cacert="ca.pem", cert="my cert.pem")
    with_files = build_redis_cli(url, options)
    assert with_files.startswith("redis-cli -c ") and "s3cret" not in with_files
    assert with_files.endswith(" --cacert ca.pem --cert 'my cert.pem' --key 'my cert.pem'")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://shop:s3cret@redis.example/2", " --redis redis://shop:...@redis.example/2"),
        ("redis://:s3:c@ret@redis.example", " --redis redis://:...@redis.example"),
        ("redis://redis.example?password=s3cret&db=1", " --redis 'redis://redis.example?password=...&db=1'"),
        ("redis://localhost", " --redis redis://localhost"),
    ],
)
def test_other_commands_get_the_address_without_the_password(
    url: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need none if the environment has it."""
    monkeypatch.delenv("SILBO_REDIS_URL", raising=False)
    options = argparse.Namespace(cluster=False, cacert="ca.pem", cert=None)
    assert build_redis_options(url, options) == f"{expected} --cacert ca.pem"
    monkeypatch.setenv("SILBO_REDIS_URL", url)
    assert build_redis_options(url, options) == " --cacert ca.pem"


async def test_lines_for_redis_cli_name_the_server(own_redis: RedisServer) -> None:
    """All of them: pasted, a line without an address goes to whatever Redis listens at localhost:6379."""
    async with Redis.from_url(own_redis.url) as client:
        await client.config_set("save", "")
        await client.config_set("appendonly", "no")
        await client.config_set("maxmemory-policy", "allkeys-lru")
        await client.config_set("maxmemory", "4mb")
        await client.xadd("shopp:{events}", {"message": "{}"}, id="1-1")
        await client.xgroup_create("silbo:{events}", "mail", "0", mkstream=True)
        await client.xadd("silbo:{events}", {"message": "{}"})
        await client.set("silbo:{other}", "text")
        done = await silbo("doctor", "--redis", own_redis.url, "--json")
    lines = [row["mend"] for row in done.objects if row["mend"] and "redis-cli" in row["mend"]]
    address = f"redis-cli {'-s' if own_redis.url.startswith('unix') else '-u'} "
    assert len(lines) >= 4 and "\0" not in done.out
    assert all(line.count("redis-cli") == line.count(address) for line in lines), lines


async def test_rights_that_a_program_lacks(own_redis: RedisServer) -> None:
    """Asked with the URL of a program whose user may read only. Redis 6.2 can't be asked, and that is said."""
    async with Redis.from_url(own_redis.url) as admin:
        await admin.execute_command(
            "ACL",
            "SETUSER",
            "web",
            "on",
            ">secret",
            "~silbo:*",
            "+@read",
            "+@connection",
            "+acl",
            "+time",
            "+eval",
            "+evalsha",
        )
        await admin.xadd("silbo:{events}", {"message": "{}"})
        version = (await admin.info())["redis_version"]
        async with Redis.from_url(own_redis.url, username="web", password="secret") as client:
            found = await findings(client, stream="events")
    assert found["version"].level == "note" and found["persistence"].level == "note"
    rights = found["rights"]
    if version.startswith("6."):
        assert rights.level == "note" and "user web" in rights.text
    else:
        assert rights.level == "danger" and "XADD" in rights.text and "ACL SETUSER web" in (rights.mend or "")


@pytest.mark.long
async def test_replica_is_no_place_to_publish(redis_binary: Binary | None) -> None:
    with RedisServer(port=True, binary=redis_binary) as first, RedisServer(binary=redis_binary) as second:
        async with Redis.from_url(first.url) as master, Redis.from_url(second.url) as replica:
            await master.xadd("silbo:{events}", {"message": "{}"})
            await replica.execute_command("REPLICAOF", "127.0.0.1", first.url.rpartition(":")[2].partition("/")[0])
            await eventually(lambda: replica.exists("silbo:{events}"))
            found = await findings(replica)
            with_replica = await findings(master)
    assert found["replicas"].level == "danger" and "replica of 127.0.0.1" in found["replicas"].text
    assert "1 connected" in with_replica["replicas"].text


async def test_outbox_without_a_relay_is_a_danger(redis: Redis, redis_url: str, prefix: str, tmp_path: Path) -> None:
    store = tmp_path / "outbox.db"
    await fill(store, 3)
    await redis.xadd(f"{prefix}:{{events}}", {"message": "{}"})
    done = await silbo("doctor", "--redis", redis_url, "--prefix", prefix, "--store", store, "--json")
    (outbox,) = [found for found in done.objects if found["check"] == "outbox"]
    environment = {"SILBO_REDIS_URL": redis_url, "SILBO_STORE": str(store)}
    bare = await silbo("doctor", "--prefix", prefix, "--json", env=environment)
    assert outbox["mend"] == f"silbo relay --store {store} --redis {quote(redis_url)} --prefix {prefix}"
    assert [each["mend"] for each in bare.objects if each["check"] == "outbox"] == [f"silbo relay --prefix {prefix}"]
    assert (done.code, outbox["level"]) == (1, "danger") and "no relay is at work, and 3 rows wait" in outbox["text"]
    opened_store = SQLiteStore(store)
    await opened_store.open()
    try:
        assert await opened_store.lead(0, "web-1:4711:0123456789ab", lease=60) is not None
        led = await findings(redis, store=opened_store, prefix=prefix)
    finally:
        await opened_store.aclose()
    assert led["outbox"].level == "ok"


async def test_outbox_whose_last_attempt_failed_is_a_danger(own_redis: RedisServer, tmp_path: Path) -> None:
    """At once, with the error: so long as Redis refuses, no row gets out, and the rows become more."""
    await fill(tmp_path / "outbox.db", 1)
    async with Redis.from_url(own_redis.url) as client:
        await client.config_set("maxmemory", 1)
        async with Outbox(SQLiteStore(tmp_path / "outbox.db"), RedisStreams(client, app="shop")):

            async def failed() -> bool:
                return any(row.error for row in await store.rows("pending"))

            store = SQLiteStore(tmp_path / "outbox.db")
            await store.open()
            try:
                await eventually(failed)
                async with asyncio.timeout(30):  # an attempt may begin and end between two looks at the states
                    while (found := (await findings(client, store=store))["outbox"]).level != "danger":
                        await asyncio.sleep(0.05)
            finally:
                await client.config_set("maxmemory", 0)
                await store.aclose()
    assert found.level == "danger" and re.match(
        r"1 row waits, the oldest for \d+ s; attempt \d+ failed: .*OOM", found.text
    )


async def test_redis_that_is_away_is_an_error(tmp_path: Path) -> None:
    """The outbox is examined all the same: it waits meanwhile."""
    await fill(tmp_path / "outbox.db", 2)
    done = await silbo("doctor", "--redis", "redis://127.0.0.1:1", "--store", tmp_path / "outbox.db")
    assert done.code == 1 and done.err.startswith("silbo: ") and done.err.count("\n") == 1
    assert "can't be reached" in done.err
    assert "outbox: no relay is at work, and 2 rows wait" in done.out
