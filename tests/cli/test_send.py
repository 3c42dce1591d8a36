"""`silbo send`: to a stream, or to Pub/Sub, as a consumer gets it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from silbo import AsyncEventDispatcher, Consumer
from silbo.brokers.redis import RedisPubSub, RedisStreams
from silbo.shards import place
from tests.cli.conftest import Run
from tests.support.app_files import SHOP, write
from tests.support.command_line import SILBO, silbo
from tests.support.redis_streams import message


async def test_message_reaches_a_group(redis: Redis, redis_url: str, prefix: str, tmp_path: Path) -> None:
    """Checked against the app, in a process of its own: it has the key and the fields that the app would send."""
    dispatcher = AsyncEventDispatcher()
    streams = RedisStreams(redis, app="billing", prefix=prefix)
    async with Consumer(dispatcher, streams.group("billing", start="new")) as consumer:
        write(tmp_path, SHOP)
        env = {"SILBO_REDIS_URL": redis_url, "SILBO_PREFIX": prefix}
        check = ("--check", "shop.web:dispatcher", "--app-dir", tmp_path)
        done = await silbo("send", "order.paid", '{"order": 7}', *check, "--json", env=env, command=SILBO)
        assert (done.code, done.err) == (0, ""), done.err
        fields = done.object
        assert fields == {
            "name": "order.paid",
            "event_id": fields["event_id"],
            "kind": "notification",
            "key": "7",
            "to": f"{prefix}:{{events}}",
        }
        waiting = _start(dispatcher.wait_for("order.paid", timeout=30))
        running = _start(consumer.run())
        event: Any = await waiting
        consumer.stop()
        await running
    assert event.payload["order"] == 7 and event.payload["tags"] is None
    assert str(event.event_id) == fields["event_id"] and event.origin.app == "silbo-send"


async def test_message_reaches_those_who_listen(redis: Redis, redis_url: str, prefix: str) -> None:
    dispatcher = AsyncEventDispatcher()
    pubsub = RedisPubSub(redis, app="billing", prefix=prefix)
    async with Consumer(dispatcher, pubsub.subscribe("cache.*")) as consumer:
        waiting = _start(dispatcher.wait_for("cache.emptied", timeout=30))
        running = _start(consumer.run())
        done = await silbo("send", "cache.emptied", "{}", "--pubsub", "--redis", redis_url, "--prefix", prefix)
        assert done.code == 0 and f"sent to {prefix}:notification_event:cache.emptied (" in done.out
        event: Any = await waiting
        assert event.origin.app == "silbo-send"
        consumer.stop()
        await running


async def test_stream_that_no_group_reads_is_told(redis: Redis, redis_url: str, prefix: str) -> None:
    """As a mistaken prefix or address has: the message is there, and nobody looks for it."""
    arguments = ("--redis", redis_url, "--prefix", prefix, "--to", "orders", "--kind", "ecst", "--key", "7")
    done = await silbo("send", "order.paid", '{"order": 7}', *arguments)
    assert done.code == 0 and done.err.startswith(f"no group reads {prefix}:{{orders}} yet")
    ((_, entry),) = await redis.xrange(f"{prefix}:{{orders}}")
    message = json.loads(entry[b"message"])
    assert (message["message_type"], message["headers"]["key"]) == ("ecst_event", "7")


@pytest.mark.parametrize(
    ("arguments", "code", "hint"),
    [
        (["order.paid", "{order: 7}"], 2, "the payload is no JSON"),
        (["order.paid", "[7]"], 2, "the payload is no JSON object"),
        (["order.*", "{}"], 1, "'order.*'"),
        (["order.paid", "{}", "--check", "nowhere_at_all:x"], 1, "no module 'nowhere_at_all'"),
        (["order.paid", "{}", "--to", "a b"], 2, "'a b'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], code: int, hint: str, run: Run) -> None:
    done = run("send", *arguments, "--redis", "redis://127.0.0.1:1")
    assert (done.code, done.out) == (code, "") and hint in done.err.splitlines()[-1]


def _start(work: Any) -> Any:
    return asyncio.get_running_loop().create_task(work)


async def test_message_to_an_address_with_shards_goes_to_the_shard_of_its_key(
    redis: Redis, redis_url: str, prefix: str
) -> None:
    """The number is read from Redis: a message by hand goes where the program puts its key."""
    async with RedisStreams(redis, app="shop", prefix=prefix) as streams:
        keyed = message(1)
        keyed = replace(keyed, headers={**keyed.headers, "key": "7"})
        await streams.publish(place(keyed, "orders", 4))
    ((key,),) = [[each async for each in redis.scan_iter(f"{prefix}:{{*}}", _type="stream")]]
    done = await silbo(
        "send", "order.paid", "{}", "--to", "orders", "--key", "7", "--redis", redis_url, "--prefix", prefix
    )
    assert done.code == 0 and key.decode() in done.out, done
    assert await redis.xlen(key) == 2
