"""`silbo groups` on real groups: with consumers that live, were killed, fail; after a restart, and on a replica."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo.brokers.redis import RedisStreams
from silbo.brokers.redis import lag as module
from silbo.message import Delivery
from silbo.operations.groups import read_groups
from silbo.protocols import Receiver
from tests.support.command_line import SILBO, Run, message, silbo
from tests.support.redis_streams import eventually, opened, receive
from tools.redis_binary import Binary
from tools.redis_server import RedisServer

HOST = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]


def test_groups_takes_its_stream_as_other_commands_do(run: Run) -> None:
    """As an option too; two that differ are refused."""
    done = run("groups", "events", "--stream", "orders", "--redis", "redis://127.0.0.1:1")
    assert done.code == 2 and "which stream?" in done.err
    done = run("groups", "--stream", "orders", "--redis", "redis://127.0.0.1:1")
    assert done.code == 1 and "can't be reached" in done.err


async def deliveries(receiver: Receiver, many: int) -> list[Delivery]:
    return [item for item in await receive(receiver, many) if isinstance(item, Delivery)]


@pytest.mark.every_redis
async def test_group_with_lag_messages_in_hand_a_failure_and_a_dead_letter(
    redis: Redis, redis_url: str, prefix: str
) -> None:
    """Everything that an operator asks of a group, the same for people and for programs."""
    where = ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with (
            opened(streams.group("billing", start="new")) as billing,
            opened(streams.group("mail", start="new", consumer="mail-0")) as mail,
        ):
            await streams.publish(*(message(number) for number in range(8)))
            first, second, third = await deliveries(billing, 3)
            assert await billing.bury(first, error="ValueError: no", attempts=1)
            await billing.count(second, error="KeyError: 'order'")
            await billing.count(second)
            await billing.ack(third)
            await deliveries(mail, 1)
            table, program = await asyncio.gather(
                silbo("groups", *where, command=SILBO), silbo("groups", "events", *where, "--json")
            )
    assert (table.code, program.code, program.err) == (0, 0, "")
    of_billing, of_mail = program.objects
    assert of_billing["stream"] == f"{prefix}:{{events}}"
    figures = ("group", "lag", "lag_is_at_least", "in_hand", "retrying", "dead", "deserted")
    assert [of_billing[name] for name in figures] == ["billing", 5, False, 1, 1, 1, False]
    assert [of_mail[name] for name in figures] == ["mail", 7, False, 1, 0, 0, False]
    oldest = of_billing["oldest"]
    assert (oldest["entry"], oldest["attempts"], oldest["error"]) == (second.id, 2, "KeyError: 'order'")
    (consumer,) = of_billing["consumers"]
    assert (consumer["host"], consumer["pid"], consumer["in_hand"]) == (HOST, os.getpid(), 1)
    assert oldest["consumer"] == consumer["consumer"] and not consumer["silent"]
    (named,) = of_mail["consumers"]
    assert (named["consumer"], named["host"], named["pid"]) == ("mail-0", HOST, os.getpid())
    assert re.search(rf"billing +5, for \d+ s +1 +1 +1 +1 +{second.id}, \d+ s, 2 attempts", table.out), table.out
    assert re.search(rf"mail +{HOST} +{os.getpid()} +mail-0 +1 +\d+ s ago", table.out), table.out
    assert "2 attempts, the last failed: KeyError: 'order'" in table.out


async def test_two_live_consumers_of_one_name_are_told_with_their_processes(
    redis: Redis, redis_url: str, prefix: str
) -> None:
    """As long as they notice each other; one that has left is forgotten after some seconds."""
    signs = f"{prefix}:{{events}}:live:billing"
    where = ("--redis", redis_url, "--prefix", prefix)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        group = streams.group("billing", start="new", consumer="billing-0")
        async with opened(group) as one, opened(group) as other:
            reading = [asyncio.create_task(_read(receiver)) for receiver in (one, other)]
            try:
                await eventually(lambda: redis.hexists(signs, "! billing-0"))
                table, program = await asyncio.gather(silbo("groups", *where), silbo("groups", *where, "--json"))
            finally:
                for task in reading:
                    task.cancel()
                await asyncio.gather(*reading, return_exceptions=True)
    noticed: Any = await redis.hget(signs, "! billing-0")
    at, *both = noticed.decode().split()
    await redis.hset(signs, "! billing-0", " ".join([str(int(at) - 20_000), *both]))
    (later,) = await read_groups(redis, prefix=prefix)
    (consumer,) = program.object["consumers"]
    assert consumer["name_taken_twice"] == [{"host": HOST, "pid": os.getpid()}] * 2
    who = f"{HOST}, pid {os.getpid()}"
    assert f"two live consumers have the name billing-0, at {who} and {who}" in table.out
    assert [each.name_taken_twice for each in later.consumers] == [()]


async def _read(receiver: Receiver) -> None:
    while True:
        await receive(receiver, 1)


@pytest.mark.every_redis
async def test_lag_is_right_after_a_restart(own_redis: RedisServer, prefix: str) -> None:
    """Redis 7.0 reports none, or a wrong one, from then on."""
    async with Redis.from_url(own_redis.url) as client, RedisStreams(client, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*(message(number) for number in range(50)))
            await receiver.ack(*await deliveries(receiver, 20))
            await deliveries(receiver, 10)
        await asyncio.to_thread(own_redis.kill)
        await asyncio.to_thread(own_redis.restart)
        await eventually(client.ping)
        (group,) = await read_groups(client, prefix=prefix, stream="events")
        assert (group.lag, group.lag_is_at_least, group.in_hand) == (20, False, 10)


async def test_wrong_count_of_redis_is_not_believed(redis: Redis, prefix: str) -> None:
    """As Redis 7.0 to 7.2 have it after a restart: too few entries read, and no note of silbo's beside them."""
    key = f"{prefix}:{{events}}"
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*(message(number) for number in range(9)))
            last = (await deliveries(receiver, 4))[-1].id
    await redis.delete(f"{key}:given")
    await redis.execute_command("XGROUP", "SETID", key, "billing", last, "ENTRIESREAD", 1)
    (group,) = await read_groups(redis, prefix=prefix)
    assert group.lag == 5


