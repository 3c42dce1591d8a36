"""`silbo relay` as a process of its own: it sends, it ends in good order, and it may be killed."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.command_line import SILBO, counts, fill, relay, silbo, started, stopped
from tests.support.redis_streams import eventually
from tools.redis_server import RedisServer


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def numbers(entries: Any) -> list[int]:
    return [json.loads(fields[b"message"])["payload"]["number"] for _, fields in entries]


def in_order_and_once(found: list[int], many: int, keys: int) -> bool:
    """Each message once, and those of each key as they were stored."""
    return sorted(found) == list(range(many)) and all(
        [number for number in found if number % keys == key] == list(range(key, many, keys)) for key in range(keys)
    )


async def test_it_sends_what_is_stored_and_what_comes(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    """A Ctrl-C ends it with 0, and its lead with it; nothing of the URL's secrets is told."""
    await fill(store, 3)
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix) as process:
        await eventually(lambda: _has(redis, prefix, 3))
        await fill(store, 2)
        await eventually(lambda: _has(redis, prefix, 5))
        told = await stopped(process, signal.SIGINT)
    assert re.search(r"Z INFO relay stopped sent=5 known=0 dead=0 postponed=0 fenced=0 slow=0\n$", told), told
    assert await counts(store) == {"pending": 0, "sending": 0, "sent": 5, "dead": 0}
    status = await silbo("outbox", "status", "--store", store, "--json")
    assert status.object["leads"] == []
    entries: Any = await redis.xrange(f"{prefix}:{{events}}")
    assert json.loads(entries[0][1][b"message"])["headers"]["app"] == "shop", "the program's own, not the relay's"


async def test_status_names_the_leading_process(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    """Its host and its pid: with them an operator finds it among many machines."""
    await fill(store, 1)
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix) as process:
        await eventually(lambda: _has(redis, prefix, 1))
        table, program = await asyncio.gather(
            silbo("outbox", "status", "--store", store), silbo("outbox", "status", "--store", store, "--json")
        )
        await stopped(process)
    (lead,) = program.object["leads"]
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64]
    assert (lead["host"], lead["pid"]) == (host, process.pid) and lead["owner"].startswith(f"{host}:{process.pid}:")
    assert f"{host}" in table.out and f"{process.pid}" in table.out and lead["owner"] not in table.out


async def _has(redis: Redis, prefix: str, many: int) -> bool:
    return int(await redis.xlen(f"{prefix}:{{events}}")) >= many