async def test_large_lag_is_redis_s_or_bounded(redis: Redis, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every entry of a million is counted: that would hold up Redis for seconds."""
    monkeypatch.setattr(module, "COUNTED_EXACTLY", 10)
    monkeypatch.setattr(module, "COUNTED_AT_MOST", 25)
    monkeypatch.setattr(module, "PAGE", 4)
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        async with opened(streams.group("billing", start="new")) as receiver:
            await streams.publish(*(message(number) for number in range(50)))
            await deliveries(receiver, 1)
        (known,) = await read_groups(redis, prefix=prefix)
        await redis.hset(f"{prefix}:{{events}}:given", "billing", "?0-0:0")
        (doubted,) = await read_groups(redis, prefix=prefix)
    assert (known.lag, known.lag_is_at_least) == (49, False)
    assert (doubted.lag, doubted.lag_is_at_least) == (25, True)


async def test_killed_consumer_is_silent_and_its_group_deserted(redis: Redis, redis_url: str, prefix: str) -> None:
    stream = f"{prefix}:{{events}}"
    await redis.xgroup_create(stream, "billing", "0", mkstream=True)
    await redis.xadd(stream, {"message": "{}"})
    await redis.xreadgroup("billing", f"{HOST}:4711:0123456789ab-1", {stream: ">"})
    entry = (await redis.xpending_range(stream, "billing", "-", "+", 1))[0]["message_id"]
    await redis.xclaim(stream, "billing", "web-2:12:0123456789ab-1", 0, [entry], idle=3_600_000)
    await redis.xgroup_delconsumer(stream, "billing", f"{HOST}:4711:0123456789ab-1")
    where = ("groups", "--redis", redis_url, "--prefix", prefix, "--json")
    live, impatient = await silbo(*where), await silbo(*where, "--silent-after", "0.000001s")
    assert impatient.object["consumers"][0]["silent"] and impatient.object["deserted"]
    table = await silbo(*where[:-1], "--silent-after", "0.000001s")
    assert f"{stream}: its consumer is silent, the last sign 0 s ago, and 1 message waits" in table.out
    (consumer,) = live.object["consumers"]
    assert (consumer["host"], consumer["pid"], consumer["silent"]) == ("web-2", 12, False)
    status = (await read_groups(redis, prefix=prefix))[0]
    assert not status.is_deserted and status.oldest is not None
    assert (status.oldest.consumer, status.lag) == ("web-2:12:0123456789ab-1", 0)


async def test_group_without_consumers_is_told(redis: Redis, redis_url: str, prefix: str) -> None:
    await redis.xgroup_create(f"{prefix}:{{orders}}", "billing", "0", mkstream=True)
    await redis.xadd(f"{prefix}:{{orders}}", {"message": "{}"})
    done = await silbo("groups", "--redis", redis_url, "--prefix", prefix)
    assert f"billing at {prefix}:{{orders}}: it has no consumer, and 1 message waits" in done.out


async def test_wrong_prefix_names_the_streams_that_exist(redis: Redis, redis_url: str, prefix: str) -> None:
    """The most common mistake of all: without `--prefix`, or with another stream."""
    await redis.xadd(f"{prefix}:{{orders}}", {"message": "{}"})
    await redis.xadd(f"{prefix}:{{orders}}:dead", {"message": "{}"})
    for arguments in (("--prefix", f"{prefix}x"), ("events", "--prefix", prefix)):
        done = await silbo("groups", "--redis", redis_url, *arguments)
        assert (done.code, done.out) == (1, "") and f"{prefix}:{{orders}}" in done.err, done.err
        assert ":dead" not in done.err and "there is no stream" in done.err
    none = await silbo("groups", "--redis", redis_url, "--prefix", prefix)
    assert (none.code, none.out, none.err) == (0, "", "no groups: no consumer has been there yet\n")


@pytest.mark.long
@pytest.mark.every_redis
async def test_replica_answers_too(redis_binary: Binary | None, prefix: str) -> None:
    """Nothing is written, so a replica is asked as well; promoted, it has the same figures."""
    with RedisServer(port=True, binary=redis_binary) as first, RedisServer(binary=redis_binary) as second:
        async with Redis.from_url(first.url) as redis, Redis.from_url(second.url) as replica:
            async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
                async with opened(streams.group("billing", start="new")) as receiver:
                    await streams.publish(*(message(number) for number in range(9)))
                    await deliveries(receiver, 4)
            (own,) = await read_groups(redis, prefix=prefix)
            await replica.execute_command("REPLICAOF", "127.0.0.1", first.url.rpartition(":")[2].partition("/")[0])
            await eventually(lambda: _has(replica, prefix))
            (of_replica,) = await read_groups(replica, prefix=prefix)
            await replica.execute_command("REPLICAOF", "NO", "ONE")
            (promoted,) = await read_groups(replica, prefix=prefix)
    figures = [(group.lag, group.in_hand, group.retrying) for group in (own, of_replica, promoted)]
    assert figures == [(5, 4, 0)] * 3


async def _has(replica: Redis, prefix: str) -> bool:
    groups: Any = await replica.xinfo_groups(f"{prefix}:{{events}}")
    return bool(groups) and groups[0]["pending"] == 4