@pytest.mark.long
async def test_sigterm_in_the_middle_of_work(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    """What it has no time for stays in the store, and the next relay goes on there: each once, in order."""
    many, keys = 20_000, 7
    await fill(store, many, keys=keys)
    arguments = ("--store", store, "--redis", redis_url, "--prefix", prefix)
    async with relay(*arguments, "--drain", "0s") as process:
        await eventually(lambda: _has(redis, prefix, 1000))
        told = await stopped(process)
    assert "relay stopped" in told
    left = (await counts(store))["pending"] + (await counts(store))["sending"]
    assert 0 < left < many, "stopped in the middle"
    async with relay(*arguments) as process:
        await eventually(lambda: _has(redis, prefix, many), 20)
        await stopped(process)
    assert in_order_and_once(numbers(await redis.xrange(f"{prefix}:{{events}}")), many, keys)
    assert (await counts(store))["sent"] == many


async def test_stop_sends_what_waits(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    """Within --drain, also where the signal comes before the first message was sent."""
    await fill(store, 2000)
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix, "--drain", "20") as process:
        await stopped(process)
    assert (await counts(store))["sent"] == 2000


@pytest.mark.long
async def test_second_relay_takes_over_from_a_killed_one(
    redis: Redis, redis_url: str, prefix: str, store: Path
) -> None:
    """kill -9 in the middle of work, several partitions: nothing is lost, doubled or out of order."""
    many, keys = 40_000, 7
    await fill(store, 0, partitions=3)
    arguments = ("--store", store, "--redis", redis_url, "--prefix", prefix, "--lease", "1s")
    async with relay(*arguments) as first, relay(*arguments) as second:
        await fill(store, many, keys=keys, partitions=3)
        await eventually(lambda: _has(redis, prefix, 1000))
        first.kill()
        await first.communicate()
        assert (await counts(store))["sent"] < many, "killed in the middle"
        await eventually(lambda: _has(redis, prefix, many), 20)
        await stopped(second)
    assert in_order_and_once(numbers(await redis.xrange(f"{prefix}:{{events}}")), many, keys)


async def test_redis_that_is_away_is_waited_for(own_redis: RedisServer, store: Path) -> None:
    """It starts without it, says so in a line a minute, and sends as soon as it is back, and says that, too."""
    own_redis.kill()
    await fill(store, 10)
    async with relay("--store", store, "--redis", own_redis.url) as process:
        await eventually(lambda: _failing(store), 10)
        own_redis.restart()
        async with Redis.from_url(own_redis.url) as redis:
            await eventually(lambda: _has(redis, "silbo", 10), 10)
        told = await stopped(process)
    away, back = [line for line in told.splitlines() if "WARNING" in line]
    assert "broker unavailable, trying again" in away and "can't be reached" in away
    assert "WARNING broker back after " in back


async def _failing(store: Path) -> bool:
    status = (await silbo("outbox", "status", "--store", store, "--json")).object
    return status["failing"]["attempts"] >= 2 and "can't be reached" in status["failing"]["error"]


async def test_first_line_says_where_it_sends_to(redis_url: str, prefix: str, store: Path) -> None:
    """A prefix that was forgotten brings messages into another stream, where nobody looks for them."""
    await fill(store, 1)
    arguments = ("--store", store, "--redis", redis_url, "--prefix", prefix, "--format", "cloudevents")
    async with started(*arguments) as (_, first):
        assert f' stream="{prefix}:{{events}}" format="cloudevents"\n' in first


@pytest.mark.long
async def test_options_are_the_brokers(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    """Format and retention of the stream are what the program would have said itself."""
    stream = f"{prefix}:{{events}}"
    pipeline = redis.pipeline(transaction=False)
    for number in range(1, 501):
        pipeline.xadd(stream, {"message": "old"}, id=f"{number}-1")
    await pipeline.execute()
    await fill(store, 1)
    arguments = ("--store", store, "--redis", redis_url, "--prefix", prefix, "--format", "cloudevents")
    async with relay(*arguments, "--retain", "forever") as process:
        await eventually(lambda: _has(redis, prefix, 501))
        await stopped(process)
    newest: Any = await redis.xrevrange(stream, count=1)
    assert json.loads(newest[0][1][b"message"])["specversion"] == "1.0"
    changed = await silbo("retention", "set", "--retain", "1h", "--redis", redis_url, "--prefix", prefix, "--yes")
    assert changed.code == 0, changed.err
    await fill(store, 1)
    async with relay(*arguments, "--retain", "1h") as process:
        await eventually(lambda: _was_trimmed(redis, stream))
        await stopped(process)


async def _was_trimmed(redis: Redis, stream: str) -> bool:
    return 2 <= int(await redis.xlen(stream)) < 300


async def test_it_tells_its_figures_where_they_are_wanted(
    redis: Redis, redis_url: str, prefix: str, store: Path
) -> None:
    await fill(store, 3)
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix, "--figures", "0.05s") as process:
        assert process.stderr is not None
        async with asyncio.timeout(10):
            assert b" INFO relay figures sent=3 " in await process.stderr.readline()
        told = await stopped(process)
    assert "figures" not in told, "only where they changed"


async def test_relay_of_a_missing_file_fails_and_makes_none(redis_url: str, tmp_path: Path) -> None:
    done = await silbo("relay", "--store", tmp_path / "no.db", "--redis", redis_url, command=SILBO)
    assert done.code == 1 and done.err == f"silbo: {tmp_path / 'no.db'}: there is no such file\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
async def test_sent_rows_are_kept_as_long_as_it_is_told(redis: Redis, redis_url: str, prefix: str, store: Path) -> None:
    await fill(store, 3)
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix) as process:
        await eventually(lambda: _has(redis, prefix, 3))
        await stopped(process)
    assert (await counts(store))["sent"] == 3
    async with relay("--store", store, "--redis", redis_url, "--prefix", prefix, "--keep-sent", "0s") as process:
        await eventually(lambda: _is_empty(store))
        await stopped(process)


async def _is_empty(store: Path) -> bool:
    return not any((await counts(store)).values())
